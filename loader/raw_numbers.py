"""What raw tensors mean, worked out number by number of bits; shares no arithmetic with `loader.formats`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def raw_numbers(raw: Mapping[str, Tensor]) -> Tensor:
    """What the tensors of one projection, by suffix, mean: ``(out, in)`` in float64, or ``(E, out, in)`` of several.

    Told by what lies there alone: elements by their dtype, scales by their shape, a factor by its name.
    """
    numbers = _elements(next(raw[name] for name in ("weight_packed", "blocks", "weight") if name in raw))
    scale = next((raw[name] for name in ("weight_scale", "weight_scale_inv", "scale", "scales") if name in raw), None)
    if scale is not None:
        numbers = numbers * _spread(_scales(scale), *numbers.shape[-2:])
    if "weight_scale_2" in raw:
        numbers = numbers * raw["weight_scale_2"].double()
    if "weight_global_scale" in raw:
        numbers = numbers / raw["weight_global_scale"].double()
    return numbers


def _elements(stored: Tensor) -> Tensor:
    if stored.dtype is torch.int32:
        # A little-endian int32 of eight nibbles is four bytes of two, the low one first.
        return _nibbles(stored.contiguous().view(torch.uint8)).double() - 8
    if stored.dtype in (torch.uint8, torch.int8):
        return _small_floats(_nibbles(stored.view(torch.uint8)), exponent_bits=2, mantissa_bits=1)
    if stored.dtype is torch.float8_e4m3fn:
        code = stored.view(torch.uint8)
        # The one exponent and mantissa that would be 480 is NaN instead: OCP 8-bit Floating Point Specification 1.0.
        return _small_floats(code, exponent_bits=4, mantissa_bits=3).masked_fill(code % 128 == 127, math.nan)
    return stored.double()


def _small_floats(code: Tensor, *, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Sign, exponent and mantissa, worked out as IEEE 754 does: biased by half, gradual towards zero."""
    field = code.long()
    mantissa = (field % 2**mantissa_bits).double() / 2**mantissa_bits
    exponent = field // 2**mantissa_bits % 2**exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    size = torch.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias).double())
    return torch.where(field >= 2 ** (exponent_bits + mantissa_bits), -size, size)


def _scales(stored: Tensor) -> Tensor:
    """As numbers; a byte is an exponent."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        code = stored.view(torch.uint8).double()
        return torch.where(code == 255, math.nan, 2.0 ** (code - 127))
    return _elements(stored)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A scale for each number: by blocks of 128 x 128, of equal parts of each row, by row or for all."""
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    down, across = scale.shape[-2:]
    if (down, across) == (math.ceil(rows / 128), math.ceil(columns / 128)):
        row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    else:
        row, column = torch.arange(rows) * down // rows, torch.arange(columns) * across // columns
    return scale[..., row, :][..., column]


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
