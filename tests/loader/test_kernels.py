"""The Triton kernels on the CPU, by Triton's interpreter: what they compute, not how fast (see suites.yaml)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loader.activation import ExpertConfig
from loader.backends import rounding
from loader.kernels.configs import PACKED, Config, Tiles
from loader.kernels.eager import eager
from loader.kernels.tuned import SHIPPED, read_table
from loader.moe import Experts
from tests.loader.stacks import stack

pytestmark = pytest.mark.kernels

GPT_OSS = ExpertConfig(limit=7.0, alpha=1.702, up_offset=1.0)
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the norm. The interpreter cuts bf16 off where a device rounds, so that errors add up: up to 2**-8 for each."""
FP8_TOLERANCE = 0.06
"""Against what is rounded to E4M3 too: between the products some numbers fall to the other side, by 2**-3."""
NARROW_FP8_TOLERANCE = 0.12
"""A few columns average nothing out."""


@pytest.fixture(scope="session")
def layer() -> Any:
    """`loader.kernels.triton_layer`, which can only be imported where Triton is installed."""
    from loader.kernels import triton_layer

    return triton_layer


def small_tiles(format_name: str, *, walked: int = 0, strips: int = 1, left: bool = False, **other: Any) -> Config:
    step = 128 if format_name != "bf16" else 32
    left = left and format_name not in PACKED
    tiles = Tiles(block_n=16, block_c=step, warps=4, stages=2, programs=walked, tokens_left=left)
    return replace(Config(block_m=16, gate_up=tiles, down=replace(tiles, strips=strips)), **other)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def reference(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, dtype: torch.dtype) -> Tensor:
    """`eager`, with the roundings to E4M3 that FP8's kernels make unless they compute in float32."""
    return (eager if dtype == torch.float32 else rounding)(x, weights, ids, experts)


CONFIGS = [
    {"by_pair": True},
    {"by_pair": True, "walked": 1},
    {"by_pair": True, "splits": 2},
    {"splits": 3},
    {},
    {"block_m": 8},
    {"block_m": 8, "walked": 1, "splits": 2},
    {"block_m": 32},
    {"walked": 1},
    {"walked": 1, "block_m": 64},
    {"left": True},
    {"left": True, "walked": 1, "splits": 2},
    {"block_m": 128},
    {"block_m": 128, "left": True},
    {"strips": 3},
    {"strips": 2, "block_m": 8},
    {"strips": 100, "by_pair": True},
    {"strips": 2, "block_m": 128, "left": True},
]
WAYS = [{"by_pair": True}, {"by_pair": True, "splits": 2}, {"splits": 3}, {}]
"""Each way to walk a layer, with and without parts."""
FORMATS = ["bf16", "fp16", "fp32", "fp8_block", "int4_g32", "mxfp4"]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, a configuration and a routing; sizes that are no multiples of any tile, empty and crowded experts."""
    format_name = draw(st.sampled_from(FORMATS))
    unit = 32 if format_name in ("int4_g32", "mxfp4") else draw(st.sampled_from([1, 7, 16]))
    slots = draw(st.integers(1, 12))
    config = draw(st.sampled_from(CONFIGS))
    few = [0, 1, 2, 3, 5]
    return {
        "format_name": format_name,
        # Of one number or two everything may cancel out, and what is left says nothing.
        "hidden": max(5, unit * draw(st.integers(1, 9))),
        "width": unit * draw(st.integers(1, 5)),
        "slots": slots,
        "top_k": draw(st.integers(1, min(slots, 10))),
        # Pair by pair many are a minute's work for the interpreter.
        "tokens": draw(st.sampled_from(few if "by_pair" in config else [*few, 17, 40])),
        "config": config,
        "routing": draw(st.sampled_from(["random", "crowded", "same"])),
        "dropped": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "experts": draw(st.sampled_from([ExpertConfig(), GPT_OSS])),
        "biased": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def routed(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(call["seed"])
    tokens, slots, k = call["tokens"], call["slots"], call["top_k"]
    x = torch.randn(tokens, call["hidden"], generator=generator)
    scores = torch.rand(tokens, slots, generator=generator)
    if call["routing"] == "crowded":
        scores[:, 0] += 1  # one expert has all tokens
    if call["routing"] == "same":
        scores = scores[:1].expand(tokens, slots) if tokens else scores
    weights, ids = scores.topk(k, dim=-1)
    if call["dropped"]:
        weights = weights.masked_fill(torch.rand(weights.shape, generator=generator) < 0.3, 0.0)
    return x, weights.contiguous(), ids.contiguous()


@settings(max_examples=70, deadline=None)
@given(call=calls())
def test_the_kernels_compute_what_the_reference_does(layer: Any, call: dict[str, Any]) -> None:
    of = call["format_name"]
    # Numbers as they are stored go with x of their own dtype, or with float32.
    native = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(of, torch.bfloat16)
    dtype = torch.float32 if call["dtype"] == torch.float32 else native
    experts = stack(
        of,
        slots=call["slots"],
        hidden=call["hidden"],
        width=call["width"],
        seed=call["seed"],
        config=call["experts"],
        biased=call["biased"],
    )
    x, weights, ids = routed(call)
    actual = layer.TritonExperts(experts)(x.to(dtype), weights, ids, config=small_tiles(of, **call["config"]))
    expected = reference(x.to(dtype).float(), weights, ids, experts, dtype)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCES[dtype]
    if of == "fp8_block" and dtype != torch.float32:
        tolerance = FP8_TOLERANCE if min(call["hidden"], call["width"]) >= 32 else NARROW_FP8_TOLERANCE
    assert relative(actual, expected) <= tolerance


def shipped_ways() -> dict[tuple[str, Config], None]:
    """Formats and configurations of the shipped tables, but for what decides about registers and time alone."""

    def bare(tiles: Tiles) -> Tiles:
        return replace(tiles, warps=4, stages=2, registers=0)

    stacks = (each for path in sorted(SHIPPED.glob("*.json")) for each in read_table(path).configs.items())
    measured = ((shape.format, one.config) for shape, by_tokens in stacks for one in by_tokens.values())
    return dict.fromkeys((name, replace(c, gate_up=bare(c.gate_up), down=bare(c.down))) for name, c in measured)


@pytest.mark.parametrize(("format_name", "config"), shipped_ways())
def test_every_shipped_configuration_is_right_at_sizes_that_are_no_whole_tiles(
    layer: Any, format_name: str, config: Config
) -> None:
    """And within its tensors (`bounds`); a share of the tokens such as it is for, up to a block and some."""
    tokens = 3 if config.by_pair else config.block_m + 3
    call = {"seed": 3, "tokens": tokens, "slots": 3, "top_k": 2, "hidden": 352, "routing": "crowded", "dropped": True}
    experts = stack(format_name, slots=3, hidden=352, width=160, seed=3)
    x, weights, ids = routed(call)
    actual = layer.TritonExperts(experts)(x.bfloat16(), weights, ids, config=config)
    expected = reference(x.bfloat16().float(), weights, ids, experts, torch.bfloat16)
    tolerance = FP8_TOLERANCE if format_name == "fp8_block" else TOLERANCES[torch.bfloat16]
    assert relative(actual, expected) <= tolerance


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("way", [{}, {"walked": 1}, {"strips": 2}])
def test_blocks_of_128_that_are_full_and_half_empty(layer: Any, left: bool, way: dict[str, Any]) -> None:
    experts = stack("bf16", slots=2, hidden=48, width=32)
    call = {"seed": 8, "tokens": 170, "slots": 2, "top_k": 1, "hidden": 48, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    ids[:150], ids[150:] = 0, 1  # a whole block and 22 pairs; 20 pairs
    config = small_tiles("bf16", block_m=128, left=left, **way)
    actual = layer.TritonExperts(experts)(x, weights, ids, config=config)
    assert relative(actual, eager(x, weights, ids, experts)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"left": True}, {"left": True, "walked": 1}, {"left": True, "strips": 5}])
def test_rows_of_several_blocks_have_their_own_scales(layer: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Of gate and up, and of down, whose last block is no whole one."""
    experts = stack("fp8_block", slots=3, hidden=272, width=208, seed=7)
    call = {"seed": 7, "tokens": 19, "slots": 3, "top_k": 2, "hidden": 272, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    actual = layer.TritonExperts(experts)(x.to(dtype), weights, ids, config=small_tiles("fp8_block", **config))
    tolerance = TOLERANCES[dtype] if dtype == torch.float32 else FP8_TOLERANCE
    assert relative(actual, reference(x.to(dtype).float(), weights, ids, experts, dtype)) <= tolerance


@pytest.mark.parametrize("numbers", [(128, 1), (128, 8), (256, 4), (1024, 2)])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "mxfp4"])
def test_rows_are_prepared_several_at_a_time(
    layer: Any, monkeypatch: pytest.MonkeyPatch, format_name: str, splits: int, numbers: tuple[int, int]
) -> None:
    """Columns and rows of a program; 19 tokens and 38 pairs, 288 and 160 columns: no multiples of them."""
    monkeypatch.setattr(layer, "_of_prepare", lambda count, columns: numbers)
    experts = stack(format_name, slots=3, hidden=288, width=160, seed=5)
    call = {"seed": 5, "tokens": 19, "slots": 3, "top_k": 2, "hidden": 288, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    actual = layer.TritonExperts(experts)(x.bfloat16(), weights, ids, config=small_tiles(format_name, splits=splits))
    expected = reference(x.bfloat16().float(), weights, ids, experts, torch.bfloat16)
    tolerance = FP8_TOLERANCE if format_name == "fp8_block" else TOLERANCES[torch.bfloat16]
    assert relative(actual, expected) <= tolerance


def test_many_numbers_are_prepared_by_fewer_programs(layer: Any) -> None:
    for count, columns, expected in ((64, 7168, (1024, 1)), (1024, 7168, (4096, 1)), (9216, 256, (256, 16))):
        assert layer._of_prepare(count, columns) == expected


def test_what_is_unpacked_is_the_left_operand(layer: Any) -> None:
    experts = stack("mxfp4", slots=2, hidden=64, width=32)
    config = small_tiles("mxfp4")
    config = replace(config, down=replace(config.down, tokens_left=True))
    with pytest.raises(ValueError, match="tokens_left of down must be false"):
        layer.TritonExperts(experts)(torch.zeros(1, 64), torch.ones(1, 1), torch.zeros(1, 1).int(), config=config)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 48, 160])
def test_the_configuration_by_counting_is_right_too(layer: Any, format_name: str, tokens: int) -> None:
    experts = stack(format_name, slots=9, hidden=192, width=96)
    call = {"seed": 1, "tokens": tokens, "slots": 9, "top_k": 4, "hidden": 192, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    actual = layer.TritonExperts(experts)(x, weights, ids)
    assert relative(actual, eager(x, weights, ids, experts)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("sizes", [(768, 64), (64, 768)], ids=["gate_up", "down"])
@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"by_pair": True}, 128),
        ({"by_pair": True, "splits": 2}, 256),
        ({"walked": 1}, 512),
        ({"block_m": 8}, 256),
        ({"strips": 2}, 256),
    ],
)
@pytest.mark.parametrize("format_name", sorted(PACKED))
def test_scales_in_runs_give_bit_for_bit_what_scales_by_rows_do(
    layer: Any, format_name: str, config: dict[str, Any], step: int, sizes: tuple[int, int]
) -> None:
    """In steps of half a run, of one, and of two, beyond the last one; one matrix has runs, the other a few groups."""
    hidden, width = sizes = (sizes[0], min(sizes[1], 512 if "strips" in config else sizes[1]))  # more is not kept
    call = {"seed": 9, "tokens": 2, "slots": 3, "top_k": 2, "hidden": hidden, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    plain, runs = (
        stack(format_name, slots=3, hidden=hidden, width=width, seed=9, laid_out=each) for each in (False, True)
    )
    assert [runs.stacked(name)["scale"].dim() for name in ("w13", "w2")] == [4 if n > 256 else 3 for n in sizes]
    cut = small_tiles(format_name, **config)
    halves = {name: replace(getattr(cut, name), block_n=64, block_c=step) for name in ("gate_up", "down")}
    expected, actual = (
        layer.TritonExperts(each)(x, weights, ids, config=replace(cut, **halves)) for each in (plain, runs)
    )
    assert torch.equal(actual, expected)
    assert relative(actual, eager(x, weights, ids, runs)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("config", WAYS)
def test_what_weighs_nothing_stays_out(layer: Any, config: dict[str, Any]) -> None:
    """A token without a weight may be NaN, or infinite: nobody else sees it, and it comes out as 0."""
    experts = stack("bf16", slots=5, hidden=48, width=32)
    call = {"seed": 2, "tokens": 6, "slots": 5, "top_k": 2, "hidden": 48, "routing": "crowded", "dropped": False}
    x, weights, ids = routed(call)
    clean = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles("bf16", **config))
    x[1], x[4], weights[1], weights[4] = torch.nan, torch.inf, 0.0, 0.0
    dirty = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles("bf16", **config))
    others = [0, 2, 3, 5]
    assert torch.equal(dirty[others], clean[others])
    assert torch.equal(dirty[[1, 4]], torch.zeros(2, 48))


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("format_name", ["fp16", "fp8_block", "int4_g32", "mxfp4"])
def test_a_token_that_is_not_a_number_is_loud(layer: Any, format_name: str, config: dict[str, Any]) -> None:
    """Also where it is rounded to E4M3, which has no infinity, and casts to which may drop a NaN."""
    experts = stack(format_name, slots=5, hidden=256, width=128)
    call = {"seed": 8, "tokens": 5, "slots": 5, "top_k": 2, "hidden": 256, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    x = x.to(torch.float16)
    clean = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles(format_name, **config))
    x[1, 200], x[3, 7] = torch.nan, -torch.inf
    actual = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles(format_name, **config))
    assert not actual[[1, 3]].isfinite().any()
    assert torch.equal(actual[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_expert_that_does_not_exist_is_loud(layer: Any, config: dict[str, Any], bad: int) -> None:
    """Nothing outside of the stack is read, the token is NaN, and no other is."""
    experts = stack("int4_g32", slots=5, hidden=64, width=32)
    call = {"seed": 3, "tokens": 4, "slots": 5, "top_k": 3, "hidden": 64, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    expected = eager(x, weights, ids, experts)
    ids[2, 1] = bad
    actual = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles("int4_g32", **config))
    assert actual[2].isnan().all()
    assert relative(actual[[0, 1, 3]], expected[[0, 1, 3]]) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("config", WAYS)
def test_a_weight_that_is_not_a_number_is_loud(layer: Any, config: dict[str, Any]) -> None:
    experts = stack("bf16", slots=4, hidden=32, width=16)
    call = {"seed": 4, "tokens": 3, "slots": 4, "top_k": 2, "hidden": 32, "routing": "random", "dropped": False}
    x, weights, ids = routed(call)
    weights[1, 0] = torch.nan
    actual = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles("bf16", **config))
    assert actual[1].isnan().all()
    assert actual[[0, 2]].isfinite().all()


@pytest.mark.parametrize("config", WAYS)
def test_strided_and_misaligned_inputs(layer: Any, config: dict[str, Any]) -> None:
    experts = stack("bf16", slots=4, hidden=33, width=17)
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(7, 2 * 33 + 1, generator=generator)
    x = wide[:, 1::2]  # neither contiguous nor aligned
    weights, ids = torch.rand(4, 7, generator=generator).T.topk(2, dim=-1)
    actual = layer.TritonExperts(experts)(x, weights, ids, config=small_tiles("bf16", **config))
    assert relative(actual, eager(x, weights, ids, experts)) <= TOLERANCES[torch.float32]


def test_what_is_added_comes_out_with_the_sum(layer: Any) -> None:
    experts = stack("bf16", slots=4, hidden=32, width=16)
    for tokens in (0, 2, 9):
        call = {"seed": 6, "slots": 4, "top_k": 2, "hidden": 32, "routing": "random", "dropped": False}
        x, weights, ids = routed({**call, "tokens": tokens})
        base = torch.randn(tokens, 32)
        actual = layer.TritonExperts(experts)(x, weights, ids, base_TD=base)
        torch.testing.assert_close(actual, base + eager(x, weights, ids, experts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(3, 31)}, r"x is \[3, 31\], expected \[3, 32\]"),
        ({"x": torch.zeros(2, 32)}, r"x is \[2, 32\], expected \[3, 32\]"),
        ({"weights": torch.zeros(3, 1)}, r"topk_weights is \[3, 1\], topk_ids \[3, 2\]"),
        ({"ids": torch.zeros(3, 2)}, r"topk_ids is torch.float32, expected int32 or int64"),
        ({"x": torch.zeros(3, 32, dtype=torch.float64)}, "expected bfloat16, float16 or float32"),
        ({"x": torch.zeros(3, 32, dtype=torch.float16)}, "the weights are torch.bfloat16; give x in that, or in float"),
        ({"x": torch.zeros(3, 32, device="meta")}, "are on .*cpu.*meta.*, expected one"),
    ],
)
def test_inputs_that_do_not_belong_together(layer: Any, change: dict[str, Tensor], says: str) -> None:
    given_ = {"x": torch.zeros(3, 32), "weights": torch.zeros(3, 2), "ids": torch.zeros(3, 2, dtype=torch.int64)}
    given_ |= change
    with pytest.raises(ValueError, match=says):
        layer.TritonExperts(stack("bf16", slots=4, hidden=32, width=16))(given_["x"], given_["weights"], given_["ids"])


@pytest.mark.parametrize(("walked", "refused"), [(0, False), (1, True)])
def test_steps_of_a_walk_are_work_too(layer: Any, walked: int, refused: bool) -> None:
    """Tiles are few enough to be counted in int32 and, of a program that walks, their steps are not."""
    with torch.device("meta"):
        x, weights = torch.empty(2**23, 512, dtype=torch.bfloat16), torch.empty(2**23, 2)
        ids = torch.empty(2**23, 2, dtype=torch.int32)
    experts = stack("int4_g32", slots=4, hidden=512, width=1024).to("meta")
    kernels = layer.TritonExperts(experts, launch=lambda *_, **__: None, assembly=0)
    config = small_tiles("int4_g32", walked=walked, by_pair=True)
    config = replace(config, gate_up=replace(config.gate_up, block_n=64))
    with pytest.raises(ValueError, match="16777216 pairs of token and slot") if refused else nullcontext():
        kernels(x, weights, ids, config=config)


def test_more_work_than_int32_counts_is_refused(layer: Any) -> None:
    experts = layer.TritonExperts(stack("bf16", slots=4, hidden=32, width=16))
    tokens = 2**27
    with pytest.raises(ValueError, match="134217728 tokens of 9 slots are more work than one call takes"):
        experts(
            torch.zeros(1, 1).expand(tokens, 32),
            torch.zeros(1, 1).expand(tokens, 9),
            torch.zeros(1, 1, dtype=torch.int64).expand(tokens, 9),
        )


def test_formats_and_activations_that_the_kernels_do_not_have(layer: Any) -> None:
    with pytest.raises(ValueError, match="have no `nvfp4`; there are bf16, "):
        layer.TritonExperts(stack("nvfp4", slots=2, hidden=32, width=16))
    with pytest.raises(ValueError, match="not `gelu_pytorch_tanh` weighed at the output"):
        layer.TritonExperts(
            stack("bf16", slots=2, hidden=32, width=16, config=ExpertConfig(hidden_act="gelu_pytorch_tanh"))
        )


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 120),
    slots=st.integers(1, 40),
    top_k=st.integers(1, 6),
    block_m=st.sampled_from([8, 16, 32, 64, 128]),
    routing=st.sampled_from(["random", "crowded", "same"]),
    dropped=st.booleans(),
    chunks=st.sampled_from([(4, 4), (128, 512), (512, 512)]),
    small=st.sampled_from([0, 256]),
    seed=st.integers(0, 99),
)
def test_a_schedule_has_every_pair_once_in_blocks_of_one_expert(
    layer: Any,
    tokens: int,
    slots: int,
    top_k: int,
    block_m: int,
    routing: str,
    dropped: bool,
    chunks: tuple[int, int],
    small: int,
    seed: int,
) -> None:
    """Without those of weight 0, and of experts that don't exist; with chunks as few and as many pairs have them."""
    k = min(top_k, slots)
    call = {"seed": seed, "tokens": tokens, "slots": slots, "top_k": k, "hidden": 1, "routing": routing}
    _, weights, ids = routed({**call, "dropped": dropped})
    strange = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    ids[strange] = torch.tensor([-1, -(2**31), slots, 2**31 - 1])[seed % 4]
    experts = layer.TritonExperts(stack("bf16", slots=slots, hidden=16, width=16))
    config = replace(small_tiles("bf16"), block_m=block_m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "CHUNKS", chunks)
        patch.setattr(layer, "SMALL", small)
        schedule = layer._Call(experts, torch.zeros(tokens, 16), ids, weights, config).schedule()
    n = int(schedule.n)
    assert n <= schedule.most
    computed = ((weights != 0) & (ids >= 0) & (ids < slots)).flatten()
    expected = [p for p in ids.flatten().argsort(stable=True).tolist() if computed[p]]
    assert schedule.order[: len(expected)].tolist() == expected
    place = 0
    for expert, first, end in schedule.blocks[:n].tolist():
        assert first == place
        assert first < end <= first + block_m
        assert {int(ids.flatten()[p]) for p in expected[first:end]} == {expert}
        place = end
    assert place == len(expected)


@pytest.mark.parametrize("format_name", ["int4_g32", "mxfp4"])
def test_every_code_with_every_scale_is_unpacked_exactly(layer: Any, format_name: str) -> None:
    """One expert whose gate is the identity shows the stored numbers themselves, in float32."""
    experts = stack(format_name, slots=1, hidden=256, width=256)
    w2, scale = experts.stacked("w2")["weight"], experts.stacked("w2")["scale"]
    w2.view(torch.uint8).copy_(torch.arange(256, dtype=torch.uint8).repeat(256 // 2).view(1, 256, 128))
    if format_name == "mxfp4":
        # Code 255 is NaN, and would be in every row.
        scale.view(torch.uint8).copy_((torch.arange(256 * 8) % 255).to(torch.uint8).view(1, 256, 8))
    else:
        scale.copy_(torch.linspace(1e-3, 2.0, 256 * 8).view(1, 256, 8))
    expected = experts.dequantize(torch.zeros(1, dtype=torch.int64), torch.float32)[1][0]
    triton = pytest.importorskip("triton")
    numbers = torch.empty(256, 256)
    _show_unpacked(triton)[(1,)](
        w2.view(torch.int16),
        scale.view(torch.uint8) if format_name == "mxfp4" else scale,
        numbers,
        FORMAT=format_name,
        ROWS=256,
        C=256,
    )
    assert torch.equal(numbers, expected)


def _show_unpacked(triton: Any) -> Any:
    from tests.loader.unpacked import show_unpacked

    return show_unpacked
