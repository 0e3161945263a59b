"""From a checkpoint folder and decisions to layers; every command and the Python API come through here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gatekeeper import Decisions, Facts, RuleSet
from loader.build import build
from loader.moe import MoELayer
from loader.prepared import Prepared, prepare
from loader.verify import Verified, Verifier


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
