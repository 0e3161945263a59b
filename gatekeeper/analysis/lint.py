"""Lints: what loads and decides, and is likely to be a mistake all the same. Each can be waived where it arises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gatekeeper.analysis.lints import conditions, outcomes, unused, wording
from gatekeeper.analysis.lints.finding import Finding, gates
from gatekeeper.errors import Fault, Where
from gatekeeper.rules import RuleSet
from gatekeeper.source import nearest
from gatekeeper.waivers import Waiver

LINTS: Mapping[str, tuple[Callable[[RuleSet], Iterator[Finding]], ...]] = {
    "open-range": (conditions.open_range,),
    "never-passes": (outcomes.never_passes,),
    "never-fails": (outcomes.never_fails,),
    "unreachable-option": (outcomes.unreachable_option,),
    "unused-fact": (unused.unused_fact,),
    "unused-condition": (unused.unused_condition,),
    "unused-requirement": (unused.unused_requirement,),
    "reason-without-value": (wording.reason_without_value,),
    "quantization-by-name": (conditions.quantization_by_name,),
    "missing-refs": (wording.missing_refs,),
    "unlisted-value": (conditions.unlisted_value,),
    "ungated-feature": (unused.ungated_feature,),
    "uncovered-family": (unused.uncovered_family,),
    "unused-waiver": (unused.idle_gateless,),
}


def lint(rules: RuleSet) -> list[Fault]:
    """Return what is suspicious in the rule set's own files and its overlays', and not waived; warnings, by place."""
    found: dict[tuple[str, Where], Fault] = {}
    waiving: set[Waiver] = set()
    for code, finders in LINTS.items():
        for finding in (one for find in finders for one in find(rules)):
            waivers = [one for one in finding.allow if one.code == code]
            waiving.update(waivers)
            if not waivers and finding.where.file in rules.files:
                found.setdefault((code, finding.where), Fault(code, finding.message, finding.where, "warning"))
    for waiver in _waivers(rules):
        if waiver not in waiving and waiver.where.file in rules.files:
            unknown = (
                f"; there is no lint `{waiver.code}`{nearest(waiver.code, LINTS)}" if waiver.code not in LINTS else ""
            )
            message = f"nothing here calls for `{waiver.code}`{unknown or ', so this waives nothing; drop it'}"
            found["unused-waiver", waiver.where] = Fault("unused-waiver", message, waiver.where, "warning")
    return sorted(
        found.values(), key=lambda fault: (fault.where.file, fault.where.line, fault.where.column, fault.code)
    )


def _waivers(rules: RuleSet) -> Iterator[Waiver]:
    named = (rules.conditions, rules.requirements, rules.features, rules.families, rules.catalogue)
    for holders in named:
        for holder in holders.values():
            yield from holder.allow
    for gate, _ in gates(rules):
        yield from gate.allow
        for option in gate.options:
            yield from option.allow
        for requirement in gate.demands:
            yield from requirement.allow
