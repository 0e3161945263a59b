"""A plan of anything that has a config.json: from its safetensors headers, or without weights from the config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from gatekeeper import (
    CheckpointError,
    CheckpointReading,
    Decisions,
    Facts,
    Family,
    Index,
    RuleSet,
    announced_index,
)
from loader.plan import Plan
from loader.planner import build_plan
from loader.prepared import family_of, read_anew


def plan_target(
    target: Path | str,
    decisions: Decisions,
    rules: RuleSet | None = None,
    facts: Facts | None = None,
    checkpoint: CheckpointReading | None = None,
) -> Plan:
    """Plan a checkpoint folder or a config.json; reads headers where there are some, and never a weight.

    Without headers, the tensors are those that config.json announces (`gatekeeper.announced_index`), and the same
    planner is run on them. Arguments and errors are those of `loader.prepare`, of all ranks.
    """
    rules, checkpoint, fresh = read_anew(target, decisions, rules, checkpoint)
    facts, family = facts or fresh, family_of(rules, fresh, target)
    source: Literal["headers", "config"] = "headers"
    index = checkpoint.index
    if index is None:
        index, source = _announced(Path(target), facts, fresh, family, rules), "config"
    return replace(build_plan(index, family, facts, decisions, rules.formats), source=source)


def _announced(path: Path, facts: Facts, fresh: Facts, family: Family, rules: RuleSet) -> Index:
    if facts.runner_layers is None:
        raise CheckpointError(f"`{path}`: {fresh.layers_note or 'which layers have experts is unknown'}")
    config = path / "config.json" if path.is_dir() else path
    return announced_index(config, facts.runner_layers, facts.values, family, rules.formats)
