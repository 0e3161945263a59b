"""A checkpoint and its plan before a byte of a weight is read, and before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gatekeeper import (
    CheckpointError,
    CheckpointReading,
    Decision,
    Decisions,
    Facts,
    Family,
    Index,
    MoeTensors,
    RuleSet,
    Runner,
    join,
    load_rules,
    open_target,
)
from loader.obey import require_fresh
from loader.plan import Plan
from loader.planner import build_plan, runner_layers
from loader.rank import plan_of_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checkpoint and its plan, with nothing read but headers."""

    facts: Facts
    family: Family
    index: Index
    plan: Plan
    tensors: tuple[MoeTensors, ...]
    """Of the plan's layers, for verification."""


def prepare(
    folder: Path | str,
    decisions: Decisions,
    rules: RuleSet | None = None,
    facts: Facts | None = None,
    rank: int | None = None,
    checkpoint: CheckpointReading | None = None,
) -> Prepared:
    """Read the headers of `folder`, compare them with what `decisions` rest on, and plan; allocates nothing.

    `rules` is the rule set that knows the family (the shipped one by default). The facts of the checkpoint are read
    anew, unless `checkpoint` is what `gatekeeper.open_target` has just read of the folder; `facts` are those the
    decisions were made from and give the parallel sizes for the plan's bytes, and for the share of one `rank` (None:
    all of every layer). Raises `RefusedError` (a decision is an error, or asked for and pending), `StaleDecisionError`,
    `CheckpointError`, `FactError` and `PlanError`.
    """
    rules, checkpoint, fresh = read_anew(folder, decisions, rules, checkpoint)
    index = checkpoint.index
    if index is None:
        raise CheckpointError(f"`{folder}` has no *.safetensors; the loader needs weights, not a config.json alone")
    family = family_of(rules, fresh, folder)
    facts = facts or fresh
    tensors = runner_layers(index, family, facts)
    plan = build_plan(index, family, facts, decisions, rules.formats, tensors)
    if rank is not None:
        plan = plan_of_rank(plan, rank, plan.per_rank.tp_size, plan.per_rank.ep_size)
    return Prepared(facts=facts, family=family, index=index, plan=plan, tensors=tensors)


def read_anew(
    target: Path | str, decisions: Decisions, rules: RuleSet | None, checkpoint: CheckpointReading | None
) -> tuple[RuleSet, CheckpointReading, Facts]:
    """Where `prepare` and `loader.planning.plan_target` begin: the rules, the checkpoint, and the facts that it says.

    Raises what `prepare` does where the decisions can't be acted on, or rest on other facts.
    """
    decisions.require()
    rules = load_rules() if rules is None else rules
    checkpoint = checkpoint or open_target(target, rules, keep_faults=True)
    fresh = join(checkpoint, runner=_runner_of(decisions), platform=None, settings=None, rules=rules)
    require_fresh(decisions, fresh)
    return rules, checkpoint, fresh


def _runner_of(decisions: Mapping[str, Decision]) -> Runner:
    """The runner that all of `decisions` were made for; raises `CheckpointError` where there are two."""
    runners = sorted({decision.runner for decision in decisions.values()})
    if len(runners) > 1:
        raise CheckpointError(f"decisions of several runners: {', '.join(runners)}; load one runner at a time")
    return "draft" if runners == ["draft"] else "target"


def family_of(rules: RuleSet, facts: Facts, folder: Path | str) -> Family:
    """The family of the checkpoint `folder` with these facts; raises `CheckpointError` where none knows it."""
    name = facts.values.get("model.family")
    if isinstance(name, str) and name in rules.families:
        return rules.families[name]
    architecture = facts.values.get("model.architecture")
    known = ", ".join(sorted(rules.families))
    raise CheckpointError(
        f"`{folder}`: no family knows the architecture `{architecture}`; there are {known}; add one to rules/families"
    )
