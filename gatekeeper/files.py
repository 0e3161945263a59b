"""Files from strangers: only regular files of their own folder are opened, and none is waited for."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO


class Unreadable(ValueError):
    """What is wrong in one file, one sentence each; the message names what was expected."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def inside(folder: Path, name: str, kind: str = "file") -> Path:
    """The real path of the file `name` of `folder`; raises `Unreadable` if it is missing, elsewhere or no file.

    `kind` is what the error calls it. Links may lead to files of the same folder, and from a snapshot of
    huggingface_hub's cache to its blobs.
    """
    for pure in (PurePosixPath(name), PureWindowsPath(name)):
        if pure.is_absolute() or pure.drive or ".." in pure.parts or not pure.parts:
            raise Unreadable("the path leaves the folder; an index may name files of its own folder only")
    if "\0" in name:
        raise Unreadable("the path holds a NUL character")
    try:
        mode = (folder / name).stat().st_mode
        real, home = (folder / name).resolve(), folder.resolve()
    except FileNotFoundError:
        raise Unreadable(f"the {kind} is missing; download it again") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or of lone surrogates
        raise Unreadable(f"can't be opened: {getattr(error, 'strerror', None) or error}") from None
    # The cache keeps files as links `models--X/snapshots/REV/F -> ../../blobs/HASH`.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and not (blobs and real.is_relative_to(blobs)):
        raise Unreadable(f"the path leaves the folder, by a link to `{real}`; copy the file into the folder")
    if not stat.S_ISREG(mode):
        raise Unreadable("is not a regular file; a folder, pipe or device can't be read as one")
    return real


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises `Unreadable` for anything else, at once: a pipe without a writer would hang."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Unreadable("is missing") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"can't be opened: {getattr(error, 'strerror', None) or error}") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Unreadable("is not a regular file; a folder, pipe or device can't be read as one")
    return file


def read_whole(path: Path, most: int) -> bytes:
    """All of a file of at most `most` bytes; raises `Unreadable`."""
    with open_regular(path) as file:
        # Not `most` alone: Python takes memory for all that it is told to read.
        raw = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(raw) > most:
        raise Unreadable(f"is longer than {most} bytes")
    return raw


def require_unicode(raw: bytes, document: Any) -> None:
    r"""Raise `Unreadable` where the JSON `raw` has half a character, `"\ud800"`: no name can be written so again."""
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("is no Unicode text: a lone surrogate is no character") from None
