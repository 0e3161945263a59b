"""Which files have passed the schema check: digests in the user's cache folder, so that no file is checked twice.

jsonschema costs 60 ms to import and as much again for the shipped rules, more than all the rest of a decision. Of a
file that passed only a digest is kept, over its text and kind, every schema and the code that checks; nothing of what
it says. The memory is safe to delete, and one that can't be read or written is no memory. Whoever can write to it can
have a file of the wrong shape taken for checked, so it is read only if it is the user's own and nobody else's to
write; `gatekeeper check` never asks it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from gatekeeper.data import data_folder
from gatekeeper.errors import Fault
from gatekeeper.source import Document, Path_, schema_faults

VARIABLE = "GATEKEEPER_CACHE"
"""Environment variable: another folder to keep digests in, or `off`."""

MAX_DIGESTS = 10_000
_LINE_BYTES = 65


class _Memory:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed = frozenset(_read(file))
        self._new: list[bytes] = []

    def shape_faults(self, document: Document, kind: str) -> list[tuple[Path_, Fault]]:
        digest = hashlib.sha256(f"{_checker()}\0{kind}\0{document.text}".encode()).hexdigest().encode()
        if digest in self._passed:
            return []
        faults = list(schema_faults(document, kind))
        if not faults:
            self._new.append(digest)
        return faults

    def save(self) -> None:
        """Add what has passed; the oldest make room. Of two processes at once, one may lose what it added."""
        if not self._new:
            return
        import tempfile  # only who has checked a file pays for it

        digests = list(dict.fromkeys([*_read(self._file), *self._new]))[-MAX_DIGESTS:]
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, new = tempfile.mkstemp(dir=self._file.parent)
            try:
                with open(handle, "wb") as stream:  # noqa: PTH123  # a handle, not a path
                    stream.write(b"".join(digest + b"\n" for digest in digests))
                Path(new).replace(self._file)
            except OSError:
                Path(new).unlink()


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Within, files that have passed before are not checked again, and those that pass now are remembered."""
    file = _digest_file()
    if file is None:
        yield
        return
    memory = _Memory(file)
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)
        memory.save()


def shape_faults(document: Document, kind: str) -> list[tuple[Path_, Fault]]:
    """Return what of a file does not fit its schema, as `schema_faults` says it."""
    memory = _memory.get()
    return list(schema_faults(document, kind)) if memory is None else memory.shape_faults(document, kind)


def _digest_file() -> Path | None:
    """Say where digests are kept: where `GATEKEEPER_CACHE` says, else in the platform's folder for caches."""
    told = os.environ.get(VARIABLE, "")
    if told == "off":
        return None
    home = os.path.expanduser("~")  # noqa: PTH111  # Path's own raises where there is no home
    if sys.platform == "win32":
        usual = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        usual = f"{home}/Library/Caches"
    else:
        # A relative path is invalid: https://specifications.freedesktop.org/basedir-spec/latest/
        own = os.environ.get("XDG_CACHE_HOME", "")
        usual = own if os.path.isabs(own) else f"{home}/.cache"  # noqa: PTH117
    folder = Path(told) if told else Path(usual, "model-gatekeeper")
    return folder / "passed" if folder.is_absolute() else None


def _read(file: Path) -> list[bytes]:
    """Return the digests in a file, oldest first; none where it is not a file of ours alone."""
    try:
        status = file.stat()
        others_write = os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022)
        if others_write or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_DIGESTS * _LINE_BYTES:
            return []
        return [line for line in file.read_bytes().split(b"\n") if len(line) == _LINE_BYTES - 1]
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return []


@cache
def _checker() -> str:
    """Return a digest of all that says what passes: the schemas, the code that reads YAML, and who checks."""
    digest = hashlib.sha256(f"{sys.version} {yaml.__version__}".encode())
    for file in (*sorted(data_folder("schema").glob("*.json")), Path(__file__).with_name("source.py")):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    spec = find_spec("jsonschema")
    assert spec is not None and spec.origin is not None, "it is among the requirements"
    # Its version would take importlib.metadata, 10 ms; another release has other files.
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        status = file.stat()
        digest.update(f"\0{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
