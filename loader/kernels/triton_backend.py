"""The kernel `triton` of a layer: which configuration, and when shared slots are computed on their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.kernels.base import ExpertWeights
from loader.kernels.configs import Config, Shape
from loader.kernels.triton_layer import TritonExperts, counted
from loader.kernels.tuned import Table


def run(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """The sum over all slots, in the dtype of x. Fusing is a layout, so that each batch goes the faster way.

    Small batches go to the shared slots as to all others. Large ones compute them as dense products, which use the
    whole device at once where the grouped product of many experts is cut into small tiles.
    """
    experts, (tokens, k) = TritonExperts(weights), topk_ids_TK.shape
    if not weights.n_shared or not weights.dense_shared_from or tokens < weights.dense_shared_from:
        return experts(x_TD, topk_weights_TK, topk_ids_TK, config=configuration(experts.shape(k), x_TD, weights.table))
    routed = k - weights.n_shared
    shared_TD = _dense(x_TD, topk_weights_TK[:, routed:], topk_ids_TK[:, routed:], weights, experts)
    shape = experts.shape(k).routed(weights.n_shared)
    return experts(
        x_TD,
        topk_weights_TK[:, :routed],
        topk_ids_TK[:, :routed],
        config=configuration(shape, x_TD, weights.table),
        base_TD=shared_TD,
    )


def configuration(shape: Shape, x_TD: Tensor, table: Table | None) -> Config:
    """What was measured for this shape and number of tokens, else what counting says.

    Measured was with 16 bits an activation: float32, which is for comparisons, needs twice the shared memory.
    """
    measured = None if table is None or x_TD.dtype.itemsize > 2 else table.config(shape, len(x_TD))
    return measured or counted(shape, x_TD)


def _dense(x_TD: Tensor, weights_TS: Tensor, ids_TS: Tensor, weights: ExpertWeights, experts: TritonExperts) -> Tensor:
    """The shared slots' weighted sum, ``(T, D)``."""
    if experts.kind != "plain" or experts.w13.dtype != x_TD.dtype or experts.bias13 is not None:
        shape = experts.shape(ids_TS.shape[1]).shared(weights.n_shared)
        return experts(x_TD, weights_TS, ids_TS, config=configuration(shape, x_TD, weights.table))
    total_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for s in range(weights.n_shared):
        slot = experts.n_slots - weights.n_shared + s
        gate_TF, up_TF = F.linear(x_TD, experts.w13[slot]).chunk(2, dim=-1)
        y_TD = F.linear(weights.config.gated(gate_TF, up_TF), experts.w2[slot])
        total_TD += y_TD * weights_TS[:, s : s + 1]
    return total_TD
