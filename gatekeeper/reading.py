"""All sources of one load joined to Facts: the checkpoint, the platform, the flags, the engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatekeeper.errors import CheckpointError
from gatekeeper.facts import ROLE_OF, Facts, Runner, make_facts
from gatekeeper.load import shipped_rules
from gatekeeper.providers import CheckpointReading, read_checkpoint
from gatekeeper.providers.flags import read_flags
from gatekeeper.providers.platform import read_platform
from gatekeeper.rules import RuleSet
from gatekeeper.values import UNKNOWN, Reading, Readings

OWN_ENGINE = "moe-loader"

_FLAGS = frozenset({"server", "parallel", "engine"})


def read_facts(
    target: Path | str,
    *,
    runner: Runner = "target",
    platform: str | None = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002  # the word of the command line, `--set`
    rules: RuleSet | None = None,
    keep_faults: bool = False,
) -> Facts:
    """Read what is known of loading a checkpoint folder (or a config.json alone).

    `platform` is a preset, ``"here"`` to look at this machine, or None: unknown. `set` gives facts that the checkpoint
    does not tell, by name. Flags that are not set are at their defaults, and the engine is this project's own loader
    unless ``engine.name`` is set. With `keep_faults`, headers that are faulty but name their tensors are believed, for
    a loader to report what is wrong with them among all else (`read_index`). Raises `CheckpointError` and `FactError`.
    """
    rules = rules or shipped_rules()
    checkpoint = open_target(target, rules, keep_faults=keep_faults)
    return join(checkpoint, runner=runner, platform=platform, settings=set, rules=rules)


def open_target(target: Path | str, rules: RuleSet, *, keep_faults: bool = False) -> CheckpointReading:
    """Read a checkpoint folder or config.json once, for all its runners; `keep_faults` is that of `read_facts`."""
    path = Path(target)
    try:
        there = path.exists()
    except OSError as error:
        raise CheckpointError(f"`{target}` can't be read: {error.strerror}; name another path") from None
    if not there:
        raise CheckpointError(f"`{target}`: no such file or folder; expected a checkpoint folder or a config.json")
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(
            f"`{target}`: there is no config.json in this folder; name a checkpoint folder or a config.json"
        )
    families, formats = list(rules.families.values()), list(rules.formats.values())
    return read_checkpoint(path, rules.catalogue, families, formats, keep_faults=keep_faults)


def runners_of(checkpoint: CheckpointReading) -> tuple[Runner, ...]:
    """Return the runners that a checkpoint has: the target, and a draft where there are draft layers."""
    roles = {layer["layer.role"].value for layer in checkpoint.layers or ()}
    return ("target", "draft") if ROLE_OF["draft"] in roles else ("target",)


def join(
    checkpoint: CheckpointReading,
    *,
    runner: Runner,
    platform: str | None,
    settings: Mapping[str, Any] | None,
    rules: RuleSet,
    unread: frozenset[str] = frozenset(),
    engine: Readings | None = None,
) -> Facts:
    """Join a checkpoint with where and how it is loaded; groups under `unread` stay unknown.

    `engine` is what the engine says of itself, by fact; what `settings` say counts before it.
    """
    catalogue = rules.catalogue
    given: dict[str, Reading] = dict(read_platform(platform, rules.platforms, catalogue) if platform else {})
    given |= read_flags(settings, catalogue)
    given |= _engine(checkpoint, given) if "engine.name" in catalogue else {}
    given |= {name: one for name, one in (engine or {}).items() if name in catalogue and name not in given}
    given |= {name: one for name, one in checkpoint.readings.items() if name.partition(".")[0] not in unread}
    layers = checkpoint.layers
    if layers is not None and "layer" in unread:
        kept = ("layer.index", "layer.name", "layer.role")
        layers = [{name: layer[name] for name in kept if name in layer} for layer in layers]
    return make_facts(
        catalogue,
        given,
        None if layers is None else [*layers],
        runner=runner,
        flags=_FLAGS,
        layers_note=checkpoint.layers_note,
    )


def _engine(checkpoint: CheckpointReading, given: Readings) -> dict[str, Reading]:
    if "engine.name" in given and given["engine.name"].value != OWN_ENGINE:
        return {}
    family = checkpoint.family
    loads = Reading(family.loads_fused_shared, f"families/{family.name}.yaml") if family else Reading(UNKNOWN)
    own = {"engine.name": Reading(OWN_ENGINE, "default"), "engine.loads_fused_shared": loads}
    return {name: reading for name, reading in own.items() if name not in given}
