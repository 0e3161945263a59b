"""Let compressed-tensors' own library quantize the linear layers of a checkpoint; imports it only when asked to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.loader.surgery import rewrite

SCHEMES = {"int4_g32": "W4A16", "fp8_channel": "FP8_DYNAMIC", "nvfp4_ct": "NVFP4A16", "mxfp4": "MXFP4A16"}
"""Our format to the library's preset."""
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape")


def quantize(folder: Path, format_name: str, ignore: Sequence[str]) -> None:
    """Quantize every matrix of the checkpoint's MLPs that no entry of `ignore` covers, and say so in config.json."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(SCHEMES[format_name], ["Linear"])
    if format_name == "int4_g32":
        scheme.weights.group_size = 32
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore), quantization_status="frozen")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tree = nn.Module()
        names = [name for name, one in tensors.items() if name.endswith("_proj.weight") and one.dim() == 2]
        for name in names:
            place(tree, name.removesuffix(".weight"), tensors.pop(name))
        apply_quantization_config(tree, config)
        for module in tree.modules():
            if hasattr(module, "quantization_scheme"):
                calibrate(module)
        compressor = ModelCompressor.from_pretrained_model(tree)
        compressor.compress_model(tree)
        tensors.update({name: one.detach().contiguous() for name, one in tree.state_dict().items()})
        compressor.update_config(folder)

    rewrite(folder, change)


def place(tree: nn.Module, path: str, weight: torch.Tensor) -> None:
    """Put a linear layer where its name says."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(tree, name):
            tree.add_module(name, nn.Module())
        tree = getattr(tree, name)
    linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    tree.add_module(leaf, linear)


def calibrate(module: Any) -> None:
    """Scales from the weight alone, by the library's own arithmetic."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.data
    factor = None
    if hasattr(module, "weight_global_scale"):
        factor = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
        module.weight_global_scale.data.copy_(factor)
    grouped = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight.unsqueeze(1)
    least, most = grouped.aminmax(dim=-1)
    scale, _ = calculate_qparams(least, most, args, global_scale=factor)
    module.weight_scale.data.copy_(scale)


def decompress(folder: Path, out: Path) -> Path:
    """The same checkpoint as the library multiplies it out, plain."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text("utf-8"))
    found = QuantizationConfig.model_validate(config.pop("quantization_config"))
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    scheme = found.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for path in {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_packed")}:
            parts = {suffix: tensors.pop(f"{path}.{suffix}") for suffix in SUFFIXES if f"{path}.{suffix}" in tensors}
            tensors[f"{path}.weight"] = compressor.decompress(parts, scheme)["weight"]

    rewrite(out, change)
    return out
