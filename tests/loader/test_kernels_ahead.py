"""Every configuration that ships compiles for the device that it is for, and fits its shared memory; no GPU needed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from loader.bench.problem import Model
from loader.kernels.configs import Config, Shape, default
from loader.kernels.tuned import SHIPPED, Measured, read_table
from loader.router_config import RouterConfig

pytestmark = pytest.mark.ahead

TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
MOST = 1 << 15
MODELS = [("kimi-k2.5", 8), ("kimi-k2.5", 1), ("deepseek-v3", 8), ("deepseek-v3", 1)]
FORMATS = ["bf16", "fp8_block", "int4_g32", "mxfp4"]
ARCHITECTURES = ["sm90", "sm80", "sm100", "gfx942", "gfx950"]
"""Those of the requirement `triton-compiles-for-the-device`."""
SHARED_BYTES = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
"""Most of one thread block: compute capabilities 8.0, 9.0, 10.0 in the CUDA C++ programming guide's table of technical
specifications; local data share of AMD's CDNA 3 and CDNA 4 instruction set guides."""
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304, "gfx950": 256}
DEVICES = {"NVIDIA H200": "sm90", "NVIDIA H100 80GB HBM3": "sm90"}
SHIPPED_CONFIGS = [
    pytest.param(table.device, shape, measured, id=f"{table.device}-{i}-{shape.format}")
    for table in map(read_table, sorted(SHIPPED.glob("*.json")))
    for i, (shape, measured) in enumerate(table.configs.items())
]


@pytest.fixture(scope="module")
def ahead() -> Any:
    """`tests.loader.ahead`, which can only be imported where Triton is installed."""
    from tests.loader import ahead

    return ahead


def require_fitting(launches: Iterable[Any], arch: str) -> set[str]:
    """Compile each once; the names of the kernels."""
    unique = {launch.key: launch for launch in launches}
    shared = {key: launch.compile(arch).metadata.shared for key, launch in unique.items()}
    assert not {key: size for key, size in shared.items() if size > SHARED_BYTES[arch]}
    return {launch.kernel.__name__ for launch in unique.values()}


def counted(shape: Shape, tokens: int, arch: str, **other: Any) -> Config:
    """As `loader.kernels.triton_layer.counted` counts on such a device."""
    least = 8 if arch.startswith("sm") else 16
    return default(shape, tokens, MULTIPROCESSORS[arch], SHARED_BYTES[arch], least=least, **other)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_configuration_by_counting_compiles_and_fits(ahead: Any, arch: str, format_name: str) -> None:
    if format_name == "fp8_block" and arch in ("sm80", "gfx942"):
        pytest.skip(f"the gate does not allow fp8_block on {arch}, which has no E4M3 (OCP) products")
    models, tokens = (MODELS, TOKENS) if arch == "sm90" else (MODELS[:1], [1, 16, 8192])
    launches = []
    for shape in (Model.of(name, format_name, tp_size).shape for name, tp_size in models):
        for count in tokens:
            config = counted(shape, count, arch)
            launches += ahead.launches_of(shape, count, config, arch)
            # Ids are int32 from our router, int64 from torch's.
            launches += ahead.launches_of(shape, count, config, arch, ids_dtype=torch.int64) if count < 64 else []
        by_pair = replace(counted(shape, 1, arch, block_m=16), by_pair=True)
        launches += ahead.launches_of(shape, 1, by_pair, arch, ids_dtype=torch.int64)
    wide = Model.of("kimi-k2.5", format_name, 1).shape  # whose `down` keeps nothing
    launches += ahead.launches_of(wide, 8192, counted(wide, 8192, arch), arch)
    # The largest blocks, and with float32 in twice the memory, which takes long to compile.
    shape = Model.of("kimi-k2.5", format_name, 8).shape
    for dtype in (torch.bfloat16, torch.float32) if arch == "sm90" else (torch.bfloat16,):
        config = counted(shape, MOST, arch, x_bytes=dtype.itemsize)
        launches += ahead.launches_of(shape, MOST, config, arch, dtype)
    schedules = {"schedule_small", "count_pairs", "sum_counts", "sort_pairs"}
    assert require_fitting(launches, arch) >= {*schedules, "prepare", "gate_up", "down", "combine"}


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_float32_fits_where_numbers_are_unpacked(ahead: Any, arch: str) -> None:
    """They go through shared memory then, beside tiles of activations twice as large."""
    launches = []
    for format_name, (name, tp_size) in (("int4_g32", MODELS[0]), ("mxfp4", MODELS[3])):
        shape = Model.of(name, format_name, tp_size).shape
        for tokens in (1, 16, 256, 2048, MOST):
            config = counted(shape, tokens, arch, x_bytes=4)
            launches += ahead.launches_of(shape, tokens, config, arch, torch.float32)
    products = (launch for launch in launches if launch.kernel.__name__ in ("gate_up", "down"))
    assert require_fitting(products, arch) == {"gate_up", "down"}


@pytest.mark.parametrize(("format_name", "measured"), [("int4_g32", True), ("fp8_block", True), ("bf16", False)])
def test_an_engine_that_has_warmed_up_compiles_nothing_more(ahead: Any, format_name: str, measured: bool) -> None:
    """docs/kernels.md says after which numbers of tokens."""
    (table,) = map(read_table, SHIPPED.glob("*h200.json"))
    shape = Model.of("kimi-k2.5", format_name, 8).shape
    router = RouterConfig(scoring_func="sigmoid", top_k=8)

    def kernels(tokens: int) -> set[Any]:
        config = table.config(shape, tokens) if measured else None
        launches = ahead.launches_of(shape, tokens, config or counted(shape, tokens, "sm90"), "sm90")
        return {each.key for each in (*launches, *ahead.router_launches(router, 384, tokens, torch.bfloat16))}

    warm = set().union(*(kernels(count) for n in range(14) for count in (2**n, 3 * 2**n) if count <= 8192))
    for tokens in (*range(1, 34), *random.Random(0).sample(range(34, 8193), 40)):
        assert kernels(tokens) <= warm, tokens


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_router_compiles_and_fits(ahead: Any, arch: str) -> None:
    kimi = RouterConfig(scoring_func="sigmoid", top_k=8)
    deepseek = RouterConfig(scoring_func="sigmoid", top_k=8, n_group=8, topk_group=4)
    launches = []
    for tokens in (1, 64, 8192):
        launches += ahead.router_launches(kimi, 384, tokens, torch.bfloat16)
        launches += ahead.router_launches(deepseek, 256, tokens, torch.float32)
    launches += ahead.router_launches(kimi, 600, 64, torch.bfloat16)  # more than one warp chooses from
    assert require_fitting(launches, arch) == {"router_logits", "choose"}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_kept_activations_of_wider_slots_fit(ahead: Any, arch: str, format_name: str) -> None:
    if format_name == "fp8_block" and arch == "sm80":
        pytest.skip("the gate does not allow fp8_block on sm80, which has no E4M3 (OCP) products")
    for width in (384, 512):
        shape = replace(Model.of("kimi-k2.5", format_name, 8).shape, width=width)
        kept = [(tokens, config) for tokens in (64, 8192) if (config := counted(shape, tokens, arch)).down.strips > 1]
        assert kept
        launches = [each for tokens, config in kept for each in ahead.launches_of(shape, tokens, config, arch)]
        assert require_fitting((each for each in launches if each.kernel.__name__ == "down"), arch) == {"down"}


def test_a_bound_of_registers_reaches_the_compiler(ahead: Any) -> None:
    shape = Model.of("kimi-k2.5", "int4_g32", 8).shape
    config = default(shape, 16, MULTIPROCESSORS["sm90"])
    config = replace(config, gate_up=replace(config.gate_up, registers=96))
    for launch in ahead.launches_of(shape, 16, config, "sm90"):
        if launch.kernel.__name__ in ("gate_up", "down"):
            bounded = ".maxnreg 96" in launch.compile("sm90").asm["ptx"]
            assert bounded is (launch.kernel.__name__ == "gate_up")
    # AMD's compiler does not know the option, and would refuse the launch.
    assert not any("maxnreg" in launch.keywords for launch in ahead.launches_of(shape, 16, config, "gfx942"))


def test_something_is_shipped() -> None:
    assert SHIPPED_CONFIGS


@pytest.mark.parametrize(("device", "shape", "measured"), SHIPPED_CONFIGS)
def test_every_shipped_configuration_compiles_and_fits(
    ahead: Any, device: str, shape: Shape, measured: Mapping[int, Measured]
) -> None:
    arch = DEVICES[device]
    launches = [
        launch for tokens, one in measured.items() for launch in ahead.launches_of(shape, tokens, one.config, arch)
    ]
    assert require_fitting(launches, arch) >= {"gate_up", "down", "combine"}
