"""What the loader as an engine says of itself: whether kernel settings were measured for a checkpoint on a device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatekeeper import CheckpointReading, Facts, Reading, RuleSet, Runner, join, load_rules, open_target
from loader.kernels.configs import KINDS, Shape
from loader.kernels.tuned import SHIPPED, file_name, find_table

SIZES = {
    "routed": "model.n_routed_experts",
    "hidden_size": "model.hidden_size",
    "width": "moe.shard_width",
    "top_k": "model.num_experts_per_tok",
}
ONE_RANK = Reading(1, "moe-loader, which loads all of each layer where no division is set")
"""Of ``parallel.tp_size``; where ranks are divided in another way, how many of them is not for us to say."""


def read_facts(
    target: Path | str,
    *,
    runner: Runner = "target",
    platform: str | None = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002  # the word of the command line, `--set`
    rules: RuleSet | None = None,
    keep_faults: bool = False,
    tables: Path | None = None,
) -> Facts:
    """`gatekeeper.read_facts` for who loads with this loader: with what it knows of itself (`measured_facts`)."""
    rules = rules or load_rules()
    checkpoint = open_target(target, rules, keep_faults=keep_faults)
    return joined(checkpoint, runner=runner, platform=platform, settings=set, rules=rules, tables=tables)


def joined(checkpoint: CheckpointReading, *, tables: Path | None, **how: Any) -> Facts:
    """`gatekeeper.join` of a checkpoint, how it is loaded, and what the loader says of itself.

    That is `ONE_RANK` where nobody has chosen another division, and `measured_facts`.
    """
    facts = join(checkpoint, **how)
    own: dict[str, Reading] = {}
    others = (facts.values.get(f"parallel.{name}_size") for name in ("ep", "dp", "pp"))
    is_ours = facts.values.get("engine.name") == "moe-loader"
    if is_ours and "parallel.tp_size" not in facts.values and all(size == 1 for size in others):
        own = {"parallel.tp_size": ONE_RANK}
        facts = join(checkpoint, engine=own, **how)
    if not isinstance(facts.values.get("platform.device_name"), str):
        return facts
    # Which settings were measured depends on the sizes, which are facts: they are joined once more.
    return join(checkpoint, engine=own | measured_facts(facts, tables), **how)


def measured_facts(facts: Facts, tables: Path | None = None) -> dict[str, Reading]:
    """`engine.tuned_config_routed`, `engine.tuned_config_fused` and `engine.dense_shared_from`, as far as known.

    They are of the stacks that one rank of `facts` has, on the device of `facts`, by the tables in a folder (None: the
    shipped ones). Nothing is said where the device or a size is not known. Raises `TableError` for a torn table.
    """
    device = facts.values.get("platform.device_name")
    sizes = {name: facts.values.get(fact) for name, fact in SIZES.items()}
    ranks = facts.values.get("parallel.moe_ep_size")
    layers = facts.runner_layer_values
    known = [value for value in (*sizes.values(), ranks) if isinstance(value, int)]
    if not isinstance(device, str) or layers is None or len(known) <= len(SIZES):
        return {}
    table = find_table(device, tables)
    witness = f"{(tables or SHIPPED).name}/{file_name(device)}"
    if table is None:
        none = Reading(False, f"{witness}: no such file")
        return {"engine.tuned_config_routed": none, "engine.tuned_config_fused": none}
    formats = {str(layer.get("layer.routed_storage.format")) for layer in layers} & KINDS.keys()
    n_shared = facts.values.get("model.n_shared_experts")
    n_shared = n_shared if isinstance(n_shared, int) else 0
    routed, hidden_size, width, top_k, ep_size = known
    slots = routed // ep_size + n_shared
    fused = [
        Shape(format=name, n_slots=slots, hidden_size=hidden_size, width=width, top_k=top_k + n_shared)
        for name in sorted(formats)
    ]
    alone = [shape.routed(n_shared) for shape in fused]
    found = {
        "engine.tuned_config_routed": Reading(bool(alone) and all(s in table.configs for s in alone), witness),
        "engine.tuned_config_fused": Reading(bool(fused) and all(s in table.configs for s in fused), witness),
    }
    compared = [first for shape in fused if (first := table.dense_shared_from(shape)) is not None]
    if compared:
        # Of several formats in one model, the one that is best off with the shared slots among the others.
        found["engine.dense_shared_from"] = Reading(0 if 0 in compared else max(compared), witness)
    return found
