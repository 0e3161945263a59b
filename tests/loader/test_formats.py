"""The arithmetic of each format, against bytes that its own library wrote and against an independent reading."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatekeeper import Format, TensorInfo
from loader.checkpoint import DTYPES
from loader.formats import FORMATS, Layout, StraddleError, dequantize_stacked, layout_of, match_layout
from loader.formats.fp8_block import BLOCK
from loader.formats.mxfp4 import join_blocks
from loader.packing import PACKERS
from loader.raw_numbers import raw_numbers
from tests.loader.fakes import WORDS, shipped, tensor

GOLDENS = Path(__file__).parent / "goldens"
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu


def from_golden(raw: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(raw["data"]))
    return torch.frombuffer(data, dtype=DTYPES[raw["dtype"]]).reshape(raw["shape"])


def infos(stored: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {suffix: tensor(suffix, WORDS[t.dtype], tuple(t.shape)) for suffix, t in stored.items()}


def layout(stored: dict[str, Tensor]) -> Layout:
    """As the loader recognises it."""
    found = match_layout(shipped().formats, [infos(stored)])
    assert found is not None
    return found


def dequantize(stored: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The parts of one projection as the loader would have them in memory, to numbers."""
    known = layout(stored)
    parts = {p.role: stored[p.suffix] for p in known.parts}
    matrices = {role: part if part.dim() == 2 else part.reshape(-1, 1) for role, part in parts.items()}
    return known.format.dequantize(matrices, dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, with NaN in the same places."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def test_there_is_arithmetic_for_every_format_that_the_gatekeeper_knows() -> None:
    assert FORMATS.keys() == shipped().formats.keys() == PACKERS.keys()
    assert shipped().formats["fp8_block"].block == (BLOCK, BLOCK)


@pytest.mark.parametrize("file", sorted(GOLDENS.glob("*.json")), ids=lambda file: file.stem)
def test_bytes_written_by_the_formats_own_library(file: Path) -> None:
    golden = json.loads(file.read_text(encoding="utf-8"))
    assert golden["written_by"], "a golden says which library wrote it"
    stored = {suffix: from_golden(raw) for suffix, raw in golden["parts"].items()}
    expected = from_golden(golden["dequantized"])
    if "blocks" in stored:
        stored = {"weight": join_blocks(stored["blocks"]), "weight_scale": stored["scales"]}
    known = layout(stored)
    assert known.name == golden["format"]
    for part in known.parts:
        assert part.fits(tuple(stored[part.suffix].shape), *expected.shape)
    assert same(dequantize(stored, expected.dtype), expected)
    if known.shape_part is not None:
        assert stored[known.shape_part.suffix].tolist() == list(expected.shape)


# -- packed by us, read by two --------------------------------------------------------------------------------------

# Half a step as a part of the largest number around: of int4 a 7th, of E2M1 a quarter (an OCP scale clips at 6 of 8),
# of E4M3 a 16th, of a float its last digit.
STEPS = {
    "bf16": 2**-8,
    "fp16": 2**-11,
    "fp32": 0.0,
    "fp8_block": 2**-4,
    "fp8_channel": 2**-4,
    "fp8_tensor": 2**-4,
    "int4_g32": 1 / 14,
    "mxfp4": 1 / 4,
    "mxfp8": 2**-3,
    "nvfp4": 1 / 5,
    "nvfp4_ct": 1 / 5,
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_comes_back(name: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    back = dequantize(PACKERS[name](weight))
    largest = weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(6, 4, 16).reshape(6, 64)
    if name == "mxfp4" or name == "int4_g32":
        largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(6, 2, 32).reshape(6, 64)
    assert ((back - weight).abs() <= STEPS[name] * 1.01 * largest).all()


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised_by_the_parts_that_are_packed(name: str) -> None:
    for rows, columns in ((32, 64), (160, 128), (256, 288)):
        stored = PACKERS[name](torch.ones(rows, columns))
        known = layout(stored)
        assert known.name == name
        assert {p.suffix for p in (*known.parts, *known.unused, *([known.shape_part] if known.shape_part else []))} >= (
            stored.keys()
        )


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000)).map(
    lambda drawn: (drawn[0] * 37, drawn[1] * 32, drawn[2])
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25)
@given(shapes, st.floats(-12, 12))
def test_two_readings_of_one_packing_agree(name: str, shape: tuple[int, int, int], magnitude: float) -> None:
    rows, columns, seed = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    stored = PACKERS[name](weight)
    exact = raw_numbers(stored)
    # Three factors are multiplied in float32, so the last two digits may differ; with less than three, one.
    torch.testing.assert_close(dequantize(stored).double(), exact, rtol=2**-22, atol=1e-44)


def random_bytes(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_scales(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype in (torch.uint8, E8M0):
        return random_bytes(seed, *shape).view(dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs().to(dtype)


SIGNATURES = [
    (name, number, scale)
    for name, known in sorted(shipped().formats.items())
    for number, signature in enumerate(known.signatures)
    for scale in next((p.dtypes for p in signature.parts if p.role == "scale"), ("",))
]


@pytest.mark.parametrize(("name", "number", "scale"), SIGNATURES)
@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 200), st.integers(1, 5))
def test_any_bytes_mean_the_same_by_two_readings(
    name: str, number: int, scale: str, seed: int, rows: int, groups: int
) -> None:
    """Every signature with every dtype of its scale, filled with random bytes: NaN, infinity and all."""
    known = shipped().formats[name]
    sizes, stored = {"out": rows, "in": 32 * groups}, {}
    for offset, part in enumerate(known.signatures[number].parts):
        shape = tuple(term.size(sizes) for term in part.shapes[seed % len(part.shapes)])
        dtype = DTYPES[scale if part.role == "scale" else part.dtypes[0]]
        if part.role == "weight":
            raw = random_bytes(seed + offset, *shape[:-1], shape[-1] * dtype.itemsize)  # type: ignore[operator]
            stored[part.suffix] = raw.view(dtype)
        elif part.role in ("scale", "global_scale", "input_scale"):
            stored[part.suffix] = random_scales(seed + offset, dtype, *shape)  # type: ignore[arg-type]
        else:
            stored[part.suffix] = torch.tensor([rows, 32 * groups])
    found = layout(stored)
    assert found.name == name and [p.name for p in found.parts] == [p.name for p in layout_of(known).parts]
    exact, ours = raw_numbers(stored), dequantize(stored)
    assert torch.equal(exact.isnan(), ours.isnan() & ~exact.isinf())
    if name in ("bf16", "fp16", "fp32"):
        assert same(ours.double(), exact)
    else:
        finite = exact.abs() < torch.finfo(torch.float32).max
        torch.testing.assert_close(ours[finite].double(), exact[finite], rtol=2**-22, atol=1e-44)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_of_experts_is_dequantized_like_each_of_them(name: str) -> None:
    weights = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    known = layout_of(shipped().formats[name])
    together = PACKERS[name](weights)
    one_by_one = [dequantize(PACKERS[name](weight)) for weight in weights]
    stacked = {p.role: together[p.suffix].reshape(3, *p.shape(8, 64)) for p in known.parts}
    assert torch.equal(known.format.dequantize(stacked, torch.float32), torch.stack(one_by_one))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_gate_are_not_those_of_up(name: str) -> None:
    gate, up = torch.full((96, 64), 1.0), torch.full((96, 64), 100.0)
    packed = [PACKERS[name](each) for each in (gate, up)]
    known = layout(packed[0])
    stacked = {
        p.role: torch.cat([each[p.suffix].reshape(p.shape(96, 64)) for each in packed]).unsqueeze(0)
        for p in known.parts
    }
    back = dequantize_stacked(known, stacked, torch.float32, stacked=2)[0]
    torch.testing.assert_close(back, torch.cat([gate, up]), rtol=0.13, atol=0)
    assert torch.equal(back, torch.cat([dequantize(each) for each in packed]))


# -- every code -----------------------------------------------------------------------------------------------------

E2M1_NUMBERS = [s * n for s in (1, -1) for n in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]


def e4m3_number(code: int) -> float:
    """OCP 8-bit Floating Point Specification 1.0, table 1: bias 7, no infinity, NaN only where all other bits are 1."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code >= 128 else size


def test_every_int4_and_every_e2m1_code() -> None:
    nibbles = torch.arange(16).repeat(2)
    word = lambda start: sum(int(n) << (4 * i) for i, n in enumerate(nibbles[start : start + 8]))  # noqa: E731
    words = [w - 2**32 if (w := word(start)) >= 2**31 else w for start in range(0, 32, 8)]
    stored = {
        "weight_packed": torch.tensor([words], dtype=torch.int32),
        "weight_scale": torch.tensor([[0.5]]).bfloat16(),
    }
    assert torch.equal(dequantize(stored), (nibbles - 8).float()[None] / 2)
    packed = torch.tensor([[int(nibbles[i] + 16 * nibbles[i + 1]) for i in range(0, 32, 2)]], dtype=torch.uint8)
    stored = {"weight": packed, "weight_scale": torch.tensor([[128]], dtype=torch.uint8)}
    assert torch.equal(dequantize(stored), torch.tensor([[2 * n for n in E2M1_NUMBERS * 2]]))
    two = {"weight_scale": torch.full((1, 2), 2.0).to(E4M3)}
    for suffix, factor, name, half in (
        ("weight", 0.5, "weight_scale_2", ()),
        ("weight_packed", 2.0, "weight_global_scale", (1,)),
    ):
        stored = {suffix: packed, **two, name: torch.full(half, factor)}
        assert torch.equal(dequantize(stored), torch.tensor([E2M1_NUMBERS * 2])), "a factor, and its reciprocal"


def test_every_e4m3_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    expected = torch.tensor([[e4m3_number(code) for code in range(256)]])
    scales = {
        "fp8_block": {"weight_scale_inv": torch.ones(1, 2)},
        "fp8_channel": {"weight_scale": torch.ones(1, 1).bfloat16()},
        "fp8_tensor": {"weight_scale": torch.ones(())},
        "mxfp8": {"weight_scale": torch.full((1, 8), 127, dtype=torch.uint8)},
    }
    for name, scale in scales.items():
        stored = {"weight": codes.view(E4M3), **scale}
        assert layout(stored).name == name or name == "fp8_channel"
        assert same(dequantize(stored), expected)
        assert same(raw_numbers(stored), expected.double())
    # As scales: a block of NVFP4 whose numbers are all 1.
    ones = {"weight": torch.full((256, 8), 0x22, dtype=torch.uint8), "weight_scale_2": torch.ones(())}
    stored = ones | {"weight_scale": codes.T.contiguous().view(E4M3)}
    assert same(dequantize(stored), expected.T.expand(256, 16))
    assert same(raw_numbers(stored), expected.T.expand(256, 16).double())


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8_block"])
def test_every_e8m0_scale(name: str, dtype: torch.dtype) -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = torch.tensor([[2.0 ** (code - 127) for code in range(255)] + [math.nan]]).T
    if name == "mxfp4":
        stored = {"weight": torch.full((256, 16), 0x22, dtype=torch.uint8), "weight_scale": scales.view(dtype)}
    elif name == "mxfp8":
        stored = {"weight": torch.ones(256, 32).to(E4M3), "weight_scale": scales.view(dtype)}
    else:
        stored = {"weight": torch.ones(256 * 128, 1).to(E4M3), "scale": scales.view(E8M0)}
    for compute in (torch.float32, torch.bfloat16):
        back = dequantize(stored, compute)
        back = back[::128] if name == "fp8_block" else back
        # The smallest one is below the normal numbers of both dtypes, and exact all the same.
        assert same(back.double(), expected.double().expand(back.shape))
    assert same(raw_numbers(stored).float(), dequantize(stored))


# -- parts ----------------------------------------------------------------------------------------------------------


def part(name: str, role: str) -> Any:
    return next(p for p in layout_of(shipped().formats[name]).parts if p.role == role)


def test_cuts_only_between_blocks() -> None:
    scale = part("mxfp4", "scale")
    assert scale.stored_columns((32, 64), 96) == (1, 2)
    with pytest.raises(StraddleError, match="block of 32"):
        scale.stored_columns((0, 48), 96)
    blocks = part("fp8_block", "scale")
    assert blocks.stored_rows((128, 200), 200) == (1, 2)  # the last block may be a partial one
    with pytest.raises(StraddleError):
        blocks.stored_rows((32, 64), 64)


def test_a_scale_of_a_row_or_of_everything_is_a_matrix_in_memory() -> None:
    channel, factor = part("fp8_channel", "scale"), part("nvfp4", "global_scale")
    assert channel.shape(96, 64) == (96, 1) and factor.shape(96, 64) == (1, 1)
    assert channel.fits((96,), 96, 64) and channel.fits((96, 1), 96, 64) and not channel.fits((1, 96), 96, 64)
    assert factor.fits((), 96, 64) and factor.fits((1,), 96, 64) and not factor.fits((2,), 96, 64)
    assert channel.stored_columns((32, 64), 64) == (0, 1) == factor.stored_rows((32, 64), 96)


@pytest.mark.parametrize("name", FORMATS)
def test_one_name_in_memory_for_all_signatures(name: str) -> None:
    known = shipped().formats[name]
    names = {tuple((p.role, p.name) for p in layout_of(known, s).parts) for s in known.signatures}
    assert len(names) == 1
    assert {p.dtype for s in known.signatures for p in layout_of(known, s).parts} <= set(DTYPES)


def test_gpt_oss_blocks_are_the_same_bytes() -> None:
    blocks = random_bytes(0, 2, 6, 3, 16)
    joined = join_blocks(blocks)
    assert joined.shape == (2, 6, 48) and joined.data_ptr() == blocks.data_ptr()


# -- recognising ----------------------------------------------------------------------------------------------------


def test_the_layout_is_what_most_projections_have() -> None:
    odd, usual = infos(PACKERS["nvfp4"](torch.ones(32, 64))), infos(PACKERS["mxfp4"](torch.ones(32, 64)))
    found = match_layout(shipped().formats, [odd, usual, usual, {}])
    assert found is not None and found.name == "mxfp4"
    assert match_layout(shipped().formats, [{}, {}]) is None


@pytest.mark.parametrize("name", [n for n in FORMATS if len(PACKERS[n](torch.ones(32, 64))) > 2])
def test_a_part_that_is_missing_everywhere_leaves_the_format_known(name: str) -> None:
    whole = infos(PACKERS[name](torch.ones(32, 64)))
    required = [p.suffix for p in layout_of(shipped().formats[name]).parts][1:]
    for suffix in required:
        if name != "fp8_tensor":  # its weight and input_scale alone could be of a scale to each row as well
            found = match_layout(shipped().formats, [{s: i for s, i in whole.items() if s != suffix}])
            assert found is not None and found.name == name


@pytest.mark.parametrize(
    "parts",
    [
        [{"role": "weight", "suffix": "w", "dtype": ["F8_E4M3"], "shape": ["out", "in"]}],
        [
            {"role": "weight", "suffix": "w", "dtype": ["F8_E4M3"], "shape": ["in", "out"]},
            {"role": "scale", "suffix": "s", "dtype": ["F32"], "shape": ["out", 1]},
        ],
        [
            {"role": "weight", "suffix": "w", "dtype": ["F8_E4M3"], "shape": ["out", "in"]},
            {"role": "scale", "suffix": "s", "dtype": ["F32"], "shape": [1, "out"]},
        ],
        [
            {"role": "weight", "suffix": "w", "dtype": ["F8_E4M3FNUZ"], "shape": ["out", "in"]},
            {"role": "scale", "suffix": "s", "dtype": ["F32"], "shape": ["out", 1]},
        ],
    ],
    ids=["no scale", "transposed", "scale in a row", "dtype"],
)
def test_a_signature_that_this_loader_can_not_read_is_not_read(parts: list[dict[str, Any]]) -> None:
    """A rule set of someone else's may teach the gatekeeper more than the arithmetic here allows."""
    known = {"fp8_channel": Format.parse({"format": "fp8_channel", "doc": "Odd.", "signatures": [{"parts": parts}]})}
    shape = {"w": (32, 32), "s": (1, 32) if parts[-1]["shape"][0] == 1 else (32, 1)}
    found = {
        one["suffix"]: TensorInfo(
            name=one["suffix"], dtype=one["dtype"][0], shape=shape[one["suffix"]], shard="x", start=0, end=0
        )
        for one in parts
    }
    assert match_layout(known, [found]) is None
    assert match_layout({}, [found]) is None
