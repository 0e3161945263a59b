"""The benchmark of loading, on a checkpoint of no size: what is timed is the same work, and the report adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from torch import Tensor

from benchmarks import load_speed, verify_cost
from benchmarks.load_checkpoint import Shape, checkpoint
from benchmarks.load_contenders import RANK, contender, least, ours, plain_read, prepared
from loader.checkpoint import bytes_of

pytest.importorskip("safetensors")
TINY = [
    Shape(family="kimi_k2", format_name="int4_g32", experts=16, layers=2, hidden=64, width=256),
    Shape(family="deepseek_v3", format_name="bf16", experts=16, layers=1, hidden=64, width=64),
]


@pytest.fixture(scope="module", params=TINY, ids=lambda shape: shape.format_name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("cache"), request.param)


def contents(tensors: list[Tensor]) -> list[bytes]:
    """Shape, dtype and bytes of each tensor, in an order of their own."""
    return sorted(repr((t.shape, t.dtype)).encode() + bytes(bytes_of(t.contiguous())) for t in tensors)


def test_it_is_made_once(folder: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    experts = next(shape for shape in TINY if shape.format_name in folder.name)
    assert checkpoint(folder.parent, experts) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_unfused_is_the_same_work_as_the_least(folder: Path) -> None:
    assert contents(contender("unfused", folder, 2, "cpu", {})()) == contents(
        contender("least", folder, 2, "cpu", {})()
    )


def test_the_rank_is_the_same_work_as_the_least_of_a_rank(folder: Path) -> None:
    mine = ours(prepared(folder, fused=False, rank=RANK), 2, "cpu")
    assert sum(t.nbytes for t in mine) == sum(t.nbytes for t in least(folder, 2, RANK))


def test_fastsafetensors_is_the_same_work(folder: Path) -> None:
    pytest.importorskip("fastsafetensors")
    assert contents(contender("fastsafetensors", folder, 2, "cpu", {})()) == contents(least(folder, 2))


def test_a_round_of_processes_and_its_report(folder: Path) -> None:
    names = ["least", "fused", "fused, verified"]
    found = load_speed.measure(folder, names, ["cold", "warm"], 2, 1, "cpu")
    assert {state: {name: len(own) for name, own in one.items()} for state, one in found.items()} == dict.fromkeys(
        ("cold", "warm"), dict.fromkeys(names, 2)
    )
    rows = load_speed.report(found["warm"], load_speed.CONTENDERS)
    assert rows["fused"]["bytes"] == rows["fused, verified"]["bytes"] == rows["least"]["bytes"]
    table = load_speed.lines("warm", rows, "cpu")
    assert len(table) == 6 and "verification adds" in table[-1]


def test_the_report_takes_ratios_within_rounds() -> None:
    def rounds(*seconds: float) -> list[dict[str, object]]:
        peak = {"anonymous": 110, "mapped": 7}
        return [{"seconds": s, "cpu_seconds": s / 2, "bytes": 100, "peak": peak} for s in seconds]

    found = {"least": rounds(1, 10, 2), "fused": rounds(2, 10, 1), "fused, verified": rounds(3, 11, 1.1)}
    rows = load_speed.report(found, load_speed.CONTENDERS)
    assert rows["fused"]["speed"] == rows["fused"]["cpu"] == 1.0
    assert rows["fused"]["memory"] == 1.1 and rows["fused"]["mapped"] == 7
    assert rows["fused, verified"]["verify"] == 0.1


def test_on_a_device_the_report_says_how_much_of_a_pinned_copy_was_reached() -> None:
    limits = {"pinned copy": 100e9, "plain read": 80e9}
    one = {"seconds": 2.0, "cpu_seconds": 1.0, "bytes": 120e9, "peak": {"anonymous": 0, "mapped": 0}, "limits": limits}
    row = load_speed.report({"fused": [one]}, load_speed.CONTENDERS)["fused"]
    assert row["of_pinned"] == 0.6 and row["limits"] == {"pinned copy": 100.0, "plain read": 80.0}


def test_a_plain_read_reads_every_shard(folder: Path) -> None:
    assert plain_read(folder, 2) > 0 < plain_read(folder, 2, mapped=True)


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    arguments = [
        "load_speed.py",
        str(tmp_path),
        "--rounds",
        "1",
        "--only",
        "least",
        "--only",
        "fused",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(load_speed, "SHAPES", {"int4": TINY[0], "bf16": TINY[1]})
    monkeypatch.setattr(sys, "argv", arguments)
    load_speed.main()
    document = json.loads(out.read_text())
    assert set(document["shapes"]) == {"int4", "bf16"}
    assert set(document["shapes"]["bf16"]["cold"]) == {"least", "fused"}


def test_what_verification_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in verify_cost.KEEPS_MEMORY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(structlog, "configure", lambda **_: None)
    monkeypatch.setattr(verify_cost, "SHAPES", {"int4": TINY[0]})
    monkeypatch.setattr(sys, "argv", ["verify_cost.py", str(tmp_path), "--pairs", "2"])
    verify_cost.main()
    assert capsys.readouterr().out.count("verification adds") == 2


def test_help() -> None:
    script = Path(load_speed.__file__)
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--device" in done.stdout
