"""The index that a checkpoint will have, from config.json alone: every expert tensor by name, dtype and shape.

Names are the family's, dtypes and shapes those of the formats that the config announces for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from gatekeeper.checkpoint import DTYPE_BITS, Index, TensorInfo
from gatekeeper.errors import CheckpointError
from gatekeeper.families import Family
from gatekeeper.formats import SCALE_NAMES, Format, PartSpec
from gatekeeper.names import canonical_method
from gatekeeper.stacking import PROJECTIONS_OF, Stacking
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings, Values

MAX_EXPERTS = 1_000_000
"""In all layers together; the largest published models have some 50,000."""
SHARD = "announced"
"""In the place of a shard's name: there is none yet."""
Part: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Suffix, dtype and shape of one tensor."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def announced_index(
    target: Path, layers: Sequence[Readings], values: Values, family: Family, formats: Mapping[str, Format]
) -> Index:
    """Every tensor of the MoE layers `layers` as config.json announces them; optional parts of a format are left out.

    `layers` are the facts `layer.*` of one runner, `values` those of the whole model. Experts are stacked in one tensor
    where the family knows no other way, or usually does so and nobody quantized them: quantizers take experts one by
    one, but for a format of the family's own. Routers are in the model's dtype, correction biases in float32, as
    DeepSeek-V3's release has them. Raises `CheckpointError` where the config does not say how a layer's experts are
    stored, or how many there are.
    """
    experts = values.get("model.n_routed_experts")
    if isinstance(experts, int) and experts * len(layers) > MAX_EXPERTS:
        raise CheckpointError(
            f"{target.name} announces {experts} experts in each of {len(layers)} layers, more than {MAX_EXPERTS} in "
            "all; correct it"
        )
    tensors = {
        one.name: one for layer in layers for one in _Layer(target.name, layer, values, family, formats).tensors()
    }
    return Index(folder=target, tensors=MappingProxyType(tensors))


class _Layer:
    """The tensors of one layer."""

    def __init__(
        self, config: str, layer: Readings, values: Values, family: Family, formats: Mapping[str, Format]
    ) -> None:
        self.config, self.layer, self.values, self.family, self.formats = config, layer, values, family, formats
        self.block = str(layer["layer.name"].value)
        self.method = canonical_method(str(values.get("quant.method", "")))
        self.dtype = DTYPES.get(str(values.get("model.dtype")), "BF16")

    def tensors(self) -> Iterator[TensorInfo]:
        """Of the experts, the router and the shared expert."""
        names, stacking = self.family.names, self.family.names.stacked
        experts, hidden = (self._count(name) for name in ("n_routed_experts", "hidden_size"))
        if stacking is not None and self._is_stacked(stacking):
            yield from self._stacked(stacking, experts)
        else:
            yield from self._one_by_one(experts)
        if names.router:
            yield self._info(names.router, self.dtype, (experts, hidden))
        if names.router_bias:
            corrects = self.family.router.get("bias") != "logits"
            yield self._info(names.router_bias, "F32" if corrects else self.dtype, (experts,))
        if not self._has("shared"):
            return
        storage = self._storage("shared")
        slots = max(1, self._count("n_shared_experts"))
        for projection, name in names.shared_projections.items():
            for suffix, dtype, shape in self._parts(storage, *_size(projection, storage, slots)):
                yield self._info(f"{names.shared.format(projection=name)}.{suffix}", dtype, shape)
        if names.shared_gate:
            yield self._info(names.shared_gate, self.dtype, (1, hidden))

    def _is_stacked(self, stacking: Stacking) -> bool:
        if not self.family.names.routed:
            return True
        one = self.formats[self._storage("routed")["format"]]
        of_family = self.family.name in one.signature_of(self.family.name, self.method).written_by
        return stacking.usual and (not one.quantized or of_family)

    def _one_by_one(self, experts: int) -> Iterator[TensorInfo]:
        names, storage = self.family.names, self._storage("routed")
        for projection, name in names.projections.items():
            out, in_ = _size(projection, storage)
            parts = list(self._parts(storage, out, in_))
            if names.expert_bias:
                parts.append((names.expert_bias, self.dtype, (out,)))
            for expert in range(experts):
                base = names.routed.format(expert=expert, projection=name)
                for suffix, dtype, shape in parts:
                    yield self._info(f"{base}.{suffix}", dtype, shape)

    def _stacked(self, stacking: Stacking, experts: int) -> Iterator[TensorInfo]:
        storage, bias, swapped = self._storage("routed"), self.family.names.expert_bias, stacking.transposed
        for kind, name in stacking.names.items():
            out, in_ = _size(PROJECTIONS_OF[kind][0], storage)
            out *= len(PROJECTIONS_OF[kind])
            for suffix, dtype, shape in self._parts(storage, out, in_):
                if not shape:
                    raise CheckpointError(
                        f"{self.config}: `{name}` is all experts in one, each with a `{suffix}` of its own, and how "
                        "those are stored it does not tell; name a folder with the safetensors headers"
                    )
                if swapped is True or (swapped and suffix in swapped):
                    shape = shape[::-1]
                yield self._info(name if suffix == "weight" else f"{name}_{suffix}", dtype, (experts, *shape))
            if bias:
                yield self._info(f"{name}_{bias}", self.dtype, (experts, out))

    def _info(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        return TensorInfo(name=f"{self.block}.{name}", dtype=dtype, shape=shape, shard=SHARD, start=0, end=nbytes)

    def _has(self, kind: str) -> bool:
        reading = self.layer.get(f"layer.{kind}_excluded")
        return reading is not None and isinstance(reading.value, str)

    def _parts(self, storage: Mapping[str, Any], out: int, in_: int) -> Iterator[Part]:
        """Suffix, dtype and shape of each tensor of a matrix ``(out, in_)``."""
        name = storage["format"]
        for part in self.formats[name].signature_of(self.family.name, self.method).parts:
            if part.optional:
                continue
            sizes = [term.size({"out": out, "in": in_}) for term in part.shapes[0]]
            shape = tuple(size for size in sizes if size is not None)
            if len(shape) < len(sizes):
                raise CheckpointError(
                    f"{self.config}: experts of {out} x {in_} can't be stored in {name}, `{part.suffix}` would have no "
                    "whole size; correct the config"
                )
            yield part.suffix, _dtype(part, storage["scale_dtype"]), shape

    def _storage(self, kind: str) -> Mapping[str, Any]:
        fields = {
            field: self.layer.get(f"layer.{kind}_storage.{field}", Reading(UNKNOWN))
            for field in ("format", "width", "input_width", "scale_dtype")
        }
        for field in ("format", "width", "input_width"):
            reading = fields[field]
            if reading.value is UNKNOWN or reading.value is ABSENT:
                raise CheckpointError(
                    f"{self.config} does not tell how the {kind} experts of layer {self.layer['layer.index'].value} "
                    f"are stored ({reading.note or f'no {field}'}); name a folder with the safetensors headers"
                )
        return {field: reading.value for field, reading in fields.items()}

    def _count(self, name: str) -> int:
        value = self.values.get(f"model.{name}")
        if not isinstance(value, int):
            raise CheckpointError(f"{self.config} does not give `{name}`; add what is missing")
        return value


def _dtype(part: PartSpec, scale_dtype: object) -> str:
    of_scale = (dtype for dtype in part.dtypes if part.role == "scale" and SCALE_NAMES.get(dtype) == scale_dtype)
    return next(of_scale, part.dtypes[0])


def _size(projection: str, storage: Mapping[str, Any], slots: int = 1) -> tuple[int, int]:
    width, hidden = storage["width"] * slots, storage["input_width"]
    return (hidden, width) if projection == "down" else (width, hidden)
