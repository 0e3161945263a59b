"""Each quantization method's way of saying how a module is stored: module to format, or unknown with a note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gatekeeper.errors import FactError
from gatekeeper.names import finder, spellings
from gatekeeper.values import ABSENT

if TYPE_CHECKING:
    from gatekeeper.providers.quantization import LayerReader

DTYPE_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

MODELOPT_ALGOS = {
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A8_NVFP4_FP8": "nvfp4",
    "FP8": "fp8_tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "MXFP8": "mxfp8",
    "W4A8_MXFP4_FP8": "mxfp4",
}
"""`QUANTIZATION_*` of ModelOpt's export (modelopt/torch/export/model_config.py), where a format of ours stores them."""

Kind = Literal["routed", "shared"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a module is stored: a format by name (None: unknown, and `note` says why), and its scales where open."""

    format: str | None
    scale_dtype: str | None = None
    note: str = ""


SchemeOf: TypeAlias = Callable[[str, Kind], "Scheme | None"]
"""Module and kind of expert to its scheme; None: it is not quantized."""


# One function for each method: given the reader of a config, it returns the method's `SchemeOf`.


def _fp8(reader: LayerReader) -> SchemeOf:
    """DeepSeek's and transformers' `fp8`: scales to blocks or to matrices; V4's experts are FP4 by `expert_dtype`."""
    assert reader.found is not None
    raw = reader.found.raw
    block = raw.get("weight_block_size")
    scales = reader.family.ue8m0_scales if raw.get("scale_fmt") == "ue8m0" else "fp32"
    if block is None:
        base = Scheme("fp8_tensor", "fp32")
    elif block == [128, 128]:
        base = Scheme("fp8_block", scales)
    elif block == [1, 32]:
        base = Scheme("mxfp8")
    else:
        base = Scheme(None, note=f"FP8 in blocks of {block} is not known here")
    expert_dtype = reader.values.get("quant.expert_dtype", ABSENT)
    overrides = _quantized_layers(reader)
    # The list of who quantized a part of it again says what that part leaves as it was, in FP8.
    is_requantized = bool(overrides) and reader.found.writer != "fp8"

    def scheme(module: str, kind: Kind) -> Scheme | None:
        override = _override(overrides, module)
        if override is not None:
            return override
        if reader.ignored(module) and not is_requantized:
            return None
        if kind == "routed" and expert_dtype is not ABSENT:
            if expert_dtype == "fp4":
                return Scheme("mxfp4")
            return (
                base if expert_dtype == "fp8" else Scheme(None, note=f"expert_dtype `{expert_dtype}` is not known here")
            )
        return base

    return scheme


def _mxfp4(reader: LayerReader) -> SchemeOf:
    return lambda module, kind: None if reader.ignored(module) else Scheme("mxfp4")


def _modelopt(reader: LayerReader) -> SchemeOf:
    assert reader.found is not None
    raw = reader.found.raw
    algo = str(raw.get("quant_algo", "")).upper()
    mixed = algo == "MIXED_PRECISION"
    overrides = _quantized_layers(reader)
    base = _algo(algo, raw.get("group_size"))

    def scheme(module: str, kind: Kind) -> Scheme | None:
        if reader.ignored(module):
            return None
        override = _override(overrides, module)
        if override is not None or mixed:
            return override  # what MIXED_PRECISION does not list is not quantized
        return base

    return scheme


def _algo(algo: str, group_size: Any) -> Scheme:
    name = MODELOPT_ALGOS.get(algo)
    if name is None:
        return Scheme(None, note=f"ModelOpt's quant_algo `{algo}` is not known here")
    if name == "nvfp4" and group_size not in (None, 16):
        return Scheme(None, note=f"NVFP4 in groups of {group_size} is not known here")
    return Scheme(name, "fp32" if name.startswith("fp8") else None)


def _quantized_layers(reader: LayerReader) -> Mapping[str, Scheme]:
    """ModelOpt's `quantized_layers`: module to algorithm."""
    assert reader.found is not None
    raw = reader.found.raw.get("quantized_layers") or {}
    if not isinstance(raw, Mapping):
        raise FactError(f"`quantized_layers` is not a mapping (from {reader.found.where})")
    found: dict[str, Scheme] = {}
    for name, entry in raw.items():
        known = isinstance(entry, Mapping)
        algo = str(entry.get("quant_algo", "") if known else entry).upper()
        found[name] = _algo(algo, entry.get("group_size") if known else None)
    return found


def _override(overrides: Mapping[str, Scheme], module: str) -> Scheme | None:
    """The entry for a module or for the nearest module around it (`mlp.experts` for an expert's projection)."""
    if not overrides:
        return None
    for name in spellings(module):
        while name:
            if name in overrides:
                return overrides[name]
            name = name.rpartition(".")[0]
    return None


def _quark(reader: LayerReader) -> SchemeOf:
    assert reader.found is not None
    raw = reader.found.raw
    by_layer = raw.get("layer_quant_config") or {}
    by_type = raw.get("layer_type_quant_config") or {}
    base = raw.get("global_quant_config")
    if not isinstance(by_layer, Mapping) or not isinstance(by_type, Mapping):
        raise FactError(f"`layer_quant_config` is not a mapping (from {reader.found.where})")

    find = finder("quark", by_layer)

    def scheme(module: str, kind: Kind) -> Scheme | None:
        if reader.ignored(module):
            return None
        pattern = find(module)
        # Order of Quark: by name, by type, global (`QuarkConfig._find_matched_config` in vLLM's quark.py).
        spec = by_layer[pattern] if pattern is not None else by_type.get("Linear", base)
        return _quark_scheme(spec)

    return scheme


def _quark_scheme(spec: Any) -> Scheme | None:
    if not isinstance(spec, Mapping):
        return Scheme(None, note="Quark says nothing about these modules' weights")
    weight = spec.get("weight")
    if weight is None:
        return None
    if not isinstance(weight, Mapping):
        return Scheme(None, note="Quark weights quantized twice are not known here")
    dtype, how, group = weight.get("dtype"), weight.get("qscheme"), weight.get("group_size")
    if (dtype, how, group, weight.get("scale_format")) == ("fp4", "per_group", 32, "e8m0"):
        return Scheme("mxfp4")
    if dtype == "fp8_e4m3" and how in ("per_tensor", "per_channel"):
        return Scheme("fp8_tensor" if how == "per_tensor" else "fp8_channel", "fp32")
    return Scheme(None, note=f"Quark's {dtype} {how} (group {group}) is not known here")


def _compressed_tensors(reader: LayerReader) -> SchemeOf:
    assert reader.found is not None
    raw = reader.found.raw
    groups = raw.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise FactError(f"`config_groups` is not a mapping of groups (from {reader.found.where})")
    names = reader.family.names.projections
    plain = {own: f"{projection}_proj" for projection, own in names.items()}

    def spelled(module: str) -> tuple[str, ...]:
        # Targets name what the quantizer saw; a checkpoint may have the authors' own w1, w3 and w2.
        parent, _, last = module.rpartition(".")
        return tuple(dict.fromkeys((module, f"{parent}.{plain.get(last, last)}")))

    schemes: dict[str, Scheme | None] = {}
    for group in groups.values():
        targets = group.get("targets") or ()
        if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
            raise FactError(f"`targets` of `config_groups` is not a list of names (from {reader.found.where})")
        for target in targets:
            schemes.setdefault(target, _ct_scheme(group, raw, reader))
    find = finder("compressed-tensors", (target for target in schemes if target != "Linear"))

    def scheme(module: str, kind: Kind) -> Scheme | None:
        candidates = spelled(module)
        if any(map(reader.ignored, candidates)):
            return None
        target = next(filter(None, map(find, candidates)), "Linear")
        return schemes.get(target)

    return scheme


def _ct_scheme(group: Mapping[str, Any], raw: Mapping[str, Any], reader: LayerReader) -> Scheme | None:
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        return Scheme(None, note="these compressed-tensors weights are not known here")
    packing = group.get("format") or raw.get("format")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    size = weights.get("group_size")
    own_scale = str(weights.get("scale_dtype") or "").removeprefix("torch.")
    scale = DTYPE_FORMATS.get(own_scale) or reader.scale_of_dtype
    if (bits, kind, strategy, size, packing) == (4, "int", "group", 32, "pack-quantized"):
        if weights.get("symmetric", True) and not weights.get("actorder"):
            return Scheme("int4_g32", scale)
    elif (bits, kind) == (4, "float") and size == 16 and packing == "nvfp4-pack-quantized":
        return Scheme("nvfp4_ct")
    elif (bits, kind) == (4, "float") and size == 32 and packing == "mxfp4-pack-quantized":
        return Scheme("mxfp4")
    elif (bits, kind) == (8, "float"):
        if strategy == "block" and weights.get("block_structure") == [128, 128]:
            return Scheme("fp8_block", scale)
        if strategy in ("channel", "tensor"):
            return Scheme(f"fp8_{strategy}", scale)
    return Scheme(
        None, note=f"compressed-tensors {packing} of {bits}-bit {kind} by {strategy} ({size}) is not known here"
    )


SCHEMES: Mapping[str, Callable[[LayerReader], SchemeOf]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "quark": _quark,
}
