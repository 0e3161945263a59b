"""Tables of configurations that were measured on a device: found, read strictly, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loader.errors import TableError
from loader.kernels.configs import LARGE, Config, Shape, Tiles, misfit

VERSION = 3
"""Of the form of the file; raised where the kernels change so that old figures mean nothing."""
LUCK = 0.01
"""By how much readings of the same differ, as a share."""
MOST_STRETCHED = 4
"""Times as many tokens as were timed that a configuration of small blocks, or of parts in memory, is used for."""
SHIPPED = Path(__file__).with_name("tables")
SCHEMA = Path(__file__).with_name("table.schema.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration of one shape for one number of tokens."""

    tokens: int
    microseconds: float
    """Of the experts alone, in a CUDA graph, median."""
    config: Config
    apart_microseconds: float | None = None
    """With the shared slots computed on their own before; None where it was not measured."""


@dataclass(slots=True, kw_only=True)
class Table:
    """What was measured on one kind of device."""

    device: str
    """As the driver calls it: ``NVIDIA H200``."""
    versions: Mapping[str, str]
    """Of torch and triton, when it was measured."""
    configs: dict[Shape, dict[int, Measured]] = field(default_factory=dict)
    """By shape and number of tokens."""
    path: Path | None = None
    """Where it was read from."""

    def config(self, shape: Shape, tokens: int) -> Config | None:
        """The configuration measured for the nearest number of tokens, by ratio; None where there is none.

        What is cut for few tokens is not stretched beyond four times as many.
        """
        measured = self.configs.get(shape)
        if not measured or not tokens:
            return None
        nearest = min(measured, key=lambda n: (abs(math.log(n / tokens)), n))
        # What goes without a schedule reads an expert once for each token that chose it: never beyond what was timed.
        found = measured[nearest].config
        if found.by_pair and tokens > nearest:
            larger = [n for n in sorted(measured) if n > nearest]
            return measured[larger[0]].config if larger else None
        is_for_few = found.block_m < LARGE or found.splits > 1
        return None if is_for_few and tokens > MOST_STRETCHED * nearest else found

    def dense_shared_from(self, shape: Shape) -> int | None:
        """Tokens from which on shared slots are faster on their own: of those measured, and at all larger ones.

        0 where they never were; None where nothing was compared. Less than `LUCK` decides nothing.
        """
        compared = [one for _, one in sorted(self.configs.get(shape, {}).items()) if one.apart_microseconds is not None]
        first = 0
        for one in reversed(compared):
            if (one.apart_microseconds or 0.0) * (1 + LUCK) >= one.microseconds:
                break
            first = one.tokens
        return first if compared else None

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """What `read_table` reads."""
        shapes = sorted(self.configs, key=lambda shape: tuple(asdict(shape).values()))
        return {
            "version": VERSION,
            "device": self.device,
            "versions": dict(self.versions),
            "shapes": [
                {
                    **asdict(shape),
                    "configs": [asdict(one) for _, one in sorted(self.configs[shape].items())],
                }
                for shape in shapes
            ],
        }


@contextmanager
def to_change(path: Path, device: str) -> Iterator[Table]:
    """The table at `path` as it is now, or a new one; it is written when the block ends, and nobody else's until then.

    Several processes may fill one table, a GPU each: what one finds does not undo what another found meanwhile.
    """
    import fcntl  # of Unix, as Triton is

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # not the file, which each writing replaces
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        table = table_at(path, device)
        yield table
        table.save(path)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON; a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_name(device: str) -> str:
    """``nvidia_h200.json`` for ``NVIDIA H200``."""
    return "".join(c if c.isalnum() else "_" for c in device.lower()) + ".json"


def find_table(device: str, folder: Path | None = None) -> Table | None:
    """The table of a device in `folder`, the shipped ones by default; None where there is none."""
    path = (folder or SHIPPED) / file_name(device)
    return read_table(path, device) if path.exists() else None


def table_at(path: Path, device: str) -> Table:
    """The table in this file, or a new one."""
    return read_table(path, device) if path.exists() else Table(device=device, versions={})


def read_table(path: Path, device: str | None = None) -> Table:
    """Read a table; raises `TableError` for one that is torn, of another version, or of another device."""
    from jsonschema import Draft202012Validator  # 60 ms, and only where there is a table
    from jsonschema.exceptions import best_match

    again = "delete it and run `moe-loader tune` again"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"`{path}` can't be read: {error.strerror}") from None
    except ValueError as error:
        raise TableError(f"`{path}` is torn: {error}; {again}") from None
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise TableError(f"`{path}` has version {version}, this loader reads version {VERSION}; {again}")
    fault = best_match(Draft202012Validator(schema).iter_errors(raw))
    if fault is not None:
        raise TableError(f"`{path}` is no table of configurations: {fault.json_path}: {fault.message}; {again}")
    if device is not None and raw["device"] != device:
        raise TableError(
            f"`{path}` was measured on {raw['device']}, this is {device}; give another folder with --tables"
        )
    table = Table(device=raw["device"], versions=raw["versions"], path=path)
    for each in raw["shapes"]:
        shape = Shape(**{f.name: each[f.name] for f in fields(Shape)})
        for one in each["configs"]:
            tiles = {name: Tiles(**one["config"][name]) for name in ("gate_up", "down")}
            measured = Measured(**{**one, "config": Config(**{**one["config"], **tiles})})
            if wrong := misfit(measured.config, shape):
                raise TableError(f"`{path}`, {shape.format} with {measured.tokens} tokens: {wrong}; {again}")
            table.configs.setdefault(shape, {})[measured.tokens] = measured
    return table
