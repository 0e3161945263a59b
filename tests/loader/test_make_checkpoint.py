"""Tiny checkpoints look like the real ones, and are the same every time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from gatekeeper import CheckpointError, read_facts, read_index
from loader import Recipe, RecipeError, make_checkpoint
from loader.blueprints import BLUEPRINTS
from loader.cli import group
from loader.packing import PACKERS

# The model in tests/corpus that each family's blueprint looks like.
MODELS = {
    ("kimi_k25", "int4_g32", None): "moonshotai__Kimi-K2.5",
    ("kimi_k25", "mxfp4", None): "amd__Kimi-K2.5-MXFP4",
    ("kimi_k25", "mxfp4", "bf16"): "amd__Kimi-K2.5-MXFP4@b071bc6f",
    ("kimi_k2", "fp8_block", None): "moonshotai__Kimi-K2-Instruct",
    ("deepseek_v3", "fp8_block", None): "deepseek-ai__DeepSeek-V3",
}
SIZES = {
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "first_k_dense_replace",
}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("recipe", MODELS, ids=MODELS.values())
def test_config_has_the_real_models_keys_and_values(
    made: Callable[..., Path], root: Path, recipe: tuple[str, str, str | None]
) -> None:
    family, format_name, shared = recipe
    ours = config_of(made(family=family, format_name=format_name, shared_format=shared))
    real = config_of(root / "tests" / "corpus" / MODELS[recipe])
    for mine, theirs in ((ours, real), (ours.get("text_config", {}), real.get("text_config", {}))):
        assert ("quantization_config" in mine) == ("quantization_config" in theirs)
        for key in theirs.keys() & mine.keys() - SIZES - {"text_config", "quantization_config", "vision_config"}:
            assert mine[key] == theirs[key], key
    text, real_text = (each.get("text_config", each) for each in (ours, real))
    assert {
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "scoring_func",
    } <= text.keys() & real_text.keys()
    quantization, theirs = (
        each.get("quantization_config") or each["text_config"]["quantization_config"] for each in (ours, real)
    )
    assert quantization["quant_method"] == theirs["quant_method"]
    lists = [{_kind(entry) for entry in q.get("exclude", q.get("ignore", []))} for q in (quantization, theirs)]
    assert lists[0] == lists[1]


def _kind(entry: str) -> str:
    """An exclude entry without its layer's number."""
    return ".".join("N" if part.isdecimal() else part for part in entry.split("."))


@pytest.mark.parametrize("family", BLUEPRINTS)
@pytest.mark.parametrize("format_name", ["bf16", "int4_g32", "mxfp4", "fp8_block"])
def test_the_gatekeeper_reads_every_combination(made: Callable[..., Path], family: str, format_name: str) -> None:
    for shared in (format_name, "bf16"):
        folder = made(family=family, format_name=format_name, shared_format=shared, experts=16)
        facts = read_facts(folder)
        assert facts.values["model.family"] == family
        assert facts.layers is not None
        found = {(v["layer.routed_storage.format"].value, v["layer.shared_storage.format"].value) for v in facts.layers}
        assert found == {(format_name, shared)}
        draft = [layer for layer in facts.layers if layer["layer.role"].value == "mtp"]
        assert len(draft) == BLUEPRINTS[family].config.get("num_nextn_predict_layers", 0)


@pytest.mark.parametrize("family", ["kimi_k25", "glm4_moe"])
@pytest.mark.parametrize("format_name", [name for name in PACKERS if name not in ("bf16", "fp16", "fp32")])
def test_config_says_what_the_headers_say(
    made: Callable[..., Path], tmp_path: Path, family: str, format_name: str
) -> None:
    for shared in (format_name, "bf16"):
        folder = made(family=family, format_name=format_name, shared_format=shared, experts=8)
        alone = tmp_path / shared
        alone.mkdir()
        shutil.copy(folder / "config.json", alone)
        for where in (folder, alone):
            facts = read_facts(where)
            assert facts.layers is not None
            stored = {
                (v["layer.routed_storage.format"].value, v["layer.shared_storage.format"].value) for v in facts.layers
            }
            assert stored == {(format_name, shared)}


def test_the_safetensors_library_reads_what_we_write(made: Callable[..., Path]) -> None:
    folder = made(family="kimi_k25", format_name="mxfp4", experts=16)
    index = read_index(folder)
    assert index is not None
    seen = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                assert tuple(file.get_tensor(name).shape) == index.tensors[name].shape
                seen.add(name)
    assert seen == set(index.tensors)
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(info.nbytes for info in index.tensors.values())


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    recipe = {"family": "kimi_k2", "format_name": "int4_g32", "experts": 16}
    one, two, other = (
        make_checkpoint(tmp_path / f"{i}", Recipe(**recipe, seed=seed)) for i, seed in enumerate((3, 3, 4))
    )
    assert digest(one) == digest(two)
    different = {name for name, value in digest(one).items() if digest(other)[name] != value}
    assert {"config.json", "model.safetensors.index.json"}.isdisjoint(different) and len(different) == 4


def test_true_expert_counts_by_default(made: Callable[..., Path]) -> None:
    for family, count in (("kimi_k25", 384), ("deepseek_v3", 256), ("deepseek_v2", 160)):
        folder = made(family=family, format_name="bf16")
        assert read_facts(folder).values["model.n_routed_experts"] == count
        assert sum(path.stat().st_size for path in folder.iterdir()) < 30e6


def test_never_over_something_that_is_there(tmp_path: Path) -> None:
    recipe = Recipe(family="deepseek_v3", format_name="bf16", experts=16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            make_checkpoint(tmp_path / name, recipe)
    assert make_checkpoint(tmp_path / "empty", recipe) == tmp_path / "empty"
    assert make_checkpoint(tmp_path / "new" / "deeper", recipe).is_dir()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("loader.shards.write_shard", broken)
    with pytest.raises(OSError, match="disk full"):
        make_checkpoint(tmp_path / "out", Recipe(family="deepseek_v3", format_name="bf16", experts=16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "gpt5"}, "no blueprint of family `gpt5`; there are"),
        ({"format_name": "int3"}, "no packer for format `int3`"),
        ({"format_name": "int4_g32", "shared_format": "mxfp4"}, "no quantizer writes routed experts in int4_g32"),
        ({"hidden": 48}, "hidden 48 is not a multiple of 32"),
        ({"width": 0}, "width 0 is not a multiple of 32"),
        ({"layers": 1}, "1 layer: the first"),
        ({"experts": 12}, "12 experts can't be in 8 groups"),
        ({"experts": -8}, "-8 experts"),
    ],
)
def test_recipes_that_make_no_sense(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_checkpoint(tmp_path / "out", Recipe(**{"family": "deepseek_v3", "format_name": "bf16", **options}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("make-checkpoint {out} --family gpt5 --format bf16", "no blueprint of family `gpt5`; there are deepseek_v2, "),
        ("shrink {config} {out} --format int3 --shared-format bf16", "no packer for format `int3`; there are bf16, "),
        ("shrink {config} {out} --format bf16 --shared-format bf16 --layers 99", "fewer than 99 layers with experts"),
    ],
)
def test_what_nobody_can_make_is_wrong_usage(root: Path, tmp_path: Path, command: str, says: str) -> None:
    config = root / "tests" / "corpus" / "moonshotai__Kimi-K2.5" / "config.json"
    done = CliRunner().invoke(group, command.format(out=tmp_path / "out", config=config).split())
    assert done.exit_code == 2 and says in done.output, done.output
    assert list(tmp_path.iterdir()) == []
