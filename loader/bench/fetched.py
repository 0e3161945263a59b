"""Other people's files that `benchmarks/peers/fetch.py` took out of their wheels: found by name, checked, unpacked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MANIFEST = "manifest.json"
"""Names every file of the folder with its wheel and sha256; it is there only where the folder is complete."""
FETCH = "python benchmarks/peers/fetch.py"
_LOADED: set[str] = set()
"""sha256 of the libraries that are loaded; from a second path, one would register its operators again: an error."""


class FetchedError(ValueError):
    """The files are not there, or are not those that the manifest names; the message says what to do."""


class Fetched:
    """A folder that `fetch.py` filled; raises `FetchedError` where it has not been."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        try:
            listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._files: Mapping[str, Mapping[str, Any]] = {one["member"]: one for one in listed["files"]}
        except FileNotFoundError:
            raise FetchedError(
                f"the peers' files are not in `{folder}`; run `{FETCH} {folder}` where there is a network"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FetchedError(f"`{folder / MANIFEST}` is not what `{FETCH}` writes: {error}") from None
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._paths: dict[str, Path] = {}

    def require(self, prefix: str) -> None:
        """Check the bytes of all files whose name begins with `prefix`, those that are kept packed excepted."""
        names = [name for name in self._files if name.startswith(prefix)]
        if not names:
            raise FetchedError(f"`{self.folder}` has no `{prefix}`; remove it and run `{FETCH} {self.folder}`")
        for name in names:
            if self._files[name]["stored"] == name:
                self.read(name)

    def read(self, member: str) -> bytes:
        """The bytes of a wheel's member, unpacked where they are kept packed, and the ones that were fetched."""
        one = self._files.get(member)
        if one is None:
            raise FetchedError(f"`{self.folder}` has no `{member}`; remove it and run `{FETCH} {self.folder}`")
        try:
            data: bytes = (self.folder / one["stored"]).read_bytes()
            if one["stored"] != member:
                data = lzma.decompress(data)
        except (OSError, lzma.LZMAError) as error:
            raise FetchedError(f"`{self.folder / one['stored']}` can't be read: {error}; fetch it again") from None
        if hashlib.sha256(data).hexdigest() != one["sha256"]:
            raise FetchedError(f"`{self.folder / one['stored']}` is not the file that was fetched; fetch it again")
        return data

    def path(self, member: str) -> Path:
        """A file with these bytes: the fetched one, or one in a temporary folder that goes with the process."""
        if member in self._paths:
            return self._paths[member]
        data = self.read(member)
        path = self.folder / member
        if self._files[member]["stored"] != member:
            if self._unpacked is None:
                self._unpacked = tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True)
            path = Path(self._unpacked.name) / member.replace("/", "-")
            path.write_bytes(data)
        self._paths[member] = path
        return path

    def load(self, library: str) -> None:
        """Register a library's operators, once in a process; raises what torch raises where it does not load."""
        path = self.path(library)
        digest = self._files[library]["sha256"]
        if digest not in _LOADED:
            torch.ops.load_library(path)
            _LOADED.add(digest)


def module_at(name: str, path: Path) -> ModuleType:
    """The module in this file, imported once under this name; for files that are in no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"`{path}` is no module")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
