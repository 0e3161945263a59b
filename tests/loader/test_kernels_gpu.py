"""The Triton kernels on a device, at real widths in bf16: what the interpreter can't show."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gatekeeper import read_facts
from loader import Verifier, build
from loader.bench.candidates import candidates
from loader.bench.problem import FORMATS, Model, problems, random_experts, random_router
from loader.kernels.configs import default
from loader.kernels.eager import eager
from loader.moe import SharedSlotRouter
from loader.planner import runner_layers
from tests.loader.fakes import shipped
from tests.loader.test_build import planned

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    pytest.importorskip("triton")
    return "cuda"


@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 300])
@pytest.mark.parametrize("tp_size", [8, 1], ids=["tp8", "tp1"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_real_widths_by_every_way_to_walk_a_layer(device: str, format_name: str, tp_size: int, tokens: int) -> None:
    from loader.bench import ours
    from loader.bench.checks import accuracy

    model = replace(Model.of("kimi-k2.5", format_name, tp_size), n_routed=15)
    problem = problems(model, [random_experts(model, device, 0)], tokens, 1)[0]
    expected = eager(problem.x_TD.float(), problem.topk_weights_TK, problem.topk_ids_TK, problem.experts)
    for config in dict.fromkeys([default(model.shape, tokens, 132), *candidates(model.shape, tokens, 132)]):
        actual = ours.call(problem, config)()
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        assert error <= accuracy(format_name), config


@pytest.mark.parametrize("tokens", [1, 16, 2048])
@pytest.mark.parametrize("format_name", FORMATS)
def test_float32_by_counted_settings(device: str, format_name: str, tokens: int) -> None:
    from loader.bench import ours
    from loader.kernels.triton_layer import counted

    model = replace(Model.of("kimi-k2.5", format_name, 8), n_routed=15)
    problem = problems(model, [random_experts(model, device, 0)], tokens, 1)[0]
    problem = replace(problem, x_TD=problem.x_TD.float())
    expected = eager(problem.x_TD, problem.topk_weights_TK, problem.topk_ids_TK, problem.experts)
    actual = ours.call(problem, counted(model.shape, problem.x_TD))()
    assert float((actual.double() - expected.double()).norm() / expected.double().norm()) <= 2e-3  # TF32's products


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_token_that_is_not_a_number_is_loud(device: str, format_name: str, tokens: int) -> None:
    from loader.bench import ours

    model = replace(Model.of("kimi-k2.5", format_name, 8), n_routed=15)
    problem = problems(model, [random_experts(model, device, 0)], tokens, 1)[0]
    config = default(model.shape, tokens, 132)
    clean = ours.call(problem, config)()
    for bad in (torch.nan, torch.inf):
        problem.x_TD[0, 1000] = bad
        actual = ours.call(problem, config)()
        assert not actual[0].isfinite().any()
        assert torch.equal(actual[1:], clean[1:])


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("name", ["kimi-k2.5", "deepseek-v3", "qwen3-30b-a3b"])
def test_a_router_of_real_size_chooses_as_the_reference_does(device: str, name: str, tokens: int) -> None:
    from loader.bench import ours

    model = Model.of(name, "int4_g32", 1)
    generator = torch.Generator(device).manual_seed(tokens)
    router = random_router(model, device, generator)
    x_TD = torch.randn(tokens, model.hidden_size, device=device, generator=generator).bfloat16()
    expected_weights, expected_ids = SharedSlotRouter(router, 1, gate=None)(x_TD)
    weights, ids = ours.TritonRouter(router, 1)(x_TD)
    slots = model.n_routed + 1
    ours_TE, theirs_TE = (
        torch.zeros(tokens, slots, device=device).scatter_add_(1, chosen.long(), by.float())
        for by, chosen in ((weights, ids), (expected_weights, expected_ids))
    )
    # A score that two sums make equal to another's may fall to either side.
    off = (ours_TE - theirs_TE).abs().amax(1) > 1e-3 * theirs_TE.abs().amax(1)
    assert int(off.sum()) <= tokens // 50


def test_the_router_of_a_few_tokens_leaves_cache_to_what_follows(device: str) -> None:
    from loader.kernels.triton_layer import launch
    from loader.kernels.triton_router import TritonRouter

    compiled: dict[str, Any] = {}

    def keep(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
        compiled[kernel.fn.__name__] = launch(kernel, grid, *arguments, **options)
        return compiled[kernel.fn.__name__]

    router = random_router(Model.of("kimi-k2.5", "int4_g32", 8), device, torch.Generator(device).manual_seed(0))
    for tokens, expected in ((1, 20), (300, -1)):
        TritonRouter(router, 1, launch=keep)(torch.randn(tokens, 7168, device=device).bfloat16())
        found, function = ctypes.c_int(), ctypes.c_void_p(compiled["router_logits"].function)
        assert ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(ctypes.byref(found), 9, function) == 0
        assert found.value == expected


@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32", "mxfp4"])
def test_a_load_is_verified_and_its_backend_too(
    device: str, made: Callable[..., Path], format_name: str, on: bool
) -> None:
    sizes = {"hidden": 512, "width": 512, "experts": 16}
    folder = made(family="kimi_k25", format_name=format_name, shared_format=format_name, **sizes)
    plan, index = planned(folder, on, backend="triton")
    facts = read_facts(folder)
    verifier = Verifier(plan, runner_layers(index, shipped().families["kimi_k25"], facts))
    build(plan, index, device, check=verifier)
    first, second = (one.backend for one in verifier.verified)
    assert first and first.whole and 0 < first.figure <= first.tolerance and second is None


@pytest.mark.parametrize("format_name", ["int4_g32", "mxfp4"])
def test_assembly_is_its_twin_bit_for_bit(device: str, format_name: str) -> None:
    """With every scale that it is exact for: all of bf16's size, and E8M0 codes from 1 to 128."""
    from tests.loader.unpacked import show_unpacked

    rows, columns = 256, 256
    generator = torch.Generator(device).manual_seed(0)
    quads = torch.randint(-(2**15), 2**15, (rows, columns // 4), device=device, generator=generator).short()
    codes = torch.arange(rows * columns // 32, device=device).view(rows, -1)
    scale = (1 + codes % 128).byte() if format_name == "mxfp4" else (codes * 16).short().view(torch.bfloat16)
    finite = scale.isfinite().repeat_interleave(32, 1) if format_name == "int4_g32" else torch.tensor(True)
    shown: list[Any] = []
    for assembly in (0, 90):
        shown.append(torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
        sizes = {"ROWS": rows, "C": columns}
        show_unpacked[1,](quads, scale, shown[-1], FORMAT=format_name, ASSEMBLY=assembly, **sizes)
    twin, assembled = (each.view(torch.int16) for each in shown)
    assert bool(((twin == assembled) | ~finite.to(device)).all())


def test_a_scale_beyond_the_assembly_is_loud_and_one_of_nothing_nothing(device: str) -> None:
    from tests.loader.unpacked import show_unpacked

    quads = torch.full((16, 64), 0x2222, dtype=torch.int16, device=device)  # ones
    codes = [0, 1, 64, 127, 128, 129, 254, 255]
    scale = torch.tensor(codes, dtype=torch.uint8, device=device).expand(16, 8).contiguous()
    out = torch.empty(16, 256, dtype=torch.bfloat16, device=device)
    show_unpacked[1,](quads, scale, out, FORMAT="mxfp4", ROWS=16, C=256, ASSEMBLY=90)
    by_group = out.view(16, 8, 32).double()
    expected = torch.tensor([0.0, *(2.0 ** (code - 127) for code in codes[1:5])], device=device).double()
    assert bool((by_group[:, :5] == expected[:, None]).all())
    assert not by_group[:, 5:].isfinite().any()


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_was_compiled_ahead_is_not_compiled_again(device: str, format_name: str) -> None:
    from loader.bench import ours
    from loader.bench.compiling import compile_all
    from loader.kernels.triton_down import down
    from loader.kernels.triton_gate_up import gate_up

    model = replace(Model.of("glm-4.5", format_name, 1), n_routed=9)  # sizes that no other test has
    problem = problems(model, [random_experts(model, device, 0)], 48, 1)[0]
    config = default(model.shape, 48, 132)

    def compiled() -> int:
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in (gate_up, down))

    before = compiled()
    compile_all([(problem, config)])
    assert compiled() == before + 2
    ours.call(problem, config)()
    assert compiled() == before + 2


def test_a_graph_of_calls_gives_what_calls_give(device: str) -> None:
    """Launches that overlap, and memory that one call hands to the next, inside a CUDA graph."""
    from loader.bench import ours

    model = replace(Model.of("kimi-k2.5", "int4_g32", 8), n_routed=63)
    layer = random_experts(model, device, 0)
    some = [problems(model, [layer], tokens, 1)[0] for tokens in (1, 16, 2, 64, 300)]
    calls = [ours.call(each, default(model.shape, len(each.x_TD), 132)) for each in some]
    expected = [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)
