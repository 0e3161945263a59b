"""`loader.moe.Router`, with its shared slots where it has some, by our Triton kernels.

Triton is imported by the first call: it takes as long as a layer of a terabyte takes to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loader.kernels.configs import power_of_two
from loader.moe import Router, SharedGate

if TYPE_CHECKING:
    from loader.kernels.triton_layer import Launch

BLOCK_E, BLOCK_C = 64, 64
MOST_SPLITS = 16
MOST_T = 64
"""Tokens of a block, at most; where one has fewer, the product is short."""
LITTLE_SHARED_BYTES = 48 << 10
"""Shared memory of a thread block beyond which Triton asks for as much of it as there is, and so for a small cache."""


class TritonRouter(nn.Module):
    """Routed slots as `router` chooses them, then `n_shared` slots behind its experts that all tokens go to."""

    def __init__(
        self, router: Router, n_shared: int = 0, gate: SharedGate | None = None, *, launch: Launch | None = None
    ) -> None:
        """`launch`: what to do with a kernel; None: run it."""
        super().__init__()
        self.router, self.n_shared, self.gate, self.launch = router, n_shared, gate, launch

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``topk_weights`` in float32 and ``topk_ids`` in int32, both ``(T, K + S)``.

        Raises `ValueError` for an x that does not belong to the weights.
        """
        from loader.kernels.triton_choose import choose, router_logits
        from loader.kernels.triton_device import leave_cache
        from loader.kernels.triton_layer import launch

        run = self.launch or launch
        c, weight_ED = self.router.config, self.router.weight.contiguous()
        experts, hidden = weight_ED.shape
        if x_TD.dim() != 2 or x_TD.shape[1] != hidden:
            raise ValueError(f"x is {list(x_TD.shape)}, the router expects [tokens, {hidden}]")
        if x_TD.device != weight_ED.device:
            raise ValueError(f"x is on {x_TD.device}, the router on {weight_ED.device}")
        x_TD, tokens = x_TD.contiguous(), len(x_TD)
        slots = c.top_k + self.n_shared
        weights = torch.empty(tokens, slots, dtype=torch.float32, device=x_TD.device)
        ids = torch.empty(tokens, slots, dtype=torch.int32, device=x_TD.device)
        if not tokens:
            return weights, ids
        block_t = min(power_of_two(tokens, 16), MOST_T)
        tiles = -(-experts // BLOCK_E) * -(-tokens // block_t)
        # About two programs to a multiprocessor of the largest devices, each with some steps to overlap its loads; a
        # power of two, since each number is compiled by itself.
        splits = power_of_two((max(1, min(MOST_SPLITS, 256 // tiles, hidden // (4 * BLOCK_C))) + 1) / 2)
        logits = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x_TD.device)
        stage_bytes = (BLOCK_E + block_t) * BLOCK_C * weight_ED.element_size()
        compiled = run(
            router_logits,
            (-(-experts // BLOCK_E), -(-tokens // block_t), splits),
            x_TD,
            weight_ED,
            logits,
            tokens,
            experts,
            hidden,
            SPLITS=splits,
            BLOCK_T=block_t,
            BLOCK_E=BLOCK_E,
            BLOCK_C=BLOCK_C,
            num_warps=4,
            num_stages=max(2, min(4, LITTLE_SHARED_BYTES // stage_bytes)),
        )
        if block_t < MOST_T:
            leave_cache(compiled, x_TD.device)
        logit_bias, choice_bias = self.router.bias, self.router.e_score_correction_bias
        run(
            choose,
            (tokens,),
            logits,
            logits if logit_bias is None else logit_bias,
            logits if choice_bias is None else choice_bias,
            logits if self.gate is None else self.gate(x_TD),
            weights,
            ids,
            tokens,
            experts,
            1.0 if c.norm_topk_prob and not c.scales_normalised else c.routed_scaling_factor,
            SPLITS=splits,
            SIGMOID=c.scoring_func == "sigmoid",
            LOGIT_BIASED=logit_bias is not None,
            CHOICE_BIASED=choice_bias is not None,
            SHARED_GATED=self.gate is not None and self.n_shared > 0,
            GROUPS=c.n_group,
            GROUPS_AT_MOST=power_of_two(c.n_group),
            OPEN_GROUPS=c.topk_group,
            TOP2_SUM=c.group_score == "top2_sum",
            NORMALISED=c.norm_topk_prob,
            K=c.top_k,
            S=self.n_shared,
            EXPERTS=power_of_two(experts),
            SLOTS=power_of_two(slots),
            num_warps=1 if experts <= 512 else 4,  # one warp finds its largest without waiting for others
        )
        return weights, ids
