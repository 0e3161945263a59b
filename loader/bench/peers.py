"""What our kernels are timed beside: each peer turns a `Problem` into a call, or says why it can't.

Shapes: T tokens, K slots of a token, P = T * K pairs, E slots of the stack, D hidden size, F width of a slot.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.bench.fetched import Fetched, module_at
from loader.bench.problem import Problem


class Unavailable(Exception):
    """A peer can't run this problem here; the message says what is missing, and the report repeats it."""


class Peer(Protocol):
    """One kernel of somebody else's."""

    name: str
    """As the report calls it: ``sglang-triton``."""
    accuracy: float
    """How far its output may be from the reference, as ``|y - ref| / |ref|``: 0.02; 0.1 where activations are FP8.

    It is that of the problem that was prepared last, since one peer may have several formats."""

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        """Prepare what a loader would prepare once (layouts, workspaces), and give a call that returns ``(T, D)``.

        The call is captured in a CUDA graph: no synchronisation, the same memory each time. Raises `Unavailable`.
        """


class TorchGroupedMM:
    """``torch.nn.functional.grouped_mm`` as one would write it by hand: pairs sorted by slot, two products, one sum.

    What plain torch can do without a kernel of one's own: nothing is scattered, and the weighted sum over a token's
    slots gathers its rows as it adds them up (``embedding_bag``), so that the ``(P, D)`` products are read once.
    """

    name = "torch-grouped_mm"
    accuracy = 0.02

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        w13_E2FD, w2_EDF = _bf16_weights(problem, self.name)
        x_TD, ids_P, k = problem.x_TD, problem.topk_ids_TK.flatten(), problem.topk_ids_TK.shape[1]
        # Router's weights in the dtype of the products, as torch's sum demands; 2 ** -9 of rounding each.
        weights_P = problem.topk_weights_TK.flatten().to(x_TD.dtype)
        slots_E = torch.arange(len(w13_E2FD), dtype=ids_P.dtype, device=x_TD.device)
        pairs_P = torch.arange(len(ids_P), device=x_TD.device)
        starts_T = torch.arange(0, len(ids_P), k, device=x_TD.device)
        w13_EDx2F, w2_EFD = w13_E2FD.transpose(1, 2), w2_EDF.transpose(1, 2)

        def call() -> Tensor:
            sorted_P, order_P = ids_P.sort()
            ends_E = torch.searchsorted(sorted_P, slots_E, right=True, out_int32=True)
            place_P = torch.empty_like(pairs_P).scatter_(0, order_P, pairs_P)
            gate_up_P2F = F.grouped_mm(x_TD.index_select(0, order_P // k), w13_EDx2F, offs=ends_E)
            gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
            y_PD = F.grouped_mm(F.silu(gate_PF).mul_(up_PF), w2_EFD, offs=ends_E)
            return torch.embedding_bag(y_PD, place_P, starts_T, mode=0, per_sample_weights=weights_P)[0]

        return call


class _TransformersExperts:
    """The attributes that transformers' ``@use_experts_implementation`` gives a model's experts."""

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    act_fn = staticmethod(F.silu)

    def __init__(self, moe: Any, w13_E2FD: Tensor, w2_EDF: Tensor) -> None:
        self.num_experts, self.gate_up_proj, self.down_proj = len(w13_E2FD), w13_E2FD, w2_EDF
        self._gate = moe._default_apply_gate

    def _apply_gate(self, gate_up_P2F: Tensor) -> Tensor:
        gated: Tensor = self._gate(self, gate_up_P2F)
        return gated


class Transformers:
    """``grouped_mm_experts_forward`` of Hugging Face transformers, what its models run with ``grouped_mm``."""

    name = "transformers"
    accuracy = 0.02

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        try:
            moe = importlib.import_module("transformers.integrations.moe")
            forward = moe.grouped_mm_experts_forward
            experts = _TransformersExperts(moe, *_bf16_weights(problem, self.name))
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"needs transformers 5.17 or one like it: {error}") from None
        # In float32 its sum over the slots would take twice the memory; models hand it the dtype of x, too.
        weights_TK = problem.topk_weights_TK.to(problem.x_TD.dtype)

        def call() -> Tensor:
            y_TD: Tensor = forward(experts, problem.x_TD, problem.topk_ids_TK, weights_TK)
            return y_TD

        return call


def _bf16_weights(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    if problem.model.format != "bf16":
        raise Unavailable(f"{name} multiplies bf16 weights only, not {problem.model.format}")
    for axis, size in (("hidden size", problem.model.hidden_size), ("width", problem.model.width)):
        if size % 8:
            raise Unavailable(f"{name} needs rows of a multiple of 16 bytes; the {axis} is {size} numbers of 2 bytes")
    return cast(Tensor, problem.experts.w13_weight), cast(Tensor, problem.experts.w2_weight)


PLAIN: dict[str, Callable[[], Peer]] = {"torch-grouped_mm": TorchGroupedMM, "transformers": Transformers}
"""Those that need nothing but packages."""
ADAPTED = {"sglang-triton": "sglang_triton", "sglang-triton-tuned": "sglang_triton", "marlin": "marlin"}
"""Those whose files are fetched, and the module of ``benchmarks/peers`` that runs them."""
NAMES = (*PLAIN, *ADAPTED)
FOLDER = Path(".peers")
"""Where `fetch.py` puts files by default."""
ADAPTERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
"""Of a checkout; the wheel has none."""


def peers_of(names: Sequence[str], folder: Path | None = None) -> list[Peer]:
    """The peers of these names, in this order; `folder` is what ``benchmarks/peers/fetch.py`` filled (`FOLDER`).

    Raises `ValueError` for a name that is none, and for a peer whose adapter or whose files are not here; one that is
    here and can't run some problem says so when it gets it.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown peer `{unknown[0]}`; there are {', '.join(NAMES)}")
    files: Fetched | None = None
    peers: list[Peer] = []
    for name in names:
        if name in PLAIN:
            peers.append(PLAIN[name]())
            continue
        adapter = _adapter(ADAPTED[name], name)
        files = files or Fetched(folder or FOLDER)
        peers.append(adapter.peer(name, files))
    return peers


def _adapter(module: str, name: str) -> ModuleType:
    """``benchmarks`` is no package, so that its files are imported by path."""
    path = ADAPTERS / f"{module}.py"
    if not path.is_file():
        raise ValueError(
            f"the peer `{name}` needs `{path}`, which a checkout of this project has and its wheel has not"
        )
    return module_at(f"moe_loader_bench_{module}", path)
