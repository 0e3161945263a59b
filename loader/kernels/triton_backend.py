"""The kernel `triton` of a layer: which configuration, and when shared slots are computed on their own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.kernels.base import ExpertWeights
from loader.kernels.configs import Config, Shape
from loader.kernels.triton_layer import TritonExperts, counted
from loader.kernels.tuned import Table


def run(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """The sum over all slots, in the dtype of x. Fusing is a layout, so that each batch goes the faster way."""
    experts, table, is_part = TritonExperts(weights), weights.table, weights.is_part
    if weights.n_shared and 0 < weights.dense_shared_from <= len(x_TD):
        return apart(experts, x_TD, topk_weights_TK, topk_ids_TK, weights.n_shared, table, is_part=is_part)
    config = configuration(experts.shape(topk_ids_TK.shape[1]), x_TD, table, is_part=is_part)
    return experts(x_TD, topk_weights_TK, topk_ids_TK, config=config)


def apart(
    experts: TritonExperts,
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    n_shared: int,
    table: Table | None,
    *,
    is_part: bool = False,
) -> Tensor:
    """The same sum with the last `n_shared` slots computed before the others, to whose sum theirs is added.

    All tokens go to them: plain numbers are two products of torch's then, which use the whole device where the grouped
    product of many experts is cut into small tiles; other formats have our kernels on these slots alone.
    """
    experts.require_fitting(x_TD, topk_weights_TK, topk_ids_TK)
    routed = topk_ids_TK.shape[1] - n_shared
    shape = experts.shape(routed + n_shared)
    weights_TS, ids_TS = topk_weights_TK[:, routed:], topk_ids_TK[:, routed:]
    if experts.kind == "plain" and experts.w13.dtype == x_TD.dtype and experts.bias13 is None:
        shared_TD = _dense(experts, x_TD, weights_TS)
    else:
        shared_TD = experts(x_TD, weights_TS, ids_TS, config=configuration(shape.shared(n_shared), x_TD, table))
    return experts(
        x_TD,
        topk_weights_TK[:, :routed],
        topk_ids_TK[:, :routed],
        config=configuration(shape.routed(n_shared), x_TD, table, is_part=is_part),
        base_TD=shared_TD,
    )


def configuration(shape: Shape, x_TD: Tensor, table: Table | None, *, is_part: bool = False) -> Config:
    """What was measured for this shape and number of tokens, else what counting says.

    Measured was with 16 bits an activation: float32, which is for comparisons, needs twice the shared memory. With
    `is_part` (`ExpertWeights`) it has a schedule, which leaves out pairs that weigh nothing.
    """
    measured = None if table is None or x_TD.dtype.itemsize > 2 else table.config(shape, len(x_TD))
    found = measured or counted(shape, x_TD)
    return replace(found, by_pair=False) if is_part else found


def _dense(experts: TritonExperts, x_TD: Tensor, weights_TS: Tensor) -> Tensor:
    """The weighted sum of the last S slots of plain numbers, ``(T, D)``, by torch's products."""
    n_shared = weights_TS.shape[1]
    parts = []
    for slot, weight_T in enumerate(weights_TS.T, experts.n_slots - n_shared):
        gate_TF, up_TF = F.linear(x_TD, experts.w13[slot]).chunk(2, dim=-1)
        # Weighed before the product, where a row is shortest; what weighs nothing adds nothing, be it NaN.
        weight_T1 = weight_T[:, None]
        hidden_TF = torch.where(weight_T1 == 0, 0, experts.config.gated(gate_TF, up_TF) * weight_T1)
        parts.append(F.linear(hidden_TF.to(x_TD.dtype), experts.w2[slot]))
    return parts[0] if n_shared == 1 else torch.stack(parts).sum(0, dtype=torch.float32)
