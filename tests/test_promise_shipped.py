"""The promise on the shipped rules: what is on with some facts unknown stays on whatever they turn out to be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper import RuleSet, conditions, decide, from_record, load_rules
from gatekeeper.conditions import All, FactRef
from gatekeeper.fact_spec import FactSpec
from gatekeeper.log import quiet
from gatekeeper.values import plain
from tests.promise import assert_kept

RULES = load_rules()
BY_TYPE: dict[str, list[Any]] = {
    "boolean": [True, False],
    "integer": [1, 2, 8],
    "number": [1, 2.5],
    "string": ["none", "other"],
    "version": ["2.10", "2.9"],
    "arch": ["sm90", "sm130"],
    "list": [[], [128, 128]],
}
STORAGES: list[Any] = [
    {"format": "bf16", "block": None, "scale_dtype": None, "width": 2048, "input_width": 7168},
    {"format": "mxfp4", "block": [1, 32], "scale_dtype": "e8m0", "width": 2048, "input_width": 7168},
    {"format": "mxfp4", "block": [1, 32], "scale_dtype": "e8m0", "width": 4096, "input_width": 7168},
    None,
]


FUSES: dict[str, Any] = {
    "model.family": "deepseek_v3",
    "model.n_routed_experts": 256,
    "model.n_shared_experts": 1,
    "model.hidden_size": 7168,
    "model.moe_intermediate_size": 2048,
    "quant.method": "fp8",
    "platform.vendor": "cuda",
    "platform.arch": "sm90",
    "library.torch": "2.13",
    "parallel.tp_size": 8,
    "parallel.ep_size": 1,
    "engine.name": "moe-loader",
    "engine.loads_fused_shared": True,
    "engine.moe_a2a_backend": "none",
    "engine.per_rank_shared_slots": False,
    "server.moe_runner_backend": "auto",
    "server.enable_eplb": False,
    "server.enable_two_batch_overlap": False,
    "server.enable_single_batch_overlap": False,
    "server.enforce_shared_experts_fusion": False,
    "server.disable_shared_experts_fusion": False,
}
"""A load that fuses; most others fail at one of a dozen requirements, so half of the draws start from here."""


def constants(rules: RuleSet) -> dict[str, list[Any]]:
    """What the shipped gates compare each fact with: the values that decide something."""
    found: dict[str, list[Any]] = {}
    for gates in rules.gates.values():
        for gate in gates:
            options = [one for option in gate.options for one in option.requires]
            parts = [part for one in (*gate.requires, *options) for part in (one.when, one.that)]
            for test, _ in conditions.tests_of(All((gate.applies_to, *parts))):
                if not isinstance(test.operand, FactRef) and test.operator not in ("absent", "divisible_by"):
                    operand = plain(test.operand)  # type: ignore[arg-type]
                    found.setdefault(test.fact, []).extend(operand if isinstance(operand, list) else [operand])
    return found


def values_of(spec: FactSpec, compared: list[Any]) -> list[Any]:
    """Values worth trying: those that rules compare with, those that the catalogue knows, and one of its type."""
    known = [*compared, *spec.values, *spec.known_values, *map(plain, spec.controllable), *BY_TYPE.get(spec.type, [])]
    usable = []
    for value in known:
        try:
            spec.coerce(value)
        except ValueError:
            continue
        usable.append(value)
    return usable


COMPARED = constants(RULES)


@st.composite
def loads(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of facts, all of it known or absent, and the same with some of it hidden."""
    near = draw(st.booleans())
    facts: dict[str, Any] = {}
    for name, spec in RULES.catalogue.items():
        if spec.group == "feature":  # decided, never given
            continue
        if spec.only_derived or spec.type == "record" or name.startswith("layer.") or name == "model.runner":
            continue
        if near and name in FUSES and draw(st.integers(0, 19)):
            facts[name] = FUSES[name]
            continue
        compared = COMPARED.get(name, [])
        pool = compared if compared and draw(st.integers(0, 3)) else values_of(spec, compared)
        facts[name] = draw(st.sampled_from([*pool, None]))
    layers = []
    for index in range(draw(st.integers(0, 3))):
        routed = draw(st.sampled_from(STORAGES))
        shared = routed if draw(st.booleans()) else draw(st.sampled_from(STORAGES))
        layers.append({"layer.index": index + 3, "layer.routed_storage": routed, "layer.shared_storage": shared})
    record: dict[str, Any] = {"facts": facts, "layers": layers}
    return record, _hidden(draw, record)


def _hidden(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    gone = draw(st.sets(st.sampled_from(sorted(record["facts"])), max_size=12))
    hidden: dict[str, Any] = {"facts": {name: value for name, value in record["facts"].items() if name not in gone}}
    if draw(st.integers(0, 3)):
        hidden["layers"] = [
            {name: value for name, value in layer.items() if name == "layer.index" or draw(st.integers(0, 3))}
            for layer in record["layers"]
        ]
    return hidden


def keeps_the_promise(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    more, fewer = pair
    with quiet():
        before = decide(RULES, from_record(RULES.catalogue, fewer))
        after = decide(RULES, from_record(RULES.catalogue, more))
    for feature in before:
        assert_kept(before[feature].to_json(), after[feature].to_json())


DRAWS_MUCH = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@DRAWS_MUCH
@given(loads())
def test_shipped_rules(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    keeps_the_promise(pair)


@pytest.mark.slow_property
@DRAWS_MUCH
@given(loads())
def test_shipped_rules_at_length(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    keeps_the_promise(pair)


def test_the_random_loads_reach_on_and_error() -> None:
    """A promise about decisions that never come is empty."""
    seen: set[str] = set()

    @settings(max_examples=600, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(loads())
    def look(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
        with quiet():
            decisions = decide(RULES, from_record(RULES.catalogue, pair[0]))
        seen.update(f"{name} {one.state}" for name, one in decisions.items())

    look()
    assert "shared_experts_fusion on" in seen
    assert {"shared_experts_fusion off", "shared_experts_fusion error", "moe_backend on", "moe_backend off"} <= seen
