"""Tables of measured configurations: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from loader.errors import TableError
from loader.kernels import tuned
from loader.kernels.configs import HOPPER_SHARED_BYTES, Config, Shape, Tiles, default, misfit
from loader.kernels.tuned import Measured, Table, file_name, find_table, read_table, to_change

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(format="int4_g32", n_slots=385, hidden_size=7168, width=256, top_k=9)
BF16 = replace(SHAPE, format="bf16")
TILES = Tiles(block_n=32, block_c=256, warps=4, stages=3, group=2)


def table(*tokens: int, by_pair: bool = False) -> Table:
    made = Table(device="NVIDIA H200", versions={"triton": "3.6.0"})
    for count in tokens:
        config = Config(block_m=16, gate_up=TILES, down=TILES, splits=count, by_pair=by_pair and count <= 4)
        made.configs.setdefault(SHAPE, {})[count] = Measured(tokens=count, microseconds=1.5 * count, config=config)
    return made


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / file_name("NVIDIA H200")
    written = table(1, 16, 256)
    written.save(path)
    assert path.name == "nvidia_h200.json"
    assert list(path.parent.iterdir()) == [path]
    read = read_table(path, "NVIDIA H200")
    assert (read.device, read.versions, read.configs) == (written.device, written.versions, written.configs)
    assert find_table("NVIDIA H200", path.parent) is not None
    assert find_table("NVIDIA H100 80GB HBM3", path.parent) is None


@pytest.mark.parametrize(("tokens", "measured"), [(1, 1), (3, 1), (5, 16), (16, 16), (63, 16), (65, 256), (1024, 256)])
def test_the_nearest_number_of_tokens_by_ratio_counts(tokens: int, measured: int) -> None:
    config = table(1, 16, 256).config(SHAPE, tokens)
    assert config is not None
    assert config.splits == measured


def test_what_was_not_measured_has_no_configuration() -> None:
    other = Shape(format="mxfp4", n_slots=385, hidden_size=7168, width=256, top_k=9)
    assert table(1).config(other, 1) is None
    assert table().config(SHAPE, 1) is None
    assert table(1).config(SHAPE, 0) is None


def test_pair_by_pair_is_not_stretched_to_more_tokens_than_were_timed() -> None:
    made = table(1, 4, 16, by_pair=True)
    for count, by_pair in ((1, True), (2, True), (4, True), (5, False)):
        found = made.config(SHAPE, count)
        assert found is not None and found.by_pair is by_pair
    del made.configs[SHAPE][16]
    assert made.config(SHAPE, 5) is None


def test_what_is_cut_for_few_tokens_is_not_stretched_to_many() -> None:
    """Small blocks read an expert's weights again and again, and parts of a product take memory by the token."""
    made = table(1, 16, 256)
    assert made.config(SHAPE, 1024) is not None and made.config(SHAPE, 1025) is None
    config = replace(made.configs[SHAPE][256].config, block_m=64)
    for splits, expected in ((1, True), (2, False)):
        large = replace(config, splits=splits)
        made.configs[SHAPE][256] = replace(made.configs[SHAPE][256], config=large)
        assert made.config(SHAPE, 100_000) == (large if expected else None)


def test_a_program_of_down_alone_keeps_activations_and_has_nothing_else() -> None:
    kept = replace(TILES, group=1, strips=4)
    config = Config(block_m=16, gate_up=TILES, down=kept)
    assert not misfit(config, BF16) and not misfit(replace(config, by_pair=True), BF16)
    for wrong, shape, words in (
        (replace(config, gate_up=kept), BF16, "gate_up keeps no activations, so its strips must be 1"),
        (replace(config, down=replace(kept, programs=4)), BF16, "with programs its strips must be 1"),
        (replace(config, down=replace(kept, group=8)), BF16, "with group its strips must be 1"),
        (config, replace(BF16, width=768), "at most 512 columns of the intermediate, not 768"),
    ):
        assert words in (misfit(wrong, shape) or "")


@pytest.mark.parametrize(("width", "kept"), [(96, True), (256, True), (512, True), (768, False)])
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32", "mxfp4"])
def test_activations_are_kept_where_there_is_room_for_them(format_name: str, width: int, kept: bool) -> None:
    """How much they take is seen by compiling (`test_kernels_ahead`); with float32 they are not kept."""
    shape = replace(SHAPE, format=format_name, width=width)
    for tokens in (16, 64, 1024, 4096):
        config = default(shape, tokens, 132)
        assert (config.down.strips > 1) is (
            kept and not (width == 512 and config.block_m == 128 and format_name == "bf16")
        )
        assert config.down.stages >= 2
        assert default(shape, tokens, 132, x_bytes=4).down.strips == 1
        assert default(shape, tokens, 132, 16 << 10).down.strips == 1


@pytest.mark.parametrize(("limit", "block_n"), [(HOPPER_SHARED_BYTES, 256), (166_912, 128), (65_536, 128)])
def test_tiles_of_a_wide_intermediate_are_broad_where_there_is_room(limit: int, block_n: int) -> None:
    shape = replace(BF16, width=2048)
    assert default(shape, 8192, 132, limit).down.block_n == block_n
    assert default(shape, 8192, 132, limit, x_bytes=4).down.block_n == 128
    assert default(shape, 256, 132, limit).down.block_n == 128


@pytest.mark.parametrize(
    ("format_name", "tokens", "block_m", "splits"),
    [("bf16", 64, 16, 8), ("bf16", 1024, 32, 1), ("bf16", 4096, 128, 1), ("int4_g32", 64, 32, 7),
     ("int4_g32", 8, 8, 7), ("fp8_block", 4096, 64, 1)],
)  # fmt: skip
def test_one_slot_is_cut_low_enough_for_the_device(format_name: str, tokens: int, block_m: int, splits: int) -> None:
    """A shared expert on its own has all tokens, and few tiles; large blocks have no parts, whose sums are float32."""
    config = default(replace(SHAPE, format=format_name).shared(1), tokens, 132)
    assert (config.block_m, config.splits) == (block_m, splits)


@pytest.mark.parametrize(
    ("format_name", "tokens", "x_bytes", "block_m"),
    [("bf16", 4096, 2, 128), ("mxfp4", 4096, 2, 128), ("int4_g32", 1024, 2, 32), ("fp8_block", 8192, 2, 64),
     ("fp8_block", 8192, 4, 32), ("int4_g32", 2000, 2, 64)],
)  # fmt: skip
def test_blocks_are_as_high_as_what_an_expert_gets(format_name: str, tokens: int, x_bytes: int, block_m: int) -> None:
    """In powers of two, up to what fits the registers and, of FP8, was fastest."""
    shape = replace(SHAPE, format=format_name, n_slots=385, hidden_size=7168, width=256, top_k=9)
    config = default(shape, tokens, 132, x_bytes=x_bytes)
    assert config.block_m == block_m and not config.by_pair


@pytest.mark.parametrize(
    ("format_name", "tokens", "least", "x_bytes", "block_m"),
    [("int4_g32", 16, 8, 2, 8), ("mxfp4", 1, 8, 2, 8), ("int4_g32", 16, 16, 2, 16), ("mxfp4", 16, 8, 4, 16),
     ("int4_g32", 512, 8, 2, 16), ("bf16", 16, 8, 2, 16), ("fp8_block", 16, 8, 2, 16)],
)  # fmt: skip
def test_blocks_of_eight_are_for_packed_numbers_where_the_device_has_them(
    format_name: str, tokens: int, least: int, x_bytes: int, block_m: int
) -> None:
    shape = replace(SHAPE, format=format_name, n_slots=385, hidden_size=7168, width=256, top_k=9)
    assert default(shape, tokens, 132, least=least, x_bytes=x_bytes).block_m == block_m


@pytest.mark.parametrize("hidden", [64, 1000, 2880, 6144, 7168])
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32"])
def test_parts_have_as_many_steps_as_each_other(hidden: int, format_name: str) -> None:
    for tokens in (1, 2, 4, 8):
        config = default(replace(SHAPE, format=format_name, hidden_size=hidden), tokens, 132)
        assert -(-hidden // config.gate_up.block_c) % config.splits == 0


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        ({}, None),
        ({1: 2.0, 16: 30.0, 256: 500.0}, 0),
        ({1: 2.0, 16: 30.0, 256: 300.0}, 256),
        ({1: 2.0, 16: 20.0, 256: 300.0}, 16),
        ({1: 1.0, 16: 30.0, 256: 300.0}, 256),  # a lucky time among small ones decides nothing
        ({1: 1.0, 16: 20.0, 256: 300.0}, 1),
        ({16: 20.0}, 16),
    ],
)
def test_where_shared_slots_are_better_on_their_own(apart: dict[int, float], expected: int | None) -> None:
    made = table(1, 16, 256)  # 1.5, 24 and 384 us
    for tokens, time in apart.items():
        made.configs[SHAPE][tokens] = replace(made.configs[SHAPE][tokens], apart_microseconds=time)
    assert made.dense_shared_from(SHAPE) == expected


FILLS = """\
import sys
from dataclasses import replace
from pathlib import Path
from loader.kernels.tuned import to_change
from tests.loader.test_tuned import SHAPE, table

path, first = Path(sys.argv[1]), int(sys.argv[2])
for count in range(first, first + 10):
    with to_change(path, "NVIDIA H200") as now:
        now.configs.setdefault(SHAPE, {}).update(table(count).configs[SHAPE])
"""


def test_processes_that_fill_one_table_undo_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / file_name("NVIDIA H200")
    command = [sys.executable, "-c", FILLS, str(path)]
    filling = [subprocess.Popen([*command, str(first)], cwd=ROOT) for first in (1, 11, 21)]
    assert [process.wait(timeout=120) for process in filling] == [0, 0, 0]
    assert [*read_table(path).configs[SHAPE]] == list(range(1, 31))
    assert list(path.parent.iterdir()) == [path]


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / file_name("NVIDIA H200")
    table(1).save(path)

    def change_and_fail() -> None:
        with to_change(path, "NVIDIA H200") as now:
            now.configs.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change_and_fail()
    assert read_table(path).configs == table(1).configs
    with to_change(path, "NVIDIA H200") as now:  # which waits for nobody
        now.configs.clear()
    assert read_table(path).configs == {}


def test_a_table_that_can_not_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    table(1).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        table(1, 2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def changed(change: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = table(1).as_json()
    for place, value in change.items():
        at: Any = raw
        *steps, last = [int(s) if s.isdigit() else s for s in place.split(".")]
        for step in steps:
            at = at[step]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return raw


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2, "shapes.0.configs.0.config.by_token": True}, "has version 2, this loader reads version 3"),
        ({"version": None}, "has version None"),
        ({"device": 7}, r"\$.device: 7 is not of type 'string'"),
        ({"shapes": {}}, r"\$.shapes: {} is not of type 'array'"),
        ({"shapes.0.width": None}, r"\$.shapes\[0\]: 'width' is a required property"),
        ({"shapes.0.configs.0.config.block_m": 17}, r"block_m: 17 is not one of"),
        ({"shapes.0.configs.0.config.down.stages": 0}, r"down.stages: 0 is less than the minimum of 1"),
        ({"shapes.0.configs.0.config.down.turbo": True}, "'turbo' was unexpected"),
        ({"shapes.0.configs.0.microseconds": -1}, "less than or equal to the minimum of 0"),
    ],
)
def test_a_table_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(changed(change)))
    with pytest.raises(TableError, match=says) as error:
        read_table(path, "NVIDIA H200")
    assert str(path) in str(error.value)
    assert "moe-loader tune" in str(error.value)


def test_a_table_of_another_device_is_not_to_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table(1).save(path)
    says = r"t.json` was measured on NVIDIA H200, this is NVIDIA H100; give another folder with --tables$"
    with pytest.raises(TableError, match=says):
        read_table(path, "NVIDIA H100")


@pytest.mark.parametrize(
    ("format_name", "change", "says"),
    [
        ("int4_g32", {"tokens_left": True}, "int4_g32 with 4 tokens: int4_g32 is unpacked into the left operand"),
        ("fp8_block", {"tokens_left": True, "block_n": 256}, "with tokens_left a tile of down has one scale"),
        ("fp8_block", {"block_c": 64}, "a step of fp8_block is one block, so block_c of down is 128, not 64"),
        ("mxfp4", {"block_c": 32}, "a step of mxfp4 is four streams of 16 columns, so block_c of down is 64 at least"),
    ],
)
def test_a_table_that_no_kernel_could_run_is_refused(
    tmp_path: Path, format_name: str, change: dict[str, Any], says: str
) -> None:
    shape = Shape(format=format_name, n_slots=8, hidden_size=512, width=256, top_k=2)
    config = default(shape, 4, 132)
    config = replace(config, down=replace(config.down, **change))
    made = table()
    made.configs[shape] = {4: Measured(tokens=4, microseconds=1.0, config=config)}
    made.save(tmp_path / "t.json")
    with pytest.raises(TableError, match=says):
        read_table(tmp_path / "t.json")


@pytest.mark.parametrize("cut", [0, 1, 40, -2])
def test_a_torn_table_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.json"
    table(1, 4).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TableError, match="is torn"):
        read_table(path)


def test_a_table_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="can't be read"):
        read_table(tmp_path)


def test_the_schema_is_one_and_the_shipped_tables_fit_it() -> None:
    Draft202012Validator.check_schema(json.loads(tuned.SCHEMA.read_text(encoding="utf-8")))
    for path in tuned.SHIPPED.glob("*.json"):
        assert file_name(read_table(path).device) == path.name


@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 1024, 8192])
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32", "mxfp4"])
def test_the_counted_configuration_fits_any_shape(format_name: str, tokens: int) -> None:
    for width, hidden, slots, top_k in ((256, 7168, 385, 9), (2048, 7168, 257, 9), (32, 64, 2, 1), (96, 2880, 32, 4)):
        shape = Shape(format=format_name, n_slots=slots, hidden_size=hidden, width=width, top_k=top_k)
        config = default(shape, tokens, 132)
        assert not misfit(config, shape)
        made = table()
        made.configs[shape] = {tokens: Measured(tokens=tokens, microseconds=1.0, config=config)}
        Draft202012Validator(json.loads(tuned.SCHEMA.read_text(encoding="utf-8"))).validate(made.as_json())
