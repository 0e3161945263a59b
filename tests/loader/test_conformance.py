"""Our unpacking against the formats' own libraries, run here and now; `make test` has their bytes as goldens."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gatekeeper.names import covers, spellings
from loader.formats import FORMATS
from loader.packing import PACKERS

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def goldens(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_goldens", root / "scripts" / "make_goldens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4"])
def test_the_goldens_are_what_the_library_writes(name: str, goldens: ModuleType, root: Path) -> None:
    stored = json.loads((root / "tests" / "loader" / "goldens" / f"{name}.json").read_text(encoding="utf-8"))
    made = goldens.GOLDENS[name]()
    assert {key: made[key] for key in ("parts", "dequantized")} == {
        key: stored[key] for key in ("parts", "dequantized")
    }


@pytest.mark.parametrize("seed", range(5))
def test_compressed_tensors_reads_what_we_pack_as_we_do(seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(seed)).bfloat16()
    ours = PACKERS["int4_g32"](weight)
    theirs = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": ours["weight_scale"]}, scheme)
    for packed in (ours, theirs):
        back = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        assert torch.equal(FORMATS["int4_g32"].dequantize(packed, torch.bfloat16), back)
    # Rounding is theirs to choose (they divide in bf16, we in float32); the layout is not: the nibbles lie alike.
    numbers = [unpack_from_int32(p["weight_packed"], 4, weight.shape) for p in (ours, theirs)]
    assert (numbers[0].int() - numbers[1].int()).abs().max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_quark_reads_what_we_pack_as_we_do(seed: int) -> None:
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import Pack_fp4

    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
    ours = PACKERS["mxfp4"](weight)
    scale = 2.0 ** (ours["weight_scale"].int() - 127)
    assert torch.equal(to_e8m0_uint8(scale), ours["weight_scale"])
    packer = Pack_fp4(None, "fp4")
    numbers = packer.unpack(ours["weight"], reorder=False)
    assert torch.equal(packer.pack(numbers.clone(), reorder=False), ours["weight"])
    back = numbers * scale.repeat_interleave(32, dim=-1)
    assert torch.equal(FORMATS["mxfp4"].dequantize(ours, torch.float32), back)


WORDS = ("model", "layers", "1", "10", "mlp", "experts", "gate", "gate_proj", "shared_experts", "self_attn")
REGEXES = ("re:.*mlp.*", r"re:model\.layers\.1", "re:.*shared_experts.*", "re:.*gate$", "re:layers")
GLOBS = ("*mlp*", "*.gate", "model.layers.1*", "*shared_experts*", "model.layers.?.mlp.gate")


def draw(seed: int, patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Patterns, of which half are names, each with a name."""
    rng = random.Random(seed)

    def name() -> str:
        return ".".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    return [(rng.choice(patterns) if rng.random() < 0.5 else name(), name()) for _ in range(20_000)]


@pytest.mark.parametrize("seed", range(2))
def test_names_match_as_compressed_tensors_matches_them(seed: int) -> None:
    from compressed_tensors.utils.match import match_name

    for pattern, name in draw(seed, REGEXES):
        expected = any(match_name(one, pattern) for one in spellings(name))
        assert covers("compressed-tensors", [pattern], name) is expected, (pattern, name)


@pytest.mark.parametrize("seed", range(2))
def test_names_match_as_quark_matches_them(seed: int) -> None:
    from quark.torch.quantization.file2file_utils import match_modules

    for pattern, name in draw(seed, GLOBS):
        expected = bool(match_modules(pattern, set(spellings(name))))
        assert covers("quark", [pattern], name) is expected, (pattern, name)
