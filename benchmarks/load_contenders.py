"""One load in a process of its own: ``python benchmarks/load_contenders.py NAME FOLDER ...`` prints a line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog
import torch
from torch import Tensor

from gatekeeper import Facts, decide, load_rules, read_facts
from loader.checkpoint import bytes_of
from loader.load import load_prepared
from loader.prepared import Prepared, prepare
from loader.transfer import PIECE_BYTES

RANK, TP_SIZE = 3, 8
SAMPLE_SECONDS = 0.01


class Memory:
    """Most anonymous and mapped bytes of this process beyond those at the start, from /proc/self/status."""

    def __enter__(self) -> Memory:
        self._start, self._most, self._over = _resident(), _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        now = _resident()
        self._most = {name: max(most, now[name]) for name, most in self._most.items()}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by ``anonymous`` and ``mapped``."""
        return {name: most - self._start[name] for name, most in self._most.items()}


def _resident() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[field].split()[0]) * 1024 for name, field in (("anonymous", "RssAnon"), ("mapped", "RssFile"))
    }


def prepared(folder: Path, *, fused: bool, rank: int | None = None, device: str = "cpu") -> Prepared:
    """Decide and plan as the command does; fusion is forced, for no gate knows a model of so few experts.

    For a GPU it is decided for this machine, so that verification compares the backend that would serve there.
    """
    rules = load_rules()
    request = "server.enforce_shared_experts_fusion" if fused else "server.disable_shared_experts_fusion"
    settings: dict[str, Any] = {request: True, "parallel.tp_size": TP_SIZE if rank is not None else 1}
    platform = "mi355x" if device == "cpu" else "here"
    facts: Facts = read_facts(folder, platform=platform, set=settings, rules=rules)
    found = prepare(folder, decide(rules, facts), rules, facts, rank)
    assert {layer.shared for layer in found.plan.layers} == {"slot" if fused else "separate"}
    return found


# -- the least that anyone must do ----------------------------------------------------------------------------------


def least(folder: Path, threads: int, rank: int | None = None) -> list[Tensor]:
    """Map every shard, allocate stacked tensors, copy each tensor into its place; no comparison, no account."""
    from safetensors.torch import load_file

    mapped = {}
    for shard in sorted(folder.glob("*.safetensors")):
        mapped |= load_file(shard)
    stacks, copies = _places(mapped.items(), rank)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: pair[0].copy_(pair[1]), copies))
    return stacks


def _places(
    tensors: Iterable[tuple[str, Tensor]], rank: int | None
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Stacked tensors, allocated, and what goes into which of their rows."""
    members: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    stacks, copies = [], []
    for name, tensor in tensors:
        module, _, suffix = name.rpartition(".")
        block, projection = module.rsplit(".", 1)
        if suffix == "weight_shape":
            continue
        if projection not in ("gate_proj", "up_proj", "down_proj"):
            stacks.append(torch.empty_like(tensor))
            copies.append((stacks[-1], tensor))
            continue
        if rank is not None:
            tensor = tensor.chunk(TP_SIZE, dim=1 if projection == "down_proj" else 0)[rank]
        stack, _, expert = block.rpartition(".") if block[-1].isdigit() else (block, "", "0")
        kind = "w2" if projection == "down_proj" else "w13"
        members[f"{stack}.{kind}.{suffix}"][int(expert)][projection] = tensor
    for experts in members.values():
        parts = [experts[e] for e in range(len(experts))]
        rows = sum(len(t) for t in parts[0].values())
        some = next(iter(parts[0].values()))
        stack = torch.empty((len(parts), rows, some.shape[1]), dtype=some.dtype)
        stacks.append(stack)
        for slot, projections in zip(stack, parts, strict=True):
            ordered = sorted(projections, key=("gate_proj", "up_proj", "down_proj").index)
            copies += zip(slot.chunk(len(projections)), (projections[each] for each in ordered), strict=True)
    return stacks, copies


def fastsafetensors(folder: Path, threads: int) -> list[Tensor]:
    """Read a shard with fastsafetensors, then copy its tensors into stacked ones on the same number of threads."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
    from safetensors import safe_open

    shapes: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            shapes |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # mapped, not read
    stacks, copies = _places(shapes.items(), None)
    place = {source.data_ptr(): target for target, source in copies}
    homes = {name: place.get(tensor.data_ptr()) for name, tensor in shapes.items()}
    with ThreadPoolExecutor(threads) as pool:
        for shard in sorted(folder.glob("*.safetensors")):
            reader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True, max_threads=threads)
            reader.add_filenames({0: [str(shard)]})
            buffers = reader.copy_files_to_device()
            pairs = [(homes[n], buffers.get_tensor(n)) for n in reader.get_keys() if homes[n] is not None]
            list(pool.map(lambda pair: pair[0].copy_(pair[1]), pairs))
            del pairs
            buffers.close()
            reader.close()
    return stacks


# -- ours -----------------------------------------------------------------------------------------------------------


def ours(plan: Prepared, threads: int, device: str, *, verifies: bool = False) -> list[Tensor]:
    """Build the layers of a plan that stands."""
    layers, _ = load_prepared(plan, device, threads=threads, verifies=verifies)
    if device != "cpu":
        torch.cuda.synchronize()
    return [parameter for layer in layers for parameter in layer.parameters()]


def pinned_copy(device: str, nbytes: int = 1 << 30, repeats: int = 8) -> float:
    """Bytes a second from pinned memory of the host to the device, the best of several copies."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - start))
    return best


def plain_read(folder: Path, threads: int, *, mapped: bool = False) -> float:
    """Bytes a second from the files into one small buffer a thread: no load is faster, whatever it does with them."""

    def read(shard: Path) -> int:
        nbytes, buffer = shard.stat().st_size, torch.empty(PIECE_BYTES, dtype=torch.uint8)
        if mapped:
            pages = torch.from_file(str(shard), size=nbytes, dtype=torch.uint8)
            for page in pages.split(PIECE_BYTES):
                buffer[: len(page)].copy_(page)
        else:
            with shard.open("rb", buffering=0) as file:
                while file.readinto(bytes_of(buffer)):
                    pass
        return nbytes

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        return sum(pool.map(read, folder.glob("*.safetensors"))) / (time.perf_counter() - start)


Load = Callable[[], list[Tensor]]


@contextmanager
def planning(found: dict[str, Any]) -> Iterator[None]:
    """Note how long the plan took, which is no part of the load."""
    start = time.perf_counter()
    yield
    found["plan_seconds"] = time.perf_counter() - start


def contender(name: str, folder: Path, threads: int, device: str, found: dict[str, Any]) -> Load:
    """The load of that name, with everything done that is not timed."""
    if name == "least":
        return lambda: least(folder, threads)
    if name == "least of a rank":
        return lambda: least(folder, threads, RANK)
    if name == "fastsafetensors":
        import fastsafetensors as _  # noqa: F401  # its import is not part of the load

        return lambda: fastsafetensors(folder, threads)
    with planning(found):
        rank = RANK if name.startswith("rank") else None
        plan = prepared(folder, fused=name != "unfused", rank=rank, device=device)
    return lambda: ours(plan, threads, device, verifies=name.endswith("verified"))


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    found: dict[str, Any] = {}
    if arguments.device != "cpu":
        torch.empty(1, device=arguments.device)  # the context of the device is no part of the load
    load = contender(arguments.name, arguments.folder, arguments.threads, arguments.device, found)
    with Memory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        tensors = load()
        found["seconds"], found["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
    found["bytes"] = sum(tensor.nbytes for tensor in tensors)
    if arguments.device != "cpu":
        found["limits"] = {
            "pinned copy": pinned_copy(arguments.device),
            "plain read": plain_read(arguments.folder, arguments.threads),
            "plain read of a mapping": plain_read(arguments.folder, arguments.threads, mapped=True),
        }
    print(json.dumps(found | {"peak": memory.peak}))


if __name__ == "__main__":
    main()
