"""What a newcomer sees first: the demo, and the same three checkpoints asked about from the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gatekeeper.cli import group as gatekeeper
from loader.cli import group as moe_loader
from loader.make_checkpoint import Recipe, make_checkpoint

MI355X = ("--platform", "mi355x", "--set", "parallel.tp_size=8", "--feature", "shared_experts_fusion")

Made = Callable[[str, str | None], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("demo")

    def make(format_name: str, shared_format: str | None) -> Path:
        path = folder / f"{format_name}-{shared_format}"
        if not path.exists():
            make_checkpoint(path, Recipe(family="kimi_k25", format_name=format_name, shared_format=shared_format))
        return path

    return make


def decide(*arguments: str) -> Result:
    return CliRunner().invoke(gatekeeper, ["decide", *arguments])


def test_the_demo_ends_well_and_shows_each_way_of_going_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(moe_loader, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "All as it should be." in result.output
    for way in ("is never written", "takes [", "would cast in silence", "fused against unfused"):
        assert way in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "DeepSeek-V3-shared-bf16",
        "Kimi-K2.5",
        "Kimi-K2.5-MXFP4",
        "Kimi-K2.5-MXFP4@b071bc6f",
    ]


def test_the_standard_model_is_off_with_the_requirement_and_its_line(made: Made) -> None:
    result = decide(str(made("int4_g32", None)), *MI355X)
    assert result.exit_code == 0
    assert "shared_experts_fusion: off by one-storage" in result.stdout
    assert "shared_experts_fusion/deepseek_v3.yaml:" in result.stdout


def test_the_quark_build_is_on(made: Made) -> None:
    result = decide(str(made("mxfp4", None)), *MI355X)
    assert result.exit_code == 0
    assert "shared_experts_fusion: on" in result.stdout


def test_the_old_revision_is_off_and_an_error_when_forced(made: Made) -> None:
    path = str(made("mxfp4", "bf16"))
    assert "shared_experts_fusion: off by one-storage" in decide(path, *MI355X).stdout
    forced = decide(path, *MI355X, "--set", "server.enforce_shared_experts_fusion=true", "--json")
    (answer,) = json.loads(forced.stdout)
    assert forced.exit_code == 1
    assert [(one["state"], one["decided_by"]) for one in answer["decisions"]] == [("error", "one-storage")]
