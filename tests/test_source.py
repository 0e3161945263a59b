"""YAML as rule files have it: what is read, what is refused, and where each fault is said to be."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.errors import RuleError
from gatekeeper.source import MAX_BYTES, check_data, parse_scalar, parse_yaml, read_yaml


def faults(text: str) -> list[str]:
    with pytest.raises(RuleError) as caught:
        parse_yaml(text, "x.yaml")
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("True", "True"),
        ("null", None),
        ("~", None),
        ("", None),
        ("8", 8),
        ("+8", 8),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("9" * 30, int("9" * 30)),
        ("9" * 2000, "9" * 2000),
        ('"8"', "8"),
        ("'true'", "true"),
        ("[1, x]", [1, "x"]),
        ("{1: 2, null: 3}", {"1": 2, "null": 3}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize("text", ["2.10", "9.0", "1e2", "0x10", "010"])
def test_a_number_remembers_how_it_was_written(text: str) -> None:
    assert parse_scalar(text).text == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: b: c", "x.yaml:1:5: syntax"),
        ("- a: b\n c: d", "x.yaml:2:2: syntax"),
        ("a:\n\tb: c", "x.yaml:2:1: syntax"),
        ("{a: 1", "x.yaml:2:1: syntax"),
        ("a: '", "x.yaml:1:5: syntax"),
        ("a: 1\nb: \x00", "x.yaml:2:4: syntax: not YAML: the character #x0000 is not allowed"),
        ("a: é\x07", "x.yaml:1:5: syntax"),
        ("a: 1\nb: \udc80", "x.yaml:2: not-utf8"),
        ("a: 1\nb: 2\na: 3", "x.yaml:3:1: duplicate-key: `a` stands twice in this mapping, first in line 1"),
        ("{a: 1, a: 1}", "x.yaml:1:8: duplicate-key"),
        ("a: &x 1", "x.yaml:1:4: anchor"),
        ("a: *x", "x.yaml:1:4: alias"),
        ("<<: {a: 1}", "x.yaml:1:1: merge-key"),
        ("!!python/object:os.system {}", "x.yaml:1:1: tag"),
        ("a: !!str 3", "x.yaml:1:4: tag"),
        ("a: 1\n---\nb: 2", "x.yaml:2:1: many-documents"),
        ("? [a]\n: b", "x.yaml:1:3: key"),
        ("? {a: 1}\n: b", "x.yaml:1:3: key"),
        ("reason: Fixed in #25974", "x.yaml:1:9: comment-in-text: a comment cuts this `reason`; quote it"),
        ("summary: A\t# b", "x.yaml:1:10: comment-in-text"),
        ("doc: A # b\r", "x.yaml:1:6: comment-in-text"),
        ("{doc: one, two}", "x.yaml:1:12: cut-text"),
        ("[" * 80 + "]" * 80, "x.yaml:1:65: too-deep"),
        ("{a: " * 80 + "1" + "}" * 80, "x.yaml:1:257: too-deep"),
    ],
)
def test_what_is_refused_is_said_with_its_place(text: str, fault: str) -> None:
    assert faults(text)[0].startswith(fault)


def test_an_alias_bomb_is_refused_before_it_unfolds() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    assert len([fault for fault in faults("\n".join(lines)) if ": alias:" in fault]) == 118


def test_every_fault_of_a_file_is_found_in_one_run() -> None:
    found = faults("a: 1\na: 2\nreason: see #3\nb: &x 4\nc: !!int 5\n")
    assert [fault.split(": ")[1] for fault in found] == ["duplicate-key", "comment-in-text", "anchor", "tag"]


@pytest.mark.parametrize("text", ["doc: 'a # b'", "doc: a#b", "doc: >\n  a # b\n", "name: a # b", "doc: a\n# b"])
def test_a_comment_that_cuts_nothing_is_fine(text: str) -> None:
    parse_yaml(text, "x.yaml")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff\xfe", "not-utf8"),
        ("a: é".encode("latin-1"), "not-utf8"),
        (b"a: 1\n" * (MAX_BYTES // 5 + 1), "too-large"),
        (b"\x00\x01\x02", "syntax"),
    ],
)
def test_a_file_that_is_no_text_is_one_fault(tmp_path: Path, raw: bytes, code: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    with pytest.raises(RuleError) as caught:
        read_yaml(path)
    assert [fault.code for fault in caught.value.faults] == [code]


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path).data == {"a": 1}


def test_a_folder_called_like_a_file_and_a_missing_file_are_faults(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    for name in ("x.yaml", "y.yaml", "a" * 300):
        with pytest.raises(RuleError, match=r"not-a-file|unreadable"):
            read_yaml(tmp_path / name)


def test_where_finds_values_keys_and_the_nearest_ancestor() -> None:
    document = parse_yaml("a:\n  - b: 1\n    c: [2, 3]\n", "x.yaml")
    assert str(document.where(("a", 0, "c", 1))) == "x.yaml:3:12"
    assert str(document.where(("a", 0, "b"))) == "x.yaml:2:5"
    assert str(document.where(("a", 0, "nothing", "there"))) == "x.yaml:2:5"
    assert str(parse_yaml("", "x.yaml").where()) == "x.yaml"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "this must be a mapping, not `null`"),
        ([], "this must be a mapping, not `[]`"),
        ({"fact": {}}, "unknown key `fact`, did you mean `facts`?"),
        ({"facts": None}, "`facts` must be a mapping, not `null`"),
        ({"facts": {"x": 1}}, "`x` can't stand here; expected a fact name with a dot"),
        ({"layers": {}}, "`layers` must be a list, not `{}`"),
        ({"runner": "drft"}, '`runner` must be `target` or `draft`, not `"drft"`, did you mean `draft`?'),
    ],
)
def test_a_schema_fault_says_what_was_expected(data: Any, message: str) -> None:
    assert any(message in fault.message for fault in check_data(data, "record", "line")), message


def test_every_missing_and_every_unknown_key_is_named() -> None:
    found = [fault.message for fault in check_data({"x": 1, "y": 2}, "ruleset", "line")]
    for key in ("name", "version", "language"):
        assert f"missing key `{key}`; add it" in found
    assert sum(message.startswith("unknown key") for message in found) == 2


@given(text=st.text(alphabet=st.sampled_from(list("ab:-[]{}#&*!|>'\"%@`,? \n\r\t\x00\u2028\x85é~01.<=")), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(RuleError):
        parse_yaml(text, "x.yaml")


@pytest.mark.parametrize(
    ("raw", "line", "column", "source"),
    [
        (b"a: 1\r\nb: \xc3\xa9\xff\n", 2, 5, "b: é\\xff"),
        (b"\xff\xfea\x00", 1, 1, "\\xff\\xfea\x00"),
    ],
)
def test_bytes_that_are_no_text_are_shown_where_they_stand(
    raw: bytes, line: int, column: int, source: str, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_bytes(raw)
    with pytest.raises(RuleError) as caught:
        read_yaml(tmp_path / "x.yaml")
    (fault,) = caught.value.faults
    assert (fault.code, fault.where.line, fault.where.column) == ("not-utf8", line, column)
    assert fault.where.source == source
