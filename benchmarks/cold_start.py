"""Time `gatekeeper decide` on one config from a cold start, beside a bare import of what it is built on.

Whole processes, in rounds of one each, so that what else the machine does meets all of them alike; the ratio is taken
in each round. The digests of checked files are in a folder of their own, filled by one run before the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "corpus" / "moonshotai__Kimi-K2.5" / "config.json"
BARE = [sys.executable, "-c", "import yaml, click, structlog"]
TARGET_RATIO = 1.6


def decide(config: Path) -> list[str]:
    """Return the command as a user types it: the installed script, where there is one."""
    script = shutil.which("gatekeeper", path=str(Path(sys.executable).parent))
    start = [script] if script else [sys.executable, "-m", "gatekeeper"]
    return [*start, "decide", str(config), "--set", "parallel.tp_size=8"]


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run one process to its end."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(config: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each process in each round."""
    # As installed: with bytecode, which the first run writes where there is none.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as digests:
        runs = {
            "bare import": (BARE, environment),
            "decide": (decide(config), {**environment, "GATEKEEPER_CACHE": digests}),
            "decide, every file checked": (decide(config), {**environment, "GATEKEEPER_CACHE": "off"}),
        }
        for command, own in runs.values():
            seconds(command, own)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, (command, own) in runs.items():
                times[name].append(seconds(command, own))
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the lower quartile, the median and the upper one."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": round(low, 4), "median": round(middle, 4), "high": round(high, 4)}


def report(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return seconds of each process, and its ratio to the bare import of the same round."""
    bare = times["bare import"]
    return {
        name: {
            "seconds": quartiles(own),
            "ratio": quartiles([one / other for one, other in zip(own, bare, strict=True)]),
        }
        for name, own in times.items()
    }


def main() -> None:
    """Print the table; write it as JSON too where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json to decide on")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    found = report(measure(arguments.config.resolve(), arguments.rounds))
    print(f"{'process':<28}{'median':>8}   ratio to the bare import, quartiles")
    for name, one in found.items():
        ratio = one["ratio"]
        print(
            f"{name:<28}{one['seconds']['median'] * 1000:>5.0f} ms"
            f"   {ratio['median']:.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    print(f"the target for `decide` is {TARGET_RATIO} or less; {arguments.rounds} rounds")
    if arguments.out:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        document = {"rounds": arguments.rounds, "target": TARGET_RATIO, **machine, "processes": found}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
