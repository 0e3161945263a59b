"""Formats: each is recognised from names, dtypes and shapes, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from gatekeeper.checkpoint import TensorInfo
from gatekeeper.errors import RuleError
from gatekeeper.formats import Format, Storage, Term, recognise
from gatekeeper.source import parse_yaml
from gatekeeper.values import ABSENT
from tests.shipped import RULES, checked, formats

Parts = dict[str, dict[str, TensorInfo]]

# One matrix of 256 x 384 in every format, as suffix -> dtype, shape.
LINEAR: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "bf16": {"weight": ("BF16", ("o", "i"))},
    "fp16": {"weight": ("F16", ("o", "i"))},
    "fp32": {"weight": ("F32", ("o", "i"))},
    "fp8_block": {"weight": ("F8_E4M3", ("o", "i")), "weight_scale_inv": ("F32", ("o128", "i128"))},
    "fp8_channel": {"weight": ("F8_E4M3", ("o", "i")), "weight_scale": ("BF16", ("o", "1"))},
    "fp8_tensor": {"weight": ("F8_E4M3", ("o", "i")), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    "int4_g32": {
        "weight_packed": ("I32", ("o", "i8")),
        "weight_scale": ("BF16", ("o", "i32")),
        "weight_shape": ("I64", ("2",)),
    },
    "mxfp4": {"weight": ("U8", ("o", "i2")), "weight_scale": ("U8", ("o", "i32"))},
    "mxfp8": {"weight": ("F8_E4M3", ("o", "i")), "weight_scale": ("U8", ("o", "i32"))},
    "nvfp4": {
        "weight": ("U8", ("o", "i2")),
        "weight_scale": ("F8_E4M3", ("o", "i16")),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "nvfp4_ct": {
        "weight_packed": ("U8", ("o", "i2")),
        "weight_scale": ("F8_E4M3", ("o", "i16")),
        "weight_global_scale": ("F32", ("1",)),
    },
}
BLOCKS = {
    "fp8_block": (128, 128),
    "int4_g32": (1, 32),
    "mxfp4": (1, 32),
    "mxfp8": (1, 32),
    "nvfp4": (1, 16),
    "nvfp4_ct": (1, 16),
}
SCALES = {
    "fp8_block": "fp32",
    "fp8_channel": "bf16",
    "fp8_tensor": "fp32",
    "int4_g32": "bf16",
    "mxfp4": "e8m0",
    "mxfp8": "e8m0",
    "nvfp4": "e4m3",
    "nvfp4_ct": "e4m3",
}


def linear(name: str, out: int, in_: int) -> dict[str, TensorInfo]:
    """The tensors of one projection in a format."""

    def size(text: str) -> int:
        if text.isdigit():
            return int(text)
        return -(-{"o": out, "i": in_}[text[0]] // int(text[1:] or 1))

    return {
        suffix: TensorInfo(name=suffix, dtype=dtype, shape=tuple(map(size, shape)), shard="x", start=0, end=0)
        for suffix, (dtype, shape) in LINEAR[name].items()
    }


def expert(name: str, width: int = 256, hidden: int = 384) -> Parts:
    """The three projections of an expert."""
    return {"gate": linear(name, width, hidden), "up": linear(name, width, hidden), "down": linear(name, hidden, width)}


def changed(parts: Parts, projection: str, suffix: str, **change: Any) -> Parts:
    info = parts[projection][suffix]
    new = {f: getattr(info, f) for f in ("name", "dtype", "shape", "shard", "start", "end")} | change
    return {**parts, projection: {**parts[projection], suffix: TensorInfo(**new)}}


def test_the_table_has_every_shipped_format() -> None:
    assert {one.name for one in formats()} == set(LINEAR)
    assert all((RULES / "formats" / f"{one.name}.yaml").is_file() for one in formats())


@pytest.mark.parametrize("name", LINEAR)
def test_each_format_is_recognised_and_no_other(name: str) -> None:
    storage, reason = recognise(formats(), expert(name))
    assert reason == ""
    assert storage == Storage(
        format=name,
        block=BLOCKS.get(name, ABSENT),
        scale_dtype=SCALES.get(name, ABSENT),
        width=256,
        input_width=384,
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_tensor_too_many_or_too_few_is_no_format(name: str) -> None:
    parts = expert(name)
    bias = {**parts["up"], "bias": linear("bf16", 256, 384)["weight"]}
    storage, reason = recognise(formats(), {**parts, "up": bias})
    assert storage is None
    assert "up_proj" in reason
    for suffix in LINEAR[name]:
        fewer = {**parts, "up": {s: t for s, t in parts["up"].items() if s != suffix}}
        storage, _ = recognise(formats(), fewer)
        optional = suffix in {"input_scale", "weight_shape"}
        assert (storage is not None) is optional, suffix


@pytest.mark.parametrize("name", [name for name in LINEAR if name in BLOCKS])
def test_a_scale_of_another_shape_is_no_format(name: str) -> None:
    parts = expert(name)
    suffix = next(s for s in parts["gate"] if "scale" in s)
    rows, columns = parts["gate"][suffix].shape
    storage, reason = recognise(formats(), changed(parts, "gate", suffix, shape=(rows, columns + 1)))
    assert storage is None
    assert "no format has gate_proj" in reason


def test_partial_blocks_round_up() -> None:
    storage, _ = recognise(formats(), expert("fp8_block", width=130, hidden=257))
    assert storage is not None
    assert (storage.width, storage.input_width) == (130, 257)


def test_projections_that_differ_are_told() -> None:
    parts = {**expert("int4_g32"), "down": expert("bf16")["down"]}
    assert recognise(formats(), parts) == (None, "projections differ: gate is int4_g32, up is int4_g32, down is bf16")


def test_projections_that_do_not_fit_are_told() -> None:
    parts = {**expert("bf16"), "down": linear("bf16", 384, 128)}
    storage, reason = recognise(formats(), parts)
    assert storage is None
    assert "down 384x128" in reason


def test_scales_of_two_dtypes_are_told() -> None:
    storage, reason = recognise(formats(), changed(expert("int4_g32"), "up", "weight_scale", dtype="F32"))
    assert storage is None
    assert reason == "scales differ: gate has bf16, up has fp32, down has bf16"


def test_a_shared_mlp_for_two_slots() -> None:
    storage, _ = recognise(formats(), expert("bf16", width=512), slots=2)
    assert storage is not None
    assert storage.width == 256
    assert recognise(formats(), expert("bf16", width=257), slots=2)[1] == "width 257 is not divisible into 2 slots"


def test_an_expert_without_gate() -> None:
    parts = {k: v for k, v in expert("bf16").items() if k != "gate"}
    storage, _ = recognise(formats(), parts)
    assert storage is not None
    assert storage.width == 256


def test_an_expert_with_nothing_in_it() -> None:
    assert recognise(formats(), {"gate": {}, "up": {}, "down": {}}) == (None, "gate_proj has no tensors")


@pytest.mark.parametrize("text", ["rows", "out/8", "in / 0", "ceil(in)", "", "in / -1", "out / 8 "])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        Term.parse(text)


def test_a_size_that_does_not_come_out_even() -> None:
    assert Term.parse("in / 8").size({"out": 1, "in": 12}) is None
    assert Term.parse("ceil(in / 8)").size({"out": 1, "in": 12}) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [("shape: [out, in]", "shape: [rows, in]"), ("role: weight", "role: wait"), ("dtype: [BF16]", "dtype: [BF61]")],
)
def test_a_broken_format_file_is_a_fault(change: str, says: str) -> None:
    text = (RULES / "formats" / "bf16.yaml").read_text("utf-8")
    assert change in text
    with pytest.raises(RuleError):
        Format.parse(checked(parse_yaml(text.replace(change, says), "formats/bf16.yaml"), "format"))


@pytest.mark.parametrize(
    ("name", "family", "method", "suffixes"),
    [
        ("mxfp4", "kimi_k25", "quark", ["weight", "weight_scale"]),
        ("mxfp4", "kimi_k25", "compressed-tensors", ["weight_packed", "weight_scale"]),
        ("mxfp4", "deepseek_v4", "fp8", ["weight", "scale"]),
        ("mxfp4", "gpt_oss", "mxfp4", ["blocks", "scales"]),
        ("fp8_block", "deepseek_v3", "fp8", ["weight", "weight_scale_inv"]),
        ("fp8_block", "deepseek_v3", "compressed-tensors", ["weight", "weight_scale"]),
        ("fp8_block", "deepseek_v4", "fp8", ["weight", "scale"]),
        ("bf16", "mixtral", "none", ["weight"]),
    ],
)
def test_who_names_the_parts_how(name: str, family: str, method: str, suffixes: list[str]) -> None:
    one = next(one for one in formats() if one.name == name)
    assert [part.suffix for part in one.signature_of(family, method).parts] == suffixes
