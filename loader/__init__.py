"""Load the MoE layers of a checkpoint exactly as the gatekeeper decided, or refuse with everything that is wrong.

The names here are imported when first asked for: torch takes a second and 200 MB, and to plan, or to refuse what is
torn or does not fit, takes none of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader.build import build
    from loader.errors import (
        BuildError,
        PlanError,
        PlanFault,
        RecipeError,
        StaleDecisionError,
        TableError,
        VerificationError,
    )
    from loader.load import load_moe
    from loader.make_checkpoint import Recipe, make_checkpoint
    from loader.measured import read_facts
    from loader.moe import MoELayer
    from loader.plan import LayerPlan, Placement, Plan, Rank
    from loader.planner import build_plan
    from loader.prepared import prepare
    from loader.rank import plan_of_rank
    from loader.router_config import RouterConfig
    from loader.verify import Verified, Verifier, agreement, verify

__all__ = [
    "BuildError",
    "LayerPlan",
    "MoELayer",
    "Placement",
    "Plan",
    "PlanError",
    "PlanFault",
    "Rank",
    "Recipe",
    "RecipeError",
    "RouterConfig",
    "StaleDecisionError",
    "TableError",
    "VerificationError",
    "Verified",
    "Verifier",
    "agreement",
    "build",
    "build_plan",
    "load_moe",
    "make_checkpoint",
    "plan_of_rank",
    "prepare",
    "read_facts",
    "verify",
]

_HOMES = {
    "build": ("build",),
    "errors": (
        "BuildError",
        "PlanError",
        "PlanFault",
        "RecipeError",
        "StaleDecisionError",
        "TableError",
        "VerificationError",
    ),
    "load": ("load_moe",),
    "make_checkpoint": ("Recipe", "make_checkpoint"),
    "measured": ("read_facts",),
    "moe": ("MoELayer",),
    "plan": ("LayerPlan", "Placement", "Plan", "Rank"),
    "planner": ("build_plan",),
    "prepared": ("prepare",),
    "rank": ("plan_of_rank",),
    "router_config": ("RouterConfig",),
    "verify": ("Verified", "Verifier", "agreement", "verify"),
}


class _Package(ModuleType):
    """This package; a public name is never hidden by the module of that name (`build`, `verify`)."""

    def __getattr__(self, name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                found = self.__dict__[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return found
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
