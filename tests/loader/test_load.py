"""From a folder to layers through the shipped rules, by Python and by command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import gatekeeper
import loader
from gatekeeper import RefusedError, decide, read_facts
from loader import MoELayer, PlanError, StaleDecisionError
from loader.cli import group
from tests.loader.fakes import shipped
from tests.loader.surgery import delete, rewrite

INT4 = {"family": "kimi_k25", "format_name": "int4_g32"}
QUARK = {"family": "kimi_k25", "format_name": "mxfp4"}
OLD_QUARK = {"family": "kimi_k25", "format_name": "mxfp4", "shared_format": "bf16"}
V3 = {"family": "deepseek_v3", "format_name": "bf16"}
SHARED = "language_model.model.layers.2.mlp.shared_experts.up_proj.weight"


def decisions_of(folder: Path, runner: Any = "target", **settings: object) -> gatekeeper.Decisions:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return decide(shipped(), read_facts(folder, runner=runner, platform="mi355x", set=named))


def in_slots(layers: tuple[MoELayer, ...]) -> set[bool]:
    return {layer.shared is None for layer in layers}


@pytest.mark.parametrize(("recipe", "fused"), [(INT4, False), (QUARK, True), (OLD_QUARK, False), (V3, True)])
def test_the_loader_does_what_was_decided(made: Callable[..., Path], recipe: dict[str, str], fused: bool) -> None:
    folder = made(**recipe)
    decisions = decisions_of(folder)
    assert decisions["shared_experts_fusion"].state == ("on" if fused else "off")
    layers = loader.load_moe(folder, decisions)
    assert [layer.index for layer in layers] == [1, 2] and in_slots(layers) == {fused}
    assert layers[0](torch.ones(3, 64)).isfinite().all()


def test_forbidden_is_off(made: Callable[..., Path]) -> None:
    folder = made(**QUARK)
    decisions = decisions_of(folder, server__disable_shared_experts_fusion=True)
    assert in_slots(loader.load_moe(folder, decisions)) == {False}


def test_the_draft_runner_loads_its_own_layers(made: Callable[..., Path]) -> None:
    folder = made(**V3)
    layers = loader.load_moe(folder, decisions_of(folder, "draft"))
    assert [layer.index for layer in layers] == [3]


def test_a_decision_that_is_an_error_stops_the_load(made: Callable[..., Path]) -> None:
    folder = made(**OLD_QUARK)
    decisions = decisions_of(folder, server__enforce_shared_experts_fusion=True)
    with pytest.raises(RefusedError, match="shared_experts_fusion: refused"):
        loader.load_moe(folder, decisions)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (INT4, "`quant.method` was `quark`, here it is `compressed-tensors`"),
        (OLD_QUARK, "`layer.shared_storage.format` was `mxfp4` in layers 1-2, here it is `bf16`"),
        (QUARK | {"layers": 4}, "decided for 2 MoE layers, here there are 3"),
        (QUARK | {"layers": 2}, "in layers 2, no MoE layer here"),
        (V3, "`model.n_routed_experts` was `384`, here it is `256`"),
    ],
)
def test_decisions_made_for_another_checkpoint(made: Callable[..., Path], other: dict[str, Any], words: str) -> None:
    decisions = decisions_of(made(**QUARK))
    with pytest.raises(StaleDecisionError) as caught:
        loader.load_moe(made(**other), decisions)
    assert words in str(caught.value)


def test_decisions_for_another_runner_are_not_taken_for_this_one(made: Callable[..., Path]) -> None:
    target, draft = (decisions_of(made(**V3), runner) for runner in ("target", "draft"))
    mixed = gatekeeper.Decisions({**target, "moe_backend": draft["moe_backend"]})
    with pytest.raises(gatekeeper.CheckpointError, match="several runners"):
        loader.load_moe(made(**V3), mixed)


# -- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user runs it: exit code, and no traceback whatever happens."""
    command = [sys.executable, "-m", "loader", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(loader.__file__).parent.parent)
    assert "Traceback" not in done.stderr
    return done


def invoke(*arguments: object) -> Any:
    """The same in this process, where errors are exceptions."""
    return CliRunner().invoke(group, list(map(str, arguments)), catch_exceptions=True)


def answer(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_make_plan_load_verify_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    made = run("make-checkpoint", out, "--family", "kimi_k25", "--format", "mxfp4", "--layers", 2)
    assert made.returncode == 0 and "wrote" in made.stdout
    loaded = run("load", out, "--platform", "mi355x", "--verify")
    assert loaded.returncode == 0, loaded.stderr
    assert "shared expert in slot 384" in loaded.stdout and "verified 1 layer against the checkpoint" in loaded.stdout
    # A second time over the same folder.
    again = run("make-checkpoint", out, "--family", "kimi_k25", "--format", "mxfp4")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "exists and is not empty" in again.stderr


def test_deleting_one_shared_tensor_fails_by_name(copied: Callable[..., Path]) -> None:
    folder = copied(**QUARK)
    delete(folder, SHARED)
    done = run("load", folder, "--platform", "mi355x")
    assert done.returncode == 1 and SHARED in done.stderr
    assert done.stdout == ""


def test_a_draft_layer_that_is_not_there(copied: Callable[..., Path]) -> None:
    folder = copied(**V3, experts=16)
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])
    result = invoke("load", folder, "--runner", "draft")
    assert isinstance(result.exception, PlanError) and "config.json has experts here" in str(result.exception)


def test_all_ranks_at_once_are_said(made: Callable[..., Path]) -> None:
    alone = (str(made(**QUARK, width=64)), "--platform", "mi355x")
    two = (*alone, "--set", "parallel.tp_size=2")
    line = "  no --rank: all of every layer, not the share of one of 2 ranks\n"
    assert line in invoke("load", *two).stdout
    for arguments in (alone, (*two, "--rank", "0")):
        done = invoke("load", *arguments)
        assert "loaded " in done.stdout and "no --rank" not in done.stdout


def test_every_runner_target_first(made: Callable[..., Path]) -> None:
    found = answer("plan", made(**V3, experts=16))
    assert [one["runner"] for one in found["runners"]] == ["target", "draft"]
    assert [len(one["plan"]["layers"]) for one in found["runners"]] == [2, 1]
    only = answer("plan", made(**V3, experts=16), "--runner", "draft")
    assert [one["runner"] for one in only["runners"]] == ["draft"]


def test_plan_reads_nothing_but_headers(copied: Callable[..., Path]) -> None:
    folder = copied(**V3, experts=16)
    for shard in folder.glob("*.safetensors"):  # every number becomes NaN; the headers stay
        with shard.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header)
            file.write(b"\xff" * (shard.stat().st_size - header))
    result = invoke("plan", folder, "--tensors")
    assert result.exit_code == 0
    assert "layers.1.experts.w13_weight[0] rows 0:32 <- model.layers.1.mlp.experts.0.gate_proj.weight" in result.stdout
    assert run("load", folder, "--verify").returncode == 1


def test_load_json_has_decisions_plan_and_figures(made: Callable[..., Path]) -> None:
    found = answer("load", made(**QUARK), "--platform", "mi355x", "--verify")["runners"][0]
    states = {one["feature"]: one["state"] for one in found["decisions"]}
    assert states["shared_experts_fusion"] == "on"
    assert found["plan"]["fusion"]["layers_fused"] == 2
    assert [one["index"] for one in found["verified"]] == [1, 2]
    assert [one["backend"] for one in found["verified"]] == [None, None]  # eager, as the platform is not this one
    assert answer("load", made(**QUARK))["runners"][0]["verified"] is None


def test_what_a_backend_came_to_is_said(made: Callable[..., Path]) -> None:
    here = ("--platform", "here", "--set", "parallel.tp_size=1", "--set", "server.moe_runner_backend=grouped_mm")
    first, second = answer("load", made(**QUARK), *here, "--verify")["runners"][0]["verified"]
    assert first["backend"]["backend"] == "grouped_mm" and second["backend"] is None
    assert 0 < first["backend"]["figure"] <= first["backend"]["tolerance"]
    assert "  layer 1, backend grouped_mm against eager: " in invoke("load", made(**QUARK), *here, "--verify").stdout


def test_parallel_sizes_divide_the_plan(made: Callable[..., Path]) -> None:
    found = answer("plan", made(**V3, width=64, experts=16), "--set", "parallel.tp_size=2")["runners"][0]["plan"]
    assert found["bytes_per_rank"]["tp_size"] == 2
    assert found["bytes"] / 2 < found["bytes_per_rank"]["bytes"] < found["bytes"] * 0.6


def test_exit_codes(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(**QUARK)
    assert run("plan", folder, "--strict").returncode == 3, "without a platform fusion is pending"
    assert run("plan", folder).returncode == 0
    assert run("plan").returncode == 2
    assert run("plan", folder, "--set", "nonsense").returncode == 2
    forced = ("--set", "server.enforce_shared_experts_fusion=true", "--platform", "mi355x")
    assert run("plan", made(**OLD_QUARK), *forced).returncode == 1
    missing = run("load", tmp_path / "nowhere")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
    config_only = tmp_path / "config"
    config_only.mkdir()
    (config_only / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert run("plan", config_only).returncode == 0, "a config.json is enough for a plan"
    done = run("load", config_only)
    assert done.returncode == 1 and "has no *.safetensors" in done.stderr


def test_an_error_of_the_operating_system_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("make-checkpoint", tmp_path / "file" / "below", "--family", "kimi_k2", "--format", "bf16")
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def test_torn_files_are_errors_before_anything_is_allocated(copied: Callable[..., Path]) -> None:
    folder = copied(**V3, experts=16)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run("load", folder)
    assert done.returncode == 1 and shard.name in done.stderr and "truncated" in done.stderr


def test_an_architecture_without_a_family(copied: Callable[..., Path]) -> None:
    folder = copied(**V3, experts=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Fresh"], "model_type": "fresh"}))
    done = run("plan", folder)
    assert done.returncode == 1 and "`Fresh`" in done.stderr and "rules/families" in done.stderr
