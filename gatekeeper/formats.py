"""Storage formats as data: recognise, by names, dtypes and shapes alone, how a gated MLP's weights are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gatekeeper.checkpoint import TensorInfo
from gatekeeper.errors import Fault, RuleError, Where
from gatekeeper.source import Document
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Value

PROJECTIONS = ("gate", "up", "down")
"""Of an expert; one without gate_proj (squared ReLU) has the other two."""

SCALE_NAMES: Mapping[str, str] = MappingProxyType(
    {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "e4m3", "F8_E8M0": "e8m0", "U8": "e8m0"}
)
"""safetensors dtype of a scale to the word in `scale_dtype`; scales in bytes are exponents (OCP MX, E8M0)."""

_TERM = re.compile(r"(?P<axis>out|in)(?: / (?P<by>\d+))?|ceil\((?P<up_axis>out|in) / (?P<up_by>\d+)\)|(?P<fixed>\d+)")


@dataclass(frozen=True, slots=True)
class Term:
    """One size of a part's shape: `out`, `in / 8` (must come out even), `ceil(in / 128)` or a fixed number."""

    axis: str
    by: int = 1
    rounds_up: bool = False

    @classmethod
    def parse(cls, text: str | int) -> Term:
        """Read `in / 32`; raises `ValueError`."""
        match = _TERM.fullmatch(str(text))
        if match is None or match["by"] == "0" or match["up_by"] == "0":
            raise ValueError(f"`{text}` is no size; write `out`, `in / 8`, `ceil(in / 128)` or a number")
        if match["fixed"]:
            return cls("", int(match["fixed"]))
        if match["up_axis"]:
            return cls(match["up_axis"], int(match["up_by"]), rounds_up=True)
        return cls(match["axis"], int(match["by"] or 1))

    def size(self, sizes: Mapping[str, int]) -> int | None:
        """The number for these `out` and `in`; None where it does not come out even."""
        if not self.axis:
            return self.by
        full = sizes[self.axis]
        if self.rounds_up:
            return -(-full // self.by)
        return full // self.by if full % self.by == 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """What one tensor of a projection must be."""

    role: str
    """What it is for: `weight`, `scale`, `global_scale`, `input_scale`, `shape`."""
    suffix: str
    """What follows the projection's name: `weight_packed`."""
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[Term, ...], ...]
    """Any of these; the loader treats them alike."""
    optional: bool = False

    def fits(self, info: TensorInfo, sizes: Mapping[str, int]) -> bool:
        """Whether a tensor of a projection `out` x `in` can be this part."""
        wanted = [tuple(term.size(sizes) for term in shape) for shape in self.shapes]
        return info.dtype in self.dtypes and info.shape in wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One way in which a format's parts are named; the first part is the weight, from whose shape out and in follow."""

    parts: tuple[PartSpec, ...]
    written_by: frozenset[str] = frozenset()
    """Quantization methods, and families with names of their own, whose checkpoints have it: `quark`, `deepseek_v4`."""

    def sizes(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
        """`(out, in)` of the projection that these tensors (suffix to tensor) store; None if they don't fit."""
        required = {part.suffix for part in self.parts if not part.optional}
        if not required <= tensors.keys() <= {part.suffix for part in self.parts}:
            return None
        weight = self.parts[0]
        shape = tensors[weight.suffix].shape
        if len(shape) != 2:
            return None
        out, in_ = (size * term.by for size, term in zip(shape, weight.shapes[0], strict=True))
        sizes = {"out": out, "in": in_}
        present = (part for part in self.parts if part.suffix in tensors)
        return (out, in_) if all(part.fits(tensors[part.suffix], sizes) for part in present) else None

    def suffix_of(self, role: str) -> str | None:
        """The suffix of the part with this role."""
        return next((part.suffix for part in self.parts if part.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One storage format."""

    name: str
    doc: str
    block: tuple[int, int] | None
    """Rows and columns that share a scale: `(1, 32)`; None where there are no blocks."""
    scale_dtype: str | None
    """Where the format fixes it: `e8m0`. None: the dtype of the scale part, or no scale at all."""
    quantized: bool
    """Whether the weights are anything but plain floating-point numbers."""
    signatures: tuple[Signature, ...]

    @classmethod
    def parse(cls, document: Document | Mapping[str, Any], file: str = "") -> Format:
        """Read one file of ``rules/formats`` whose shape was checked; raises `RuleError`."""
        if isinstance(document, Document):
            data, file = document.data, document.file
        else:
            data = document
        try:
            signatures = tuple(
                Signature(parts=tuple(map(_part, one["parts"])), written_by=frozenset(one.get("written_by", ())))
                for one in data["signatures"]
            )
        except ValueError as error:
            raise RuleError([Fault("bad-format", str(error), Where(file))]) from None
        block = data.get("block")
        return cls(
            name=data["format"],
            doc=data["doc"],
            block=tuple(block) if block else None,
            scale_dtype=data.get("scale_dtype"),
            quantized=data.get("quantized", True),
            signatures=signatures,
        )

    def signature_of(self, family: str, method: str) -> Signature:
        """The signature that a family's checkpoints have, else those of a quantization method, else the first."""
        named = (one for name in (family, method) for one in self.signatures if name in one.written_by)
        return next(named, self.signatures[0])


def _part(raw: Mapping[str, Any]) -> PartSpec:
    whole = [isinstance(one, list) for one in raw["shape"]]
    if any(whole) and not all(whole):
        raise ValueError("`shape` mixes sizes and shapes; write one shape, or a list of shapes")
    shapes = raw["shape"] if any(whole) else [raw["shape"]]
    return PartSpec(
        role=raw["role"],
        suffix=raw["suffix"],
        dtypes=tuple(raw["dtype"]),
        shapes=tuple(tuple(map(Term.parse, shape)) for shape in shapes),
        optional=raw.get("optional", False),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How the three projections of an expert are stored. A field may be unknown where only the config was read."""

    format: str | Missing
    block: tuple[int, int] | Missing
    scale_dtype: str | Missing
    width: int | Missing
    """Rows of gate_proj, for each slot that the expert would fill: 2048."""
    input_width: int | Missing
    """Columns of gate_proj: 7168."""

    def record(self) -> Value:
        """As the fact `layer.*_storage`; an unknown field is left out."""
        fields: dict[str, Value | Missing] = {
            "format": self.format,
            "block": self.block,
            "scale_dtype": self.scale_dtype,
            "width": self.width,
            "input_width": self.input_width,
        }
        return {name: value for name, value in fields.items() if value is not UNKNOWN}


Parts = Mapping[str, Mapping[str, TensorInfo]]
"""`gate`, `up` and `down` to suffix to tensor; `gate` is left out where the family has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A format and the one of its signatures that fits."""

    format: Format
    signature: Signature
    sizes: tuple[int, int]
    """`(out, in)`"""


def match_projection(formats: Sequence[Format], tensors: Mapping[str, TensorInfo]) -> list[Match]:
    """Every way in which the tensors of one projection (suffix to tensor) can be read."""
    found = []
    for one in formats:
        for signature in one.signatures:
            sizes = signature.sizes(tensors)
            if sizes is not None:
                found.append(Match(format=one, signature=signature, sizes=sizes))
                break
    return found


def recognise(formats: Sequence[Format], parts: Parts, slots: int = 1) -> tuple[Storage | None, str]:
    """Say how an expert is stored, from the tensors of its gate, up and down projections.

    A shared expert that stands for several `slots` has its width divided by them. A storage that none of `formats`
    has, or more than one, or that the projections don't share, is None and a reason.
    """
    matches: dict[str, Match] = {}
    wanted = PROJECTIONS if "gate" in parts else PROJECTIONS[1:]
    for projection in wanted:
        tensors = parts.get(projection, {})
        if not tensors:
            return None, f"{projection}_proj has no tensors"
        found = match_projection(formats, tensors)
        if len(found) != 1:
            what = "several formats fit: " + ", ".join(m.format.name for m in found) if found else "no format has"
            listed = ", ".join(f"{s} {t.dtype} {list(t.shape)}" for s, t in sorted(tensors.items()))
            return None, f"{what} {projection}_proj with {listed}"
        matches[projection] = found[0]
    names = {p: m.format.name for p, m in matches.items()}
    if len(set(names.values())) > 1:
        return None, "projections differ: " + ", ".join(f"{p} is {name}" for p, name in names.items())
    first = wanted[0]
    width, input_width = matches[first].sizes
    if matches["up"].sizes != (width, input_width) or matches["down"].sizes != (input_width, width):
        shown = ", ".join(f"{p} {m.sizes[0]}x{m.sizes[1]}" for p, m in matches.items())
        return None, f"projections do not fit together: {shown}"
    scales = {p: _scale_dtype(m, parts[p]) for p, m in matches.items()}
    if len(set(scales.values())) > 1:
        return None, "scales differ: " + ", ".join(f"{p} has {scale}" for p, scale in scales.items())
    if width % slots:
        return None, f"width {width} is not divisible into {slots} slots"
    one = matches[first].format
    return storage(one, width=width // slots, input_width=input_width, scale_dtype=scales[first] or ABSENT), ""


def _scale_dtype(match: Match, tensors: Mapping[str, TensorInfo]) -> str | None:
    if match.format.scale_dtype:
        return match.format.scale_dtype
    suffix = match.signature.suffix_of("scale")
    return SCALE_NAMES.get(tensors[suffix].dtype) if suffix in tensors and suffix else None


def storage(
    one: Format, *, width: int | Missing, input_width: int | Missing, scale_dtype: str | Missing = UNKNOWN
) -> Storage:
    """The storage of a format; `scale_dtype` counts where the format leaves it open."""
    if not one.quantized:
        scale_dtype = ABSENT
    return Storage(
        format=one.name,
        block=one.block or ABSENT,
        scale_dtype=one.scale_dtype or scale_dtype,
        width=width,
        input_width=input_width,
    )
