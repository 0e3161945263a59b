"""The `moe-loader` command: plan, load and make-checkpoint; answers to stdout, events and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gatekeeper import (
    CheckpointReading,
    Decisions,
    Facts,
    GatekeeperError,
    RuleSet,
    Runner,
    decide,
    load_rules,
    open_target,
    runners_of,
)
from loader.bench.cli import bench_command, tables_option, tune_command
from loader.errors import RecipeError

if TYPE_CHECKING:
    from loader.plan import Plan

BAD_NEWS, INCOMPLETE = 1, 3
F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-gatekeeper")
def group() -> None:
    """Load MoE layers as the gatekeeper decides, strictly.

    Exit codes: 0 done and fine, 1 bad news (a refusal, a misfit, a mismatch, a torn file), 2 wrong usage,
    3 incomplete (a decision is pending under --strict).
    """


def target_options(command: F) -> F:
    """Add the options that say what CHECKPOINT is loaded on and by which rules."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--strict", is_flag=True, help="Exit 3 where a decision is pending."),
        tables_option(exists=True),
        click.option(
            "--overlay",
            "overlays",
            metavar="DIR",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Lay this rule set over it; several in their order.",
        ),
        click.option(
            "--rules", "rules_folder", metavar="DIR", type=click.Path(path_type=Path), help="Use this rule set."
        ),
        click.option("--runner", type=click.Choice(["target", "draft"]), help="Only this runner."),
        click.option(
            "--set", "settings", metavar="FACT=VALUE", multiple=True, help="A fact that CHECKPOINT does not tell."
        ),
        click.option("--platform", metavar="NAME|here", help="A preset of platforms.yaml, or this machine."),
        click.argument("checkpoint"),
    ):
        command = option(command)
    return command


rank_option = click.option(
    "--rank",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only the share of rank N of parallel.tp_size and parallel.ep_size.",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one command works on."""

    checkpoint: str
    rules: RuleSet
    platform: str | None
    settings: dict[str, Any]
    runner: Runner | None
    tables: Path | None

    @cached_property
    def reading(self) -> CheckpointReading:
        """What the checkpoint says, read once."""
        return open_target(self.checkpoint, self.rules, keep_faults=True)

    def decided(self) -> Iterator[tuple[Facts, Decisions]]:
        """Facts and decisions of each runner, target first."""
        for runner in [self.runner] if self.runner else runners_of(self.reading):
            facts = self._facts(runner)
            yield facts, decide(self.rules, facts)

    def _facts(self, runner: Runner) -> Facts:
        from loader.measured import joined

        how: Any = {"platform": self.platform, "settings": self.settings, "rules": self.rules}
        return joined(self.reading, runner=runner, tables=self.tables, **how)


def _target(
    checkpoint: str,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    tables: Path | None,
) -> Target:
    _set_up_logging()
    rules = load_rules(rules_folder, overlays)
    return Target(
        checkpoint=checkpoint,
        rules=rules,
        platform=platform,
        settings=_settings(settings),
        runner=runner,
        tables=tables,
    )


@group.command("plan", short_help="Show which tensor goes to which slot, and the bytes.")
@target_options
@rank_option
@click.option("--tensors", is_flag=True, help="List every placement, too.")
@click.option("--memory", metavar="SIZE", help="Memory of one device, such as 80GiB; default: that of --platform.")
@click.pass_context
def plan_command(
    context: click.Context,
    checkpoint: str,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    tables: Path | None,
    strict: bool,
    as_json: bool,
    rank: int | None,
    tensors: bool,
    memory: str | None,
) -> None:
    """Decide and plan, reading nothing but headers; CHECKPOINT may be a config.json alone.

    Exit 1 where the experts can't be divided so, or the planned weights do not fit the device, if its memory is known.
    """
    device_bytes = _memory(memory)
    target = _target(checkpoint, platform, settings, runner, rules_folder, overlays, tables)
    decided = list(target.decided())
    from loader.planning import plan_target
    from loader.rank import plan_of_rank

    answers: list[dict[str, Any]] = []
    plans: list[Plan] = []
    pending = False
    source = "--memory"
    for facts, decisions in decided:
        pending |= _is_pending(decisions)
        whole = plan_target(checkpoint, decisions, target.rules, facts, checkpoint=target.reading)
        plans.append(whole)  # of which a device has a share, whichever rank is shown
        plan = whole if rank is None else plan_of_rank(whole, rank, whole.per_rank.tp_size, whole.per_rank.ep_size)
        if device_bytes is None and isinstance(known := facts.values.get("platform.memory_bytes"), int):
            device_bytes, source = known, facts.reading("platform.memory_bytes").witness
        if as_json:
            answers.append(_answer(facts.runner, decisions) | {"plan": plan.as_json(tensors=tensors)})
            continue
        _say(decisions, plan.lines())
        for p in plan.placements if tensors else ():
            slot = p.param if p.expert is None else f"{p.param}[{p.expert}]"
            click.echo(f"  {slot} rows {p.rows[0]}:{p.rows[1]} <- {p.key}" + (f" {p.source}" if p.source else ""))
    context.exit(_fit(plans, device_bytes, source, checkpoint, answers if as_json else None, strict and pending))


def _memory(text: str | None) -> int | None:
    from loader.text import bytes_of

    try:
        found = None if text is None else bytes_of(text)
    except ValueError as error:
        raise click.UsageError(f"--memory: {error}") from None
    if found is not None and found < 1 << 20:
        raise click.UsageError(f"--memory: no device has {found} bytes; give its memory with a unit, such as 80GiB")
    return found


def _fit(
    plans: list[Plan],
    device_bytes: int | None,
    source: str,
    checkpoint: str,
    answers: list[dict[str, Any]] | None,
    incomplete: bool,
) -> int:
    """Say whether the plans fit a device, print what is to be JSON, and return the exit code."""
    from loader.fits import fit

    found = None if device_bytes is None else fit(plans, device_bytes, source)
    if answers is not None:
        memory = None if found is None else found.as_json()
        _print_json({"checkpoint": checkpoint, "runners": answers, "memory": memory})
    elif found is not None:
        click.echo("\n".join(found.lines()))
    is_bad = any(plan.per_rank.nbytes is None for plan in plans) or (found is not None and not found.fits)
    return BAD_NEWS if is_bad else INCOMPLETE if incomplete else 0


@group.command("load", short_help="Load the layers, and compare them with the checkpoint.")
@target_options
@rank_option
@click.option("--device", default="cpu", show_default=True, help="Where the layers go: cpu, cuda, cuda:1.")
@click.option("--verify", "verifies", is_flag=True, help="Compare each layer with the checkpoint while loading.")
@click.pass_context
def load_command(
    context: click.Context,
    checkpoint: str,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    tables: Path | None,
    strict: bool,
    as_json: bool,
    rank: int | None,
    device: str,
    verifies: bool,
) -> None:
    """Decide, plan and load; exit 1 with every reason if a slot or a tensor is left over."""
    target = _target(checkpoint, platform, settings, runner, rules_folder, overlays, tables)
    decided = list(target.decided())
    from loader.prepared import prepare
    from loader.progress import progress
    from loader.text import count

    answers: list[dict[str, Any]] = []
    pending = False
    for facts, decisions in decided:
        pending |= _is_pending(decisions)
        prepared = prepare(checkpoint, decisions, target.rules, facts, rank, target.reading)
        from loader.load import load_prepared  # torch takes a second: what does not fit is refused before

        with progress(prepared.plan.nbytes, facts.runner) as moved:
            layers, found = load_prepared(prepared, device, verifies=verifies, tables=tables, moved=moved)
        if as_json:
            answer = _answer(facts.runner, decisions) | {"plan": prepared.plan.as_json(), "device": device}
            answers.append(answer | {"verified": [asdict(one) for one in found] if verifies else None})
            continue
        _say(decisions, prepared.plan.lines())
        ranks = prepared.plan.per_rank
        if rank is None and ranks.tp_size > 1:
            click.echo(f"  no --rank: all of every layer, not the share of one of {ranks.tp_size} ranks")
        click.echo(
            f"  loaded {count(len(layers), 'layer')} on {device}: every slot written once, every tensor used once"
        )
        if found:
            worst = max(found, key=lambda one: one.figure / one.tolerance)
            click.echo(
                f"  verified {count(len(found), 'layer')} against the checkpoint: at most {worst.figure:.1e} off "
                f"(layer {worst.index}; allowed {worst.tolerance:.1e}), "
                f"{count(sum(one.rows for one in found), 'row')} byte by byte"
            )
            for one in found:
                if one.backend is not None:
                    click.echo(f"  layer {one.index}, {one.backend.text()}")
            if all(one.backend is None for one in found):
                click.echo("  no kernels were compared: all layers have the backend eager, with which others are")
    if as_json:
        _print_json({"checkpoint": checkpoint, "runners": answers})
    context.exit(INCOMPLETE if strict and pending else 0)


@group.command("make-checkpoint", short_help="Write a tiny checkpoint that looks like a real one.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--family", required=True, metavar="NAME", help="kimi_k25, kimi_k2, deepseek_v3, deepseek_v2, …")
@click.option(
    "--format", "format_name", required=True, metavar="NAME", help="Storage of routed experts: bf16, int4_g32, mxfp4, …"
)
@click.option(
    "--shared-format", metavar="NAME", help="Storage of shared experts; default: as releases in FORMAT have it."
)
@click.option("--layers", default=3, show_default=True, help="Decoder layers, the first one dense.")
@click.option("--experts", type=int, help="Routed experts; default: the family's, which gates ask for.")
@click.option("--hidden", default=64, show_default=True, help="Hidden size, a multiple of 32.")
@click.option("--width", default=32, show_default=True, help="Width of an expert, a multiple of 32.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same bytes.")
def make_checkpoint_command(out: Path, **options: Any) -> None:
    """Write OUT, a new folder: real names, packing, exclude lists and config keys, tiny widths."""
    from loader.make_checkpoint import Recipe, make_checkpoint
    from loader.text import human

    with _usage():
        make_checkpoint(out, Recipe(**options))
    files = [path for path in out.iterdir() if path.is_file()]
    click.echo(f"wrote {out}: {len(files)} files, {human(sum(path.stat().st_size for path in files))}")


@group.command("shrink", short_help="Write a small checkpoint of a real model from its config.json.")
@click.argument("config", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "routed", required=True, metavar="NAME", help="Storage of routed experts.")
@click.option("--shared-format", "shared", required=True, metavar="NAME", help="Storage of shared experts.")
@click.option("--draft-format", "draft", metavar="NAME", help="Of routed experts in draft layers, if another.")
@click.option("--draft-shared-format", "draft_shared", metavar="NAME", help="Of shared experts there.")
@click.option("--layers", default=2, show_default=True, help="MoE layers, the model's last ones.")
@click.option("--experts", type=int, help="Routed experts; default: as many as it has, which gates ask for.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same bytes.")
def shrink_command(
    config: Path,
    out: Path,
    routed: str,
    shared: str,
    draft: str | None,
    draft_shared: str | None,
    **sizes: Any,
) -> None:
    """Write OUT, a new folder: names, layer numbers, lists and keys of CONFIG, few layers, tiny widths."""
    from loader.shrink import Shrunk, shrink

    drafts = (draft or routed, draft_shared or shared)
    with _usage():
        shrink(out, Shrunk(config=config, formats=(routed, shared), draft_formats=drafts, **sizes))
    click.echo(f"wrote {out}")


@group.command("demo", short_help="Three checkpoints from facts to verified layers, and SGLang's #25390 replayed.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the checkpoints in this new folder.")
@click.pass_context
def demo_command(context: click.Context, out: Path | None) -> None:
    """Make three Kimi-K2.5-shaped checkpoints, decide, plan, load and verify each, and replay #25390 on them."""
    from loader.demo import run

    _set_up_logging(quiet=True)
    context.exit(run(out))


group.add_command(bench_command)
group.add_command(tune_command)


def main() -> None:
    """Run the command line; an error of ours is a message on stderr and exit code 1, never a traceback."""
    try:
        group(prog_name="moe-loader")
    except GatekeeperError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(BAD_NEWS)
    except OSError as error:  # a full disk, a folder that may not be read
        click.echo(f"error: `{error.filename}`: {error.strerror or error}", err=True)
        sys.exit(BAD_NEWS)


@contextmanager
def _usage() -> Iterator[None]:
    """What nobody can make was asked for: wrong usage."""
    try:
        yield
    except RecipeError as error:
        raise click.UsageError(str(error)) from None


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set takes FACT=VALUE, such as parallel.tp_size=8; not `{setting}`")
        if name in result:
            raise click.UsageError(f"--set {name} is given twice")
        result[name] = value
    return result


def _is_pending(decisions: Decisions) -> bool:
    states = [decision.state for decision in decisions.values()]
    states += [layer.state for decision in decisions.values() for layer in decision.layers or ()]
    return "pending" in states


def _answer(runner: str, decisions: Decisions) -> dict[str, Any]:
    return {"runner": runner, "decisions": [decision.to_json() for decision in decisions.values()]}


def _say(decisions: Decisions, lines: Iterator[str]) -> None:
    click.echo(next(lines))
    for decision in decisions.values():
        by = f" ({decision.decided_by})" if decision.decided_by else ""
        state = decision.option if decision.state == "on" and decision.option else decision.state
        click.echo(f"  {decision.feature}: {state}{by}" + (f" {decision.reason}" if decision.reason else ""))
        if decision.degraded:
            click.echo(f"    degraded: {decision.degraded}")
        failed: dict[str, list[str]] = {}
        for outcome in decision.outcomes:
            if outcome.option and outcome.state == "failed":
                failed.setdefault(outcome.option, []).append(outcome.id)
        for option, ids in failed.items():
            click.echo(f"    not {option}: {', '.join(ids)}")
    for line in lines:
        click.echo(line)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _set_up_logging(*, quiet: bool = False) -> None:
    """Events go to stderr: a person sees warnings and errors, a program every event as a line of JSON."""
    import structlog

    pretty = quiet or sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(50 if quiet else 30 if pretty else 20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
