"""Numbers out of packed words, in registers: eight columns a word, so that eight products share each load.

A word is the little-endian int32 of eight neighbouring 4-bit numbers, the first in its lowest bits: what
compressed-tensors' pack-quantized int4 stores as int32, and MXFP4 as four bytes with the first number in the low half.
Column ``8 * j + c`` is nibble c of word j, so that stream c of a tile of words goes with every eighth column of x from
c on. Each helper in inline assembly has a twin in plain arithmetic, which the interpreter and other vendors' devices
run.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def int4_streams(words, scale, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """``(nibble - 8) * scale`` of each of the eight streams, in `dtype`; `scale` is one number a word."""
    if ASSEMBLY:
        return _assembly(words, scale, _INT4)
    return (
        _int4(words, 0, scale, dtype),
        _int4(words, 1, scale, dtype),
        _int4(words, 2, scale, dtype),
        _int4(words, 3, scale, dtype),
        _int4(words, 4, scale, dtype),
        _int4(words, 5, scale, dtype),
        _int4(words, 6, scale, dtype),
        _int4(words, 7, scale, dtype),
    )


@triton.jit
def mxfp4_streams(words, exponent, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """E2M1 times ``2 ** (exponent - 127)`` of each stream, in `dtype`; `exponent` is a word's E8M0 code, NaN at 255."""
    if ASSEMBLY:
        return _assembly(words, e8m0(exponent, tl.bfloat16), _MXFP4)
    scale = e8m0(exponent, tl.float32)
    return (
        _mxfp4(words, 0, scale, dtype),
        _mxfp4(words, 1, scale, dtype),
        _mxfp4(words, 2, scale, dtype),
        _mxfp4(words, 3, scale, dtype),
        _mxfp4(words, 4, scale, dtype),
        _mxfp4(words, 5, scale, dtype),
        _mxfp4(words, 6, scale, dtype),
        _mxfp4(words, 7, scale, dtype),
    )


@triton.jit
def scales_of(group, N: tl.constexpr, G: tl.constexpr, SCALES: tl.constexpr):
    """``(N, G)`` scales of groups of columns, from elements that hold SCALES of them, ``(N, G / SCALES)``.

    One to an element is the scale itself. Two bf16, or four E8M0 codes, come as an int32: the device copies nothing
    narrower to shared memory on its own, and a load that is waited for in each step costs more than all products.
    """
    if SCALES == 1:
        return group
    elif SCALES == 2:
        low, high = (group & 0xFFFF).to(tl.uint16), ((group >> 16) & 0xFFFF).to(tl.uint16)
        return tl.join(low, high).reshape(N, G).to(tl.bfloat16, bitcast=True)
    else:
        even = tl.join(group & 255, (group >> 16) & 255)
        odd = tl.join((group >> 8) & 255, (group >> 24) & 255)
        return tl.join(even, odd).reshape(N, G).to(tl.uint8)


@triton.jit
def e8m0(code, dtype: tl.constexpr):
    """The power of two that an E8M0 code stands for, exactly: subnormal at 0, NaN at 255 (OCP Microscaling 1.0)."""
    exponent = code.to(tl.uint32)
    bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _int4(words, stream: tl.constexpr, scale, dtype: tl.constexpr):
    number = ((words >> (4 * stream)) & 15) - 8
    # Rounded once, as the format's own library does it: both factors are exact in float32, and so is the product.
    return (number.to(tl.float32) * scale.to(tl.float32)).to(dtype)


@triton.jit
def _mxfp4(words, stream: tl.constexpr, scale, dtype: tl.constexpr):
    code = (words >> (4 * stream)) & 15
    exponent, mantissa = (code >> 1) & 3, (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, mantissa * 0.5, (1.0 + mantissa * 0.5) * (1 << exponent).to(tl.float32) * 0.5)
    return (tl.where(code >= 8, -size, size) * scale).to(dtype)


def _of_both_words(prologue: str, streams: Sequence[str], factors: Sequence[tuple[str, str]]) -> tl.constexpr:
    """Assembly that takes two words ($8, $9) and their scale twice ($10), and leaves pairs of bf16 in $0 to $7.

    `prologue` sets constants. The words' halves are paired first, so that both have the same nibble at the same place
    of ``w``: `streams` put nibble 0 to 3 of ``w`` into ``out``, with ``n`` and ``s`` to work with. Each result then
    goes through fma with `factors` (a factor and what is added): sm80 has no other bf16 arithmetic.
    """
    lines = [".reg .b32 low, high, n, s, a, b, zero;", "mov.b32 zero, 0x80008000;", prologue]
    lines += ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for first, half in ((0, "low"), (4, "high")):
        lines += [text.format(w=half, out=f"${first + n}") for n, text in enumerate(streams)]
    lines += [f"fma.rn.bf16x2 ${n}, ${n}, {by}, {plus};" for by, plus in factors for n in range(8)]
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


# 0x4300 is bf16's 128, whose last four mantissa bits count ones: or-ing a nibble in gives 128 + n, less 136 is n - 8.
_INT4 = _of_both_words(
    "mov.b32 a, 0x3F803F80; mov.b32 b, 0xC308C308;",
    [
        "lop3.b32 {out}, {w}, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, {w}, 4; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, {w}, 8; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 n, {w}, 12; lop3.b32 {out}, n, 0x000F000F, 0x43004300, 0xEA;",
    ],
    [("a", "b"), ("$10", "zero")],
)
# The three bits below the sign, moved to the last of bf16's exponent and the first of its mantissa, are E2M1's number
# times 2**-126, subnormal ones too. 2**126 (0x7E80) and the scale are two factors: their product could overflow.
_MXFP4 = _of_both_words(
    "mov.b32 a, 0x7E807E80;",
    [
        "shl.b32 n, {w}, 6; shl.b32 s, {w}, 12; and.b32 n, n, 0x01C001C0; lop3.b32 {out}, s, 0x80008000, n, 0xEA;",
        "shl.b32 n, {w}, 2; shl.b32 s, {w}, 8; and.b32 n, n, 0x01C001C0; lop3.b32 {out}, s, 0x80008000, n, 0xEA;",
        "shr.u32 n, {w}, 2; shl.b32 s, {w}, 4; and.b32 n, n, 0x01C001C0; lop3.b32 {out}, s, 0x80008000, n, 0xEA;",
        "shr.u32 n, {w}, 6; and.b32 n, n, 0x01C001C0; lop3.b32 {out}, {w}, 0x80008000, n, 0xEA;",
    ],
    [("a", "zero"), ("$10", "zero")],
)
_EIGHT = tl.constexpr((tl.bfloat16,) * 8)


@triton.jit
def _assembly(words, scale, ASM: tl.constexpr):
    """Run `_INT4` or `_MXFP4`, two words at a time."""
    return tl.inline_asm_elementwise(
        asm=ASM,
        constraints="=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        args=[words, scale],
        dtype=_EIGHT,
        is_pure=True,
        pack=2,
    )
