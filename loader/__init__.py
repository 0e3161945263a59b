"""Load the MoE layers of a checkpoint exactly as the gatekeeper decided, or refuse with everything that is wrong."""

from __future__ import annotations

from loader.build import build
from loader.errors import BuildError, PlanError, PlanFault, StaleDecisionError, VerificationError
from loader.load import load_moe, prepare
from loader.make_checkpoint import Recipe, make_checkpoint
from loader.moe import MoELayer, RouterConfig
from loader.plan import LayerPlan, Placement, Plan, Rank
from loader.planner import build_plan
from loader.rank import plan_of_rank
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
    "RouterConfig",
    "StaleDecisionError",
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
    "verify",
]
