"""Decide which model-load features may be on, from rules that are data, and say why."""

from gatekeeper.announced import announced_index
from gatekeeper.checkpoint import DTYPE_BITS, Index, TensorInfo, read_index
from gatekeeper.decide import decide
from gatekeeper.decision import Decision, Decisions, LayerDecision, Outcome, ranges
from gatekeeper.errors import CheckpointError, FactError, Fault, GatekeeperError, RefusedError, RuleError
from gatekeeper.facts import Facts, Runner, from_record
from gatekeeper.families import Family
from gatekeeper.formats import Format, PartSpec, Signature, Storage, Term
from gatekeeper.lean import CompiledFeature
from gatekeeper.load import load_rules, parse_rule_set
from gatekeeper.moe_tensors import MoeTensors, find_moe_layers
from gatekeeper.providers import CheckpointReading
from gatekeeper.reading import join, open_target, read_facts, runners_of
from gatekeeper.rules import RuleSet
from gatekeeper.stacking import View
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Value, Values

__all__ = [
    "ABSENT",
    "DTYPE_BITS",
    "UNKNOWN",
    "CheckpointError",
    "CheckpointReading",
    "CompiledFeature",
    "Decision",
    "Decisions",
    "FactError",
    "Facts",
    "Family",
    "Fault",
    "Format",
    "GatekeeperError",
    "Index",
    "LayerDecision",
    "MoeTensors",
    "Outcome",
    "PartSpec",
    "Reading",
    "RefusedError",
    "RuleError",
    "RuleSet",
    "Runner",
    "Signature",
    "Storage",
    "TensorInfo",
    "Term",
    "Value",
    "Values",
    "View",
    "announced_index",
    "decide",
    "find_moe_layers",
    "from_record",
    "join",
    "load_rules",
    "open_target",
    "parse_rule_set",
    "ranges",
    "read_facts",
    "read_index",
    "runners_of",
]
