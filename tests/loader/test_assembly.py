"""The kernels' inline assembly, instruction by instruction on the CPU: every number and every scale of a format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.loader.ptx import halves, joined, run

pytestmark = pytest.mark.kernels

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""By code without its sign (OCP Microscaling 1.0, table 5)."""
LARGEST_CODE = 128
"""Of E8M0, up to which the assembly is exact, but for 0: what is as small as that is nothing there."""


def two_quads() -> Tensor:
    """Registers of two quads: each quad there is once in each half."""
    quads = torch.arange(1 << 16)
    others = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    return quads | others << 16


def nibbles(registers: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Nibble number `stream` of both quads."""
    return registers >> 4 * stream & 15, registers >> 16 + 4 * stream & 15


def require_equal(register: Tensor, low: Tensor, high: Tensor) -> None:
    """Bit for bit, so that -0 is not 0."""
    assert torch.equal(register, joined(low, high))


def factors_of_codes() -> Tensor:
    """What the assembly makes of E8M0's 256 codes, four to a register."""
    from loader.kernels import triton_unpack

    a, b, c, d = torch.arange(256).view(-1, 4).unbind(1)
    found = run(triton_unpack._E8M0.value, {"$2": a | b << 8 | c << 16 | d << 24})
    return torch.stack([*halves(found["$0"]), *halves(found["$1"])], 1).flatten()


def test_int4_with_all_scales() -> None:
    from loader.kernels import triton_unpack

    registers = two_quads()
    bits = torch.arange(1 << 16)
    scales = (bits[(bits >> 7 & 255) != 255].to(torch.int32) << 16).view(torch.float32)
    some = torch.cat([scales, scales[: len(registers) - len(scales)]])
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        low, high = (some[torch.randperm(len(some), generator=draw)] for _ in range(2))
        found = run(triton_unpack._INT4.value, {"$4": registers, "$5": joined(low, high)})
        for stream in range(4):
            first, second = nibbles(registers, stream)
            require_equal(found[f"${stream}"], (first - 8) * low, (second - 8) * high)


def test_mxfp4_with_all_scales() -> None:
    from loader.kernels import triton_unpack

    registers = two_quads()
    factors = factors_of_codes()
    for code in range(LARGEST_CODE + 1):
        other = LARGEST_CODE - code
        given = joined(*(factors[each].expand(len(registers)) for each in (code, other)))
        found = run(triton_unpack._MXFP4.value, {"$4": registers, "$5": given})
        for stream in range(4):
            numbers = [
                torch.where(half >= 8, -E2M1[half & 7], E2M1[half & 7]) * (2.0 ** (each - 127) if each else 0.0)
                for half, each in zip(nibbles(registers, stream), (code, other), strict=True)
            ]
            require_equal(found[f"${stream}"], *numbers)


def test_a_scale_beyond_the_assembly_is_loud() -> None:
    factors = factors_of_codes()
    assert factors[0] == 0
    assert torch.equal(factors[1 : LARGEST_CODE + 1], 2.0 ** torch.arange(LARGEST_CODE))
    assert not factors[LARGEST_CODE + 1 :].isfinite().any()
