"""Time loads of a real-shaped checkpoint beside the least that anyone must do, warm and cold, memory included.

Every load is a process of its own. In each round all contenders run once, in another order, and each is divided by the
least of the same round and state of the page cache; medians of those ratios are shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load_checkpoint import SHAPES, checkpoint
from benchmarks.load_contenders import plain_read
from loader.transfer import default_threads

CONTENDERS = {
    "least": "least",
    "fused": "least",
    "unfused": "least",
    "fused, verified": "least",
    "least of a rank": "least of a rank",
    "rank": "least of a rank",
    "fastsafetensors": "least",
}
"""Name to what it is compared with."""
ON_DEVICE = ("fused", "unfused", "fused, verified")
TARGET_RATIO, TARGET_MEMORY, TARGET_VERIFY, TARGET_DEVICE = 0.9, 1.05, 0.1, 0.8


def set_cache(folder: Path, state: str) -> None:
    """Bring all shards into the page cache (``warm``), or out of it (``cold``)."""
    if state == "warm":
        plain_read(folder, default_threads())
        return
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(name: str, folder: Path, threads: int, device: str) -> dict[str, Any]:
    """One load in a fresh process."""
    script = Path(__file__).with_name("load_contenders.py")
    command = [sys.executable, str(script), name, str(folder), "--threads", str(threads), "--device", device]
    # torch's own threads would copy beside those that are counted here.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    folder: Path, names: Sequence[str], states: Sequence[str], rounds: int, threads: int, device: str
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Of each state of the page cache and each contender what each round came to."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {state: defaultdict(list) for state in states}
    draw = random.Random(0)
    for number in range(rounds):
        for state in states:
            for name in draw.sample(list(names), len(names)):
                set_cache(folder, state)
                one = run(name, folder, threads, device)
                found[state][name].append(one)
                print(f"round {number + 1}, {state}: {name} {one['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def report(rounds: Mapping[str, Sequence[Mapping[str, Any]]], base_of: Mapping[str, str]) -> dict[str, Any]:
    """Medians of each contender; `speed` and `cpu` are ratios to its base in the same round, higher is better."""
    rows: dict[str, Any] = {}
    for name in (name for name in base_of if name in rounds):
        own = rounds[name]
        row = {
            "seconds": _median(one["seconds"] for one in own),
            "gb_per_second": _median(one["bytes"] / 1e9 / one["seconds"] for one in own),
            "bytes": own[0]["bytes"],
            "anonymous": max(one["peak"]["anonymous"] for one in own),
            "mapped": max(one["peak"]["mapped"] for one in own),
        }
        row["memory"] = row["anonymous"] / row["bytes"]
        if "limits" in own[0]:  # of a device, measured in the same process
            row["limits"] = {limit: _median(one["limits"][limit] / 1e9 for one in own) for limit in own[0]["limits"]}
            row["of_pinned"] = _median(one["bytes"] / one["seconds"] / one["limits"]["pinned copy"] for one in own)
        if base_of[name] in rounds:
            pairs = list(zip(rounds[base_of[name]], own, strict=True))
            row["speed"] = _median(base["seconds"] / one["seconds"] for base, one in pairs)
            row["cpu"] = _median(base["cpu_seconds"] / one["cpu_seconds"] for base, one in pairs)
        rows[name] = row
    if "fused, verified" in rows and "fused" in rows:
        pairs = list(zip(rounds["fused"], rounds["fused, verified"], strict=True))
        row = rows["fused, verified"]
        row["verify"] = _median(one["seconds"] / base["seconds"] - 1 for base, one in pairs)
        row["verify_cpu"] = _median(one["cpu_seconds"] / base["cpu_seconds"] - 1 for base, one in pairs)
    return rows


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)


def lines(state: str, rows: Mapping[str, Mapping[str, Any]], device: str) -> list[str]:
    """A table for README.md."""
    answer = [
        f"| {state} | median | GB/s | speed | CPU | anonymous | mapped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("speed", "cpu")]
        memory = f"{row['memory']:.3f}" if device == "cpu" else f"{row['anonymous'] / 1e9:.2f} GB"
        cells = [name, f"{row['seconds']:.2f} s", f"{row['gb_per_second']:.2f}", *ratios, memory]
        answer.append("| " + " | ".join([*cells, f"{row['mapped'] / 1e9:.2f} GB"]) + " |")
    if "verify" in rows.get("fused, verified", {}):
        row = rows["fused, verified"]
        answer.append(
            f"\nverification adds {row['verify']:.1%} of the time and {row['verify_cpu']:.1%} of the CPU time"
        )
    return answer


def main() -> None:
    """Print the tables; write the figures as JSON too where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path, help="folder for the checkpoints, 5 GB each (kimi_k25: 38 GB)")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: int4 and bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: those that the loader takes")
    parser.add_argument("--state", choices=["warm", "cold"], action="append", help="default: both; on a device: warm")
    parser.add_argument("--device", default="cpu", help="cuda: beside the rate of pinned copies to it")
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="leave the others out")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.threads = arguments.threads or default_threads(staged=not on_cpu)
    names = [n for n in arguments.only or CONTENDERS if on_cpu or n in ON_DEVICE]
    if importlib.util.find_spec("fastsafetensors") is None and "fastsafetensors" in names:
        print("fastsafetensors is not installed here, so it is left out", file=sys.stderr)
        names.remove("fastsafetensors")
    states = arguments.state or (["warm", "cold"] if on_cpu else ["warm"])
    document: dict[str, Any] = {
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "device": arguments.device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "shapes": {},
    }
    for shape in arguments.shape or ["int4", "bf16"]:
        folder = checkpoint(arguments.cache, SHAPES[shape])
        found = measure(folder, names, states, arguments.rounds, arguments.threads, arguments.device)
        tables = {state: report(found[state], CONTENDERS) for state in states}
        document["shapes"][shape] = tables
        print(f"\n## {shape}, {arguments.threads} threads, {arguments.rounds} rounds\n")
        for state, rows in tables.items():
            print("\n".join(lines(state, rows, arguments.device)) + "\n")
        for name, row in tables[states[0]].items() if not on_cpu else ():
            limits = ", ".join(f"{limit} {rate:.1f} GB/s" for limit, rate in row["limits"].items())
            print(f"{name}: {row['of_pinned']:.2f} of a pinned copy, the target is {TARGET_DEVICE}; {limits}")
    print(
        f"targets: speed of fused, unfused and rank {TARGET_RATIO} or more, anonymous memory {TARGET_MEMORY} of the "
        f"weights or less, verification {TARGET_VERIFY:.0%} of the time or less"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
