"""Write a folder of generated files: whole or not at all, and never over what someone else put there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from gatekeeper.errors import GatekeeperError

MARKER = ".generated"
"""The file that lists what was written, one path a line, under a first line that says by what."""


class WriteError(GatekeeperError):
    """A folder that can't be written without losing something that we did not put there."""


def write_folder(out: Path, files: Mapping[str, str], *, by: str, force: bool = False) -> None:
    """Make `out` hold `files` (relative path to text, `/` between folders) and a marker, and nothing older of ours.

    `by` is the command that writes (`gatekeeper docs`). Files that it did not write are an error before anything
    is touched; with `force` they stay, and only those of the same name are replaced. Everything is written beside
    `out` first, so that a full disk leaves the old files as they were. Raises `WriteError`.
    """
    try:
        _write(out.resolve(), files, by=by, force=force)
    except OSError as error:  # it names a file of ours that nobody asked for
        raise WriteError(f"`{out}` can't be written: {error.strerror or error}; give another folder") from None
    except RuntimeError:  # of `resolve`, until Python 3.13
        raise WriteError(f"`{out}` can't be written: a link that leads to itself; give another folder") from None


def _write(out: Path, files: Mapping[str, str], *, by: str, force: bool) -> None:
    own = own_files(out, by=by, force=force)
    marker = "".join(f"{line}\n" for line in (_first_line(by), *sorted(files)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        new = Path(beside, "new")
        for name, text in {MARKER: marker, **files}.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        if not out.exists():
            new.rename(out)
            return
        for stale in own - files.keys():
            _remove(out, stale)
        # The marker comes first: whatever stops us between two files leaves none that nobody owns.
        for name in (MARKER, *files):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).replace(out / name)


def own_files(out: Path, *, by: str, force: bool = False) -> set[str]:
    """Return the files of `out` that `by` wrote earlier; raise `WriteError` if there are others and no `force`."""
    if not out.exists():
        return set()
    if not out.is_dir():
        raise WriteError(f"`{out}` is a file; give a folder to write to")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    first, *listed = _marker_lines(out / MARKER)
    # Only what was found counts, so that no marker can name a file outside of the folder.
    own = found & set(listed) if first == _first_line(by) else set()
    foreign = sorted(found - own - ({MARKER} if first == _first_line(by) else set()))
    if foreign and not force:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        names = ", ".join(f"`{name}`" for name in foreign[:3])
        raise WriteError(
            f"`{out}` has files that `{by}` did not write: {names}{more}; give an empty folder, or --force to keep "
            "them and write beside them"
        )
    return own


def differences(out: Path, files: Mapping[str, str], *, by: str) -> list[str]:
    """Say, a line a file, how `out` differs from what `write_folder` would make of it; nothing where it does not."""
    own = own_files(out, by=by, force=True)
    found = []
    for name, text in sorted(files.items()):
        path = out / name
        if not path.is_file():
            found.append(f"`{name}` is missing")
        elif path.read_bytes() != text.encode("utf-8"):
            found.append(f"`{name}` is out of date")
    return found + [f"`{name}` is no longer written" for name in sorted(own - files.keys())]


def _first_line(by: str) -> str:
    return f"# Written by `{by}`: run it again, do not edit these files."


def _marker_lines(path: Path) -> list[str]:
    if path.is_symlink() or not path.is_file():
        return [""]
    return path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]


def _remove(out: Path, name: str) -> None:
    """Remove a file, and the folders that it leaves empty."""
    path = out / name
    path.unlink()
    for folder in path.parents:
        if folder == out or any(folder.iterdir()):
            return
        folder.rmdir()
