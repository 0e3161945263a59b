"""How fast a gate is decided: beside a handwritten function and other rule engines, which must all agree; and scaling.

`python benchmarks/rule_engines.py [--facts 20000] [--rounds 15] [--no-peers] [--out figures.json]`. Exits with 1, and
shows the facts, where two disagree. Times are the processor's, so that other programs count little, and what is compared
are ratios, taken in each round.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import handwritten
from benchmarks.peers import PEERS, Answers, Formulas, Peer
from gatekeeper import ABSENT, RuleSet, load_rules, parse_rule_set
from gatekeeper.conditions import All, facts_of
from gatekeeper.lean import CompiledFeature
from gatekeeper.values import Arch

FEATURE, GATE = "shared_experts_fusion", "deepseek_v3"
Peers: TypeAlias = Sequence[tuple[Peer, Sequence[Any]]]
"""Each with all facts as it takes them."""
USUAL = 0.92
"""How often a fact has the value that lets the gate go on; else another one, absent or unknown."""
STORAGE = {
    "format": ["fp8_block", "mxfp4", "bf16"],
    "block": ["128x128", "1x32"],
    "scale_dtype": ["float32", "uint8"],
    "width": [2048, 1024],
    "input_width": [7168, 3584],
}
DOMAIN: dict[str, list[Any]] = {
    "model.family": ["deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe"],
    "model.n_shared_experts": [1, 2],
    "model.n_routed_experts": [256, 384, 160],
    "platform.arch": ["sm90", "gfx942", "sm100", "mp31", "sm75"],
    "parallel.moe_ep_size": [1, 2, 8],
    "engine.name": ["sglang", "moe-loader"],
    "engine.per_rank_shared_slots": [True, False],
    "engine.moe_a2a_backend": ["none", "deepep"],
    "engine.loads_fused_shared": [True, False],
    "server.enable_eplb": [False, True],
    "server.enable_two_batch_overlap": [False, True],
    "server.enable_single_batch_overlap": [False, True],
    "server.enforce_shared_experts_fusion": [False, True],
    "server.disable_shared_experts_fusion": [False, True],
    "quant.method": ["quark", "fp8", "compressed-tensors", "w4a8"],
    "quant.weight_type": ["int", "float"],
    "quant.weight_bits": [4, 8],
    "quant.activation_bits": [16, 8],
    **{f"layer.{kind}_storage.{key}": values for kind in ("shared", "routed") for key, values in STORAGE.items()},
}
"""Values of each fact, the usual one first; absent and unknown come to them."""


def random_facts(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Return sets of facts; a name that is missing is unknown."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        values: dict[str, Any] = {}
        for name, domain in DOMAIN.items():
            rare = [*domain, ABSENT, None]
            value = domain[0] if chance.random() < USUAL else chance.choice(rare)
            if name == "model.n_routed_experts" and chance.random() < 0.4:
                value = 384
            if value is not None:
                values[name] = Arch(value) if name == "platform.arch" and value is not ABSENT else value
        made.append(values)
    return made


def one_gate(rules: RuleSet) -> RuleSet:
    """The shipped rules with one gate for the feature, as the handwritten function has."""
    gates = tuple(gate for gate in rules.gates[FEATURE] if gate.name == GATE)
    missing = {name for gate in gates for one in gate.demands for name in facts_of(All((one.when, one.that)))}
    missing -= {name.rsplit(".", 1)[0] if "_storage." in name else name for name in DOMAIN}
    if missing:
        raise SystemExit(f"the gate tests facts that the benchmark does not make: {', '.join(sorted(missing))}")
    return replace(rules, gates={**rules.gates, FEATURE: gates})


def disagreements(
    feature: CompiledFeature, complete: Answers, peers: Peers, facts: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield where anybody decides otherwise than we do, or says otherwise of a requirement."""
    for index, values in enumerate(facts):
        state, found = feature.state(values), feature.reasons(values)
        by_hand = handwritten.state(values), handwritten.reasons(values)
        if (state, found) != by_hand:
            yield f"handwritten: {by_hand}\ngatekeeper:  {(state, found)}\nfacts: {values}"
        for peer, prepared in peers:
            answer = peer.state(prepared[index])
            if answer != state:
                yield f"{peer.name}: {answer}, gatekeeper: {state}\nfacts: {values}"
            if not found:  # forbidden, or another model's
                continue
            theirs = complete(values, peer.truths(prepared[index]))
            if theirs != found:
                yield f"{peer.name}: {theirs}\ngatekeeper: {found}\nfacts: {values}"


@dataclass(frozen=True, slots=True)
class Contender:
    """Who is timed, on what."""

    name: str
    call: Callable[[Any], Any]
    inputs: Sequence[Any]


def timed(contenders: Sequence[Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Time all of them in turn, round by round; ratios are to the first one, in each round."""
    # About as long for each: first see how many inputs take 20 ms.
    chosen = []
    for one in contenders:
        count = 1
        while count < len(one.inputs) and _seconds(one.call, one.inputs[:count]) < 0.02:
            count = min(2 * count, len(one.inputs))
        chosen.append(replace(one, inputs=one.inputs[:count]))
    each: dict[str, list[float]] = {one.name: [] for one in chosen}
    for _ in range(rounds):
        for one in chosen:
            each[one.name].append(_seconds(one.call, one.inputs) / len(one.inputs))
    first = each[chosen[0].name]
    return {
        name: {
            "microseconds": round(1e6 * median(seconds), 3),
            "ratio": round(median(a / b for a, b in zip(first, seconds, strict=True)), 4),
        }
        for name, seconds in each.items()
    }


def _seconds(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    start = time.process_time()
    for one in inputs:
        call(one)
    return time.process_time() - start


def scaling(counts: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Load and decide rule sets of so many gates of ten requirements, each a gate of one feature of its own."""
    facts = "".join(f"  model.f{i}: {{type: integer, doc: A number., given_by: [config]}}\n" for i in range(10))
    requires = "".join(
        f"  - {{id: r{i}, protects: support, that: {{model.f{i}: {{ge: {i}}}}}, reason: 'It is {{model.f{i}}}.'}}\n"
        for i in range(10)
    )
    values = {f"model.f{i}": 10 for i in range(10)}
    rows = []
    for count in counts:
        texts = {"ruleset.yaml": "name: many\nversion: 1\nlanguage: 1\n", "facts/all.yaml": f"facts:\n{facts}"}
        for index in range(count):
            texts[f"features/f{index}.yaml"] = f"feature: f{index}\nsummary: One of many.\nrequires:\n{requires}"
        loads, compiles, decides = [], [], []
        for _ in range(rounds):
            start = time.process_time()
            rules = parse_rule_set(texts)
            loads.append(time.process_time() - start)
            features = [CompiledFeature(rules, name) for name in rules.features]
            start = time.process_time()
            for feature in features:
                assert feature.state(values) == "on"
            compiles.append(time.process_time() - start)
            start = time.process_time()
            for feature in features:
                feature.state(values)
            decides.append(time.process_time() - start)
        per_gate = [round(1e6 * median(found) / count, 2) for found in (loads, compiles, decides)]
        rows.append(dict(zip(("gates", "load_us", "compile_us", "decide_us"), (count, *per_gate), strict=True)))
    return rows


def contenders_of(
    feature: CompiledFeature, complete: Answers, peers: Peers, facts: Sequence[Mapping[str, Any]]
) -> tuple[list[Contender], list[Contender]]:
    """Return who decides and who gives reasons; reasons on those facts where requirements are asked at all."""

    def answering(peer: Peer) -> Callable[[Any], Any]:
        truths = peer.truths
        return lambda one: complete(one[0], truths(one[1]))

    asked = [index for index, values in enumerate(facts) if feature.reasons(values)]
    some = [facts[index] for index in asked]
    alone = [Contender("handwritten", handwritten.state, facts), Contender("gatekeeper", feature.state, facts)]
    full = [Contender("handwritten", handwritten.reasons, some), Contender("gatekeeper", feature.reasons, some)]
    for peer, prepared in peers:
        alone.append(Contender(peer.name, peer.state, prepared))
        full.append(Contender(peer.name, answering(peer), [(facts[index], prepared[index]) for index in asked]))
    return alone, full


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=20_000, help="random sets of facts on which all must agree")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true", help="leave the other rule engines out")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)

    rules = one_gate(load_rules())
    feature = CompiledFeature(rules, FEATURE)
    facts = random_facts(options.facts)
    formulas = Formulas(rules.catalogue, rules.features[FEATURE], rules.gates[FEATURE][0])
    complete = Answers(formulas, rules.gates[FEATURE][0])
    peers = []
    for make in () if options.no_peers else PEERS:
        try:
            peer = make(formulas, domain_of(formulas))
        except ModuleNotFoundError as error:
            print(f"{make.__name__}: not installed ({error.name}), left out; see benchmarks/requirements.txt")
            continue
        peers.append((peer, [peer.prepare(formulas.facts(list(DOMAIN), values)) for values in facts]))

    wrong = next(disagreements(feature, complete, peers, facts), None)
    if wrong:
        print(f"disagreement:\n{wrong}")
        return 1
    states = {
        state: sum(feature.state(values) == state for values in facts) for state in ("on", "off", "pending", "error")
    }
    who = ", ".join(["gatekeeper", "handwritten", *(peer.name for peer, _ in peers)])
    print(f"agreed on {len(facts)} sets of facts ({', '.join(f'{n} {state}' for state, n in states.items())}): {who}")

    alone, full = contenders_of(feature, complete, peers, facts)
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "facts": len(facts),
        "states": states,
        "decision": timed(alone, options.rounds),
        "reasons": timed(full, options.rounds),
        "scaling": [] if options.no_scaling else scaling((10, 100, 1000), max(3, options.rounds // 5)),
    }
    print(table(figures))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def domain_of(formulas: Formulas) -> dict[str, list[Any]]:
    """Return all that each fact may be for a peer."""
    kinds = ("absent", "unknown")
    return {
        name.replace(".", "__"): [*values, *(formulas.missing(name, kind) for kind in kinds)]
        for name, values in DOMAIN.items()
    }


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["", "| engine | decision alone | µs | with reasons | µs |", "|---|---|---|---|---|"]
    for name, alone in figures["decision"].items():
        full = figures["reasons"][name]
        lines.append(
            f"| {name} | {alone['ratio']:.3g}x | {alone['microseconds']:.3g} |"
            f" {full['ratio']:.3g}x | {full['microseconds']:.3g} |"
        )
    lines += [
        "",
        "| gates of 10 requirements | load a gate, µs | first decision, µs | decision, µs |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['gates']} | {r['load_us']} | {r['compile_us']} | {r['decide_us']} |" for r in figures["scaling"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
