"""What our kernels are timed beside: each peer turns a `Problem` into a call, or says why it can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from loader.bench.problem import Problem


class Unavailable(Exception):
    """A peer can't run this problem here; the message says what is missing, and the report repeats it."""


class Peer(Protocol):
    """One kernel of somebody else's."""

    name: str
    """As the report calls it: ``sglang-triton``."""
    accuracy: float
    """How far its output may be from the reference, as ``|y - ref| / |ref|``: 0.02; 0.1 where activations are FP8."""

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        """Prepare what a loader would prepare once (layouts, workspaces), and give a call that returns ``(T, D)``.

        The call is captured in a CUDA graph: no synchronisation, the same memory each time. Raises `Unavailable`.
        """
