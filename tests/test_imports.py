"""Who imports whom: the gatekeeper answers without torch, and the loader keeps to its public names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gatekeeper
from tests.hostile import corpus

HEAVY = ("torch", "safetensors", "numpy", "loader")

# Runs the command line as the console script does, then tells on the error stream what it had to import.
RUN = f"""
import json, sys
from gatekeeper.cli import main
try:
    main()
    status = 0
except SystemExit as end:
    status = end.code
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
sys.exit(status)
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def test_importing_gatekeeper_imports_nothing_heavy(root: Path) -> None:
    code = f"import sys, gatekeeper; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = python("-c", code, cwd=root)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("model", ["moonshotai__Kimi-K2.5", "deepseek-ai__DeepSeek-V3"])
def test_decide_on_a_config_answers_without_torch(root: Path, model: str) -> None:
    config = root / "tests" / "corpus" / model / "config.json"
    options = ("--platform", "mi355x", "--set", "parallel.tp_size=8", "--json")
    done = python("-c", RUN, "decide", str(config), *options, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout), "an answer was printed"
    assert json.loads(done.stderr.splitlines()[-1]) == []


def imported_names(file: Path) -> list[tuple[int, str]]:
    """Every name of gatekeeper that `file` imports, with its line: `gatekeeper.x` for `from gatekeeper import x`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "gatekeeper" and name != "gatekeeper"]


def test_loader_imports_public_names_only(root: Path) -> None:
    # Finer than the import contract: `from gatekeeper import decide` is a name, though a module is called so too.
    public = {f"gatekeeper.{name}" for name in gatekeeper.__all__}
    # How a decision looks to a person is the same in both commands.
    public |= {"gatekeeper.cli.render.COLOURS", "gatekeeper.cli.render.decision_lines"}
    faults = [
        f"{file.relative_to(root)}:{line}: {name} is not in gatekeeper.__all__"
        for file in sorted((root / "loader").rglob("*.py"))
        for line, name in imported_names(file)
        if name not in public
    ]
    assert not faults, "\n".join(faults)


def test_public_names_are_there() -> None:  # ruff sorts them
    assert len(set(gatekeeper.__all__)) == len(gatekeeper.__all__)
    assert [name for name in gatekeeper.__all__ if not hasattr(gatekeeper, name)] == []


def test_every_public_name_of_the_loader_is_found(root: Path) -> None:
    """Also where the module of that name (`build`, `verify`) was imported before."""
    code = (
        "import loader.build, loader.verify, loader.make_checkpoint, types, loader;"
        "found = [getattr(loader, name) for name in loader.__all__];"
        "print([each for each in found if isinstance(each, types.ModuleType)], hasattr(loader, 'nonsense'))"
    )
    done = python("-c", code, cwd=root)
    assert (done.returncode, done.stdout.strip()) == (0, "[] False"), done.stderr


def load_or_plan(root: Path, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit status, errors, and which heavy modules were imported."""
    done = python("-c", RUN.replace("gatekeeper.cli", "loader.cli"), *map(str, arguments), cwd=root)
    return done.returncode, done.stderr, json.loads(done.stderr.splitlines()[-1])


def test_a_torn_checkpoint_is_refused_without_torch(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    code, _, heavy = load_or_plan(root, "load", tmp_path)
    assert (code, heavy) == (1, ["loader"])


@pytest.mark.parametrize("platform", ["mi355x", "h200"])
def test_a_checkpoint_is_planned_without_torch(root: Path, tmp_path: Path, platform: str) -> None:
    """Also for a device of which settings were measured."""
    folder = corpus.sound(tmp_path / "checkpoint")
    code, errors, heavy = load_or_plan(root, "plan", folder, "--platform", platform)
    assert (code, heavy) == (0, ["loader"]), errors


@pytest.mark.parametrize("name", ["offsets-overlap", "shard-of-another-model"])
def test_what_does_not_fit_a_plan_is_refused_without_torch(root: Path, tmp_path: Path, name: str) -> None:
    code, errors, heavy = load_or_plan(root, "load", corpus.write(name, tmp_path))
    assert (code, heavy) == (1, ["loader"])
    assert "header: " in errors
