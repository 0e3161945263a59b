"""Commands that time something on one device take turns, over a file that they share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loader.bench.turn import Turn

OTHER = """
import sys
from pathlib import Path
from loader.bench.turn import Turn
with Turn(Path(sys.argv[1]), say=lambda text: print(text, flush=True)):
    print("mine", flush=True)
    sys.stdin.readline()
"""


class Other:
    """A command in another process, which has the device until it is told to end."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ends(self) -> None:
        self._process.communicate("\n", timeout=60)

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


def test_who_left_waits_for_the_other_to_end(tmp_path: Path) -> None:
    order = []
    with Turn(tmp_path / "lock") as turn:
        with turn.left():
            other = Other(tmp_path / "lock")
            assert other.says() == "mine"
            order.append("other")
            other.ends()
        order.append("mine again")
    assert order == ["other", "mine again"]


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


def test_a_file_that_can_only_be_read_will_do(tmp_path: Path) -> None:
    (tmp_path / "lock").touch(mode=0o444)
    with Turn(tmp_path / "lock"):
        other = Other(tmp_path / "lock")
        assert "takes turns" in other.says()
    assert other.says() == "mine"
    other.ends()
