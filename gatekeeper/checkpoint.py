"""Headers and index of a folder of safetensors, read as plain JSON: no torch, no tensor data, never a pickle.

Everything that is wrong is found in one run; nothing is allocated from a length that the file merely claims, and what
is read is in proportion to the tensors behind it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gatekeeper.errors import CheckpointError, one_line
from gatekeeper.files import Unreadable, inside, open_regular, read_whole, require_unicode
from gatekeeper.stacking import View

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library itself accepts (``MAX_HEADER_SIZE`` in its ``tensor.rs``)."""
DATA_PER_HEADER_BYTE = 64
"""Bytes of tensors that stand, at the least, behind a byte of a large header; real ones have 10 000 and more."""
MAX_INDEX_BYTES = 500_000_000
"""An index has about 100 bytes a tensor; the largest published ones are a few tens of megabytes."""
INDEX_PER_HEADER_BYTE = 4
"""Bytes of a large index, at the most, for a byte of the headers that it names: both list the same tensors."""
SMALL_BYTES = 4 << 20
"""Headers and indexes of up to this are read whatever stands behind them: about 25 000 tensors."""
MAX_DIMENSIONS = 32
MAX_SHOWN = 20
"""Faults that an error shows; it holds them all."""

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


class HeaderFault(NamedTuple):
    """One thing that is wrong with a shard, its header or what the index says of it."""

    shard: str
    """``model-00001-of-00064.safetensors``"""
    problem: str
    """One line: ``tensor `b` overlaps tensor `a```"""
    hides: bool = False
    """Whether it leaves tensors unknown or beyond belief: a shard is missing, cut short or makes no sense."""

    def __str__(self) -> str:
        return f"{self.shard}: {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Every tensor of a checkpoint folder, by name."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    faults: tuple[HeaderFault, ...] = ()
    """What is wrong with headers though they name all tensors; empty unless `read_index` was to keep it."""
    digests: Mapping[str, bytes] = field(default_factory=dict)
    """Of the bytes before each shard's data."""

    def knows(self, shard: str, head: bytes) -> bool:
        """Whether a shard's bytes before its data are still those that were read, to the bit."""
        return self.digests.get(shard) == _digest(head)

    def require_sound(self, *more: str) -> None:
        """Raise `CheckpointError` where there are `faults`, with `more` that is wrong."""
        if self.faults:
            raise _error(self.folder, [*map(str, self.faults), *more])


def read_index(folder: Path, *, keep_faults: bool = False) -> Index | None:
    """Read the headers of all safetensors of `folder`, checked against its index where it has one.

    None where the folder holds no safetensors at all (neither index nor shard). Raises `CheckpointError` that lists
    all that is wrong, one line a fault: a shard missing, truncated or leaving the folder; a header that is too long,
    not JSON, or whose offsets overlap, leave gaps, or do not fit shape and dtype; a tensor that is named twice, or by
    only one of index and shard. A folder with nothing but pickled weights is an error too: they are never opened.
    With `keep_faults`, faults that leave all tensors known, such as overlaps, are not raised but left on the index, to
    be raised together with what else is wrong. Header format: https://github.com/huggingface/safetensors#format
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
    unusable: list[str] = []
    weight_map: dict[str, str] | None = None
    if len(indexes) > 1:
        unusable.append(f"{_some([p.name for p in indexes])}: several indexes in one folder; keep one")
    elif indexes:
        try:
            weight_map = _read_weight_map(folder, indexes[0].name, shards_here)
        except Unreadable as bad:
            unusable += [f"{indexes[0].name}: {problem}" for problem in bad.problems]
    if unusable:  # without a trusted index no statement about the shards would be worth anything
        raise _error(folder, unusable)
    index = _read_shards(folder, shards_here, weight_map)
    if not keep_faults or any(fault.hides for fault in index.faults):
        index.require_sound()
    return index


def _read_shards(folder: Path, shards_here: list[str], weight_map: dict[str, str] | None) -> Index:
    names_by_shard: dict[str, list[str]] = defaultdict(list)
    for name, shard in (weight_map or {}).items():
        names_by_shard[shard].append(name)
    shards = sorted(names_by_shard) if weight_map is not None else shards_here
    tensors: dict[str, TensorInfo] = {}
    digests: dict[str, bytes] = {}
    faults: list[HeaderFault] = []
    for shard in shards:
        expected = names_by_shard[shard]
        named = f" (the index expects {_some(expected)} there)" if expected else ""
        try:
            found, misplaced, digests[shard] = _read_entries(inside(folder, shard, "shard"), shard)
        except Unreadable as bad:
            faults += [HeaderFault(_cut(shard), f"{problem}{named}", hides=True) for problem in bad.problems]
            continue
        problems = [f"{problem}{named}" for problem in misplaced]
        problems += [
            f"tensor {_quoted(name)} is in {_cut(tensors[name].shard)} too; a tensor belongs to one shard"
            for name in sorted(found.keys() & tensors.keys())
        ]
        if weight_map is not None:
            problems += [
                f"tensor {_quoted(name)} is in the index but not here" for name in sorted(expected) if name not in found
            ]
            for name in sorted(found.keys() - set(expected)):
                place = f"names {_cut(weight_map[name])} for it" if name in weight_map else "does not name it"
                problems.append(f"tensor {_quoted(name)} is here but the index {place}")
        faults += [HeaderFault(_cut(shard), problem) for problem in problems]
        tensors |= found
    if weight_map is None:
        faults += _gaps(shards)
    else:
        faults += [
            HeaderFault(_cut(shard), "belongs to the same set of shards as the index's, but the index does not name it")
            for shard in _stray_shards(shards_here, shards)
        ]
    return Index(
        folder=folder,
        tensors=MappingProxyType(tensors),
        faults=tuple(faults),
        digests=MappingProxyType(digests),
    )


def _stray_shards(here: list[str], indexed: list[str]) -> list[str]:
    """Shards of the index's ``-NNNNN-of-NNNNN`` series that it forgot; ``consolidated…`` and the like are not of it."""
    series = {m[1:] for m in map(_series, indexed) if m}
    return [shard for shard in here if shard not in indexed and (m := _series(shard)) and m[1:] in series]


def _gaps(here: list[str]) -> list[HeaderFault]:
    """What is missing of each ``-NNNNN-of-NNNNN`` series, where no index says it."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, *series in filter(None, map(_series, here)):
        found[series[0], series[1]].append(int(number))
    faults = []
    for (before, after), numbers in found.items():
        count = int(after.split("-")[2].removesuffix(".safetensors"))
        if len(numbers) < count:
            first = min(set(range(1, len(numbers) + 2)) - set(numbers))
            missing = f"{count - len(numbers)} of {count} are, and the index"
            problem = f"the shard is missing ({missing}); download the folder again"
            faults.append(HeaderFault(_cut(f"{before}{first:05d}{after}"), problem, hides=True))
    return faults


def _series(shard: str) -> tuple[str, str, str] | None:
    match = re.fullmatch(r"(.*-)(\d+)(-of-\d+\.safetensors)", shard)
    return (match[2], match[1], match[3]) if match else None


def _error(folder: Path, faults: list[str]) -> CheckpointError:
    head = f"`{folder}` can't be read: "
    if len(faults) == 1:
        return CheckpointError(head + faults[0], faults)
    shown = faults[:MAX_SHOWN] + ([f"and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else [])
    return CheckpointError("\n  ".join([f"{head}{len(faults)} faults", *shown]), faults)


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(_quoted, names[:shown])) + rest


def _quoted(name: str) -> str:
    return f"`{_cut(name)}`"


def _cut(text: str, most: int = 200) -> str:
    """A stranger's text for one line of a message."""
    return one_line(text if len(text) <= most else text[: most - 1] + "…")


def _strict_json(raw: bytes) -> Any:
    """JSON without duplicate keys and without NaN; every way of being broken is `Unreadable`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for (key, _), (other, _) in pairwise(sorted(pairs, key=itemgetter(0))) if key == other)
            raise Unreadable(f"{_quoted(twice)} is there twice")
        return found

    def no_constants(word: str) -> Any:
        raise Unreadable(f"is not JSON: {word}")

    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constants, parse_int=_integer
        )
        require_unicode(raw, document)
    except Unreadable:
        raise
    except UnicodeDecodeError:
        raise Unreadable("is not JSON: not UTF-8") from None
    except RecursionError:
        raise Unreadable("is not JSON that can be read: nested too deep") from None
    except ValueError as error:  # JSONDecodeError, and int() refusing thousands of digits
        raise Unreadable(f"is not JSON: {error}") from None
    return document


def _integer(text: str) -> int:
    if text == "-0":  # a float to every parser that knows unsigned integers, the safetensors library's too
        raise Unreadable("holds the number -0")
    return int(text)


def _read_weight_map(folder: Path, name: str, shards_here: list[str]) -> dict[str, str]:
    path = inside(folder, name)
    _check_index_size(folder, path.stat().st_size, shards_here)
    document = _strict_json(read_whole(path, MAX_INDEX_BYTES))
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise Unreadable("has no `weight_map`, a mapping of tensor names to shards")
    wrong = [name for name, shard in weight_map.items() if not isinstance(shard, str) or not shard]
    if wrong:
        raise Unreadable(f"`weight_map` names no file for {_some(wrong)}")
    pickled = sorted({s for s in weight_map.values() if not s.endswith(".safetensors")})
    if pickled:
        raise Unreadable(f"`weight_map` names {_some(pickled)}; only *.safetensors are read")
    return weight_map


def _check_index_size(folder: Path, index_bytes: int, shards_here: list[str]) -> None:
    """Refuse a large index before it is parsed unless the shards here have headers enough for its tensors."""
    if index_bytes <= SMALL_BYTES:
        return
    headers = 0
    for shard in shards_here:
        try:
            with open_regular(inside(folder, shard)) as file:
                headers += min(int.from_bytes(file.read(8), "little"), file.seek(0, 2))
        except Unreadable:  # named when its turn comes
            continue
    if index_bytes > headers * INDEX_PER_HEADER_BYTE:
        raise Unreadable(
            f"has {index_bytes} bytes, far more than the {len(shards_here)} shards here hold tensors (their headers "
            f"have {headers} bytes together); shards are missing or it is another model's: download the folder again"
        )


def read_header(path: Path, shard: str) -> dict[str, TensorInfo]:
    """Read one shard's header; raises `Unreadable`, a `ValueError`, with all that is wrong in it."""
    tensors, problems, _ = _read_entries(path, shard)
    if problems:
        raise Unreadable(*problems)
    return tensors


def _digest(head: bytes) -> bytes:
    from hashlib import blake2b  # 2 ms, and only where there are weights

    return blake2b(head, digest_size=16).digest()


def _read_entries(path: Path, shard: str) -> tuple[dict[str, TensorInfo], list[str], bytes]:
    """Read the tensors of one shard's header, what is wrong with where they lie (overlaps and gaps), and its digest.

    Raises `Unreadable`, with that too, where an entry can't be understood or claims bytes that the file does not have.
    """
    with open_regular(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise Unreadable(f"is truncated: {file_bytes} bytes are no safetensors file")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise Unreadable(
                f"header of {header_bytes} bytes is too long, more than {MAX_HEADER_BYTES}; not a safetensors file?"
            )
        if header_bytes > file_bytes - 8:
            raise Unreadable(f"is truncated: header of {header_bytes} bytes in a file of {file_bytes}")
        if header_bytes > SMALL_BYTES and header_bytes * DATA_PER_HEADER_BYTE > file_bytes:
            raise Unreadable(
                f"header of {header_bytes} bytes is too long for a file of {file_bytes}; real tensors have "
                f"{DATA_PER_HEADER_BYTE} bytes and more for each byte of it"
            )
        raw = file.read(header_bytes)
    data_start = 8 + header_bytes
    try:
        header = _strict_json(raw)
    except Unreadable as bad:
        raise Unreadable(f"header {bad}; download the shard again") from None
    if not isinstance(header, dict):
        raise Unreadable("header is not a mapping of tensor names")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Unreadable("header's `__metadata__` is not a mapping of strings")
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            tensors[name] = _tensor(name, entry, shard, data_start)
        except Unreadable as bad:
            problems.append(f"tensor {_quoted(name)} {bad}")
    misplaced = _misplaced(tensors, data_start, file_bytes, complete=not problems)
    problems += [
        f"is truncated: tensor {_quoted(info.name)} ends at byte {info.end} of a file of {file_bytes}"
        for info in tensors.values()
        if info.end > file_bytes
    ]
    if problems:
        raise Unreadable(*problems, *misplaced)
    return tensors, misplaced, _digest(prefix + raw)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: object, shard: str, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise Unreadable(f"has dtype {_quoted(str(dtype))}, which safetensors does not know")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise Unreadable("has a shape that is no short list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise Unreadable("has data_offsets that are no pair of byte positions")
    begin, end = offsets
    if begin > end:
        raise Unreadable(f"ends at byte {end}, before its begin {begin}")
    total_bits = bits
    for size in shape:
        total_bits *= size
        if total_bits >= 2**64:
            raise Unreadable(f"has shape {shape}: its size is beyond 64 bits")
    if total_bits % 8 or total_bits // 8 != end - begin:
        raise Unreadable(f"has {end - begin} bytes, but {dtype} of shape {shape} needs {-(-total_bits // 8)}")
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), shard=shard, start=data_start + begin, end=data_start + end
    )


def _misplaced(tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int, *, complete: bool) -> list[str]:
    """Overlaps and gaps; gaps mean nothing while some tensors could not be read (`complete` false)."""
    problems = []
    position, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end, t.name)):
        if info.start < position:
            problems.append(f"tensor {_quoted(info.name)} overlaps {before}")
        elif info.start > position and complete:
            problems.append(
                f"{info.start - position} bytes between {before} and tensor {_quoted(info.name)} belong to nothing"
            )
        if info.end >= position:
            position, before = info.end, f"tensor {_quoted(info.name)}"
    if complete and not problems and position < file_bytes:
        problems.append(f"{file_bytes - position} bytes after {before} belong to nothing")
    return problems
