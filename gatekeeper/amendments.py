"""Overlays: what `amends` adds to, replaces in or drops from a gate or a shared requirement; nothing happens unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatekeeper.errors import Fault, Where
from gatekeeper.parse_gates import GateParser
from gatekeeper.rules import Feature, Gate, Option, Requirement
from gatekeeper.source import Document, nearest


def amend_shared(parser: GateParser, document: Document) -> None:
    """Apply an amendment to the shared requirement that it names, before any gate takes it."""
    name = document.data["amends"]
    shared = parser.shared.get(name)
    if shared is None:
        hint = nearest(name, parser.shared) or "; a gate is named as FEATURE/GATE"
        _fault(parser, "unknown-requirement", f"unknown requirement `{name}`{hint}", document, ("amends",))
        return
    for index, one in enumerate(document.data.get("add", ())):
        message = "nothing can be added to a shared requirement; replace it whole"
        _fault(parser, "wrong-amendment", message, document, ("add", index, *(set(one) - {"because"})))
    for index, one in enumerate(document.data.get("replace", ())):
        at = ("replace", index, "requirement")
        if "requirement" not in one or one["requirement"].get("id", name) != name:
            message = f"only `{name}` itself can be replaced here; write `requirement:` without an id"
            _fault(parser, "wrong-amendment", message, document, ("replace", index))
            continue
        parser.shared[name] = parser.shared_requirement(document, name, one["requirement"], at)
        if shared.protects == "correctness" != parser.shared[name].protects:
            parser.weakened[name] = _lost(shared, "replaced", one, document.where(at))
    for index, one in enumerate(document.data.get("drop", ())):
        if one.keys() != {"because"}:
            message = f"`{name}` is one requirement; drop it with only `because`"
            _fault(parser, "wrong-amendment", message, document, ("drop", index))
            continue
        parser.dropped[name] = _lost(shared, "dropped", one, document.where(("drop", index)))


class GateAmender:
    """Applies one amendment to one gate: first what it drops, then what it replaces, then what it adds."""

    def __init__(self, parser: GateParser, feature: Feature, gate: Gate, document: Document) -> None:
        self.parser = parser
        self.feature = feature
        self.gate = gate
        self.document = document

    def amended(self) -> Gate:
        """Return the gate as the amendment leaves it."""
        steps = {"drop": self._drop, "replace": self._replace, "add": self._add}
        for word, step in steps.items():
            for index, one in enumerate(self.document.data.get(word, ())):
                step(one, (word, index))
        return self.gate

    def _drop(self, one: Mapping[str, Any], path: tuple[str | int, ...]) -> None:
        if "requirement" in one and (found := self._requirement(one["requirement"], (*path, "requirement"))):
            self._set(requires=tuple(each for each in self.gate.requires if each is not found))
            if found.protects == "correctness":
                self._warn(_lost(found, "dropped", one, self.document.where(path)))
        elif "option" in one and (option := self._option(one["option"], (*path, "option"))):
            self._set(options=tuple(each for each in self.gate.options if each is not option))
        elif not one.keys() & {"requirement", "option"}:
            message = "say what is dropped: `requirement: ID` or `option: NAME`"
            _fault(self.parser, "wrong-amendment", message, self.document, path)

    def _replace(self, one: Mapping[str, Any], path: tuple[str | int, ...]) -> None:
        if "requirement" in one:
            self._replace_requirement(one, (*path, "requirement"))
        elif "option" in one:
            at = (*path, "option")
            if old := self._option(one["option"]["option"], (*at, "option")):
                new = self.parser.option(self.document, one["option"], at, self.feature)
                self._set(options=tuple(new if each is old else each for each in self.gate.options))
                kept = {each.id for each in new.requires if each.protects == "correctness"}
                for lost in old.requires:
                    if lost.protects == "correctness" and lost.id not in kept:
                        self._warn(_lost(lost, "replaced", one, self.document.where(at)))
        elif "applies_to" in one:
            name = (self.feature.name, self.gate.name)
            self._set(applies_to=self.parser.applies_to(self.document, one, path, name))
        elif "request" in one:
            self._set(request=one["request"])
        else:
            at = (*path, "outputs")
            self._set(outputs=self.parser.outputs(self.document, one["outputs"], at, self.feature))

    def _replace_requirement(self, one: Mapping[str, Any], at: tuple[str | int, ...]) -> None:
        raw = one["requirement"]
        if "id" not in raw:
            message = "a gate has several requirements; say which by `id`"
            _fault(self.parser, "wrong-amendment", message, self.document, at)
            return
        if old := self._requirement(raw["id"], (*at, "id")):
            (new,) = self.parser.requirements(self.document, raw, at, self.feature)
            self._set(requires=tuple(new if each is old else each for each in self.gate.requires))
            if old.protects == "correctness" != new.protects:
                self._warn(_lost(old, "replaced", one, self.document.where(at)))

    def _add(self, one: Mapping[str, Any], path: tuple[str | int, ...]) -> None:
        if "before" in one and "option" not in one:
            _fault(self.parser, "wrong-amendment", "`before` goes with an option", self.document, (*path, "before"))
        if "requirement" in one:
            new = self.parser.requirements(self.document, one["requirement"], (*path, "requirement"), self.feature)
            self._set(requires=(*self.gate.requires, *new))
        if "option" in one:
            option = self.parser.option(self.document, one["option"], (*path, "option"), self.feature)
            options = list(self.gate.options)
            before = self._option(one["before"], (*path, "before")) if "before" in one else None
            options.insert(options.index(before) if before else len(options), option)
            self._set(options=tuple(options))

    def _requirement(self, name: str, path: tuple[str | int, ...]) -> Requirement | None:
        found = next((one for one in self.gate.requires if one.id == name), None)
        if found is None:
            self._unknown("unknown-requirement", "requirement", name, [one.id for one in self.gate.requires], path)
        return found

    def _option(self, name: str, path: tuple[str | int, ...]) -> Option | None:
        found = next((one for one in self.gate.options if one.name == name), None)
        if found is None:
            self._unknown("unknown-option", "option", name, [one.name for one in self.gate.options], path)
        return found

    def _unknown(self, code: str, kind: str, name: str, names: list[str], path: tuple[str | int, ...]) -> None:
        hint = nearest(name, names) or (f"; it has {', '.join(names)}" if names else "; it has none")
        if path[0] != "drop" and any(one.get(kind) == name for one in self.document.data.get("drop", ())):
            hint = " any more: this amendment drops it, before it replaces and adds"
        message = f"gate `{self.feature.name}/{self.gate.name}` has no {kind} `{name}`{hint}"
        _fault(self.parser, code, message, self.document, path)

    def _set(self, **changes: Any) -> None:
        self.gate = replace(self.gate, **changes)

    def _warn(self, sentence: str) -> None:
        self._set(warnings=(*self.gate.warnings, sentence))


def _lost(old: Requirement, how: str, one: Mapping[str, Any], where: Where) -> str:
    return f"`{old.id}`, which protects correctness, is {how} at {where.file}:{where.line}: {one['because']}"


def _fault(parser: GateParser, code: str, message: str, document: Document, path: tuple[str | int, ...]) -> None:
    parser.faults.append(Fault(code, message, document.where(path)))
