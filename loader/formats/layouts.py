"""Which layout a checkpoint has: the signatures of ``rules/formats`` for names, dtypes and shapes, ours for numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from gatekeeper import Format, PartSpec, Signature, TensorInfo, Term
from loader.dtypes import NAMES
from loader.formats import (
    bf16,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    fp16,
    fp32,
    int4_g32,
    mxfp4,
    mxfp8,
    nvfp4,
    nvfp4_ct,
)
from loader.formats.base import Layout, Part, WeightFormat

_ALL: tuple[WeightFormat, ...] = tuple(
    module.FORMAT
    for module in (bf16, fp16, fp32, fp8_block, fp8_channel, fp8_tensor, int4_g32, mxfp4, mxfp8, nvfp4, nvfp4_ct)
)

FORMATS: Mapping[str, WeightFormat] = MappingProxyType({each.name: each for each in _ALL})
"""What this loader can put into memory, by the name that ``rules/formats`` gives it."""

Projection = Mapping[str, TensorInfo]
"""Parts of one projection by suffix."""


def layout_of(known: Format, signature: Signature | None = None, found: Projection | None = None) -> Layout:
    """The layout of a format by one of its signatures (None: the first), with the dtypes of the tensors `found`.

    Without tensors, each part has the first dtype that the signature allows, and nothing repeats the shape: what to
    expect where there is a config.json alone.
    """
    signature, found = signature or known.signatures[0], found or {}
    first = {part.role: part.suffix for part in known.signatures[0].parts}
    parts = {
        spec.role: Part.of(spec, first.get(spec.role, spec.suffix), _dtype(spec, found)) for spec in signature.parts
    }
    weight_format = FORMATS[known.name]
    shape = parts.get("shape")
    return Layout(
        format=weight_format,
        parts=tuple(parts[role] for role in weight_format.roles),
        shape_part=shape if shape is not None and shape.suffix in found else None,
        unused=tuple(part for role, part in parts.items() if role not in {*weight_format.roles, "shape"}),
    )


def _dtype(spec: PartSpec, found: Projection) -> str:
    info = found.get(spec.suffix)
    return info.dtype if info is not None and info.dtype in spec.dtypes else spec.dtypes[0]


def match_layout(known: Mapping[str, Format], projections: Iterable[Projection]) -> Layout | None:
    """The layout that most of these projections have.

    Where none has all parts in the right shape, the one that is nearest by at least half, so that faults can name what
    is wrong; None where no format, or more than one, is near.
    """
    counts: Counter[frozenset[tuple[str, str, tuple[int, ...]]]] = Counter()
    samples: dict[frozenset[tuple[str, str, tuple[int, ...]]], Projection] = {}
    for projection in projections:
        if projection:
            kind = frozenset((suffix, info.dtype, info.shape) for suffix, info in projection.items())
            counts[kind] += 1
            samples[kind] = projection
    votes: Counter[Layout] = Counter()
    for kind, count in counts.items():
        exact = [one for one in _signatures(known) if one[1].sizes(samples[kind])]
        if len({one.name for one, _ in exact}) == 1:
            votes[layout_of(*exact[0], samples[kind])] += count
    if votes:
        return max(votes, key=lambda layout: votes[layout])
    return _nearest(known, samples[max(counts, key=lambda kind: counts[kind])]) if counts else None


def _signatures(known: Mapping[str, Format]) -> list[tuple[Format, Signature]]:
    """All that this loader can read of the formats of a rule set, which may be other than the shipped ones."""
    return [
        (known[name], signature)
        for name in FORMATS
        if name in known
        for signature in known[name].signatures
        if _is_readable(FORMATS[name], signature)
    ]


def _is_readable(weight_format: WeightFormat, signature: Signature) -> bool:
    parts = {part.role: part for part in signature.parts}
    return (
        parts.keys() >= set(weight_format.roles)
        and all(dtype in NAMES for part in signature.parts for dtype in part.dtypes)
        and all(_is_matrix(shape) for role in weight_format.roles for shape in parts[role].shapes)
    )


def _is_matrix(shape: Sequence[Term]) -> bool:
    """Rows, then columns, either of which may be one or left out: a transposed square would be read in silence."""
    places = zip(shape, ("out", "in"), strict=False)
    return len(shape) <= 2 and all(term.axis == axis or (not term.axis and term.by == 1) for term, axis in places)


def _nearest(known: Mapping[str, Format], projection: Projection) -> Layout | None:
    scores = {(one.name, n): _likeness(signature, projection) for n, (one, signature) in enumerate(_signatures(known))}
    best = max(scores.values(), default=0.0)
    near = [key for key, score in scores.items() if score == best]
    if best < 0.5 or len({name for name, _ in near}) > 1:
        return None
    return layout_of(*_signatures(known)[near[0][1]], projection)


def _likeness(signature: Signature, projection: Projection) -> float:
    """What part of all suffixes, here or there, have a tensor of a right dtype."""
    wanted = {part.suffix: part for part in signature.parts if not part.optional or part.suffix in projection}
    right = sum(s in projection and projection[s].dtype in part.dtypes for s, part in wanted.items())
    return right / len(wanted.keys() | projection.keys())
