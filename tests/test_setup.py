"""scripts/setup_venv.py: torch before all else, one's own torch where asked for, and no work that is done already."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

CONSTRAINTS = "# pins\ntorch==2.13.0\nclick==8.5.1\n"


class Setup:
    """The script on a small project in a folder of its own; `calls` has what pip was asked for."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.module, self.folder = module, folder
        self.calls: list[tuple[str, ...]] = []
        self.trouble = ""

    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, ...]]:
        """Run it as `make` does, and return the calls of this run."""
        self.calls = []
        monkeypatch.setattr("sys.argv", ["setup_venv.py", *arguments])
        self.module.main()
        return self.calls

    def pip(self, *arguments: str) -> None:
        if self.trouble and self.trouble in arguments:
            self.module.fail("no network")
        self.calls.append(arguments)


@pytest.fixture
def setup(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    spec = importlib.util.spec_from_file_location("setup_venv", root / "scripts" / "setup_venv.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup_venv.py").touch()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    made = Setup(module, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / ".ready")
    # What takes minutes and a network: `make` itself shows daily that these work.
    monkeypatch.setattr(module, "make_venv", lambda system_packages: (tmp_path / ".venv").mkdir(exist_ok=True))
    monkeypatch.setattr(module, "torch_version", lambda: "2.13.0+cpu")
    monkeypatch.setattr(module, "pip", made.pip)
    return made


def pins(setup: Setup) -> list[str]:
    return (setup.folder / ".venv" / "constraints.txt").read_text().splitlines()


def test_the_pinned_torch_comes_before_what_depends_on_it(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = setup.run(monkeypatch)
    assert calls[0][-1] == "torch==2.13.0"
    assert [call[-1] for call in calls].index(".[loader,dev]") == len(calls) - 1
    assert "click==8.5.1" in pins(setup)


def test_a_second_run_does_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.run(monkeypatch)
    assert setup.run(monkeypatch) == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_pins_are_installed(setup: Setup, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    setup.run(monkeypatch)
    with (setup.folder / changed).open("a") as file:
        file.write("\n# changed\n")
    assert setup.run(monkeypatch)


def test_a_stopped_install_is_not_taken_for_a_finished_one(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.trouble = ".[loader,dev]"
    with pytest.raises(SystemExit):
        setup.run(monkeypatch)
    setup.trouble = ""
    assert setup.run(monkeypatch)


def test_a_torch_of_ones_own_replaces_the_pin(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.run(monkeypatch)
    calls = setup.run(monkeypatch, "--torch", "torch==2.11.0")
    assert calls[0][-1] == "torch==2.11.0"
    # The release that came of it holds for the rest, so that nothing replaces it.
    assert [line for line in pins(setup) if line.startswith("torch==")] == ["torch==2.13.0+cpu"]


def test_the_systems_torch_is_never_installed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = setup.run(monkeypatch, "--torch", "system")
    assert calls
    assert [call for call in calls if any(word.startswith("torch") for word in call)] == []


def test_an_old_python_is_told_so(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 13))
    with pytest.raises(SystemExit) as end:
        setup.run(monkeypatch)
    assert end.value.code == 1
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err
