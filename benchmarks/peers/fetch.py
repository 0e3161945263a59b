"""Take the kernels of other engines out of their wheels, for `moe-loader bench`: a few files of a gigabyte.

    python benchmarks/peers/fetch.py [OUT] [--find-links FOLDER]

Needs Python 3.11 with pip and lzma, nothing else. OUT (`.peers`, which git ignores) appears when everything is in it:
the members named in `WHEELS`, large ones packed with xz, and `manifest.json` with the wheel and the sha256 of each.
Interrupted, it goes on where it was. The wheels are got with `pip download` for Linux on x86-64 and Python 3.12,
whatever this machine is, and removed when their members are out; `--find-links` takes them from a folder and asks no
index. Nothing of them is imported or run here; `loader/bench/fetched.py` is what reads the folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MOST_BYTES = 60_000_000
"""What OUT may hold: it is copied to the machine that has the GPU."""
PACKED = 1_000_000
"""Members as large as this are kept packed."""
_RUNNER = "sglang/srt/layers/moe/moe_runner/triton_utils"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel, and what is wanted of it."""

    requirement: str
    """``sglang==0.5.23``"""
    sha256: str
    """Of the wheel for Linux on x86-64: a newer file under the same name is refused."""
    size: int
    """Bytes: what must be free on the disk."""
    members: tuple[str, ...]
    """Names, or patterns of `fnmatch`; each must be there."""

    @property
    def name(self) -> str:
        """``sglang``"""
        return self.requirement.partition("==")[0]


WHEELS = (
    Wheel(
        requirement="sglang==0.5.23",
        sha256="8d257a319395b322bb1be327d05e5528859358153c8563b04c0a4a3c8af164b6",
        size=39_046_590,
        members=(
            "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
            "sglang/kernels/ops/moe/moe_align_small_numel.py",
            f"{_RUNNER}/*.py",
            f"{_RUNNER}/configs/*device_name=NVIDIA_H100_80GB_HBM3*.json",
            f"{_RUNNER}/configs/*device_name=NVIDIA_H200*.json",
        ),
    ),
    Wheel(
        requirement="sglang-kernel==0.4.4",
        sha256="558bc7035e3c0a795e8c3eca3cc29e189c7d29f1db2471a0a71b9156a8ee7fa1",
        size=615_071_908,
        members=("sgl_kernel/sm90/common_ops.abi3.so",),
    ),
    Wheel(
        requirement="vllm==0.33.0",
        sha256="4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa",
        size=336_361_138,
        members=("vllm/_moe_C_stable_libtorch.abi3.so", "vllm/scalar_type.py"),
    ),
)

Download = Callable[[Wheel, Path], None]
"""Puts one wheel into a folder."""


class FetchError(Exception):
    """It could not be done; the message says what to do about it."""


def fetch(
    out: Path, *, download: Download, wheels: Sequence[Wheel] = WHEELS, say: Callable[[str], None] = print
) -> int:
    """Fill `out`, and answer how many bytes it holds; it is there only when it is complete.

    What is done so far is in a folder beside it (``.peers.partial``) and used by the next call. Raises `FetchError`.
    """
    if out.exists():
        return _check(out, wheels)
    partial = out.with_name(f"{out.name}.partial")
    files = []
    try:
        for wheel in wheels:
            done = partial / f"{wheel.name}.json"
            if not _is_done(done, partial, wheel):
                say(f"{wheel.requirement}: {wheel.size / 1e6:.0f} MB to download")
                _write(done, {"wheel": wheel.sha256, "files": _take(wheel, partial, download)})
            files += json.loads(done.read_text(encoding="utf-8"))["files"]
        total = sum(one["stored_bytes"] for one in files)
        if total > MOST_BYTES:
            raise FetchError(f"the files are {total} bytes, more than the {MOST_BYTES} that travel; take fewer members")
        for wheel in wheels:
            (partial / f"{wheel.name}.json").unlink()
        # Others' files: not to be committed, wherever the folder is.
        (partial / ".gitignore").write_text("*\n", encoding="utf-8")
        _write(partial / MANIFEST, {"files": files})
        partial.rename(out)
    except OSError as error:
        raise FetchError(f"`{partial}` can't be written: {error}") from None
    return total


def _check(out: Path, wheels: Sequence[Wheel]) -> int:
    """That a folder which is there already has what these wheels have."""
    again = f"remove `{out}` to fetch it again"
    try:
        files = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        changed = [one["stored"] for one in files if not _is_stored(out, one)]
        others = {one["wheel_sha256"] for one in files} != {wheel.sha256 for wheel in wheels}
        total = sum(int(one["stored_bytes"]) for one in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FetchError(f"`{out}` is there, and is not what this script makes: {error}; {again}") from None
    if changed:
        raise FetchError(f"`{out}` has other bytes in `{changed[0]}` than were fetched; {again}")
    if others:
        raise FetchError(f"`{out}` has the files of other wheels; {again}")
    return total


def _is_stored(folder: Path, one: dict[str, Any]) -> bool:
    return hashlib.sha256((folder / one["stored"]).read_bytes()).hexdigest() == one["stored_sha256"]


def _is_done(done: Path, partial: Path, wheel: Wheel) -> bool:
    """Whether all members of a wheel were taken out by an earlier call, and are still what they were."""
    try:
        kept = json.loads(done.read_text(encoding="utf-8"))
        return bool(kept["wheel"] == wheel.sha256) and all(_is_stored(partial, one) for one in kept["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _take(wheel: Wheel, partial: Path, download: Download) -> list[dict[str, Any]]:
    """Download one wheel, take its members out, and remove it."""
    folder = partial / "download"
    folder.mkdir(parents=True, exist_ok=True)
    # pip writes a wheel to its temporary folder first, which is this one too, and may then copy it.
    free, needed = shutil.disk_usage(folder).free, 2 * wheel.size + MOST_BYTES
    if free < needed:
        raise FetchError(
            f"{wheel.requirement} needs {needed / 1e6:.0f} MB of disk at `{folder}`, {free / 1e6:.0f} MB are free"
        )
    found = _wheel_in(folder, wheel)
    if found is None:
        download(wheel, folder)
        found = _wheel_in(folder, wheel)
    if found is None:
        raise FetchError(f"there is no wheel of {wheel.requirement} with sha256 {wheel.sha256}")
    try:
        files = _extract(found, wheel, partial)
    except FetchError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return files


def _wheel_in(folder: Path, wheel: Wheel) -> Path | None:
    """The wheel, where a download came to its end; raises for another of the same name, and removes it."""
    for path in folder.glob(f"{wheel.name.replace('-', '_')}-*.whl"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == wheel.sha256:
            return path
        path.unlink()
        raise FetchError(f"`{path.name}` has sha256 {digest}, expected {wheel.sha256}; it was removed, try again")
    return None


def _extract(path: Path, wheel: Wheel, partial: Path) -> list[dict[str, Any]]:
    files = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            for pattern in wheel.members:
                # A name may hold brackets, which a pattern would take for a choice of letters.
                matching = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
                if not matching:
                    raise FetchError(f"`{path.name}` has no `{pattern}`; is {wheel.requirement} still laid out so?")
                files += [_store(name, archive.read(name), path.name, wheel, partial) for name in matching]
    except zipfile.BadZipFile as error:
        raise FetchError(f"`{path.name}` is not a whole wheel: {error}; it was removed, try again") from None
    return files


def _store(member: str, data: bytes, wheel_file: str, wheel: Wheel, partial: Path) -> dict[str, Any]:
    if ".." in Path(member).parts or Path(member).is_absolute():
        raise FetchError(f"`{wheel_file}` has a member that leads out of the folder: `{member}`")
    packed = lzma.compress(data) if len(data) >= PACKED else data
    stored = f"{member}.xz" if len(data) >= PACKED else member
    target = partial / stored
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(packed)
    return {
        "member": member,
        "stored": stored,
        "wheel": wheel_file,
        "wheel_sha256": wheel.sha256,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "stored_bytes": len(packed),
        "stored_sha256": hashlib.sha256(packed).hexdigest(),
    }


def _write(path: Path, value: object) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def pip_download(find_links: Path | None = None) -> Download:
    """`pip download` of exactly the pinned file, from the configured index or from a folder alone."""
    source = [] if find_links is None else ["--no-index", "--find-links", str(find_links)]
    platforms = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")

    def download(wheel: Wheel, folder: Path) -> None:
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version=3.12"]
        command += ["--implementation=cp", *(f"--platform={each}" for each in platforms), "--retries=2"]
        command += [*source, "--dest", str(folder), "--requirement", str(pinned)]
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise FetchError(_reason(wheel, done.stderr))

    return download


def _reason(wheel: Wheel, stderr: str) -> str:
    last = next((line for line in reversed(stderr.strip().splitlines()) if "ERROR" in line), stderr.strip()[-300:])
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{wheel.requirement} is there, but not with sha256 {wheel.sha256}; nothing of it was kept"
    unreachable = (
        "NewConnectionError",
        "Connection",
        "Temporary failure in name resolution",
        "timed out",
        "ProxyError",
    )
    if any(each in stderr for each in unreachable):
        return f"{wheel.requirement} can't be downloaded, there is no way to the package index: {last}"
    if "No matching distribution" in stderr or "Could not find a version" in stderr:
        return f"no wheel of {wheel.requirement} for Linux on x86-64 and Python 3.12 was found: {last}"
    return f"pip can't download {wheel.requirement}: {last}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path(".peers"), help="the folder to fill: .peers")
    parser.add_argument("--find-links", type=Path, help="a folder with the wheels; no index is asked")
    given = parser.parse_args(arguments)
    try:
        total = fetch(given.out, download=pip_download(given.find_links))
    except FetchError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
