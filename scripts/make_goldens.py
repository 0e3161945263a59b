"""Write tests/loader/goldens: weights packed by each format's own library, which `make test` compares with offline.

Needs the packages of tests/conformance.txt on the path; `make test-full` installs them and runs this against the files
that are there. To renew them: PYTHONPATH=FOLDER python scripts/make_goldens.py tests/loader/goldens [NAME...]
`nvfp4` needs nvidia-modelopt 0.47.0 with its dependencies and `requests` besides, which no suite installs.
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 6, 96


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Numbers of either sign over a few orders of magnitude, from integers, so that every torch makes the same."""
    steps = torch.arange(rows * columns).reshape(rows, columns)
    size = torch.tensor([0.01, 0.1, 1.0, 3.0, 0.3, 0.03]).repeat(rows // 6 + 1)[:rows, None]
    return (((steps * 7919 + 104729) % 2003 - 1001).float() / 1001 * size).to(torch.bfloat16)


def int4_g32() -> dict[str, Any]:
    """compressed-tensors: quantize, pack and unpack by `PackedQuantizationCompressor`."""
    plain = weight()
    # A little too small a scale, so that the ends of the range are clamped and -8 occurs.
    scale = (_amax(plain, 32) / 7.4).to(torch.bfloat16)
    return compressed(plain, scale, num_bits=4, type="int", strategy="group", group_size=32)


def fp8_channel() -> dict[str, Any]:
    """compressed-tensors `float-quantized`, a scale to each row."""
    plain = weight()
    scale = (plain.float().abs().amax(-1, keepdim=True) / 448).to(torch.bfloat16)
    return compressed(plain, scale, num_bits=8, type="float", strategy="channel")


def fp8_tensor() -> dict[str, Any]:
    """compressed-tensors `float-quantized`, one scale."""
    plain = weight()
    scale = (plain.float().abs().amax() / 448).to(torch.bfloat16).reshape(1)
    return compressed(plain, scale, num_bits=8, type="float", strategy="tensor")


def fp8_block_ct() -> dict[str, Any]:
    """compressed-tensors `float-quantized` in blocks; the second one has two rows."""
    plain = weight(130, 6)
    scale = torch.stack([block.float().abs().amax() / 448 for block in plain.split(128)])[:, None].to(torch.bfloat16)
    return compressed(plain, scale, num_bits=8, type="float", strategy="block", block_structure=[128, 128])


def mxfp8() -> dict[str, Any]:
    """compressed-tensors `mxfp8-quantized`; its scales are powers of two before they are packed."""
    plain = weight()
    scale = _power_of_two(_amax(plain, 32) / 448)
    wanted = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    return compressed(plain, scale, **wanted)


def mxfp4_ct() -> dict[str, Any]:
    """compressed-tensors `mxfp4-pack-quantized`."""
    plain = weight()
    scale = _power_of_two(_amax(plain, 32) / 6)
    wanted = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    return compressed(plain, scale, **wanted)


def nvfp4_ct() -> dict[str, Any]:
    """compressed-tensors `nvfp4-pack-quantized`; `generate_gparam` makes the matrix's factor."""
    from compressed_tensors.quantization.utils import generate_gparam

    plain = weight()
    factor = generate_gparam(plain.float().amin(), plain.float().amax())
    scale = (factor * _amax(plain, 16) / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return compressed(plain.float(), scale, factor, scale_dtype=torch.float8_e4m3fn, **wanted)


def compressed(plain: Tensor, scale: Tensor, factor: Tensor | None = None, **arguments: Any) -> dict[str, Any]:
    """What compressed-tensors' own compressor and decompressor for these arguments make of a weight."""
    compressor, scheme = compressor_of(**arguments)
    given = {"weight": plain, "weight_scale": scale} | ({} if factor is None else {"weight_global_scale": factor})
    packed = compressor.compress(given, scheme)
    return _golden("compressed-tensors", packed, compressor.decompress(packed, scheme)["weight"])


def compressor_of(**arguments: Any) -> tuple[Any, Any]:
    """The compressor that compressed-tensors picks for these weights, and their scheme."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **arguments))
    name = infer_module_format(torch.nn.Linear, scheme)
    return BaseCompressor.get_value_from_registry(name.value), scheme


def mxfp4() -> dict[str, Any]:
    """Quark: numbers by `Pack_fp4`, scales by `to_e8m0_uint8`, from 2**-20 to 2**9."""
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import Pack_fp4

    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    picks = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5 % 16
    numbers = table[picks % 8] * torch.where(picks < 8, 1.0, -1.0)
    scales = 2.0 ** _exponents()
    packer = Pack_fp4(None, "fp4")
    packed = packer.pack(numbers.clone(), reorder=False)
    back = packer.unpack(packed, reorder=False) * scales.repeat_interleave(32, dim=-1)
    return _golden("amd-quark", {"weight": packed, "weight_scale": to_e8m0_uint8(scales)}, back)


def mxfp4_gpt_oss() -> dict[str, Any]:
    """transformers: every byte twice, as `convert_moe_packed_tensors` reads gpt-oss's blocks; it transposes at last."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = (torch.arange(ROWS * COLUMNS // 2) * 7 % 256).to(torch.uint8).reshape(ROWS, COLUMNS // 32, 16)
    scales = (_exponents() + 127).to(torch.uint8)
    back = convert_moe_packed_tensors(blocks[None], scales[None])[0].T
    return _golden("transformers", {"blocks": blocks, "scales": scales}, back)


def nvfp4() -> dict[str, Any]:
    """ModelOpt: `NVFP4QTensor.quantize` and its `dequantize`."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    quantized, scale, factor = NVFP4QTensor.quantize(weight(), 16)
    back = quantized.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
    parts = {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": factor.reshape(())}
    return _golden("nvidia-modelopt", parts, back)


GOLDENS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "fp8_block_ct": ("fp8_block", fp8_block_ct),
    "fp8_channel": ("fp8_channel", fp8_channel),
    "fp8_tensor": ("fp8_tensor", fp8_tensor),
    "int4_g32": ("int4_g32", int4_g32),
    "mxfp4": ("mxfp4", mxfp4),
    "mxfp4_ct": ("mxfp4", mxfp4_ct),
    "mxfp4_gpt_oss": ("mxfp4", mxfp4_gpt_oss),
    "mxfp8": ("mxfp8", mxfp8),
    "nvfp4": ("nvfp4", nvfp4),
    "nvfp4_ct": ("nvfp4_ct", nvfp4_ct),
}
"""File to our name for the format and the function that has its bytes written."""


def make(name: str) -> dict[str, Any]:
    """One golden, as it stands in its file."""
    format_name, write = GOLDENS[name]
    return {"format": format_name, **write()}


def _amax(plain: Tensor, group: int) -> Tensor:
    return plain.float().unflatten(-1, (-1, group)).abs().amax(-1)


def _power_of_two(scale: Tensor) -> Tensor:
    return 2.0 ** scale.log2().ceil()


def _exponents() -> Tensor:
    return torch.arange(ROWS * COLUMNS // 32).reshape(ROWS, -1) * 7 % 30 - 20


def _golden(library: str, parts: dict[str, Tensor], back: Tensor) -> dict[str, Any]:
    return {
        "written_by": f"{library} {version(library)}",
        "parts": {suffix: _tensor(part) for suffix, part in sorted(parts.items())},
        "dequantized": _tensor(back),
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    words = {
        torch.uint8: "U8",
        torch.int32: "I32",
        torch.int64: "I64",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float8_e4m3fn: "F8_E4M3",
    }
    whole = tensor.detach().contiguous()
    data = ctypes.string_at(whole.data_ptr(), whole.nbytes)
    return {"dtype": words[whole.dtype], "shape": list(whole.shape), "data": base64.b64encode(data).decode()}


def main(folder: Path, names: Sequence[str]) -> None:
    """Write one file for each of `names`; for all of them where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or GOLDENS:
        text = json.dumps(make(name), indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: make_goldens.py FOLDER [NAME...]")
    main(Path(sys.argv[1]), sys.argv[2:])
