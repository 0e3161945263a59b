"""What does not fit is found before anything is allocated: each kind by itself, and all kinds together in one error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gatekeeper import CheckpointError, TensorInfo, decide, read_facts, read_index
from loader import PlanError, build, build_plan, load_moe
from loader.planning import plan_target
from tests.loader.fakes import decided, facts_of, family, index_of, layout, shipped, tensor
from tests.loader.surgery import delete, rewrite
from tests.tiny import header_of, shard_bytes, write_index, write_shards

Tensors = dict[str, TensorInfo]
Harm = Callable[[Tensors], None]
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.{}"


def missing(tensors: Tensors) -> None:
    del tensors[EXPERT.format(1, 0, "up", "weight")]


def doubled(tensors: Tensors) -> None:
    """A fifth routed expert where the fifth slot is the shared one's."""
    extra = layout("fp8_block", "fp8_block", layers=[2], experts=5)
    tensors |= {name: info for name, info in extra.items() if ".experts.4." in name}


def unexpected(tensors: Tensors) -> None:
    name = EXPERT.format(1, 1, "gate", "bias")
    tensors[name] = tensor(name, "BF16", (32,))


def wrong_shape(tensors: Tensors) -> None:
    name = EXPERT.format(1, 2, "down", "weight")
    tensors[name] = tensor(name, "F8_E4M3", (32, 64))


def wrong_dtype(tensors: Tensors) -> None:
    name = EXPERT.format(2, 1, "gate", "weight")
    tensors[name] = replace(tensors[name], dtype="F8_E5M2")


def wrong_scale_shape(tensors: Tensors) -> None:
    name = EXPERT.format(2, 2, "up", "weight_scale_inv")
    tensors[name] = tensor(name, "F32", (32, 1))


HARMS: dict[Harm, tuple[str, str]] = {
    missing: ("missing", EXPERT.format(1, 0, "up", "weight")),
    doubled: ("doubled", "model.layers.2.mlp.shared_experts.gate_proj.weight"),
    unexpected: ("unexpected", EXPERT.format(1, 1, "gate", "bias")),
    wrong_shape: ("shape", EXPERT.format(1, 2, "down", "weight")),
    wrong_dtype: ("dtype", EXPERT.format(2, 1, "gate", "weight")),
    wrong_scale_shape: ("shape", EXPERT.format(2, 2, "up", "weight_scale_inv")),
}


def found(*harms: Harm) -> set[tuple[str, str]]:
    """Kind and tensor of every fault of one plan."""
    tensors = layout("fp8_block", "fp8_block")
    for harm in harms:
        harm(tensors)
    with pytest.raises(PlanError) as caught:
        build_plan(index_of(tensors), family(), facts_of(), decided([1, 2]))
    assert all(fault.tensor in str(caught.value) or "{N}" in str(caught.value) for fault in caught.value.faults)
    return {(fault.code, fault.tensor) for fault in caught.value.faults}


@pytest.mark.parametrize("harm", HARMS)
def test_each_kind_by_itself(harm: Harm) -> None:
    faults = found(harm)
    assert HARMS[harm] in faults
    assert {code for code, _ in faults} == {HARMS[harm][0]}


def test_all_kinds_together() -> None:
    assert found(*HARMS) >= set(HARMS.values())
    assert found(*HARMS) == set().union(*map(found, HARMS))


# -- headers ---------------------------------------------------------------------------------------------------------

A, B, C, D = (f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5))


def test_all_that_is_wrong_with_headers_is_one_error(tmp_path: Path) -> None:
    good = {"one": ("F32", (2,)), "two": ("F32", (2,))}
    write_shards(tmp_path, {A: good, B: {"two": ("F32", (2,)), "stray": ("U8", (1,))}}, index=False)
    overlapping, size = header_of({"three": ("F32", (2,)), "four": ("F32", (2,)), "five": ("F32", (2,))})
    overlapping["four"]["data_offsets"] = [4, 12]
    overlapping["five"]["shape"] = [3]
    (tmp_path / C).write_bytes(shard_bytes(overlapping, size))
    index = {"one": A, "two": A, "three": C, "four": C, "five": C, "six": D, "seven": A}
    write_index(tmp_path, {**index, "stray": A, "eight": B, "out": "../x.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    kinds = {
        f"{B}: tensor `two` is in {A} too",  # doubled
        f"{A}: tensor `seven` is in the index but not here",  # missing
        f"{B}: tensor `stray` is here but the index names {A}",  # unexpected
        f"{C}: tensor `four` overlaps tensor `three`",
        f"{C}: tensor `five` has 8 bytes, but F32 of shape [3] needs 12",
        f"{D}: the shard is missing",
        "../x.safetensors: the path leaves the folder",
    }
    assert {kind for kind in kinds if not any(fault.startswith(kind) for fault in caught.value.faults)} == set()
    assert all(fault in str(caught.value) for fault in caught.value.faults)


def test_an_error_shows_some_and_holds_all(tmp_path: Path) -> None:
    write_shards(tmp_path, {A: {str(number): ("U8", (1,)) for number in range(100)}})
    write_index(tmp_path, {f"other {number}": A for number in range(100)})
    with pytest.raises(CheckpointError, match="200 faults") as caught:
        read_index(tmp_path)
    assert len(caught.value.faults) == 200
    assert len(str(caught.value).splitlines()) == 22 and str(caught.value).endswith("and 180 more")


def test_headers_and_plan_are_one_error(copied: Callable[..., Path]) -> None:
    folder = copied(family="deepseek_v3", format_name="bf16", experts=16)
    up, down = (EXPERT.format(1, 2, projection, "weight") for projection in ("up", "down"))
    rewrite(folder, lambda tensors: tensors.update({up: tensors[up][:-1], down: tensors.pop(down).half()}))
    delete(folder, EXPERT.format(2, 0, "gate", "weight"))
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes() + b"more")
    words = "4 bytes after tensor `.*` belong to nothing"
    for reads in (read_facts, read_index):
        with pytest.raises(CheckpointError, match=words):
            reads(folder)
    decisions = decide(shipped(), read_facts(folder, keep_faults=True))
    for loads in (plan_target, load_moe):
        with pytest.raises(PlanError, match=rf"header: {words} .*: `{shard.name}`") as caught:
            loads(folder, decisions)
        assert caught.value.codes == {"header", "shape", "dtype", "missing"}
    index = read_index(folder, keep_faults=True)
    assert index is not None and [fault.shard for fault in index.faults] == [shard.name]
    with pytest.raises(CheckpointError, match=words):
        build(build_plan(index_of(layout("bf16", "bf16")), family(), facts_of(), decided([])), index)


def test_offsets_that_overlap_are_kept_and_claims_beyond_the_file_are_not(tmp_path: Path) -> None:
    """What is planned is in proportion to the file."""
    header, size = header_of({"one": ("F32", (2,)), "two": ("F32", (2,)), "three": ("F32", (2,))})
    header["two"]["data_offsets"] = [4, 12]
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, size))
    index = read_index(tmp_path, keep_faults=True)
    assert index is not None and set(index.tensors) == {"one", "two", "three"}
    assert index.faults[0].problem == "tensor `two` overlaps tensor `one`"
    header["three"] |= {"shape": [1 << 40], "data_offsets": [16, 16 + (4 << 40)]}
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, size))
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        read_index(tmp_path, keep_faults=True)
    assert any("`two` overlaps tensor `one`" in fault for fault in caught.value.faults)
