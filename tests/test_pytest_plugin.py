"""The plugin: each row of a table is a test, named by the row; what is wrong is said without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import files

pytest_plugins = ["pytester"]

TABLE = """\
table: fused
rows:
  - {name: four are enough, facts: {model.n: 4}, expect: {state: on}}
  - {name: three are not, facts: {model.n: 3}, expect: {state: on}}
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    for name, text in files().items():
        path = pytester.path / "rules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (pytester.path / "x.table.yaml").write_text(TABLE, encoding="utf-8")
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "gatekeeper.pytest_plugin", "--gatekeeper-rules", "rules", *arguments)


def test_each_row_is_a_test(project: pytest.Pytester) -> None:
    done = run(project, "-v")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*x.table.yaml::four are enough PASSED*", "*x.table.yaml::three are not FAILED*"])
    done.stdout.fnmatch_lines(["*x.table.yaml:4*: three are not", "state: expected on, got off"])
    assert "Traceback" not in done.stdout.str()


def test_a_row_is_picked_by_its_name(project: pytest.Pytester) -> None:
    run(project, "-k", "four").assert_outcomes(passed=1, deselected=1)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("x.table.yaml", "table: fused\nrows: []\n", "*no-rows*"),
        ("x.table.yaml", "table: [fused\n", "*syntax*"),
        ("rules/ruleset.yaml", "name: [\n", "*ruleset.yaml:*syntax*"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    project: pytest.Pytester, file: str, text: str, message: str
) -> None:
    Path(project.path / file).write_text(text, encoding="utf-8")
    done = run(project)
    assert done.ret != 0
    done.stdout.fnmatch_lines([message])
    assert "Traceback" not in done.stdout.str()
    assert "gatekeeper/load.py" not in done.stdout.str()


def test_without_the_option_the_shipped_rules_are_used(project: pytest.Pytester) -> None:
    done = project.runpytest_inprocess("-p", "gatekeeper.pytest_plugin")
    done.stdout.fnmatch_lines(["*unknown feature `fused`*"])
