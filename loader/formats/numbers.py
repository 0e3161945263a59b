"""Element types that several formats share: E2M1 two to a byte, E8M0 exponents, and scales over groups of columns.

Element formats: OCP Microscaling Formats (MX) specification 1.0, sections 5.3 and 5.4.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Code is sign, two bits of exponent, one of mantissa.
_E2M1 = array("f", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# Code is the exponent plus 127; there is no zero and no sign, and 255 is NaN.
_E8M0 = array("f", [*(2.0 ** (code - 127) for code in range(255)), float("nan")])


def e2m1(packed: Tensor) -> Tensor:
    """Bytes ``(..., n)``, uint8 or int8, to the numbers ``(..., 2 n)`` in float32; the first is in the low nibble."""
    import torch  # to plan takes none

    whole = packed.view(torch.uint8)
    nibbles = torch.stack([whole & 0xF, whole >> 4], dim=-1).flatten(-2)
    return torch.frombuffer(_E2M1, dtype=torch.float32).to(packed.device)[nibbles.int()]


def scale_numbers(scale: Tensor) -> Tensor:
    """Scales of any dtype to float32, exactly; bytes are E8M0 exponents, whether they are called so or uint8."""
    import torch

    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.frombuffer(_E8M0, dtype=torch.float32).to(scale.device)[scale.view(torch.uint8).int()]
    return scale.float()


def by_group(numbers: Tensor, scale: Tensor) -> Tensor:
    """``numbers * scale``, ``(..., rows, columns)`` in float32, of scales ``(..., rows, groups)`` over equal groups."""
    grouped: Tensor = numbers.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return grouped.flatten(-2)
