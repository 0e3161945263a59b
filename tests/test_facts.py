"""Facts: known, absent or unknown; defaults, derived facts, flags, what the engine resolved, records, layers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper import ABSENT, UNKNOWN, FactError, from_record
from gatekeeper.source import check_data
from tests.small import rules


def read(record: dict[str, Any], name: str) -> Any:
    """The value of one fact of a line."""
    return from_record(rules().catalogue, record).reading(name).value


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ({}, "model.n", UNKNOWN),
        ({"facts": {"model.n": 4}}, "model.n", 4),
        ({"facts": {"model.n": 4.0}}, "model.n", 4),
        ({"facts": {"model.n": None}}, "model.n", ABSENT),
        # A default stands for what is absent, never for what is unknown.
        ({}, "model.m", UNKNOWN),
        ({"facts": {"model.m": None}}, "model.m", 7),
        # Derived.
        ({"facts": {"model.n": 4}}, "model.double", 8),
        ({"facts": {"model.n": None}}, "model.double", ABSENT),
        ({}, "model.double", UNKNOWN),
        # Flags: null is not set.
        ({"facts": {"server.force": None}}, "server.force", False),
        ({"facts": {"parallel.tp_size": None}}, "parallel.tp_size", UNKNOWN),
        ({"facts": {"server.extra": None}}, "server.extra", UNKNOWN),
        ({"facts": {"server.none": None}}, "server.none", ABSENT),
        # Assumed groups are at their defaults, less what is named as unknown.
        ({"assume": ["server"]}, "server.force", False),
        ({"assume": ["server"]}, "server.none", ABSENT),
        ({"assume": ["server"]}, "server.extra", UNKNOWN),
        ({"assume": ["server"], "unknown": ["server.force"]}, "server.force", UNKNOWN),
        ({"assume": ["server"], "unknown": ["server.force", "server.force"]}, "server.force", UNKNOWN),
        ({"assume": ["parallel"]}, "parallel.tp_size", UNKNOWN),
        ({"assume": ["model"]}, "model.n", ABSENT),
        ({"assume": ["model"]}, "model.m", 7),
        # What the engine resolved is what the operator typed, unless that is `auto`.
        ({"facts": {"server.backend": "x"}}, "engine.backend", UNKNOWN),
        ({"facts": {"server.backend": "x"}, "assume": ["engine"]}, "engine.backend", "x"),
        ({"facts": {"server.backend": "x", "engine.backend": None}}, "engine.backend", "x"),
        ({"facts": {"server.backend": "auto", "engine.backend": None}}, "engine.backend", UNKNOWN),
        ({"facts": {"engine.backend": None}}, "engine.backend", UNKNOWN),
        ({"facts": {"engine.backend": None}, "assume": ["server"]}, "engine.backend", UNKNOWN),
        ({"facts": {"server.backend": "x", "engine.backend": "y"}}, "engine.backend", "y"),
        (
            {"facts": {"server.backend": "x"}, "assume": ["engine"], "unknown": ["engine.backend"]},
            "engine.backend",
            UNKNOWN,
        ),
        ({"assume": ["engine"]}, "engine.name", ABSENT),
        # The runner is said once.
        ({}, "model.runner", "target"),
        ({"runner": "draft"}, "model.runner", "draft"),
    ],
)
def test_what_a_line_says_of_a_fact(record: dict[str, Any], name: str, value: Any) -> None:
    found = read(record, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        ({}, "layer.role", "main"),
        ({"layer.role": None}, "layer.role", "main"),
        ({"layer.one": {"format": "bf16", "width": 2}}, "layer.one.width", 2),
        ({"layer.one.width": 2}, "layer.one.width", 2),
        ({"layer.one": {"format": "bf16"}}, "layer.one.width", UNKNOWN),
        ({"layer.one": {"width": None}}, "layer.one.width", ABSENT),
        ({"layer.one": None}, "layer.one.width", ABSENT),
        ({"layer.one": {"format": "a"}, "layer.two": {"format": "a"}}, "layer.alike", UNKNOWN),
        ({"layer.one": {"format": "a"}, "layer.two": {"format": "b"}}, "layer.alike", False),
        ({"layer.one": {"format": "a", "width": 1}, "layer.two": {"format": "a", "width": 1}}, "layer.alike", True),
        (
            {"layer.one.format": "a", "layer.one.width": 1, "layer.two": {"format": "a", "width": 1}},
            "layer.alike",
            True,
        ),
        (
            {"layer.one": {"format": "a", "width": None}, "layer.two": {"format": "a", "width": None}},
            "layer.alike",
            True,
        ),
        ({"layer.one": {"format": "a", "width": 1}, "layer.two": None}, "layer.alike", False),
        ({"layer.two": None}, "layer.there", False),
        ({"layer.two.format": "a"}, "layer.there", True),
        ({}, "layer.there", UNKNOWN),
        ({"layer.size": 9}, "layer.big", True),
        ({"layer.size": None}, "layer.big", False),
    ],
)
def test_what_a_line_says_of_a_layer(layer: dict[str, Any], name: str, value: Any) -> None:
    facts = from_record(rules().catalogue, {"facts": {"model.n": 4}, "layers": [layer]})
    assert facts.layers is not None
    assert facts.reading(name, facts.layers[0]).value == value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"facts": {"model.nn": 4}}, "unknown fact `model.nn`, did you mean `model.n`?"),
        ({"facts": {"model.nn": None}}, "unknown fact `model.nn`"),
        ({"facts": {"model.n": "4"}}, "`model.n`: expected an integer, not the text `4`"),
        ({"facts": {"model.double": 8}}, "`model.double` is derived and can't be given; give `model.n`"),
        ({"facts": {"model.double": None}}, "is derived and can't be given"),
        ({"unknown": ["model.double"]}, "is derived and can't be given"),
        ({"facts": {"model.runner": "draft"}}, "`model.runner` is given by `runner`"),
        ({"facts": {"layer.size": 3}}, "`layer.size` is a fact of one layer; give it in `layers`"),
        ({"layers": [{"model.n": 3}]}, "`model.n` can't stand in a layer"),
        ({"layers": [{"layer.sise": 3}]}, "unknown fact `layer.sise`, did you mean `layer.size`?"),
        ({"layers": [{"layer.big": True}]}, "`layer.big` is derived and can't be given"),
        ({"layers": [{"layer.one": {"width": 1}, "layer.one.width": 1}]}, "given twice, alone and in the record"),
        ({"layers": [{"layer.role": "both"}]}, "expected one of main, mtp"),
        ({"assume": ["sever"]}, "`assume` names no group of facts: `sever`, did you mean `server`?"),
        ({"unknown": ["server.fource"]}, "unknown fact `server.fource` under `unknown`, did you mean `server.force`?"),
        (
            {"facts": {"server.force": True}, "unknown": ["server.force"]},
            "named under `unknown`; drop either (in a table: no row takes back what its `base` gives)",
        ),
    ],
)
def test_a_line_that_can_not_be_believed_says_why(record: dict[str, Any], message: str) -> None:
    with pytest.raises(FactError) as caught:
        from_record(rules().catalogue, record)
    assert message in str(caught.value)


def test_a_division_that_does_not_come_out_even_is_absent_with_a_note() -> None:
    from gatekeeper.load import shipped_rules

    facts = from_record(
        shipped_rules().catalogue,
        {"facts": {"model.moe_intermediate_size": 2048, "parallel.tp_size": 3, "parallel.ep_size": 1}},
    )
    reading = facts.reading("moe.shard_width")
    assert reading.value is ABSENT
    assert "does not come out even" in reading.note


def test_target_and_draft_load_their_own_layers() -> None:
    layers = [{"layer.index": 3}, {"layer.index": 4, "layer.role": "main"}, {"layer.index": 61, "layer.role": "mtp"}]
    for runner, indices in (("target", [3, 4]), ("draft", [61])):
        facts = from_record(rules().catalogue, {"runner": runner, "layers": layers})
        assert [values["layer.index"] for values in facts.runner_layer_values or ()] == indices


def test_witnesses_say_where_a_value_came_from() -> None:
    facts = from_record(rules().catalogue, {"facts": {"model.n": 4, "model.m": None}, "assume": ["server"]})
    told = {name: facts.reading(name).witness for name in ("model.n", "model.m", "model.double", "server.force")}
    assert told == {
        "model.n": "given",
        "model.m": "default",
        "model.double": "derived: model.n * 2",
        "server.force": "default",
    }


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(["auto", "bf16"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["format", "width", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from(sorted(rules().catalogue))
LINES = st.fixed_dictionaries(
    {},
    optional={
        "id": ANYTHING,
        "runner": st.sampled_from(["target", "draft"]) | ANYTHING,
        "facts": st.dictionaries(NAMES, ANYTHING, max_size=4) | ANYTHING,
        "layers": st.lists(
            st.dictionaries(NAMES.filter(lambda name: name.startswith("layer.")), ANYTHING, max_size=4) | ANYTHING,
            max_size=2,
        )
        | ANYTHING,
        "assume": st.lists(st.sampled_from(["server", "engine", "model", "layer", "x"]), max_size=3) | ANYTHING,
        "unknown": st.lists(NAMES, max_size=2) | ANYTHING,
    },
)


@given(record=LINES | ANYTHING)
def test_any_line_is_facts_or_an_error(record: Any) -> None:
    line_is_facts_or_an_error(record)


@pytest.mark.slow_property
@given(record=LINES | ANYTHING)
def test_any_line_is_facts_or_an_error_at_length(record: Any) -> None:
    line_is_facts_or_an_error(record)


def line_is_facts_or_an_error(record: Any) -> None:
    faults = check_data(record, "record", "line")
    if faults:
        assert all(fault.message for fault in faults)
        return
    with contextlib.suppress(FactError):
        from_record(rules().catalogue, record)
