"""Headers and indexes: what is right is read, what is wrong is named, all of it in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.checkpoint import MAX_HEADER_BYTES, read_header, read_index
from gatekeeper.errors import CheckpointError
from tests.tiny import header_of, shard_bytes, write_index, write_shards

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {A: {"a": ("F32", (2, 3)), "s": ("BF16", ())}, B: {"b": ("F8_E4M3", (4,)), "z": ("I32", (0, 2))}}


def faults(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_index(folder)
    return str(error.value)


@pytest.mark.parametrize("index", [True, False])
def test_every_tensor_with_its_place(tmp_path: Path, index: bool) -> None:
    found = read_index(write_shards(tmp_path, GOOD, index=index))
    assert found is not None
    assert {n: (t.dtype, t.shape, t.shard) for n, t in found.tensors.items()} == {
        "a": ("F32", (2, 3), A),
        "s": ("BF16", (), A),
        "b": ("F8_E4M3", (4,), B),
        "z": ("I32", (0, 2), B),
    }
    one = found.tensors["s"]
    assert one.nbytes == 2
    assert one.end == (tmp_path / A).stat().st_size


def test_offsets_point_at_the_bytes(tmp_path: Path) -> None:
    header, _ = header_of({"a": ("U8", (2,)), "b": ("U8", (3,))})
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, 0) + b"abcde")
    found = read_index(tmp_path)
    assert found is not None
    info = found.tensors["b"]
    assert (tmp_path / info.shard).read_bytes()[info.start : info.end] == b"cde"


def test_a_folder_without_weights_has_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_index(tmp_path) is None


@pytest.mark.parametrize("index", [False, True])
def test_a_file_that_can_not_be_opened_is_a_fault_like_any_other(
    index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_bytes({}, 0))
    if index:
        (tmp_path / "model.safetensors.index.json").write_text("{}")

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(Path, "read_bytes" if index else "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*: can't be read: Permission denied$"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "x.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    assert name in faults(tmp_path)
    assert "convert them to safetensors" in faults(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "is not a folder" in faults(tmp_path / "nowhere")


def test_all_that_is_wrong_is_named_in_one_run(tmp_path: Path) -> None:
    third, fourth = "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"
    write_shards(
        tmp_path, {A: {"a": ("F32", (2,)), "twice": ("U8", (1,)), "stray": ("U8", (1,))}, B: {"twice": ("U8", (1,))}}
    )
    write_index(tmp_path, {"a": A, "twice": B, "lost": A, "gone": third, "torn": fourth, "../out": "../x.safetensors"})
    (tmp_path / fourth).write_bytes(shard_bytes(header_of({"torn": ("F32", (8,))})[0], 31))
    text = faults(tmp_path)
    for part in (
        "`twice` is in model-00001-of-00002.safetensors too",
        "`lost` is in the index but not here",
        "`stray` is here but the index does not name it",
        "`twice` is here but the index names model-00002-of-00002.safetensors for it",
        f"{third}: the shard is missing",
        f"{fourth}: is truncated: tensor `torn` ends at byte",
        "../x.safetensors: the path leaves the folder",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]
)
def test_paths_of_the_index_stay_in_the_folder(tmp_path: Path, shard: str) -> None:
    folder = write_shards(tmp_path / "in", {"x.safetensors": {"a": ("U8", (1,))}})
    (tmp_path / "x.safetensors").write_bytes((folder / "x.safetensors").read_bytes())
    write_index(folder, {"a": shard})
    assert "leaves the folder" in faults(folder)


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", {"x.safetensors": {"a": ("U8", (1,))}}, index=False)
    folder = write_shards(tmp_path / "in", {})
    (folder / "x.safetensors").symlink_to(tmp_path / "out" / "x.safetensors")
    write_index(folder, {"a": "x.safetensors"})
    assert "leaves the folder, by a link" in faults(folder)


def test_the_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    write_shards(tmp_path / "blobs", {"0abc": {"a": ("U8", (1,))}}, index=False)
    folder = tmp_path / "snapshots" / "rev"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to("../../blobs/0abc")
    found = read_index(folder)
    assert found is not None
    assert list(found.tensors) == ["a"]


def test_a_shard_that_the_index_forgot(tmp_path: Path) -> None:
    write_shards(tmp_path, GOOD)
    write_index(tmp_path, dict.fromkeys(GOOD[A], A))
    assert f"{B}: belongs to the same set of shards" in faults(tmp_path)


def test_weights_of_another_layout_are_left_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, GOOD)
    write_shards(tmp_path, {"consolidated.safetensors": {"layers.0.w": ("U8", (1,))}}, index=False)
    found = read_index(tmp_path)
    assert found is not None
    assert "layers.0.w" not in found.tensors


def one(begin: Any = 0, end: Any = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": one(dtype="F33")}, 4, "dtype `F33`"),
        ({"a": one(dtype=["F32"])}, 4, "dtype"),
        ({"a": one(shape=(2,))}, 4, r"needs 8"),
        ({"a": one(shape=(2**40, 2**40))}, 4, "needs"),
        ({"a": one(shape=(-1,))}, 4, "no short list of sizes"),
        ({"a": one(shape=(True,))}, 4, "no short list of sizes"),
        ({"a": one(shape=(1,) * 33)}, 4, "no short list of sizes"),
        ({"a": one(shape="1")}, 4, "no short list of sizes"),
        ({"a": one(4, 0)}, 4, "before its begin"),
        ({"a": one(0, 2**70)}, 4, "no pair of byte positions"),
        ({"a": one(0, 8, shape=(2,))}, 4, "is truncated"),
        ({"a": one(), "b": one(2, 6)}, 6, "overlaps"),
        ({"a": one(), "b": one(8, 12)}, 12, "belong to nothing"),
        ({"a": one(4, 8)}, 8, "between the header and tensor `a`"),
        ({"a": one()}, 5, "1 bytes after tensor `a` belong to nothing"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "needs exactly dtype, shape and data_offsets"),
        ({"a": {**one(), "more": 1}}, 4, "needs exactly"),
        ({"a": 3}, 4, "needs exactly"),
        ({"__metadata__": {"x": 1}, "a": one()}, 4, "__metadata__"),
        ([], 0, "not a mapping"),
        (b'{"a": ', 0, "is not JSON"),
        (b"\xff\xfe", 0, "not UTF-8"),
        (b'{"a": 1, "a": 2}', 0, "`a` is there twice"),
        (b"[" * 100_000, 0, "nested too deep"),
        (b'{"a": NaN}', 0, "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", 0, "is not JSON"),
    ],
)
def test_broken_headers(tmp_path: Path, header: Any, data: int, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, data))
    assert says in faults(tmp_path)


@pytest.mark.parametrize(
    ("claimed", "says"), [(MAX_HEADER_BYTES + 1, "too long"), (2**64 - 1, "too long"), (10_000, "is truncated")]
)
def test_claimed_lengths_are_not_believed(tmp_path: Path, claimed: int, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_bytes({}, 0, header_bytes=claimed))
    assert says in faults(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is truncated" in faults(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "no `weight_map`"),
        ('{"weight_map": []}', "no `weight_map`"),
        ('{"weight_map": {"a": 1}}', "names no file for `a`"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "`a` is there twice"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "only *.safetensors are read"),
    ],
)
def test_broken_indexes(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert says in faults(tmp_path)


def test_two_indexes(tmp_path: Path) -> None:
    write_shards(tmp_path, GOOD)
    (tmp_path / "other.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "several indexes" in faults(tmp_path)


def test_a_shard_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "is not a regular file" in faults(tmp_path)


dtypes = st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F8_E8M0", "I64"])
tensors = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=5
)


@settings(max_examples=50)
@given(tensors=tensors.filter(lambda t: "__metadata__" not in t))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    path.write_bytes(shard_bytes(*header_of(tensors)))
    found = read_header(path, path.name)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == tensors


@settings(max_examples=150)
@given(position=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 40), content=st.binary(max_size=80))
def test_damage_is_an_error_or_a_header(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: int, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("x")
    raw = bytearray(shard_bytes(*header_of({"a": ("F32", (2, 3)), "b": ("U8", (5,))})))
    raw[position % len(raw)] = byte
    for damaged in (bytes(raw), bytes(raw)[: len(raw) - cut], content):
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            found = read_index(folder)
        except CheckpointError:
            continue
        assert found is not None
        for info in found.tensors.values():
            assert 8 <= info.start <= info.end <= len(damaged)


def test_index_json_is_only_a_map(tmp_path: Path) -> None:
    """Sizes in the index's metadata are hints that writers get wrong; only names and shards count."""
    write_shards(tmp_path, GOOD)
    path = tmp_path / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["metadata"] = {"total_size": 1}
    path.write_text(json.dumps(document))
    assert read_index(tmp_path) is not None
