"""quantization_config to `quant.*`, and to the storage of each MoE layer's experts as the config announces it.

A scheme that isn't understood here leaves the storage unknown, with a note; it is never taken for plain bf16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import FactError
from gatekeeper.families import MAX_EXPERTS, Family
from gatekeeper.formats import Format, Storage, storage
from gatekeeper.names import Excluded, Test, canonical_method, excluded, matcher
from gatekeeper.providers.config import ConfigFile, look_up, settled, typed
from gatekeeper.providers.schemes import DTYPE_FORMATS, SCHEMES, Kind, Scheme, SchemeOf
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings, Values

IGNORE_KEYS = ("ignore", "exclude", "exclude_modules", "modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A quantization config, wherever it was found."""

    method: str
    raw: Mapping[str, Any]
    where: str
    """What witnesses call it: `config.json: text_config.quantization_config`."""
    ignore_key: str
    ignore: tuple[str, ...]

    @property
    def writer(self) -> str:
        """The method whose rules the exclude list follows: that of the tool that wrote it."""
        producer = look_up(self.raw, "producer.name")
        return "modelopt" if producer == "modelopt" else canonical_method(self.method)

    @property
    def ignore_witness(self) -> str:
        """Where the exclude list is."""
        return f"{self.where}.{self.ignore_key}" if self.ignore_key else self.where


def find_quantization(config: ConfigFile) -> Quantization | None:
    """Look in the language model's config, then at the top, then in hf_quant_config.json; raises `FactError`."""
    for top, mapping in ((False, config.language_model), (True, config.top)):
        raw = mapping.get("quantization_config")
        if raw is None:
            continue
        where = config.witness("quantization_config", top=top)
        if not isinstance(raw, dict):
            raise FactError(f"`quantization_config` is not a mapping (from {where})")
        return _quantization(raw, _method(raw, where), where)
    if config.hf_quant is None:
        return None
    raw = config.hf_quant.get("quantization", config.hf_quant)
    where = f"{config.hf_quant_name}: quantization"
    if not isinstance(raw, dict):
        raise FactError(f"`quantization` is not a mapping (from {config.hf_quant_name})")
    return _quantization(raw, "modelopt", where)


def _method(raw: Mapping[str, Any], where: str) -> str:
    method = raw.get("quant_method")
    if method is None and look_up(raw, "producer.name") == "modelopt":
        return "modelopt"
    if not isinstance(method, str) or not method:
        raise FactError(f"`quant_method` is missing or no text (from {where}); say which quantizer wrote it")
    return method.lower().replace("_", "-")


def _quantization(raw: Mapping[str, Any], method: str, where: str) -> Quantization:
    key = next((key for key in IGNORE_KEYS if raw.get(key) is not None), "")
    ignore = raw.get(key, ())
    if not isinstance(ignore, list | tuple) or not all(isinstance(item, str) for item in ignore):
        raise FactError(f"`{key}` is not a list of module names (from {where})")
    return Quantization(method=method, raw=raw, where=where, ignore_key=key, ignore=tuple(ignore))


def read_quantization(config: ConfigFile, catalogue: Catalogue) -> Readings:
    """Every `quant.*` fact; absent where config.json has no quantization_config."""
    found = find_quantization(config)
    readings: dict[str, Reading] = {}
    for name in ("quant.method", "quant.algo", "quant.ignored_modules"):
        readings[name] = Reading(ABSENT, config.name, "" if found else "no quantization_config")
    if found is not None:
        readings["quant.method"] = Reading(found.method, f"{found.where}.quant_method")
        algo = found.raw.get("quant_algo")
        readings["quant.algo"] = Reading(ABSENT, found.where)
        if algo is not None:
            readings["quant.algo"] = typed(catalogue["quant.algo"], algo, f"{found.where}.quant_algo")
        readings["quant.ignored_modules"] = Reading(
            found.ignore if found.ignore_key else ABSENT, found.ignore_witness, "" if found.ignore_key else "no list"
        )
    for spec in catalogue.values():
        if spec.group != "quant" or not spec.from_ or spec.name in readings:
            continue
        readings[spec.name] = Reading(ABSENT, config.name)
        for path in spec.from_:
            raw = look_up(found.raw, path) if found else None
            where = f"{found.where}.{path}" if found else ""
            if raw is None:  # `expert_dtype` stands beside quantization_config, not in it
                raw, where = look_up(config.language_model, path), config.witness(path)
            if raw is not None:
                readings[spec.name] = typed(spec, raw, where)
                break
    return {name: reading for name, reading in readings.items() if name in catalogue}


def read_layers(
    config: ConfigFile, readings: Readings, catalogue: Catalogue, family: Family | None, formats: Sequence[Format]
) -> tuple[list[dict[str, Reading]] | None, str]:
    """Facts of every layer with experts, from the config alone; None and a note where it does not say which.

    `readings` are the facts of `read_config` and `read_quantization`.
    """
    values = settled(catalogue, readings)
    if family is None:
        if values.get("model.n_routed_experts", UNKNOWN) in (ABSENT, 0):
            return [], "the model has no routed experts"
        return None, "no family knows this architecture"
    numbers = family.layer_numbers(values)
    if numbers is None:
        return None, f"the config does not say which layers of family `{family.name}` have experts"
    reader = LayerReader(config=config, family=family, formats=formats, values=values)
    return [reader.layer(role, index, draft) for role, index, draft in numbers], ""


class LayerReader:
    """Storage and exclusion of a layer's experts, by scheme tables and exclude list."""

    def __init__(self, *, config: ConfigFile, family: Family, formats: Sequence[Format], values: Values) -> None:
        self.config, self.family, self.values = config, family, values
        self.formats = {one.name: one for one in formats}
        self.found = find_quantization(config)
        self.ignored: Test = lambda module: False
        """Whether the exclude list covers one module."""
        if self.found is not None:
            # Its names are asked for several times each.
            self.ignored = cache(matcher(self.found.writer, self.found.ignore))
        self.scheme_of: SchemeOf = lambda name, kind: None
        if self.found is not None:
            make = SCHEMES.get(canonical_method(self.found.method))
            if make is None:
                note = f"storage of quantization method `{self.found.method}` is not known here"
                self.scheme_of = lambda name, kind: Scheme(None, note=note)
            else:
                self.scheme_of = make(self)
        self.experts = self._representatives()

    def layer(self, role: str, index: int, draft: int) -> dict[str, Reading]:
        """All `layer.*` facts of one layer."""
        names = self.family.names
        block = names.block("main" if role == "main" else "mtp", index, draft)
        witness = f"{self.config.name}; {self.family.witness}"
        shared = names.shared_modules(block) if self.has_shared else ()
        return {
            "layer.index": Reading(index, witness),
            "layer.name": Reading(block, witness),
            "layer.role": Reading(role, witness),
            **self.group("routed", names.routed_modules(block, self.experts), names.announced_stack(block)),
            **self.group("shared", shared),
        }

    @property
    def has_shared(self) -> bool:
        """Whether the config announces a shared expert."""
        count = self.values.get("model.n_shared_experts", UNKNOWN)
        return bool(self.family.names.shared) and isinstance(count, int) and count > 0

    def group(self, kind: Kind, modules: Sequence[str], whole: str = "") -> dict[str, Reading]:
        """Storage and exclusion of a group of modules that should be alike; both absent for no modules.

        `whole` is the module that holds them all in one, where there may be such a one.
        """
        if not modules:
            none = Reading(ABSENT, self.config.name, f"no {kind} expert")
            return {f"layer.{kind}_storage": none, f"layer.{kind}_excluded": none}
        if whole and self.ignored(whole):
            modules = (whole,)
        out = "partly" if (found := self.excluded(modules)) == "partly" else str(found).lower()
        excluded_where = self.found.ignore_witness if self.found else f"{self.config.name}: no quantization_config"
        record = self._storage(kind, modules)
        return {f"layer.{kind}_storage": record, f"layer.{kind}_excluded": Reading(out, excluded_where)}

    def excluded(self, modules: Sequence[str]) -> Excluded:
        """Whether the exclude list covers these modules."""
        return excluded(self.ignored, modules)

    def scheme(self, module: str, kind: Kind) -> Scheme:
        """How one module is stored; raises `FactError` for a list that can't be read."""
        scheme = self.scheme_of(module, kind)
        return scheme if scheme is not None else self.plain()

    def plain(self) -> Scheme:
        """An unquantized module: the model's dtype."""
        dtype = self.values.get("model.dtype", UNKNOWN)
        name = DTYPE_FORMATS.get(str(dtype))
        return Scheme(name, note="" if name else f"dtype `{dtype}` is no storage format known here")

    @property
    def scale_of_dtype(self) -> str | None:
        """The scales of compressed-tensors have the dtype of the weights that were quantized."""
        return DTYPE_FORMATS.get(str(self.values.get("model.dtype")))

    def _storage(self, kind: Kind, modules: Sequence[str]) -> Reading:
        schemes = {self.scheme(module, kind) for module in modules}
        where = self.found.where if self.found else self.config.witness("dtype")
        if len(schemes) > 1:
            listed = ", ".join(sorted(scheme.format or "unknown" for scheme in schemes))
            return Reading(ABSENT, where, f"{kind} experts of one layer differ: {listed}")
        scheme = schemes.pop()
        width, input_width = self._widths(kind)
        if width is ABSENT:
            return Reading(ABSENT, where, "the shared experts' width is not divisible into that many slots")
        known = {"width": width, "input_width": input_width}
        one = self.formats.get(scheme.format) if scheme.format else None
        if one is None:
            note = scheme.note or f"format `{scheme.format}` is not in the rule set"
            fields = {name: value for name, value in known.items() if isinstance(value, int)}
            return Reading(fields, where, note) if fields else Reading(UNKNOWN, where, note)
        found: Storage = storage(one, **known, scale_dtype=scheme.scale_dtype or UNKNOWN)
        return Reading(found.record(), where, scheme.note)

    def _widths(self, kind: Kind) -> tuple[Any, Any]:
        """Rows of gate_proj for one slot, and its columns; unknown where the config does not say."""

        def number(name: str) -> Any:
            value = self.values.get(name, UNKNOWN)
            return value if isinstance(value, int) else UNKNOWN

        width, hidden = number("model.moe_intermediate_size"), number("model.hidden_size")
        if kind == "routed":
            latent = number("model.moe_latent_size")
            return width, latent if latent is not UNKNOWN else hidden
        total, slots = number("model.shared_expert_intermediate_size"), number("model.n_shared_experts")
        if total is UNKNOWN or slots is UNKNOWN or total == 0:
            return width, hidden  # DeepSeek: one MLP of n_shared_experts x moe_intermediate_size
        return (ABSENT if total % slots else total // slots), hidden

    def _representatives(self) -> tuple[int, ...]:
        """Experts to look up for a layer: as many as it takes if some list could tell them apart, else one."""
        count = self.values.get("model.n_routed_experts", UNKNOWN)
        if not isinstance(count, int) or count < 1:
            return (0,)
        if count > MAX_EXPERTS:
            raise FactError(f"`model.n_routed_experts` is {count}, more than {MAX_EXPERTS}; correct config.json")
        texts = _texts(self.found.raw) if self.found is not None else []
        if any(map(_may_name_an_expert, texts)):
            return tuple(range(count))
        if any(map(_may_count_digits, texts)):
            return tuple(sorted({0, 1, 10, 100, 1000, count - 1} & set(range(count))))
        return (0,)


def _texts(raw: Any) -> list[str]:
    """Every text in a quantization config: keys and values may both be patterns."""
    if isinstance(raw, str):
        return [raw]
    if isinstance(raw, Mapping):
        return [text for key, value in raw.items() for text in (str(key), *_texts(value))]
    return [text for item in raw for text in _texts(item)] if isinstance(raw, list | tuple) else []


_LAYER_NUMBER = r"(?:layers|mtp)\\?\.\d+(?=\\?\.|\*|$)"
_PROJECTION_NUMBER = r"\bw[123]\b"


def _may_name_an_expert(pattern: str) -> bool:
    """Whether a pattern can tell one expert from another: it has a number that is not a layer's."""
    if "expert" not in pattern and "*" not in pattern and not pattern.startswith("re:"):
        return False
    bare = re.sub(_LAYER_NUMBER, "", pattern)
    return re.search(r"\d|\\d\{", re.sub(_PROJECTION_NUMBER, "", bare)) is not None and "." in pattern


def _may_count_digits(pattern: str) -> bool:
    """Whether a pattern that names no expert can tell expert 7 from 10: only one with a wildcard for one character."""
    if not pattern.startswith("re:"):
        return "?" in pattern or "[" in pattern
    return re.search(r"[].?+{\\[]", pattern.replace(r"\.", "").replace(".*", "")) is not None
