"""The script that takes other engines' kernels out of their wheels, on wheels of a few bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loader.bench import fetched as reader
from loader.bench.fetched import Fetched

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "peers" / "fetch.py"
LIBRARY = b"\x7fELF" + bytes(2_000_000)


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fetch = _script()


class Index:
    """Two wheels in a folder, and a download that copies them and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        one = {
            "one/a.py": b"a = 1\n",
            "one/configs/E=1,block=[8, 8].json": b"{}",
            "one/big.so": LIBRARY,
            "one/b.py": b"",
        }
        self.wheels = (
            self.add("one==1.0", one, ("one/a.py", "one/configs/*.json", "one/*.so")),
            self.add("two-kernel==2.0", {"two/c.py": b"c = 3\n"}, ("two/c.py",)),
        )

    def add(self, requirement: str, files: dict[str, bytes], members: tuple[str, ...]) -> Any:
        name, _, version = requirement.partition("==")
        path = self.folder / f"{name.replace('-', '_')}-{version}-cp312-cp312-manylinux_2_28_x86_64.whl"
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp312-cp312-manylinux_2_28_x86_64\n"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}.items():
                archive.writestr(member, data)
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return fetch.Wheel(requirement=requirement, sha256=digest, size=path.stat().st_size, members=members)

    def download(self, wheel: Any, folder: Path) -> None:
        self.asked.append(wheel.name)
        for path in self.folder.glob(f"{wheel.name.replace('-', '_')}-*.whl"):
            shutil.copy(path, folder)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    (tmp_path / "wheels").mkdir()
    return Index(tmp_path / "wheels")


@pytest.fixture
def run(index: Index, tmp_path: Path) -> Callable[..., int]:
    def call(**options: Any) -> int:
        given = {"download": index.download, "wheels": index.wheels, "say": lambda _: None, **options}
        return int(fetch.fetch(tmp_path / ".peers", **given))

    return call


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_members_and_nothing_else_are_taken_and_can_be_read(
    run: Callable[..., int], index: Index, tmp_path: Path
) -> None:
    total, out = run(), tmp_path / ".peers"
    members = ["one/a.py", "one/big.so.xz", "one/configs/E=1,block=[8, 8].json", "two/c.py"]
    assert left(out) == sorted([".gitignore", "manifest.json", *members])
    assert left(tmp_path) == sorted(f".peers/{name}" for name in left(out)) + left_wheels(index)
    assert total == sum((out / member).stat().st_size for member in members)
    files = Fetched(out)
    assert files.path("one/a.py") == out / "one" / "a.py"
    assert files.path("one/big.so").read_bytes() == LIBRARY
    one = json.loads((out / "manifest.json").read_text())["files"][0]
    assert one["wheel"].startswith("one-1.0") and one["wheel_sha256"] == index.wheels[0].sha256
    assert one["sha256"] == hashlib.sha256(b"a = 1\n").hexdigest()


def left_wheels(index: Index) -> list[str]:
    return sorted(f"wheels/{path.name}" for path in index.folder.iterdir())


def test_what_is_there_is_not_fetched_again(run: Callable[..., int], index: Index) -> None:
    assert run() == run()
    assert index.asked == ["one", "two-kernel"]


def test_an_interrupted_call_leaves_no_folder_and_is_gone_on_with(
    run: Callable[..., int], index: Index, tmp_path: Path
) -> None:
    def interrupted(wheel: Any, folder: Path) -> None:
        if wheel.name == "two-kernel":
            (folder / "pip-unpack").mkdir()
            (folder / "pip-unpack" / "two_kernel-2.0.whl").write_bytes(b"half")
            raise KeyboardInterrupt
        index.download(wheel, folder)

    with pytest.raises(KeyboardInterrupt):
        run(download=interrupted)
    assert not (tmp_path / ".peers").exists()
    run()
    assert index.asked == ["one", "two-kernel"]
    assert left(tmp_path / ".peers") and not (tmp_path / ".peers.partial").exists()


def test_a_wheel_that_is_there_already_is_not_downloaded_again(
    run: Callable[..., int], index: Index, tmp_path: Path
) -> None:
    (tmp_path / ".peers.partial" / "download").mkdir(parents=True)
    index.download(index.wheels[0], tmp_path / ".peers.partial" / "download")
    run()
    assert index.asked == ["one", "one", "two-kernel"][1:]


def test_members_that_changed_between_two_calls_are_taken_again(
    run: Callable[..., int], index: Index, tmp_path: Path
) -> None:
    def unreachable(wheel: Any, folder: Path) -> None:
        if wheel.name == "two-kernel":
            raise fetch.FetchError("no network")
        index.download(wheel, folder)

    with pytest.raises(fetch.FetchError, match="no network"):
        run(download=unreachable)
    (tmp_path / ".peers.partial" / "one" / "a.py").write_text("a = 2\n")
    run()
    assert index.asked == ["one", "one", "two-kernel"]
    assert (tmp_path / ".peers" / "one" / "a.py").read_text() == "a = 1\n"


def test_a_missing_member(run: Callable[..., int], index: Index, tmp_path: Path) -> None:
    wheels = (index.wheels[0], replace(index.wheels[1], members=("two/c.py", "two/*.so")))
    with pytest.raises(
        fetch.FetchError, match=r"two_kernel-2\.0-.*whl` has no `two/\*\.so`; is two-kernel==2\.0 still"
    ):
        run(wheels=wheels)
    assert not (tmp_path / ".peers").exists() and not list(tmp_path.rglob(".peers*/**/*.whl"))


def test_a_wheel_of_other_bytes(run: Callable[..., int], index: Index, tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match=r"has sha256 [0-9a-f]{64}, expected 0000; it was removed"):
        run(wheels=(replace(index.wheels[0], sha256="0000"),))
    assert not list(tmp_path.rglob(".peers*/**/*.whl"))


def test_a_missing_wheel_and_one_that_is_cut(run: Callable[..., int], index: Index) -> None:
    with pytest.raises(fetch.FetchError, match=r"there is no wheel of one==1\.0"):
        run(download=lambda wheel, folder: None)
    path = next(index.folder.glob("one-*.whl"))
    path.write_bytes(path.read_bytes()[:-40])
    cut = replace(index.wheels[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(fetch.FetchError, match="is not a whole wheel"):
        run(wheels=(cut,))


def test_more_than_may_travel(run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 100)
    with pytest.raises(fetch.FetchError, match="more than the 100 that travel"):
        run()
    assert not (tmp_path / ".peers").exists()


def test_a_disk_that_is_full(run: Callable[..., int], index: Index) -> None:
    with pytest.raises(fetch.FetchError, match="MB of disk"):
        run(wheels=(replace(index.wheels[0], size=10**16),))
    assert index.asked == []


@pytest.mark.parametrize("change", ["bytes", "manifest", "wheels"])
def test_a_folder_that_is_not_what_it_makes(change: str, run: Callable[..., int], index: Index, tmp_path: Path) -> None:
    run()
    wheels = index.wheels
    if change == "bytes":
        (tmp_path / ".peers" / "two" / "c.py").write_text("c = 4\n")
    elif change == "manifest":
        (tmp_path / ".peers" / "manifest.json").unlink()
    else:
        wheels = (replace(wheels[0], sha256="0000"), wheels[1])
    with pytest.raises(fetch.FetchError, match=r"remove `.*\.peers` to fetch it again"):
        run(wheels=wheels)


def test_pip_takes_exactly_the_pinned_wheel_from_a_folder(
    run: Callable[..., int], index: Index, tmp_path: Path
) -> None:
    pytest.importorskip("pip")
    download = fetch.pip_download(index.folder)
    wrong = replace(index.wheels[1], sha256="0" * 64)
    with pytest.raises(fetch.FetchError, match=r"two-kernel==2\.0 is there, but not with sha256 0000"):
        run(download=download, wheels=(index.wheels[0], wrong))
    with pytest.raises(fetch.FetchError, match=r"no wheel of three==3\.0 for Linux on x86-64"):
        run(download=download, wheels=(replace(wrong, requirement="three==3.0"),))
    run(download=download)
    assert Fetched(tmp_path / ".peers").read("two/c.py") == b"c = 3\n"


def test_why_pip_failed() -> None:
    lines = "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution\n"
    assert "there is no way to the package index" in fetch._reason(fetch.WHEELS[0], lines)
    assert "pip can't download sglang==0.5.23: ERROR: odd" in fetch._reason(fetch.WHEELS[0], "ERROR: odd\n")


def test_the_script_runs_on_its_own_and_says_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / ".peers").mkdir()
    command = [sys.executable, "-I", str(SCRIPT), str(tmp_path / ".peers")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("fetch.py: `") and "is not what this script makes" in done.stderr


def test_both_sides_agree_on_the_manifest() -> None:
    assert fetch.MANIFEST == reader.MANIFEST
    names = [wheel.name for wheel in fetch.WHEELS]
    assert len(set(names)) == len(names) and all(len(wheel.sha256) == 64 for wheel in fetch.WHEELS)
