"""Plans without weights: from config.json alone or from headers alone, equal to each other and to paper arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from gatekeeper import CheckpointError, GatekeeperError, decide, join, load_rules, open_target, runners_of
from gatekeeper.load import shipped_rules
from gatekeeper.source import check_data
from loader import Plan
from loader.cli import group
from loader.costs import rank_bytes
from loader.fits import fit
from loader.planning import plan_target
from loader.text import bytes_of

CORPUS = Path(__file__).parent.parent / "corpus"
MODELS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
GIB = 2**30


def plans_of(target: Path, platform: str | None = None, **settings: int) -> dict[str, Plan]:
    """The plan of each runner; `tp_size=8` sets parallel.tp_size."""
    rules, given = load_rules(), {f"parallel.{name}": value for name, value in settings.items()}
    checkpoint = open_target(target, rules)
    found = {}
    for runner in runners_of(checkpoint):
        facts = join(checkpoint, runner=runner, platform=platform, settings=given, rules=rules)
        with capture_logs():
            found[runner] = plan_target(target, decide(rules, facts), rules, facts)
    return found


def shrunk(model: str, folder: Path, experts: int = 16) -> Path:
    """The config of a model with fewer experts, in which nothing else differs."""
    config = json.loads((CORPUS / model / "config.json").read_text("utf-8"))
    own = next((config[key] for key in ("text_config", "language_config", "llm_config") if key in config), config)
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if key in own:
            own[key] = experts
    (folder / "config.json").write_text(json.dumps(config))
    beside = CORPUS / model / "hf_quant_config.json"
    if beside.exists():
        (folder / beside.name).write_bytes(beside.read_bytes())
    return folder


@pytest.fixture(scope="module")
def kimi() -> Plan:
    return plans_of(CORPUS / "moonshotai__Kimi-K2.5" / "config.json", tp_size=8)["target"]


def test_kimi_agrees_with_paper_to_the_byte(kimi: Plan) -> None:
    """moonshotai/Kimi-K2.5 at TP8, from the numbers of its config.json and of the int4 format."""
    weights = 3 * 2048 * 7168  # gate, up and down of one expert
    expert = weights // 2 + weights // 32 * 2  # half a byte a weight, a bf16 scale to 32 of them
    assert expert == 24_772_608
    experts = 60 * 384 * expert  # layers 1-60
    shared = 60 * weights * 2  # bf16
    routers = 60 * (384 * 7168 * 2 + 384 * 4)  # bf16, and a correction bias in fp32
    assert kimi.nbytes == experts + shared + routers
    assert (kimi.per_rank.experts, kimi.per_rank.shared, kimi.per_rank.routers) == (
        71_345_111_040,
        660_602_880,
        330_393_600,
    )
    assert (experts // 8, shared // 8, routers) == (71_345_111_040, 660_602_880, 330_393_600)


def test_memory_is_no_detector_of_wrong_fusion(kimi: Plan) -> None:
    """A shared expert in an int4 slot instead of on its own in bf16: 0.44 GiB of 67 on a rank, lost in the noise."""
    assert kimi.fusion.layers_separate == 60
    assert kimi.fusion.unfused_bytes_per_rank == 60 * (24_772_608 - 3 * 2048 * 7168 * 2) // 8 == -474_808_320
    assert abs(kimi.fusion.unfused_bytes_per_rank) < 0.45 * GIB


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 1), (4, 1), (16, 16), (32, 4), (8, 8), (64, 2)])
def test_any_layout_is_counted(kimi: Plan, tp_size: int, ep_size: int) -> None:
    """Experts are spread over ep, their widths over tp / ep; a shared expert on its own over tp; routers are whole."""
    one = rank_bytes(kimi.layers, tp_size, ep_size)
    assert one.experts == 60 * (384 // ep_size) * 24_772_608 // (tp_size // ep_size)
    assert one.shared == 60 * 3 * 2048 * 7168 * 2 // tp_size
    assert one.routers == kimi.per_rank.routers


def test_what_can_not_be_cut_is_on_every_rank(tmp_path: Path) -> None:
    """Of FP8 by channel, down_proj's scales go by its rows, which are not divided."""
    config = json.loads((CORPUS / "deepseek-ai__DeepSeek-V3" / "config.json").read_text("utf-8"))
    config |= {"n_routed_experts": 16, "num_nextn_predict_layers": 0}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:.*shared_experts.*"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plans_of(tmp_path, tp_size=8)["target"]
    width, hidden = 2048, 7168
    scales = 2 * (2 * width) // 8 + 2 * hidden  # bf16: gate's and up's are divided, down's are not
    assert plan.per_rank.experts == 58 * 16 * (3 * width * hidden // 8 + scales)


def test_gpt_oss_agrees_with_paper_to_the_byte() -> None:
    """openai/gpt-oss-120b: experts in one tensor, MXFP4, biases in experts and router."""
    plan = plans_of(CORPUS / "openai__gpt-oss-120b" / "config.json", tp_size=5)["target"]
    weights = 3 * 2880 * 2880
    expert = weights // 2 + weights // 32 + (2 * 2880 + 2880) * 2
    assert plan.nbytes == 36 * (128 * expert + (128 * 2880 + 128) * 2)
    assert {p.key for p in plan.layers[0].placements if p.expert is not None} == {
        f"model.layers.0.mlp.experts.{name}_{suffix}"
        for name in ("gate_up_proj", "down_proj")
        for suffix in ("blocks", "scales", "bias")
    }


UNREAD = {"deepseek_v4", "muse_glimmer", "nemotron_h"}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_plans_from_its_config_or_says_why_not(tmp_path: Path, model: str) -> None:
    folder = shrunk(model, tmp_path)
    facts = open_target(folder, shipped_rules())
    family = facts.family
    assert family is not None
    try:
        plans = plans_of(folder)
    except GatekeeperError as error:
        said = str(error)
        assert any(words in said for words in ("does not compute", "this loader has", "does not tell")), said
        assert family.name in UNREAD or model == "nvidia__Gemma-4-26B-A4B-NVFP4"
        return
    assert family.name not in UNREAD
    for plan in plans.values():
        assert plan.source == "config"
        assert plan.nbytes == sum(layer.nbytes for layer in plan.layers) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"family": "kimi_k25", "format_name": "int4_g32"},
        {"family": "kimi_k25", "format_name": "mxfp4"},
        {"family": "kimi_k2", "format_name": "fp8_block"},
        {"family": "glm4_moe", "format_name": "bf16"},
        {"family": "deepseek_v2", "format_name": "mxfp4", "shared_format": "bf16"},
    ],
    ids=str,
)
def test_config_alone_and_headers_come_to_the_same_plan(made: Callable[..., Path], options: dict[str, Any]) -> None:
    folder = made(experts=16, **options)
    stored, announced = plans_of(folder, tp_size=2), plans_of(folder / "config.json", tp_size=2)
    assert stored.keys() == announced.keys()
    for runner, plan in stored.items():
        other = announced[runner]
        assert (plan.source, other.source) == ("headers", "config")
        assert (plan.per_rank, plan.fusion, plan.router) == (other.per_rank, other.fusion, other.router)
        for one, two in zip(plan.layers, other.layers, strict=True):
            assert one.params == two.params
            assert one.placements == two.placements


def test_headers_alone(made: Callable[..., Path], tmp_path: Path) -> None:
    """A shard that is nothing but its header, with a hole for the rest, is enough for a plan."""
    folder = made(family="kimi_k25", format_name="int4_g32", experts=16)
    for file in folder.iterdir():
        copy, whole = tmp_path / file.name, file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else len(whole)
        with copy.open("wb") as out:
            out.write(whole[:header])
            out.truncate(len(whole))
    assert plans_of(tmp_path) == plans_of(folder)


def test_what_config_does_not_tell_is_said(tmp_path: Path) -> None:
    folder = shrunk("moonshotai__Kimi-K2.5", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"]["quant_method"] = "new-method"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"routed experts of layer 1 .*`new-method` is not known here"):
        plans_of(folder)


def test_a_config_can_not_make_us_count_for_ever(tmp_path: Path) -> None:
    folder = shrunk("moonshotai__Kimi-K2.5", tmp_path, experts=99_999)
    with pytest.raises(CheckpointError, match="99999 experts in each of 60 layers, more than 1000000 in all"):
        plans_of(folder)


def test_fit_says_what_would(kimi: Plan) -> None:
    small = fit([kimi], 60 * GIB, "--memory")
    assert (small.fits, small.smallest_tp_size) == (False, 16)
    assert "do not fit the 60.0 GiB of a device (--memory), by 7.4 GiB; they fit from tp 16 on" in small.lines()[0]
    large = fit([kimi], 80 * GIB, "--memory")
    assert large.fits
    assert large.as_json()["left_bytes"] == 80 * GIB - 72_336_107_520
    assert fit([kimi], GIB, "--memory").smallest_tp_size is None
    assert all("not counted: attention" in one.lines()[2] for one in (small, large))


def test_draft_and_target_share_a_device(tmp_path: Path) -> None:
    plans = plans_of(shrunk("deepseek-ai__DeepSeek-V3", tmp_path), tp_size=2)
    assert set(plans) == {"target", "draft"}
    held = [plan.per_rank.nbytes for plan in plans.values()]
    assert fit(list(plans.values()), 80 * GIB, "x").nbytes == sum(n for n in held if n is not None)


def test_experts_that_can_not_be_divided(tmp_path: Path) -> None:
    """MiniMax-M2: experts 1536 wide in blocks of 128 are twelve blocks, no multiple of eight (ROCm/ATOM#442)."""
    plans = plans_of(shrunk("MiniMaxAI__MiniMax-M2", tmp_path), tp_size=8)
    found = fit(list(plans.values()), 80 * GIB, "x")
    assert (found.nbytes, found.fits) == (None, False)
    assert found.smallest_tp_size is not None and found.smallest_tp_size < 8
    assert found.lines()[0].startswith("memory: the experts can't be divided so, whatever fits ")
    assert "; they fit from tp " in found.lines()[0]


def test_expert_parallelism_that_no_number_of_ranks_can_have(tmp_path: Path) -> None:
    plans = plans_of(shrunk("MiniMaxAI__MiniMax-M2", tmp_path), tp_size=9, ep_size=3)
    found = fit(list(plans.values()), 80 * GIB, "x")
    assert (found.divides, found.smallest_tp_size) == (False, None)
    assert "with ep 3 no tp up to 256 divides them, so choose another ep" in found.lines()[0]


def test_ranks_are_tried_in_multiples_of_the_groups(tmp_path: Path) -> None:
    """160 experts in 5 groups: 15 ranks can't share widths so, 10 can."""
    plans = plans_of(CORPUS / "Qwen__Qwen3-Coder-480B-A35B-Instruct" / "config.json", tp_size=15, ep_size=5)
    found = fit(list(plans.values()), 141 * 10**9, "x")
    assert (found.nbytes, found.divides, found.smallest_tp_size) == (None, True, 10)
    assert "they fit from tp 10 on" in found.lines()[0]


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("141 GB", 141 * 10**9), ("1.5 KiB", 1536), ("7", 7), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 gib", "-1GB", "1e9", "80iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write 80GiB"):
        bytes_of(text)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["plan", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_the_commands_json_fits_its_schema(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(family="deepseek_v3", format_name="fp8_block", experts=16)
    for arguments in (
        (folder, "--tensors"),
        (CORPUS / "openai__gpt-oss-120b" / "config.json", "--tensors"),
        (folder / "config.json", "--memory", "1GiB"),
        (folder, "--platform", "h200", "--set", "parallel.tp_size=3"),
        (shrunk("moonshotai__Kimi-K2.5", tmp_path), "--memory", "10MB"),
    ):
        code, out = run(*arguments, "--json")
        answer = json.loads(out)
        assert [str(fault) for fault in check_data(answer, "plan", "plan")] == []
        indivisible = any(one["plan"]["bytes_per_rank"]["note"] for one in answer["runners"])
        assert code == (indivisible or (answer["memory"] is not None and not answer["memory"]["fits"]))


def test_a_layout_that_can_not_be_is_bad_news_on_any_device(made: Callable[..., Path]) -> None:
    code, out = run(made(family="deepseek_v3", format_name="fp8_block", experts=16), "--set", "parallel.tp_size=7")
    assert code == 1 and "can't be divided" in out


def test_a_folder_of_tables_that_is_not_there(made: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["plan", str(made(family="deepseek_v3", format_name="fp8_block", experts=16))]
    done = CliRunner().invoke(group, [*arguments, "--tables", str(tmp_path / "nothing")])
    assert done.exit_code == 2
    assert "Invalid value for '--tables'" in done.output and "does not exist" in done.output


def test_a_model_without_draft_layers_has_nothing_to_plan_for_a_draft() -> None:
    code, out = run(CORPUS / "Qwen__Qwen3-30B-A3B" / "config.json", "--runner", "draft")
    assert code == 0
    assert "draft: 0 MoE layers" in out


def test_the_command_says_what_it_counted(tmp_path: Path) -> None:
    folder = shrunk("moonshotai__Kimi-K2.5", tmp_path)
    code, out = run(folder / "config.json", "--platform", "h200", "--set", "parallel.tp_size=8")
    assert code == 0
    for words in (
        "target: 60 MoE layers of kimi_k25, from config.json alone",
        "layers 1-60: 16 routed experts in int4_g32, shared expert on its own in bf16",
        "in slots they would take 452.8 MiB less on each rank",
        "fit the 131.3 GiB of a device (platforms.yaml: h200)",
        "counted: weights of experts, shared experts and routers",
        "not counted: attention",
    ):
        assert words in out
    assert run(folder, "--memory", "100MB")[0] == 1
    assert run(folder, "--memory", "much")[0] == 2
    done = CliRunner().invoke(group, ["plan", str(folder), "--memory", "80"])
    assert done.exit_code == 2 and "no device has 80 bytes; give its memory with a unit" in done.output
    assert "memory:" not in run(folder)[1]


def test_the_command_says_what_is_lost_where_settings_were_not_measured() -> None:
    versions = ("--set", "library.triton=3.6.0", "--set", "library.torch=2.11.0")
    target = CORPUS / "moonshotai__Kimi-K2.5" / "config.json"
    _, told = run(target, "--platform", "h200", *versions)
    assert "  moe_backend: triton\n  shared" in told
    _, told = run(target, "--platform", "h100", *versions)
    lines = told.splitlines()
    at = lines.index("  moe_backend: triton_untuned")
    assert lines[at + 1].startswith("    degraded: The same kernels, with settings that are counted")
    assert lines[at + 2] == "    not triton: measured-for-the-routed-stack"


def test_the_command_says_which_kernels_it_can_not_have() -> None:
    newer = ("--set", "library.triton=3.7.0", "--set", "library.torch=2.11.0")
    _, told = run(CORPUS / "moonshotai__Kimi-K2.5" / "config.json", "--platform", "h200", *newer)
    assert "  moe_backend: grouped_mm\n    not triton: triton-was-tested\n    not triton_untuned: triton-was" in told


@pytest.mark.parametrize("ep_size", [1, 4])
def test_a_device_has_one_share_whichever_rank_is_shown(ep_size: int) -> None:
    config = CORPUS / "moonshotai__Kimi-K2.5" / "config.json"
    sizes = ("--set", "parallel.tp_size=4", "--set", f"parallel.ep_size={ep_size}", "--memory", "80GiB")
    code, told = run(config, *sizes)
    shown_code, shown = run(config, *sizes, "--rank", "1")
    memory = [line for line in told.splitlines() if line.startswith("memory:")]
    assert [line for line in shown.splitlines() if line.startswith("memory:")] == memory
    assert "134.4 GiB on each rank do not fit" in memory[0] and "they fit from tp 8 on" in memory[0]
    assert (code, shown_code) == (1, 1)
    assert "on rank 1" in shown


def test_a_division_that_is_half_said() -> None:
    _, told = run(CORPUS / "moonshotai__Kimi-K2.5" / "config.json", "--set", "parallel.ep_size=8")
    assert "tp 1 is not a multiple of ep 8; set parallel.tp_size, too" in told
