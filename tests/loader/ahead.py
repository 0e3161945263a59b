"""Compile what a call would launch, for any device, without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gatekeeper import load_rules
from loader.formats import layout_of
from loader.kernels.configs import Config, Shape
from loader.kernels.eager import eager
from loader.kernels.triton_layer import TritonExperts
from loader.kernels.triton_router import TritonRouter
from loader.moe import Experts, Router
from loader.router_config import RouterConfig

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that compile to the same."""
        kinds = tuple(
            _kind(value, parameter) for value, parameter in zip(self.arguments, self.kernel.params, strict=False)
        )
        return self.kernel.__name__, kinds, tuple(sorted(self.keywords.items(), key=lambda item: item[0]))

    def compile(self, arch: str) -> Any:
        """As the just-in-time compiler would, with pointers and sizes aligned as they are for real shapes."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        keywords = self.keywords | {"PDL": arch in ("sm90", "sm100")}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[i] if i < len(self.arguments) else keywords[parameter.name]
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or (isinstance(value, int) and value == 1 and specialised):
                signature[parameter.name], constants[i,] = "constexpr", value
                continue
            signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or (value % 16 == 0 and specialised):
                attributes[i,] = [["tt.divisibility", 16]]
        options = {
            name: self.keywords[name] for name in ("num_warps", "num_stages", "maxnreg") if name in self.keywords
        }
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=TARGETS[arch], options=options)


def _kind(value: Any, parameter: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return None if parameter.do_not_specialize else (value == 1, value % 16 == 0)


class Recorder:
    """Takes the place of launching: notes what would be run."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
        """Note one launch."""
        self.launches.append(Launch(kernel, arguments, keywords))


def launches_of(
    shape: Shape,
    tokens: int,
    config: Config,
    arch: str,
    dtype: torch.dtype = torch.bfloat16,
    ids_dtype: torch.dtype = torch.int32,
) -> list[Launch]:
    """The launches of one call, on tensors without memory."""
    with torch.device("meta"):
        experts = Experts(
            layout_of(load_rules().formats[shape.format]),
            n_experts=shape.n_slots,
            hidden_size=shape.hidden_size,
            width=shape.width,
            kernel=eager,
        )
        experts.lay_out()
        x = torch.empty(tokens, shape.hidden_size, dtype=dtype)
        weights = torch.empty(tokens, shape.top_k)
        ids = torch.empty(tokens, shape.top_k, dtype=ids_dtype)
    record = Recorder()
    target = TARGETS[arch]
    assembly = int(target.arch) if target.backend == "cuda" else 0
    TritonExperts(experts, launch=record, assembly=assembly)(x, weights, ids, config=config)
    return record.launches


def router_launches(config: RouterConfig, experts: int, tokens: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of a router with a bias and one shared slot."""
    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(experts, 7168, dtype=dtype), requires_grad=False)
        bias = nn.Parameter(torch.empty(experts), requires_grad=False)
        x = torch.empty(tokens, 7168, dtype=torch.bfloat16)
    record = Recorder()
    TritonRouter(Router(config, weight, bias), 1, launch=record)(x)
    return record.launches
