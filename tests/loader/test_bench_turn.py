"""Commands that time something on one device take turns, over a file that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest

from loader.bench.turn import Turn
from loader.errors import BenchError

OTHER = """
import sys
from pathlib import Path
from loader.bench.turn import Turn
with Turn(Path(sys.argv[1]), say=lambda text: print(text, flush=True)):
    print("mine", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1]).with_suffix(".over").touch()
"""


class Other:
    """A command in another process, which has the device until it is told to end."""

    def __init__(self, path: Path) -> None:
        self._over = path.with_suffix(".over")
        self._over.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ends(self) -> None:
        self._process.communicate("\n", timeout=60)

    @property
    def has_ended(self) -> bool:
        """Whether it has done what it wanted of the device."""
        return self._over.exists()

    def is_killed(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=60)


def test_another_command_waits_and_says_so_until_the_turn_is_left(tmp_path: Path) -> None:
    said: list[str] = []
    with Turn(tmp_path / "lock", say=said.append) as turn:
        other = Other(tmp_path / "lock")
        assert "takes turns" in other.says()
        with turn.left():
            assert other.says() == "mine"
            other.ends()
    assert not said


def test_who_left_waits_for_the_other_to_end_and_says_so_once(tmp_path: Path) -> None:
    said: list[str] = []
    with Turn(tmp_path / "lock", say=said.append) as turn:
        for waits in (1, 2):
            with turn.left():
                other = Other(tmp_path / "lock")
                assert other.says() == "mine"
                later = Timer(0.3, other.ends)
                later.start()
            assert other.has_ended, f"went on before the other one had ended, time {waits}"
            later.join()
    assert len(said) == 1


def test_what_fails_while_the_turn_is_left_waits_for_nobody(tmp_path: Path) -> None:
    def interrupted() -> Other:
        with suppress(KeyboardInterrupt), Turn(tmp_path / "lock") as turn, turn.left():
            other = Other(tmp_path / "lock")
            assert other.says() == "mine"
            raise KeyboardInterrupt
        return other

    other = interrupted()
    assert not other.has_ended
    other.ends()


def test_what_is_killed_leaves_the_device_to_others(tmp_path: Path) -> None:
    other = Other(tmp_path / "lock")
    assert other.says() == "mine"
    other.is_killed()
    said: list[str] = []
    with Turn(tmp_path / "lock", say=said.append):
        assert not said


def test_a_failure_ends_the_turn(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Turn(tmp_path / "lock") as turn, turn.left():
        raise RuntimeError("out of memory")
    said: list[str] = []
    with Turn(tmp_path / "lock", say=said.append):
        assert not said


def test_another_users_file_will_do_and_ours_does_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        with Turn(tmp_path / "lock"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o444
    finally:
        os.umask(before)
    asked: list[int] = []
    opens = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: asked.append(flags) or opens(path, flags))
    with Turn(tmp_path / "lock"):
        assert not asked[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def test_what_can_not_be_opened_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        BenchError, match=r"lock`, by which commands on one GPU take turns, .*; delete it, or set TMPDIR"
    ):
        Turn(tmp_path / "lock").__enter__()
    assert not (tmp_path / "elsewhere").exists()
