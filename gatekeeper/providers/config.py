"""config.json to `model.*`: the language model's part of it, in DeepSeek's spelling, and the family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import CheckpointError, FactError, one_line
from gatekeeper.fact_spec import FactSpec
from gatekeeper.families import Family, select_family
from gatekeeper.files import Unreadable, inside, read_whole, require_unicode
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings, Values

MAX_CONFIG_BYTES = 5_000_000
"""The largest published ones, with an entry for each module, have a few hundred thousand."""
MAX_CONFIG_DEPTH = 64
NESTED = ("text_config", "language_config", "llm_config")
"""Where a wrapper keeps its language model's config; the first that is there counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """A parsed config.json, and hf_quant_config.json beside it where there is one."""

    path: Path
    top: Mapping[str, Any]
    nested: str
    """Key of the language model's config: `text_config`; empty where that is the top level."""
    hf_quant: Mapping[str, Any] | None
    hf_quant_name: str = "hf_quant_config.json"

    @property
    def name(self) -> str:
        """What witnesses call the file."""
        return self.path.name

    @property
    def language_model(self) -> Mapping[str, Any]:
        """The language model's config."""
        return self.top[self.nested] if self.nested else self.top

    def witness(self, key: str, *, top: bool = False) -> str:
        """`config.json: text_config.n_routed_experts`."""
        return f"{self.name}: {key}" if top or not self.nested else f"{self.name}: {self.nested}.{key}"


def load_config(target: Path) -> ConfigFile:
    """Parse the config.json of a folder, or the file itself; raises `CheckpointError` if missing, torn or no object."""
    target = Path(target)
    top = read_json_object(path := _inside(target / "config.json") if target.is_dir() else target)
    nested = next((key for key in NESTED if top.get(key) is not None), "")
    if nested and not isinstance(top[nested], dict):
        raise CheckpointError(f"`{path}`: `{nested}` should hold the language model's config, a mapping; correct it")
    beside = path.parent / "hf_quant_config.json"
    hf_quant = read_json_object(_inside(beside)) if beside.exists() else None
    return ConfigFile(path=path, top=top, nested=nested, hf_quant=hf_quant)


def _inside(path: Path) -> Path:
    try:
        inside(path.parent, path.name)
    except Unreadable as bad:
        raise CheckpointError(f"`{path}`: {bad}; name a checkpoint folder or its config.json") from None
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one JSON object, without the keys that start with `_`; raises `CheckpointError`."""
    try:
        raw = read_whole(path, MAX_CONFIG_BYTES)
    except Unreadable as bad:
        raise CheckpointError(f"`{path}` {bad}; name a checkpoint folder or the config.json of a model") from None
    try:
        # NaN and Infinity are accepted: transformers writes them (`time_step_limit` of Mamba layers).
        document = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_duplicates, parse_int=_integer)
        require_unicode(raw, document)
    except UnicodeDecodeError:
        raise CheckpointError(f"`{path}` is not UTF-8 text; download it again") from None
    except RecursionError:
        raise CheckpointError(f"`{path}` is nested too deep; this is no config") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"`{path}` is not JSON ({error.msg}, {where}); torn? download it again") from None
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"`{path}` is not a JSON object; expected the config of a model")
    if _is_deep(document):
        raise CheckpointError(f"`{path}` is nested deeper than {MAX_CONFIG_DEPTH} levels; this is no config")
    return {key: value for key, value in document.items() if not key.startswith("_")}


def _integer(text: str) -> int:
    # The longest of 64 bits; `int` itself would take time for thousands of digits.
    if len(text) > 20:
        raise ValueError(f"the number {text[:20]}… has {len(text)} digits; correct it")
    return int(text)


def _is_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_CONFIG_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key `{one_line(key[:200])}` is there twice")
        found[key] = value
    return found


def read_config(config: ConfigFile, catalogue: Catalogue, families: Sequence[Family]) -> tuple[Readings, Family | None]:
    """Every `model.*` fact that config.json can give, absent where it doesn't, and the family."""
    readings: dict[str, Reading] = dict(_identity(config))
    family = _family(config, readings, families)
    witness = config.witness("architectures")
    if family is None:
        readings["model.family"] = Reading(ABSENT, witness, "no family matches this architecture")
    else:
        readings["model.family"] = Reading(family.name, f"{witness}; {family.witness}")
    for spec in catalogue.values():
        if spec.group == "model" and "config" in spec.given_by and spec.name not in readings:
            readings[spec.name] = _fact(config, spec, family)
    return {name: reading for name, reading in readings.items() if name in catalogue}, family


def _fact(config: ConfigFile, spec: FactSpec, family: Family | None) -> Reading:
    paths = family.from_.get(spec.name, spec.from_) if family else spec.from_
    null = None
    for path in paths:
        raw = look_up(config.language_model, path, ABSENT)
        if raw is not None and raw is not ABSENT:
            return typed(spec, raw, config.witness(path))
        null = path if raw is None else null
    if null is not None:  # said to be nothing, which is not what the family's class has where nothing is said
        return Reading(ABSENT, config.witness(null))
    if family is not None and spec.name in family.facts:
        return typed(spec, family.facts[spec.name], family.witness)
    return Reading(ABSENT, config.name)


def look_up(mapping: Mapping[str, Any], path: str, otherwise: Any = None) -> Any:
    """The value at a dotted path; `otherwise` where there is none."""
    found: Any = mapping
    for key in path.split("."):
        found = found.get(key, otherwise) if isinstance(found, Mapping) else otherwise
    return found


def typed(spec: FactSpec, raw: Any, witness: str) -> Reading:
    """A reading of the fact's type; raises `FactError` that names fact and witness."""
    if spec.name == "model.dtype" and isinstance(raw, str):
        raw = raw.removeprefix("torch.")
    try:
        return Reading(spec.coerce(raw), witness)
    except ValueError as error:
        raise FactError(f"`{spec.name}`: {error} (from {witness})") from None


def _texts(config: ConfigFile, key: str, mapping: Mapping[str, Any]) -> list[str]:
    raw = mapping.get(key)
    items = raw if isinstance(raw, list) else [raw]
    found = [item for item in items if item is not None and item != ""]
    if not all(isinstance(item, str) for item in found):
        raise FactError(f"`{key}` is not a name or a list of names (from {config.name})")
    return found


def _identity(config: ConfigFile) -> Mapping[str, Reading]:
    own, top = _texts(config, "architectures", config.language_model), _texts(config, "architectures", config.top)
    architecture = Reading(ABSENT, config.name)
    if own:
        architecture = Reading(own[0], config.witness("architectures"))
    elif top:
        architecture = Reading(top[0], config.witness("architectures", top=True))
    wrapper = Reading(ABSENT, config.name)
    if top and top[0] != architecture.value:
        wrapper = Reading(top[0], config.witness("architectures", top=True))
    types = _texts(config, "model_type", config.language_model)
    top_types = _texts(config, "model_type", config.top)
    model_type = Reading(ABSENT, config.name)
    if types:
        model_type = Reading(types[0], config.witness("model_type"))
    elif top_types:
        model_type = Reading(top_types[0], config.witness("model_type", top=True))
    return {
        "model.architecture": architecture,
        "model.wrapper_architecture": wrapper,
        "model.model_type": model_type,
    }


def _family(config: ConfigFile, readings: Readings, families: Sequence[Family]) -> Family | None:
    def text(name: str) -> str | None:
        value = readings[name].value
        return value if isinstance(value, str) else None

    types = _texts(config, "model_type", config.language_model) + _texts(config, "model_type", config.top)
    return select_family(families, text("model.wrapper_architecture"), types, text("model.architecture"))


def settled(catalogue: Catalogue, readings: Readings) -> Values:
    """Values with defaults and derived facts, for a provider that needs them before all sources are joined."""
    done = catalogue.complete(readings, None, frozenset()).readings
    return {name: r.value for name, r in done.items() if r.value is not UNKNOWN}
