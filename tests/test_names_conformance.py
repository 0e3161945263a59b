"""Our matching of module names against the functions of the libraries that write the lists."""

from __future__ import annotations

import random

import pytest

from gatekeeper.names import covers, spellings

pytestmark = pytest.mark.conformance

WORDS = ("model", "layers", "1", "10", "mlp", "experts", "gate", "gate_proj", "shared_experts", "self_attn")
REGEXES = ("re:.*mlp.*", r"re:model\.layers\.1", "re:.*shared_experts.*", "re:.*gate$", "re:layers")
GLOBS = ("*mlp*", "*.gate", "model.layers.1*", "*shared_experts*", "model.layers.?.mlp.gate")


def draw(seed: int, patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Patterns, of which half are names, each with a name."""
    rng = random.Random(seed)

    def name() -> str:
        return ".".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    return [(rng.choice(patterns) if rng.random() < 0.5 else name(), name()) for _ in range(20_000)]


@pytest.mark.parametrize("seed", range(2))
def test_names_match_as_compressed_tensors_matches_them(seed: int) -> None:
    from compressed_tensors.utils.match import match_name

    for pattern, name in draw(seed, REGEXES):
        expected = any(match_name(one, pattern) for one in spellings(name))
        assert covers("compressed-tensors", [pattern], name) is expected, (pattern, name)


@pytest.mark.parametrize("seed", range(2))
def test_names_match_as_quark_matches_them(seed: int) -> None:
    from quark.torch.quantization.file2file_utils import match_modules

    for pattern, name in draw(seed, GLOBS):
        expected = bool(match_modules(pattern, set(spellings(name))))
        assert covers("quark", [pattern], name) is expected, (pattern, name)


@pytest.mark.parametrize("seed", range(5))
def test_names_match_as_modelopt_means_what_it_writes(seed: int) -> None:
    """Its export folds the modules that it left alone into few patterns, which must cover those and no other."""
    utils = pytest.importorskip("modelopt.torch.export.quant_utils", reason="ModelOpt is not of this suite")
    rng = random.Random(seed)
    below = ["self_attn.q_proj", "mlp.gate", "mlp.shared_experts.up_proj", "mlp.shared_expert_gate"]
    below += [f"mlp.experts.{expert}.up_proj" for expert in (0, 1, 10)]
    modules = {f"model.layers.{layer}.{name}" for layer in (0, 1, 6, 10, 61) for name in below}
    plain = {name for name in modules if rng.random() < 0.3 or name.startswith("model.layers.1.")}
    listed = sorted(utils._prefix_wildcard_summarize_exclude_modules(plain, modules - plain))
    assert {name for name in modules if covers("modelopt", listed, name)} == plain
