"""Folders of generated files: whole, repeatable, and never over what someone else put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatekeeper.written import MARKER, WriteError, differences, write_folder

BY = "gatekeeper docs"


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(out: Path, files: dict[str, str], *, force: bool = False) -> None:
    write_folder(out, files, by=BY, force=force)


def test_a_new_folder_holds_the_files_and_a_marker_that_lists_them(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    write(out, {"x.md": "x\n", "deep/y.md": "ü\n"})
    assert tree(out) == {"x.md": "x\n", "deep/y.md": "ü\n", MARKER: (out / MARKER).read_text()}
    assert (out / MARKER).read_text().splitlines()[1:] == ["deep/y.md", "x.md"]
    assert [path.name for path in out.parent.iterdir()] == ["b"]


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    write(tmp_path, {"x.md": "x\n"})
    assert (tmp_path / "x.md").read_text() == "x\n"


def test_writing_again_replaces_what_was_written_and_removes_what_no_longer_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"x.md": "1\n", "deep/er/y.md": "1\n"})
    write(out, {"x.md": "2\n", "z.md": "2\n"})
    assert tree(out).keys() == {"x.md", "z.md", MARKER}
    assert (out / "x.md").read_text() == "2\n"
    assert not (out / "deep").exists()


@pytest.mark.parametrize("name", ["notes.md", "deep/notes.md", "x.md"])
def test_a_file_of_someone_else_is_an_error_and_nothing_is_touched(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(WriteError, match=f"`{name}`.*--force"):
        write(tmp_path / "out", {"x.md": "x\n"})
    assert tree(tmp_path / "out") == {name: "mine"}


def test_force_keeps_the_files_of_others_and_replaces_those_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("mine")
    (tmp_path / "notes.md").write_text("mine")
    write(tmp_path, {"x.md": "x\n"}, force=True)
    assert {"x.md": "x\n", "notes.md": "mine"}.items() <= tree(tmp_path).items()
    with pytest.raises(WriteError, match=r"`notes\.md`"):
        write(tmp_path, {"x.md": "x\n"})


def test_what_another_command_wrote_is_foreign(tmp_path: Path) -> None:
    write_folder(tmp_path, {"x.json": "{}"}, by="gatekeeper schema")
    with pytest.raises(WriteError, match=r"did not write: `\.generated`, `x\.json`"):
        write(tmp_path, {"x.md": "x\n"})


def test_a_marker_that_names_files_outside_removes_none_of_them(tmp_path: Path) -> None:
    outside = tmp_path / "outside.md"
    outside.write_text("mine")
    out = tmp_path / "out"
    write(out, {"x.md": "x\n"})
    with (out / MARKER).open("a") as marker:
        marker.write("../outside.md\n")
    write(out, {"y.md": "y\n"})
    assert outside.read_text() == "mine"


def test_a_link_to_a_folder_of_someone_else_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(WriteError, match="`link`"):
        write(tmp_path / "out", {"x.md": "x\n"})


def test_a_file_where_the_folder_is_due_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WriteError, match="is a file"):
        write(tmp_path / "out", {"x.md": "x\n"})


def test_a_failure_while_writing_leaves_the_old_files_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"x.md": "1\n"})
    with pytest.raises(UnicodeEncodeError):
        write(out, {"x.md": "2\n", "y.md": "\ud800"})
    assert (out / "x.md").read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_differences_name_what_is_missing_out_of_date_and_left_over(tmp_path: Path) -> None:
    write(tmp_path, {"x.md": "x\n", "y.md": "y\n"})
    assert differences(tmp_path, {"x.md": "x\n", "y.md": "y\n"}, by=BY) == []
    assert differences(tmp_path, {"x.md": "2\n", "z.md": "z\n"}, by=BY) == [
        "`x.md` is out of date",
        "`z.md` is missing",
        "`y.md` is no longer written",
    ]
