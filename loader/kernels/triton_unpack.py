"""Numbers out of packed quads, in registers: four columns a quad, so that four products share each load.

A quad is the little-endian int16 of four neighbouring 4-bit numbers, the first in its lowest bits: half of an int32 of
compressed-tensors' pack-quantized int4, and two bytes of MXFP4, whose first number is the low half. Column
``4 * j + c`` is nibble c of quad j, so that stream c of a tile of quads goes with every fourth column of x from c on.
Two quads fill a register as two bf16 do, so that what is unpacked stays where it lay. Each helper in inline assembly
has a twin in plain arithmetic, which the interpreter and other vendors' devices run.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def factors(scale, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What `streams` multiplies a group's numbers with, from its stored scale: once a group, not once a column.

    ASSEMBLY: the compute capability of the device whose inline assembly may be used, 90 for 9.0; 0: none.
    """
    if FORMAT == "int4_g32":
        return scale
    elif ASSEMBLY:
        codes = _unseen(scale) if ASSEMBLY < 100 else scale
        return tl.inline_asm_elementwise(
            asm=_E8M0, constraints="=&r,=&r,r", args=[codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return e8m0(scale, tl.float32)


@triton.jit
def _unseen(codes):
    """The same codes, of 8 bits, for operands that lie as if they came from 16.

    The narrowest load behind a product says how Triton's operands lie: behind codes a thread would have four neighbours
    of a row and not two, which no ``ldmatrix`` reads. Triton looks back as far as all is pure, so this is not. For
    compute capability 10.0 it can't pipeline loops around what is not pure, and has operands in memory of their own.
    """
    return tl.inline_asm_elementwise(
        asm="mov.b32 $0, $1;", constraints="=r,r", args=[codes], dtype=tl.uint8, is_pure=False, pack=4
    )


@triton.jit
def streams(quads, factor, FORMAT: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The four streams of `quads` times `factor` (`factors`, one number a quad), in `dtype`.

    ``int4_g32``: nibble - 8; ``mxfp4``: E2M1. Rounded once, as the formats' own libraries do it.
    """
    if ASSEMBLY:
        return _assembly(quads, factor, _INT4 if FORMAT == "int4_g32" else _MXFP4)
    elif FORMAT == "int4_g32":
        return (
            _int4(quads, 0, factor, dtype),
            _int4(quads, 1, factor, dtype),
            _int4(quads, 2, factor, dtype),
            _int4(quads, 3, factor, dtype),
        )
    else:
        return (
            _mxfp4(quads, 0, factor, dtype),
            _mxfp4(quads, 1, factor, dtype),
            _mxfp4(quads, 2, factor, dtype),
            _mxfp4(quads, 3, factor, dtype),
        )


@triton.jit
def e8m0(code, dtype: tl.constexpr):
    """The power of two that an E8M0 code stands for, exactly: subnormal at 0, NaN at 255 (OCP Microscaling 1.0)."""
    exponent = code.to(tl.uint32)
    bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _int4(quads, stream: tl.constexpr, scale, dtype: tl.constexpr):
    number = ((quads >> (4 * stream)) & 15) - 8
    # Both factors are exact in float32, and so is the product.
    return (number.to(tl.float32) * scale.to(tl.float32)).to(dtype)


@triton.jit
def _mxfp4(quads, stream: tl.constexpr, scale, dtype: tl.constexpr):
    code = (quads.to(tl.int32) >> (4 * stream)) & 15
    exponent, mantissa = (code >> 1) & 3, (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, mantissa * 0.5, (1.0 + mantissa * 0.5) * (1 << exponent).to(tl.float32) * 0.5)
    return (size * tl.where(code >= 8, -1.0, 1.0) * scale).to(dtype)  # -size would be +0 for 0


def _of_two_quads(constants: str, nibbles: Sequence[str], products: Sequence[tuple[str, str]]) -> tl.constexpr:
    """Assembly that takes two quads ($4) and the factor of each ($5), and leaves pairs of bf16 in $0 to $3.

    `constants` sets registers; `nibbles` put nibble 0 to 3 of both quads into ``out``, with ``n`` to work with. Each
    result then goes through fma with `products` (a factor and what is added): sm80 has no other bf16 arithmetic.
    """
    lines = [".reg .b32 n, a, b, zero;", "mov.b32 zero, 0x80008000;", constants]
    lines += [text.format(out=f"${n}") for n, text in enumerate(nibbles)]
    lines += [f"fma.rn.bf16x2 ${n}, ${n}, {by}, {plus};" for by, plus in products for n in range(4)]
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


# 0x4300 is bf16's 128, whose last four mantissa bits count ones: or-ing a nibble in gives 128 + n, less 136 is n - 8.
_INT4 = _of_two_quads(
    "mov.b32 a, 0x3F803F80; mov.b32 b, 0xC308C308;",
    [
        "lop3.b32 {out}, $4, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, $4, 4; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, $4, 8; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, $4, 12; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
    ],
    [("a", "b"), ("$5", "zero")],
)
# The three bits below the sign, moved to the last of bf16's exponent and the first of its mantissa, are E2M1's number
# times 2**-126, subnormal ones too. Signs of the two upper nibbles as they lie and the rest six lower, in one register,
# are as far apart as in bf16, so that one shift moves both; the two lower nibbles are upper ones a byte further up.
_MXFP4 = _of_two_quads(
    ".reg .b32 u, l; shr.u32 n, $4, 6; lop3.b32 u, $4, n, 0x88008800, 0xE4;"
    "shl.b32 a, $4, 8; shl.b32 b, $4, 2; lop3.b32 l, a, b, 0x88008800, 0xE4;",
    [
        "shl.b32 n, l, 4; and.b32 {out}, n, 0x81C081C0;",
        "and.b32 {out}, l, 0x81C081C0;",
        "shl.b32 n, u, 4; and.b32 {out}, n, 0x81C081C0;",
        "and.b32 {out}, u, 0x81C081C0;",
    ],
    [("$5", "zero")],
)
# Four codes of E8M0 ($2) to pairs of bf16 in $0 and $1: 2 ** (code - 1), as `_MXFP4` leaves its numbers 2 ** -126 too
# small. A code is bf16's exponent, times 2 ** 126 here: codes above 128 are infinite, so that a scale of 2 ** 2 and
# more, which no weights have, is loud; code 0 is 0 and not 2 ** -127, so that a weight is 4e-38 off at most.
_E8M0 = tl.constexpr(
    """{
.reg .b32 by, zero;
mov.b32 by, 0x7E807E80; mov.b32 zero, 0x80008000;
prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;
shl.b32 $0, $0, 7; shl.b32 $1, $1, 7;
fma.rn.bf16x2 $0, $0, by, zero; fma.rn.bf16x2 $1, $1, by, zero;
}"""
)
_FOUR = tl.constexpr((tl.bfloat16,) * 4)


@triton.jit
def _assembly(quads, factor, ASM: tl.constexpr):
    """Run `_INT4` or `_MXFP4`, two quads at a time."""
    return tl.inline_asm_elementwise(
        asm=ASM,
        constraints="=&r,=&r,=&r,=&r,r,r",
        args=[quads, factor],
        dtype=_FOUR,
        is_pure=True,
        pack=2,
    )
