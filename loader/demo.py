"""`moe-loader demo`: three Kimi-K2.5 checkpoints from facts to verified layers, then SGLang #25390 replayed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from gatekeeper import Decision, Decisions, Facts, GatekeeperError, RuleSet, decide, join, load_rules, open_target
from gatekeeper.cli.render import COLOURS, decision_lines
from loader.build import build
from loader.errors import Code, PlanError, summarise
from loader.make_checkpoint import Recipe, make_checkpoint
from loader.plan import Plan
from loader.prepared import prepare
from loader.verify import agreement, verify

FEATURE = "shared_experts_fusion"
PLATFORM = "mi355x"
SETTINGS = {"parallel.tp_size": 1}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SHOWN_FACTS = ("model.family", "model.n_routed_experts", "model.n_shared_experts", "quant.method")
SHOWN_LAYER_FACTS = ("layer.routed_storage.format", "layer.shared_storage.format", "layer.shared_excluded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """One checkpoint of the demo."""

    folder: str
    title: str
    recipe: Recipe
    wrong: str = ""
    """How an engine that fuses it by #25390's rule goes wrong."""
    code: Code = "missing"
    """The kind of fault that stops this loader there."""


STANDARD = Exhibit(
    folder="Kimi-K2.5",
    title="Kimi-K2.5 as Moonshot ships it: int4 experts, shared experts left in bf16",
    recipe=Recipe(family="kimi_k25", format_name="int4_g32"),
    wrong="a slot is never written",
)
QUARK = Exhibit(
    folder="Kimi-K2.5-MXFP4",
    title="Kimi-K2.5 quantized by Quark: every expert in MXFP4",
    recipe=Recipe(family="kimi_k25", format_name="mxfp4"),
)
OLD_QUARK = Exhibit(
    folder="Kimi-K2.5-MXFP4@b071bc6f",
    title="The old revision of the same: Quark too, but its exclude list has re:.*shared_experts.*",
    recipe=Recipe(family="kimi_k25", format_name="mxfp4", shared_format="bf16"),
    wrong="a shape does not fit",
    code="shape",
)
FP8 = Exhibit(
    folder="DeepSeek-V3-shared-bf16",
    title="DeepSeek-V3 in fp8 blocks, shared experts in bf16 under the very same tensor names",
    recipe=Recipe(family="deepseek_v3", format_name="fp8_block", shared_format="bf16"),
    wrong="a copy casts in silence",
    code="dtype",
)


def run(folder: Path | None) -> int:
    """Show it all on stdout, with the checkpoints in `folder` (a temporary one without); return the exit code."""
    if folder is not None:
        return _show(folder)
    with tempfile.TemporaryDirectory(prefix="moe-loader-demo-") as temporary:
        return _show(Path(temporary))


def _show(folder: Path) -> int:
    shipped = load_rules()
    surprises: list[str] = []
    _heading(f"1. Three checkpoints, one rule (platform {PLATFORM}, tp 1)")
    for exhibit, expected in ((STANDARD, "off"), (QUARK, "on"), (OLD_QUARK, "off")):
        path = make_checkpoint(folder / exhibit.folder, exhibit.recipe)
        surprises += _from_facts_to_layers(path, exhibit, shipped, expected)

    _heading("2. What SGLang #25390 changed: `n_routed_experts in (256,)` to `(256, 384)`")
    for name, expected in (("before-25390", "off"), ("regression-25390", "on")):
        rules = load_rules(EXAMPLES / name)
        _, decisions = _decided(folder / STANDARD.folder, rules)
        _verdict(f"{name:<18} {STANDARD.folder}", decisions[FEATURE])
        surprises += _differs(f"{name} on {STANDARD.folder}", decisions[FEATURE].state, expected)
    click.echo("  SGLang warned `not found in params_dict`, served, and gsm8k fell to 0.000.")

    _heading("3. By that rule this loader stops, whichever way it would have gone wrong")
    regression = load_rules(EXAMPLES / "regression-25390")
    make_checkpoint(folder / FP8.folder, FP8.recipe)
    for exhibit in (STANDARD, OLD_QUARK, FP8):
        surprises += _caught(folder / exhibit.folder, exhibit, regression)

    _heading("4. Asking for it does not help: what protects correctness is never waived")
    _, decisions = _decided(folder / OLD_QUARK.folder, shipped, server="enforce")
    for line in decision_lines(decisions[FEATURE]):
        click.echo(line)
    surprises += _differs("the old revision, forced", decisions[FEATURE].state, "error")
    click.echo()
    for surprise in surprises:
        click.echo(click.style(f"UNEXPECTED: {surprise}", fg="red", bold=True))
    if not surprises:
        click.echo(click.style("All as it should be.", fg="green", bold=True))
    return 1 if surprises else 0


def _from_facts_to_layers(path: Path, exhibit: Exhibit, rules: RuleSet, expected: str) -> list[str]:
    click.echo()
    click.echo(click.style(f"  {exhibit.folder}: {exhibit.title}", bold=True))
    facts, decisions = _decided(path, rules)
    for line in _fact_lines(facts):
        click.echo(f"    {line}")
    decision = decisions[FEATURE]
    for line in decision_lines(decision):
        click.echo(line)
    prepared = prepare(path, decisions, rules, facts)
    for line in _plan_lines(prepared.plan):
        click.echo(f"    {line}")
    layers = build(prepared.plan, prepared.index)
    found = verify(layers, prepared.plan, prepared.index, prepared.tensors)
    worst = max(found, key=lambda one: one.figure / one.tolerance)
    click.echo(f"    load: {len(layers)} layers, every slot written once, every tensor used once")
    click.echo(
        f"    verify: {click.style('equal', fg='green')} to the checkpoint's own weights, "
        f"at most {worst.figure:.1e} off (allowed {worst.tolerance:.1e})"
    )
    for one in found:
        if one.backend is not None:
            click.echo(f"    layer {one.index}, {one.backend.text()}")
    if decision.state == "on":
        _, unfused = _decided(path, rules, server="disable")
        alone = prepare(path, unfused, rules, facts)
        apart = agreement(
            layers, build(alone.plan, alone.index), hidden_size=int(str(facts.values["model.hidden_size"]))
        )
        click.echo(f"    fused against unfused: at most {max(apart.values()):.1e} apart")
    return _differs(exhibit.folder, decision.state, expected)


def _caught(path: Path, exhibit: Exhibit, rules: RuleSet) -> list[str]:
    facts, decisions = _decided(path, rules)
    click.echo()
    _verdict(f"{exhibit.folder}: {exhibit.wrong}", decisions[FEATURE])
    try:
        prepare(path, decisions, rules, facts)
    except PlanError as error:
        telling = summarise([fault for fault in error.faults if fault.code == exhibit.code])
        for line in telling[:2]:
            click.echo(f"    {click.style('✗', fg='red')} {line}")
        click.echo(f"      and {len(summarise(error.faults)) - len(telling[:2])} more; nothing was allocated")
        return [] if telling else [f"{exhibit.folder}: expected a fault of kind {exhibit.code}, got {error}"]
    except GatekeeperError as error:
        return [f"{exhibit.folder}: expected a misfit of the plan, got: {error}"]
    return [f"{exhibit.folder}: planned without a word"]


def _decided(path: Path, rules: RuleSet, *, server: str = "") -> tuple[Facts, Decisions]:
    settings = {**SETTINGS, **({f"server.{server}_{FEATURE}": True} if server else {})}
    facts = join(open_target(path, rules), runner="target", platform=PLATFORM, settings=settings, rules=rules)
    return facts, decide(rules, facts)


def _fact_lines(facts: Facts) -> Iterator[str]:
    layer = (facts.runner_layers or ({},))[0]
    for name in (*SHOWN_FACTS, *SHOWN_LAYER_FACTS):
        reading = facts.reading(name, layer)
        yield f"{name} = {reading.value}".ljust(60) + click.style(_short(reading.witness), dim=True)


def _short(witness: str) -> str:
    """Cut the middle of a long tensor name: both its file and its end tell something."""
    return witness if len(witness) <= 72 else f"{witness[:24]}…{witness[-47:]}"


def _plan_lines(plan: Plan) -> Iterator[str]:
    lines = plan.lines()
    next(lines)
    for line in lines:
        yield f"plan: {line.strip()}"


def _verdict(title: str, decision: Decision) -> None:
    state = click.style(decision.state, fg=COLOURS[decision.state], bold=True)
    by = f" by {decision.decided_by}" if decision.decided_by else ""
    click.echo(f"  {title}: {FEATURE} {state}{by}")


def _differs(what: str, state: str, expected: str) -> list[str]:
    return [] if state == expected else [f"{what}: {state}, expected {expected}"]


def _heading(text: str) -> None:
    click.echo()
    click.echo(click.style(text, bold=True, underline=True))
