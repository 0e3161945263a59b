"""`gatekeeper schema`: JSON Schemas for editors, which know the facts and names of a rule set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from gatekeeper.cli.options import rules_of, rules_option
from gatekeeper.data import data_folder
from gatekeeper.editor_schema import editor_schemas
from gatekeeper.written import write_folder


@click.command("schema", short_help="Write JSON Schemas with which an editor knows every fact and name.")
@click.argument("out", type=click.Path(path_type=Path))
@rules_option
@click.option("--force", is_flag=True, help="Write beside files that this command did not write.")
def command(out: Path, rules_folder: Path | None, overlays: tuple[Path, ...], force: bool) -> None:
    """Write a schema of each kind of file to the folder OUT, for yaml-language-server and what understands the same.

    Fact names, their documentation and values, and the names of features, gates, requirements and conditions are those
    of the rule set: run this again after a change of them.
    """
    if os.path.realpath(out) == os.path.realpath(data_folder("schema")):  # Path's own raises for a loop of links
        raise click.UsageError(f"`{out}` holds the schemas that this program itself reads; give another folder")
    rules = rules_of(rules_folder, overlays)
    files = {
        f"{kind}.schema.json": json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
        for kind, schema in editor_schemas(rules).items()
    }
    write_folder(out, files, by="gatekeeper schema", force=force)
    click.echo(f"{out}: {len(files)} schemas, {len(rules.catalogue)} facts of {rules.name} {rules.version}")
