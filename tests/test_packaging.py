"""The wheel: it carries rules and schemas, and works from any folder, without torch, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

DATA = ("rules", "schema")


@dataclass(frozen=True, slots=True)
class Installed:
    """The wheel, and an environment that has nothing but it and what it asks for."""

    wheel: Path
    bin: Path
    elsewhere: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs far from the checkout."""
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.elsewhere,
            env=clean_environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )


def clean_environment() -> dict[str, str]:
    """Ours, less what would let the checkout's packages be found."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def succeed(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("packaging")
    # As a release is made: the wheel comes from the source distribution, so that one is complete too.
    succeed(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=root)
    (sdist,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    succeed(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    succeed(python, *pip, "install", "-c", root / "constraints.txt", wheel, cwd=folder)
    return Installed(wheel=wheel, bin=python.parent, elsewhere=folder)


def test_wheel_carries_every_rule_and_schema(root: Path, installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        carried = {name for name in archive.namelist() if name.startswith("gatekeeper/_data/")}
        ours = {
            f"gatekeeper/_data/{file.relative_to(root).as_posix()}": file.read_bytes()
            for name in DATA
            for file in (root / name).rglob("*")
            if file.is_file()
        }
        assert carried == set(ours)
        assert all(archive.read(name) == content for name, content in ours.items())
        tops = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
    assert tops == {"gatekeeper", "loader"}


@pytest.mark.parametrize("name", DATA)
def test_installed_package_uses_its_own_data(installed: Installed, name: str) -> None:
    done = installed.run("python", "-c", f"from gatekeeper.data import data_folder; print(data_folder({name!r}))")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parts[-3:] == ("gatekeeper", "_data", name)
    assert any(folder.iterdir())


def test_installed_rules_are_sound(installed: Installed) -> None:
    done = installed.run("gatekeeper", "check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_gatekeeper_decides_without_torch(root: Path, installed: Installed) -> None:
    assert installed.run("python", "-c", "import torch").returncode == 1, "this environment must not have torch"
    config = root / "tests" / "corpus" / "moonshotai__Kimi-K2.5" / "config.json"
    done = installed.run("gatekeeper", "decide", str(config), "--platform", "mi355x", "--json")
    assert done.returncode == 0, done.stderr
    assert "shared_experts_fusion" in json.dumps(json.loads(done.stdout))
