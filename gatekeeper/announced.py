"""The index that a checkpoint will have, from config.json alone: every expert tensor by name, dtype and shape.

Names are the family's, dtypes and shapes those of the formats that the config announces for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gatekeeper.checkpoint import DTYPE_BITS, Index, TensorInfo
from gatekeeper.errors import CheckpointError
from gatekeeper.families import Family
from gatekeeper.formats import SCALE_NAMES, Format, PartSpec
from gatekeeper.names import canonical_method
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings, Values

SHARD = "announced"
"""In the place of a shard's name: there is none yet."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def announced_index(
    target: Path, layers: Sequence[Readings], values: Values, family: Family, formats: Mapping[str, Format]
) -> Index:
    """Every tensor of the MoE layers `layers` as config.json announces them; optional parts of a format are left out.

    `layers` are the facts `layer.*` of one runner, `values` those of the whole model. Routers are in the model's dtype,
    their correction biases in float32 (formats of DeepSeek-V3's release; a layer's bytes hardly depend on it). Raises
    `CheckpointError` where the config does not say how a layer's experts are stored, or how many there are.
    """
    if not family.names.routed:
        raise CheckpointError(
            f"family `{family.name}` keeps all experts of a layer in one tensor, config.json does not tell its shape; "
            "name a folder with the safetensors headers"
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

    def tensors(self) -> Iterator[TensorInfo]:
        names, values = self.family.names, self.values
        experts, hidden = (self._count(name) for name in ("n_routed_experts", "hidden_size"))
        routed = list(self._parts("routed", slots=1))
        for expert in range(experts):
            for projection, tensors in routed:
                base = names.routed.format(expert=expert, projection=names.projections[projection])
                for suffix, dtype, shape in tensors:
                    yield _info(f"{self.block}.{base}.{suffix}", dtype, shape)
        dtype = DTYPES.get(str(values.get("model.dtype")), "BF16")
        if names.router:
            yield _info(f"{self.block}.{names.router}", dtype, (experts, hidden))
        if names.router_bias:
            yield _info(f"{self.block}.{names.router_bias}", "F32", (experts,))
        if not self._has("shared"):
            return
        for projection, tensors in self._parts("shared", slots=max(1, self._count("n_shared_experts"))):
            base = names.shared.format(projection=names.shared_projections[projection])
            for suffix, dtype_, shape in tensors:
                yield _info(f"{self.block}.{base}.{suffix}", dtype_, shape)
        if names.shared_gate:
            yield _info(f"{self.block}.{names.shared_gate}", dtype, (1, hidden))

    def _has(self, kind: str) -> bool:
        reading = self.layer.get(f"layer.{kind}_excluded")
        return reading is not None and isinstance(reading.value, str)

    def _parts(self, kind: str, slots: int) -> Iterator[tuple[str, list[tuple[str, str, tuple[int, ...]]]]]:
        """Each projection of an expert, and suffix, dtype and shape of its tensors."""
        record = self._storage(kind)
        name, width, hidden = (record[field] for field in ("format", "width", "input_width"))
        signature = self.formats[name].signature_of(self.family.name, self.method)
        for projection in self.family.names.projections:
            out, in_ = (hidden, width * slots) if projection == "down" else (width * slots, hidden)
            tensors = []
            for part in signature.parts:
                if part.optional:
                    continue
                shape = tuple(term.size({"out": out, "in": in_}) for term in part.shapes[0])
                sizes = tuple(size for size in shape if size is not None)
                if len(sizes) < len(shape):
                    raise CheckpointError(
                        f"{self.config}: {kind} experts {out} x {in_} can't be stored in {name}: {part.suffix} is "
                        "of no whole size; correct the config"
                    )
                tensors.append((part.suffix, _dtype(part, record.get("scale_dtype")), sizes))
            yield projection, tensors

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


def _info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return TensorInfo(name=name, dtype=dtype, shape=shape, shard=SHARD, start=0, end=bits // 8)
