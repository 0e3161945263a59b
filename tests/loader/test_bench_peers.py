from __future__ import annotations

import hashlib
import json
import lzma
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loader.bench import fetched as reader
from loader.bench import peers
from loader.bench.fetched import MANIFEST, Fetched, FetchedError
from loader.bench.peers import NAMES, Unavailable, peers_of
from loader.bench.problem import Model, Problem, problems, random_experts
from loader.kernels.eager import eager
from tests.loader.bench_fakes import model

MODEL = model(width=40)


def problem(tokens: int, model: Model = MODEL) -> Problem:
    return problems(model, [random_experts(model, "cpu", 1)], tokens, seed=2)[0]


def distance(y_TD: Tensor, one: Problem) -> float:
    """From the oracle in float32 on the same bf16 weights, relative."""
    reference = eager(one.x_TD.float(), one.topk_weights_TK, one.topk_ids_TK, one.experts)
    return float((y_TD.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_grouped_mm_computes_what_the_oracle_computes(tokens: int) -> None:
    (peer,) = peers_of(["torch-grouped_mm"])
    one = problem(tokens)
    call = peer(one)
    y_TD = call()
    assert y_TD.shape == one.x_TD.shape and y_TD.dtype == one.x_TD.dtype
    assert distance(y_TD, one) < peer.accuracy
    torch.testing.assert_close(call(), y_TD, rtol=0, atol=0)


def test_a_slot_nobody_chose_and_one_that_all_chose() -> None:
    one = problem(5)
    one = replace(one, topk_ids_TK=torch.tensor([[3, 0, 6]] * 5, dtype=torch.int32))
    (peer,) = peers_of(["torch-grouped_mm"])
    assert distance(peer(one)(), one) < peer.accuracy


def test_transformers_gets_what_its_models_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of 5.17 uses each attribute that the original reads."""

    def gate(experts: object, gate_up: Tensor) -> Tensor:
        left, right = gate_up.chunk(2, dim=-1)
        return experts.act_fn(left) * right  # type: ignore[attr-defined, no-any-return]

    def forward(experts: types.SimpleNamespace, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert experts.has_gate and not experts.has_bias and not experts.is_transposed and experts.num_experts == 7
        y = torch.zeros_like(x)
        for t, k in [(t, k) for t in range(index.shape[0]) for k in range(index.shape[1])]:
            hidden = experts._apply_gate(F.linear(x[t], experts.gate_up_proj[index[t, k]]))
            y[t] += weights[t, k] * F.linear(hidden, experts.down_proj[index[t, k]])
        return y

    module = types.ModuleType("transformers.integrations.moe")
    module.grouped_mm_experts_forward = forward  # type: ignore[attr-defined]
    module._default_apply_gate = gate  # type: ignore[attr-defined]
    for name in ("transformers", "transformers.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    one = problem(4)
    (peer,) = peers_of(["transformers"])
    assert distance(peer(one)(), one) < peer.accuracy


def test_transformers_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(Unavailable, match=r"needs transformers 5\.17"):
        peers_of(["transformers"])[0](problem(1))


def test_a_format_or_width_that_a_peer_has_not_is_a_sentence() -> None:
    packed = replace(MODEL, format="int4_g32", width=64)
    with pytest.raises(Unavailable, match="torch-grouped_mm multiplies bf16 weights only, not int4_g32"):
        peers_of(["torch-grouped_mm"])[0](problem(1, packed))
    with pytest.raises(Unavailable, match="the width is 36 numbers of 2 bytes"):
        peers_of(["torch-grouped_mm"])[0](problem(1, replace(MODEL, width=36)))


def test_names() -> None:
    assert [peer.name for peer in peers_of(["transformers", "torch-grouped_mm"])] == [
        "transformers",
        "torch-grouped_mm",
    ]
    with pytest.raises(
        ValueError, match="unknown peer `sglang`; there are torch-grouped_mm, transformers, sglang-triton"
    ):
        peers_of(["torch-grouped_mm", "sglang"])


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_peer_whose_files_are_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"files are not in .*; run `python benchmarks/peers/fetch.py"):
        peers_of([name], tmp_path / "nothing")
    monkeypatch.setattr(peers, "ADAPTERS", tmp_path)
    with pytest.raises(ValueError, match="which a checkout of this project has"):
        peers_of([name], tmp_path)


def fetched(folder: Path, **members: bytes) -> Fetched:
    """A folder as `fetch.py` leaves it; members with ``so`` in their name are packed."""
    folder.mkdir(exist_ok=True)
    files = []
    for member, data in members.items():
        stored = f"{member}.xz" if "so" in member else member
        (folder / stored).write_bytes(lzma.compress(data) if "so" in member else data)
        files.append({"member": member, "stored": stored, "sha256": hashlib.sha256(data).hexdigest()})
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    return Fetched(folder)


def test_fetched_files_are_unpacked_where_they_are_packed(tmp_path: Path) -> None:
    files = fetched(tmp_path, a=b"text", a_so=b"library")
    assert files.path("a") == tmp_path / "a"
    unpacked = files.path("a_so")
    assert unpacked.read_bytes() == b"library" and tmp_path not in unpacked.parents
    assert files.path("a_so") == unpacked
    files.require("a")


def test_a_library_is_loaded_once_however_often_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(reader, "_LOADED", set())
    for folder in ("one", "two"):
        files = fetched(tmp_path / folder, a_so=b"library")
        files.load("a_so")
        files.load("a_so")
    assert len(loaded) == 1


def test_fetched_files_that_changed_or_are_missing(tmp_path: Path) -> None:
    files = fetched(tmp_path, a=b"text", a_so=b"library")
    with pytest.raises(FetchedError, match="has no `b`; remove it"):
        files.path("b")
    with pytest.raises(FetchedError, match="has no `b`"):
        files.require("b")
    (tmp_path / "a").write_bytes(b"test")
    with pytest.raises(FetchedError, match="is not the file that was fetched"):
        files.require("a")
    (tmp_path / "a_so.xz").write_bytes(b"cut")
    with pytest.raises(FetchedError, match=r"a_so\.xz` can't be read"):
        files.path("a_so")
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(FetchedError, match="is not what"):
        Fetched(tmp_path)
