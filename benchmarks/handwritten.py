"""The gate rules/gates/shared_experts_fusion/deepseek_v3.yaml as somebody would write it in Python by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatekeeper import ABSENT
from gatekeeper.values import shown

FAMILIES = frozenset({"deepseek_v3", "kimi_k2", "kimi_k25"})
NVIDIA = frozenset({"sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"})
AMD = frozenset({"gfx942", "gfx950"})
PLATFORMS = NVIDIA | AMD | {"mp31"}
FIELDS = ("format", "block", "scale_dtype", "width", "input_width")
STORAGES = [(field, f"layer.shared_storage.{field}", f"layer.routed_storage.{field}") for field in FIELDS]


def state(values: Mapping[str, Any]) -> str:
    """Return on, off, pending or error; None stands for unknown."""
    get = values.get
    force, forbid = get("server.enforce_shared_experts_fusion"), get("server.disable_shared_experts_fusion")
    bad = "error" if force is True else "off"
    if forbid is True:
        return bad
    family = get("model.family")
    if family is None:
        return "pending"
    if family not in FAMILIES:
        return bad
    unknown = force is None or forbid is None

    shared = get("model.n_shared_experts")
    if shared is None:
        unknown = True
    elif shared != 1:
        return bad

    same = same_storage(values)
    if same is None:
        unknown = True
    elif not same:
        return bad

    arch = get("platform.arch")
    device = arch if arch is None or arch is ABSENT else arch.text
    slots = get("engine.per_rank_shared_slots")
    ranks = get("parallel.moe_ep_size")
    if (ranks is None or (ranks is not ABSENT and ranks > 1)) and slots is not True and device not in AMD:
        if ranks is None or slots is None or device is None:
            unknown = True
        else:
            return bad

    exchange = get("engine.moe_a2a_backend")
    if exchange is None:
        unknown = True
    elif exchange != "none":
        return bad
    for flag in ("server.enable_eplb", "server.enable_two_batch_overlap", "server.enable_single_batch_overlap"):
        value = get(flag)
        if value is None:
            unknown = True
        elif value is not False:
            return bad
    loads = get("engine.loads_fused_shared")
    if loads is None:
        unknown = True
    elif loads is not True:
        return bad

    method = get("quant.method")
    w4a8 = is_w4a8(method, values)
    if w4a8 is None:
        unknown = True
    elif w4a8:
        return bad

    if force is not True:
        experts = get("model.n_routed_experts")
        if experts is None:
            # Of 384 experts it would matter who quantized them; of any other number not.
            unknown = True
        elif experts == 384:
            if method is None:
                unknown = True
            elif method != "quark":
                return bad
        elif experts != 256:
            return bad
        engine = get("engine.name")
        if device not in PLATFORMS and engine != "moe-loader":
            if device is None or engine is None:
                unknown = True
            else:
                return bad
    return "pending" if unknown else "on"


def same_storage(values: Mapping[str, Any]) -> bool | None:
    """Compare field by field; None while the fields that are known agree and one is not known."""
    get = values.get
    unknown, left_is, right_is = False, False, False
    for _, shared, routed in STORAGES:
        one, other = get(shared), get(routed)
        if one is None or other is None:
            unknown = True
        elif one != other:
            return False
        left_is = left_is or one is not ABSENT
        right_is = right_is or other is not ABSENT
    if not left_is or not right_is:
        return False
    return None if unknown else True


def is_w4a8(method: Any, values: Mapping[str, Any]) -> bool | None:
    """Whether weights of 4-bit integers meet activations in 8 bits."""
    if method in ("w4afp8", "w4a8"):
        return True
    if method is not None and method != "compressed-tensors":
        return False
    kind, bits, activations = (values.get(f"quant.{key}") for key in ("weight_type", "weight_bits", "activation_bits"))
    if kind not in ("int", None) or bits not in (4, None) or activations not in (8, None):
        # A method that is not known may still be one of the two names.
        return None if method is None else False
    return None if method is None or kind is None or bits is None or activations is None else True


def reasons(values: Mapping[str, Any]) -> list[tuple[str, str, str, dict[str, Any] | None]]:
    """Return (id, state, reason, values) of each requirement; the last two for those that did not pass."""
    get = values.get
    found: list[tuple[str, str, str, dict[str, Any] | None]] = []
    force = get("server.enforce_shared_experts_fusion")
    if get("server.disable_shared_experts_fusion") is True or get("model.family") not in FAMILIES:
        return found
    forced = force is True
    append = found.append

    shared = get("model.n_shared_experts")
    if shared == 1:
        append(("one-shared-expert", "passed", "", None))
    else:
        append(
            (
                "one-shared-expert",
                "unknown" if shared is None else "failed",
                f"The router's extra column stands for exactly one shared expert; this model has {show(shared)}.",
                {"model.n_shared_experts": shared},
            )
        )

    same = same_storage(values)
    if same:
        append(("one-storage", "passed", "", None))
    else:
        append(
            (
                "one-storage",
                "unknown" if same is None else "failed",
                f"One tensor holds both, so both need one storage: {difference(values)}.",
                {name: get(name) for _, *pair in STORAGES for name in pair},
            )
        )

    arch = get("platform.arch")
    device = arch if arch is None or arch is ABSENT else arch.text
    slots = get("engine.per_rank_shared_slots")
    ranks = get("parallel.moe_ep_size")
    if ranks is not None and (ranks is ABSENT or ranks <= 1):
        append(("shared-slot-on-each-rank", "not_applicable", "", None))
    elif slots is True or device in AMD:
        append(("shared-slot-on-each-rank", "passed", "", None))
    else:
        append(
            (
                "shared-slot-on-each-rank",
                "unknown" if ranks is None or slots is None or device is None else "failed",
                (
                    f"Experts are spread over {show(ranks)} ranks, so each rank needs a slot of its own for the shared"
                    f" expert, and on {show(arch)} it has none."
                ),
                {"engine.per_rank_shared_slots": slots, "parallel.moe_ep_size": ranks, "platform.arch": arch},
            )
        )

    exchange = get("engine.moe_a2a_backend")
    if exchange == "none":
        append(("no-all-to-all", "passed", "", None))
    else:
        append(
            (
                "no-all-to-all",
                "unknown" if exchange is None else "failed",
                (
                    f"The {show(exchange)} all-to-all sends a token to the rank that owns its expert; a fused slot has"
                    " no such rank."
                ),
                {"engine.moe_a2a_backend": exchange},
            )
        )

    eplb = get("server.enable_eplb")
    if eplb is False:
        append(("no-expert-balancing", "passed", "", None))
    else:
        append(
            (
                "no-expert-balancing",
                "unknown" if eplb is None else "failed",
                "EPLB moves and copies experts by their number; the fused slot is not one that it knows.",
                {"server.enable_eplb": eplb},
            )
        )

    two, single = get("server.enable_two_batch_overlap"), get("server.enable_single_batch_overlap")
    if two is False and single is False:
        append(("no-overlap", "passed", "", None))
    else:
        failed = two not in (False, None) or single not in (False, None)
        append(
            (
                "no-overlap",
                "failed" if failed else "unknown",
                (
                    f"Two-batch overlap ({show(two)}) and single-batch overlap ({show(single)}) run the shared expert"
                    " beside the routed ones; fused, they deadlock."
                ),
                {"server.enable_single_batch_overlap": single, "server.enable_two_batch_overlap": two},
            )
        )

    loads, engine = get("engine.loads_fused_shared"), get("engine.name")
    if loads is True:
        append(("loader-remaps-shared", "passed", "", None))
    else:
        append(
            (
                "loader-remaps-shared",
                "unknown" if loads is None else "failed",
                (
                    f"The loader of {show(engine)} does not put this model's shared expert into a slot, which would"
                    " stay uninitialised."
                ),
                {"engine.loads_fused_shared": loads},
            )
        )

    method = get("quant.method")
    w4a8 = is_w4a8(method, values)
    if w4a8 is False:
        append(("no-w4afp8", "passed", "", None))
    else:
        append(
            (
                "no-w4afp8",
                "unknown" if w4a8 is None else "failed",
                f"Kernels for 4-bit integer weights with 8-bit activations ({show(method)}) take routed experts only.",
                {
                    "quant.activation_bits": get("quant.activation_bits"),
                    "quant.method": method,
                    "quant.weight_bits": get("quant.weight_bits"),
                    "quant.weight_type": get("quant.weight_type"),
                },
            )
        )

    experts = get("model.n_routed_experts")
    if experts in (256, 384):
        append(("known-expert-count", "passed", "", None))
    else:
        append(
            (
                "known-expert-count",
                "waived" if forced else "unknown" if experts is None else "failed",
                f"Fusion is validated with 256 and 384 routed experts, not with {show(experts)}.",
                {"model.n_routed_experts": experts},
            )
        )

    if experts is not None and experts != 384:
        append(("quark-at-384", "not_applicable", "", None))
    elif method == "quark":
        append(("quark-at-384", "passed", "", None))
    else:
        append(
            (
                "quark-at-384",
                "waived" if forced else "unknown" if experts is None or method is None else "failed",
                "With 384 experts fusion is validated on Quark checkpoints only; this one is " + show(method) + ".",
                {"model.n_routed_experts": experts, "quant.method": method},
            )
        )

    if device in PLATFORMS or engine == "moe-loader":
        append(("fusing-platform-or-musa", "passed", "", None))
    else:
        append(
            (
                "fusing-platform-or-musa",
                "waived" if forced else "unknown" if device is None or engine is None else "failed",
                (
                    "Fused kernels are in use on NVIDIA sm80 to sm103, sm120 and sm121, on AMD gfx942 and gfx950 and on"
                    f" Moore Threads mp31, not on {show(get('platform.vendor'))} {show(arch)}."
                ),
                {"engine.name": engine, "platform.arch": arch},
            )
        )
    return found


def difference(values: Mapping[str, Any]) -> str:
    """Say which fields of the two storages differ or are not known to agree."""
    get = values.get
    pairs = [(field, get(shared), get(routed)) for field, shared, routed in STORAGES]
    if all(one is ABSENT for _, one, _ in pairs):
        return "there is no layer.shared_storage"
    if all(other is ABSENT for _, _, other in pairs):
        return "there is no layer.routed_storage"
    differing = [pair for pair in pairs if pair[1] is None or pair[1] != pair[2]]
    return "; ".join(f"{field} {show(one)}, not {show(other)}" for field, one, other in differing)


def show(value: Any) -> str:
    """Return a value as a sentence shows it."""
    return "unknown" if value is None else shown(value)
