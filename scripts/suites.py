"""Run the slow suites of tests/suites.yaml, each within its budget, and close with one line that counts them."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
State = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One entry of tests/suites.yaml."""

    name: str
    summary: str
    budget: float
    marker: str | None = None
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    requirements: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one suite; `reason` is empty where it passed."""

    suite: str
    state: State
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"suite {self.suite}: {self.state}{took}" + (f": {self.reason}" if self.reason else "")


def read_suites(path: Path) -> tuple[Suite, ...]:
    """Read the suites in file order. Raises ValueError for an entry that is neither a marker nor a command, or both."""
    suites = tuple(
        Suite(**{**entry, "command": tuple(entry.get("command", ()))})
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["suites"]
    )
    for suite in suites:
        if bool(suite.marker) == bool(suite.command):
            raise ValueError(f"suite `{suite.name}` must have either a marker or a command")
    if len({suite.name for suite in suites}) < len(suites):
        raise ValueError("two suites have one name")
    return suites


def _needs_python(specifier: str) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    return "" if SpecifierSet(specifier).contains(version) else f"needs Python {specifier}, this is {version}"


def _needs_module(name: str) -> str:
    return "" if importlib.util.find_spec(name) else f"needs the Python module {name}"


def _needs_program(name: str) -> str:
    return "" if shutil.which(name) else f"needs the program {name}"


def _needs_device(kind: str) -> str:
    code = f"import sys, torch; sys.exit(0 if torch.get_device_module({kind!r}).is_available() else 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return "" if done.returncode == 0 else f"needs a {kind} device, and there is none here"


NEEDS: Mapping[str, Callable[[str], str]] = {
    "python": _needs_python,
    "module": _needs_module,
    "program": _needs_program,
    "device": _needs_device,
}


def obstacle(suite: Suite) -> str:
    """Say why `suite` can't run on this machine; empty where it can. Raises KeyError for an unknown kind of need."""
    return "; ".join(filter(None, (NEEDS[kind](value) for kind, value in suite.needs.items())))


def install(requirements: Path) -> tuple[Path, str]:
    """Install exact pins into a folder of their own; return the folder, and pip's last words where it failed."""
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = Path(sys.prefix) / "suites" / f"{requirements.stem}-{digest}"
    if folder.is_dir():
        return folder, ""
    # Made under another name and moved when whole, so that a stopped install is never taken for a finished one.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--target", str(partial), "-r", str(requirements)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        words = [line for line in done.stdout.splitlines() if line.strip()]
        return folder, words[-1] if words else f"pip exited with {done.returncode}"
    partial.rename(folder)
    return folder, ""


def run_within(command: Sequence[str], environment: Mapping[str, str], budget: float) -> int | None:
    """Run a command in a process group of its own; return its exit status, or None where it outran `budget` seconds."""
    with subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The whole group, also after a normal end: a suite leaves nothing running.
            _end_group(process.pid)


def _end_group(group: int) -> None:
    for sign, grace in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(group, sign)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(grace)


def judge_report(report: Path) -> tuple[State, str]:
    """Read what pytest counted: a suite that ran no test has failed, one that skipped all of them is skipped."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return "failed", "pytest left no report"
    if not cases:
        return "failed", "it has no test"
    skips = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    if len(skips) == len(cases):
        return "skipped", skips[0]
    return "passed", ""


def run_suite(suite: Suite) -> Result:
    """Run one suite from what it needs to what came of it."""
    if reason := obstacle(suite):
        return Result(suite=suite.name, state="skipped", reason=reason)
    environment = {**os.environ, **suite.environment}
    if suite.requirements:
        folder, trouble = install(ROOT / suite.requirements)
        if trouble:
            # On a laptop without a network that is no fault of the code; where CI runs it would hide one.
            state: State = "failed" if os.environ.get("CI") == "true" else "skipped"
            return Result(suite=suite.name, state=state, reason=f"can't install {suite.requirements}: {trouble}")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = suite.command
        if suite.marker:
            spread = ("-n", str(suite.processes)) if suite.processes > 1 else ()
            command = (sys.executable, "-m", "pytest", "-q", *spread, "-m", suite.marker, f"--junitxml={report}")
        print(f"\n== {suite.name}: {suite.summary}\n$ {shlex.join(command)}", flush=True)
        began = time.monotonic()
        status = run_within(command, environment, suite.budget)
        seconds = time.monotonic() - began
        if status is None:
            return Result(
                suite=suite.name, state="failed", seconds=seconds, reason=f"over its budget of {suite.budget:.0f} s"
            )
        if status:
            reason = "it has no test" if suite.marker and status == 5 else f"exit status {status}"
            return Result(suite=suite.name, state="failed", seconds=seconds, reason=reason)
        verdict, reason = judge_report(report) if suite.marker else ("passed", "")
        return Result(suite=suite.name, state=verdict, seconds=seconds, reason=reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all suites, or those named; 0 where none failed, 1 where one did, 2 for a name that isn't there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SUITE", help="suites to run; all where none is named")
    parser.add_argument("--file", type=Path, default=ROOT / "tests" / "suites.yaml", help="where they are declared")
    options = parser.parse_args(arguments)
    suites: dict[str, Any] = {suite.name: suite for suite in read_suites(options.file)}
    if missing := sorted(set(options.names) - set(suites)):
        parser.error(f"no suite `{missing[0]}`; there are {', '.join(suites)}")

    results = []
    for name in options.names or suites:
        result = run_suite(suites[name])
        results.append(result)
        print(result, flush=True)

    print("\n== slow suites")
    for result in results:
        print(result)
    counts = {state: sum(result.state == state for result in results) for state in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()), flush=True)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
