"""Tiny checkpoints, made once a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def _within_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted kernels are held to the bounds of their tensors (`bounds`)."""
    if "kernels" not in request.keywords or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.loader.bounds import within_tensors

    with within_tensors():
        yield
