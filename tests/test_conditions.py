"""Conditions: every operator on known, absent and unknown facts; Kleene logic; lists; layers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small import faults, truth

N, M = "model.n", "model.m"


@pytest.mark.parametrize(
    ("test", "value", "state"),
    [
        ("3", 3, "passed"),
        ("3", 4, "failed"),
        ("3.0", 3, "passed"),
        ("[3, 4]", 4, "passed"),
        ("[3, 4]", 5, "failed"),
        ("{eq: 3}", 3, "passed"),
        ("{ne: 3}", 4, "passed"),
        ("{in: [3]}", 3, "passed"),
        ("{not_in: [3]}", 3, "failed"),
        ("{gt: 3}", 3, "failed"),
        ("{ge: 3}", 3, "passed"),
        ("{lt: 3}", 2, "passed"),
        ("{le: 3}", 4, "failed"),
        ("{gt: 1, lt: 5}", 3, "passed"),
        ("{gt: 1, lt: 5}", 5, "failed"),
        ("{divisible_by: 3}", 6, "passed"),
        ("{divisible_by: 4}", 6, "failed"),
        ("{divisible_by: 0}", 6, "failed"),
        ("{absent: true}", 3, "failed"),
        ("{absent: false}", 3, "passed"),
    ],
)
def test_operators_on_a_known_number(test: str, value: int, state: str) -> None:
    assert truth(f"{{{N}: {test}}}", {N: value}) == state


@pytest.mark.parametrize(
    "test", ["3", "[3]", "{gt: 1}", "{divisible_by: 2}", "{absent: false}", "{ne: 3, absent: false}"]
)
def test_an_absent_fact_fails_every_comparison(test: str) -> None:
    assert truth(f"{{{N}: {test}}}", {N: None}) == "failed"


@pytest.mark.parametrize("test", ["{absent: true}", "{ne: 3}", "{not_in: [3]}"])
def test_an_absent_fact_passes_what_is_a_negation(test: str) -> None:
    assert truth(f"{{{N}: {test}}}", {N: None}) == "passed"
    assert truth(f"{{not: {{{N}: 3}}}}", {N: None}) == "passed"


@pytest.mark.parametrize("test", ["3", "{ne: 3}", "{gt: 1}", "{absent: true}", "{absent: false}"])
def test_an_unknown_fact_leaves_every_test_open(test: str) -> None:
    assert truth(f"{{{N}: {test}}}", {}) == "unknown"
    assert truth(f"{{not: {{{N}: {test}}}}}", {}) == "unknown"


@pytest.mark.parametrize(
    ("left", "right", "eq", "gt"),
    [
        (3, 3, "passed", "failed"),
        (4, 3, "failed", "passed"),
        (None, 3, "failed", "failed"),
        ("?", 3, "unknown", "unknown"),
        # An absent side makes it false even if the other is unknown.
        (None, "?", "failed", "failed"),
        ("?", None, "failed", "failed"),
    ],
)
def test_two_facts(left: Any, right: Any, eq: str, gt: str) -> None:
    # model.double is derived, so that it can be absent; the other side has no default either.
    facts = {name: value for name, value in ((N, left), ("model.rate", right)) if value != "?"}
    assert truth(f"{{{N}: {{fact: model.rate}}}}", facts) == eq
    assert truth(f"{{{N}: {{gt: {{fact: model.rate}}}}}}", facts) == gt


@pytest.mark.parametrize(
    ("condition", "state"),
    [
        ("{all: [{model.n: 1}, {model.rate: 1}]}", "unknown"),
        ("{all: [{model.n: 2}, {model.rate: 1}]}", "failed"),
        ("{any: [{model.n: 1}, {model.rate: 1}]}", "passed"),
        ("{any: [{model.n: 2}, {model.rate: 1}]}", "unknown"),
        ("{all: []}", "passed"),
        ("{not: {any: [{model.n: 1}, {model.rate: 1}]}}", "failed"),
        ("{model.n: 1, model.rate: 1}", "unknown"),
        ("{model.n: 1, not: {model.rate: 1}}", "unknown"),
    ],
)
def test_kleene(condition: str, state: str) -> None:
    assert truth(condition, {N: 1}) == state


@pytest.mark.parametrize(
    ("test", "tags", "state"),
    [
        ("{contains: a}", ["a", "b"], "passed"),
        ("{contains: c}", ["a", "b"], "failed"),
        ("{contains: {fact: model.family}}", ["a", "b"], "passed"),
        ("{any_item: a}", ["a"], "passed"),
        ("{any_item: [x, a]}", ["a"], "passed"),
        ("{any_item: {matches: 'a.*'}}", ["a.b.c", "a.b"], "passed"),
        ("{every_item: {matches: 'a.**'}}", ["a.b.c", "a.b"], "passed"),
        ("{every_item: {ne: a}}", ["a", "b"], "failed"),
        ("{every_item: a}", [], "passed"),
        ("{any_item: a}", [], "failed"),
        ("{any_item: {eq: {fact: model.family}}}", ["a"], "passed"),
        ("{every_item: {eq: {fact: model.family}}}", ["a", "b"], "failed"),
        ("{every_item: a}", None, "failed"),
        ("{any_item: a}", "?", "unknown"),
        ("{absent: true}", None, "passed"),
        ("{absent: true}", [], "failed"),
    ],
)
def test_lists(test: str, tags: Any, state: str) -> None:
    facts = {"model.family": "a"} | ({} if tags == "?" else {"model.tags": tags})
    assert truth(f"{{model.tags: {test}}}", facts) == state


def test_an_item_against_an_unknown_fact_is_open_unless_there_are_no_items() -> None:
    condition = "{model.tags: {%s: {eq: {fact: model.family}}}}"
    assert truth(condition % "any_item", {"model.tags": ["a"]}) == "unknown"
    assert truth(condition % "every_item", {"model.tags": ["a"]}) == "unknown"
    assert truth(condition % "any_item", {"model.tags": []}) == "failed"
    assert truth(condition % "every_item", {"model.tags": []}) == "passed"


@pytest.mark.parametrize(
    ("glob", "text", "state"),
    [
        ("a.*", "a.b", "passed"),
        ("a.*", "a.b.c", "failed"),
        ("a.**", "a.b.c", "passed"),
        ("shared_expert", "shared_expert_gate", "failed"),
        ("shared_expert*", "shared_expert_gate", "passed"),
    ],
)
def test_globs_work_by_segment(glob: str, text: str, state: str) -> None:
    assert truth(f"{{model.family: {{matches: '{glob}'}}}}", {"model.family": text}) == state


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"quant.method": "quark", "quant.ignored": ["a.3.mlp"], "model.n": 3}, "passed"),
        ({"quant.method": "quark", "quant.ignored": ["a.3.mlp"], "model.n": 4}, "failed"),
        ({"quant.method": "quark", "quant.ignored": ["a.3.mlp"]}, "unknown"),
        ({"quant.method": "quark", "quant.ignored": ["a.3.mlp"], "model.n": None}, "failed"),
        ({"quant.ignored": ["a.3.mlp"], "model.n": 3}, "unknown"),
        ({"quant.method": "quark", "quant.ignored": None, "model.n": 3}, "failed"),
    ],
)
def test_covers_takes_names_with_facts(facts: dict[str, Any], state: str) -> None:
    assert truth("{quant.ignored: {covers: 'a.{model.n}.mlp'}}", facts) == state


@pytest.mark.parametrize(
    ("test", "version", "state"),
    [
        ("{ge: 2.10}", "2.9", "failed"),
        ("{ge: 2.10}", "2.10.0+cpu", "passed"),
        ("2.10", "2.1", "failed"),
        ("[2.10, 3]", "3.0", "passed"),
        ("{lt: '2.11'}", "2.11.0.dev1", "failed"),
    ],
)
def test_versions_are_read_from_the_text(test: str, version: str, state: str) -> None:
    assert truth(f"{{library.torch: {test}}}", {"library.torch": version}) == state


@pytest.mark.parametrize(
    ("test", "arch", "state"),
    [
        ("[sm90, sm100]", "sm100", "passed"),
        ("{ge: sm90}", "sm100", "passed"),
        ("{ge: sm90}", "gfx942", "failed"),
        ("{lt: sm90}", "gfx942", "failed"),
    ],
)
def test_architectures_of_two_vendors_have_no_order(test: str, arch: str, state: str) -> None:
    assert truth(f"{{platform.arch: {test}}}", {"platform.arch": arch}) == state


LAYERS = [{"layer.index": 3, "layer.size": 1}, {"layer.index": 4, "layer.size": 5}]


@pytest.mark.parametrize(
    ("condition", "layers", "state"),
    [
        ("{every_layer: {that: {layer.size: {ge: 1}}}}", LAYERS, "passed"),
        ("{every_layer: {that: {layer.size: {ge: 2}}}}", LAYERS, "failed"),
        ("{every_layer: {where: {layer.index: 4}, that: {layer.size: {ge: 2}}}}", LAYERS, "passed"),
        ("{any_layer: {that: {layer.size: {ge: 5}}}}", LAYERS, "passed"),
        ("{any_layer: {where: {layer.index: 3}, that: {layer.size: {ge: 5}}}}", LAYERS, "failed"),
        # No layer meets `where`: nothing vouches for anything.
        ("{every_layer: {where: {layer.index: 9}, that: {layer.size: {ge: 1}}}}", LAYERS, "failed"),
        ("{any_layer: {where: {layer.index: 9}, that: {layer.size: {ge: 1}}}}", LAYERS, "failed"),
        ("{every_layer: {that: {layer.size: {ge: 1}}}}", [], "failed"),
        ("{every_layer: {that: {layer.size: {ge: 1}}}}", None, "unknown"),
        ("{any_layer: {that: {layer.size: {ge: 1}}}}", None, "unknown"),
        ("{every_layer: {that: {layer.size: {ge: 1}}}}", [*LAYERS, {"layer.index": 5}], "unknown"),
        ("{every_layer: {that: {layer.size: {ge: 2}}}}", [*LAYERS, {"layer.index": 5}], "failed"),
        ("{any_layer: {that: {layer.size: 1}}}", [*LAYERS, {"layer.index": 5}], "passed"),
        ("{every_layer: {where: {layer.size: {ge: 2}}, that: {layer.index: 4}}}", [{"layer.index": 4}], "unknown"),
        # Layers of the other role are not meant.
        ("{every_layer: {that: {layer.size: 1}}}", [LAYERS[0], {"layer.size": 2, "layer.role": "mtp"}], "passed"),
    ],
)
def test_conditions_over_layers(condition: str, layers: Any, state: str) -> None:
    record = {} if layers is None else {"layers": layers}
    assert truth(condition, {}, **record) == state


def test_records_are_compared_whole() -> None:
    condition = "{every_layer: {that: {layer.one: {fact: layer.two}}}}"
    one = {"format": "bf16", "width": 2}
    assert truth(condition, {}, layers=[{"layer.one": one, "layer.two": one}]) == "passed"
    assert truth(condition, {}, layers=[{"layer.one": one, "layer.two": {**one, "width": 3}}]) == "failed"
    assert truth(condition, {}, layers=[{"layer.one": one, "layer.two": {"format": "bf16"}}]) == "unknown"
    assert truth(condition, {}, layers=[{"layer.one": one, "layer.two": None}]) == "failed"


@pytest.mark.parametrize(
    ("that", "fault"),
    [
        ("{model.n: x}", "wrong-value: `eq` of `model.n`: expected an integer, not the text `x`"),
        ("{model.n: '3'}", "wrong-value: `eq` of `model.n`: expected an integer, not the text `3`"),
        ("{model.n: true}", "expected an integer, not the boolean `true`"),
        ("{model.n: [3, x]}", "wrong-value: `in` of `model.n`"),
        ("{model.n: .nan}", "wrong-value"),
        ("{model.n: null}", "wrong-type: `model.n` must be a text, a number, true or false, a list or a mapping"),
        ("{model.n: []}", "wrong-shape: `model.n` is empty; fill it"),
        ("{model.n: {}}", "wrong-shape: `model.n` is empty; fill it"),
        ("{}", "wrong-shape: `that` is empty; fill it"),
        ("{any: []}", "wrong-shape: `any` is empty"),
        ("{model.n: {grater: 3}}", "unknown-key: unknown key `grater`"),
        ("{model.n: {gte: 3}}", "unknown-key: unknown key `gte`, did you mean `ge`?"),
        ("{model.n: {contains: 3}}", "wrong-operator: `contains` can't test an integer; use eq, ne"),
        ("{model.n: {matches: a}}", "wrong-operator"),
        ("{model.tags: a}", "no-shorthand: `model.tags` is a list; test it with contains"),
        ("{model.tags: [a]}", "no-shorthand"),
        ("{layer.one: a}", "no-shorthand: `layer.one` is a record; test it with eq or ne with {fact: …}"),
        ("{layer.one: {eq: bf16}}", "wrong-value: `eq` of `layer.one`: a record is compared with another record"),
        ("{layer.one: {gt: {fact: layer.two}}}", "wrong-operator"),
        (
            "{model.n: {fact: model.family}}",
            "wrong-type: `model.family` is a string; `eq` of `model.n` needs an integer",
        ),
        ("{model.n: {in: {fact: model.m}}}", "wrong-type: `model.m` is an integer; `in` of `model.n` needs a list"),
        ("{model.n: {fact: model.mm}}", "unknown-fact: unknown fact `model.mm`, did you mean `model.m`?"),
        ("{modle.n: 3}", "unknown-fact: unknown fact `modle.n`, did you mean `model.n`?"),
        ("{n: 3}", "or a fact with its group before a dot, such as `model.n`"),
        ("{or: [{model.n: 3}]}", "unknown key `or`, did you mean `any`?"),
        ("{and: [{model.n: 3}]}", "did you mean `all`?"),
        ("{'>=': 3}", "unknown key `>=`; expected `all`, `any`, `not`, `use`, `every_layer` or `any_layer`"),
        ("{model.n: {'==': 3}}", "unknown-key: unknown key `==`, did you mean `eq`?"),
        ("{model.n: {equals: 3}}", "did you mean `eq`?"),
        ("{model.n: {'>=': 3}}", "did you mean `ge`?"),
        ("{platform.arch: {ge: hopper}}", "`hopper` has no number to compare by; write one such as `sm90`"),
        (
            "{model.kv_lora_rank: 3}",
            "unknown fact `model.kv_lora_rank`; `gatekeeper facts` lists them all, files in facts/ declare",
        ),
        ("{model.tags: {any_item: {contains: a}}}", "unknown-key: unknown key `contains`"),
        ("{model.sizes: {any_item: x}}", "wrong-value"),
        ("{model.tags: {covers: 'a.{model.nn}'}}", "unknown-fact: unknown fact `model.nn`"),
        ("{model.tags: {covers: 'a.{'}}", "bad-template"),
        ("{library.torch: new}", "wrong-value: `eq` of `library.torch`: `new` is not a version"),
        ("{layer.role: mian}", "expected one of main, mtp, not `mian`, did you mean `main`?"),
        ("{use: nothing}", "unknown-condition: unknown condition `nothing`"),
        ("{model.n: {absent: yes}}", "only `true` and `false` are booleans"),
    ],
)
def test_a_condition_that_can_not_be_meant_is_a_fault(that: str, fault: str) -> None:
    feature = f"""\
feature: fused
summary: One thing instead of two.
scope: layer
requires:
  - {{id: a, protects: support, that: {that}, reason: It does not hold.}}
"""
    found = faults({"features/fused.yaml": feature})
    assert any(fault in one for one in found), found
    assert all(one.startswith("features/fused.yaml:5:") for one in found), found


CONDITIONS = """\
conditions:
  few: {doc: Only a few., that: {model.n: {lt: 3}}}
  none: {doc: Not even a few., that: {not: {use: few}}}
"""
USING = """\
feature: fused
summary: One thing.
requires:
  - {id: a, protects: support, that: {use: [few, none]}, reason: No.}
"""


def test_conditions_named_once_are_used_by_name() -> None:
    assert faults({"conditions.yaml": CONDITIONS, "features/fused.yaml": USING}) == []
    circle = CONDITIONS.replace("{model.n: {lt: 3}}", "{use: none}")
    found = faults({"conditions.yaml": circle, "features/fused.yaml": USING})
    assert found
    assert all("cycle: conditions use each other in a circle: " in fault for fault in found)
