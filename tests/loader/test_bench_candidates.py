"""What a search may try: settings that a table takes, that fit a thread block, and each of them once."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from loader.bench.candidates import candidates, fewer_registers, some_tiles, tiles
from loader.bench.problem import FORMATS, Model
from loader.kernels.configs import HOPPER_SHARED_BYTES as SHARED_BYTES
from loader.kernels.configs import PACKED, Config, Shape, Tiles, default, misfit
from loader.kernels.tuned import SCHEMA, Measured, Table

VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
WEIGHT_BITS = {"bf16": 16, "fp8_block": 8, "int4_g32": 4, "mxfp4": 4}
TOKENS = [1, 4, 5, 8, 9, 64, 1024, 8192]


def shapes(format_name: str) -> list[Shape]:
    """Wide and narrow stacks as models have them, and two that are no multiples of any tile."""
    known = [("kimi-k2.5", 8), ("deepseek-v3", 1), ("qwen3-30b-a3b", 8), ("glm-4.5", 1)]
    fused = [Model.of(name, format_name, tp_size).shape for name, tp_size in known]
    odd = {"format": format_name, "top_k": 1}
    return [
        *fused,
        replace(fused[0], n_slots=384, top_k=8),
        replace(fused[0], n_slots=1, top_k=1),
        Shape(**odd, n_slots=2, hidden_size=64, width=32),
        Shape(**odd, n_slots=32, hidden_size=2880, width=96),
    ]


def require_valid(shape: Shape, configs: list[Config]) -> None:
    assert not any(misfit(config, shape) for config in configs)
    measured = {n: Measured(tokens=n, microseconds=1.0, config=config) for n, config in enumerate(configs, 1)}
    VALIDATOR.validate(Table(device="NVIDIA H200", versions={}, configs={shape: measured}).as_json())


def staged_bytes(shape: Shape, block_m: int, rows: int, cut: Tiles) -> int:
    """What one product has in shared memory: weights as they are stored and bf16 tokens, of its stages or kept."""
    weights, tokens = rows * WEIGHT_BITS[shape.format], block_m * 16
    if cut.strips > 1:
        columns = -(-shape.width // cut.block_c) * cut.block_c
        return (columns * (cut.stages * weights + tokens) + rows * tokens) // 8  # and a tile of the output
    return cut.stages * cut.block_c * (weights + tokens) // 8


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_each_way_to_walk_a_layer_fits_a_table_and_the_device(format_name: str, tokens: int) -> None:
    for shape in shapes(format_name):
        found = candidates(shape, tokens, 132)
        assert found[0] == default(shape, tokens, 132)
        assert len(set(found)) == len(found)
        require_valid(shape, found)
        assert any(config.by_pair for config in found) is (tokens <= 8)
        for config in found:
            for rows, cut in ((2 * config.gate_up.block_n, config.gate_up), (config.down.block_n, config.down)):
                assert staged_bytes(shape, config.block_m, rows, cut) <= SHARED_BYTES


@pytest.mark.parametrize("format_name", FORMATS)
def test_tiles_fit_a_table_and_the_device(format_name: str) -> None:
    for shape in shapes(format_name):
        for tokens in (1, 64, 8192):
            for config in candidates(shape, tokens, 132):
                for half, rows in (("gate_up", 2), ("down", 1)):
                    found = tiles(shape, config, half)
                    assert found
                    assert len(set(found)) == len(found)
                    assert max(staged_bytes(shape, config.block_m, rows * t.block_n, t) for t in found) <= SHARED_BYTES
                    # Float32 accumulators of a thread, of its 255 registers: those it starts with and all others.
                    sums = 2 if format_name == "fp8_block" else 1
                    for t in (*found, getattr(config, half)):
                        assert sums * rows * t.block_n * config.block_m // (32 * t.warps) <= 128
            changed = [replace(config, gate_up=t) for t in tiles(shape, config, "gate_up")]
            require_valid(shape, changed)


@pytest.mark.parametrize("half", ["gate_up", "down"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_of_large_blocks_the_tiles_that_move_the_fewest_bytes_are_among_those_tried(
    format_name: str, half: str
) -> None:
    shape = Model.of("kimi-k2.5", format_name, 8).shape
    config = replace(default(shape, 8192, 132), block_m=64)
    found = tiles(shape, config, half)
    some = some_tiles(shape, config, half, 8, random.Random(0))
    assert len(set(some)) == 8
    assert set(some) <= set(found)
    if half == "down":  # what keeps its activations moves weights alone
        assert min(one.strips for one in some[:4]) > 1
    else:
        assert {one.block_n for one in some[:4]} == {max(one.block_n for one in found)}
    assert len({one.block_n for one in some}) > 1
    assert set(some_tiles(shape, config, half, 10**6, random.Random(0))) == set(found)


def test_activations_are_kept_where_they_are_few() -> None:
    for tp_size, expected in ((8, True), (1, False)):
        shape = Model.of("kimi-k2.5", "int4_g32", tp_size).shape
        for tokens in (16, 4096):
            config = default(shape, tokens, 132)
            assert (config.down.strips > 1) is expected
            assert any(one.strips > 1 for one in tiles(shape, config, "down")) is expected
            assert {one.strips for one in tiles(shape, config, "gate_up")} == {1}


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_counted_tiles_are_among_those_of_a_search(format_name: str) -> None:
    whole = [Model.of("kimi-k2.5", format_name, tp_size).shape for tp_size in (8, 1)]
    for shape in (*whole, *(each.shared(1) for each in whole)):
        for tokens in TOKENS:
            config = default(shape, tokens, 132)
            for half in ("gate_up", "down"):
                searched = {replace(one, group=1) for one in tiles(shape, config, half)}
                assert replace(getattr(config, half), group=1) in searched


def test_packed_formats_are_never_the_right_operand() -> None:
    for format_name in FORMATS:
        shape = Model.of("kimi-k2.5", format_name, 8).shape
        tried = [
            one
            for config in candidates(shape, 8192, 132)
            for half in ("gate_up", "down")
            for one in (getattr(config, half), *tiles(shape, config, half))
        ]
        assert any(one.tokens_left for one in tried) is (format_name not in PACKED)


def test_blocks_of_tokens_are_about_an_experts_share() -> None:
    shape = Model.of("kimi-k2.5", "bf16", 8).shape
    assert {config.block_m for config in candidates(shape, 1, 132)} == {8, 16}
    assert {config.block_m for config in candidates(shape, 8192, 132)} >= {32, 64, 128}
    assert {config.block_m for config in candidates(shape.shared(1), 1024, 132)} == {16, 32, 64, 128}


def test_registers_are_bounded_where_thread_blocks_wait_for_their_own_instructions() -> None:
    for format_name, tokens, count in (("int4_g32", 64, 4), ("mxfp4", 1, 4), ("mxfp4", 8192, 0), ("bf16", 64, 0)):
        shape = Model.of("kimi-k2.5", format_name, 8).shape
        config = default(shape, tokens, 132)
        for half in ("gate_up", "down"):
            found = fewer_registers(shape, config, half)
            assert len({each.registers for each in found} - {0}) == len(found) == count
            assert {replace(each, registers=0) for each in found} <= {getattr(config, half)}


def test_numbers_of_a_scales_block_are_one_step() -> None:
    shape = Model.of("kimi-k2.5", "fp8_block", 8).shape
    for half in ("gate_up", "down"):
        assert {each.block_c for each in tiles(shape, default(shape, 64, 132), half)} == {128}
