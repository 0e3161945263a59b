"""What can go wrong in planning, building and verifying; all of it stops the load before it is wrong in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gatekeeper import GatekeeperError, ranges

Code: TypeAlias = Literal["missing", "doubled", "unexpected", "shape", "dtype", "format", "value", "header"]
"""How a tensor and its slot can fail to fit; see `PlanFault.code`."""
ORDER: tuple[Code, ...] = ("header", "missing", "doubled", "shape", "dtype", "format", "value", "unexpected")
"""Of kinds in a message: what is wrong before what is merely left over."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PlanFault:
    """One tensor or slot that does not work out."""

    layer: int
    """Index of the MoE layer: 3; -1 where it is not about one layer."""
    tensor: str
    """The tensor's name in the checkpoint, present or missing: ``model.layers.3.mlp.gate.weight``; of a header, its
    shard: ``model-00003-of-00064.safetensors``."""
    code: Code
    """``missing`` slot without a tensor; ``doubled`` slot with two; ``unexpected`` tensor without a slot; ``shape`` and
    ``dtype``: it has a slot but does not fit; ``format``: no format of the loader; ``value``: contents contradict;
    ``header``: a shard's tensors overlap, leave gaps or are not those of the index."""
    problem: str
    """One line without layer and tensor: ``slot 384 of w13_weight is uint8, the tensor bfloat16``."""

    def __str__(self) -> str:
        place = f"layer {self.layer}, " if self.layer >= 0 else ""
        return f"{self.code}: {place}{self.problem}: `{self.tensor}`"


class PlanError(GatekeeperError):
    """The checkpoint does not fill the layers that the decisions ask for; `faults` has everything, sorted."""

    def __init__(self, faults: Iterable[PlanFault]) -> None:
        self.faults = tuple(sorted(set(faults)))
        super().__init__("\n".join(summarise(self.faults)))

    @property
    def codes(self) -> frozenset[Code]:
        """The kinds of fault that occur."""
        return frozenset(fault.code for fault in self.faults)


class RecipeError(GatekeeperError):
    """A checkpoint that nobody could make was asked for: an unknown name, sizes that do not go together."""


class BuildError(GatekeeperError):
    """A plan could not be carried out to the end; nothing of it is left in memory."""


class StaleDecisionError(GatekeeperError):
    """The decisions were made for another checkpoint than the one to be loaded."""


class TableError(GatekeeperError):
    """A table of measured kernel configurations can't be used."""


class BenchError(GatekeeperError):
    """The kernels can't be timed here, or compute something else than the reference."""


class VerificationError(GatekeeperError):
    """A loaded layer computes something else than the checkpoint says."""

    def __init__(self, message: str, *, layer: int, figure: float, tolerance: float) -> None:
        self.layer, self.figure, self.tolerance = layer, figure, tolerance
        super().__init__(message)


def summarise(faults: Sequence[PlanFault], *, limit: int = 40) -> list[str]:
    """Say the same thing about several layers once: ``layers 1-60, slot 384 …: `model.layers.{N}.…` ``."""
    groups: dict[tuple[str, str, str], list[PlanFault]] = defaultdict(list)
    for fault in sorted(faults, key=lambda f: (ORDER.index(f.code), f.tensor)):
        # The layer's number is the segment of its name that equals its index; only that one is replaced.
        template = fault.tensor.replace(f"layers.{fault.layer}.", "layers.{N}.", 1)
        groups[fault.code, fault.problem, template].append(fault)
    lines = []
    for (code, problem, template), members in groups.items():
        if len(members) == 1:
            lines.append(str(members[0]))
        else:
            lines.append(f"{code}: layers {ranges([m.layer for m in members])}, {problem}: `{template}`")
    if len(lines) > limit:
        return [*lines[:limit], f"and {len(lines) - limit} more kinds of fault, {len(faults)} faults in all"]
    return lines
