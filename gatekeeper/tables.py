"""Tables: rows of facts and expected decisions, read from ``*.table.yaml`` and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gatekeeper.decide import decide
from gatekeeper.decision import Decision, OutcomeState
from gatekeeper.errors import FactError, Fault, GatekeeperError, RuleError, Where
from gatekeeper.facts import Facts, from_record
from gatekeeper.load import load_rules
from gatekeeper.providers import CheckpointReading
from gatekeeper.reading import join, open_target
from gatekeeper.rules import RuleSet
from gatekeeper.source import Document, check_schema, nearest, read_yaml

SUFFIX = ".table.yaml"
_OUTCOMES: tuple[OutcomeState, ...] = ("failed", "passed", "unknown", "not_applicable", "waived")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table, with the table's base merged under it."""

    feature: str
    name: str
    data: Mapping[str, Any]
    folder: Path
    rules: Path | None = None
    """The rule set that the table names; None: the one asked for."""
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One thing that a decision says other than the row expects."""

    key: str
    expected: Any
    actual: Any

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, got {self.actual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What a row came to: passed where there is no mismatch and no error."""

    row: Row
    decision: Decision | None
    mismatches: tuple[Mismatch, ...]
    error: str = ""

    @property
    def passed(self) -> bool:
        return not (self.mismatches or self.error)

    @property
    def lines(self) -> Iterator[str]:
        """What is wrong, and the decision's own reason, which says what it rests on."""
        if self.error:
            yield self.error
        yield from map(str, self.mismatches)
        keys = {mismatch.key for mismatch in self.mismatches}
        if self.decision is not None and self.decision.reason and keys and "reason" not in keys:
            yield f"{self.decision.state} by {self.decision.decided_by}: {self.decision.reason}"


def find_tables(paths: list[Path]) -> list[Path]:
    """Return the tables in files and folders; raises `FactError` for a path that has none."""
    found: list[Path] = []
    for path in paths:
        tables = [path] if path.is_file() else sorted(path.rglob(f"*{SUFFIX}"))
        if not tables:
            raise FactError(f"{path}: no table here; expected a file `*{SUFFIX}` or a folder with some")
        found += tables
    return found


def read_table(path: Path) -> list[Row]:
    """Read the rows of one table; raises `RuleError`."""
    document = read_yaml(path)
    faults = check_schema(document, "table")
    if not faults and not document.data["rows"]:
        faults = [Fault("no-rows", "a table without rows tests nothing; add some", document.where(("rows",)))]
    if faults:
        raise RuleError(faults)
    return list(_rows(document, path))


def _rows(document: Document, path: Path) -> Iterator[Row]:
    base = document.data.get("base", {})
    seen: dict[str, int] = {}
    for index, raw in enumerate(document.data["rows"]):
        where = document.where(("rows", index, "name"))
        if raw["name"] in seen:
            raise RuleError([Fault("duplicate-row", f"row `{raw['name']}` stands twice", where)])
        seen[raw["name"]] = index
        merged = {**base, **raw, "facts": {**base.get("facts", {}), **raw.get("facts", {})}}
        yield Row(
            feature=document.data["table"],
            name=raw["name"],
            data=merged,
            folder=path.parent,
            rules=(path.parent / document.data["rules"]).resolve() if "rules" in document.data else None,
            where=where,
        )


def run_row(rules: RuleSet, row: Row) -> RowResult:
    """Decide a row's feature and compare, by the rule set that the table names if it names one.

    An error of ours is a result too.
    """
    try:
        if row.rules is not None:
            rules = _named_rules(row.rules)
        if row.feature not in rules.features:
            hint = nearest(row.feature, rules.features) or f"; there are {', '.join(rules.features)}"
            raise FactError(f"unknown feature `{row.feature}`{hint}")
        decision = decide(rules, row_facts(rules, row), [row.feature])[row.feature]
    except GatekeeperError as error:
        return RowResult(row=row, decision=None, mismatches=(), error=str(error))
    return RowResult(row=row, decision=decision, mismatches=tuple(_compare(decision, row.data["expect"])))


def row_facts(rules: RuleSet, row: Row) -> Facts:
    """Return the facts of a row: of a checkpoint by `from`, else as a line of `--facts`."""
    data = row.data
    preset = {
        **_preset(rules.platforms, "platform", data.get("platform"), rules),
        **_preset(rules.layouts, "layout", data.get("layout"), rules),
    }
    settings = {**preset, **data["facts"]}
    if "from" not in data:
        if "unread" in data:
            raise FactError("`unread` goes with `from`; without it, what is not named is unknown anyway")
        return from_record(rules.catalogue, {**data, "facts": settings})
    extra = sorted(data.keys() & {"layers", "assume", "unknown"})
    if extra:
        raise FactError(f"`{extra[0]}` does not go with `from`, which reads it from the checkpoint")
    checkpoint = _checkpoint(rules, (row.folder / data["from"]).resolve())
    unread = frozenset(data.get("unread", ()))
    groups = {spec.group for spec in rules.catalogue.values()}
    for group in sorted(unread - groups):
        raise FactError(f"`unread` names no group of facts: `{group}`{nearest(group, groups)}")
    return join(
        checkpoint, runner=data.get("runner", "target"), platform=None, settings=settings, rules=rules, unread=unread
    )


@lru_cache(maxsize=8)
def _named_rules(folder: Path) -> RuleSet:
    return load_rules(folder)


@lru_cache(maxsize=8)
def _checkpoint(rules: RuleSet, path: Path) -> CheckpointReading:
    return open_target(path, rules)


def _preset(presets: Mapping[str, Mapping[str, Any]], kind: str, name: str | None, rules: RuleSet) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in presets:
        hint = nearest(name, presets) or f"; the presets are {', '.join(sorted(presets))}"
        raise FactError(f"unknown {kind} `{name}`{hint}")
    if kind == "platform":
        # What a preset does not say of a platform it does not have.
        absent = {n: None for n, spec in rules.catalogue.items() if spec.group == kind and not spec.only_derived}
        return {**absent, **presets[name]}
    return presets[name]


def _compare(decision: Decision, expect: Mapping[str, Any]) -> Iterator[Mismatch]:
    actual = decision.to_json()
    for key, wanted in expect.items():
        if key == "layers":
            yield from _compare_layers(actual["layers"], wanted)
            continue
        found: Any = next((decision.outcome_ids(state) for state in _OUTCOMES if state == key), actual.get(key))
        if key == "outputs" and isinstance(wanted, dict) and isinstance(found, dict):
            found = {name: found.get(name, "no such output") for name in wanted}
        if found != wanted:
            yield Mismatch(key=key, expected=wanted, actual=found)


def _compare_layers(layers: list[dict[str, Any]] | None, wanted: list[dict[str, Any]]) -> Iterator[Mismatch]:
    by_index = {layer["index"]: layer for layer in layers or ()}
    for layer in wanted:
        index = layer["index"]
        if index not in by_index:
            yield Mismatch(key=f"layer {index}", expected="a decision", actual="none")
            continue
        for key, value in layer.items():
            if by_index[index][key] != value:
                yield Mismatch(key=f"layer {index}: {key}", expected=value, actual=by_index[index][key])
