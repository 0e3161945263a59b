"""Values and their types: versions by release, architectures within a vendor, records field by field."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.errors import FactError
from gatekeeper.values import ABSENT, UNKNOWN, Arch, Version, plain, records_equal, shown
from tests.small import rules


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [
        ("2.10", "2.1", 1),
        ("2.10.0+cpu", "2.10", 0),
        ("2.11.0.dev1", "2.11", 0),
        ("2.9rc1", "2.9", 0),
        ("595.58.03", "595.58.3", 0),
        ("9.0", "9", 0),
        ("1", "1.0.1", -1),
    ],
)
def test_versions_compare_by_release(one: str, other: str, order: int) -> None:
    left, right = Version(one), Version(other)
    assert (left > right, left == right, left < right) == (order > 0, order == 0, order < 0)
    if not order:
        assert hash(left) == hash(right)


@pytest.mark.parametrize("text", ["", "new", "2.x", "main-abc123", "1..2"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a version"):
        Version(text)


@pytest.mark.parametrize(
    ("one", "other", "less"),
    [
        ("sm90", "sm100", True),
        ("sm90", "sm90a", False),
        ("gfx90a", "gfx942", True),
        ("gfx942", "gfx1100", True),
        ("gfx942", "sm90", False),
        ("sm90", "gfx942", False),
        ("mp31", "sm90", False),
        ("banana", "cherry", False),
    ],
)
def test_architectures_are_ordered_within_one_vendor_only(one: str, other: str, less: bool) -> None:
    assert (Arch(one) < Arch(other)) is less
    assert (Arch(other) > Arch(one)) is less
    assert Arch(one) != Arch(other)


@pytest.mark.parametrize(
    ("pairs", "truth"),
    [
        ([("bf16", "bf16"), (2, 2)], True),
        ([("bf16", "bf16"), (2, 3)], False),
        ([("bf16", "bf16"), (ABSENT, ABSENT)], True),
        ([("bf16", "bf16"), (ABSENT, 2)], False),
        ([("bf16", "bf16"), (UNKNOWN, 2)], None),
        ([("bf16", "fp8"), (UNKNOWN, 2)], False),
        ([("bf16", "bf16"), (UNKNOWN, ABSENT)], None),
        ([(ABSENT, ABSENT), (ABSENT, ABSENT)], False),
        ([(UNKNOWN, ABSENT), (UNKNOWN, ABSENT)], False),
        ([(True, 1), (2, 2)], False),
    ],
)
def test_records_compare_field_by_field(pairs: Any, truth: bool | None) -> None:
    assert records_equal(pairs) is truth
    assert records_equal(reversed(pairs)) is truth
    assert records_equal((right, left) for left, right in pairs) is truth


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ABSENT, "none"),
        (UNKNOWN, "unknown"),
        (True, "true"),
        (3, "3"),
        (2.0, "2"),
        (2.5, "2.5"),
        ((1, "a"), "[1, a]"),
        ({"width": 2, "block": ABSENT}, "{width: 2, block: none}"),
        (Version("2.10"), "2.10"),
    ],
)
def test_a_sentence_shows_values_as_a_person_writes_them(value: Any, text: str) -> None:
    assert shown(value) == text


def test_plain_values_are_those_of_json() -> None:
    assert plain((Version("2.10"), Arch("sm90"), {"a": ABSENT})) == ["2.10", "sm90", {"a": None}]


WRONG = [
    ("model.n", True, "expected an integer, not the boolean `true`"),
    ("model.n", "8", "expected an integer, not the text `8`"),
    ("model.n", 2.5, "expected an integer, not the number `2.5`"),
    ("model.n", float("nan"), "expected an integer"),
    ("model.n", float("inf"), "expected an integer"),
    ("model.n", 0, "expected 1 or more, not `0`"),
    ("model.n", [8], "expected an integer, not a list"),
    ("model.n", {"a": 1}, "expected an integer, not a mapping"),
    ("model.rate", float("inf"), "expected a number"),
    ("model.rate", float("nan"), "expected a number"),
    ("model.rate", False, "expected a number, not the boolean"),
    ("server.force", 1, "expected a boolean, not the number `1`"),
    ("server.force", "true", "expected a boolean, not the text `true`"),
    ("model.family", 3, "expected a text, not the number `3`"),
    ("model.family", "\ud800", "expected Unicode text"),
    ("model.tags", "a", "expected a list, not the text `a`"),
    ("model.tags", [1], "expected a text, not the number `1`"),
    ("model.tags", [None], "expected a text"),
    ("model.sizes", [True], "expected an integer, not the boolean"),
    ("layer.role", "mian", "expected one of main, mtp, not `mian`, did you mean `main`?"),
    ("library.torch", 2.10, "expected a text such as `2.10`, not the number `2.1`"),
    ("library.torch", "latest", "`latest` is not a version"),
    ("platform.arch", 90, "expected a text such as `sm90`"),
    ("layer.one", "bf16", "expected a record of format, width"),
    ("layer.one", {"formt": "bf16"}, "unknown field `formt`, did you mean `format`?"),
    ("layer.one", {"width": "2"}, "expected an integer"),
    ("model.nn", 3, "unknown fact `model.nn`, did you mean `model.n`?"),
]


@pytest.mark.parametrize(("name", "raw", "message"), WRONG, ids=[f"{name}={raw!r}"[:40] for name, raw, _ in WRONG])
def test_a_value_of_the_wrong_type_is_an_error_that_names_the_fact(name: str, raw: Any, message: str) -> None:
    with pytest.raises(FactError) as caught:
        rules().catalogue.coerce(name, raw)
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_equal_numbers_are_one_value() -> None:
    coerce = rules().catalogue.coerce
    assert [type(coerce(name, 10.0)) for name in ("model.n", "model.rate")] == [int, int]
    assert coerce("model.rate", 2.5) == 2.5


@given(
    raw=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
        max_leaves=5,
    ),
    name=st.sampled_from(sorted(rules().catalogue)),
)
def test_any_value_has_the_type_or_is_refused(raw: Any, name: str) -> None:
    with contextlib.suppress(FactError):
        rules().catalogue.coerce(name, raw)
