"""The machine: a preset by name, or `here`, the only place of this package that may import torch; it does so lazily."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import FactError
from gatekeeper.source import nearest
from gatekeeper.values import ABSENT, UNKNOWN, Arch, Reading, Readings, Version

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "library.triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
    "library.flashinfer": ("flashinfer-python", "flashinfer"),
    "library.aiter": ("aiter", "amd-aiter"),
}
"""Names of distributions where they are not the fact's own name."""

TOOLS = {"nvidia-smi": "cuda", "rocm-smi": "hip", "amd-smi": "hip", "mthreads-gmi": "musa", "npu-smi": "npu"}
"""Vendors' own tools: where one is installed, a machine without torch still can't be called a cpu."""

NAMES = (
    "platform.vendor",
    "platform.arch",
    "platform.capability",
    "platform.device_count",
    "platform.memory_bytes",
    "platform.device_name",
)


def read_platform(name: str, platforms: Mapping[str, Mapping[str, Any]], catalogue: Catalogue) -> Readings:
    """`platform.*` of a preset (name to facts), or of this machine (`here`).

    What a preset leaves out is unknown, and absent where there is no device to have it.

    `here` reads `library.*` (from installed metadata, nothing is imported) and `env.*` too. Raises `FactError` for a
    name that is no preset.
    """
    if name == "here":
        readings = {**_devices(), **_libraries(catalogue), **_environment(catalogue)}
        return {fact: reading for fact, reading in readings.items() if fact in catalogue}
    if name not in platforms:
        hint = nearest(name, [*platforms, "here"]) or f"; the presets are {', '.join(sorted(platforms))}, and here"
        raise FactError(f"unknown platform `{name}`{hint}")
    witness = f"platforms.yaml: {name}"
    sets = platforms[name]
    readings = {fact: Reading(value, witness) for fact, value in sets.items()}
    if sets.get("platform.vendor") == "cpu":
        without = (fact for fact, spec in catalogue.items() if spec.group == "platform" and fact not in sets)
        readings |= {fact: Reading(ABSENT, witness, "a cpu") for fact in without}
    return readings


def _devices() -> dict[str, Reading]:
    try:
        import torch
    except ImportError:
        return _without_torch()
    for vendor in ("cuda", "musa", "npu"):
        module = getattr(torch, vendor, None)  # torch_musa and torch_npu register themselves so
        if module is None or not module.is_available():
            continue
        if vendor == "cuda" and torch.version.hip:
            vendor = "hip"
        return _of_devices(vendor, [module.get_device_properties(i) for i in range(module.device_count())])
    return _cpu("torch: no device")


def _of_devices(vendor: str, devices: list[Any]) -> dict[str, Reading]:
    witness = f"torch: {getattr(devices[0], 'name', vendor)}"
    readings = {
        "platform.vendor": Reading(vendor, witness),
        "platform.device_count": Reading(len(devices), witness),
        "platform.memory_bytes": _memory(devices, witness),
        "platform.device_name": _name(devices, witness),
    }
    kinds = {_kind(vendor, device) for device in devices}
    if len(kinds) > 1 or None in kinds:
        note = "the devices differ" if len(kinds) > 1 else "torch does not say"
        return readings | {name: Reading(UNKNOWN, witness, note) for name in NAMES[1:3]}
    arch, capability = next(kind for kind in kinds if kind)
    return readings | {
        "platform.arch": Reading(Arch(arch), witness),
        "platform.capability": Reading(Version(capability), witness),
    }


def _memory(devices: list[Any], witness: str) -> Reading:
    """Of the smallest device, for each has to hold its rank."""
    sizes = [getattr(device, "total_memory", None) for device in devices]
    known = [size for size in sizes if isinstance(size, int)]
    return Reading(min(known), witness) if len(known) == len(sizes) else Reading(UNKNOWN, witness, "torch does not say")


def _name(devices: list[Any], witness: str) -> Reading:
    names = {getattr(device, "name", None) for device in devices}
    name = names.pop() if len(names) == 1 else None
    return Reading(name, witness) if isinstance(name, str) else Reading(UNKNOWN, witness, "the devices differ")


def _kind(vendor: str, device: Any) -> tuple[str, str] | None:
    """Architecture and capability of one device: `("sm90", "9.0")`, `("gfx942", "9.4")`."""
    major, minor = getattr(device, "major", None), getattr(device, "minor", None)
    if major is None or minor is None:
        return None
    capability = f"{major}.{minor}"
    if vendor == "hip":
        # gfx942:sramecc+:xnack- ; the features behind the colon are no other architecture
        arch = getattr(device, "gcnArchName", "").partition(":")[0]
        return (arch, capability) if arch else None
    prefix = {"cuda": "sm", "musa": "mp"}.get(vendor)
    return (f"{prefix}{major}{minor}", capability) if prefix else None


def _without_torch() -> dict[str, Reading]:
    import shutil

    found = sorted({vendor for tool, vendor in TOOLS.items() if shutil.which(tool)})
    if not found:
        return _cpu("no torch, no tool of an accelerator's vendor")
    note = f"torch is not installed, so what this machine has ({', '.join(found)}) was not read"
    return {name: Reading(UNKNOWN, "here", note) for name in NAMES}


def _cpu(witness: str) -> dict[str, Reading]:
    return {
        "platform.vendor": Reading("cpu", witness),
        "platform.device_count": Reading(0, witness),
        "platform.arch": Reading(ABSENT, witness, "a cpu"),
        "platform.capability": Reading(ABSENT, witness, "a cpu"),
        "platform.memory_bytes": Reading(ABSENT, witness, "a cpu"),
        "platform.device_name": Reading(ABSENT, witness, "a cpu"),
    }


def _libraries(catalogue: Catalogue) -> dict[str, Reading]:
    from importlib import metadata  # 10 ms, with email and zipfile

    readings = {}
    for fact in catalogue:
        if not fact.startswith("library."):
            continue
        name = fact.partition(".")[2]
        reading = Reading(ABSENT, "installed packages", f"`{name}` is not installed")
        for distribution in DISTRIBUTIONS.get(fact, (name, name.replace("_", "-"))):
            try:
                text = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            try:
                reading = Reading(Version(text), f"installed package {distribution}")
            except ValueError:
                reading = Reading(UNKNOWN, f"installed package {distribution}", f"`{text}` is not a version")
            break
        readings[fact] = reading
    return readings


def _environment(catalogue: Catalogue) -> dict[str, Reading]:
    names = [fact for fact in catalogue if fact.startswith("env.")]
    values = {fact: os.environ.get(fact.partition(".")[2]) for fact in names}
    return {f: Reading(ABSENT if v is None else v, f"environment: {f.partition('.')[2]}") for f, v in values.items()}
