"""Real releases in small: decided right layer by layer, from headers and from the config alone; loaded, verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from structlog.testing import capture_logs

from gatekeeper import CheckpointError, Decisions, decide, read_facts, read_index, runners_of
from gatekeeper.load import shipped_rules
from gatekeeper.reading import open_target
from loader import build, prepare, verify
from loader.cli import group
from loader.packing import PACKERS
from loader.shrink import Shrunk, shrink

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "corpus"
ROWS = yaml.safe_load((ROOT / "releases.yaml").read_text("utf-8"))["rows"]
NAMES = [row["name"] for row in ROWS]
SGLANG = {"engine.name": "sglang", "engine.loads_fused_shared": True, "engine.moe_a2a_backend": "none"}
FUSION = "shared_experts_fusion"


def config_of(row: dict[str, Any], folder: Path) -> Path:
    """The release's config.json: a model's of the corpus, with another exclude list where the row has one."""
    source = CORPUS / row["config"] / "config.json"
    if "exclude" not in row:
        return source
    config = json.loads(source.read_text("utf-8"))
    if "quantized_like" in row:
        other = json.loads((CORPUS / row["quantized_like"] / "config.json").read_text("utf-8"))
        config["quantization_config"] = other["quantization_config"]
    config["quantization_config"]["exclude"] = row["exclude"]
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            row = next(row for row in ROWS if row["name"] == name)
            formats, draft = tuple(row["formats"]), row.get("draft_formats")
            if not {*formats, *(draft or ())} <= PACKERS.keys():
                pytest.skip(f"no packer for {row['formats']}")
            folder = tmp_path_factory.mktemp("release")
            what = Shrunk(
                config=config_of(row, folder / "config"), formats=formats, draft_formats=draft and tuple(draft)
            )
            made[name] = shrink(folder / "checkpoint", what)
        return made[name]

    return make


def decided(target: Path, runner: Any, platform: str, **settings: Any) -> Decisions:
    with capture_logs():
        return decide(shipped_rules(), read_facts(target, runner=runner, platform=platform, set=settings))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("engine", ["sglang", "own"])
@pytest.mark.parametrize("alone", [False, True], ids=["headers", "config"])
def test_decided_right(release: Callable[[str], Path], row: dict[str, Any], engine: str, alone: bool) -> None:
    folder = release(row["name"])
    target = folder / "config.json" if alone else folder
    assert set(runners_of(open_target(target, shipped_rules()))) == set(row[engine])
    for runner, expected in row[engine].items():
        found = decided(target, runner, row["platform"], **(SGLANG if engine == "sglang" else {}))[FUSION]
        assert found.state == expected, (runner, found.reason)
        assert found.layers
        assert {layer.state for layer in found.layers} == {expected}
        failed = [outcome.id for outcome in found.layers[0].outcomes if outcome.state == "failed"]
        if engine == "sglang":
            assert failed == row.get("failed", {}).get(runner, []), runner


@pytest.mark.parametrize("name", NAMES)
def test_the_real_config_is_decided_as_the_small_one(tmp_path: Path, name: str) -> None:
    """Whole size, config alone: every layer of the release, not the two that were kept."""
    row = next(row for row in ROWS if row["name"] == name)
    config = config_of(row, tmp_path / "config")
    for runner, expected in row["sglang"].items():
        found = decided(config, runner, row["platform"], **SGLANG)[FUSION]
        assert found.state == expected, (runner, found.reason)
        assert found.layers is not None
        assert {layer.state for layer in found.layers} == {expected}


@pytest.mark.parametrize("name", NAMES)
def test_loaded_and_verified(release: Callable[[str], Path], name: str) -> None:
    folder, row = release(name), next(row for row in ROWS if row["name"] == name)
    for runner in row["sglang"]:
        prepared = prepare(folder, decided(folder, runner, row["platform"]))
        layers = build(prepared.plan, prepared.index)
        found = verify(layers, prepared.plan, prepared.index, prepared.tensors)
        assert len(found) == len(layers) == (2 if runner == "target" else 1)
        formats = row.get("draft_formats", row["formats"]) if runner == "draft" else row["formats"]
        assert {layer.format for layer in prepared.plan.layers} == {formats[0]}
        for layer in prepared.plan.layers:
            assert (layer.shared == "slot") is (row["own"][runner] == "on")
            assert layer.shared == "slot" or layer.shared_format == formats[1]


def test_layers_keep_their_numbers(release: Callable[[str], Path]) -> None:
    index = read_index(release("amd/GLM-5.2-MXFP4"))
    assert index is not None
    assert {name.split(".")[2] for name in index.tensors} == {"76", "77", "78"}
    index = read_index(release("amd/Qwen3.5-397B-A17B-MXFP4"))
    assert index is not None
    assert {name.partition(".mlp.")[0] for name in index.tensors} == {
        "model.language_model.layers.58",
        "model.language_model.layers.59",
        "mtp.layers.0",
    }


@pytest.mark.parametrize(
    ("config", "formats", "words"),
    [
        ("google__gemma-4-26B-A4B", ("bf16", "bf16"), "no family with experts one by one"),
        ("MiniMaxAI__MiniMax-M2", ("bf16", "bf16"), "no key that says which layers are dense"),
    ],
)
def test_what_can_not_be_shrunk(tmp_path: Path, config: str, formats: tuple[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        shrink(tmp_path / "out", Shrunk(config=CORPUS / config / "config.json", formats=formats))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    config = CORPUS / "zai-org__GLM-5.2" / "config.json"
    options = ["--format", "mxfp4", "--shared-format", "mxfp4", "--draft-shared-format", "bf16", "--experts", "16"]
    result = CliRunner().invoke(group, ["shrink", str(config), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    index = read_index(tmp_path / "out")
    assert index is not None
    shared = {n: i.dtype for n, i in index.tensors.items() if n.endswith("shared_experts.up_proj.weight")}
    assert {name.split(".")[2]: dtype for name, dtype in shared.items()} == {"76": "U8", "77": "U8", "78": "BF16"}
