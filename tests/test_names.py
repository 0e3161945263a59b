"""The one matcher of module names, as a table, and what it refuses."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.errors import FactError
from gatekeeper.names import METHODS, covers, excluded, finder, glob, matcher, spellings

ROWS = yaml.safe_load((Path(__file__).parent / "names.yaml").read_text("utf-8"))["rows"]
LAYER = "model.layers.3.mlp"
SHARED = [f"{LAYER}.shared_experts.{p}_proj" for p in ("gate", "up", "down")]


CASES = {  # threads in which a name was matched wrongly, or well
    "sgl-project/sglang": (22948, 23467, 25740, 31054, 32904, 36124, 36870, 38870, 39317, 39779, 40628, 9384, 25390),
    "vllm-project/vllm": (48226, 51695, 53248),
    "ROCm/ATOM": (755, 958, 1155),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}: {row['why']}")
def test_table(row: dict[str, Any]) -> None:
    if "name" in row:
        assert covers(row["method"], row["list"], row["name"]) is row["covers"]
        return
    names = [name.replace("{e}", str(e)) for name in row["names"] for e in (range(4) if "{e}" in name else (0,))]
    listed = [entry.replace("{e}", str(e)) for entry in row["list"] for e in (range(4) if "{e}" in entry else (0,))]
    missing = row.get("missing", [])
    test = matcher(row["method"], tuple(listed))
    assert excluded(test, names, lambda name: name not in missing) == row["covers"]


def test_every_method_has_rows_both_ways() -> None:
    for method in METHODS:
        assert {True, False} <= {row["covers"] for row in ROWS if row["method"] == method}, method


def test_every_known_case_has_a_row() -> None:
    refs = {ref for row in ROWS for ref in row.get("refs", ())}
    assert {f"{repository}#{number}" for repository, numbers in CASES.items() for number in numbers} == refs


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["re:.*shared_experts.*"], True),
        (["re:.*self_attn.*"], False),
        ([SHARED[0]], "partly"),
        (SHARED, True),
        ([], False),
    ],
)
def test_group_is_covered_wholly_partly_or_not(patterns: list[str], expected: object) -> None:
    assert excluded(matcher("quark", tuple(patterns)), SHARED) == expected


def test_an_empty_group_is_not_covered() -> None:
    assert excluded(matcher("quark", ("*",)), []) is False


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("re:(a+)+$", "could take for ever"),
        ("re:(a|aa)*b", "could take for ever"),
        ("re:(a?)*b", "could take for ever"),
        ("re:((a)*b{2,})+", "could take for ever"),
        ("re:" + ".*x" * 5, "could take for ever"),
        ("re:(?x)(.+) +Z", "could take for ever"),
        ("re:(?i-sx:(.+)#\n+Z)", "could take for ever"),
        ("re:(.+)(?#)+Z", "could take for ever"),
        ("re:" + "a?" * 9, "could take for ever"),
        ("re:(", "no regular expression"),
        ("re:*", "no regular expression"),
        ("re:" + "x" * 501, "501 characters"),
        ("*" + "x" * 501, "502 characters"),
    ],
)
def test_a_costly_or_broken_pattern_is_an_error(pattern: str, says: str) -> None:
    with pytest.raises(FactError, match=says):
        covers("quark", [pattern], "a" * 60)


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:.*attn.*(fused_wqa_wkv|wq_b|wo_a|wo_b)$",
        r"re:^(?!.*experts).*$",
        r"re:model\.layers\.[0-9]+\.self_attn\.(q|k|v)_proj",
        r"re:(?:model\.)?layers\.\d{1,2}\.mlp",
        "re:" + fnmatch.translate("*.a*b*c*d*.shared_experts.*"),
        r"re:(?s:(?>.*?shared_experts).*)\z",
    ],
)
def test_patterns_of_real_lists_are_taken(pattern: str) -> None:
    covers("compressed-tensors", [pattern], "model.layers.3.mlp.experts.0.gate_proj")


@given(st.text(alphabet="ab*+?|(){}[]\\.1,^$", max_size=14))
def test_any_pattern_is_answered_soon(pattern: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(FactError):
        covers("quark", ["re:" + pattern], "ab" * 35)
    assert time.monotonic() - start < 5


def test_spellings_start_with_the_name_itself() -> None:
    found = spellings("language_model.model.layers.3.mlp.gate")
    assert found[0] == "language_model.model.layers.3.mlp.gate"
    assert {"model.layers.3.mlp.gate", "model.language_model.layers.3.mlp.gate", "layers.3.mlp.gate"} < set(found)


def test_a_table_is_asked_by_name_first_and_then_in_its_order() -> None:
    find = finder("quark", ["*.mlp.*", "*.shared_experts.*", SHARED[1]])
    assert find(SHARED[0]) == "*.mlp.*"
    assert find(SHARED[1]) == find("language_model." + SHARED[1]) == SHARED[1]
    assert find("lm_head") is None


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.*.mlp", "model.layers.3.mlp", True),
        ("model.layers.*.mlp", "model.layers.3.x.mlp", False),
        ("model.**.mlp", "model.layers.3.mlp", True),
        ("model.*", "model.layers.3", False),
        ("**", "model.layers.3", True),
        ("*_proj", "gate_proj", True),
        ("a.b", "axb", False),
        ("model.layers.?", "model.layers.3", False),
    ],
)
def test_glob_of_rules(pattern: str, name: str, expected: bool) -> None:
    assert glob(pattern)(name) is expected


def test_glob_with_too_many_stars_is_refused() -> None:
    with pytest.raises(ValueError, match="simpler globs"):
        glob("*a" * 9)


def plainly(method: str, pattern: str, name: str) -> bool:
    """What one pattern covers of one spelling, read straight from the quantizers' rules and not made to be fast."""
    segments = name.split(".")
    if pattern.startswith("re:"):
        return method != "modelopt" and re.match(pattern.removeprefix("re:"), name) is not None
    if method == "compressed-tensors":
        return pattern in ("Linear", name)
    if method == "quark":
        return fnmatch.fnmatchcase(name, pattern)
    if method == "modelopt":
        return any(fnmatch.fnmatchcase(one, pattern) for one in (name, *segments))
    run = pattern.strip(".").split(".")
    windows = [segments[start : start + len(run)] for start in range(len(segments) - len(run) + 1)]
    return run != [""] and any(all(map(fnmatch.fnmatchcase, window, run)) for window in windows)


words = st.sampled_from(
    ["model", "layers", "mlp", "experts", "gate", "gate_proj", "1", "10", "*", "g*", "1?", "", "up"]
)
patterns = st.lists(words, max_size=4).map(".".join) | st.sampled_from(
    ["re:model", r"re:.*mlp\.gate", "Linear", "mod*"]
)
modules = st.lists(st.sampled_from(["model", "layers", "mlp", "experts", "gate", "gate_proj", "1", "10"]), min_size=1)


@given(st.sampled_from(sorted(METHODS)), st.lists(patterns, max_size=5), modules.map(".".join))
def test_matchers_made_to_be_fast_say_what_the_plain_rules_say(method: str, listed: list[str], name: str) -> None:
    expected = any(plainly(method, pattern, one) for pattern in listed for one in spellings(name))
    assert covers(method, listed, name) is expected
