"""Write tests/loader/goldens: weights packed by each format's own library, which `make test` compares with offline.

Needs the packages of tests/conformance.txt on the path; `make test-full` installs them and runs this against the files
that are there. To renew them: PYTHONPATH=FOLDER python scripts/make_goldens.py tests/loader/goldens
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 6, 96


def weight() -> Tensor:
    """Numbers of either sign over a few orders of magnitude, from integers, so that every torch makes the same."""
    steps = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    size = torch.tensor([0.01, 0.1, 1.0, 3.0, 0.3, 0.03])[:, None]
    return (((steps * 7919 + 104729) % 2003 - 1001).float() / 1001 * size).to(torch.bfloat16)


def int4_g32() -> dict[str, Any]:
    """compressed-tensors: quantize, pack and unpack by `PackedQuantizationCompressor`."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    plain = weight()
    # A little too small a scale, so that the ends of the range are clamped and -8 occurs.
    scale = (plain.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 7.4).to(torch.bfloat16)
    packed = PackedQuantizationCompressor.compress({"weight": plain, "weight_scale": scale}, scheme)
    back = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return _golden("compressed-tensors", packed, back)


def mxfp4() -> dict[str, Any]:
    """Quark: numbers by `Pack_fp4`, scales by `to_e8m0_uint8`, from 2**-20 to 2**9."""
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import Pack_fp4

    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    picks = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5 % 16
    numbers = table[picks % 8] * torch.where(picks < 8, 1.0, -1.0)
    exponents = torch.arange(ROWS * COLUMNS // 32).reshape(ROWS, -1) * 7 % 30 - 20
    scales = 2.0**exponents
    packer = Pack_fp4(None, "fp4")
    packed = packer.pack(numbers.clone(), reorder=False)
    back = packer.unpack(packed, reorder=False) * scales.repeat_interleave(32, dim=-1)
    return _golden("amd-quark", {"weight": packed, "weight_scale": to_e8m0_uint8(scales)}, back)


GOLDENS = {"int4_g32": int4_g32, "mxfp4": mxfp4}


def _golden(library: str, parts: dict[str, Tensor], back: Tensor) -> dict[str, Any]:
    return {
        "written_by": f"{library} {version(library)}",
        "parts": {suffix: _tensor(part) for suffix, part in sorted(parts.items())},
        "dequantized": _tensor(back),
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    words = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32"}
    whole = tensor.contiguous()
    data = ctypes.string_at(whole.data_ptr(), whole.nbytes)
    return {"dtype": words[whole.dtype], "shape": list(whole.shape), "data": base64.b64encode(data).decode()}


def main(folder: Path) -> None:
    """Write one file a format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in GOLDENS.items():
        text = json.dumps(make(), indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_goldens.py FOLDER")
    main(Path(sys.argv[1]))
