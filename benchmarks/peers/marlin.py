"""Marlin, the int4 kernel for MoE layers that vLLM ships: https://github.com/IST-DASLab/marlin, arXiv 2408.11743.

The library of vLLM's wheel does the schedule, both products and the sum; between the products stands sgl-kernel's
SiLU, since vLLM's own is in a library of 93 MB and does the same. The weights are the problem's, laid out anew as
Marlin reads them, so that its outputs can be checked.

Shapes: E slots, T tokens, K slots of a token, D hidden size, F width of a slot, N output rows and C input columns of a
product, P = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loader.bench.fetched import Fetched, module_at
from loader.bench.peers import Unavailable
from loader.bench.problem import Problem
from loader.moe import Experts
from loader.runs import by_rows

LIBRARY = "vllm/_moe_C_stable_libtorch.abi3.so"
ACTIVATION = "sgl_kernel/sm90/common_ops.abi3.so"
BLOCKS = (8, 16, 32, 48, 64)
"""Pairs in a block, from which vLLM takes the first that an expert's share of the pairs does not fill."""
LOCKS = 4
"""Of the workspace, to a multiprocessor."""


class Marlin:
    """int4 in groups of 32, symmetric: what `int4_g32` is and vLLM calls ``uint4b8``."""

    name = "marlin"
    accuracy = 0.02

    def __init__(self, files: Fetched) -> None:
        files.require("vllm/")
        self.files = files
        self._type_id: int | None = None
        self._laid_out: WeakKeyDictionary[Experts, tuple[Tensor, ...]] = WeakKeyDictionary()

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        model, device = problem.model, problem.x_TD.device
        if model.format != "int4_g32":
            raise Unavailable(f"Marlin is timed on int4_g32, not {model.format}")
        if model.hidden_size % 128 or model.width % 64:
            raise Unavailable(
                f"Marlin needs a hidden size of 128s and a width of 64s, here {model.hidden_size} and {model.width}"
            )
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            raise Unavailable("the fetched libraries are for NVIDIA's Hopper (compute capability 9.0)")
        uint4b8 = self._load()
        experts, x_TD, weights_TK = problem.experts, problem.x_TD, problem.topk_weights_TK
        ids_TK = problem.topk_ids_TK
        tokens, k = ids_TK.shape
        slots, d, f = model.shape.n_slots, model.hidden_size, model.width
        if experts not in self._laid_out:
            weights = (repack(w) for w in (experts.w13_weight_packed, experts.w2_weight_packed))
            scales = (lay_scales(by_rows(s)) for s in (experts.w13_weight_scale, experts.w2_weight_scale))
            self._laid_out[experts] = (*weights, *scales)
        w13, w2, s13, s2 = self._laid_out[experts]
        if s13.dtype != x_TD.dtype:
            raise Unavailable(f"Marlin needs scales in the dtype of x, {x_TD.dtype}, not {s13.dtype}")
        block = next((size for size in BLOCKS if tokens * k / slots / size < 0.9), BLOCKS[-1])
        room = min(tokens * k + slots * (block - 1), tokens * k * block)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        locks = torch.zeros(LOCKS * processors, dtype=torch.int32, device=device)
        gemm, align = torch.ops._moe_C.moe_wna16_marlin_gemm, torch.ops._moe_C.moe_align_block_size

        def call() -> Tensor:
            order = torch.empty(room, dtype=torch.int32, device=device)
            blocks = torch.empty(-(-room // block), dtype=torch.int32, device=device)
            count = torch.empty(1, dtype=torch.int32, device=device)
            align(ids_TK, slots, block, order, blocks, count, None, None)
            schedule = (order, blocks, count)
            gate_up = torch.empty(tokens * k, 2 * f, dtype=x_TD.dtype, device=device)
            hidden = torch.empty(tokens * k, f, dtype=x_TD.dtype, device=device)
            pairs = torch.empty(tokens * k, d, dtype=x_TD.dtype, device=device)
            y_TD = torch.empty_like(x_TD)
            product(x_TD, gate_up, w13, s13, schedule, k, weighed=False)
            torch.ops.sgl_kernel.silu_and_mul(hidden, gate_up)
            product(hidden, pairs, w2, s2, schedule, 1, weighed=True)
            torch.ops._moe_C.moe_sum(pairs.view(tokens, k, d), y_TD, None, None)
            return y_TD

        def product(
            a: Tensor, out: Tensor, w: Tensor, s: Tensor, schedule: tuple[Tensor, ...], each: int, *, weighed: bool
        ) -> None:
            no_bias = a_scales = global_scale = zeros = None
            sizes = (len(a), out.shape[1], a.shape[1])
            options = (False, True, False)  # no atomic additions; partial sums in float32; zero points are no floats
            tiles = (-1, -1, -1)  # the library chooses
            gemm(
                *(a, out, w, no_bias, s, a_scales, global_scale, zeros, locks, *schedule, weights_TK),
                *(block, each, weighed, uint4b8, *sizes, *options, *tiles),
            )

        return call

    def _load(self) -> int:
        """Register the libraries' operators, once, and answer vLLM's number for the storage type."""
        if self._type_id is None:
            for member in (LIBRARY, ACTIVATION):
                try:
                    self.files.load(member)
                except (OSError, RuntimeError) as error:
                    raise Unavailable(f"`{member}` does not load into torch {torch.__version__}: {error}") from None
            types = module_at("fetched_vllm_scalar_type", self.files.path("vllm/scalar_type.py"))
            self._type_id = int(types.scalar_types.uint4b8.id)
        return self._type_id


def repack(packed: Tensor) -> Tensor:
    """``(E, N, C / 8)`` words of compressed-tensors to ``(E, C / 16, 2 * N)`` words of Marlin.

    A tile of 16 columns and 64 rows is 32 threads of 4 words each, the operand of ``mma.m16n8k16`` as its threads hold
    it: thread ``4 * c + q`` has, in word j, of rows ``16 * j + 8 * half + c`` the columns ``8 * upper + 2 * q + odd``,
    in the nibble ``4 * odd + 2 * half + upper``, so that one mask and one shift give two neighbours of a register.
    """
    slots, rows, words = packed.shape
    out = torch.empty(slots, words // 2, 2 * rows, dtype=torch.int32, device=packed.device)
    for slot, into in zip(packed, out, strict=True):
        bytes_NB = slot.contiguous().view(torch.uint8)
        # Column i is nibble i % 8 of its word, low nibbles first, and so are the bytes of a word.
        nibbles_NC = torch.stack((bytes_NB & 15, bytes_NB >> 4), dim=-1).flatten(1)
        #                    n, j, half, c, column tile, upper, q, odd
        split = nibbles_NC.view(-1, 4, 2, 8, words // 2, 2, 4, 2)
        ordered = split.permute(4, 0, 3, 6, 1, 7, 2, 5).reshape(words // 2, 2 * rows, 4, 2)
        into.copy_((ordered[..., 0] | ordered[..., 1] << 4).view(torch.int32).squeeze(-1))
    return out


def lay_scales(scales: Tensor) -> Tensor:
    """``(E, N, C / 32)`` to ``(E, C / 32, N)`` with the 64 rows of a tile in the order in which threads need them.

    That is 0, 8, ... 56, then 1, 9, ... 57: what thread c of a row of `repack` multiplies with is one load of 16 bytes.
    """
    slots, rows, groups = scales.shape
    by_group = scales.transpose(1, 2).reshape(slots, groups, rows // 64, 8, 8)
    return by_group.transpose(-1, -2).reshape(slots, groups, rows)


def peer(name: str, files: Fetched) -> Marlin:
    """What `loader.bench.peers.peers_of` asks an adapter for."""
    return Marlin(files)
