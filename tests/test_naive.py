"""The naive interpreter on cases worked out by hand from the design, and the promise on it alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.naive import naive_decide
from tests.promise import assert_kept
from tests.strategies import hide, records, rule_sets

STORAGE_FIELDS = {"format": {"type": "string"}, "width": {"type": "integer"}, "block": {"type": "integer"}}
STORAGE = {"type": "record", "fields": STORAGE_FIELDS}
FORCE, FORBID = "server.enforce_shared_experts_fusion", "server.disable_shared_experts_fusion"

FACTS: dict[str, Any] = {
    "model.family": {"type": "string"},
    "model.n_routed_experts": {"type": "integer"},
    "model.n_shared_experts": {"type": "integer"},
    "model.moe_intermediate_size": {"type": "integer"},
    "quant.method": {"type": "string", "default": "none"},
    "quant.ignored_modules": {"type": "list", "items": "string"},
    FORCE: {"type": "boolean", "default": False},
    FORBID: {"type": "boolean", "default": False},
    "server.overlap": {"type": "boolean", "default": False},
    "server.backend": {"type": "enum", "values": ["auto", "a", "b"], "default": "auto"},
    "engine.backend": {"type": "enum", "values": ["auto", "a", "b"]},
    "server.block": {"type": "string", "default": "auto"},
    "parallel.tp_size": {"type": "integer"},
    "parallel.ep_size": {"type": "integer", "default": 1},
    "library.triton": {"type": "version"},
    "moe.shard_width": {"type": "integer", "derive": "model.moe_intermediate_size / parallel.tp_size"},
    "layer.index": {"type": "integer"},
    "layer.role": {"type": "string"},
    "layer.routed_storage": STORAGE,
    "layer.shared_storage": STORAGE,
}

# The gate of the design: shared-experts fusion for DeepSeek V3 and Kimi.
KIMI: dict[str, Any] = {
    "manifest": {"name": "kimi", "version": "1", "language": 1},
    "facts": FACTS,
    "features": {
        "fusion": {
            "feature": "fusion",
            "scope": "layer",
            "request": {"force": FORCE, "forbid": FORBID},
            "outputs": {"slots": {"type": "integer", "value": {"fact": "model.n_shared_experts"}, "else": 0}},
        }
    },
    "gates": [
        {
            "feature": "fusion",
            "gate": "deepseek_v3",
            "applies_to": {"model.family": ["deepseek_v3", "kimi_k2", "kimi_k25"]},
            "requires": [
                {"use": "one-storage"},
                {"use": "no-overlap"},
                {
                    "id": "known-expert-count",
                    "protects": "support",
                    "that": {"model.n_routed_experts": [256, 384]},
                },
                {
                    "id": "quark-at-384",
                    "protects": "support",
                    "when": {"model.n_routed_experts": 384},
                    "that": {"quant.method": "quark"},
                },
            ],
        }
    ],
    "requirements": {
        "one-storage": {
            "protects": "correctness",
            "that": {"layer.shared_storage": {"fact": "layer.routed_storage"}},
        },
        "no-overlap": {"protects": "correctness", "that": {"server.overlap": False}},
    },
    "conditions": {},
}

MXFP4 = {"format": "mxfp4", "width": 2048, "block": 32}
BF16 = {"format": "bf16", "width": 2048, "block": None}
QUARK_FACTS = {
    "model.family": "kimi_k25",
    "model.n_routed_experts": 384,
    "model.n_shared_experts": 1,
    "quant.method": "quark",
}


def layer(index: int, routed: Any = MXFP4, shared: Any = MXFP4, **more: Any) -> dict[str, Any]:
    facts = {"layer.index": index, "layer.routed_storage": routed, "layer.shared_storage": shared}
    return facts | {f"layer.{name}": value for name, value in more.items()}


def quark(layers: Any = None, drop: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """The Quark checkpoint of Kimi-K2.5, its flags not set; `changes` spell a dot as two underscores."""
    facts = {**QUARK_FACTS, **{name.replace("__", "."): value for name, value in changes.items()}}
    facts = {name: value for name, value in facts.items() if name not in drop}
    record = {"runner": "target", "facts": facts, "assume": ["server"], "unknown": list(drop)}
    return record | ({} if layers == "unknown" else {"layers": [layer(3), layer(4)] if layers is None else layers})


def decide_one(rules: Any, record: Any) -> dict[str, Any]:
    (decision,) = naive_decide(rules, record)
    return decision


def brief(decision: dict[str, Any]) -> tuple[str, str | None]:
    return decision["state"], decision["decided_by"]


def states(decision: dict[str, Any]) -> dict[str, str]:
    return {outcome["id"]: outcome["state"] for outcome in decision["outcomes"]}


FORCED = {FORCE.replace(".", "__"): True}
FORBIDDEN = {FORBID.replace(".", "__"): True}

KIMI_CASES = {
    "the Quark checkpoint is fused": (quark(), "on", None),
    "the standard one keeps its shared experts in bf16": (
        quark([layer(3, shared=BF16)], quant__method="compressed-tensors"),
        "off",
        "one-storage",
    ),
    "support alone: 384 experts without Quark": (quark(quant__method="fp8"), "off", "quark-at-384"),
    "256 experts need no Quark": (quark(model__n_routed_experts=256, quant__method="fp8"), "on", None),
    "160 experts are not known": (quark(model__n_routed_experts=160, quant__method="fp8"), "off", "known-expert-count"),
    "absent is not known to be one of them": (quark(model__n_routed_experts=None), "off", "known-expert-count"),
    "line 1: forbidden": (quark(**FORBIDDEN), "off", "request"),
    "line 1: forbidden and forced": (quark(**FORBIDDEN, **FORCED), "error", "request"),
    "line 2: no gate": (quark(model__family="mixtral"), "off", "no-gate"),
    "line 2: no gate, forced": (quark(model__family="mixtral", **FORCED), "error", "no-gate"),
    "line 2: no gate for an absent family": (quark(model__family=None), "off", "no-gate"),
    "line 2: unknown family": (quark(drop=("model.family",)), "pending", "no-gate"),
    "line 2: unknown family, forced": (quark(drop=("model.family",), **FORCED), "pending", "no-gate"),
    "line 3: correctness failed while forced": (quark([layer(3, shared=BF16)], **FORCED), "error", "one-storage"),
    "a request waives support": (quark(quant__method="fp8", **FORCED), "on", None),
    "a request waives unknown support": (quark(drop=("model.n_routed_experts",), **FORCED), "on", None),
    "line 4: correctness is named first": (
        quark(quant__method="fp8", server__overlap=True),
        "off",
        "no-overlap",
    ),
    "line 5: unknown expert count": (quark(drop=("model.n_routed_experts",)), "pending", "known-expert-count"),
    "line 5: unknown correctness is not waived": (
        quark([{"layer.index": 3, "layer.shared_storage": MXFP4}], **FORCED),
        "pending",
        "one-storage",
    ),
    "failed beats unknown": (
        quark(drop=("model.n_routed_experts",), server__overlap=True),
        "off",
        "no-overlap",
    ),
    "line 7: unknown output": (quark(drop=("model.n_shared_experts",)), "pending", "output-slots"),
    "line 7: absent output": (quark(model__n_shared_experts=None), "off", "output-slots"),
    "line 7: absent output, forced": (quark(model__n_shared_experts=None, **FORCED), "error", "output-slots"),
    "unknown force: on is pending": (quark(drop=(FORCE,)), "pending", "request"),
    "unknown force: off stays": (quark(drop=(FORCE,), quant__method="fp8"), "off", "quark-at-384"),
    "unknown forbid: on is pending": (quark(drop=(FORBID,)), "pending", "request"),
    "unknown forbid, forced: judged as forced": (
        quark([layer(3, shared=BF16)], drop=(FORBID,), **FORCED),
        "error",
        "one-storage",
    ),
    "no MoE layer": (quark([]), "off", "layers"),
    "no MoE layer, forced": (quark([], **FORCED), "error", "layers"),
    "no MoE layer, forbidden": (quark([], **FORBIDDEN), "off", "request"),
    "no MoE layer comes before the gate": (quark([], drop=("model.family",)), "off", "layers"),
    "layers of the other runner do not count": (quark([layer(61, role="mtp")]), "off", "layers"),
    "unknown list: never on": (quark("unknown"), "pending", "one-storage"),
    "unknown list: off if something fails": (quark("unknown", server__overlap=True), "off", "no-overlap"),
    "a layer without shared experts: absent": (quark([layer(3, shared=None)]), "off", "one-storage"),
    "mixed": (quark([layer(3), layer(4, shared=BF16)]), "mixed", "one-storage"),
    "mixed with a pending layer": (quark([layer(3), {"layer.index": 4}]), "mixed", "one-storage"),
    "any error is an error": (quark([layer(3), layer(4, shared=BF16)], **FORCED), "error", "one-storage"),
}


@pytest.mark.parametrize("name", KIMI_CASES)
def test_kimi(name: str) -> None:
    record, state, decided_by = KIMI_CASES[name]

    assert brief(decide_one(KIMI, record)) == (state, decided_by)


def test_on_has_its_outputs_and_every_outcome() -> None:
    decision = decide_one(KIMI, quark())

    assert decision["outputs"] == {"slots": 1}
    assert decision["gate"] == "deepseek_v3"
    assert decision["outcomes"] == [
        {"id": "one-storage", "state": "passed", "resolves_at": None},
        {"id": "no-overlap", "state": "passed", "resolves_at": None},
        {"id": "known-expert-count", "state": "passed", "resolves_at": None},
        {"id": "quark-at-384", "state": "passed", "resolves_at": None},
    ]
    assert [(each["index"], each["role"], each["state"]) for each in decision["layers"]] == [
        (3, "main", "on"),
        (4, "main", "on"),
    ]


def test_anything_but_on_has_the_outputs_of_else() -> None:
    for record in (quark(**FORBIDDEN), quark(drop=("model.family",)), quark([layer(3, shared=BF16)], **FORCED)):
        assert decide_one(KIMI, record)["outputs"] == {"slots": 0}


def test_every_requirement_is_reported_whichever_failed() -> None:
    decision = decide_one(KIMI, quark([layer(3, shared=BF16)], model__n_routed_experts=160))

    assert states(decision) == {
        "one-storage": "failed",
        "no-overlap": "passed",
        "known-expert-count": "failed",
        "quark-at-384": "not_applicable",
    }


def test_waived_is_reported_as_waived() -> None:
    decision = decide_one(KIMI, quark(quant__method="fp8", **FORCED))

    assert states(decision)["quark-at-384"] == "waived"
    assert (decision["request"], decision["requested"]) == ("on", True)


def test_a_mixed_feature_gives_outputs_by_layer_only() -> None:
    decision = decide_one(KIMI, quark([layer(3), layer(4, shared=BF16)]))

    assert (decision["option"], decision["outputs"]) == (None, {})
    assert [each["outputs"] for each in decision["layers"]] == [{"slots": 1}, {"slots": 0}]


def test_every_layer_of_a_forbidden_feature_is_off() -> None:
    decision = decide_one(KIMI, quark(**FORBIDDEN))

    assert [(each["state"], each["decided_by"]) for each in decision["layers"]] == [("off", "request")] * 2


def test_the_draft_runner_loads_the_mtp_layers() -> None:
    record = quark([layer(3), layer(61, shared=BF16, role="mtp")]) | {"runner": "draft"}

    decision = decide_one(KIMI, record)

    assert [each["index"] for each in decision["layers"]] == [61]
    assert brief(decision) == ("off", "one-storage")


# ------------------------------------------------------------------------------------------- gates with other lines


def small(requires: Any, **more: Any) -> dict[str, Any]:
    """A rule set of one feature, its gate in the same file."""
    body = {"feature": "small", "request": {"force": FORCE, "forbid": FORBID}, "requires": requires, **more}
    return {"facts": FACTS, "features": {"small": body}, "gates": [], "requirements": {}, "conditions": {}}


def need(name: str, that: Any, protects: str = "correctness", **more: Any) -> dict[str, Any]:
    return {"id": name, "protects": protects, "that": that, **more}


def with_gate(rules: Any, **gate: Any) -> dict[str, Any]:
    """The same with its gate in a file of its own."""
    changed = copy.deepcopy(rules)
    body = changed["features"]["small"]
    moved = {key: body.pop(key) for key in ("requires", "options", "on_failure") if key in body}
    return changed | {"gates": [{"feature": "small", **moved, **gate}]}


COUNT = need("count", {"model.n_routed_experts": 256}, on_failure="error")
OVERLAP = need("overlap", {"server.overlap": False})
COUNT_IS_SUPPORT = {**COUNT, "protects": "support"}


@pytest.mark.parametrize(
    ("requires", "changes", "drop", "expected"),
    [
        pytest.param([COUNT], {}, (), ("error", "count"), id="every failed one says error"),
        pytest.param([COUNT, OVERLAP], {"server__overlap": True}, (), ("off", "count"), id="one says off"),
        pytest.param([COUNT, OVERLAP], {}, ("server.overlap",), ("pending", "overlap"), id="one is unknown: line 5"),
        pytest.param([COUNT_IS_SUPPORT], {}, (FORCE,), ("pending", "request"), id="a possible request would waive it"),
        pytest.param([COUNT], {}, (FORCE,), ("error", "count"), id="no request would waive correctness"),
        pytest.param([COUNT_IS_SUPPORT], {}, (FORBID,), ("error", "count"), id="an unknown forbid waives nothing"),
    ],
)
def test_line_4(requires: Any, changes: Any, drop: Any, expected: Any) -> None:
    assert brief(decide_one(small(requires), quark(drop=drop, **changes))) == expected


def test_requests_that_a_gate_ignores_or_requires() -> None:
    rules = small([need("quark", {"quant.method": "fp8"}, "support")])
    ignored, required = with_gate(rules, request="ignored"), with_gate(rules, request="required")
    fits = {"quant__method": "fp8"}

    assert brief(decide_one(ignored, quark(**FORCED))) == ("off", "quark")
    assert brief(decide_one(ignored, quark(**FORBIDDEN, **fits))) == ("off", "request")
    assert brief(decide_one(ignored, quark(**FORBIDDEN, **FORCED))) == ("off", "request")
    assert brief(decide_one(ignored, quark(drop=(FORCE,), **fits))) == ("on", None)
    assert brief(decide_one(ignored, quark(drop=(FORBID,), **fits))) == ("pending", "request")
    assert brief(decide_one(required, quark(**fits))) == ("off", "request")
    assert brief(decide_one(required, quark(**FORCED))) == ("on", None)
    assert brief(decide_one(required, quark(drop=(FORCE,), **fits))) == ("pending", "request")
    assert brief(decide_one(required, quark(drop=(FORCE,)))) == ("off", "quark")
    assert brief(decide_one(with_gate(small([COUNT]), request="required"), quark(drop=(FORCE,)))) == (
        "pending",
        "request",
    )


BLOCK: dict[str, Any] = {
    "facts": FACTS,
    "features": {
        "block_n": {
            "feature": "block_n",
            "request": "server.block",
            "outputs": {"block_n": {"type": "integer", "else": None}},
            "on_failure": "error",
            "requires": [need("fp8", {"quant.method": "fp8"}, "support")],
            "options": [
                {
                    "option": "block-128",
                    "outputs": {"block_n": 128},
                    "requires": [
                        need("shard-of-128", {"moe.shard_width": {"divisible_by": 128}}),
                        need("not-a", {"engine.backend": {"ne": "a"}}, "speed"),
                    ],
                },
                {
                    "option": "block-64",
                    "outputs": {"block_n": 64},
                    "requires": [need("shard-of-64", {"moe.shard_width": {"divisible_by": 64}})],
                },
            ],
        }
    },
    "gates": [],
    "requirements": {},
    "conditions": {},
}


def block(size: int | None = 2048, tp: int | None = 8, backend: str | None = "b", **more: Any) -> dict[str, Any]:
    facts = {"quant.method": "fp8", "model.moe_intermediate_size": size, "parallel.tp_size": tp}
    facts |= {"engine.backend": backend, **{key.replace("__", "."): value for key, value in more.items()}}
    unset = ["server.block"] if facts.get("server.block", "auto") is None else []
    facts = {name: value for name, value in facts.items() if value is not None}
    return {"runner": "target", "facts": facts, "assume": ["server"], "unknown": unset}


@pytest.mark.parametrize(
    ("record", "state", "option", "would_be", "decided_by"),
    [
        pytest.param(block(), "on", "block-128", None, None, id="the first that passes"),
        pytest.param(block(512), "on", "block-64", None, None, id="the second where the first fails"),
        pytest.param(block(256), "error", None, None, "shard-of-128", id="none left: the gate's on_failure"),
        pytest.param(block(1028), "error", None, None, "shard-of-128", id="128.5 a rank is absent"),
        pytest.param(block(backend=None), "pending", None, "block-64", "not-a", id="one before it is unknown"),
        pytest.param(block(None), "pending", None, None, "shard-of-128", id="nothing passes yet"),
        pytest.param(block(512, backend=None), "on", "block-64", None, None, id="failed whatever is unknown beside"),
        pytest.param(block(quant__method="none"), "off", None, None, "fp8", id="the gate's own hold for every option"),
        pytest.param(block(backend="a"), "on", "block-64", None, None, id="speed of an option counts in auto"),
        pytest.param(
            block(backend="a", server__block="on"), "on", "block-64", None, None, id="on does not waive an option's own"
        ),
        pytest.param(
            block(backend="a", server__block="block-128"), "on", "block-128", None, None, id="its name waives its speed"
        ),
        pytest.param(
            block(server__block="block-64"), "on", "block-64", None, None, id="asked for by name, though another passes"
        ),
        pytest.param(
            block(512, server__block="block-128"), "error", None, None, "shard-of-128", id="asked for, impossible"
        ),
        pytest.param(
            block(None, server__block="block-64"), "pending", None, None, "shard-of-64", id="asked for, unknown"
        ),
        pytest.param(
            block(quant__method="none", server__block="on"), "on", "block-128", None, None, id="on waives the gate's"
        ),
        pytest.param(block(server__block="off"), "off", None, None, "request", id="off"),
        pytest.param(block(server__block=None), "pending", None, "block-128", "request", id="an unknown request"),
        pytest.param(
            block(256, server__block=None), "error", None, None, "shard-of-128", id="no request makes it possible"
        ),
    ],
)
def test_choice(record: Any, state: str, option: Any, would_be: Any, decided_by: Any) -> None:
    decision = decide_one(BLOCK, record)

    assert (decision["state"], decision["option"], decision["would_be"]) == (state, option, would_be)
    assert decision["decided_by"] == decided_by
    assert decision["outputs"] == {"block_n": int(option.removeprefix("block-")) if option else None}


def test_a_gate_and_an_option_give_outputs_of_their_own() -> None:
    rules = small([])
    rules["features"]["small"]["outputs"] = {name: {"type": "integer", "value": 1, "else": 0} for name in "abc"}
    option = {"option": "only", "outputs": {"c": 3}}

    decision = decide_one(with_gate(rules, outputs={"b": 2, "c": 2}, options=[option]), quark())

    assert decision["outputs"] == {"a": 1, "b": 2, "c": 3}


def test_a_group_nests_requirements_under_one_when() -> None:
    inside = [need("tp", {"parallel.tp_size": 8}), need("ep", {"parallel.ep_size": 1}, when={"quant.method": "fp8"})]
    rules = small([{"when": {"model.n_routed_experts": 384}, "requires": inside}])

    assert states(decide_one(rules, quark(parallel__tp_size=4))) == {"tp": "failed", "ep": "not_applicable"}
    assert states(decide_one(rules, quark(model__n_routed_experts=256))) == {
        "tp": "not_applicable",
        "ep": "not_applicable",
    }
    assert states(decide_one(rules, quark(quant__method="fp8"))) == {"tp": "unknown", "ep": "unknown"}


def test_use_overrides_when_protects_and_on_failure() -> None:
    rules = small([{"use": "shared", "when": {"quant.method": "quark"}, "protects": "speed", "on_failure": "error"}])
    rules["requirements"] = {"shared": {"protects": "correctness", "that": {"model.n_routed_experts": 256}}}

    assert brief(decide_one(rules, quark())) == ("error", "shared")
    assert brief(decide_one(rules, quark(**FORCED))) == ("on", None)
    assert brief(decide_one(rules, quark(quant__method="fp8"))) == ("on", None)


def test_pending_names_correctness_first_then_what_surely_applies() -> None:
    unknown = {"parallel.tp_size": 8}
    maybe = need("maybe", {"model.n_routed_experts": 1}, when=unknown)
    support, surely = need("support", unknown, "support"), need("surely", unknown)

    assert brief(decide_one(small([support, maybe, surely]), quark())) == ("pending", "surely")
    assert brief(decide_one(small([support, maybe]), quark())) == ("pending", "maybe")


# ------------------------------------------------------------------------------------------------------- conditions

SEES: dict[str, Any] = {
    "facts": {
        "model.known": 10,
        "model.absent": None,
        "model.text": "layers.3.mlp",
        "model.flag": True,
        "model.items": ["a", "b"],
        "model.none": [],
        "library.x": "2.10.0+cpu",
        "model.left": {"format": "bf16", "width": 1, "block": None},
        "model.same": {"format": "bf16", "width": 1, "block": None},
        "model.blocked": {"format": "bf16", "width": 1, "block": 32},
        "model.part": {"format": "bf16", "width": 1},
        "model.differs": {"width": 2},
        "model.gone": None,
        "model.by_name.width": 2,
    },
}
SEEN_TYPES = {
    **{f"model.{name}": {"type": "integer"} for name in ("known", "absent", "unknown")},
    **{f"model.{name}": {"type": "string"} for name in ("text", "unread_text")},
    "model.flag": {"type": "boolean"},
    **{f"model.{name}": {"type": "list", "items": "string"} for name in ("items", "none", "unread")},
    "library.x": {"type": "version"},
    **{
        f"model.{name}": STORAGE for name in ("left", "same", "blocked", "part", "differs", "gone", "unseen", "by_name")
    },
}
KNOWN, ABSENT, UNKNOWN = "model.known", "model.absent", "model.unknown"
T, F, U = "passed", "failed", "unknown"


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        # the table
        ({KNOWN: 10}, T),
        ({KNOWN: 11}, F),
        ({KNOWN: {"absent": True}}, F),
        ({KNOWN: {"absent": False}}, T),
        ({ABSENT: 10}, F),
        ({ABSENT: {"lt": 10}}, F),
        ({ABSENT: {"absent": True}}, T),
        ({ABSENT: {"absent": False}}, F),
        ({UNKNOWN: 10}, U),
        ({UNKNOWN: {"absent": True}}, U),
        ({UNKNOWN: {"absent": False}}, U),
        # `ne` and `not_in` are exactly `not`
        ({ABSENT: {"ne": 10}}, T),
        ({ABSENT: {"not_in": [10]}}, T),
        ({ABSENT: {"ne": 10, "absent": False}}, F),
        ({UNKNOWN: {"ne": 10}}, U),
        ({KNOWN: {"not_in": [1, 10]}}, F),
        # the other operators
        ({KNOWN: {"ge": 10, "lt": 11}}, T),
        ({KNOWN: {"gt": 10}}, F),
        ({KNOWN: {"le": 9}}, F),
        ({KNOWN: 10.0}, T),
        ({KNOWN: {"divisible_by": 5}}, T),
        ({KNOWN: {"divisible_by": 0}}, F),
        ({"model.flag": True}, T),
        ({"model.text": {"matches": "layers.*.mlp"}}, T),
        ({"model.text": {"matches": "layers.*"}}, F),
        ({"model.text": {"matches": "layers.**"}}, T),
        ({"model.items": {"contains": "a"}}, T),
        ({"model.items": {"any_item": ["b", "c"]}}, T),
        ({"model.items": {"every_item": {"ne": "c"}}}, T),
        ({"model.items": {"any_item": {"eq": {"fact": "model.text"}}}}, F),
        ({"model.items": {"any_item": {"eq": {"fact": "model.unread_text"}}}}, U),
        ({"model.none": {"every_item": "a"}}, T),
        ({"model.none": {"any_item": "a"}}, F),
        ({"model.unread": {"every_item": "a"}}, U),
        ({"library.x": "2.10"}, T),
        ({"library.x": {"gt": "2.9"}}, T),
        ({"library.x": {"in": ["2.1", "2.11.0.dev1"]}}, F),
        # Kleene
        ({"all": [{UNKNOWN: 1}, {KNOWN: 1}]}, F),
        ({"all": [{UNKNOWN: 1}, {KNOWN: 10}]}, U),
        ({"any": [{UNKNOWN: 1}, {KNOWN: 10}]}, T),
        ({"any": [{UNKNOWN: 1}, {KNOWN: 1}]}, U),
        ({"not": {UNKNOWN: 1}}, U),
        ({"not": {ABSENT: 1}}, T),
        ({UNKNOWN: 1, KNOWN: 1}, F),
        ({"use": ["ten", "there"]}, T),
        # the right side another fact
        ({KNOWN: {"fact": ABSENT}}, F),
        ({UNKNOWN: {"fact": ABSENT}}, F),
        ({ABSENT: {"fact": UNKNOWN}}, F),
        ({KNOWN: {"fact": UNKNOWN}}, U),
        ({KNOWN: {"ge": {"fact": KNOWN}}}, T),
        ({KNOWN: {"ne": {"fact": ABSENT}}}, T),
        # records
        ({"model.left": {"fact": "model.same"}}, T),
        ({"model.left": {"fact": "model.blocked"}}, F),
        ({"model.left": {"fact": "model.part"}}, U),
        ({"model.blocked": {"fact": "model.part"}}, U),
        ({"model.left": {"fact": "model.differs"}}, F),
        ({"model.left": {"fact": "model.by_name"}}, F),
        ({"model.left": {"fact": "model.gone"}}, F),
        ({"model.gone": {"fact": "model.unseen"}}, F),
        ({"model.left": {"fact": "model.unseen"}}, U),
        ({"model.left": {"ne": {"fact": "model.gone"}}}, T),
        ({"model.left.width": 1}, T),
        ({"model.gone.width": {"absent": True}}, T),
        ({"model.unseen.width": 1}, U),
        ({"model.part.block": {"absent": True}}, U),
        # layers: none are listed as meeting it, or the list is unknown
        ({"any_layer": {"that": {KNOWN: 10}}}, U),
    ],
)
def test_condition(condition: Any, expected: str) -> None:
    rules = small([need("it", condition)])
    rules["features"]["small"].pop("request")
    rules |= {"facts": SEEN_TYPES, "conditions": {"ten": {"that": {KNOWN: 10}}, "there": {"that": {"use": "ten"}}}}

    assert states(decide_one(rules, SEES)) == {"it": expected}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"every_layer": {"that": {"layer.index": {"ge": 3}}}}, T),
        ({"every_layer": {"where": {"layer.index": 3}, "that": {"layer.shared_storage": {"absent": False}}}}, T),
        ({"every_layer": {"where": {"layer.index": 9}, "that": {"layer.index": 9}}}, F),
        ({"every_layer": {"that": {"layer.shared_storage.format": "mxfp4"}}}, U),
        ({"every_layer": {"that": {"layer.index": 3}}}, F),
        ({"any_layer": {"that": {"layer.index": 4}}}, T),
        ({"any_layer": {"where": {"layer.index": 4}, "that": {"layer.shared_storage.format": "bf16"}}}, U),
        ({"any_layer": {"that": {"layer.index": 61}}}, F),
    ],
)
def test_layers_condition(condition: Any, expected: str) -> None:
    record = quark([layer(3), {"layer.index": 4}, layer(61, role="mtp")])

    assert states(decide_one(small([need("it", condition)]), record)) == {"it": expected}


# ------------------------------------------------------------------------------------------------------------ facts


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("model.six / 4", None),
        ("model.six / 3", 2),
        ("model.six // 4", 1),
        ("model.six / 0", None),
        ("model.absent + 1", None),
        ("model.absent + model.unknown", None),
        ("model.unknown + 1", "unknown"),
        ("model.unknown / 0", "unknown"),
        ("max(model.six, 7) - min(2, model.six)", 5),
        ("len(model.items)", 2),
        ("coalesce(model.absent, model.six, model.unknown)", 6),
        ("coalesce(model.absent, model.unknown, model.six)", "unknown"),
        ("1 if present(model.absent) else 2", 2),
        ("1 if model.unknown == 3 else 2", "unknown"),
        ("1 if model.unknown == 3 else 1", 1),
        ("model.absent if model.unknown else model.absent", None),
        ("1 if model.absent else 2", 2),
        ("1 if model.absent != 3 else 2", 1),
        ("1 if model.unknown == 3 and model.absent else 2", 2),
        ("1 if model.unknown == 3 or not model.absent else 2", 1),
        ("1 if 5 < model.six <= 6 else 2", 1),
        ("1 if model.runner == 'target' else 2", 1),
    ],
)
def test_derive(expression: str, expected: Any) -> None:
    facts = {name: {"type": "integer"} for name in ("model.six", "model.absent", "model.unknown")}
    facts["model.items"] = {"type": "list", "items": "string"}
    facts["model.derived"] = {"type": "integer", "derive": expression}
    rules = small([]) | {"facts": facts}
    rules["features"]["small"] |= {"request": None, "outputs": {"it": {"value": {"fact": "model.derived"}}}}
    record = {"facts": {"model.six": 6, "model.absent": None, "model.items": ["a", "b"]}}

    decision = decide_one(rules, record)

    if expected == "unknown":
        assert brief(decision) == ("pending", "output-it")
    elif expected is None:
        assert brief(decision) == ("off", "output-it")
    else:
        assert decision["outputs"] == {"it": expected}


@pytest.mark.parametrize(
    ("name", "given", "assume", "expected"),
    [
        pytest.param("quant.method", {}, [], "unknown", id="not named: unknown, whatever its default"),
        pytest.param("quant.method", {"quant.method": None}, [], "none", id="null: the default"),
        pytest.param("quant.method", {}, ["quant"], "none", id="assumed: the default"),
        pytest.param("model.n_routed_experts", {}, ["model"], None, id="assumed: absent"),
        pytest.param("parallel.tp_size", {"parallel.tp_size": None}, [], "unknown", id="a flag that is not set"),
        pytest.param("parallel.ep_size", {}, ["parallel"], 1, id="a flag with a default"),
        pytest.param("engine.backend", {"server.backend": "a"}, ["engine"], "a", id="what the operator typed"),
        pytest.param("engine.backend", {}, ["engine", "server"], "unknown", id="auto is not resolved"),
        pytest.param("engine.backend", {"server.backend": "a"}, [], "unknown", id="an engine that was not asked"),
        pytest.param("library.triton", {"library.triton": "2.10"}, [], "2.10", id="a version is shown as written"),
    ],
)
def test_missing_and_null(name: str, given: Any, assume: Any, expected: Any) -> None:
    rules = small([], outputs={"it": {"value": {"fact": name}}})
    rules["features"]["small"].pop("request")

    decision = decide_one(rules, {"facts": given, "assume": assume})

    if expected == "unknown":
        assert brief(decision) == ("pending", "output-it")
    elif expected is None:
        assert brief(decision) == ("off", "output-it")
    else:
        assert decision["outputs"] == {"it": expected}


# ------------------------------------------------------------------------------------- features that ask for features

FUSION = KIMI["features"]["fusion"]


def with_reader(that: Any, fusion: Any = None, gate: Any = None, **more: Any) -> dict[str, Any]:
    """The gate of the design, and a feature that asks what it came to."""
    reader = {"feature": "reader", "requires": [need("asks", that)], **more}
    gates = [{**KIMI["gates"][0], **(gate or {})}]
    return {**KIMI, "features": {"reader": reader, "fusion": {**FUSION, **(fusion or {})}}, "gates": gates}


def asks(rules: Any, record: Any) -> tuple[str, str]:
    """What the fusion and the reader's requirement came to."""
    fusion, reader = naive_decide(rules, record)
    return fusion["state"], states(reader)["asks"]


IS_ON, IS_OFF = {"feature.fusion.state": "on"}, {"feature.fusion.state": "off"}
UNKNOWN_LIST, ONE_BF16 = quark("unknown"), quark([layer(3), layer(4, shared=BF16)])
COUNT_ERROR = {"requires": [need("count", {"model.n_routed_experts": 256}, on_failure="error")]}
SHADOW = {"mode": "shadow"}


@pytest.mark.parametrize(
    ("rules", "record", "expected"),
    [
        pytest.param(with_reader(IS_ON), quark(), ("on", "passed"), id="on"),
        pytest.param(with_reader({"feature.fusion.outputs.slots": 1}), quark(), ("on", "passed"), id="an output"),
        pytest.param(
            with_reader({"feature.fusion.option": {"absent": True}}), quark(), ("on", "passed"), id="no option"
        ),
        pytest.param(with_reader(IS_OFF), quark(**FORBIDDEN), ("off", "passed"), id="off"),
        pytest.param(with_reader(IS_ON), UNKNOWN_LIST, ("pending", "unknown"), id="pending is unknown"),
        pytest.param(with_reader(IS_OFF), quark(drop=(FORCE,), quant__method="fp8"), ("off", "unknown"), id="request"),
        pytest.param(with_reader({"feature.fusion.state": "mixed"}), ONE_BF16, ("mixed", "passed"), id="mixed"),
        pytest.param(
            with_reader({"feature.fusion.outputs.slots": {"absent": True}}),
            ONE_BF16,
            ("mixed", "passed"),
            id="by layer",
        ),
        pytest.param(with_reader(IS_ON), quark([layer(3), {"layer.index": 4}]), ("mixed", "unknown"), id="one pending"),
        pytest.param(
            with_reader({"feature.fusion.state": "error"}, gate=COUNT_ERROR),
            quark(),
            ("error", "passed"),
            id="an error",
        ),
        pytest.param(
            with_reader({"feature.fusion.state": "error"}, gate=COUNT_ERROR),
            UNKNOWN_LIST,
            ("error", "unknown"),
            id="an error that an empty list of layers would undo",
        ),
        pytest.param(with_reader(IS_OFF, fusion=SHADOW), quark(), ("on", "passed"), id="shadow is off"),
        pytest.param(with_reader(IS_OFF, gate=SHADOW), quark(), ("on", "passed"), id="the gate's shadow"),
        pytest.param(
            with_reader(IS_OFF, fusion=SHADOW), UNKNOWN_LIST, ("pending", "passed"), id="pending in the shadow"
        ),
        pytest.param(
            with_reader({"feature.fusion.outputs.slots": 0}, fusion=SHADOW), quark(), ("on", "passed"), id="its outputs"
        ),
        pytest.param(
            with_reader(IS_OFF, fusion=SHADOW, gate={"mode": "enforce"}),
            quark(drop=("model.family",)),
            ("pending", "unknown"),
            id="a gate that may enforce",
        ),
    ],
)
def test_a_feature_that_asks_for_another(rules: Any, record: Any, expected: Any) -> None:
    assert asks(rules, record) == expected


def test_a_layer_gate_sees_the_other_feature_in_its_own_layer() -> None:
    _, reader = naive_decide(
        with_reader(IS_ON, scope="layer"), quark([layer(3), layer(4, shared=BF16), {"layer.index": 5}])
    )

    assert [each["state"] for each in reader["layers"]] == ["on", "off", "pending"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"model.n_routed_experts": 1}, "config"),
        ({"layer.routed_storage.width": 1}, "checkpoint"),
        ({"library.triton": {"ge": "2.1"}}, "platform"),
        ({"moe.shard_width": 1}, "layout"),
        ({"any": [{"library.triton": {"ge": "2.1"}}, {"model.n_routed_experts": 1}]}, "platform"),
        ({"every_layer": {"that": {"model.n_routed_experts": 1}}}, "checkpoint"),
        ({"all": [{"moe.shard_width": 1, "model.family": "x"}]}, None),
    ],
)
def test_the_stage_at_which_an_outcome_resolves(condition: Any, expected: str | None) -> None:
    (outcome,) = decide_one(small([need("it", condition)]), {"facts": {"model.family": "y"}, "assume": ["server"]})[
        "outcomes"
    ]

    assert outcome["resolves_at"] == expected


@pytest.mark.parametrize(
    ("method", "listed", "module", "expected"),
    [
        ("fp8", ["mlp.shared"], "layers.3.mlp.shared.up", T),
        ("fp8", ["mlp.share"], "layers.3.mlp.shared.up", F),
        ("modelopt", ["mlp.shared"], "layers.3.mlp.shared.up", F),
        ("modelopt", ["shared"], "layers.3.mlp.shared.up", T),
        ("fp8", ["kimi"], "layers.{model.family}", T),
        (None, ["kimi"], "kimi", U),
        ("fp8", None, "kimi", U),
        ("fp8", ["kimi"], "{quant.none}", U),
    ],
)
def test_covers(method: Any, listed: Any, module: str, expected: str) -> None:
    facts = {"model.family": "kimi", "quant.method": method, "quant.ignored_modules": listed}
    rules = small([need("it", {"quant.ignored_modules": {"covers": module}})])
    rules |= {"facts": {**FACTS, "quant.method": {"type": "string"}, "quant.none": {"type": "string"}}}
    record = {"facts": {name: value for name, value in facts.items() if value is not None}, "assume": ["server"]}

    assert states(decide_one(rules, record)) == {"it": expected}


# -------------------------------------------------------------------------------------------------------- overlays


def amended(**changes: Any) -> dict[str, Any]:
    return {**KIMI, "overlays": [{"amendments": [{"amends": "fusion/deepseek_v3", **changes}]}]}


LOOSER = need("known-expert-count", {"model.n_routed_experts": [160, 256]}, "support")
STORAGE_GONE = [{"requirement": "one-storage"}]
MORE = need("more", {"server.overlap": True}, "speed")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (amended(add=[{"requirement": MORE}], drop=[{"requirement": "one-storage"}]), ("off", "known-expert-count")),
        (amended(add=[{"requirement": {**MORE, "protects": "correctness"}}], drop=STORAGE_GONE), ("off", "more")),
        (amended(drop=[{"requirement": "one-storage"}, {"requirement": "known-expert-count"}]), ("on", None)),
        (amended(replace=[{"requirement": LOOSER}], drop=[{"requirement": "one-storage"}]), ("on", None)),
        (amended(replace=[{"applies_to": {"model.family": "mixtral"}}]), ("off", "no-gate")),
        (amended(replace=[{"request": "required"}]), ("off", "request")),
        (
            {**KIMI, "overlays": [{"amendments": [{"amends": "one-storage", "drop": [{}]}]}]},
            ("off", "known-expert-count"),
        ),
    ],
)
def test_amended(rules: Any, expected: Any) -> None:
    record = quark([layer(3, shared=BF16)], model__n_routed_experts=160)

    assert brief(decide_one(KIMI, record)) == ("off", "one-storage")
    assert brief(decide_one(rules, record)) == expected


def test_amended_outputs_and_options() -> None:
    outputs = amended(replace=[{"outputs": {"slots": 7}}])
    block_32 = {"option": "block-32", "outputs": {"block_n": 32}}
    changes = {"add": [{"option": block_32, "before": "block-64"}], "drop": [{"option": "block-128"}]}
    options = {**BLOCK, "overlays": [{"amendments": [{"amends": "block_n/block_n", **changes}]}]}

    assert decide_one(outputs, quark())["outputs"] == {"slots": 7}
    assert decide_one(options, block())["option"] == "block-32"


def test_what_replaces_one_of_a_group_stands_alone() -> None:
    group = {"when": {"model.family": "other"}, "requires": [need("first", {}), need("second", {}), need("third", {})]}
    changed = need("second", {"model.family": "x"})
    rules = small([group, need("last", {})])
    rules["overlays"] = [{"amendments": [{"amends": "small/small", "replace": [{"requirement": changed}]}]}]

    assert states(decide_one(rules, quark())) == {
        "first": "not_applicable",
        "second": "failed",
        "third": "not_applicable",
        "last": "passed",
    }


# ------------------------------------------------------------------------------------------------------ the promise


def keeps_the_promise(data: st.DataObject) -> None:
    rules, _, _ = data.draw(rule_sets())
    record = data.draw(records(rules, complete=data.draw(st.booleans())))
    hidden = data.draw(hide(record, rules))

    for fewer, more in zip(naive_decide(rules, hidden), naive_decide(rules, record), strict=True):
        assert_kept(fewer, more)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_the_design_keeps_its_promise(data: st.DataObject) -> None:
    keeps_the_promise(data)


@pytest.mark.slow_property
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_the_design_keeps_its_promise_at_length(data: st.DataObject) -> None:
    keeps_the_promise(data)
