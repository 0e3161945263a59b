"""Tiny checkpoints, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loader import Recipe, make_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a checkpoint of a recipe, or hand out the one there is; read-only by agreement."""
    folders: dict[Recipe, Path] = {}

    def make(**options: object) -> Path:
        recipe = Recipe(**{"family": "deepseek_v3", "format_name": "bf16", **options})  # type: ignore[arg-type]
        if recipe not in folders:
            folders[recipe] = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "it", recipe)
        return folders[recipe]

    return make


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint to break."""

    def copy(**options: object) -> Path:
        return shutil.copytree(made(**options), tmp_path / "copy")

    return copy
