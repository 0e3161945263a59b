"""What verification adds to a load: pairs of loads in one process that keeps its memory, one of each pair verified.

Most of a load in a fresh process is the first touch of its memory, which varies more than verification costs, above all
on a virtual machine. Here the pages are there already, so that verification stands beside the fastest of loads.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog

from benchmarks.load_checkpoint import SHAPES, checkpoint
from benchmarks.load_contenders import ours, prepared
from loader.prepared import Prepared

KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "OMP_NUM_THREADS": "1"}
"""glibc takes all memory from one heap and gives nothing back; torch starts no threads beside those counted here."""
TARGET = 0.1


def timed(plan: Prepared, threads: int, device: str, *, verifies: bool) -> tuple[float, float]:
    """Seconds and seconds of CPU time of one load, which is freed at once."""
    start, cpu = time.perf_counter(), time.process_time()
    ours(plan, threads, device, verifies=verifies)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Print medians and quartiles of what verification adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path, help="folder for the checkpoints, 5 GB each (kimi_k25: 38 GB)")
    parser.add_argument("--shape", choices=list(SHAPES), default="int4")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if not os.environ.keys() >= KEEPS_MEMORY.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEPS_MEMORY)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    plan = prepared(checkpoint(arguments.cache, SHAPES[arguments.shape]), fused=True, device=arguments.device)
    draw, pairs = random.Random(0), []
    timed(plan, arguments.threads, arguments.device, verifies=True)  # the first one touches the memory
    for _ in range(arguments.pairs):
        order = draw.sample([False, True], 2)
        found = {verifies: timed(plan, arguments.threads, arguments.device, verifies=verifies) for verifies in order}
        pairs.append((found[False], found[True]))
    for kind, word in enumerate(("time", "CPU time")):
        added = [verified[kind] / plain[kind] - 1 for plain, verified in pairs]
        first, median, third = statistics.quantiles(added, n=4)
        seconds = statistics.median(plain[kind] for plain, _ in pairs)
        print(f"{word}: {seconds:.3f} s, verification adds {median:+.1%} (quartiles {first:+.1%} and {third:+.1%})")
    print(f"target: {TARGET:.0%} or less")


if __name__ == "__main__":
    main()
