"""Headers and index of a folder of safetensors, read as plain JSON: no torch, no tensor data, never a pickle.

Everything that is wrong is found in one run; nothing is allocated from a length that the file merely claims.
"""

from __future__ import annotations

import json
import re
import stat
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from gatekeeper.errors import CheckpointError
from gatekeeper.stacking import View

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library itself accepts (``MAX_HEADER_SIZE`` in its ``tensor.rs``)."""
MAX_INDEX_BYTES = 500_000_000
"""An index has about 100 bytes a tensor; the largest published ones are a few tens of megabytes."""
MAX_DIMENSIONS = 32

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64"), 64)
)
"""Bits of one element by the safetensors name of its dtype."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as its shard's header describes it."""

    name: str
    """``model.layers.3.mlp.experts.0.gate_proj.weight``"""
    dtype: str
    """As safetensors spells it: ``BF16``, ``F32``, ``I32``, ``U8``, ``F8_E4M3``, ``F8_E8M0``."""
    shape: tuple[int, ...]
    """``(2048, 7168)``; empty for a scalar."""
    shard: str
    """File name within the folder: ``model-00001-of-00064.safetensors``."""
    start: int
    """First byte in the shard's file (absolute, not relative to its data)."""
    end: int
    """One past the last byte in the shard's file."""
    view: View | None = None
    """What of the tensor is meant, where it holds more than one matrix; `shape` is that matrix's then."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Every tensor of a checkpoint folder, by name."""

    folder: Path
    tensors: Mapping[str, TensorInfo]


class _Bad(ValueError):
    """A fault in one file; the message names what was expected."""


def read_index(folder: Path) -> Index | None:
    """Read the headers of all safetensors of `folder`, checked against its index where it has one.

    None where the folder holds no safetensors at all (neither index nor shard). Raises `CheckpointError` that lists
    all that is wrong, one line a fault: a shard missing, truncated or leaving the folder; a header that is too long,
    not JSON, or whose offsets overlap, leave gaps, or do not fit shape and dtype; a tensor that is named twice, or by
    only one of index and shard. A folder with nothing but pickled weights is an error too: they are never opened.
    Header format: https://github.com/huggingface/safetensors#format
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is not a folder; name the folder that holds config.json and *.safetensors")
    indexes = sorted(p for p in folder.glob("*.safetensors.index.json"))
    shards_here = sorted(p.name for p in folder.glob("*.safetensors"))
    if not indexes and not shards_here:
        pickled = sorted({p.name for pattern in PICKLES for p in folder.glob(pattern)})
        if pickled:
            raise CheckpointError(
                f"`{folder}` has only pickled weights ({_some(pickled)}), and those are never opened; "
                "convert them to safetensors"
            )
        return None
    faults: list[str] = []
    weight_map: dict[str, str] | None = None
    if len(indexes) > 1:
        faults.append(f"{_some([p.name for p in indexes])}: several indexes in one folder; keep one")
    elif indexes:
        try:
            weight_map = _read_weight_map(folder, indexes[0])
        except _Bad as bad:
            faults.append(f"{indexes[0].name}: {bad}")
        except OSError as error:
            faults.append(f"{indexes[0].name}: can't be read: {error.strerror}")
    if faults:  # without a trusted index no statement about the shards would be worth anything
        raise _error(folder, faults)
    tensors = _read_shards(folder, shards_here, weight_map, faults)
    if faults:
        raise _error(folder, faults)
    return Index(folder=folder, tensors=MappingProxyType(tensors))


def _read_shards(
    folder: Path, shards_here: list[str], weight_map: dict[str, str] | None, faults: list[str]
) -> dict[str, TensorInfo]:
    names_by_shard: dict[str, list[str]] = defaultdict(list)
    for name, shard in (weight_map or {}).items():
        names_by_shard[shard].append(name)
    shards = sorted(names_by_shard) if weight_map is not None else shards_here
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        expected = names_by_shard[shard]
        try:
            found = read_header(_inside(folder, shard), shard)
        except (_Bad, OSError) as error:
            bad = f"can't be read: {error.strerror}" if isinstance(error, OSError) else error
            named = f" (the index expects {_some(expected)} there)" if expected else ""
            faults.append(f"{shard}: {bad}{named}")
            continue
        faults += [
            f"{shard}: tensor `{name}` is in {tensors[name].shard} too; a tensor belongs to one shard"
            for name in sorted(found.keys() & tensors.keys())
        ]
        if weight_map is not None:
            faults += [
                f"{shard}: tensor `{n}` is in the index but not here" for n in sorted(expected) if n not in found
            ]
            for name in sorted(found.keys() - set(expected)):
                place = f"names {weight_map[name]} for it" if name in weight_map else "does not name it"
                faults.append(f"{shard}: tensor `{name}` is here but the index {place}")
        tensors |= found
    if weight_map is not None:
        faults += [
            f"{shard}: belongs to the same set of shards as the index's, but the index does not name it"
            for shard in _stray_shards(shards_here, shards)
        ]
    return tensors


def _stray_shards(here: list[str], indexed: list[str]) -> list[str]:
    """Shards of the index's ``-NNNNN-of-NNNNN`` series that it forgot; ``consolidated…`` and the like are not of it."""
    series = {m[1:] for m in map(_series, indexed) if m}
    return [shard for shard in here if shard not in indexed and (m := _series(shard)) and m[1:] in series]


def _series(shard: str) -> tuple[str, str, str] | None:
    match = re.fullmatch(r"(.*-)(\d+)(-of-\d+\.safetensors)", shard)
    return (match[2], match[1], match[3]) if match else None


def _error(folder: Path, faults: list[str]) -> CheckpointError:
    head = f"`{folder}` can't be read: "
    if len(faults) == 1:
        return CheckpointError(head + faults[0])
    return CheckpointError(head + f"{len(faults)} faults\n" + "\n".join(f"  {fault}" for fault in faults))


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"`{name}`" for name in names[:shown]) + rest


def _inside(folder: Path, shard: str) -> Path:
    """The path of a shard, if it is a file of this folder."""
    for pure in (PurePosixPath(shard), PureWindowsPath(shard)):
        if pure.is_absolute() or pure.drive or ".." in pure.parts or not pure.parts:
            raise _Bad("the path leaves the folder; an index may name files of its own folder only")
    if "\0" in shard:
        raise _Bad("the path holds a NUL character")
    path = folder / shard
    if not path.exists():
        raise _Bad("the shard is missing; download it again")
    real, home = path.resolve(), folder.resolve()
    # The cache of huggingface_hub keeps files as links `models--X/snapshots/REV/F -> ../../blobs/HASH`.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and not (blobs and real.is_relative_to(blobs)):
        raise _Bad(f"the path leaves the folder, by a link to `{real}`")
    if not stat.S_ISREG(real.stat().st_mode):
        raise _Bad("is not a regular file")
    return real


def _strict_json(raw: bytes) -> Any:
    """JSON without duplicate keys and without NaN; every way of being broken is `_Bad`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _Bad(f"`{key}` is there twice")
            found[key] = value
        return found

    def no_constants(word: str) -> Any:
        raise _Bad(f"is not JSON: {word}")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except _Bad:
        raise
    except UnicodeDecodeError:
        raise _Bad("is not JSON: not UTF-8") from None
    except RecursionError:
        raise _Bad("is not JSON that can be read: nested too deep") from None
    except ValueError as error:  # JSONDecodeError, and int() refusing thousands of digits
        raise _Bad(f"is not JSON: {error}") from None


def _read_weight_map(folder: Path, index: Path) -> dict[str, str]:
    path = _inside(folder, index.name)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise _Bad(f"is longer than {MAX_INDEX_BYTES} bytes")
    document = _strict_json(path.read_bytes())
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise _Bad("has no `weight_map`, a mapping of tensor names to shards")
    wrong = [name for name, shard in weight_map.items() if not isinstance(shard, str) or not shard]
    if wrong:
        raise _Bad(f"`weight_map` names no file for {_some(wrong)}")
    pickled = sorted({s for s in weight_map.values() if not s.endswith(".safetensors")})
    if pickled:
        raise _Bad(f"`weight_map` names {_some(pickled)}; only *.safetensors are read")
    return weight_map


def read_header(path: Path, shard: str) -> dict[str, TensorInfo]:
    """Read one shard's header; raises `ValueError` with what is wrong in it."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _Bad(f"is truncated: {file_bytes} bytes are no safetensors file")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise _Bad(
                f"header of {header_bytes} bytes is too long, more than {MAX_HEADER_BYTES}; not a safetensors file?"
            )
        if header_bytes > file_bytes - 8:
            raise _Bad(f"is truncated: header of {header_bytes} bytes in a file of {file_bytes}")
        raw = file.read(header_bytes)
    data_start = 8 + header_bytes
    try:
        header = _strict_json(raw)
    except _Bad as bad:
        raise _Bad(f"header {bad}") from None
    if not isinstance(header, dict):
        raise _Bad("header is not a mapping of tensor names")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Bad("header's `__metadata__` is not a mapping of strings")
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            tensors[name] = _tensor(name, entry, shard, data_start)
        except _Bad as bad:
            problems.append(f"tensor `{name}` {bad}")
    problems += _layout_problems(tensors, data_start, file_bytes, complete=not problems)
    if problems:
        raise _Bad("; ".join(problems))
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: object, shard: str, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Bad("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _Bad(f"has dtype `{dtype}`, which safetensors does not know")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise _Bad("has a shape that is no short list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _Bad("has data_offsets that are no pair of byte positions")
    begin, end = offsets
    if begin > end:
        raise _Bad(f"ends at byte {end}, before its begin {begin}")
    total_bits = bits
    for size in shape:
        total_bits *= size
    if total_bits % 8 or total_bits // 8 != end - begin:
        raise _Bad(f"has {end - begin} bytes, but {dtype} of shape {shape} needs {-(-total_bits // 8)}")
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), shard=shard, start=data_start + begin, end=data_start + end
    )


def _layout_problems(
    tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int, *, complete: bool
) -> list[str]:
    """Overlaps, gaps and missing bytes; gaps mean nothing while some tensors could not be read (`complete` false)."""
    problems = []
    position, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end, t.name)):
        if info.end > file_bytes:
            problems.append(f"is truncated: tensor `{info.name}` ends at byte {info.end} of a file of {file_bytes}")
        if info.start < position:
            problems.append(f"tensor `{info.name}` overlaps {before}")
        elif info.start > position and complete:
            problems.append(
                f"{info.start - position} bytes between {before} and tensor `{info.name}` belong to nothing"
            )
        if info.end >= position:
            position, before = info.end, f"tensor `{info.name}`"
    if complete and not problems and position < file_bytes:
        problems.append(f"{file_bytes - position} bytes after {before} belong to nothing")
    return problems
