"""`gatekeeper help CODE`: what a code means, why it is an error, and how the right thing looks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

import click

from gatekeeper.cli import COMMANDS, group
from gatekeeper.diagnostics import Diagnostic, diagnostics
from gatekeeper.source import nearest

_WIDTH = 100
_HEADS = {"error": "Errors: the rule set is not loaded", "warning": "Lints: shown by `gatekeeper check`"}


@click.command("help", short_help="Explain a code of `check`, with a wrong and a right example.")
@click.argument("code", required=False)
@click.pass_context
def command(context: click.Context, code: str | None) -> None:
    """Explain the code of a fault, such as unknown-fact, or list all of them; a command's name shows its options."""
    codes = diagnostics()
    if code is None:
        click.echo("\n".join(_all(codes)))
    elif code in codes:
        click.echo("\n".join(explanation(codes[code])))
    elif code in COMMANDS:
        found = group.get_command(context, code)
        assert found is not None and context.parent is not None
        click.echo(found.get_help(click.Context(found, info_name=code, parent=context.parent)))
    else:
        hint = nearest(code, [*codes, *COMMANDS]) or "; `gatekeeper help` lists all"
        raise click.UsageError(f"there is no code `{code}`{hint}")


def _all(codes: Mapping[str, Diagnostic]) -> Iterator[str]:
    width = max(map(len, codes))
    for severity, head in _HEADS.items():
        yield click.style(f"{head}.", bold=True)
        yield from (f"  {one.code:<{width}}  {one.title}" for one in codes.values() if one.severity == severity)
        yield ""
    yield "`gatekeeper help CODE` explains one of them, with a wrong and a right example."


def explanation(one: Diagnostic) -> Iterator[str]:
    """Yield what there is to say of a code."""
    kind = "error" if one.severity == "error" else "lint"
    yield f"{click.style(one.code, bold=True)} ({kind}): {one.title}"
    yield ""
    yield from textwrap.wrap(one.means, _WIDTH)
    yield ""
    yield from textwrap.wrap(f"Why: {one.because}", _WIDTH)
    if one.wrong:
        yield from ("", click.style("Wrong:", fg="red"))
        yield from _files(one.wrong)
        yield from ("", click.style("Right:", fg="green"))
        yield from _files({name: text for name, text in one.right.items() if text != one.wrong.get(name)})
        gone = ", ".join(name for name, text in one.wrong.items() if text is not None and name not in one.right)
        if gone:
            yield f"  (without {gone})"
    if kind == "lint" and one.code != "unused-waiver":
        yield from ("", f"Where it is fine: `allow: [{{code: {one.code}, because: …}}]` beside what it is about.")


def _files(files: Mapping[str, str | None]) -> Iterator[str]:
    for name, text in files.items():
        if text is None:
            yield click.style(f"  # no {name}", dim=True)
            continue
        yield click.style(f"  # {name}", dim=True)
        yield from (f"  {line}" for line in text.splitlines())
