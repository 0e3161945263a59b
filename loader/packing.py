"""Quantize and pack weights for tiny checkpoints. Never used to read one: `loader/formats` is written apart from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def pack_dense(dtype: torch.dtype) -> Callable[[Tensor], dict[str, Tensor]]:
    """A packer that only casts."""
    return lambda weight: {"weight": weight.to(dtype)}


def pack_int4_g32(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors pack-quantized, of ``(..., out, in)``: ``clamp(round(w / s), -8, 7)``, s for 32 columns."""
    *batch, rows, columns = weight.shape
    groups = weight.float().reshape(*batch, rows, columns // 32, 32)
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-8).to(torch.bfloat16)
    numbers = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int64) + 8
    words = torch.zeros((*batch, rows, columns // 8), dtype=torch.int64)
    eights = numbers.reshape(*batch, rows, columns // 8, 8)
    for position in range(8):
        words += eights[..., position] * 16**position
    # int32 has no room for 2**31 and up: those words wrap to negative ones.
    words = torch.where(words >= 2**31, words - 2**32, words)
    shape = torch.tensor([rows, columns], dtype=torch.int64).expand(*batch, 2)
    return {"weight_packed": words.to(torch.int32), "weight_scale": scale, "weight_shape": shape}


def pack_mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """Quark's ``fp4`` per group of 32, of ``(..., out, in)``; the scale is OCP's ``2 ** (floor(log2(amax)) - 2)``."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = _mx_exponent(groups, 2)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(-1)).flatten(-2)
    return {"weight": _two_to_a_byte(_e2m1_code(scaled)), "weight_scale": (exponent + 127).to(torch.uint8)}


def pack_mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """E4M3 in groups of 32, of ``(..., out, in)``; the scale is OCP's ``2 ** (floor(log2(amax)) - 8)``."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = _mx_exponent(groups, 8)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(-1)).flatten(-2)
    return {"weight": _e4m3(scaled), "weight_scale": (exponent + 127).to(torch.uint8)}


def pack_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's NVFP4 in groups of 16, of ``(..., out, in)``: one factor to each matrix, ``amax / (6 * 448)``.

    ``input_scale`` is what calibrating activations would have left: a loader of weights has no use for it.
    """
    factor = weight.float().abs().amax((-2, -1)).clamp(min=1e-8) / (6 * 448)
    packed, scale = _nvfp4(weight, factor)
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": factor,
        "input_scale": torch.full_like(factor, 0.0025),
    }


def pack_nvfp4_ct(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' NVFP4, of ``(..., out, in)``: the factor, ``6 * 448 / amax`` of shape ``[1]``, divides."""
    reciprocal = (6 * 448) / weight.float().abs().amax((-2, -1)).clamp(min=1e-8)
    packed, scale = _nvfp4(weight, 1 / reciprocal)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": reciprocal.unsqueeze(-1)}


def pack_fp8_channel(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' E4M3 with a bf16 scale to each row, of ``(..., out, in)``."""
    scale = (weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 448).bfloat16()
    return {"weight": _e4m3(weight.float() / scale.float()), "weight_scale": scale}


def pack_fp8_tensor(weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's E4M3 with a fp32 scale to each matrix, of ``(..., out, in)``; ``input_scale`` as in `pack_nvfp4`."""
    scale = weight.float().abs().amax((-2, -1)).clamp(min=1e-8) / 448
    numbers = _e4m3(weight.float() / scale[..., None, None])
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.full_like(scale, 0.0025)}


def pack_fp8_block(weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's E4M3 with a fp32 scale to a block of 128 x 128, of ``(..., out, in)``; last blocks may be partial."""
    rows, columns = weight.shape[-2:]
    down, across = -(-rows // 128), -(-columns // 128)
    scale = torch.empty((*weight.shape[:-2], down, across))
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(down):
        for j in range(across):
            block = (..., slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[..., i, j] = weight[block].float().abs().amax((-2, -1)).clamp(min=1e-8) / 448
            packed[block] = (weight[block].float() / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale_inv": scale}


def _mx_exponent(groups: Tensor, largest: int) -> Tensor:
    """Of each group's scale, for elements whose largest number lies between ``2 ** largest`` and its double."""
    return (torch.frexp(groups.abs().amax(-1)).exponent - 1 - largest).clamp(-127, 127)


def _nvfp4(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(-1, (-1, 16))
    factor = factor[..., None, None]
    scale = (groups.abs().amax(-1) / (6 * factor)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    scaled = (groups / (scale.float() * factor).unsqueeze(-1)).flatten(-2)
    return _two_to_a_byte(_e2m1_code(scaled)), scale


def _e4m3(numbers: Tensor) -> Tensor:
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)


def _e2m1_code(numbers: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign."""
    # Halfway between neighbours the even code wins, hence two ways of counting.
    up_at_tie = torch.tensor([0.75, 1.75, 3.5])
    down_at_tie = torch.tensor([0.25, 1.25, 2.5, 5.0])
    size = numbers.abs()
    code = torch.bucketize(size, up_at_tie, right=True) + torch.bucketize(size, down_at_tie, right=False)
    return (code + 8 * (numbers < 0)).to(torch.uint8)


def _two_to_a_byte(code: Tensor) -> Tensor:
    return code[..., 0::2] + 16 * code[..., 1::2]


PACKERS: Mapping[str, Callable[[Tensor], dict[str, Tensor]]] = MappingProxyType(
    {
        "bf16": pack_dense(torch.bfloat16),
        "fp16": pack_dense(torch.float16),
        "fp32": pack_dense(torch.float32),
        "fp8_block": pack_fp8_block,
        "fp8_channel": pack_fp8_channel,
        "fp8_tensor": pack_fp8_tensor,
        "int4_g32": pack_int4_g32,
        "mxfp4": pack_mxfp4,
        "mxfp8": pack_mxfp8,
        "nvfp4": pack_nvfp4,
        "nvfp4_ct": pack_nvfp4_ct,
    }
)
"""Format to a function from a weight ``(..., out, in)`` to its parts by suffix."""
