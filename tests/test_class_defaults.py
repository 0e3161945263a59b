"""Facts of real configs beside what transformers' own classes make of them: what a config leaves out is its class's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.families import Family
from gatekeeper.providers.config import settled
from gatekeeper.values import ABSENT, Values
from tests.shipped import CORPUS, catalogue, read

pytestmark = pytest.mark.transformers

OTHERS = {
    "inclusionAI__Ling-lite": "bailing_moe",
    "moonshotai__Kimi-K2-Instruct": "kimi_k2",
    "moonshotai__Kimi-K2-Thinking": "kimi_k2",
    "sgl-project__DeepSeek-V4-Flash-FP8": "deepseek_ref",
}
"""Models whose code is in their own repositories: transformers has no class for the type."""
FLAT = {"stepfun-ai__Step-3.7-Flash": "kept without the level `text_config`, which its class reads"}
MODELS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
WITH_A_CLASS = [name for name in MODELS if name not in OTHERS and name not in FLAT]
OF_EACH_LAYER = frozenset(
    {"model.mlp_layer_types", "model.layers_block_type", "model.hybrid_override_pattern", "model.moe_layers"}
)
"""Compared by the layers that they come to: classes fill them in, and translate their words."""


def raw_config(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((CORPUS / name / "config.json").read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)  # read by others, and only by some of them here
    return raw


def of_class(raw: dict[str, Any]) -> Any:
    """The language model's part, as its class reads the file."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw))).get_text_config()


def compared(family: Family) -> Iterator[tuple[str, Sequence[str]]]:
    """Facts that config.json gives, with the keys that they are read from."""
    for spec in catalogue().values():
        if spec.group == "model" and "config" in spec.given_by and spec.name not in OF_EACH_LAYER:
            yield spec.name, family.from_.get(spec.name, spec.from_)


def first(config: Any, keys: Sequence[str]) -> Any:
    return as_read(next((value for key in keys if (value := getattr(config, key, None)) is not None), None))


def as_read(value: Any) -> Any:
    """Lists as tuples, dtypes by their names; None for what is absent, and for what is empty."""
    if value is ABSENT or value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(value) or None
    return value if isinstance(value, (str, int, float, bool)) else str(value).removeprefix("torch.")


def main_layers(family: Family, values: Values) -> list[int]:
    numbers = family.layer_numbers(values)
    assert numbers is not None
    return [index for role, index, _ in numbers if role == "main"]


def test_models_without_a_class_are_those() -> None:
    from transformers import CONFIG_MAPPING

    assert [name for name in MODELS if raw_config(name)["model_type"] not in CONFIG_MAPPING] == sorted(OTHERS)


@pytest.mark.parametrize("name", WITH_A_CLASS)
def test_facts_are_those_of_the_models_class(name: str) -> None:
    config, found = of_class(raw_config(name)), read(CORPUS / name)
    assert found.family is not None
    values = settled(catalogue(), found.readings)
    theirs = {fact: first(config, keys) for fact, keys in compared(found.family)}
    ours = {fact: as_read(values[fact]) for fact in theirs}
    assert {fact: ours[fact] for fact in theirs if theirs[fact] is not None} == {
        fact: value for fact, value in theirs.items() if value is not None
    }
    kinds = getattr(config, "mlp_layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is not None:
        with_experts = [index for index, kind in enumerate(kinds) if "moe" in kind or kind == "sparse"]
        assert main_layers(found.family, values) == with_experts


@pytest.mark.parametrize("name", WITH_A_CLASS)
def test_what_a_config_leaves_out_is_its_classs_or_absent(tmp_path: Path, name: str) -> None:
    """Each key by itself: never a value that the class would not have."""
    family = read(CORPUS / name).family
    assert family is not None
    wrong = {}
    for fact, keys in compared(family):
        raw = raw_config(name)
        for level in (raw, *(value for value in raw.values() if isinstance(value, dict))):
            for key in keys:
                level.pop(key, None)
        try:
            theirs = first(of_class(raw), keys)
        except Exception:  # noqa: BLE001  # its own ways to say that the class can't do without it
            continue
        (tmp_path / "config.json").write_text(json.dumps(raw))
        ours = as_read(settled(catalogue(), read(tmp_path).readings).get(fact))
        if ours is not None and theirs is not None and ours != theirs:
            wrong[fact] = (ours, theirs)
    assert wrong == {}
