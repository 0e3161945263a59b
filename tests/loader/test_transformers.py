"""Each family's checkpoint as transformers writes it, loaded here: its blocks' outputs and its logits."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loader
from gatekeeper import Decisions, decide, read_facts
from loader.moe import Experts
from loader.packing import PACKERS
from loader.prepared import Prepared
from loader.verify import relative_error, tolerance
from tests.loader.ct_writer import decompress, quantize
from tests.loader.fakes import shipped
from tests.loader.surgery import rewrite
from tests.loader.test_blocks import from_golden
from tests.loader.tiny_models import MODELS, TOKENS, Replaced, Tiny, blocks, make, read

pytestmark = pytest.mark.transformers

Saved = tuple[Path, nn.Module]
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """A checkpoint as published (experts as their authors name them) or stacked as in memory; and the model again."""
    done: dict[tuple[str, str], Saved] = {}

    def save(name: str, layout: str) -> Saved:
        if (name, layout) not in done:
            tiny, folder = MODELS[name], tmp_path_factory.mktemp("saved") / "it"
            make(tiny).save_pretrained(folder, save_original_format=layout == "published")
            model = read(folder)
            if layout == "published":
                as_the_authors_do(folder, tiny)
            done[name, layout] = (folder, model)
        return done[name, layout]

    return save


def as_the_authors_do(folder: Path, tiny: Tiny) -> None:
    """Change what transformers spells otherwise, after it has read its own."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **tiny.published}), "utf-8")
    if tiny.renamed is not None:
        old, new = tiny.renamed
        rewrite(folder, lambda tensors: [tensors.update({n.replace(old, new): tensors.pop(n)}) for n in list(tensors)])


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


def compare(
    model: nn.Module, folder: Path, decisions: Decisions, weights_in: torch.dtype | None = None
) -> tuple[dict[int, float], float, Prepared]:
    """By layer, how far our block is from transformers', and how far the logits are with all blocks replaced.

    Our layers compute from exact weights, or from those rounded to `weights_in` where transformers' are.
    """
    prepared = loader.prepare(folder, decisions, shipped())
    layers = loader.build(prepared.plan, prepared.index)
    for experts in (m for layer in layers for m in layer.modules() if weights_in and isinstance(m, Experts)):
        experts.dequantize = partial(rounded, experts.dequantize, weights_in)
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


def rounded(
    exact: Callable[..., tuple[torch.Tensor, ...]], to: torch.dtype, experts_U: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    return tuple(weight.to(dtype) for weight in exact(experts_U, to))


LAYOUTS = [(name, layout) for name, tiny in MODELS.items() for layout in tiny.layouts]
CASES = [(name, layout, fused) for name, layout in LAYOUTS for fused in (False, True)[: 1 + MODELS[name].fuses]]


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("name", "layout", "fused"), CASES, ids=["-".join((n, how, *["fused"] * f)) for n, how, f in CASES]
)
def test_blocks_and_logits_are_those_of_transformers(
    saved: Callable[[str, str], Saved], name: str, layout: str, fused: bool, backend: str
) -> None:
    folder, model = saved(name, layout)
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
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_what_is_loaded_is_what_our_own_reference_reads(
    saved: Callable[[str, str], Saved], name: str, layout: str, dtype: torch.dtype
) -> None:
    folder, _ = saved(name, layout)
    prepared = loader.prepare(folder, decided(folder, "grouped_mm", fused=MODELS[name].fuses), shipped())
    layers = loader.build(prepared.plan, prepared.index)
    found = loader.verify(layers, prepared.plan, prepared.index, prepared.tensors, tokens=16, dtype=dtype)
    assert all(0 < one.figure <= one.tolerance and one.tokens > 8 for one in found)


def test_qwen_ships_its_stacks_transposed(saved: Callable[[str, str], Saved], tmp_path: Path) -> None:
    """transformers reads both ways round, and writes but one of them."""
    source, model = saved("Qwen3-VL-MoE", "stacked")
    folder = shutil.copytree(source, tmp_path / "transposed")
    stacks = (".experts.gate_up_proj", ".experts.down_proj")

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if n.endswith(stacks)})

    rewrite(folder, transpose)
    figures, logits, prepared = compare(model, folder, decided(folder, "eager", fused=False))
    assert max(figures.values()) <= allowed(prepared) and logits <= len(figures) * allowed(prepared)


def test_a_wrong_block_is_seen_in_the_logits(saved: Callable[[str, str], Saved]) -> None:
    """The comparison can fail: experts that are loaded in another order are no match."""
    folder, model = saved("Mixtral", "published")
    decisions = decided(folder, "eager", fused=False)
    layers = loader.load_moe(folder, decisions, rules=shipped())
    _, seen = run(model)
    layers[0].experts.w2_weight.data.copy_(layers[0].experts.w2_weight.flip(0).clone())
    with torch.no_grad():
        assert relative_error(layers[0](seen[0][0]), seen[0][1]) > 0.1


def test_gpt_oss_stays_packed(saved: Callable[[str, str], Saved], tmp_path: Path) -> None:
    """MXFP4 blocks and scales as OpenAI ships them: packed in memory, with the logits of transformers' dequantizer."""
    import transformers

    folder = shutil.copytree(saved("gpt-oss", "published")[0], tmp_path / "packed")
    rewrite(folder, pack_stacks)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), "utf-8")
    model = read(folder, quantization_config=transformers.Mxfp4Config(dequantize=True)).float()
    figures, logits, prepared = compare(model, folder, decided(folder, "grouped_mm", fused=False))
    assert {one.format for one in prepared.plan.layers} == {"mxfp4"}
    packed = {param.dtype for one in prepared.plan.layers for param in one.params if "bias" not in param.name}
    assert packed == {"U8", "BF16"}, "bf16 is the router alone"
    print(f"gpt-oss mxfp4: blocks {max(figures.values()):.1e}, logits {logits:.1e}, allowed {allowed(prepared):.1e}")
    assert max(figures.values()) <= allowed(prepared) and logits <= len(figures) * allowed(prepared)
    layers = loader.load_moe(folder, decided(folder, "eager", fused=False), rules=shipped())
    assert all(one.figure > 0 for one in loader.verify(layers, prepared.plan, prepared.index, prepared.tensors))


def pack_stacks(tensors: dict[str, torch.Tensor]) -> None:
    """Experts in bf16, ``(E, in, out)``, to blocks ``(E, out, in / 32, 16)`` and scales ``(E, out, in / 32)``."""
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = PACKERS["mxfp4"](tensors.pop(name).transpose(1, 2).contiguous())
        tensors[f"{name}_blocks"] = packed["weight"].unflatten(-1, (-1, 16)).contiguous()
        tensors[f"{name}_scales"] = packed["weight_scale"]


PLAIN = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]


@pytest.mark.parametrize(
    ("format_name", "name", "plain"),
    [
        ("int4_g32", "DeepSeek-V3", "shared"),
        ("int4_g32", "DeepSeek-V3", ""),
        ("int4_g32", "Qwen3-MoE", ""),
        ("fp8_channel", "DeepSeek-V3", "shared"),
        ("fp8_channel", "Qwen3-MoE", ""),
        ("mxfp4", "DeepSeek-V3", ""),
        ("nvfp4_ct", "DeepSeek-V3", "shared"),
        ("nvfp4_ct", "Qwen3-MoE", ""),
    ],
)
def test_what_compressed_tensors_writes_has_the_logits_of_what_it_reads(
    saved: Callable[[str, str], Saved], tmp_path: Path, format_name: str, name: str, plain: str
) -> None:
    import transformers

    folder = shutil.copytree(saved(name, "published")[0], tmp_path / "quantized")
    quantize(folder, format_name, [*PLAIN, "re:.*shared_experts.*"] if plain else PLAIN)
    if format_name == "nvfp4_ct":
        # transformers 5.23 leaves the factor of the whole matrix out when it stacks experts; its library does not.
        model = read(decompress(folder, tmp_path / "dense"))
    else:
        model = read(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    # Its int4 and NVFP4 are multiplied out in the dtype of their scales or of the model, which is bf16 here; so is
    # FP8 outside of the routed experts, which is why the shared ones stay plain beside it.
    weights_in = torch.bfloat16 if format_name in ("int4_g32", "nvfp4_ct") else None
    fused = MODELS[name].fuses and not plain
    figures, logits, prepared = compare(model.float(), folder, decided(folder, "eager", fused=fused), weights_in)
    print(f"{name} {format_name}: blocks {max(figures.values()):.1e}, logits {logits:.1e}, {allowed(prepared):.1e}")
    assert {one.format for one in prepared.plan.layers} == {format_name}
    assert {one.shared == "slot" for one in prepared.plan.layers} == {fused}
    assert max(figures.values()) <= allowed(prepared) and logits <= len(figures) * allowed(prepared)


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDENS / "blocks").glob("*.json")))
def test_the_kept_blocks_are_what_transformers_makes(name: str, root: Path) -> None:
    spec = importlib.util.spec_from_file_location("goldens", root / "scripts" / "make_block_goldens.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept, made = json.loads((GOLDENS / "blocks" / f"{name}.json").read_text("utf-8")), script.golden(name)
    assert {key: made[key] for key in ("tensors", "x")} == {key: kept[key] for key in ("tensors", "x")}
    torch.testing.assert_close(from_golden(made["y"]), from_golden(kept["y"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_bfloat16(saved: Callable[[str, str], Saved], name: str) -> None:
    """As models are run. Where scores are nearly alike, rounding chooses experts: those tokens are left out."""
    folder, model = saved(name, MODELS[name].layouts[0])
    prepared = loader.prepare(folder, decided(folder, "grouped_mm", fused=False), shipped())
    _, seen = run(model)
    compared, figures = 0, []
    for layer in loader.build(prepared.plan, prepared.index):
        x_TD = seen[layer.index][0].reshape(-1, 64).bfloat16()
        block = copy.deepcopy(model.get_submodule(blocks(model)[layer.index])).bfloat16()
        routed: list[Any] = []
        router = block.gate if hasattr(block, "gate") else block.router
        router.register_forward_hook(lambda _, args, output, routed=routed: routed.append(output))
        with torch.no_grad():
            output = block(x_TD[None])
            theirs = (output[0] if isinstance(output, tuple) else output).reshape(x_TD.shape)
            ours, (_, ids_TK) = layer(x_TD), layer.router(x_TD)
        alike_T = torch.tensor([set(a) == set(b) for a, b in zip(chosen(routed[0]), ids_TK.tolist(), strict=True)])
        compared += int(alike_T.sum())
        figures.append(relative_error(ours[alike_T].double(), theirs[alike_T].double()))
    print(f"{name}: bf16 blocks {max(figures):.1e}, {compared} of {len(figures) * len(x_TD)} tokens")
    # Theirs and ours each as far from the exact output.
    assert max(figures) <= 2 * tolerance(["bf16"], torch.bfloat16, 96, prepared.plan.experts)
    assert compared > 0.9 * len(figures) * len(x_TD)


def chosen(output: tuple[torch.Tensor, ...]) -> list[list[int]]:
    """The experts of each token, from what a router of transformers gives: their numbers, or scores of 0 elsewhere."""
    for one in output:
        if not one.is_floating_point():
            return one.tolist()
    return [row.nonzero().flatten().tolist() for row in output[0]]
