"""`moe-loader bench` and `moe-loader tune`: what the kernels take on this machine's GPU, and with which settings."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loader.errors import BenchError

if TYPE_CHECKING:
    from loader.bench.peers import Peer
    from loader.bench.problem import Model
    from loader.kernels.tuned import Table

F = TypeVar("F", bound=Callable[..., Any])
TOKENS = "1,4,16,64,256,1024,4096,8192"
INCOMPLETE = 3
PLOTS = (".png", ".svg", ".pdf")


def tables_option(*, exists: bool) -> Callable[[F], F]:
    """The folder of tables; `tune` makes it."""
    return click.option(
        "--tables",
        type=click.Path(path_type=Path, file_okay=False, exists=exists),
        metavar="DIR",
        help="Folder of settings that `moe-loader tune` measured; default: the shipped ones.",
    )


def layer_options(command: F) -> F:
    """Add the options that say which layer."""
    for option in (
        click.option("--tokens", default=TOKENS, show_default=True, metavar="N,N,…", help="Tokens of a call."),
        click.option(
            "--format",
            "formats",
            default="bf16",
            show_default=True,
            metavar="NAME,…",
            help="Storage of the experts: bf16, fp8_block, int4_g32, mxfp4.",
        ),
        click.option(
            "--tp",
            "tp_size",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Ranks that share each expert's width.",
        ),
        click.option("--shape", required=True, metavar="NAME", help="kimi-k2.5, kimi-k2.5-routed, deepseek-v3, …"),
    ):
        command = option(command)
    return command


@click.command("bench", short_help="Time a layer beside the hardware's floor and other kernels.")
@layer_options
@tables_option(exists=True)
@click.option("--peers", default="", metavar="NAME,…", help="torch-grouped_mm, transformers, sglang-triton, marlin, …")
@click.option(
    "--peers-dir",
    default=Path(".peers"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="What benchmarks/peers/fetch.py made.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them into this file (needs matplotlib).")
def bench_command(
    shape: str,
    tp_size: int,
    formats: str,
    tokens: str,
    tables: Path | None,
    peers: str,
    peers_dir: Path,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Time experts of one layer, routing given, in a CUDA graph; every output is compared with the reference first.

    The floor is the longer of one pass over the touched weights and scales, by a kernel that only reads, and the
    arithmetic at this device's measured rate. Beside the fused layout: the shared slots on their own (apart), settings
    of a device without a table (counted), and the fused layout with its router before it (layer).
    """
    counts, models, chosen = _numbers(tokens), _models(shape, formats, tp_size), _peers(peers, peers_dir)
    if plot is not None:
        _require("matplotlib", "--plot draws with it; `pip install matplotlib`, or this package with its extra `bench`")
        if plot.suffix not in PLOTS:
            raise click.UsageError(f"--plot writes {', '.join(PLOTS)}; not `{plot.name}`")
    _require_gpu()
    _table(tables)  # one that can't be used is refused before anybody waits
    from loader.bench.report import Report, draw
    from loader.bench.run import points
    from loader.bench.timing import ceilings
    from loader.bench.turn import Turn

    # What decides the figures, and no paths: those are of this machine alone.
    asked = {"--shape": shape, "--tp": str(tp_size), "--format": formats, "--tokens": tokens, "--peers": peers}
    asked |= {"--tables": "DIR"} if tables is not None else {}
    command = [word for option, value in asked.items() if value for word in (option, value)]
    with _has_memory(), Turn.of_device() as turn:
        table = _table(tables)  # as it is now: another command may have filled it meanwhile
        limits = ceilings()
        report = Report.started(limits, " ".join(["moe-loader", "bench", *command]))
        click.echo(report.heading())
        for point in points(models, counts, limits=limits, table=table, peers=chosen, left=turn.left):
            report.points.append(point)
            click.echo(report.line(point))
            if json_file is not None:  # after each, so that a run that is cut short has what it measured
                report.save(json_file)
    for line in report.notes():
        click.echo(line)
    if plot is not None:
        draw(report, plot)


@click.command("tune", short_help="Find the kernels' settings for this machine's GPU.")
@layer_options
@tables_option(exists=False)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Settings tried in each round of a search; a third of them, four at least, with --again.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="Stop after so long; what was found is kept, and without --again the next run goes on.",
)
@click.option("--again", is_flag=True, help="Search for what is there too; it stays where nothing is faster beside it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another one draws other settings.")
@click.pass_context
def tune_command(
    context: click.Context,
    shape: str,
    tp_size: int,
    formats: str,
    tokens: str,
    tables: Path | None,
    most: int,
    seconds: float | None,
    again: bool,
    seed: int,
) -> None:
    """Time settings and keep the best in DIR, one file a device; what is there is measured again with --again only.

    Several commands can fill one DIR at once, on GPUs of a kind or in turns on one. Exit 3 where --seconds ended the
    search before it was done.
    """
    counts, models = _numbers(tokens), _models(shape, formats, tp_size)
    _require_gpu()
    from loader.bench.shown import shown
    from loader.bench.tuning import tune
    from loader.bench.turn import Turn
    from loader.kernels.tuned import SHIPPED

    folder = tables or SHIPPED
    with _has_memory(), shown(len(models) * len(counts)) as bar, Turn.of_device(say=bar.say) as turn:
        until = None if seconds is None else time.monotonic() + seconds
        complete = tune(
            models,
            counts,
            folder=folder,
            most=most,
            until=until,
            shown=bar,
            again=again,
            seed=seed,
            left=turn.left,
        )
    context.exit(0 if complete else INCOMPLETE)


@contextmanager
def _has_memory() -> Iterator[None]:
    """Say what to do where it is not so, without a traceback."""
    import torch

    from loader.bench.report import first_line

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BenchError(
            f"the GPU's memory is full: {first_line(error)} Is another program on it? Commands that take turns share "
            "its time alone; else try more ranks (--tp) or fewer --tokens"
        ) from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(name) for name in _names(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.UsageError(f"--tokens takes positive numbers such as 1,16,256; not `{text}`")
    return numbers


def _models(shape: str, formats: str, tp_size: int) -> list[Model]:
    from loader.bench.problem import Model

    try:
        models = [Model.of(shape, name, tp_size) for name in _names(formats)]
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not models:
        raise click.UsageError("--format takes at least one name")
    return models


def _peers(peers: str, folder: Path) -> list[Peer]:
    from loader.bench.peers import peers_of

    try:
        return peers_of(_names(peers), folder)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; kernels are timed where they run")
    _require("triton", "the kernels are written in it; `pip install triton==3.6.0`")


def _require(module: str, why: str) -> None:
    """Say what to install before anything is measured."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise click.ClickException(f"{module} is not installed here: {why}") from None


def _table(folder: Path | None) -> Table | None:
    import torch

    from loader.kernels.tuned import find_table

    return find_table(torch.cuda.get_device_name(), folder)
