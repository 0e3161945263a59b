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
    *batch, rows, columns = weight.shape
    blocks = weight.float().reshape(*batch, rows, columns // 32, 32)
    exponent = (torch.frexp(blocks.abs().amax(-1)).exponent - 1 - 2).clamp(-127, 127)
    scaled = torch.ldexp(blocks, -exponent.unsqueeze(-1))
    # Halfway between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6; on a tie the even code wins, hence two ways of counting.
    up_at_tie = torch.tensor([0.75, 1.75, 3.5])
    down_at_tie = torch.tensor([0.25, 1.25, 2.5, 5.0])
    size = scaled.abs()
    code = torch.bucketize(size, up_at_tie, right=True) + torch.bucketize(size, down_at_tie, right=False)
    code = (code + 8 * (scaled < 0)).to(torch.uint8).reshape(*batch, rows, columns)
    packed = code[..., 0::2] + 16 * code[..., 1::2]
    return {"weight": packed, "weight_scale": (exponent + 127).to(torch.uint8)}


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


PACKERS: Mapping[str, Callable[[Tensor], dict[str, Tensor]]] = MappingProxyType(
    {
        "bf16": pack_dense(torch.bfloat16),
        "fp16": pack_dense(torch.float16),
        "fp8_block": pack_fp8_block,
        "int4_g32": pack_int4_g32,
        "mxfp4": pack_mxfp4,
    }
)
"""Format to a function from a weight ``(..., out, in)`` to its parts by suffix."""
