"""Run the few instructions of PTX that our inline assembly has, on tensors of 32-bit registers.

Semantics: NVIDIA, Parallel Thread Execution ISA, chapter "Instructions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

REGISTER = 0xFFFFFFFF


def run(assembly: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All registers after `assembly`; those of `inputs`, int64 of one shape, are set before (``$4``).

    Raises KeyError for an instruction that is not known here and for a register that was not set.
    """
    registers = dict(inputs)
    some = next(iter(inputs.values()))

    def value(operand: str) -> Tensor:
        return torch.full_like(some, int(operand, 0)) if operand[0].isdigit() else registers[operand]

    for statement in assembly.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in rest.split(","))
        registers[target] = INSTRUCTIONS[name](*map(value, sources)) & REGISTER
    return registers


def halves(register: Tensor) -> tuple[Tensor, Tensor]:
    """The two bf16 of a register as float32, the low one first."""
    low, high = ((register >> shift & 0xFFFF).to(torch.int32) << 16 for shift in (0, 16))
    return low.view(torch.float32), high.view(torch.float32)


def joined(low: Tensor, high: Tensor) -> Tensor:
    """A register of two bf16."""
    first, second = (half.bfloat16().view(torch.int16).long() & 0xFFFF for half in (low, high))
    return first | second << 16


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Bit by bit, bit number ``4 a + 2 b + c`` of the table."""
    result = torch.zeros_like(a)
    for number in range(8):
        chosen = [each if number >> place & 1 else ~each for each, place in ((a, 2), (b, 1), (c, 0))]
        result |= torch.where(table >> number & 1 == 1, chosen[0] & chosen[1] & chosen[2], 0)
    return result


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Four bytes of the eight of b and a, each named by a nibble of the selector."""
    assert not (selector & 0x8888).any(), "copying a byte's sign is not known here"
    both, result = b << 32 | a, torch.zeros_like(a)
    for place in range(4):
        result |= (both >> 8 * (selector >> 4 * place & 7) & 0xFF) << 8 * place
    return result


def _max(a: Tensor, b: Tensor) -> Tensor:
    return joined(*(torch.fmax(x, y) for x, y in zip(halves(a), halves(b), strict=True)))  # the number where one is NaN


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Rounded once: here all sums are exact in float32 before."""
    found = []
    for x, y, z in zip(halves(a), halves(b), halves(c), strict=True):
        exact = x.double() * y.double() + z.double()
        assert bool(((exact.float().double() == exact) | ~exact.float().isfinite()).all())
        found.append(exact.float())
    return joined(*found)


INSTRUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "max.bf16x2": _max,
    "fma.rn.bf16x2": _fma,
}
