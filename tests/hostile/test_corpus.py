"""Every hostile folder is refused by every command: in one sentence, with what and where, in little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import corpus, judge

SOME = list(corpus.HARMS)[::6]
"""The slow suite has all of them, by every command."""
Judge = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def judged(root: Path) -> Iterator[Judge]:
    command = [sys.executable, "-m", "tests.hostile.judge"]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        ask, answers = process.stdin, process.stdout

        def one(*arguments: object) -> dict[str, Any]:
            print(json.dumps(list(map(str, arguments))), file=ask, flush=True)
            answer: dict[str, Any] = json.loads(answers.readline())
            return answer

        yield one
        ask.close()


@pytest.fixture
def out() -> Iterator[Path]:
    """Not `tmp_path`, which pytest keeps: some of these files are large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def refused(name: str, folder: Path, answer: dict[str, Any]) -> None:
    output = answer["output"]
    assert answer["code"] == 1, answer
    assert "Traceback" not in output, output
    assert "error: " in output and corpus.said(name) in output, output
    assert len(output) < 10_000, "a person reads it"
    assert all(line.isprintable() for line in output.split("\n")), "no codes for the terminal"
    assert answer["megabytes"] < judge.MOST_MEGABYTES, answer


@pytest.mark.parametrize("name", corpus.HARMS)
def test_a_hostile_folder_is_refused(judged: Judge, out: Path, name: str) -> None:
    folder = corpus.write(name, out)
    refused(name, folder, judged("gatekeeper", "decide", folder))
    if name in SOME:
        refused(name, folder, judged("moe-loader", "load", folder))


def test_the_sound_folder_is_not(judged: Judge, out: Path) -> None:
    folder = corpus.sound(out / "checkpoint")
    assert judged("gatekeeper", "decide", folder)["code"] == 0


def test_what_was_wrong_is_not_opened_when_it_is_outside(judged: Judge, out: Path) -> None:
    """A reader who may not read it says so by another error than one who was not let out."""
    folder = corpus.write("shard-links-out", out)
    (out / "shard-links-out" / "checkpoint.safetensors").unlink()
    assert "missing" in judged("gatekeeper", "decide", folder)["output"]


@pytest.mark.hostile
@pytest.mark.parametrize("command", ["gatekeeper decide", "gatekeeper facts", "loader plan", "loader load"])
@pytest.mark.parametrize("name", corpus.HARMS)
def test_from_a_cold_start(judged: Judge, out: Path, name: str, command: str) -> None:
    """As a user runs it: the limits hold for the whole process, the start of Python with it."""
    folder = corpus.write(name, out)
    refused(name, folder, judged("python", "-m", *command.split(), folder))
