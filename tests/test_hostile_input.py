"""Bad input never crashes: any lines of facts, any rule files, any slip of an author's hand in the shipped rules."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from gatekeeper import RuleError, RuleSet, decide, from_record, load_rules, parse_rule_set
from gatekeeper.cli.decide import _decide_lines
from gatekeeper.diagnostics import diagnostics
from gatekeeper.load import shipped_rules
from gatekeeper.log import quiet
from tests import from_schema
from tests.small import FILES as SMALL
from tests.strategies import records, rule_sets, to_yaml

RULES = Path(__file__).resolve().parent.parent / "rules"

# ---------------------------------------------------------------------------------------------------- lines of facts


def typed_values(type_: str) -> list[Any]:
    """JSON values for a fact of a type: right ones, those at the edge, and one that is none."""
    numbers = [0, 1, 8, 384, -1, 2**63, 10**30]
    right: dict[str, list[Any]] = {
        "boolean": [True, False],
        "integer": numbers,
        "number": [*numbers, 0.5, 1e308],
        "string": ["none", "fp8", "unknown", "", "a" * 300, "{model.n}", "\x1b[31m"],
        "version": ["2.10", "2.10.0+cpu", "2.11.0.dev1", "", "x", "1" * 400, "1!2"],
        "arch": ["sm90", "gfx942", "", "sm", "sm" + "9" * 400],
        "list": [[], ["lm_head"], ["re:("], ["re:(a+)+$"], [128, 128], [None], [[1]]],
        "record": [{}, {"format": "bf16"}, {"format": None, "width": 1}, {"format": {}}, []],
    }
    return [*right.get(type_, ["auto", "on", "off", "target", "other"]), None]


@st.composite
def fact_lines(draw: st.DrawFn, rules: RuleSet) -> bytes:
    """One line: often a record of real facts, sometimes any JSON, broken JSON or no text at all."""
    kind = draw(st.sampled_from(["record"] * 5 + ["json", "cut", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60)).replace(b"\n", b"").replace(b"\r", b"")
    data = draw(from_schema.JSON if kind == "json" else fact_records(rules))
    text = json.dumps(data, ensure_ascii=draw(st.booleans()))
    if kind == "cut":
        text = text[: draw(st.integers(0, len(text)))] + draw(st.text('{}[]",:0\ud800\x00 ', max_size=4))
    return text.encode(errors="surrogatepass").replace(b"\n", b"").replace(b"\r", b"")


@st.composite
def fact_records(draw: st.DrawFn, rules: RuleSet, share: int = 12) -> dict[str, Any]:
    """A record of facts that there are; one part in `share` is any JSON."""

    def any_json() -> bool:
        return draw(st.integers(0, share - 1)) == share - 1

    def facts(*, layer: bool) -> Any:
        if any_json():
            return draw(from_schema.JSON)
        names = [name for name in rules.catalogue if name.startswith("layer.") == layer]
        chosen = draw(st.lists(st.sampled_from(names), max_size=12, unique=True))
        values = {name: draw(st.sampled_from(typed_values(rules.catalogue[name].type))) for name in chosen}
        if any_json():
            odd = st.sampled_from(["model", "model.", "nope.x", "model.n.x", "layer.one.width", "feature.fused.state"])
            values[draw(odd | st.text(max_size=8) | st.sampled_from(names))] = draw(from_schema.JSON)
        return values

    record: dict[str, Any] = {}
    groups = sorted({name.split(".")[0] for name in rules.catalogue})
    parts: dict[str, Callable[[], Any]] = {
        "id": lambda: draw(st.integers(-1, 5) | st.text(max_size=5)),
        "runner": lambda: draw(st.sampled_from(["target", "draft"])),
        "facts": lambda: facts(layer=False),
        "layers": lambda: [facts(layer=True) for _ in range(draw(st.integers(0, 3)))],
        "assume": lambda: draw(st.lists(st.sampled_from([*groups, "nope"]), max_size=4)),
        "unknown": lambda: draw(st.lists(st.sampled_from([*rules.catalogue, "nope.x"]), max_size=3)),
    }
    for key, part in parts.items():
        if draw(st.integers(0, 2)) or key == "facts":
            record[key] = draw(from_schema.JSON) if any_json() else part()
    if any_json():
        record[draw(st.text(max_size=6))] = draw(from_schema.JSON)
    return record


def answers_to(rules: RuleSet, lines: Sequence[bytes]) -> list[Any]:
    """What `gatekeeper decide --facts` answers, and that its exit code is one of those it has."""
    out = io.StringIO()
    with quiet(), contextlib.redirect_stdout(out):
        code = _decide_lines(rules, io.BytesIO(b"\n".join(lines)), None, strict=True)
    assert code in (0, 1, 3)
    # Not `splitlines`: U+2028 and its like are no ends of lines in JSON.
    return [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().split("\n")[:-1]]


def lines_are_answered(rules: RuleSet, data: st.DataObject) -> None:
    lines = data.draw(st.lists(fact_lines(rules), max_size=3))
    note(repr(lines))

    answers = answers_to(rules, lines)

    assert len(answers) == len([line for line in lines if line.strip()])
    for answer in answers:
        assert set(answer) in ({"id", "error"}, {"id", "decisions"})
        if "error" in answer:
            assert answer["error"].startswith("<stdin>:")
        else:
            assert [one["feature"] for one in answer["decisions"]] == sorted(rules.features)


@cache
def rules_named(name: str) -> RuleSet:
    return load_rules() if name == "shipped" else parse_rule_set(dict(WITH_ALL))


def shipped_lines(data: st.DataObject) -> None:
    lines_are_answered(rules_named("shipped"), data)


def small_lines(data: st.DataObject) -> None:
    lines_are_answered(rules_named("small"), data)


# -------------------------------------------------------------------------------------------------------- rule files

WITH_ALL: Mapping[str, str] = {
    **SMALL,
    "conditions.yaml": "conditions:\n  big: {doc: It is big., that: {model.n: {ge: 64}}}\n",
    "requirements.yaml": (
        "requirements:\n"
        "  alike: {protects: correctness, that: {layer.one: {fact: layer.two}}, reason: '{difference}.'}\n"
        "  few: {protects: support, that: {model.n: {lt: 9}}, reason: 'There are {model.n}.'}\n"
    ),
    "features/stored.yaml": "feature: stored\nsummary: How it is stored.\nscope: layer\nrequires: [{use: alike}]\n",
    "features/choice.yaml": (
        "feature: choice\nsummary: One of two.\nrequest: server.backend\noutputs: {size: {type: integer, else: null}}\n"
    ),
    "gates/choice.yaml": (
        "feature: choice\ngate: main\napplies_to: {model.family: x}\nrequires: [{use: few}]\n"
        "options:\n  - {option: one, outputs: {size: 1}}\n  - {option: two, outputs: {size: {fact: model.n}}}\n"
    ),
}
FACT_LINES = """\
model.family model.n model.m model.rate model.tags model.sizes model.double quant.method quant.ignored
layer.index layer.size layer.big layer.one layer.two layer.one.format layer.alike platform.arch
parallel.tp_size server.force server.forbid server.backend engine.backend library.torch model.runner
feature.fused.state feature.choice.option feature.choice.outputs.size feature.stored.state
""".splitlines()
FACTS = [*[name for line in FACT_LINES for name in line.split()] * 2, "nope.x", "feature.nope.state"]
EXPRESSIONS = """\
model.n + 1
model.n / model.m
len(model.tags)
coalesce(model.n, 4)
min(model.n, 2)
-model.n
1
model.n > model.m
present(layer.one)
layer.one == layer.two
not server.force
model.nope
7 + 'a'
1 if server.force else 'a'
lambda: 1
model.n ** 9
().__class__
model.n +
[]
[1], 2
true
True
item(model.sizes, 0)
item(model.tags, model.n)
f'{1}'
model.n < model.m < 3
'a' in model.tags
{1: 2}
model
(
1_000
0x1F
min()
len()
present()
coalesce()
None
...
1j
b'a'
model.n if
model.n @ 2
feature.fused.state == 'on'
model.tags == ['a', 'b']
library.torch >= '2.10'
platform.arch == 'sm90'
""".splitlines()
TEMPLATES = [
    "There are {model.n}.",
    "{difference}",
    "{nope.x}",
    "{",
    "}",
    "{{}}",
    "{}",
    "{model.n!r:>9}",
    "{model.n.x}",
    "Fixed in #25974",
]
SENTENCES = ["A sentence that says why.", "because it is so, and that is all", "x", "öß 漢字 \u202e\x85", "a\nb: c"]
NAMES = ["fused", "stored", "choice", "main", "one", "two", "alike", "few", "big", "new", "auto", "on", "off", "x", "1"]
WORDS: dict[str, list[str]] = {
    "": [*NAMES, *SENTENCES, "2.10", "sm90", "true", "null", "~", "1e9", "none", "unknown"],
    "fact": FACTS,
    "facts": ["model.new", "model.other", "layer.new", "server.new", "engine.backend", "moe.new", "new.new"],
    "derive": EXPRESSIONS,
    "moe_layer": EXPRESSIONS,
    "reason": TEMPLATES,
    "covers": [*TEMPLATES, "model.layers.3.mlp", "a.{model.family}"],
    "matches": ["*", "**", "a.*", "[", "re:(", "a**b", ""],
    "amends": ["choice/main", "fused/fused", "alike", "few", "stored/stored", "nope", "choice/nope"],
    "requirement": ["few", "enough", "nope"],
    "feature": ["choice", "choice", "fused", "stored", "nope"],
    "gate": ["main", "other"],
    "use": ["big", "big", "few", "alike"],
    "option": ["one", "two", "three", "auto"],
    "before": ["one", "two", "nope"],
    "outputs": ["size", "size", "other"],
    "extends": ["shipped", ".", "..", "/", "nope", "\x00"],
    "code": ["missing-refs", "open-range", "nope"],
}
PLACES = {
    "feature": ["features/fused.yaml", "features/new.yaml"],
    "gate": ["gates/choice.yaml", "gates/new/a.yaml"],
    "facts": ["facts/more.yaml"],
    "conditions": ["conditions.yaml"],
    "requirements": ["requirements.yaml"],
    "family": ["families/new.yaml"],
    "format": ["formats/new.yaml"],
    "platforms": ["platforms.yaml"],
    "layouts": ["layouts.yaml"],
    "ruleset": ["ruleset.yaml"],
    "amendment": ["gates/amendment.yaml"],
}
# Those with the most behind them, more often.
KINDS = ["feature", "feature", "gate", "gate", "facts", "facts", "requirements", "amendment", *PLACES]


@st.composite
def hostile_files(draw: st.DrawFn) -> tuple[dict[str, str], list[dict[str, str]]]:
    """A sound rule set in which one to three files are of a schema's shape and of any content; and an overlay."""
    files, overlay = dict(WITH_ALL), {"ruleset.yaml": "name: over\nversion: 1\nlanguage: 1\n"}
    overlaid = False
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(KINDS))
        content = draw(from_schema.files(kind, WORDS))
        name = draw(st.sampled_from(PLACES[kind]))
        if kind in ("feature", "family", "format") and isinstance(content, dict) and draw(st.integers(0, 9)):
            content[kind] = Path(name).stem
        # JSON is YAML too, in flow style with everything quoted; block style writes words and numbers bare.
        text = json.dumps(content, ensure_ascii=False) if draw(st.booleans()) else written(content)
        into_overlay = kind == "amendment" or draw(st.integers(0, 7)) == 0
        (overlay if into_overlay else files)[name] = text
        overlaid = overlaid or into_overlay
    return files, [overlay] if overlaid else []


def written(content: Any) -> str:
    try:
        return to_yaml(content)
    except yaml.YAMLError:
        return json.dumps(content)


def load(files: Mapping[str, str], overlays: Sequence[Mapping[str, str]] = ()) -> RuleSet | None:
    """Load a rule set; None where it is refused, as it should be: with places and codes."""
    try:
        return parse_rule_set(files, overlays)
    except RuleError as error:
        faults = error.faults
    names = {*files, *(name for overlay in overlays for name in overlay)}
    assert faults
    for fault in faults:
        assert fault.where.file in names, fault
        assert fault.code in codes(), fault
        assert fault.message.strip(), fault
        assert "\n" not in fault.message, fault
    return None


@cache
def codes() -> frozenset[str]:
    """The codes that `gatekeeper help` explains."""
    return frozenset(diagnostics())


def rule_files_are_loaded_or_refused(data: st.DataObject) -> None:
    files, overlays = data.draw(hostile_files())
    for name, text in files.items():
        if text != WITH_ALL.get(name):
            note(f"--- {name}\n{text}")
    note(str(overlays))

    rules = load(files, overlays)

    if rules is not None:
        decides_or_says_why(rules, data.draw(fact_records(rules)))
        decides_or_says_why(rules, {"facts": {"model.n": 4, "model.family": "x"}, "layers": [{"layer.index": 3}]})


def decides_or_says_why(rules: RuleSet, record: Any) -> None:
    """Decide one record through the command: an answer or an error, nothing else."""
    (answer,) = answers_to(rules, [json.dumps(record).encode()])
    assert set(answer) in ({"id", "error"}, {"id", "decisions"})


# ------------------------------------------------------------------------------------------------------------- grafts


@st.composite
def grafted(draw: st.DrawFn, content: Any) -> Any:
    """The content of a file with one part of it lost, replaced by anything, or by another of its parts."""
    parts = list(paths(content))
    # Deep parts more often: without a whole entry nothing else of the file is looked at.
    deep = [at for at in parts if len(at) > 2] or parts
    at = draw(st.sampled_from(deep if draw(st.integers(0, 7)) else parts))
    kind = draw(st.sampled_from(["alike"] * 4 + ["lose", "any", "word", "other", "wrap", "double"]))
    if kind == "alike":
        old = part_of(content, at)
        new = draw(
            st.sampled_from([one for one in map(partial(part_of, content), deep) if type(one) is type(old)] or [old])
        )
    elif kind == "any":
        new = draw(from_schema.JSON)
    elif kind == "word":
        new = draw(st.sampled_from([*FACTS, *EXPRESSIONS, *TEMPLATES, *SENTENCES, *NAMES]))
    elif kind == "other":
        new = part_of(content, draw(st.sampled_from(parts)))
    else:
        new = part_of(content, at)
        new = {"lose": LOST, "wrap": [new], "double": [new, new]}[kind]
    return planted(content, at, new)


LOST = object()
At = tuple[str | int, ...]


def paths(content: Any, at: At = ()) -> Iterator[At]:
    yield at
    if isinstance(content, Mapping | list):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from paths(value, (*at, key))


def part_of(content: Any, at: At) -> Any:
    for key in at:
        content = content[key]
    return content


def planted(content: Any, at: At, new: Any) -> Any:
    """A copy with `new` at a path, or nothing there."""
    if not at:
        return {} if new is LOST else new
    inner = planted(content[at[0]], at[1:], new) if len(at) > 1 else new
    if isinstance(content, list):
        number = int(at[0])
        return [*content[:number], *([] if inner is LOST else [inner]), *content[number + 1 :]]
    return {
        key: value if key != at[0] else inner for key, value in content.items() if key != at[0] or inner is not LOST
    }


def grafts_are_loaded_or_refused(data: st.DataObject) -> None:
    facts, files, overlays = data.draw(rule_sets())
    folder = data.draw(st.sampled_from([files, files, *overlays]))
    for name in data.draw(st.lists(st.sampled_from(sorted(folder)), min_size=1, max_size=2, unique=True)):
        folder[name] = to_yaml(data.draw(grafted(yaml.safe_load(folder[name]))))
        note(f"--- {name}\n{folder[name]}")

    rules = load(files, overlays)

    if rules is not None:
        decides_or_says_why(rules, data.draw(records(facts)))
        decides_or_says_why(rules, data.draw(fact_records(rules)))


# -------------------------------------------------------------------------------------------------------- slips of hand


@cache
def shipped_texts() -> Mapping[str, str]:
    """The files of the shipped rule set by their relative names."""
    folders = [path.parent for path in RULES.rglob("ruleset.yaml") if path.parent != RULES]
    paths = [path for path in sorted(RULES.rglob("*.yaml")) if not any(folder in path.parents for folder in folders)]
    return {path.relative_to(RULES).as_posix(): path.read_text("utf-8") for path in paths}


TOKEN_LINES = """\
true false null ~ on yes 0 -1 2.10 1e999 0x1F 1_000 1:30 18446744073709551616 .nan
[] {} [ ] { } : , - ? | > & * ! % @ ` # ' " << &a *a !!python/none --- ... {x.y}
""".splitlines()
CONTROLS = ["\t", "\x00", "\x07", "\x85", "\ufeff", "\u202e", "\r", "\n"]
TOKENS = [*CONTROLS, *(token for line in TOKEN_LINES for token in line.split())]


@st.composite
def slips(draw: st.DrawFn, text: str) -> str:
    """A text after one to three slips: a line lost, doubled, moved or indented, a token changed or put in."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        lines = text.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(
            st.sampled_from(["lose", "double", "swap", "indent", "put in", "put in", "change", "change", "cut"])
        )
        if kind == "lose":
            del lines[at]
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "indent":
            lines[at] = "  " + lines[at] if draw(st.booleans()) else lines[at][2:]
        else:
            column = draw(st.integers(0, len(lines[at])))
            # To change is to put the token in the place of a few characters, to cut is to leave nothing there.
            length = 0 if kind == "put in" else draw(st.integers(1, 12))
            token = "" if kind == "cut" else draw(st.sampled_from(TOKENS))
            lines[at] = lines[at][:column] + token + lines[at][column + length :]
        text = "\n".join(lines)
    return text


def slips_are_seen_or_harmless(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(shipped_texts())))
    text = data.draw(slips(shipped_texts()[name]))
    note(f"--- {name}\n{text}")
    # Families and formats stand by themselves, and there are many.
    files = {n: t for n, t in shipped_texts().items() if n == name or not n.startswith(("families/", "formats/"))}

    rules = load({**files, name: text})

    if rules is not None and data.draw(st.integers(0, 3)) == 0:
        decides_or_says_why(rules, data.draw(fact_records(rules)))


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(autouse=True)
def the_shipped_rules_stay() -> Iterator[None]:
    """Nothing of a refused load is left: the rules that were loaded before decide as they did."""
    loads = [{"model.family": family, "model.n_routed_experts": 256} for family in ("deepseek_v3", "mixtral")]

    def digests(rules: RuleSet) -> list[str]:
        with quiet():
            decisions = [decide(rules, from_record(rules.catalogue, {"facts": facts})) for facts in loads]
        return [rules.digest, *(one.digest for decided in decisions for one in decided.values())]

    before = digests(shipped_rules())
    yield
    assert digests(shipped_rules()) == digests(load_rules()) == before


FOUND = {
    "a shape of a list and a number": {
        "formats/new.yaml": (
            "format: new\ndoc: A format.\n"
            "signatures: [{parts: [{role: weight, suffix: w, dtype: [F32], shape: [[1], 2]}]}]\n"
        )
    },
    "a fact whose name ends with a line break": {
        "facts/more.yaml": 'facts: {"model.x\\n": {type: integer, doc: A number.}}\n'
    },
    "a condition whose name has a line break": {
        "conditions.yaml": 'conditions: {big: {doc: It is big., that: {use: "a\\nb"}}}\n'
    },
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case: str) -> None:
    assert load({**WITH_ALL, **FOUND[case]}) is None


HOLD = [
    shipped_lines,
    small_lines,
    rule_files_are_loaded_or_refused,
    grafts_are_loaded_or_refused,
    slips_are_seen_or_harmless,
]
PROPERTIES = pytest.mark.parametrize("holds", HOLD)
DRAWS_MUCH = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@PROPERTIES
@DRAWS_MUCH
@given(data=st.data())
def test_hostile(holds: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    holds(data)


@pytest.mark.slow_property
@PROPERTIES
@DRAWS_MUCH
@given(data=st.data())
def test_hostile_at_length(holds: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    holds(data)
