"""The runs behind the tables of kernels in benchmarks/README.md, on all GPUs of this machine side by side.

    python benchmarks/peers/fetch.py
    python benchmarks/kernels.py [OUT] [--only SHAPE:TP[:FORMAT],…] [--tables DIR] [--peers-dir .peers]
    python scripts/kernel_figures.py --plots

Each run is a `moe-loader bench` of its own on one GPU; OUT (`benchmarks/results`) gets its figures as JSON, and what it
printed beside them. Only a run that came to its end, its peer in it, replaces figures of before; delete files of other
names that have the same points. All GPUs are of one kind. Exit 1 where a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

PEERS = {("bf16", "fp8_block"): "sglang-triton-tuned", ("int4_g32", "mxfp4"): "marlin", ("int4_g32",): "marlin"}
"""What formats are compared with; MXFP4 with int4, so that one run has both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One `moe-loader bench`."""

    shape: str
    tp: int
    formats: tuple[str, ...]

    def name(self, device: str) -> str:
        """Of its files: ``h200-kimi-k2.5-tp8-bf16-fp8_block`` for an ``NVIDIA H200``."""
        kind = "-".join(device.lower().removeprefix("nvidia ").split())
        return "-".join([kind, self.shape, f"tp{self.tp}", *self.formats])

    def command(self, peers_dir: Path, tables: Path | None, json_file: Path) -> list[str]:
        """As a person would type it behind `moe-loader`."""
        where = ["--shape", self.shape, "--tp", str(self.tp), "--format", ",".join(self.formats)]
        own = [] if tables is None else ["--tables", str(tables)]
        peers = ["--peers", PEERS[self.formats], "--peers-dir", str(peers_dir)]
        return ["bench", *where, *own, *peers, "--json", str(json_file)]


PAIRS = [formats for formats in PEERS if len(formats) == 2]
RUNS = [
    Run(shape=shape, tp=tp, formats=formats)
    for tp in (1, 8)  # the longest first
    for shape, some in (("kimi-k2.5", PAIRS), ("deepseek-v3", PAIRS), ("kimi-k2.5-routed", [("int4_g32",)]))
    for formats in some
]


def run_all(runs: Sequence[Run], gpus: Sequence[str], device: str, options: argparse.Namespace) -> list[str]:
    """Each GPU takes the next run when it is done with one; the names of those that failed."""
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def one(run: Run) -> bool:
        gpu, name, started = free.get(), run.name(device), time.monotonic()
        log, partial = options.out / f"{name}.log", options.out / f"{name}.partial.json"
        asked = run.command(options.peers_dir, options.tables, partial)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        try:
            with log.open("w", encoding="utf-8") as stream:
                done = subprocess.run(
                    [sys.executable, "-m", "loader", *asked], env=environment, stdout=stream, stderr=stream, check=False
                )
        finally:
            free.put(gpu)
        trouble = f"exit {done.returncode}" if done.returncode else missing(partial, PEERS[run.formats])
        if not trouble:
            partial.replace(options.out / f"{name}.json")
        how = f"failed ({trouble}), see {log}" if trouble else "done"
        print(f"GPU {gpu}: {name}: {how}, {time.monotonic() - started:.0f} s", flush=True)
        return not trouble

    with ThreadPoolExecutor(len(gpus)) as pool:
        return [run.name(device) for run, done in zip(runs, pool.map(one, runs), strict=True) if not done]


def missing(figures: Path, peer: str) -> str:
    """Why these are no comparison with `peer`; empty where they are one."""
    points = json.loads(figures.read_text(encoding="utf-8"))["points"]
    failed = [point["absent"][peer] for point in points if point["absent"].get(peer, "").startswith("failed")]
    if failed:
        return f"{peer} {failed[0]}"
    reasons = [point["absent"][peer] for point in points if peer in point["absent"]]
    return f"{peer} did not run: {reasons[0]}" if len(reasons) == len(points) else ""


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]


def chosen(only: str) -> list[Run]:
    """The runs of ``kimi-k2.5:8,deepseek-v3:1:bf16,…``, all for nothing; raises `SystemExit` for what is not there."""
    names = {run: {f"{run.shape}:{run.tp}", *(f"{run.shape}:{run.tp}:{each}" for each in run.formats)} for run in RUNS}
    known = set().union(*names.values())
    wanted = set(only.split(",")) if only else known
    if unknown := sorted(wanted - known):
        raise SystemExit(f"--only: there is no `{unknown[0]}`; there are {', '.join(sorted(known))}")
    return [run for run in RUNS if names[run] & wanted]


def main() -> None:
    """Run what was asked for, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", default=Path("benchmarks/results"), help="folder")
    parser.add_argument(
        "--only",
        default="",
        metavar="SHAPE:TP[:FORMAT],…",
        help="such as kimi-k2.5:8,deepseek-v3:1:bf16, which runs fp8_block with it",
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="folder of settings; default: the shipped ones")
    parser.add_argument(
        "--peers-dir", type=Path, metavar="DIR", default=Path(".peers"), help="what benchmarks/peers/fetch.py made"
    )
    options = parser.parse_args()
    runs = chosen(options.only)
    if not (options.peers_dir / "manifest.json").is_file():
        raise SystemExit(f"there are no peers in `{options.peers_dir}`: run `python benchmarks/peers/fetch.py` first")
    gpus = visible_gpus()
    if not gpus:
        raise SystemExit("there is no GPU here; kernels are timed where they run")
    import torch

    device, *others = sorted({torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())})
    if others:
        raise SystemExit(f"these GPUs differ ({device}, {', '.join(others)}); choose by CUDA_VISIBLE_DEVICES")
    options.out.mkdir(parents=True, exist_ok=True)
    if failed := run_all(runs, gpus, device, options):
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
