"""Conditions in words: each operator has a phrase, and brackets keep `and` and `or` apart."""

from __future__ import annotations

import pytest

from gatekeeper import parse_rule_set
from gatekeeper.analysis.prose import PHRASES, in_words, listed
from gatekeeper.conditions import Condition
from gatekeeper.operators import OPERATORS
from tests.small import files


def condition(text: str) -> Condition:
    conditions = (
        f"conditions:\n  small: {{doc: It is small., that: {{model.n: 1}}}}\n  it: {{doc: The one., that: {text}}}\n"
    )
    return parse_rule_set(files({"conditions.yaml": conditions})).conditions["it"].that


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{model.n: 4}", "`model.n` is 4"),
        ("{server.force: true}", "`server.force` is true"),
        ("{model.family: [a, b, c]}", "`model.family` is `a`, `b` or `c`"),
        ("{model.family: {ne: a, absent: false}}", "`model.family` is not `a` and `model.family` is there"),
        ("{model.family: {not_in: [a, b]}}", "`model.family` is not `a` or `b`"),
        ("{model.n: {gt: 1, le: 8}}", "`model.n` is more than 1 and `model.n` is at most 8"),
        ("{model.n: {ge: {fact: model.m}}}", "`model.n` is at least `model.m`"),
        ("{library.torch: {lt: '2.10'}}", "`library.torch` is less than `2.10`"),
        ("{model.n: {divisible_by: 8}}", "`model.n` is a multiple of 8"),
        ("{layer.one: {fact: layer.two}}", "`layer.one` equals `layer.two`"),
        ("{layer.one: {ne: {fact: layer.two}}}", "`layer.one` differs from `layer.two`"),
        ("{model.tags: {contains: x}}", "`model.tags` contains `x`"),
        ("{model.n: {in: {fact: model.sizes}}}", "`model.n` is one of `model.sizes`"),
        ("{model.sizes: {any_item: {gt: 1, le: 9}}}", "`model.sizes` has an item that is more than 1 and is at most 9"),
        ("{model.sizes: {every_item: [64, 128]}}", "`model.sizes` has items of which every one is 64 or 128"),
        ("{model.family: {matches: 'a.*'}}", "`model.family` matches `a.*`"),
        ("{quant.ignored: {covers: 'a.b'}}", "`quant.ignored` covers the module `a.b`"),
        ("{model.n: {absent: true}}", "`model.n` is absent"),
        ("{not: {model.n: 1, model.m: 2}}", "not (`model.n` is 1 and `model.m` is 2)"),
        ("{any: [{model.n: 1}, {model.m: 2}]}", "`model.n` is 1 or `model.m` is 2"),
        (
            "{model.n: 1, any: [{model.m: 2}, {model.m: [3, 4]}]}",
            "`model.n` is 1, and (`model.m` is 2, or `model.m` is 3 or 4)",
        ),
        ("{every_layer: {that: {layer.size: 1}}}", "in every MoE layer, `layer.size` is 1"),
        (
            "{any_layer: {where: {layer.index: {ge: 3}}, that: {layer.size: 1}}}",
            "in some MoE layer where `layer.index` is at least 3, `layer.size` is 1",
        ),
        ("{all: []}", "always"),
    ],
)
def test_a_condition_in_words(text: str, words: str) -> None:
    assert in_words(condition(text)) == words


def test_every_operator_has_a_phrase() -> None:
    assert PHRASES.keys() == OPERATORS.keys()


def test_a_named_condition_is_said_with_its_name() -> None:
    one = condition("{use: small, model.m: 2}")
    named = {condition("{use: small}"): "small"}
    assert in_words(one, named) == "`model.n` is 1 (small) and `model.m` is 2"
    assert in_words(one, named, lambda name: f"see {name}") == "`model.n` is 1 (see small) and `model.m` is 2"


def test_lists_of_words() -> None:
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"], "or")) == ("a", "a and b", "a, b or c")
