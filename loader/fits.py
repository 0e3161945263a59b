"""Whether planned weights fit a device, with what was counted and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loader.costs import rank_bytes
from loader.plan import Plan
from loader.text import human

COUNTED = "weights of experts, shared experts and routers in the MoE layers of the runners shown"
NOT_COUNTED = "attention, dense layers, embeddings, KV cache, activations, workspaces"
LARGEST_TP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The weights of one rank beside the memory of one device."""

    device_bytes: int
    """Memory of one device: 141000000000."""
    source: str
    """Where that is from: ``platforms.yaml: h200``, ``--memory``."""
    nbytes: int | None
    """Weights of the fullest rank, over all runners; None where the experts can't be divided so."""
    ep_size: int
    """Groups of ranks that experts are spread over, as asked for: 1."""
    divides: bool
    """Whether the experts can be divided so on the ranks asked for, or `ep_size` times a power of two up to 256."""
    smallest_tp_size: int | None
    """The least of these numbers of ranks on which they fit; None up to 256."""

    @property
    def fits(self) -> bool:
        """Whether the weights fit; what is not counted needs room too."""
        return self.nbytes is not None and self.nbytes <= self.device_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device_bytes": self.device_bytes,
            "source": self.source,
            "bytes_per_rank": self.nbytes,
            "fits": self.fits,
            "left_bytes": None if self.nbytes is None else self.device_bytes - self.nbytes,
            "smallest_tp_size": self.smallest_tp_size,
            "counted": COUNTED,
            "not_counted": NOT_COUNTED,
        }

    def lines(self) -> list[str]:
        """For people."""
        device = f"the {human(self.device_bytes)} of a device ({self.source})"
        least = self.smallest_tp_size
        enough = f"they fit from tp {least} on" if least else f"no tp up to {LARGEST_TP} is enough"
        if not self.divides:
            enough = f"with ep {self.ep_size} no tp up to {LARGEST_TP} divides them, so choose another ep"
        if self.nbytes is None:
            said = f"the experts can't be divided so, whatever fits {device}; {enough}"
        elif self.fits:
            left = human(self.device_bytes - self.nbytes)
            said = f"{human(self.nbytes)} on each rank fit {device} and leave {left}"
        else:
            short = human(self.nbytes - self.device_bytes)
            said = f"{human(self.nbytes)} on each rank do not fit {device}, by {short}; {enough}"
        return [f"memory: {said}", f"  counted: {COUNTED}", f"  not counted: {NOT_COUNTED}"]


def fit(plans: Sequence[Plan], device_bytes: int, source: str) -> Fit:
    """Compare what the ranks of all `plans`, one for each runner on the same ranks, hold with one device's memory."""
    layers = [layer for plan in plans for layer in plan.layers]
    tp_size, ep_size = plans[0].per_rank.tp_size, plans[0].per_rank.ep_size

    def held(tp_size: int) -> int | None:
        return rank_bytes(layers, tp_size, ep_size).nbytes

    sizes = (ep_size * 2**power for power in range(LARGEST_TP.bit_length()))
    tried = {tp: held(tp) for tp in sizes if tp <= LARGEST_TP}
    return Fit(
        device_bytes=device_bytes,
        source=source,
        nbytes=held(tp_size),
        ep_size=ep_size,
        divides=any(nbytes is not None for nbytes in (held(tp_size), *tried.values())),
        smallest_tp_size=next((tp for tp, n in tried.items() if n is not None and n <= device_bytes), None),
    )
