"""Loads and writes that end in the middle: by a kill, a full disk, a file cut short. Nothing half-done is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loader import Recipe, make_checkpoint
from tests.hostile.judge import MOST_WAIT_SECONDS

RECIPE = Recipe(family="deepseek_v3", format_name="bf16", experts=16, hidden=512, width=256)
"""12 MB in each layer with experts: more than what Python and torch take or give back by the way."""
MAKE = ("make-checkpoint", "--family", "deepseek_v3", "--format", "bf16", "--experts", "16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("interrupted") / "whole", RECIPE)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "it")


def environment(root: Path, home: Path) -> dict[str, str]:
    """Everything that a command might write goes below `home`."""
    home.mkdir(exist_ok=True)
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "GATEKEEPER_CACHE"), str(home))
    return {**os.environ, **places, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def python(code: str, *arguments: object, root: Path) -> subprocess.CompletedProcess[str]:
    """Run some lines in a process of their own, which may die of them."""
    # A fixed threshold: else glibc keeps what was freed for the next time, and that is not ours to judge.
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=root,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=MOST_WAIT_SECONDS,
    )


def state_of(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Names, sizes and times of all files: what a reader must leave as it was."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loader", *map(str, arguments)]


def kill_when(process: subprocess.Popen[bytes], files: str) -> bool:
    """Kill a process -9 as soon as it has torch and a file open whose path has `files` in it; False: it was faster."""
    deadline = time.monotonic() + MOST_WAIT_SECONDS
    place = Path("/proc") / str(process.pid)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            maps = (place / "maps").read_text()
            opened = [str(one.readlink()) for one in (place / "fd").iterdir()]
        except OSError:
            continue
        if "libtorch" in maps and (files in maps or any(files in path for path in opened)):
            process.kill()
            break
    return process.wait() == -signal.SIGKILL


@pytest.mark.hostile
def test_a_load_that_is_killed_leaves_nothing_behind(root: Path, folder: Path, tmp_path: Path) -> None:
    before, home = state_of(folder), tmp_path / "home"
    for _ in range(5):
        process = subprocess.Popen(command("load", folder), cwd=root, env=environment(root, home))
        if kill_when(process, ".safetensors"):
            break
    else:
        pytest.fail("never killed in the middle")
    assert state_of(folder) == before
    left = {path.name for path in home.rglob("*") if path.is_file()}
    assert not {name for name in left if "lock" in name or "tmp" in name}, left
    again = subprocess.run(command("load", folder, "--verify"), cwd=root, env=environment(root, home), check=False)
    assert again.returncode == 0
    assert state_of(folder) == before


@pytest.mark.hostile
def test_a_write_that_is_killed_is_not_taken_for_a_whole_checkpoint(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--hidden", "512", "--width", "256")
    for _ in range(5):
        process = subprocess.Popen(command(*MAKE, out, *sizes), cwd=root, env=environment(root, tmp_path / "home"))
        if kill_when(process, ".out."):
            break
    else:
        pytest.fail("never killed in the middle")
    assert not out.exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out."))
    read = subprocess.run(command("plan", left), cwd=root, capture_output=True, text=True, check=False)
    assert read.returncode == 1, "nor is what it was writing into"
    assert "missing" in read.stderr or "has no *.safetensors" in read.stderr or "truncated" in read.stderr
    again = subprocess.run(command(*MAKE, out, *sizes), cwd=root, check=False)
    assert again.returncode == 0 and (out / "config.json").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("no small file system can be mounted here: needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_an_error_and_stays_empty(root: Path, small_disk: Path) -> None:
    done = subprocess.run(
        command(*MAKE, "--hidden", "512", small_disk / "out"), cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: `{small_disk / 'out'}`: No space left on device; nothing is left of it, name a folder with more room "
        "or other rights\n"
    )
    assert list(small_disk.iterdir()) == []


CUT_SHORT = """
    import os, sys
    from pathlib import Path
    from gatekeeper import CheckpointError, decide, load_rules, read_facts
    from loader import build, prepare

    def resident(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) << 10

    folder, rules = Path(sys.argv[1]), load_rules()
    prepared = prepare(folder, decide(rules, read_facts(folder, rules=rules)), rules)
    build(prepared.plan, prepared.index)  # what torch takes once and keeps
    shard = folder / prepared.index.tensors[prepared.plan.layers[-1].placements[-1].key].shard
    os.truncate(shard, shard.stat().st_size - 100)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before, ours = resident("VmRSS"), resident("RssAnon")
    try:
        build(prepared.plan, prepared.index)
    except CheckpointError as error:
        kept = error  # and with it the frames that built
    size = prepared.plan.nbytes
    peak, after = resident("VmHWM") - before, resident("RssAnon") - ours
    assert peak > 0.4 * size, f"{peak} of {size}: it did not fail in the middle"
    assert after < 0.2 * size, f"{after} of {size} are still there"
    print(kept)
"""


def test_a_shard_cut_short_after_its_header_was_read_frees_what_was_built(root: Path, folder: Path) -> None:
    done = python(CUT_SHORT, folder, root=root)
    assert done.returncode == 0, done.stderr
    assert "download the shard again" in done.stdout


CUT_SHORT_WHILE_OPEN = """
    import os, sys
    from pathlib import Path
    from gatekeeper import CheckpointError, read_index
    from loader.checkpoint import Checkpoint

    index = read_index(Path(sys.argv[1]))
    names = sorted(index.tensors, key=lambda name: (index.tensors[name].shard, index.tensors[name].start))
    first = index.tensors[names[0]]
    last = max((info for info in index.tensors.values() if info.shard == first.shard), key=lambda info: info.start)
    with Checkpoint(index) as checkpoint:
        checkpoint.fetch(first.name)
        os.truncate(index.folder / first.shard, first.end)
        try:
            checkpoint.fetch(last.name).sum()
        except CheckpointError as error:
            print(error)
"""


def test_a_file_cut_short_while_open_is_an_error(root: Path, folder: Path) -> None:
    done = python(CUT_SHORT_WHILE_OPEN, folder, root=root)
    assert done.returncode == 0, done.stderr
    assert "download the shard again" in done.stdout
