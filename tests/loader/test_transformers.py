"""Each family's checkpoint as transformers writes it, loaded here: its blocks' outputs and its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loader
from gatekeeper import Decisions, decide, read_facts
from loader.load import Prepared
from loader.verify import relative_error, tolerance
from tests.loader.fakes import shipped
from tests.loader.tiny_models import MODELS, TOKENS, Replaced, blocks, make, read

pytestmark = pytest.mark.transformers

Saved = tuple[Path, nn.Module]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Saved]:
    """A checkpoint as published (experts as their authors name them) or as the model has it in memory (stacked)."""
    done: dict[tuple[str, bool], Saved] = {}

    def save(name: str, published: bool) -> Saved:
        if (name, published) not in done:
            folder = tmp_path_factory.mktemp("saved") / "it"
            make(MODELS[name]).save_pretrained(folder, save_original_format=published)
            # Both have the same numbers, so one model serves both.
            done[name, published] = (folder, read(folder) if not published else save(name, False)[1])
        return done[name, published]

    return save


def decided(folder: Path, backend: str, *, fused: bool) -> Decisions:
    """Our own command's decisions; tiny counts of experts are no supported ones, so that fusion has to be forced."""
    name = "server.enforce_shared_experts_fusion" if fused else "server.disable_shared_experts_fusion"
    facts = read_facts(
        folder,
        platform="h100",
        set={name: True, "server.moe_runner_backend": backend, "library.torch": "2.13", "parallel.tp_size": 1},
    )
    return decide(shipped(), facts)


def allowed(prepared: Prepared) -> float:
    """Of a block's largest output: our layer's distance from the exact one, and once more for transformers' own."""
    one = prepared.plan.layers[0]
    formats = [one.format, *([one.shared_format] if one.shared_format else [])]
    widest = max(one.hidden_size, one.width, one.shared_width)
    return 2 * tolerance(formats, torch.float32, widest, prepared.plan.experts)


def run(model: Any) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, Any]]]:
    """Logits, and by layer what went into its MoE block and what came out."""
    seen: dict[int, tuple[torch.Tensor, Any]] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[index] = (args[0] if args else kwargs["hidden_states"], output)

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(watch(index), with_kwargs=True)
        for index, name in blocks(model).items()
    ]
    with torch.no_grad():
        logits = model(TOKENS).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def compare(model: nn.Module, folder: Path, decisions: Decisions) -> tuple[dict[int, float], float, Prepared]:
    """By layer, how far our block is from transformers', and how far the logits are with all blocks replaced."""
    prepared = loader.prepare(folder, decisions)
    layers = loader.load_moe(folder, decisions)
    expected, seen = run(model)
    figures: dict[int, float] = {}
    originals = {}
    for layer in layers:
        x, output = seen[layer.index]
        out = output[0] if isinstance(output, tuple) else output
        with torch.no_grad():
            figures[layer.index] = relative_error(layer(x).reshape(out.shape), out)
        name = blocks(model)[layer.index]
        originals[name] = model.get_submodule(name)
        model.set_submodule(name, Replaced(layer, output))
    try:
        with torch.no_grad():
            logits = model(TOKENS).logits  # type: ignore[operator]
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
    return figures, relative_error(logits, expected), prepared


CASES = [(name, fused) for name, tiny in MODELS.items() for fused in ([False, True] if tiny.fuses else [False])]


@pytest.mark.parametrize("published", [True, False], ids=["published", "stacked"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("name", "fused"), CASES, ids=[f"{n}{'-fused' if f else ''}" for n, f in CASES])
def test_blocks_and_logits_are_those_of_transformers(
    saved: Callable[[str, bool], Saved], name: str, fused: bool, backend: str, published: bool
) -> None:
    folder, model = saved(name, published)
    decisions = decided(folder, backend, fused=fused)
    figures, logits, prepared = compare(model, folder, decisions)
    print(f"{name}: blocks {max(figures.values()):.1e}, logits {logits:.1e}, allowed {allowed(prepared):.1e}")
    assert prepared.family.name == MODELS[name].family
    assert {one.shared == "slot" for one in prepared.plan.layers} == {fused}
    assert {one.backend for one in prepared.plan.layers} == {backend}
    assert tuple(figures) == MODELS[name].moe_layers
    assert max(figures.values()) <= allowed(prepared)
    # What a block is off by goes on through the residual stream of all layers behind it.
    assert logits <= len(figures) * allowed(prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_our_own_reference_reads(
    saved: Callable[[str, bool], Saved], name: str, dtype: torch.dtype
) -> None:
    for published in (True, False):
        folder, _ = saved(name, published)
        decisions = decided(folder, "grouped_mm", fused=MODELS[name].fuses)
        prepared = loader.prepare(folder, decisions)
        layers = loader.load_moe(folder, decisions)
        found = loader.verify(layers, prepared.plan, prepared.index, prepared.tensors, dtype=dtype)
        assert all(0 < one.figure <= one.tolerance and one.tokens > 8 for one in found)


def test_a_wrong_block_is_seen_in_the_logits(saved: Callable[[str, bool], Saved]) -> None:
    """The comparison can fail: experts that are loaded in another order are no match."""
    folder, model = saved("Mixtral", True)
    decisions = decided(folder, "eager", fused=False)
    layers = loader.load_moe(folder, decisions)
    _, seen = run(model)
    layers[0].experts.w2_weight.data.copy_(layers[0].experts.w2_weight.flip(0).clone())
    with torch.no_grad():
        assert relative_error(layers[0](seen[0][0]), seen[0][1]) > 0.1
