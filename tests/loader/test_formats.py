"""The arithmetic of each format, against bytes that its own library wrote and against an independent reading."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loader.checkpoint import DTYPES
from loader.formats import FORMATS, Layout, StraddleError, dequantize_stacked, layout_of
from loader.packing import PACKERS
from tests.loader.fakes import shipped

GOLDENS = Path(__file__).parent / "goldens"


def layout(name: str) -> Layout:
    """As the format's first signature has it."""
    return layout_of(shipped().formats[name])


def dequantize(name: str, stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Parts by the suffixes of the first signature to numbers."""
    return FORMATS[name].dequantize({p.role: stored[p.suffix] for p in layout(name).parts}, dtype)


def from_golden(raw: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(raw["data"]))
    return torch.frombuffer(data, dtype=DTYPES[raw["dtype"]]).reshape(raw["shape"])


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4"])
def test_bytes_written_by_the_formats_own_library(name: str) -> None:
    golden = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    assert golden["written_by"], "a golden says which library wrote it"
    stored = {suffix: from_golden(raw) for suffix, raw in golden["parts"].items()}
    expected = from_golden(golden["dequantized"])
    weight_format = FORMATS[name]
    for part in weight_format.parts:
        assert stored[part.suffix].dtype == part.dtype
        assert stored[part.suffix].shape == part.shape(*expected.shape)
    assert torch.equal(weight_format.dequantize(stored, expected.dtype), expected)
    if weight_format.shape_suffix is not None:
        assert stored[weight_format.shape_suffix].tolist() == list(expected.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_comes_back(name: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = PACKERS[name](weight)
    back = FORMATS[name].dequantize(stored, torch.float32)
    # Half a step: of int4 a 7th of the largest, of E2M1 a quarter, of E4M3 a 16th, of bf16 a 256th of the number.
    step = {"int4_g32": 1 / 7, "mxfp4": 1 / 2, "fp8_block": 1 / 8, "bf16": 1 / 128, "fp16": 1 / 1024}[name]
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(6, 2, 32).reshape(6, 64)
    assert ((back - weight).abs() <= step / 2 * 1.01 * largest).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_of_experts_is_dequantized_like_each_of_them(name: str) -> None:
    weights = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    weight_format = FORMATS[name]
    together = PACKERS[name](weights)
    parts = [part.suffix for part in weight_format.parts]
    one_by_one = [weight_format.dequantize(PACKERS[name](weight), torch.float32) for weight in weights]
    assert torch.equal(
        weight_format.dequantize({p: together[p] for p in parts}, torch.float32), torch.stack(one_by_one)
    )


def test_blocks_of_rows_start_anew_in_the_second_matrix() -> None:
    gate, up = torch.full((96, 8), 1.0), torch.full((96, 8), 100.0)
    packed = [PACKERS["fp8_block"](each) for each in (gate, up)]
    stacked = {suffix: torch.cat([each[suffix] for each in packed]) for suffix in packed[0]}
    back = dequantize_stacked(FORMATS["fp8_block"], stacked, torch.float32, stacked=2)
    torch.testing.assert_close(back, torch.cat([gate, up]), rtol=1e-6, atol=0)


def test_every_int4_and_every_e2m1_code() -> None:
    nibbles = torch.arange(16).repeat(2)
    word = lambda start: sum(int(n) << (4 * i) for i, n in enumerate(nibbles[start : start + 8]))  # noqa: E731
    words = [w - 2**32 if (w := word(start)) >= 2**31 else w for start in range(0, 32, 8)]
    stored = {
        "weight_packed": torch.tensor([words], dtype=torch.int32),
        "weight_scale": torch.tensor([[0.5]]).bfloat16(),
    }
    assert torch.equal(FORMATS["int4_g32"].dequantize(stored, torch.float32), (nibbles - 8).float()[None] / 2)
    packed = torch.tensor([[int(nibbles[i] + 16 * nibbles[i + 1]) for i in range(0, 32, 2)]], dtype=torch.uint8)
    stored = {"weight": packed, "weight_scale": torch.tensor([[128]], dtype=torch.uint8)}
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor([[2 * n for n in (*numbers, *(-n for n in numbers))] * 2])
    assert torch.equal(FORMATS["mxfp4"].dequantize(stored, torch.float32), expected)


def test_every_e8m0_scale() -> None:
    one = torch.full((256, 16), 0x22, dtype=torch.uint8)  # the number 1 in both nibbles
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        back = FORMATS["mxfp4"].dequantize({"weight": one, "weight_scale": scales}, dtype)[:, 0]
        assert torch.equal(back[1:255].double(), 2.0 ** torch.arange(-126, 128).double())
        assert back[255].isnan() and back[0] == 2.0**-127


def test_cuts_only_between_blocks() -> None:
    scale = Part(suffix="weight_scale", dtype=torch.uint8, columns_per_item=32)
    assert scale.stored_columns((32, 64), 96) == (1, 2)
    with pytest.raises(StraddleError, match="block of 32"):
        scale.stored_columns((0, 48), 96)
    blocks = Part(suffix="weight_scale_inv", dtype=torch.float32, rows_per_item=128, columns_per_item=128)
    assert blocks.stored_rows((128, 200), 200) == (1, 2)  # the last block may be a partial one
    with pytest.raises(StraddleError):
        blocks.stored_rows((32, 64), 64)


def test_the_gatekeeper_knows_each_format_by_the_same_parts() -> None:
    words = {dtype: word for word, dtype in DTYPES.items()}
    formats = shipped().formats
    for name, ours in FORMATS.items():
        signatures = [{part.suffix: part.dtypes for part in signature.parts} for signature in formats[name].signatures]
        assert any(all(words[p.dtype] in s.get(p.suffix, ()) for p in ours.parts) for s in signatures), name
