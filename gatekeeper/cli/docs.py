"""`gatekeeper docs`: the gates of a rule set as Markdown pages."""

from __future__ import annotations

from pathlib import Path

import click

from gatekeeper.cli import BAD_NEWS
from gatekeeper.cli.options import rules_of, rules_option
from gatekeeper.data import data_folder
from gatekeeper.docs import gate_pages
from gatekeeper.written import differences, write_folder

BY = "gatekeeper docs"


@click.command("docs", short_help="Write the gates of a rule set as Markdown pages.")
@click.argument("out", type=click.Path(path_type=Path))
@rules_option
@click.option(
    "--source", default="", metavar="WHERE", help="Where readers find the rules: an address, or a path from OUT."
)
@click.option(
    "--check", "only_check", is_flag=True, help="Write nothing; say what is out of date, and exit 1 if anything."
)
@click.option("--force", is_flag=True, help="Write beside files that this command did not write.")
def command(
    out: Path, rules_folder: Path | None, overlays: tuple[Path, ...], source: str, only_check: bool, force: bool
) -> None:
    """Write an index, a page a feature and a page a gate to the folder OUT, with pages of facts and families."""
    rules = rules_of(rules_folder, overlays)
    pages = gate_pages(rules, folder=rules_folder or data_folder("rules"), source=source)
    if only_check:
        found = differences(out, pages, by=BY)
        for line in found:
            click.echo(f"{out}: {line}; run `gatekeeper docs` again")
        raise SystemExit(BAD_NEWS if found else 0)
    write_folder(out, pages, by=BY, force=force)
    click.echo(f"{out}: {len(pages)} pages, {len(rules.features)} features")
