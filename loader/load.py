"""From a checkpoint folder and decisions to layers; every command and the Python API come through here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gatekeeper import (
    CheckpointError,
    Decision,
    Decisions,
    Facts,
    Family,
    Index,
    MoeTensors,
    RuleSet,
    Runner,
    load_rules,
    read_facts,
    read_index,
)
from loader.build import build
from loader.moe import MoELayer
from loader.obey import require_fresh
from loader.plan import Plan
from loader.planner import build_plan, runner_layers
from loader.rank import plan_of_rank
from loader.verify import Verified, Verifier


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
) -> Prepared:
    """Read the headers of `folder`, compare them with what `decisions` rest on, and plan; allocates nothing.

    `rules` is the rule set that knows the family (the shipped one by default). The facts of the checkpoint are read
    anew; `facts` are those the decisions were made from and give the parallel sizes for the plan's bytes, and for the
    share of one `rank` (None: all of every layer). Raises
    `RefusedError` (a decision is an error, or asked for and pending), `StaleDecisionError`, `CheckpointError`,
    `FactError` and `PlanError`.
    """
    decisions.require()
    rules = load_rules() if rules is None else rules
    fresh = read_facts(folder, runner=runner_of(decisions), rules=rules, keep_faults=True)
    require_fresh(decisions, fresh)
    index = read_index(Path(folder), keep_faults=True)
    if index is None:
        raise CheckpointError(f"`{folder}` has no *.safetensors; the loader needs weights, not a config.json alone")
    family = family_of(rules, fresh, folder)
    facts = facts or fresh
    tensors = runner_layers(index, family, facts)
    plan = build_plan(index, family, facts, decisions, rules.formats, tensors)
    if rank is not None:
        plan = plan_of_rank(plan, rank, plan.per_rank.tp_size, plan.per_rank.ep_size)
    return Prepared(facts=facts, family=family, index=index, plan=plan, tensors=tensors)


def load_moe(
    folder: Path | str,
    decisions: Decisions,
    device: torch.device | str = "cpu",
    rules: RuleSet | None = None,
    *,
    facts: Facts | None = None,
    rank: int | None = None,
) -> tuple[MoELayer, ...]:
    """Load the MoE layers that `decisions.runner` loads from a checkpoint folder, as the decisions say.

    With `rank`, only that rank's share of the ``parallel.tp_size`` and ``parallel.ep_size`` of `facts` is read and
    allocated, and the sum of all ranks' outputs is the layer's.

    Returns one module a layer, by layer index, in evaluation form: ``layer(x)`` maps ``(..., D)`` to the same shape.
    Every slot is written exactly once and every expert tensor is used, or it is an error and nothing stays allocated;
    errors are those of `prepare`, and `BuildError`.
    """
    return load_prepared(prepare(folder, decisions, rules, facts, rank), device)[0]


def load_prepared(
    prepared: Prepared,
    device: torch.device | str = "cpu",
    *,
    verifies: bool = False,
    threads: int | None = None,
    tables: Path | None = None,
    moved: Callable[[int], None] = lambda _: None,
) -> tuple[tuple[MoELayer, ...], tuple[Verified, ...]]:
    """Build the layers of a plan, each compared with the checkpoint beside the load if `verifies`.

    A layer that differs ends the load with `VerificationError`, and nothing stays allocated.
    """
    plan, index = prepared.plan, prepared.index
    if not verifies:
        return build(plan, index, device, threads=threads, tables=tables, moved=moved), ()
    verifier = Verifier(plan, prepared.tensors)
    return build(plan, index, device, threads=threads, tables=tables, moved=moved, check=verifier), verifier.verified


def runner_of(decisions: Mapping[str, Decision]) -> Runner:
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
