"""Headers, indexes and configs at random: mostly right, so that the reader gets far, with a few things changed."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from gatekeeper.checkpoint import DTYPE_BITS
from tests.hostile.corpus import CONFIG

NUMBERS = [0, 1, 2, -1, 8, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, 1e300]
ODD: list[Any] = [*NUMBERS, "1", "", None, True, [], {}, [1], {"a": 1}]
TOKENS = [bytes([one]) for one in b'{}[],:"\\']
TOKENS += [b"0", b"-0", b"9", b"1e5", b"null", b"NaN", b" ", b"\n", b"\0"]
TOKENS += [b"\xff", b"\xef\xbb\xbf", b"\\u0000", b"\\ud800", b'"a":', b"[[[[[[[[" * 40, b"1" * 30, b"9" * 20]
NAMES = ["a", "b", "c", "model.layers.0.w", "", "é", "\0", "x" * 60, "__metadata__"]


def changed_bytes(draw: st.DrawFn, raw: bytes, most: int = 2) -> bytes:
    """The text with up to `most` tokens put in, in place of what was there or beside it."""
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.sampled_from(TOKENS)) + raw[at + draw(st.integers(0, 2)) :]
    return raw


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A whole safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True)):
        dtype = draw(st.sampled_from([*DTYPE_BITS]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8]), max_size=3))
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header.pop("__metadata__", None)
    if draw(st.integers(0, 3)) == 0:
        header["__metadata__"] = draw(st.sampled_from([{}, {"format": "pt"}, {"a": 1}, None, [], "x"]))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        spoil(draw, header)
    raw = json.dumps(header, separators=draw(st.sampled_from([(",", ":"), None]))).encode()
    raw = changed_bytes(draw, raw, draw(st.sampled_from([0, 0, 2])))
    claimed = len(raw) + draw(st.sampled_from([0] * 12 + [1, -1, 8, 10**6, 10**9]))
    whole = max(0, claimed).to_bytes(8, "little") + raw + bytes(min(end, 10_000))
    return whole[: len(whole) - draw(st.sampled_from([0] * 12 + [1, 8, 40]))] + bytes(
        draw(st.sampled_from([0] * 12 + [1]))
    )


def spoil(draw: st.DrawFn, header: dict[str, Any]) -> None:
    """Change one thing of one entry."""
    if not header:
        return
    name = draw(st.sampled_from([*header]))
    entry = header[name]
    if not isinstance(entry, dict) or name == "__metadata__" or not draw(st.integers(0, 5)):
        header[name] = draw(st.sampled_from(ODD))
        return
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    old = entry.get(key)
    if isinstance(old, list) and old and draw(st.booleans()):
        old = list(old)
        old[draw(st.integers(0, len(old) - 1))] = draw(st.sampled_from(ODD))
        entry[key] = old
    elif key == "data_offsets" and isinstance(old, list) and all(type(each) is int for each in old):
        shift = draw(st.sampled_from([1, -1, 4, 2**40]))
        entry[key] = [position + shift for position in old]
    elif draw(st.integers(0, 4)):
        entry[key] = draw(st.sampled_from([*ODD, "F32", "bf16", "U8", [2, 2], [1] * 33, [0, 2**63], [2**33] * 2 + [0]]))
    else:
        entry.pop(key, None)


PLACES = ["a.safetensors", "b.safetensors", "../out.safetensors", "../../out.safetensors", "sub/../../out.safetensors"]
PLACES += ["link.safetensors", "circle.safetensors", "pipe.safetensors", "sub.safetensors", "gone.safetensors", ""]
PLACES += ["..\\out.safetensors", "C:\\out.safetensors", "nul\0.safetensors", "x" * 300 + ".safetensors", "/dev/zero"]
PLACES += [
    "pytorch_model.bin",
    ".",
    "./a.safetensors",
    "sub/link/out.safetensors",
    "~/out.safetensors",
    "\ud800.safetensors",
]


@st.composite
def indexes(draw: st.DrawFn, absolute: str) -> bytes:
    """The text of an index; `absolute` is a path outside that it may name."""
    places = st.sampled_from([*PLACES, absolute])
    weight_map: Any = {"a": "a.safetensors", "b": "b.safetensors"}
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "", "é"]), max_size=2)):
        weight_map[name] = draw(places) if draw(st.integers(0, 7)) else draw(st.sampled_from(ODD))
    if not draw(st.integers(0, 9)):
        weight_map = draw(st.sampled_from(ODD))
    document: Any = {"metadata": draw(st.sampled_from([{}, {"total_size": 5}, None, *ODD])), "weight_map": weight_map}
    if not draw(st.integers(0, 9)):
        document = draw(st.sampled_from([weight_map, *ODD]))
    return changed_bytes(draw, json.dumps(document).encode(), draw(st.sampled_from([0, 0, 2])))


QUANTIZED: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "quark", "exclude": ["re:.*self_attn.*"], "global_quant_config": {"weight": {"dtype": "fp4"}}},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head*"], "quantized_layers": {"a": "FP8"}},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["re:.*shared_experts.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
]
PATTERNS = ["re:(", "re:(a+)+$", "re:.*e.*e.*e", "re:[", "re:\\", "re:", "re:(?P<n>a)(?P=n)", "re:" + "x" * 600]
PATTERNS += ["[", "*", "**", "?" * 40, "", "Linear"]
VALUES: list[Any] = [*ODD, *PATTERNS, PATTERNS, *([one] for one in PATTERNS), -(2**63)]


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """The text of a config.json."""
    config: Any = json.loads(json.dumps({**CONFIG, "quantization_config": draw(st.sampled_from([*QUANTIZED, None]))}))
    if not draw(st.integers(0, 5)):
        config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": config}
    for _ in range(draw(st.integers(0, 3))):
        place: Any = config
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not draw(st.integers(0, 2)):
                place[key] = draw(st.sampled_from(VALUES))
                break
            place = place[key]
    return changed_bytes(draw, json.dumps(config).encode(), draw(st.sampled_from([0, 0, 0, 1])))
