"""The router in two launches: its logits, and the choice of each token's slots with their weights.

Shapes: T tokens, D hidden size, E routed experts, S shared slots behind them, K routed slots of a token, G groups.
Meaning and sources are those of `loader.moe.Router`, which is the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous, kernel
from loader.kernels.triton_product import dot


@kernel
def router_logits(
    x,
    weight,
    out,
    T,
    E,
    D,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Parts of ``x @ weight.T``, float32 ``(SPLITS, T, E)``, each over its share of the columns: `choose` sums them."""
    await_previous(PDL)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(D, BLOCK_C), SPLITS)
    total = tl.zeros((BLOCK_E, BLOCK_T), dtype=tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        w_EC = tl.load(weight + e[:, None] * D + c[None, :], mask=(e[:, None] < E) & (c[None, :] < D), other=0.0)
        x_TC = tl.load(
            x + t[:, None].to(tl.int64) * D + c[None, :], mask=(t[:, None] < T) & (c[None, :] < D), other=0.0
        )
        if w_EC.dtype != x_TC.dtype:
            total = dot(w_EC.to(tl.float32), x_TC.to(tl.float32).T, total)
        else:
            total = dot(w_EC, x_TC.T, total)
    at = out + (tl.cast(T, tl.int64) * split + t[:, None]) * E + e[None, :]
    tl.store(at, total.T, mask=(t[:, None] < T) & (e[None, :] < E))


MINUS_INF = tl.constexpr(-0x7F800001)
"""`_ordered` of -inf; there are lower numbers, for what is not there."""


@triton.jit
def _ordered(bits):
    """Bits of a float32 as an int32 that is as large among its like as the number is, and back again.

    A warp finds the largest of integers in one instruction (``redux.sync``), that of floats in five exchanges.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(key_E, e):
    """The largest, and the lowest number that has it."""
    best = tl.max(key_E, 0)
    return best, tl.min(tl.where(key_E == best, e, 0x7FFFFFFF), 0)


@kernel
def choose(
    logits,
    logit_bias,
    choice_bias,
    shared_weights,
    weights,
    ids,
    T,
    E,
    scaling,
    SPLITS: tl.constexpr,
    SIGMOID: tl.constexpr,
    LOGIT_BIASED: tl.constexpr,
    CHOICE_BIASED: tl.constexpr,
    SHARED_GATED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_AT_MOST: tl.constexpr,
    OPEN_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    NORMALISED: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One program a token: ``weights`` float32 and ``ids`` int32, ``(T, K + S)``, the shared slots last.

    EXPERTS, SLOTS and GROUPS_AT_MOST are powers of two that hold E, K + S and GROUPS. Equal scores go to the lower
    number; a logit that is not a number makes all weights of the token NaN, and its ids remain valid.
    """
    await_previous(PDL)
    token = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    here = e < E
    at = logits + token.to(tl.int64) * E + e
    logit = tl.load(at, mask=here, other=0.0)
    for split in tl.static_range(1, SPLITS):
        logit += tl.load(at + tl.cast(T, tl.int64) * E * split, mask=here, other=0.0)
    if LOGIT_BIASED:
        logit += tl.load(logit_bias + e, mask=here, other=0.0).to(tl.float32)
    broken = tl.sum((here & (logit != logit)).to(tl.int32), 0) > 0
    logit = tl.where(here & (logit == logit), logit, float("-inf"))
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        power = tl.exp(logit - tl.max(logit, 0))
        score = power / tl.sum(power, 0)
    choice = score
    if CHOICE_BIASED:
        choice += tl.load(choice_bias + e, mask=here, other=0.0).to(tl.float32)
    choice = tl.where(here & (choice == choice), choice, float("-inf"))
    if GROUPS > 1:
        group = e // (E // GROUPS)
        g = tl.arange(0, GROUPS_AT_MOST)
        worth = tl.full((GROUPS_AT_MOST,), float("-inf"), tl.float32)
        key = _ordered(choice.to(tl.int32, bitcast=True))
        for n in tl.static_range(GROUPS):
            mine = tl.where(group == n, key, MINUS_INF)
            best, first = _largest(mine, e)
            total = _ordered(best).to(tl.float32, bitcast=True)
            if TOP2_SUM:
                second, _ = _largest(tl.where(e == first, MINUS_INF, mine), e)
                total += _ordered(second).to(tl.float32, bitcast=True)
            worth = tl.where(g == n, total, worth)
        open_E = tl.zeros((EXPERTS,), dtype=tl.int32)
        worth_key = tl.where(g < GROUPS, _ordered(worth.to(tl.int32, bitcast=True)), MINUS_INF - 1)
        for _ in tl.static_range(OPEN_GROUPS):
            _, best_group = _largest(worth_key, g)
            open_E = tl.where(group == best_group, 1, open_E)
            worth_key = tl.where(g == best_group, MINUS_INF - 1, worth_key)
        # DeepSeek V3 shuts the others out; V2 gives them 0.0, below all its scores, which a softmax makes positive.
        choice = tl.where(here & (open_E == 0), float("-inf") if TOP2_SUM else 0.0, choice)
    k = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), dtype=tl.int32)
    # -inf can be the best that is left: those that are left still come before those that are not.
    key = tl.where(here, _ordered(choice.to(tl.int32, bitcast=True)), MINUS_INF - 1)
    for n in tl.static_range(K):
        _, best = _largest(key, e)
        chosen = tl.where(k == n, best, chosen)
        key = tl.where(e == best, MINUS_INF - 1, key)
    weight = tl.where(k < K, tl.gather(score, chosen, 0), 0.0)
    if NORMALISED:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    weight = weight * scaling
    is_shared = (k >= K) & (k < K + S)
    if SHARED_GATED:
        shared = tl.load(shared_weights + token).to(tl.float32)
        weight = tl.where(is_shared, shared, weight)
    else:
        weight = tl.where(is_shared, 1.0, weight)
    weight = tl.where(broken, float("nan"), weight)
    chosen = tl.where(is_shared, E + k - K, chosen)
    out = token.to(tl.int64) * (K + S) + k
    tl.store(weights + out, weight, mask=k < K + S)
    tl.store(ids + out, chosen, mask=k < K + S)
