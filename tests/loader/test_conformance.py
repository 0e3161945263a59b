"""Our arithmetic against the formats' own libraries, run here and now; `make test` has their bytes as goldens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loader.formats.mxfp4 import join_blocks
from loader.packing import PACKERS
from loader.raw_numbers import raw_numbers
from tests.loader.test_formats import dequantize, layout, random_bytes, same

pytestmark = pytest.mark.conformance

MODELOPT = "ModelOpt with all it imports is too much for a suite: its bytes are a golden; install it to run this"
FILES = sorted(path.stem for path in (Path(__file__).parent / "goldens").glob("*.json"))


@pytest.fixture(scope="module")
def goldens(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_goldens", root / "scripts" / "make_goldens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_the_goldens_are_what_the_library_writes(name: str, goldens: ModuleType, root: Path) -> None:
    if name == "nvfp4":
        pytest.importorskip("modelopt", reason=MODELOPT)
    stored = json.loads((root / "tests" / "loader" / "goldens" / f"{name}.json").read_text(encoding="utf-8"))
    made = goldens.make(name)
    assert {key: made[key] for key in ("format", "parts", "dequantized")} == {
        key: stored[key] for key in ("format", "parts", "dequantized")
    }
    assert goldens.GOLDENS.keys() == set(FILES)


def random_weight(seed: int, rows: int = 24, columns: int = 160) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)


# -- compressed-tensors ---------------------------------------------------------------------------------------------

FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "pack-quantized": ("int4_g32", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "float-quantized, channel": ("fp8_channel", {**FLOAT8, "strategy": "channel"}),
    "float-quantized, tensor": ("fp8_tensor", {**FLOAT8, "strategy": "tensor"}),
    "float-quantized, block": ("fp8_block", {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}),
    "mxfp8-quantized": ("mxfp8", {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    "mxfp4-pack-quantized": ("mxfp4", {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    "nvfp4-pack-quantized": (
        "nvfp4_ct",
        {**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
}


def as_compressed_tensors_has_it(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What our packer wrote, by the names and shapes of compressed-tensors."""
    names = {"mxfp4": {"weight": "weight_packed"}, "fp8_block": {"weight_scale_inv": "weight_scale"}}.get(name, {})
    found = {names.get(suffix, suffix): part for suffix, part in stored.items() if suffix != "input_scale"}
    if name in ("fp8_tensor", "fp8_block"):
        found["weight_scale"] = found["weight_scale"].bfloat16()
    if name == "fp8_tensor":
        found["weight_scale"] = found["weight_scale"].reshape(1)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_reads_what_we_pack_as_we_do(case: str, seed: int, goldens: ModuleType) -> None:
    name, arguments = COMPRESSED[case]
    compressor, scheme = goldens.compressor_of(**arguments)
    shape = (256, 384) if name == "fp8_block" else (24, 160)
    weight = random_weight(seed, *shape).bfloat16()
    ours = as_compressed_tensors_has_it(name, PACKERS[name](weight))
    assert layout(ours).name == name
    back = compressor.decompress(ours, scheme)["weight"]
    assert back.dtype is torch.bfloat16
    assert same(dequantize(ours, torch.bfloat16), back)
    torch.testing.assert_close(raw_numbers(ours), back.double(), rtol=2**-8, atol=1e-38)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", COMPRESSED)
def test_we_read_what_compressed_tensors_packs_as_it_does(case: str, seed: int, goldens: ModuleType) -> None:
    """Its own observers' scales, its compressor, its decompressor; the parts it writes are recognised as the format."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    name, arguments = COMPRESSED[case]
    compressor, scheme = goldens.compressor_of(**arguments)
    shape = (256, 384) if name == "fp8_block" else (24, 160)
    weight = random_weight(seed, *shape).bfloat16()
    factor = generate_gparam(weight.float().amin(), weight.float().amax()) if name == "nvfp4_ct" else None
    scale, _ = calculate_qparams(*extremes(weight, arguments), scheme.weights, factor)
    given = {"weight": weight, "weight_scale": scale}
    packed = compressor.compress(given if factor is None else given | {"weight_global_scale": factor}, scheme)
    assert layout(packed).name == name
    back = compressor.decompress(packed, scheme)["weight"]
    assert same(dequantize(packed, back.dtype), back)


def extremes(weight: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of what shares a scale, in the scales' shape."""
    strategy = arguments["strategy"]
    if strategy == "block":
        blocks = weight.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    groups = weight.unflatten(-1, (-1, arguments.get("group_size", weight.shape[-1])))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float32])
def test_int4_scales_of_every_dtype(scale: torch.dtype, goldens: ModuleType) -> None:
    compressor, scheme = goldens.compressor_of(**COMPRESSED["pack-quantized"][1])
    ours = PACKERS["int4_g32"](random_weight(2))
    ours["weight_scale"] = (ours["weight_scale"].double() * 1.001).to(scale)
    back = compressor.decompress(ours, scheme)["weight"]
    assert back.dtype is scale and torch.equal(dequantize(ours, scale), back)


@pytest.mark.parametrize("case", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_any_bytes_of_fp4_mean_the_same_to_compressed_tensors(case: str, goldens: ModuleType) -> None:
    name, arguments = COMPRESSED[case]
    compressor, scheme = goldens.compressor_of(**arguments)
    stored = {"weight_packed": random_bytes(0, 256, 16)}
    if name == "nvfp4_ct":
        codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2).contiguous()
        stored |= {"weight_scale": codes.view(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([3.7])}
    else:
        # 255 is NaN by the standard; it comes to infinity there.
        stored["weight_scale"] = torch.arange(256, dtype=torch.uint8).clamp(max=254)[:, None]
    back = compressor.decompress(stored, scheme)["weight"]
    assert same(dequantize(stored, torch.bfloat16), back)


# -- amd-quark ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_quark_reads_what_we_pack_as_we_do(seed: int) -> None:
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import Pack_fp4

    ours = PACKERS["mxfp4"](random_weight(seed))
    scale = 2.0 ** (ours["weight_scale"].int() - 127)
    assert torch.equal(to_e8m0_uint8(scale), ours["weight_scale"])
    packer = Pack_fp4(None, "fp4")
    numbers = packer.unpack(ours["weight"], reorder=False)
    assert torch.equal(packer.pack(numbers.clone(), reorder=False), ours["weight"])
    back = numbers * scale.repeat_interleave(32, dim=-1)
    assert torch.equal(dequantize(ours), back)


# -- transformers ---------------------------------------------------------------------------------------------------


def fp8_quantizer(scale_fmt: str | None) -> SimpleNamespace:
    """All that transformers' FP8 conversions read of its quantizer."""
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_we_read_deepseek_fp8_as_transformers_does(scale_fmt: str | None, seed: int) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    quantizer = fp8_quantizer(scale_fmt)
    packed = Fp8Quantize(quantizer).convert({"weight": random_weight(seed, 256, 384)})
    assert layout(packed).name == "fp8_block"
    if scale_fmt:
        assert packed["weight_scale_inv"].dtype is torch.float8_e8m0fnu
    for stored in (packed, PACKERS["fp8_block"](random_weight(seed, 256, 384))):
        for dtype in (torch.float32, torch.bfloat16):
            back = Fp8Dequantize(quantizer)._dequantize_one(stored["weight"], stored["weight_scale_inv"], dtype)
            assert torch.equal(dequantize(stored, dtype), back)


def test_we_read_deepseek_v4s_experts_as_transformers_does() -> None:
    """MXFP4 in I8 with E8M0 scales, which it tells from FP8 by the dtype alone; and MXFP8 by the grid of its scales."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    read = Fp8Dequantize(fp8_quantizer("ue8m0"))._dequantize_one
    packed = PACKERS["mxfp4"](random_weight(1, 64, 256))
    stored = {"weight": packed["weight"].view(torch.int8), "scale": packed["weight_scale"].view(torch.float8_e8m0fnu)}
    assert layout(stored).name == "mxfp4"
    assert torch.equal(dequantize(stored), read(stored["weight"], stored["scale"], torch.float32))
    eight = PACKERS["mxfp8"](random_weight(2, 64, 256))
    assert torch.equal(dequantize(eight), read(eight["weight"], eight["weight_scale"], torch.float32))


@pytest.mark.parametrize("seed", range(3))
def test_we_read_gpt_oss_as_transformers_does(seed: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_bytes(seed, 3, 8, 5, 16), random_bytes(seed + 9, 3, 8, 5).clamp(5, 250)
    back = convert_moe_packed_tensors(blocks, scales).transpose(-2, -1)
    for expert in range(3):
        stored = {"weight": join_blocks(blocks[expert]), "weight_scale": scales[expert]}
        assert torch.equal(dequantize(stored, torch.bfloat16), back[expert])


# -- ModelOpt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_modelopt_packs_and_reads_as_we_do(seed: int) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT)
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    weight = random_weight(seed).bfloat16()
    quantized, scale, factor = NVFP4QTensor.quantize(weight.clone(), 16)
    theirs = {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": factor.reshape(())}
    assert layout(theirs).name == "nvfp4"
    for dtype in (torch.float32, torch.bfloat16):
        back = quantized.dequantize(dtype, scale=scale, double_scale=factor, block_sizes={-1: 16})
        assert torch.equal(dequantize(theirs, dtype), back)
    ours = PACKERS["nvfp4"](weight)
    for suffix in theirs:
        assert torch.equal(ours[suffix].float(), theirs[suffix].float()), suffix
