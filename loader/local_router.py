"""Routing on a rank that holds some of the experts; forward code only. Shapes: T tokens, K slots of a token."""

from __future__ import annotations

from torch import Tensor, nn


class LocalRouter(nn.Module):
    """Turns experts of the whole layer into slots of this rank; those of other ranks weigh nothing here.

    The sum of the outputs of all ranks is the layer's output: shared slots, which several ranks have, weigh
    `shared_weight` of what they weighed.
    """

    def __init__(self, router: nn.Module, held: tuple[int, int], n_routed: int, shared_weight: float) -> None:
        super().__init__()
        self.router, self.held, self.n_routed, self.shared_weight = router, held, n_routed, shared_weight

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``topk_weights_TK`` and ``topk_ids_TK`` of the stack on this rank."""
        weights_TK, ids_TK = self.router(x_TD)
        first, last = self.held
        is_shared_TK = ids_TK >= self.n_routed
        is_here_TK = ((ids_TK >= first) & (ids_TK < last)) | is_shared_TK
        # Shared slots follow the routed experts that are here.
        local_TK = ids_TK.where(~is_shared_TK, ids_TK - self.n_routed + last) - first
        weights_TK = weights_TK.where(~is_shared_TK, weights_TK * self.shared_weight)
        return weights_TK.where(is_here_TK, 0.0), local_TK.where(is_here_TK, 0)
