"""What decisions ask of the loader, layer by layer; and whether they were made for this checkpoint at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gatekeeper import ABSENT, Decision, Facts, ranges
from loader.errors import StaleDecisionError

FUSION, BACKEND = "shared_experts_fusion", "moe_backend"


def fused_slots(decisions: Mapping[str, Decision], layer: int) -> int:
    """How many shared experts of MoE layer `layer` go into slots: 0 unless the decision there is on."""
    decision = decisions.get(FUSION)
    if decision is None:
        return 0
    seen = decision.in_force
    if seen.layers is None:
        return _slots(seen.state, seen.outputs)
    for one in seen.layers:
        if one.index == layer:
            return _slots(one.state, one.outputs)
    return 0


def _slots(state: str, outputs: Mapping[str, Any] | None) -> int:
    # Pending is off to every consumer.
    return int((outputs or {})["num_fused_shared_experts"]) if state == "on" else 0


def backend(decisions: Mapping[str, Decision], layer: int) -> str:
    """The kernel of MoE layer `layer`: the option decided for, else the eager one, which runs everywhere."""
    if BACKEND not in decisions:
        return "eager"
    decision = decisions[BACKEND].in_force
    state, option = decision.state, decision.option
    for one in decision.layers or ():
        if one.index == layer:
            state, option = one.state, one.option
    return option if state == "on" and option is not None else "eager"


def dense_shared_from(decisions: Mapping[str, Decision], layer: int) -> int:
    """Tokens of a call from which shared slots of MoE layer `layer` are computed on their own; 0: never."""
    if BACKEND not in decisions:
        return 0
    decision = decisions[BACKEND].in_force
    outputs = decision.outputs
    for one in decision.layers or ():
        if one.index == layer:
            outputs = one.outputs
    return int((outputs or {}).get("dense_shared_from") or 0)


def require_fresh(decisions: Mapping[str, Decision], facts: Facts) -> None:
    """Raise `StaleDecisionError` where a decision rests on checkpoint facts that are not those of `facts`."""
    differences = list(dict.fromkeys(_differences(decisions, facts)))
    if differences:
        more = f"; and {len(differences) - 5} more differences" if len(differences) > 5 else ""
        raise StaleDecisionError(
            f"decided for another checkpoint: {'; '.join(differences[:5])}{more}; decide again for this one"
        )


def _differences(decisions: Mapping[str, Decision], facts: Facts) -> Iterator[str]:
    """Facts of the whole model first: they say more than what follows from them in each layer."""
    layers = {layer["layer.index"]: layer for layer in facts.runner_layer_values or ()}
    for feature, decision in decisions.items():
        if decision.runner != facts.runner:
            yield f"`{feature}` was decided for the {decision.runner}, not for the {facts.runner}"
    for name, then in _used(decisions, "model.", "quant."):
        if name in facts.values and _plain(facts.values[name]) != then:
            yield f"`{name}` was {_show(then)}, here it is {_show(_plain(facts.values[name]))}"
    for feature, decision in decisions.items():
        decided = {one.index for one in decision.layers or () if one.index is not None}
        if decided and facts.runner_layers is not None and decided != set(layers):
            yield f"`{feature}` was decided for {len(decided)} MoE layers, here there are {len(layers)}"
    for name, then in _used(decisions, "layer."):
        yield from _layer_differences(name, then, layers)


def _used(decisions: Mapping[str, Decision], *groups: str) -> Iterator[tuple[str, Any]]:
    for decision in decisions.values():
        yield from ((name, then) for name, then in decision.facts_used.items() if name.startswith(groups))


def _layer_differences(name: str, then: Mapping[str, Any], layers: Mapping[Any, Mapping[str, Any]]) -> Iterator[str]:
    for numbers, value in then.items():
        now: dict[str, list[int]] = {}
        for index in _numbers(numbers):
            if index not in layers:
                now.setdefault("no MoE layer here", []).append(index)
            elif name in layers[index] and _plain(layers[index][name]) != value:
                now.setdefault(f"here it is {_show(_plain(layers[index][name]))}", []).append(index)
        for what, indices in now.items():
            yield f"`{name}` was {_show(value)} in layers {ranges(indices)}, {what}"


def _numbers(text: str) -> list[int]:
    """``1-3, 7`` to 1, 2, 3, 7."""
    numbers: list[int] = []
    for run in text.split(", "):
        first, _, last = run.partition("-")
        if first.isdecimal():  # layers without a number are counted as -1, -2, …
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _show(value: Any) -> str:
    return "none" if value is None else f"`{value}`"


def _plain(value: Any) -> Any:
    """A fact's value as `Decision.facts_used` has it: JSON, absent as None, versions and architectures as text."""
    if value is ABSENT:
        return None
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, bool | int | float | str) else str(value)
