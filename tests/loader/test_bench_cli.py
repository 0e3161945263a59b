"""`moe-loader bench` and `tune` on bad input: a sentence and an exit status, before anything is measured."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result

from loader.bench import cli
from loader.cli import group
from loader.errors import BenchError, TableError
from loader.kernels.tuned import file_name
from tests.loader.bench_fakes import CEILINGS, point

DEVICE = "NVIDIA H200"
GOOD = ["--shape", "kimi-k2.5"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option '--shape'"),
        (["--shape", "kimi-k3"], "unknown shape `kimi-k3`; there are kimi-k2.5, kimi-k2.5-routed, deepseek-v3, "),
        ([*GOOD, "--format", "bf16,nvfp4"], "unknown format `nvfp4`; there are bf16, fp8_block, int4_g32, mxfp4"),
        ([*GOOD, "--format", "fp16"], "unknown format `fp16`"),
        ([*GOOD, "--format", ","], "--format takes at least one name"),
        ([*GOOD, "--tp", "3"], "`kimi-k2.5` has experts of width 2048, which 3 ranks do not divide"),
        ([*GOOD, "--tp", "128", "--format", "int4_g32"], "128 ranks leave `kimi-k2.5` 16 columns, no multiple of 32"),
        ([*GOOD, "--tp", "0"], "0 is not in the range x>=1"),
        ([*GOOD, "--tp", "-8"], "-8 is not in the range x>=1"),
        ([*GOOD, "--tokens", "1,many"], "--tokens takes positive numbers such as 1,16,256; not `1,many`"),
        ([*GOOD, "--tokens", "0"], "not `0`"),
        ([*GOOD, "--tokens", "16,-1"], "not `16,-1`"),
        ([*GOOD, "--tokens", ""], "not ``"),
        ([*GOOD, "--tokens", "1.5"], "not `1.5`"),
    ],
)
def test_wrong_usage(command: str, arguments: list[str], says: str) -> None:
    done = run(command, *arguments)
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peers", "torch-grouped_mm,sglang"], "unknown peer `sglang`; there are torch-grouped_mm, transformers, "),
        (["--peers", "marlin", "--peers-dir", "no-such"], "python benchmarks/peers/fetch.py no-such"),
    ],
)
def test_peers_that_are_not_here(arguments: list[str], says: str) -> None:
    done = run("bench", *GOOD, *arguments)
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_without_a_gpu(command: str) -> None:
    done = run(command, *GOOD, "--tp", "8")
    assert done.exit_code == 1
    assert done.output == "Error: there is no GPU here; kernels are timed where they run\n"


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = importlib.import_module

    def imported(module: str, package: str | None = None) -> ModuleType:
        if module == name:
            raise ImportError(name)
        return original(module, package)

    monkeypatch.setattr(cli.importlib, "import_module", imported)


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_without_triton(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    without(monkeypatch, "triton")
    done = run(command, *GOOD)
    assert done.exit_code == 1
    assert "triton is not installed here: the kernels are written in it; `pip install triton==3.6.0`" in done.output


def test_a_plot_of_an_unknown_kind_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "_require", lambda module, why: None)
    done = run("bench", *GOOD, "--plot", str(tmp_path / "plot.xyz"))
    assert done.exit_code == 2
    assert "--plot writes .png, .svg, .pdf; not `plot.xyz`" in done.output


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "matplotlib")
    done = run("bench", *GOOD, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1
    assert "matplotlib is not installed here: --plot draws with it; `pip install matplotlib`" in done.output


@pytest.mark.parametrize("option", [["--most", "0"], ["--most", "-1"], ["--seconds", "-5"]])
def test_less_than_one_setting_or_no_time_is_a_sentence(option: list[str]) -> None:
    done = run("tune", *GOOD, *option)
    assert done.exit_code == 2
    assert f"Invalid value for '{option[0]}': {option[1]}" in done.output


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"version": 3, "dev', "is torn"), ('{"version": 7}', "has version 7, this loader reads version 3")],
)
def test_a_table_that_can_not_be_used_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, says: str
) -> None:
    monkeypatch.setattr(cli, "_require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: DEVICE)
    (tmp_path / file_name(DEVICE)).write_text(text, encoding="utf-8")
    done = run("bench", *GOOD, "--tables", str(tmp_path))
    assert isinstance(done.exception, TableError)  # which `main` shows as one line, with exit 1
    assert says in str(done.exception)
    assert "delete it and run `moe-loader tune` again" in str(done.exception)


@pytest.mark.kernels
def test_a_bench_that_is_cut_short_has_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loader.bench import run as bench
    from loader.bench import timing
    from loader.bench.turn import Turn

    turn = Turn(tmp_path / "lock")

    def points(*_: object, left: object, **__: object) -> object:
        assert left == turn.left
        yield point(tokens=1, absent={"marlin": "needs sm80"})
        assert len(json.loads(path.read_text(encoding="utf-8"))["points"]) == 1
        yield point(tokens=4)
        raise KeyboardInterrupt

    path = tmp_path / "figures.json"
    replaced: list[tuple[object, str, Callable[..., object]]] = [
        (cli, "_require_gpu", lambda: None),
        (cli, "_table", lambda folder: None),
        (torch.cuda, "get_device_name", lambda: DEVICE),
        (timing, "ceilings", lambda: CEILINGS),
        (Turn, "of_device", lambda: turn),
        (bench, "points", points),
    ]
    for owner, name, stand_in in replaced:
        monkeypatch.setattr(owner, name, stand_in)
    done = run("bench", *GOOD, "--json", str(path))
    assert done.exit_code == 1
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert [one["tokens"] for one in figures["points"]] == [1, 4]
    assert (figures["device"], figures["command"].split()[0]) == (DEVICE, "moe-loader")
    assert "kimi-k2.5" in done.output


@pytest.mark.kernels
def test_a_gpu_that_is_full_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loader.bench import timing
    from loader.bench.turn import Turn

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 31.50 GiB.")

    monkeypatch.setattr(cli, "_require_gpu", lambda: None)
    monkeypatch.setattr(cli, "_table", lambda folder: None)
    monkeypatch.setattr(Turn, "of_device", lambda: Turn(tmp_path / "lock"))
    monkeypatch.setattr(timing, "ceilings", full)
    done = run("bench", *GOOD)
    assert isinstance(done.exception, BenchError)
    assert "the GPU's memory is full: CUDA out of memory. Tried to allocate 31.50 GiB. Is" in str(done.exception)
