"""SiLU and quantization that leave padding out, in place of the kernels that SGLang compiles with nvcc on first use.

Where a configuration makes the second product read through the tensor memory accelerator, what goes into it lies in the
order of the schedule, with padding, in a buffer for the worst case; most of its rows are nobody's.

Shapes: P pairs of token and slot, R rows of the buffer, F width of a slot, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = 448.0


@triton.jit
def _is_wanted(row, order, count, P):
    """Whether a row of a buffer in the order of the schedule is a pair, and not padding."""
    place = tl.load(order + row, mask=row < tl.load(count), other=P)
    return place < P


@triton.jit
def _silu_kernel(x, out, order, count, P, F, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if _is_wanted(row, order, count, P):
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = x + row.to(tl.int64) * 2 * F + f
        gate = tl.load(at, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=f < F, other=0.0).to(tl.float32)
        tl.store(out + row.to(tl.int64) * F + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=f < F)


@triton.jit
def _quantize_kernel(x, q, scale, order, count, P, C, MOST: tl.constexpr, GROUP: tl.constexpr):
    row, group = tl.program_id(0), tl.program_id(1)
    if _is_wanted(row, order, count, P):
        at = row.to(tl.int64) * C + group * GROUP + tl.arange(0, GROUP)
        numbers = tl.load(x + at).to(tl.float32)
        factor = tl.maximum(tl.max(tl.abs(numbers)), 1e-10) / MOST
        tl.store(q + at, (numbers / factor).to(q.dtype.element_ty))
        tl.store(scale + row.to(tl.int64) * (C // GROUP) + group, factor)


def silu(
    x_R2F: Tensor,
    out_RF: Tensor,
    *,
    sorted_token_ids: Tensor,
    num_tokens_post_padded: Tensor,
    num_valid_tokens: int,
    **_: Any,
) -> Tensor:
    """Rows in the order of the schedule, padding left out: what SGLang's ``_activation_row_filter`` asks for."""
    rows, width = out_RF.shape
    rows = min(rows, len(sorted_token_ids))
    block = min(triton.next_power_of_2(width), 1024)
    _silu_kernel[(rows, triton.cdiv(width, block))](
        *(x_R2F, out_RF, sorted_token_ids, num_tokens_post_padded, num_valid_tokens, width), BLOCK=block
    )
    return out_RF


def quantize(
    x_RC: Tensor, *, group_size: int, sorted_token_ids: Tensor, num_tokens_post_padded: Tensor, num_valid_tokens: int
) -> tuple[Tensor, Tensor]:
    """As `silu`: E4M3, one scale to a group, stored by row."""
    rows, columns = x_RC.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x_RC.device)
    scale = torch.empty(rows, columns // group_size, dtype=torch.float32, device=x_RC.device)
    _quantize_kernel[(min(rows, len(sorted_token_ids)), columns // group_size)](
        *(x_RC, q, scale, sorted_token_ids, num_tokens_post_padded, num_valid_tokens, columns),
        MOST=E4M3_MAX,
        GROUP=group_size,
    )
    return q, scale
