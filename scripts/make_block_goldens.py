"""Write tests/loader/goldens/blocks: one MoE block of each kind with what transformers makes of it, for `make test`.

Needs the packages of tests/transformers.txt on the path; `make test-full` installs them and compares what they write
with the files that are there. To renew them: PYTHONPATH=.:FOLDER python scripts/make_block_goldens.py [NAME...]
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.loader.tiny_models import MODELS, Tiny, blocks, make, read

OUT = Path(__file__).resolve().parent.parent / "tests" / "loader" / "goldens" / "blocks"
NAMES = ("DeepSeek-V2", "DeepSeek-V3", "GLM-4.5", "Qwen3-Next", "Mixtral", "MiniMax-M2", "MiniMax-M3", "gpt-oss")
NAMES += ("Llama-4",)
SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2}
WORDS = {torch.bfloat16: "BF16", torch.float32: "F32"}


def small(tiny: Tiny) -> Tiny:
    """The model with the least widths and two layers, and its experts as its authors name them."""

    def change(config: Mapping[str, Any]) -> dict[str, Any]:
        if "text_config" in config:
            return {**config, "text_config": change(config["text_config"])}
        sizes = {key: size for key, size in SIZES.items() if key in config}
        if "moe_intermediate_size" not in config:
            sizes["intermediate_size"] = 8
        widths = ("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp")
        sizes |= {key: 8 for key in widths if key in config}
        lists = {key: value[:2] for key, value in config.items() if key.endswith(("layer_types", "moe_layer_freq"))}
        lists = {key: value for key, value in lists.items() if isinstance(value, list)}
        return {**config, **sizes, **lists}

    return replace(tiny, config=change(tiny.config))


def golden(name: str) -> dict[str, Any]:
    """One file: config.json, the tensors of the last layer's block, what goes into it and what comes out in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(small(MODELS[name])).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = read(folder)
        block = model.get_submodule(blocks(model)[1])
        x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(7)).bfloat16().float()
        with torch.no_grad():
            y = block(x)
        tensors: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                tensors |= {n: file.get_tensor(n) for n in sorted(file.keys()) if f"layers.1.{leaf(n)}." in n}
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    return {
        "written_by": f"transformers {version('transformers')}",
        "config": config,
        "tensors": {n: stored(t) for n, t in tensors.items()},
        "x": stored(x),
        "y": stored(y),
    }


def leaf(name: str) -> str:
    """What the block of a tensor is called in its layer; nothing that is not in one."""
    return next((part for part in ("mlp", "block_sparse_moe", "feed_forward") if f".{part}." in name), "-")


def stored(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape and bytes."""
    whole = tensor.detach().contiguous()
    data = ctypes.string_at(whole.data_ptr(), whole.nbytes)
    return {"dtype": WORDS[whole.dtype], "shape": list(whole.shape), "data": base64.b64encode(data).decode()}


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[1:] or NAMES:
        (OUT / f"{each}.json").write_text(json.dumps(golden(each), indent=1) + "\n", encoding="utf-8")
