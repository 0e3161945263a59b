"""The experts of a layer by our Triton kernels: a schedule where it is needed, two grouped products, and their sum.

Nothing here waits for the device, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loader.kernels.base import ExpertWeights
from loader.kernels.configs import (
    HOPPER_SHARED_BYTES,
    KINDS,
    PACKED,
    Config,
    Shape,
    Tiles,
    default,
    misfit,
    power_of_two,
)
from loader.kernels.triton_device import capability, is_nvidia, overlapping
from loader.kernels.triton_down import combine, down
from loader.kernels.triton_gate_up import gate_up
from loader.kernels.triton_prepare import prepare
from loader.kernels.triton_schedule import count_pairs, schedule_small, sort_pairs, sum_counts

SMALL = 256
"""Pairs up to which one program makes the whole schedule."""
CHUNKS = (128, 512)
"""Pairs that one program sorts where they are more, at least and at most: about 200 programs, if it can be."""
MOST_WORK = 2**31 - 1
"""Pairs and tiles are counted in int32 on the device."""


Launch = Callable[..., Any]
"""What to do with a kernel, its grid and its arguments; gives the compiled kernel where it runs one."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Run it, on the device of its first argument, whichever is the thread's current one."""
    with torch.cuda.device_of(arguments[0]):
        return kernel[grid](*arguments, **options, **overlapping(arguments[0].device))


class TritonExperts:
    """The routed (and fused shared) experts of one layer; holds views of its weights, no memory of its own."""

    def __init__(self, weights: ExpertWeights, *, launch: Launch = launch, assembly: int | None = None) -> None:
        """`assembly`: compute capability of NVIDIA's devices to compile for, 90 for 9.0, 0 for others'; None: that of
        the inputs' device.
        """
        config, layout = weights.config, weights.layout
        kind = KINDS.get(layout.name)
        if kind is None:
            raise ValueError(f"the Triton kernels have no `{layout.name}`; there are {', '.join(KINDS)}")
        if config.hidden_act != "silu" or config.weighed != "output":
            raise ValueError(
                f"the Triton kernels compute silu, weighed at the output, not `{config.hidden_act}` weighed at the "
                f"{config.weighed}"
            )
        w13, w2 = weights.stacked("w13"), weights.stacked("w2")
        self.kind, self.launch, self._assembly = kind, launch, assembly
        self.w13, self.w2 = _quads(w13["weight"], kind), _quads(w2["weight"], kind)
        self.scale13, self.scale2 = _scale(w13.get("scale"), self.w13), _scale(w2.get("scale"), self.w2)
        self.is_exact_in_bf16 = all(
            w["scale"].dtype in (torch.bfloat16, torch.uint8, torch.float8_e8m0fnu) for w in (w13, w2) if "scale" in w
        )
        self.bias13, self.bias2 = weights.w13_bias, weights.w2_bias
        self.n_slots, self.width = self.w13.shape[0], self.w13.shape[1] // 2
        self.hidden_size = self.w2.shape[1]
        self.format, self.config = layout.name, config
        self.activation: Mapping[str, Any] = {
            "LIMIT": config.limit,
            "ALPHA": 1.0 if config.alpha is None else config.alpha,
            "UP_OFFSET": config.up_offset,
        }

    def shape(self, top_k: int) -> Shape:
        """What its configurations depend on."""
        return Shape(
            format=self.format,
            n_slots=self.n_slots,
            hidden_size=self.hidden_size,
            width=self.width,
            top_k=top_k,
        )

    def __call__(
        self,
        x_TD: Tensor,
        topk_weights_TK: Tensor,
        topk_ids_TK: Tensor,
        *,
        config: Config | None = None,
        base_TD: Tensor | None = None,
    ) -> Tensor:
        """Sum over K of weight times expert, ``(T, D)`` in the dtype of x; `base_TD` is added where it is given.

        Accumulates in float32; raises `ValueError` for inputs that do not belong together.
        """
        tokens, k = topk_ids_TK.shape
        self.require_fitting(x_TD, topk_weights_TK, topk_ids_TK, base_TD)
        x_TD, ids, router = x_TD.contiguous(), topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
        y_TD = torch.empty_like(x_TD)
        if not tokens or not k:
            return y_TD.zero_() if base_TD is None else y_TD.copy_(base_TD)
        config = config or counted(self.shape(k), x_TD)
        call = _Call(self, x_TD, ids, router, config)
        schedule = None if config.by_pair else call.schedule()
        pairs_PD = call.down(call.gate_up(schedule), schedule)
        block = 512
        self.launch(
            combine,
            (tokens, -(-self.hidden_size // block)),
            pairs_PD,
            ids,
            router,
            base_TD.contiguous() if base_TD is not None else pairs_PD,
            y_TD,
            self.n_slots,
            self.hidden_size,
            k,
            BASED=base_TD is not None,
            BLOCK_D=block,
        )
        return y_TD

    def require_fitting(
        self, x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, base_TD: Tensor | None = None
    ) -> None:
        """Raise `ValueError` for inputs of a call that do not belong together."""
        tokens, k = topk_ids_TK.shape
        if x_TD.shape != (tokens, self.hidden_size):
            raise ValueError(f"x is {list(x_TD.shape)}, expected {[tokens, self.hidden_size]}")
        if topk_weights_TK.shape != topk_ids_TK.shape:
            raise ValueError(f"topk_weights is {list(topk_weights_TK.shape)}, topk_ids {list(topk_ids_TK.shape)}")
        if topk_ids_TK.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"topk_ids is {topk_ids_TK.dtype}, expected int32 or int64")
        if not x_TD.dtype.is_floating_point or x_TD.dtype.itemsize not in (2, 4):
            raise ValueError(f"x is {x_TD.dtype}, expected bfloat16, float16 or float32")
        if x_TD.dtype != torch.float32 and self.kind == "plain" and self.w13.dtype != x_TD.dtype:
            raise ValueError(f"x is {x_TD.dtype}, the weights are {self.w13.dtype}; give x in that, or in float32")
        if base_TD is not None and base_TD.shape != x_TD.shape:
            raise ValueError(f"base is {list(base_TD.shape)}, expected {list(x_TD.shape)}, as x is")
        given = [x_TD, topk_weights_TK, topk_ids_TK, self.w13, *([] if base_TD is None else [base_TD])]
        devices = {each.device for each in given}
        if len(devices) > 1:
            raise ValueError(f"what a call gets and the weights are on {sorted(map(str, devices))}, expected one")
        most = tokens * k * -(-max(self.hidden_size, self.width) // 16)
        if most > MOST_WORK:
            raise ValueError(f"{tokens} tokens of {k} slots are more work than one call takes; split the batch")


class _Call:
    """One call: its inputs, and the launches that share them."""

    def __init__(self, experts: TritonExperts, x_TD: Tensor, ids: Tensor, router: Tensor, config: Config) -> None:
        self.experts, self.ids, self.router, self.config = experts, ids, router, config
        self.pairs, self.k, self.dtype = ids.numel(), ids.shape[1], x_TD.dtype
        if wrong := misfit(config, experts.shape(self.k)):
            raise ValueError(wrong)
        self.native = capability(x_TD.device) if experts._assembly is None else experts._assembly
        # It computes in bf16, from scales that are bf16 or powers of two.
        fits = x_TD.dtype == torch.bfloat16 and experts.kind in PACKED and experts.is_exact_in_bf16
        self.assembly = self.native if fits else 0
        fp8 = experts.kind == "fp8_block" and x_TD.dtype != torch.float32
        self.form = "streams" if experts.kind in PACKED else "fp8" if fp8 else "plain"
        self.x, self.x_scale = self._prepared(x_TD)

    def _prepared(self, rows: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
        """Rows ``(P, C)``, or ``(splits, P, 2 C)`` of gate_up, as a product reads them, and their scales."""
        if self.form == "plain" and not splits:
            return rows, rows
        count, columns = rows.shape[-2], rows.shape[-1] // (2 if splits else 1)
        fp8 = self.form == "fp8"
        out = torch.empty(count, columns, dtype=torch.float8_e4m3fn if fp8 else self.dtype, device=rows.device)
        scales = torch.empty(count, -(-columns // 128), dtype=torch.float32, device=rows.device) if fp8 else out
        block, at_once = _of_prepare(count, columns)
        self.experts.launch(
            prepare,
            (-(-count // at_once), -(-columns // block)),
            rows,
            out,
            scales,
            count,
            COLUMNS=columns,
            FORM=self.form,
            SPLITS=splits,
            ROWS=at_once,
            BLOCK=block,
            **self.experts.activation,
        )
        return out, scales

    def schedule(self) -> _Schedule:
        """Sort the pairs by expert: one launch where they are few, else three."""
        ids, router, n_slots, block_m = self.ids, self.router, self.experts.n_slots, self.config.block_m
        made = _Schedule(ids, n_slots, block_m)
        if self.pairs <= SMALL:
            size = power_of_two(self.pairs, 16)
            self.experts.launch(
                schedule_small,
                (1,),
                ids,
                router,
                made.order,
                made.blocks,
                made.n,
                torch.empty(size, dtype=torch.int32, device=ids.device),
                self.pairs,
                n_slots,
                PAIRS=size,
                CHUNK=16,
                BLOCK_M=block_m,
                num_warps=8,
            )
            return made
        experts, (least, most) = power_of_two(n_slots + 1), CHUNKS
        chunk = min(power_of_two(self.pairs // 256, least), most)
        chunks = -(-self.pairs // chunk)
        counts = torch.empty(chunks + 1, experts, dtype=torch.int32, device=ids.device)
        sizes = {"EXPERTS": experts, "CHUNK": chunk}
        self.experts.launch(count_pairs, (chunks,), ids, router, counts, self.pairs, n_slots, **sizes)
        columns = min(experts, 16)
        self.experts.launch(
            sum_counts, (experts // columns,), counts, chunks, EXPERTS=experts, ROWS=64, COLUMNS=columns
        )
        self.experts.launch(
            sort_pairs,
            (chunks,),
            ids,
            router,
            counts,
            made.order,
            made.blocks,
            made.n,
            self.pairs,
            n_slots,
            chunks,
            COLUMNS=16 if chunk == most else 32,
            BLOCK_M=block_m,
            num_warps=16 if chunk == most else 8,
            **sizes,
        )
        return made

    def gate_up(self, schedule: _Schedule | None) -> tuple[Tensor, Tensor]:
        """The intermediate of all pairs as `down` reads it, and its scales."""
        e, c, t = self.experts, self.config, self.config.gate_up
        if c.splits > 1:
            out = torch.empty(c.splits, self.pairs, 2 * e.width, dtype=torch.float32, device=self.x.device)
        else:
            out = torch.empty(self.pairs, e.width, dtype=self.dtype, device=self.x.device)
        n_blocks, walked = self._walked(schedule)
        e.launch(
            gate_up,
            self._grid(n_blocks * -(-e.width // t.block_n) * c.splits, 1, t),
            self.x,
            self.x_scale,
            e.w13,
            e.scale13,
            e.bias13 if e.bias13 is not None else e.w13,
            *walked,
            out,
            self.pairs,
            e.n_slots,
            self.k,
            PAIRWISE=schedule is None,
            SPLITS=c.splits,
            GROUP=t.group,
            TOKENS_LEFT=t.tokens_left,
            BIASED=e.bias13 is not None,
            **self._common(t, e.scale13),
            **e.activation,
        )
        if c.splits > 1:
            return self._prepared(out, c.splits)
        return self._prepared(out) if self.form == "fp8" else (out, out)

    def down(self, hidden: tuple[Tensor, Tensor], schedule: _Schedule | None) -> Tensor:
        """The weighted output of all pairs, ``(P, D)`` by pair."""
        e, t = self.experts, self.config.down
        out = torch.empty(self.pairs, e.hidden_size, dtype=self.dtype, device=self.x.device)
        n_blocks, walked = self._walked(schedule)
        e.launch(
            down,
            self._grid(n_blocks * -(-e.hidden_size // (t.block_n * t.strips)), -(-e.width // t.block_c), t),
            *hidden,
            e.w2,
            e.scale2,
            e.bias2 if e.bias2 is not None else e.w2,
            self.router,
            *walked,
            out,
            self.pairs,
            e.n_slots,
            PAIRWISE=schedule is None,
            GROUP=t.group,
            TOKENS_LEFT=t.tokens_left,
            WALKS=t.programs > 0,
            STRIPS=t.strips,
            BIASED=e.bias2 is not None,
            **self._common(t, e.scale2),
        )
        return out

    def _walked(self, schedule: _Schedule | None) -> tuple[int, tuple[Tensor, ...]]:
        """How many blocks there are at most, and `ids`, `order`, `blocks` and `n_blocks` of a kernel.

        Without a schedule a pair is a block, and what is not read gets `ids`.
        """
        if schedule is None:
            return self.pairs, (self.ids,) * 4
        return schedule.most, (self.ids, schedule.order, schedule.blocks, schedule.n)

    def _common(self, tiles: Tiles, scale: Tensor) -> dict[str, Any]:
        return {
            "D": self.experts.hidden_size,
            "F": self.experts.width,
            "FORMAT": self.experts.kind,
            "ASSEMBLY": self.assembly,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_C": tiles.block_c,
            "RUN": scale.shape[-1] if self.experts.kind in PACKED else 1,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            **({"maxnreg": tiles.registers} if tiles.registers and self.native else {}),
        }

    def _grid(self, n: int, steps: int, tiles: Tiles) -> tuple[int]:
        """Programs for `n` tiles, which are counted in int32 as are the `steps` of those of a walk."""
        if n * (steps if tiles.programs else 1) > MOST_WORK:
            raise ValueError(f"{self.pairs} pairs of token and slot are more work than one call takes; split the batch")
        programs = tiles.programs * multiprocessors(self.x.device)
        return (min(n, programs) if programs else n,)


def _of_prepare(count: int, columns: int) -> tuple[int, int]:
    """Columns and rows of a program of `prepare`: 4096 numbers, or where there are few at most 1024 of one row."""
    many = count * columns >= 1 << 20
    block = min(power_of_two(columns, 128), 4096 if many else 1024)
    return block, 4096 // block if many else 1


class _Schedule:
    """See `triton_schedule`; `most` blocks there can be, on the host."""

    def __init__(self, ids: Tensor, n_slots: int, block_m: int) -> None:
        pairs = ids.numel()
        self.most = min(pairs, pairs // block_m + min(n_slots, pairs))
        self.order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
        self.blocks = torch.empty(self.most, 3, dtype=torch.int32, device=ids.device)
        self.n = torch.empty(1, dtype=torch.int32, device=ids.device)


def _quads(weight: Tensor, kind: str) -> Tensor:
    """Packed numbers as int16; their rows are whole quads, as the kernels' formats have groups of 32."""
    return weight.view(torch.int16) if kind in PACKED else weight


def _scale(scale: Tensor | None, weight: Tensor) -> Tensor:
    """Scales as the kernels read them: E8M0 as its codes; a format without scales gets what is never read."""
    if scale is None:
        return weight
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def counted(shape: Shape, x_TD: Tensor) -> Config:
    """What counting says for these tokens on their device."""
    device = x_TD.device
    return default(
        shape,
        len(x_TD),
        multiprocessors(device),
        _shared_bytes(device),
        least=least_pairs(device),
        x_bytes=x_TD.dtype.itemsize,
    )


def least_pairs(device: torch.device) -> int:
    """Pairs of the smallest block: NVIDIA's ``mma.sync`` has products of 8, others' instructions 16."""
    return 8 if is_nvidia(device) else 16


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one thread block may have there."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block)


def multiprocessors(device: torch.device) -> int:
    """How many programs can run side by side, at least; 1 where there is no such device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
