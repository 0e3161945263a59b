"""`gatekeeper test`: run tables against a rule set."""

from __future__ import annotations

from pathlib import Path

import click

from gatekeeper.cli import BAD_NEWS
from gatekeeper.cli.options import json_option, print_json, rules_of, rules_option
from gatekeeper.errors import FactError
from gatekeeper.log import quiet
from gatekeeper.tables import RowResult, find_tables, read_table, run_row

DEFAULT = Path("tests/tables")


@click.command("test", short_help="Run tables of facts and expected decisions.")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[PATH]...")
@rules_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    paths: tuple[Path, ...],
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Run the tables in each PATH, a `*.table.yaml` or a folder of them (tests/tables without one).

    A table with no row, and a run with no table, is a failure.
    """
    rules = rules_of(rules_folder, overlays)
    if not paths and not DEFAULT.is_dir():
        raise click.UsageError(f"name a table or a folder of tables; there is no {DEFAULT} here")
    rows = [row for path in find_tables(list(paths) or [DEFAULT]) for row in read_table(path)]
    if not rows:
        raise FactError("nothing was tested: the tables have no rows")
    with quiet():
        results = [run_row(rules, row) for row in rows]
    failures = [result for result in results if not result.passed]
    if as_json:
        print_json([_result_json(result) for result in results])
    else:
        for result in failures:
            click.echo(f"{result.row.where}: {result.row.name}")
            for line in result.lines:
                click.echo(f"    {line}")
        click.echo(f"{len(results) - len(failures)} passed, {len(failures)} failed")
    if failures:
        context.exit(BAD_NEWS)


def _result_json(result: RowResult) -> dict[str, object]:
    return {
        "table": result.row.where.file,
        "line": result.row.where.line,
        "name": result.row.name,
        "passed": result.passed,
        "error": result.error or None,
        "mismatches": [{"key": m.key, "expected": m.expected, "actual": m.actual} for m in result.mismatches],
    }
