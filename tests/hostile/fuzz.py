"""Headers, indexes and configs at random: mostly right, so that the reader gets far, with a few things changed.

Each is made from one number, which a failing test shows: 100 000 of them then take minutes and not hours.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from random import Random
from typing import Any

from gatekeeper.checkpoint import DTYPE_BITS
from tests.hostile.corpus import CONFIG

NUMBERS = [0, 1, 2, -1, 8, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, 1e300]
ODD: list[Any] = [*NUMBERS, "1", "", None, True, [], {}, [1], {"a": 1}]
TOKENS = [bytes([one]) for one in b'{}[],:"\\']
TOKENS += [b"0", b"-0", b"9", b"1e5", b"null", b"NaN", b" ", b"\n", b"\0"]
TOKENS += [b"\xff", b"\xef\xbb\xbf", b"\\u0000", b"\\ud800", b'"a":', b"[[[[[[[[" * 40, b"1" * 30, b"9" * 20]
FITTING: list[Any] = ["F32", "bf16", "U8", [2, 2], [1] * 33, [0, 2**63], [2**62, 2**62, 0]]
NAMES = ["a", "b", "c", "model.layers.0.w", "", "é", "\0", "x" * 60, "__metadata__"]


def changed_bytes(random: Random, raw: bytes, most: int = 2) -> bytes:
    """The text with up to `most` tokens put in, in place of what was there or beside it."""
    for _ in range(random.randint(0, most)):
        at = random.randint(0, len(raw))
        raw = raw[:at] + random.choice(TOKENS) + raw[at + random.randint(0, 2) :]
    return raw


def shards(random: Random) -> bytes:
    """A whole safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name in random.sample(NAMES, random.randint(0, 4)):
        dtype = random.choice([*DTYPE_BITS])
        shape = random.choices([0, 1, 2, 3, 8], k=random.randint(0, 3))
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header.pop("__metadata__", None)
    if random.randint(0, 3) == 0:
        header["__metadata__"] = random.choice([{}, {"format": "pt"}, {"a": 1}, None, [], "x"])
    for _ in range(random.choice([0, 0, 1, 1, 2])):
        spoil(random, header)
    raw = json.dumps(header, separators=random.choice([(",", ":"), None])).encode()
    raw = changed_bytes(random, raw, random.choice([0, 0, 2]))
    claimed = len(raw) + random.choice([0] * 12 + [1, -1, 8, 10**6, 10**9])
    whole = max(0, claimed).to_bytes(8, "little") + raw + bytes(min(end, 10_000))
    return whole[: len(whole) - random.choice([0] * 12 + [1, 8, 40])] + bytes(random.choice([0] * 12 + [1]))


def spoil(random: Random, header: dict[str, Any]) -> None:
    """Change one thing of one entry."""
    if not header:
        return
    name = random.choice([*header])
    entry = header[name]
    if not isinstance(entry, dict) or name == "__metadata__" or not random.randint(0, 5):
        header[name] = deepcopy(random.choice(ODD))
        return
    key = random.choice(["dtype", "shape", "data_offsets", "more"])
    old = entry.get(key)
    if isinstance(old, list) and old and random.random() < 0.5:
        old = list(old)
        old[random.randint(0, len(old) - 1)] = deepcopy(random.choice(ODD))
        entry[key] = old
    elif key == "data_offsets" and isinstance(old, list) and all(type(each) is int for each in old):
        shift = random.choice([1, -1, 4, 2**40])
        entry[key] = [position + shift for position in old]
    elif random.randint(0, 4):
        entry[key] = deepcopy(
            random.choice([*ODD, "F32", "bf16", "U8", [2, 2], [1] * 33, [0, 2**63], [2**33] * 2 + [0]])
        )
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


def indexes(random: Random, absolute: str) -> bytes:
    """The text of an index; `absolute` is a path outside that it may name."""
    places = [*PLACES, absolute]
    weight_map: Any = {"a": "a.safetensors", "b": "b.safetensors"}
    for name in random.choices(["a", "b", "c", "", "é"], k=random.randint(0, 2)):
        weight_map[name] = random.choice(places) if random.randint(0, 7) else deepcopy(random.choice(ODD))
    if not random.randint(0, 9):
        weight_map = deepcopy(random.choice(ODD))
    document: Any = {"metadata": random.choice([{}, {"total_size": 5}, None, *ODD]), "weight_map": weight_map}
    if not random.randint(0, 9):
        document = deepcopy(random.choice([weight_map, *ODD]))
    return changed_bytes(random, json.dumps(document).encode(), random.choice([0, 0, 2]))


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


def configs(random: Random) -> bytes:
    """The text of a config.json."""
    config: Any = json.loads(json.dumps({**CONFIG, "quantization_config": random.choice([*QUANTIZED, None])}))
    if not random.randint(0, 5):
        config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": config}
    for _ in range(random.randint(0, 3)):
        place: Any = config
        while isinstance(place, dict | list) and place:
            key = random.choice([*place] if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not random.randint(0, 2):
                place[key] = deepcopy(random.choice(VALUES))
                break
            place = place[key]
    return changed_bytes(random, json.dumps(config).encode(), random.choice([0, 0, 0, 1]))
