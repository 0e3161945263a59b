"""Every configuration that ships compiles for the device that it is for, and fits its shared memory; no GPU needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loader.bench.problem import Model
from loader.kernels.configs import default

pytestmark = pytest.mark.ahead

TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
MODELS = [("kimi-k2.5", 8), ("kimi-k2.5", 1), ("deepseek-v3", 8), ("deepseek-v3", 1)]
FORMATS = ["bf16", "fp8_block", "int4_g32", "mxfp4"]
SHARED_BYTES = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
"""Most of one thread block: compute capabilities 8.0, 9.0, 10.0 in the CUDA C++ programming guide's table of technical
specifications; local data share of AMD's CDNA 3 and CDNA 4 instruction set guides."""
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304, "gfx950": 256}


@pytest.fixture(scope="module")
def ahead() -> Any:
    """`tests.loader.ahead`, which can only be imported where Triton is installed."""
    from tests.loader import ahead

    return ahead


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("arch", ["sm90", "sm80", "sm100", "gfx942", "gfx950"])
def test_the_configuration_by_counting_compiles_and_fits(ahead: Any, arch: str, format_name: str) -> None:
    if format_name == "fp8_block" and arch in ("sm80", "gfx942"):
        pytest.skip(f"the gate does not allow fp8_block on {arch}, which has no E4M3 (OCP) products")
    models, tokens = (MODELS, TOKENS) if arch == "sm90" else (MODELS[:1], [1, 16, 8192])
    seen: dict[Any, Any] = {}
    for name, tp_size in models:
        shape = Model.of(name, format_name, tp_size).shape
        for count in tokens:
            config = default(shape, count, MULTIPROCESSORS[arch])
            for launch in ahead.launches_of(shape, count, config, arch, torch.bfloat16):
                seen.setdefault(launch.key, launch)
    assert {launch.kernel.__name__ for launch in seen.values()} >= {"gate_up", "down", "down_by_token", "combine"}
    too_large = {}
    for launch in seen.values():
        shared = launch.compile(arch).metadata.shared
        if shared > SHARED_BYTES[arch]:
            too_large[launch.key] = shared
    assert not too_large
