"""The adapters of other engines' kernels, as far as a CPU without those engines gets: layouts, choices, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loader.bench import peers
from loader.bench.fetched import module_at
from loader.bench.peers import Unavailable, peers_of
from loader.bench.problem import Model, Problem, problems, random_experts
from loader.formats import int4_g32
from tests.loader.bench_fakes import fetched, model

marlin: Any = module_at("moe_loader_bench_marlin", peers.ADAPTERS / "marlin.py")
sglang: Any = module_at("moe_loader_bench_sglang_triton", peers.ADAPTERS / "sglang_triton.py")
MODEL = model("int4_g32", n_routed=4, hidden_size=128, width=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As `fetch.py` leaves it, with libraries that are none."""
    return fetched(tmp_path, "sglang/a.py", "vllm/scalar_type.py", sglang.LIBRARY, marlin.LIBRARY)


def problem(model: Model) -> Problem:
    return problems(model, [random_experts(model, "cpu", 1)], 2, seed=2)[0]


def numbers(packed: Tensor) -> Tensor:
    """``(..., N, C)`` in -8..7, by the format's own reading."""
    ones = torch.ones(*packed.shape[:-1], packed.shape[-1] // 4)
    return int4_g32.FORMAT.dequantize({"weight": packed, "scale": ones}, torch.float32)


def operands(words: Tensor, rows: int, columns: int) -> Iterator[tuple[int, int, float]]:
    """Row, column and number of each nibble, from how ``mma.m16n8k16`` spreads its second operand over threads.

    Thread t has column pairs 2 * (t % 4) and, in its second register, the same plus 8, of row t // 4 of 8 (PTX ISA,
    matrix fragments for mma.m16n8k16); Marlin's word j serves the rows 16 * j and 16 * j + 8 of a tile of 64.
    """
    for tile_c in range(columns // 16):
        for tile_n in range(rows // 64):
            for thread in range(32):
                for j in range(4):
                    word = int(words[tile_c, 128 * tile_n + 4 * thread + j])
                    for nibble in range(8):
                        second_register, half, odd = nibble & 1, nibble >> 1 & 1, nibble >> 2
                        row = 64 * tile_n + 16 * j + 8 * half + thread // 4
                        column = 16 * tile_c + 8 * second_register + 2 * (thread % 4) + odd
                        yield row, column, (word >> 4 * nibble & 15) - 8.0


def test_marlin_repack_puts_every_number_where_its_thread_reads_it() -> None:
    rows, columns = 128, 32
    packed = torch.randint(-(2**31), 2**31 - 1, (2, rows, columns // 8), dtype=torch.int32)
    repacked = marlin.repack(packed)
    assert repacked.shape == (2, columns // 16, 2 * rows) and repacked.dtype == torch.int32
    for slot in range(2):
        found = torch.full((rows, columns), torch.nan)
        for row, column, number in operands(repacked[slot], rows, columns):
            found[row, column] = number
        torch.testing.assert_close(found, numbers(packed[slot]), rtol=0, atol=0)


def test_marlin_scales_by_group_with_every_eighth_row_together() -> None:
    scales = torch.arange(2 * 128 * 3).float().view(2, 128, 3)
    laid = marlin.lay_scales(scales)
    assert laid.shape == (2, 3, 128) and laid.is_contiguous()
    for tile in range(2):
        for place in range(64):
            row = 64 * tile + place // 8 + 8 * (place % 8)
            assert torch.equal(laid[:, :, 64 * tile + place], scales[:, row])


def test_sglang_interleaves_gate_and_up() -> None:
    w13 = torch.arange(2 * 6 * 2).view(2, 6, 2)
    rows = sglang.interleaved(w13)
    assert rows.is_contiguous() and torch.equal(rows, w13[:, [0, 3, 1, 4, 2, 5]])


def test_sglang_reads_the_packed_numbers_as_two_to_a_byte() -> None:
    one = problem(MODEL)
    arguments = sglang._weights(one)
    w2 = arguments["w2"]
    low, high = (w2 & 15).float() - 8, (w2 >> 4).float() - 8
    stored: Any = one.experts.w2_weight_packed
    assert torch.equal(torch.stack((low, high), -1).flatten(-2), numbers(stored))
    assert arguments["use_int4_w4a16"] and arguments["block_shape"] == [0, 32]


@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32"])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_sglang_tries_its_own_choice_first_and_none_beyond_the_width(format_name: str, tokens: int) -> None:
    model = Model.of("kimi-k2.5", format_name, 16)
    own, *others = sglang.candidates(model.shape, tokens)
    assert own is None and len(others) > 2
    assert all(config["BLOCK_SIZE_K"] <= 128 for config in others)
    if format_name == "fp8_block":
        # A step is within one block of scales.
        assert {config["BLOCK_SIZE_K"] for config in others} == {128}


def test_a_configuration_is_in_force_for_one_call_only() -> None:
    class Utils:
        _config: object = None

    def fails_within() -> None:
        with sglang._override(Utils, {"BLOCK_SIZE_M": 16}):
            assert Utils._config == {"BLOCK_SIZE_M": 16}
            raise RuntimeError("out of shared memory")

    with pytest.raises(RuntimeError):
        fails_within()
    assert Utils._config is None


def test_the_fastest_is_taken_and_those_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = {0: 3.0, 16: 2.0, 32: None}

    def time(call: Any) -> float:
        found = milliseconds[call()]
        if found is None:
            raise LookupError("out of resource: shared memory")  # as Triton, a kind of its own
        return found

    monkeypatch.setattr(sglang, "_time", time)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tried = [None, {"BLOCK_SIZE_M": 16}, {"BLOCK_SIZE_M": 32}]
    call_with = lambda config: lambda: config["BLOCK_SIZE_M"] if config else 0  # noqa: E731
    assert sglang._fastest(call_with, tried) == {"BLOCK_SIZE_M": 16}
    milliseconds[16] = 4.0
    assert sglang._fastest(call_with, tried) is None
    with pytest.raises(Unavailable, match="none of SGLang's configurations"):
        sglang._fastest(call_with, tried[2:])


@pytest.mark.parametrize(
    ("name", "model", "sentence"),
    [
        ("marlin", replace(MODEL, format="bf16"), "Marlin is timed on int4_g32, not bf16"),
        ("marlin", replace(MODEL, width=96), "a hidden size of 128s and a width of 64s, here 128 and 96"),
        ("marlin", MODEL, "NVIDIA's Hopper"),
        ("sglang-triton", replace(MODEL, format="mxfp4"), "bf16, fp8_block and int4_g32, not mxfp4"),
        ("sglang-triton", replace(MODEL, format="fp8_block", width=192), "whole blocks of 128"),
        ("sglang-triton-tuned", replace(MODEL, format="bf16"), "NVIDIA's Hopper"),
    ],
)
def test_what_an_adapter_can_not_run_is_a_sentence(name: str, model: Model, sentence: str, folder: Path) -> None:
    (peer,) = peers_of([name], folder)
    assert peer.name == name and 0 < peer.accuracy < 1
    with pytest.raises(Unavailable, match=sentence):
        peer(problem(model))
