"""Pure readers, one for each source of facts; none of them decides anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gatekeeper.catalogue import Catalogue
from gatekeeper.checkpoint import Index, read_index
from gatekeeper.errors import FactError
from gatekeeper.families import Family
from gatekeeper.formats import Format
from gatekeeper.providers.config import load_config, read_config
from gatekeeper.providers.headers import read_headers
from gatekeeper.providers.quantization import read_layers, read_quantization
from gatekeeper.values import Reading, Readings


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReading:
    """Everything that a checkpoint folder, or a config.json alone, says."""

    readings: Readings
    """`model.*` and `quant.*`."""
    layers: list[dict[str, Reading]] | None
    """`layer.*` of every MoE layer of both roles; None: which there are is unknown."""
    layers_note: str
    family: Family | None
    index: Index | None
    """None where there are no safetensors: then `layers` are what the config announces."""


def read_checkpoint(
    target: Path,
    catalogue: Catalogue,
    families: Sequence[Family],
    formats: Sequence[Format],
    *,
    keep_faults: bool = False,
) -> CheckpointReading:
    """Read a folder (config.json, safetensors headers) or a config.json; raises `CheckpointError` and `FactError`.

    `keep_faults` is that of `read_index`.
    """
    config = load_config(target)
    model, family = read_config(config, catalogue, families)
    readings = {**model, **read_quantization(config, catalogue)}
    index = read_index(target, keep_faults=keep_faults) if Path(target).is_dir() else None
    if index is None:
        layers, note = read_layers(config, readings, catalogue, family, formats)
    else:
        try:
            layers, note = read_headers(index, config, readings, catalogue, family, formats)
        except FactError as error:
            index.require_sound(str(error))
            raise
    return CheckpointReading(readings=readings, layers=layers, layers_note=note, family=family, index=index)
