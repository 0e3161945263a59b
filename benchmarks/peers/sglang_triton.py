"""SGLang's fused MoE Triton kernels, as its wheel has them: https://github.com/sgl-project/sglang, 0.5.23.

Its modules import half of an engine, of which they use a few flags and operators: those names are made up here, from
sgl-kernel's library or as constants, and nothing else of SGLang is imported. What an engine with default settings on
NVIDIA's Hopper does is what runs: gate and up interleaved for bf16, so that SwiGLU is the end of the first product;
activations quantized in groups of 128 for fp8_block; the kernel of GPTQ and AWQ for int4_g32; programmatic dependent
launch. Two kernels that SGLang compiles with nvcc on first use, SiLU and the quantization of activations, are
sgl-kernel's older ones; those that skip rows of padding, which a few of its configurations need, are `sglang_rows`.

Shapes: E slots, T tokens, K slots of a token, D hidden size, F width of a slot.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loader.bench.fetched import Fetched, module_at
from loader.bench.peers import Unavailable
from loader.bench.problem import Problem
from loader.kernels.configs import Shape
from loader.moe import Experts
from loader.runs import by_rows

LIBRARY = "sgl_kernel/sm90/common_ops.abi3.so"
RUNNER = "sglang.srt.layers.moe.moe_runner.triton_utils"
E4M3_MAX = 448.0
GROUP = 128
Config = Mapping[str, int]


class SGLangTriton:
    """The wheel's own choice of a configuration, or with `tuned` the fastest of that and up to six more."""

    accuracy = 0.02

    def __init__(self, files: Fetched, *, tuned: bool) -> None:
        files.require("sglang/")
        self.name = "sglang-triton-tuned" if tuned else "sglang-triton"
        self.tuned, self.files = tuned, files
        self._best: dict[tuple[Shape, int], Config | None] = {}
        self._weights: WeakKeyDictionary[Experts, dict[str, Any]] = WeakKeyDictionary()

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        model, device = problem.model, problem.x_TD.device
        if model.format not in ("bf16", "fp8_block", "int4_g32"):
            raise Unavailable(f"SGLang's kernels are timed on bf16, fp8_block and int4_g32, not {model.format}")
        if model.format == "fp8_block" and (model.width % GROUP or model.hidden_size % GROUP):
            raise Unavailable(
                f"SGLang needs whole blocks of {GROUP}; the hidden size is {model.hidden_size}, the width {model.width}"
            )
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            raise Unavailable("the fetched library is for NVIDIA's Hopper (compute capability 9.0)")
        try:
            self.files.load(LIBRARY)
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"`{LIBRARY}` does not load into torch {torch.__version__}: {error}") from None
        utils = modules(self.files)
        self.accuracy = 0.1 if model.format == "fp8_block" else 0.02
        if problem.experts not in self._weights:
            self._weights[problem.experts] = _weights(problem)
        arguments = {
            **self._weights[problem.experts],
            "hidden_states": problem.x_TD,
            "topk_weights": problem.topk_weights_TK,
            "topk_ids": problem.topk_ids_TK,
            "filter_expert": False,  # all slots are on this rank
        }
        run = sys.modules[f"{RUNNER}.fused_moe"].fused_experts_impl

        def call_with(config: Config | None) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with _override(utils, config):
                    y_TD: Tensor = run(**arguments)
                return y_TD

            return call

        key = model.shape, len(problem.x_TD)
        if self.tuned and key not in self._best:
            self._best[key] = _fastest(call_with, candidates(*key))
        return call_with(self._best.get(key))


def _weights(problem: Problem) -> dict[str, Any]:
    """Arguments of `fused_experts_impl`; weights interleaved here are a copy of gate and up."""
    experts = problem.experts
    if problem.model.format == "bf16":
        return {"w1": interleaved(experts.w13_weight), "w2": experts.w2_weight, "fuse_swiglu_interleaved": True}
    if problem.model.format == "fp8_block":
        weights = {"w1": experts.w13_weight, "w2": experts.w2_weight}
        scales = {"w1_scale": experts.w13_weight_scale_inv, "w2_scale": experts.w2_weight_scale_inv}
        return {**weights, **scales, "use_fp8_w8a8": True, "block_shape": [GROUP, GROUP]}
    # Eight numbers of a word, low nibbles first, are the same bytes as two numbers of a byte.
    weights = {"w1": experts.w13_weight_packed.view(torch.uint8), "w2": experts.w2_weight_packed.view(torch.uint8)}
    scales = {"w1_scale": by_rows(experts.w13_weight_scale), "w2_scale": by_rows(experts.w2_weight_scale)}
    return {**weights, **scales, "use_int4_w4a16": True, "block_shape": [0, 32]}


def interleaved(w13_E2FD: Tensor) -> Tensor:
    """Gate rows, then up rows, to gate 0, up 0, gate 1, up 1, ..."""
    return torch.stack(w13_E2FD.chunk(2, dim=1), dim=2).flatten(1, 2)


def candidates(shape: Shape, tokens: int) -> list[Config | None]:
    """What is tried beside the wheel's own choice (None), which is therefore never beaten by `tuned`.

    Rows: block of pairs, of columns of the result, of the inner axis, group, warps, stages.
    """
    share = tokens * shape.top_k / shape.n_slots
    if shape.format == "int4_g32":
        rows = [(16, 64, 64, 1, 4, 4), (16, 64, 128, 1, 4, 3), (16, 128, 64, 1, 4, 3), (32, 64, 64, 8, 4, 3)]
        if share > 16:
            rows = [(32, 64, 64, 8, 4, 3), (64, 64, 64, 8, 4, 3), (64, 128, 64, 8, 8, 3)]
    elif shape.format == "fp8_block":
        rows = [(16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 3), (16, 32, 128, 1, 4, 5), (32, 128, 128, 8, 4, 3)]
        if share > 16:
            rows = [(64, 128, 128, 8, 4, 3), (64, 128, 128, 16, 4, 4), (128, 128, 128, 8, 8, 3)]
    elif share <= 2:
        rows = [(16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 5), (16, 128, 128, 1, 4, 4)]
        rows += [(16, 64, 256, 1, 4, 3), (16, 32, 256, 1, 4, 4), (16, 32, 256, 1, 2, 4)]
    elif share <= 16:
        rows = [(16, 128, 128, 1, 4, 3), (32, 128, 64, 8, 4, 4), (64, 128, 64, 8, 4, 4), (64, 128, 64, 1, 4, 3)]
    else:
        rows = [(64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4)]
        rows += [(128, 256, 64, 8, 8, 3), (128, 256, 64, 16, 8, 4)]
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    # A step beyond the second product's inner axis would mostly read nothing.
    return [None, *(dict(zip(names, row, strict=True)) for row in rows if row[2] <= shape.width)]


def _fastest(call_with: Callable[[Config | None], Callable[[], Tensor]], tried: list[Config | None]) -> Config | None:
    seconds = {}
    for n, config in enumerate(tried):
        try:
            seconds[n] = _time(call_with(config))
        except Exception as error:  # noqa: BLE001  # Triton's own kinds, too: more shared memory than there is
            torch.cuda.synchronize()
            logging.getLogger(__name__).info("%s does not run: %s", config, error)
    if not seconds:
        raise Unavailable("none of SGLang's configurations runs here")
    return tried[min(seconds, key=lambda n: seconds[n])]


def _time(call: Callable[[], Tensor], rounds: int = 15) -> float:
    """Milliseconds in a CUDA graph, the cache flushed before each; the flush hides what the launch costs the CPU."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found = []
    for _ in range(rounds):
        other.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


@contextlib.contextmanager
def _override(utils: ModuleType, config: Config | None) -> Iterator[None]:
    """SGLang's own ``override_config`` stays in force after an error."""
    utils._config = None if config is None else dict(config)
    try:
        yield
    finally:
        utils._config = None


_MODULES: list[ModuleType] = []


def modules(files: Fetched) -> ModuleType:
    """SGLang's ``triton_utils``, imported once, among stand-ins for what it asks of the engine."""
    if _MODULES:
        return _MODULES[0]
    if "sglang" in sys.modules or "sgl_kernel" in sys.modules:
        raise Unavailable("another SGLang is imported in this process")
    before = set(sys.modules)
    for name, attributes in _stand_ins().items():
        module = ModuleType(name)
        module.__path__ = [str(files.folder.joinpath(*name.split(".")))]
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    for module_name in ("fused_moe", "fused_moe_triton_config"):
        logger = logging.getLogger(f"{RUNNER}.{module_name}")
        logger.warning_once = logger.info  # type: ignore[attr-defined]  # SGLang adds it to all loggers
        logger.setLevel(logging.ERROR)  # a configuration for another Triton is a warning each time
    try:
        __import__(RUNNER)
    except BaseException:
        for name in set(sys.modules) - before:
            del sys.modules[name]
        raise
    _MODULES.append(sys.modules[RUNNER])
    return _MODULES[0]


def _stand_ins() -> dict[str, dict[str, Any]]:
    """Parents first. Constants are the defaults of SGLang's flags on one GPU of Hopper."""
    ops = torch.ops.sgl_kernel
    rows = partial(module_at, "sglang_rows", Path(__file__).with_name("sglang_rows.py"))

    def no(*_: Any, **__: Any) -> bool:
        return False

    def yes() -> bool:
        return True

    def unused(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("this path of SGLang's is not timed")

    def silu_and_mul(x: Tensor, out: Tensor, **wanted: Any) -> Tensor:
        if wanted:
            filtered: Tensor = rows().silu(x, out, **wanted)
            return filtered
        ops.silu_and_mul.default(out, x)
        return out

    def quantize(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(*x.shape[:-1], x.shape[-1] // group_size, dtype=torch.float32, device=x.device)
        limits = (1e-10, -E4M3_MAX, E4M3_MAX)
        ops.sgl_per_token_group_quant_8bit_v2.default(x, q, scale, group_size, *limits, False, False, None)
        return q, scale

    def align(ids: Tensor, buckets: int, block: int, order: Tensor, slots: Tensor, *rest: Any) -> None:
        count, sums, pad = rest[:3]
        ops.moe_align_block_size.default(ids, buckets, block, order, slots, count, sums, pad)

    def custom_op(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda decorated: decorated

    class Flags:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(get=no)

    flags = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )
    platform = dict.fromkeys(("is_cpu", "is_hip", "is_musa", "is_xpu", "cpu_has_amx_support", "get_bool_env_var"), no)
    fp8 = {"per_token_group_quant_fp8": unused, "scaled_fp8_quant": unused}
    int8 = ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")
    gelu = dict.fromkeys(("gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_with_activation_rounding"), unused)
    srt, kernels = "sglang.srt", "sglang.kernels"
    return {
        "sgl_kernel": {"moe_sum_reduce": lambda x, out, factor: ops.moe_sum_reduce.default(x, out, factor)},
        "sglang": {},
        kernels: {},
        f"{kernels}.jit": {},
        f"{kernels}.jit.utils": {"is_arch_support_pdl": yes},
        f"{kernels}.ops": {},
        f"{kernels}.ops.moe": {"moe_align_block_size": align},
        f"{kernels}.ops.activation": {},
        f"{kernels}.ops.activation.activation": {"silu_and_mul": silu_and_mul, **gelu},
        f"{kernels}.ops.quantization": {},
        f"{kernels}.ops.quantization.fp8_kernel": {"sglang_per_token_group_quant_fp8": quantize, **fp8},
        f"{kernels}.ops.quantization.int8_kernel": dict.fromkeys(int8, unused),
        f"{kernels}.ops.quantization.per_token_group_quant": {
            "per_token_group_quant": lambda x, **wanted: rows().quantize(x, **wanted)
        },
        srt: {},
        f"{srt}.batch_invariant_ops": {"is_batch_invariant_mode_enabled": no},
        f"{srt}.distributed": {},
        f"{srt}.distributed.device_communicators": {},
        f"{srt}.distributed.device_communicators.pynccl_allocator": {
            "use_symmetric_memory": lambda *_, **__: contextlib.nullcontext()
        },
        f"{srt}.environ": {"envs": Flags()},
        f"{srt}.layers": {},
        f"{srt}.layers.dp_attention": {"is_allocation_symmetric": no},
        f"{srt}.layers.moe": {},
        f"{srt}.layers.moe.moe_runner": {"MoeRunnerConfig": SimpleNamespace},
        f"{srt}.layers.moe.utils": {"get_moe_padding_size": lambda _: 0, "get_moe_runner_backend": unused},
        f"{srt}.runtime_context": {
            "get_exec": lambda: flags,
            "get_parallel": lambda: SimpleNamespace(tp_group=None),
        },
        f"{srt}.utils": {
            **platform,
            "is_cuda": yes,
            "is_sm90_supported": yes,
            "get_device_name": lambda: torch.cuda.get_device_name(),
        },
        f"{srt}.utils.custom_op": {"register_custom_op": custom_op},
    }


def peer(name: str, files: Fetched) -> SGLangTriton:
    """What `loader.bench.peers.peers_of` asks an adapter for."""
    return SGLangTriton(files, tuned=name.endswith("-tuned"))
