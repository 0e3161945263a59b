"""What the loader says of its kernels' settings, for a checkpoint and a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatekeeper import Reading, read_facts
from loader.errors import TableError
from loader.kernels.configs import Shape, default
from loader.kernels.tuned import Measured, Table, file_name
from loader.measured import measured_facts
from tests.shipped import ROOT

KIMI = ROOT / "tests" / "corpus" / "amd__Kimi-K2.5-MXFP4" / "config.json"
ROUTED = Shape(format="mxfp4", n_slots=384, hidden_size=7168, width=256, top_k=8)
FUSED = Shape(format="mxfp4", n_slots=385, hidden_size=7168, width=256, top_k=9)


def facts(**settings: Any) -> Any:
    return read_facts(KIMI, platform="h200", set={"parallel.tp_size": 8} | settings)


def write(folder: Path, *shapes: Shape, apart: dict[int, float] | None = None) -> None:
    table = Table(device="NVIDIA H200", versions={})
    for shape in shapes:
        table.configs[shape] = {
            tokens: Measured(
                tokens=tokens,
                microseconds=10.0 * tokens,
                config=default(shape, tokens, 132),
                apart_microseconds=(apart or {}).get(tokens) if shape == FUSED else None,
            )
            for tokens in (1, 64, 1024)
        }
    table.save(folder / file_name("NVIDIA H200"))


def values(found: Any) -> dict[str, Any]:
    assert all(isinstance(one, Reading) for one in found.values())
    return {name.removeprefix("engine."): one.value for name, one in found.items()}


def test_who_loads_with_this_loader_reads_facts_with_its_tables(tmp_path: Path) -> None:
    import loader

    write(tmp_path, ROUTED)
    how: Any = {"platform": "h200", "set": {"parallel.tp_size": 8}}
    alone, joined = read_facts(KIMI, **how), loader.read_facts(KIMI, **how, tables=tmp_path)
    differs = {name for name, value in joined.values.items() if alone.values.get(name) != value}
    assert differs == {"engine.tuned_config_routed"}
    assert joined.reading("engine.tuned_config_routed").witness == f"{tmp_path.name}/nvidia_h200.json"


def test_who_sets_no_division_has_all_of_a_layer_on_one_rank(tmp_path: Path) -> None:
    import loader

    write(tmp_path, replace(FUSED, width=2048))
    found = loader.read_facts(KIMI, platform="h200", tables=tmp_path)
    assert found.values["moe.shard_width"] == 2048
    assert found.values["engine.tuned_config_fused"] is True
    assert "moe-loader" in found.reading("parallel.tp_size").witness
    assert loader.read_facts(KIMI).values["moe.shard_width"] == 2048
    # Ranks that are divided in another way, or are another engine's, are not the loader's to count.
    for setting in ({"parallel.ep_size": 8}, {"parallel.dp_size": 8}, {"parallel.pp_size": 2}, {"engine.name": "x"}):
        other = loader.read_facts(KIMI, platform="h200", set=setting, tables=tmp_path)
        assert "parallel.tp_size" not in other.values


def test_each_stack_is_looked_up_by_itself(tmp_path: Path) -> None:
    write(tmp_path, ROUTED)
    assert values(measured_facts(facts(), tmp_path)) == {"tuned_config_routed": True, "tuned_config_fused": False}
    write(tmp_path, FUSED)
    assert values(measured_facts(facts(), tmp_path)) == {"tuned_config_routed": False, "tuned_config_fused": True}


def test_where_shared_slots_are_better_on_their_own_was_measured(tmp_path: Path) -> None:
    write(tmp_path, ROUTED, FUSED, apart={1: 20.0, 64: 900.0, 1024: 9000.0})
    found = measured_facts(facts(), tmp_path)
    assert values(found) == {"tuned_config_routed": True, "tuned_config_fused": True, "dense_shared_from": 1024}
    assert found["engine.dense_shared_from"].witness == f"{tmp_path.name}/nvidia_h200.json"


@pytest.mark.parametrize("settings", [{"parallel.tp_size": 4}, {"parallel.ep_size": 2}])
def test_other_ranks_have_other_stacks(tmp_path: Path, settings: dict[str, int]) -> None:
    write(tmp_path, ROUTED, FUSED)
    assert values(measured_facts(facts(**settings), tmp_path)) == {
        "tuned_config_routed": False,
        "tuned_config_fused": False,
    }


def test_half_of_the_experts_are_a_stack_of_their_own(tmp_path: Path) -> None:
    half = Shape(format="mxfp4", n_slots=192, hidden_size=7168, width=512, top_k=8)
    write(tmp_path, half)
    found = measured_facts(facts(**{"parallel.ep_size": 2}), tmp_path)
    assert values(found) == {"tuned_config_routed": True, "tuned_config_fused": False}


def test_a_device_without_a_table_has_none(tmp_path: Path) -> None:
    found = measured_facts(facts(), tmp_path)
    assert values(found) == {"tuned_config_routed": False, "tuned_config_fused": False}
    assert "no such file" in found["engine.tuned_config_fused"].witness


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    write(tmp_path, ROUTED, FUSED)
    assert not measured_facts(read_facts(KIMI, platform="cpu", set={"parallel.tp_size": 8}), tmp_path)
    assert not measured_facts(read_facts(KIMI, set={"parallel.tp_size": 8}), tmp_path)
    assert not measured_facts(read_facts(KIMI, platform="h200"), tmp_path)  # nobody chose a tp_size


def test_a_torn_table_is_an_error_not_a_default(tmp_path: Path) -> None:
    (tmp_path / "nvidia_h200.json").write_text("{")
    with pytest.raises(TableError, match="is torn"):
        measured_facts(facts(), tmp_path)
