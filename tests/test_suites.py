"""The runner of slow suites: budgets end what hangs, and nothing is passed over in silence."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def suites(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("suites", root / "scripts" / "suites.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(folder: Path, *entries: str) -> Path:
    file = folder / "suites.yaml"
    file.write_text("suites:\n" + "".join(f"  - {entry}\n" for entry in entries))
    return file


def test_the_shipped_suites_can_be_read(suites: ModuleType, root: Path) -> None:
    shipped = suites.read_suites(root / "tests" / "suites.yaml")
    assert {"properties", "conformance", "packaging", "demo"} <= {suite.name for suite in shipped}
    # CI has 90 minutes for everything.
    assert sum(suite.budget for suite in shipped) <= 3600
    assert [suite.name for suite in shipped if not set(suite.needs) <= set(suites.NEEDS)] == []
    assert [suite.name for suite in shipped if suite.requirements and not (root / suite.requirements).is_file()] == []


def test_passed_failed_and_skipped_are_counted(
    suites: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path,
        '{name: fine, summary: s, command: ["true"], budget: 20}',
        '{name: wrong, summary: s, command: ["false"], budget: 20}',
        '{name: elsewhere, summary: s, command: ["true"], budget: 20, needs: {program: no-such-program}}',
    )
    assert suites.main(["--file", str(file)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"
    assert "suite elsewhere: skipped: needs the program no-such-program" in lines


def test_only_passes_is_success(suites: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, '{name: fine, summary: s, command: ["true"], budget: 20}')
    assert suites.main(["--file", str(file), "fine"]) == 0
    assert capfd.readouterr().out.endswith("1 passed, 0 failed, 0 skipped\n")


def test_over_budget_is_a_failure_and_leaves_no_process(
    suites: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sign = tmp_path / "alive"
    # A grandchild: ending the command alone would leave it running.
    script = tmp_path / "hangs.sh"
    script.write_text(f"(sleep 4; touch {sign}) &\nwait\n")
    file = write(tmp_path, f'{{name: hangs, summary: s, command: [bash, "{script}"], budget: 0.5}}')
    began = time.monotonic()
    assert suites.main(["--file", str(file)]) == 1
    assert "over its budget" in capfd.readouterr().out
    time.sleep(max(0.0, 5 - (time.monotonic() - began)))
    assert not sign.exists()


def report(folder: Path, cases: str) -> Path:
    file = folder / "report.xml"
    file.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return file


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ("", ("failed", "it has no test")),
        ('<testcase name="a"/>', ("passed", "")),
        ('<testcase name="a"><skipped message="no device"/></testcase>', ("skipped", "no device")),
        ('<testcase name="a"><skipped message="no device"/></testcase><testcase name="b"/>', ("passed", "")),
    ],
)
def test_a_suite_that_tested_nothing_has_not_passed(
    suites: ModuleType, tmp_path: Path, cases: str, verdict: tuple[str, str]
) -> None:
    assert suites.judge_report(report(tmp_path, cases)) == verdict


def test_an_entry_is_a_marker_or_a_command(suites: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`both` must have either"):
        suites.read_suites(write(tmp_path, '{name: both, summary: s, budget: 1, marker: m, command: ["true"]}'))


def test_an_unknown_suite_is_wrong_usage(suites: ModuleType, root: Path) -> None:
    with pytest.raises(SystemExit) as end:
        suites.main(["no-such-suite"])
    assert end.value.code == 2
