"""The runs behind the tables of kernels: each on a GPU of its own, into files of its own, none lost in silence."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import kernels
from loader.bench.cli import bench_command
from tests.loader.bench_fakes import fetched

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for minutes")


class Processes:
    """Stands for `subprocess.run`: notes which command ran on which GPU, and that no GPU had two at once."""

    def __init__(self, failing: str, without: tuple[str, str] | None = None) -> None:
        self.failing, self.without, self.lock = failing, without, threading.Lock()
        self.busy: set[str] = set()
        self.ran: list[tuple[str, list[str]]] = []

    def __call__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> Any:
        gpu = env["CUDA_VISIBLE_DEVICES"]
        with self.lock:
            assert gpu not in self.busy
            self.busy.add(gpu)
            self.ran.append((gpu, command))
        stdout.write("what it printed")
        json_file = Path(command[command.index("--json") + 1])
        absent = {} if self.without is None else {self.without[0]: self.without[1]}
        json_file.write_text(json.dumps({"points": [{"absent": absent}, {"absent": {}}][: 1 + (absent == {})]}))
        time.sleep(0.01)
        with self.lock:
            self.busy.remove(gpu)
        return subprocess.CompletedProcess(command, 1 if self.failing in " ".join(command) else 0)


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, failing: str, without: tuple[str, str] | None = None
) -> tuple[Processes, list[str]]:
    processes = Processes(failing, without)
    monkeypatch.setattr(kernels.subprocess, "run", processes)
    options = argparse.Namespace(out=tmp_path, tables=None, peers_dir=Path(".peers"))
    return processes, kernels.run_all(kernels.RUNS, ["0", "3"], "NVIDIA H200", options)


def test_each_run_has_a_gpu_and_files_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes, failed = run(monkeypatch, tmp_path, failing="nothing")
    assert failed == []
    assert {gpu for gpu, _ in processes.ran} == {"0", "3"}
    written = {path.name for path in tmp_path.glob("*.json")}
    assert len(written) == len(kernels.RUNS) == 10
    assert "h200-kimi-k2.5-tp8-int4_g32-mxfp4.json" in written
    assert len(list(tmp_path.glob("*.log"))) == 10
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_what_fails_is_named_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a part of a run take the place of a whole one of before."""
    before = tmp_path / "h200-deepseek-v3-tp8-int4_g32-mxfp4.json"
    before.write_text("figures of before")
    processes, failed = run(monkeypatch, tmp_path, failing="deepseek-v3 --tp 8 --format int4_g32")
    assert failed == ["h200-deepseek-v3-tp8-int4_g32-mxfp4"]
    assert len(processes.ran) == 10
    assert before.read_text() == "figures of before"
    assert before.with_suffix(".partial.json").exists()
    assert f"failed (exit 1), see {tmp_path / failed[0]}.log" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reason", "says"),
    [("failed: out of memory", "marlin failed: out of memory"), ("no library", "marlin did not run: no library")],
)
def test_figures_without_the_peer_replace_none_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str, says: str
) -> None:
    before = tmp_path / "h200-kimi-k2.5-tp8-int4_g32-mxfp4.json"
    before.write_text("figures of before")
    _, failed = run(monkeypatch, tmp_path, failing="nothing", without=("marlin", reason))
    assert failed == [each.name("NVIDIA H200") for each in kernels.RUNS if kernels.PEERS[each.formats] == "marlin"]
    assert before.read_text() == "figures of before"
    assert f"failed ({says})" in capsys.readouterr().out


def test_a_format_that_the_peer_has_not_is_no_failure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    points = [{"absent": {}}, {"absent": {"marlin": "Marlin is timed on int4_g32, not mxfp4"}}]
    figures.write_text(json.dumps({"points": points}))
    assert kernels.missing(figures, "marlin") == ""
    points[0]["absent"] = {"marlin": "failed: a block"}
    figures.write_text(json.dumps({"points": points}))
    assert kernels.missing(figures, "marlin") == "marlin failed: a block"


def test_a_gpu_is_free_again_after_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "missing", tables=None, peers_dir=Path(".peers"))
    with pytest.raises(FileNotFoundError):
        kernels.run_all(kernels.RUNS, ["0"], "NVIDIA H200", options)


def test_devices_of_several_words() -> None:
    assert kernels.RUNS[0].name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3-kimi-k2.5-tp1-bf16-fp8_block"


@WITHOUT_GPU
@pytest.mark.parametrize("one", kernels.RUNS, ids=lambda one: one.name("NVIDIA H200"))
def test_each_run_is_a_command_that_bench_takes(one: kernels.Run, tmp_path: Path) -> None:
    """As far as to where it finds no GPU."""
    peers = fetched(tmp_path, "sglang/a.py", "vllm/a.py")
    _, *arguments = one.command(peers, None, tmp_path / "figures.json")
    done = CliRunner().invoke(bench_command, arguments)
    assert done.exit_code == 1 and "there is no GPU here" in done.output, done.output


def test_all_are_chosen_or_some() -> None:
    assert kernels.chosen("") == kernels.RUNS
    assert {(each.shape, each.tp) for each in kernels.chosen("kimi-k2.5:8,deepseek-v3:1")} == {
        ("kimi-k2.5", 8),
        ("deepseek-v3", 1),
    }
    (one,) = kernels.chosen("kimi-k2.5:8:mxfp4")
    assert (one.shape, one.tp, one.formats) == ("kimi-k2.5", 8, ("int4_g32", "mxfp4"))
    with pytest.raises(SystemExit, match="there is no `kimi:8`; there are deepseek-v3:1, "):
        kernels.chosen("kimi-k2.5:8,kimi:8")


@WITHOUT_GPU
@pytest.mark.parametrize(("peers", "says"), [(False, "run `python benchmarks/peers/fetch.py` first"), (True, "no GPU")])
def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path, peers: bool, says: str) -> None:
    if peers:
        fetched(tmp_path)
    script = Path(kernels.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), "--peers-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
