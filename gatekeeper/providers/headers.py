"""Safetensors headers to the storage of each MoE layer's experts; they beat the config, contradictions are errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gatekeeper.catalogue import Catalogue
from gatekeeper.checkpoint import Index, TensorInfo
from gatekeeper.errors import FactError
from gatekeeper.families import Family
from gatekeeper.formats import Format, Storage, recognise
from gatekeeper.moe_tensors import MoeTensors, find_moe_layers
from gatekeeper.providers.config import ConfigFile, settled
from gatekeeper.providers.quantization import LayerReader
from gatekeeper.stacking import PROJECTIONS_OF
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings, Values

Expert = Mapping[str, Mapping[str, TensorInfo]]
Layer = dict[str, Reading]


def read_headers(
    index: Index,
    config: ConfigFile,
    readings: Readings,
    catalogue: Catalogue,
    family: Family | None,
    formats: Sequence[Format],
) -> tuple[list[Layer] | None, str]:
    """Facts of every MoE layer whose experts are in the headers; None and a note where no name is understood.

    `readings` are the facts of `read_config` and `read_quantization`. Raises `FactError` where the headers contradict
    the config, naming both: a module that the exclude list covers is quantized or the reverse, it is stored in another
    format or is of another size than the config says, there are more experts than it says, or a layer with experts is
    said to have none or the reverse.
    """
    values = settled(catalogue, readings)
    if family is None:
        if values.get("model.n_routed_experts", UNKNOWN) in (ABSENT, 0):
            return [], "the model has no routed experts"
        return None, "no family knows this architecture"
    found = find_moe_layers(index, family, values)
    numbers = family.layer_numbers(values)
    if not found:
        if numbers == []:
            return [], f"family `{family.name}` has no layer with experts here"
        return None, f"no tensor has a name of an expert of family `{family.name}`"
    _same_layers(found, numbers, config, family)
    _enough_rows(found, values, config)
    reader = LayerReader(config=config, family=family, formats=formats, values=values)
    recognised = _Recogniser(formats, family, values)
    return [_layer(one, reader, recognised, config) for one in found], ""


def _same_layers(
    found: Sequence[MoeTensors], numbers: Sequence[tuple[str, int, int]] | None, config: ConfigFile, family: Family
) -> None:
    if numbers is None:
        return
    announced = {index for role, index, _ in numbers if role == "main"}
    stored = {layer.index: layer for layer in found if layer.role == "main"}
    for index in sorted(announced ^ stored.keys()):
        if index in stored:
            witness = _witness(stored[index].routed or (stored[index].stacked,))
            raise FactError(
                f"layer {index} has experts ({witness}), but none by {config.name} and {family.witness}; correct either"
            )
        raise FactError(
            f"layer {index} should have experts by {config.name} and {family.witness}, but the headers have none of "
            "them; download the checkpoint again"
        )


def _enough_rows(found: Sequence[MoeTensors], values: Values, config: ConfigFile) -> None:
    """Refuse a router that can't choose every expert; with more rows it may have experts that compute nothing."""
    experts = values.get("model.n_routed_experts", UNKNOWN)
    for router in filter(None, (layer.router for layer in found)):
        if isinstance(experts, int) and router.shape and router.shape[0] < experts:
            raise FactError(
                f"{router.shard}: {router.name} has {router.shape[0]} rows, one for each expert, but {config.name} "
                f"announces {experts} experts; one of the two is of another checkpoint"
            )


def _witness(experts: Sequence[Expert]) -> str:
    first = next((e for e in experts if e), {})
    info = next((info for tensors in first.values() for info in tensors.values()), None)
    return f"{info.shard}: {info.name}" if info else "headers"


def _layer(one: MoeTensors, reader: LayerReader, recognised: _Recogniser, config: ConfigFile) -> Layer:
    names = reader.family.names
    witness = _witness(one.routed or (one.stacked,))
    _same_count(one, reader.values, config)
    is_stack = bool(one.stacked) and not one.routed
    experts = reader.experts if is_stack or len(reader.experts) <= len(one.routed) else range(len(one.routed))
    layer: Layer = {
        "layer.index": Reading(one.index, witness),
        "layer.name": Reading(one.name, witness),
        "layer.role": Reading(one.role, witness),
        # A stack may be listed by its own name or by those of all its experts.
        **reader.group(
            "routed",
            names.routed_modules(one.name, experts),
            names.stacked_module(one.name) if is_stack else "",
        ),
        **reader.group("shared", names.shared_modules(one.name) if one.shared else ()),
    }
    stored = {"routed": recognised.stacked(one) if is_stack else recognised.routed(one)}
    if one.shared:
        stored["shared"] = recognised.shared(one)
    for kind, reading in stored.items():
        name = f"layer.{kind}_storage"
        announced = layer[name]
        _agree(one, kind, reading, announced, layer[f"layer.{kind}_excluded"], recognised)
        layer[name] = reading
    return layer


def _agree(
    layer: MoeTensors, kind: str, stored: Reading, announced: Reading, out: Reading, recognised: _Recogniser
) -> None:
    """Refuse a layer whose headers and config can't both be true: quantized in one, plain in the other."""

    def is_plain(reading: Reading) -> bool | None:
        name = reading.value.get("format") if isinstance(reading.value, Mapping) else None
        return None if name is None else name in recognised.plain

    where = f"layer {layer.index}, {kind} experts: {stored.witness}"
    in_headers, in_config = is_plain(stored), is_plain(announced)
    if None not in (in_headers, in_config) and in_headers != in_config:
        said = {"true": "excludes it from quantization", "false": "does not exclude it", "partly": "excludes a part"}
        raise FactError(
            f"{where} is {_field(stored, 'format')}, but {out.witness} {said[str(out.value).lower()]} "
            f"({_field(announced, 'format')}); one of the two is of another checkpoint"
        )
    # Plain weights are in whatever dtype they were saved in; `dtype` is what the model computes in.
    for field in ("width", "input_width") if in_headers else ("format", "width", "input_width"):
        found, expected = _field(stored, field), _field(announced, field)
        if None not in (found, expected) and found != expected:
            raise FactError(
                f"{where} has {field} {found}, but {announced.witness} announces {expected}; one of the two is of "
                "another checkpoint"
            )


def _field(reading: Reading, name: str) -> object:
    return reading.value.get(name) if isinstance(reading.value, Mapping) else None


def _same_count(layer: MoeTensors, values: Values, config: ConfigFile) -> None:
    count = values.get("model.n_routed_experts", UNKNOWN)
    if isinstance(count, int) and layer.n_experts > count:
        raise FactError(
            f"layer {layer.index}: {_witness(layer.routed[count:] or (layer.stacked,))} makes {layer.n_experts} "
            f"experts, but {config.name} announces {count}; one of the two is of another checkpoint"
        )


class _Recogniser:
    """Storage of groups of experts; layers repeat each other, so each kind of tensors is looked at once."""

    def __init__(self, formats: Sequence[Format], family: Family, values: Values) -> None:
        self.formats, self.family = formats, family
        self.plain = frozenset(one.name for one in formats if not one.quantized)
        slots = values.get("model.n_shared_experts", UNKNOWN)
        self.slots = slots if isinstance(slots, int) and slots > 0 else 1
        self._seen: dict[object, tuple[Storage | None, str]] = {}

    def _storage(self, expert: Expert, slots: int = 1) -> tuple[Storage | None, str]:
        whole = {projection: expert.get(projection, {}) for projection in self.family.names.projections}
        key = (slots, *((p, s, t.dtype, t.shape) for p, tensors in whole.items() for s, t in sorted(tensors.items())))
        if key not in self._seen:
            self._seen[key] = recognise(self.formats, whole, slots)
        return self._seen[key]

    def routed(self, layer: MoeTensors) -> Reading:
        """One storage for all routed experts; absent where they differ, unknown where one isn't recognised."""
        groups: dict[Storage, list[int]] = {}
        for number, expert in enumerate(layer.routed):
            storage, reason = self._storage(expert)
            if storage is None:
                what = reason if expert else "no tensors at all"
                return Reading(UNKNOWN, _witness((expert, *layer.routed)), f"routed expert {number}: {what}")
            groups.setdefault(storage, []).append(number)
        witness = _witness(layer.routed)
        if len(groups) > 1:
            listed = "; ".join(
                f"{len(numbers)} are {storage.format}, from expert {numbers[0]} on"
                for storage, numbers in groups.items()
            )
            return Reading(ABSENT, witness, f"routed experts of one layer differ: {listed}")
        return Reading(next(iter(groups)).record(), witness)

    def shared(self, layer: MoeTensors) -> Reading:
        """The shared expert's storage, its width for each slot."""
        assert layer.shared is not None
        storage, reason = self._storage(layer.shared, self.slots)
        witness = _witness((layer.shared,))
        if storage is None:
            return Reading(UNKNOWN, witness, f"shared expert: {reason}")
        return Reading(storage.record(), witness)

    def stacked(self, layer: MoeTensors) -> Reading:
        """The storage of experts that are stacked in one tensor, as if each had tensors of its own."""
        witness = _witness((layer.stacked,))
        first = layer.expert(0)
        for kind, parts in layer.stacked.items():
            if any(first.get(projection, {}).keys() != parts.keys() for projection in PROJECTIONS_OF[kind]):
                return Reading(UNKNOWN, witness, f"these stacked experts can't be taken apart, `{kind}`")
        storage, reason = self._storage(first)
        if storage is None:
            return Reading(UNKNOWN, witness, f"stacked experts: {reason}")
        return Reading(storage.record(), witness)
