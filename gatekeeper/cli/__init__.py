"""The `gatekeeper` command: one file a subcommand, imported only when it is asked for."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from io import TextIOWrapper

import click

from gatekeeper.errors import GatekeeperError, RuleError, one_line

COMMANDS = {
    "check": "Check a rule set: every fault with its place.",
    "decide": "Decide features for checkpoints, configs or lines of facts.",
    "docs": "Write the gates of a rule set as Markdown pages.",
    "explain": "Say why a feature is on or off, and what would change that.",
    "facts": "Show the catalogue, or a target's facts with their witnesses.",
    "help": "Explain a code of `check`, with a wrong and a right example.",
    "schema": "Write JSON Schemas with which an editor knows every fact and name.",
    "test": "Run tables of facts and expected decisions.",
}

BAD_NEWS, INCOMPLETE = 1, 3


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"gatekeeper.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from gatekeeper.source import nearest

            hint = nearest(args[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command `{args[0]}`{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-gatekeeper")
def group() -> None:
    """Decide which model-load features may be on, from rules that are data, and say why.

    Exit codes: 0 done and fine (`off` is fine), 1 bad news, 2 wrong usage, 3 incomplete.
    """


def say_error(message: object) -> None:
    """Print an error on stderr; its lines stay lines, and nothing in it can steer a terminal."""
    click.echo("error: " + "\n".join(map(one_line, str(message).split("\n"))), err=True)


def main() -> None:
    """Run the command line; an error of ours is one message on stderr, never a traceback."""
    # Imports and rules are thousands of objects that stay: looking among them for garbage costs a tenth of a start.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal or a pipe that can't show a character gets its escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        group(prog_name="gatekeeper")
    except RuleError as error:
        from gatekeeper.cli.faults import counted, show

        show(error.faults, err=True)
        click.echo(f"{counted(error.faults)}; nothing was done", err=True)
        sys.exit(BAD_NEWS)
    except GatekeeperError as error:
        say_error(error)
        sys.exit(BAD_NEWS)
    except OSError as error:
        where = f": `{error.filename}`" if error.filename is not None else ""  # a full disk has no name
        say_error(f"{error.strerror or error}{where}")
        sys.exit(BAD_NEWS)
    finally:
        gc.freeze()  # nor is there any point in looking when the process ends
