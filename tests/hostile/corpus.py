"""Checkpoint folders that mean harm, one function each: `python -m tests.hostile.corpus OUT` writes them all.

Each starts from a sound checkpoint of two layers and does one thing to it. The docstring of a function is the part of
the error that must be said.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny import Tensors, header_of, shard_bytes, write_index, write_shards

EXPERTS, WIDTH, HIDDEN = 4, 32, 64
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
BLOCK = "model.layers.1.mlp"
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MEGABYTE = 1 << 20

Harm = Callable[[Path], None]
HARMS: dict[str, Harm] = {}


def harm(function: Harm) -> Harm:
    """Register what a function does to a sound folder, under its name."""
    HARMS[function.__name__.replace("_", "-")] = function
    return function


def said(name: str) -> str:
    """A part of the error that a folder must be refused with."""
    return (HARMS[name].__doc__ or "").strip()


@cache
def tensors() -> tuple[Tensors, Tensors]:
    """The two shards of the sound checkpoint: what is in no layer with experts, and the layer with experts."""
    plain = {"model.embed_tokens.weight": ("BF16", (8, HIDDEN)), "model.norm.weight": ("BF16", (HIDDEN,))}
    sizes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    modules = [f"{BLOCK}.experts.{expert}" for expert in range(EXPERTS)] + [f"{BLOCK}.shared_experts"]
    layer = {f"{BLOCK}.gate.weight": ("BF16", (EXPERTS, HIDDEN))}
    layer[f"{BLOCK}.gate.e_score_correction_bias"] = ("F32", (EXPERTS,))
    layer |= {f"{module}.{name}.weight": ("BF16", size) for module in modules for name, size in sizes.items()}
    return plain, layer


def sound(folder: Path) -> Path:
    """Write the sound checkpoint."""
    write_shards(folder, dict(zip(SHARDS, tensors(), strict=True)))
    return config(folder)


def config(folder: Path, **changes: Any) -> Path:
    """Write config.json, with changes."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def ignoring(folder: Path, *patterns: str) -> None:
    """Let the config say that all but these modules are quantized by compressed-tensors."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config(folder, quantization_config={**quantization, "ignore": list(patterns)})


def reheader(folder: Path, change: Callable[[dict[str, Any]], Any], data: int = 0) -> None:
    """Rewrite the header of the second shard, and `data` bytes more behind it."""
    header, size = header_of(tensors()[1])
    changed = change(header)
    (folder / SHARDS[1]).write_bytes(shard_bytes(header if changed is None else changed, size + data))


def edit(folder: Path, **changes: Any) -> None:
    """Change the entry of the router in the second shard's header."""
    reheader(folder, lambda header: header[f"{BLOCK}.gate.weight"].update(changes))


# -- headers ----------------------------------------------------------------------------------------------------------


@harm
def header_length_huge(folder: Path) -> None:
    """is too long"""
    (folder / SHARDS[1]).write_bytes((2**63).to_bytes(8, "little") + b"{}")


@harm
def header_not_json(folder: Path) -> None:
    """is not JSON"""
    reheader(folder, lambda header: b"\x80\x04\x95 no JSON at all")


@harm
def header_not_utf8(folder: Path) -> None:
    """not UTF-8"""
    reheader(folder, lambda header: b'{"\xff\xfe": {}}')


@harm
def header_of_surrogates(folder: Path) -> None:
    """no Unicode text"""
    reheader(folder, lambda header: json.dumps({"\ud800": header[f"{BLOCK}.gate.weight"]}).encode())


@harm
def header_truncated(folder: Path) -> None:
    """is truncated"""
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:100])


@harm
def shard_empty(folder: Path) -> None:
    """is truncated"""
    (folder / SHARDS[1]).write_bytes(b"")


@harm
def shard_one_byte_short(folder: Path) -> None:
    """is truncated"""
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])


@harm
def header_nested_deep(folder: Path) -> None:
    """nested too deep"""
    reheader(folder, lambda header: b"[" * 3_000_000)


@harm
def header_of_lists(folder: Path) -> None:
    """needs exactly dtype, shape and data_offsets"""
    reheader(folder, lambda header: b'{"a":[' + b"[]," * (MEGABYTE) + b"[]]}")


@harm
def header_of_100_megabytes(folder: Path) -> None:
    """too long for a file of"""
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with (folder / SHARDS[1]).open("wb") as file:
        file.write((95 * MEGABYTE).to_bytes(8, "little") + b"{")
        count = 95 * MEGABYTE // 64
        file.writelines((entry % number).ljust(63) + b"," for number in range(count - 1))
        file.write((entry % count).ljust(62) + b"}")


@harm
def header_of_many_names(folder: Path) -> None:
    """here but the index does not name it"""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    reheader(folder, lambda header: {str(number): entry for number in range(30_000)} | header)


@harm
def name_twice_in_a_header(folder: Path) -> None:
    """is there twice"""

    def doubled(header: dict[str, Any]) -> bytes:
        text = json.dumps(header)
        entry = json.dumps(header[f"{BLOCK}.gate.weight"])
        return (text[:-1] + f', "{BLOCK}.gate.weight": {entry}}}').encode()

    reheader(folder, doubled)


@harm
def name_twice_in_shards(folder: Path) -> None:
    """a tensor belongs to one shard"""
    write_shards(folder, {SHARDS[0]: {**tensors()[0], f"{BLOCK}.gate.weight": ("U8", (1,))}}, index=False)
    (folder / INDEX).unlink()


@harm
def name_of_terminal_codes(folder: Path) -> None:
    r"""\x1b[2J"""
    reheader(folder, lambda header: {"\x1b[2J\nerror: all is well": 1})


@harm
def offsets_overlap(folder: Path) -> None:
    """overlaps"""
    edit(folder, data_offsets=[8, 8 + 2 * EXPERTS * HIDDEN])


@harm
def offsets_past_the_end(folder: Path) -> None:
    """is truncated: tensor"""
    edit(folder, data_offsets=[2**40, 2**40 + 2 * EXPERTS * HIDDEN])


@harm
def offsets_reversed(folder: Path) -> None:
    """before its begin"""
    edit(folder, data_offsets=[512, 0])


@harm
def offsets_with_a_gap(folder: Path) -> None:
    """belong to nothing"""

    def later(header: dict[str, Any]) -> None:
        for entry in header.values():
            entry["data_offsets"] = [position + 8 for position in entry["data_offsets"]]

    reheader(folder, later, data=8)


@harm
def data_after_the_last_tensor(folder: Path) -> None:
    """belong to nothing"""
    reheader(folder, lambda header: None, data=100)


@harm
def shape_negative(folder: Path) -> None:
    """no short list of sizes"""
    edit(folder, shape=[-EXPERTS, -HIDDEN])


@harm
def shape_overflowing(folder: Path) -> None:
    """beyond 64 bits"""
    edit(folder, shape=[2**33, 2**33, 2**33])


@harm
def shape_beyond_64_bits(folder: Path) -> None:
    """no short list of sizes"""
    edit(folder, shape=[2**64, 0])


@harm
def shape_of_floats(folder: Path) -> None:
    """no short list of sizes"""
    edit(folder, shape=[4.0, 64.0])


@harm
def shape_of_very_many_ones(folder: Path) -> None:
    """no short list of sizes"""
    edit(folder, shape=[1] * 100_000)


@harm
def shape_of_another_size(folder: Path) -> None:
    """bytes, but BF16 of shape"""
    edit(folder, shape=[EXPERTS, HIDDEN + 1])


@harm
def dtype_unknown(folder: Path) -> None:
    """which safetensors does not know"""
    edit(folder, dtype="F33")


@harm
def dtype_of_a_megabyte(folder: Path) -> None:
    """which safetensors does not know"""
    edit(folder, dtype="F" * MEGABYTE)


@harm
def metadata_of_numbers(folder: Path) -> None:
    """`__metadata__` is not a mapping of strings"""
    reheader(folder, lambda header: {"__metadata__": {"format": 1}} | header)


# -- paths ------------------------------------------------------------------------------------------------------------


def pointing(folder: Path, shard: str) -> None:
    """Let the index say that the layer's tensors are in another file."""
    write_index(folder, dict.fromkeys(tensors()[0], SHARDS[0]) | dict.fromkeys(tensors()[1], shard))


def outside(folder: Path) -> Path:
    """A sound shard beside the folder."""
    path = folder.parent / f"{folder.name}.safetensors"
    path.write_bytes((folder / SHARDS[1]).read_bytes())
    return path


@harm
def index_climbs_out(folder: Path) -> None:
    """the path leaves the folder"""
    pointing(folder, f"../../{outside(folder).name}")


@harm
def index_names_an_absolute_path(folder: Path) -> None:
    """the path leaves the folder"""
    pointing(folder, str(outside(folder)))


@harm
def index_names_a_very_long_path(folder: Path) -> None:
    """can't be opened"""
    pointing(folder, "x" * 5000 + ".safetensors")


@harm
def index_names_a_nul(folder: Path) -> None:
    """NUL"""
    pointing(folder, "x\0.safetensors")


@harm
def index_names_a_missing_shard(folder: Path) -> None:
    """the shard is missing"""
    pointing(folder, "model-00003-of-00002.safetensors")


@harm
def index_names_a_pickle(folder: Path) -> None:
    """only *.safetensors are read"""
    pointing(folder, "pytorch_model.bin")


@harm
def shard_links_out(folder: Path) -> None:
    """by a link"""
    target = outside(folder)
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(target)


@harm
def shard_links_in_a_circle(folder: Path) -> None:
    """can't be opened"""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("other.safetensors")
    (folder / "other.safetensors").symlink_to(SHARDS[1])


@harm
def shard_links_to_a_device(folder: Path) -> None:
    """by a link"""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("/dev/zero")


@harm
def shard_is_a_pipe(folder: Path) -> None:
    """is not a regular file"""
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


@harm
def shard_is_a_folder(folder: Path) -> None:
    """is not a regular file"""
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).mkdir()


@harm
def index_is_a_pipe(folder: Path) -> None:
    """is not a regular file"""
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


@harm
def index_links_out(folder: Path) -> None:
    """by a link"""
    path = folder / INDEX
    path.rename(folder.parent / f"{folder.name}.index")
    path.symlink_to(folder.parent / f"{folder.name}.index")


@harm
def config_is_a_pipe(folder: Path) -> None:
    """is not a regular file"""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@harm
def config_links_to_a_device(folder: Path) -> None:
    """by a link"""
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@harm
def hf_quant_config_is_a_pipe(folder: Path) -> None:
    """is not a regular file"""
    os.mkfifo(folder / "hf_quant_config.json")


# -- indexes and whole folders ----------------------------------------------------------------------------------------


@harm
def index_of_a_million(folder: Path) -> None:
    """shards are missing or it is another model's"""
    write_index(folder, {f"model.layers.1.mlp.experts.{n}.gate_proj.weight": SHARDS[1] for n in range(1_000_000)})


@harm
def index_of_empty_lists(folder: Path) -> None:
    """no `weight_map`"""
    (folder / INDEX).write_bytes(b"[" + b"[]," * MEGABYTE + b"[]]")


@harm
def index_not_json(folder: Path) -> None:
    """is not JSON"""
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-20])


@harm
def shard_of_another_model(folder: Path) -> None:
    """is in the index but not here"""
    write_shards(folder, {SHARDS[1]: {f"transformer.h.{n}.w": ("F32", (4, 4)) for n in range(3000)}}, index=False)


@harm
def experts_fewer_than_announced(folder: Path) -> None:
    """experts"""
    config(folder, n_routed_experts=2 * EXPERTS)


@harm
def layers_fewer_than_announced(folder: Path) -> None:
    """should have experts"""
    config(folder, num_hidden_layers=3)


@harm
def an_expert_of_a_very_large_number(folder: Path) -> None:
    """more than"""
    names = {f"{BLOCK}.experts.999999999.gate_proj.weight": ("BF16", (WIDTH, HIDDEN))}
    write_shards(folder, dict(zip(SHARDS, (tensors()[0], {**tensors()[1], **names}), strict=True)))


# -- configs ----------------------------------------------------------------------------------------------------------


@harm
def pattern_broken(folder: Path) -> None:
    """is no regular expression"""
    ignoring(folder, "re:(")


@harm
def pattern_catastrophic(folder: Path) -> None:
    """could take for ever"""
    ignoring(folder, "re:(.*)+$(.*a)*")


@harm
def pattern_catastrophic_in_disguise(folder: Path) -> None:
    """could take for ever"""
    ignoring(folder, "re:(?x)(.+) +Z")


@harm
def pattern_of_many_repeats(folder: Path) -> None:
    """could take for ever"""
    ignoring(folder, "re:" + ".*e" * 30)


@harm
def pattern_very_long(folder: Path) -> None:
    """characters, more than"""
    ignoring(folder, "re:" + "a" * MEGABYTE)


@harm
def patterns_by_the_thousand(folder: Path) -> None:
    """patterns with wildcards in one list"""
    ignoring(folder, *(f"re:.*e.*e.*e.*{n}$" for n in range(20_000)))


@harm
def patterns_of_stars_by_the_thousand(folder: Path) -> None:
    """patterns with wildcards in one list"""
    stars = [f"*.{number}?x" for number in range(100_000)]
    config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": stars})


@harm
def schemes_by_the_thousand(folder: Path) -> None:
    """patterns with wildcards in one list"""
    schemes = {f"*{number}*x": {"weight": {}} for number in range(100_000)}
    config(folder, quantization_config={"quant_method": "quark", "layer_quant_config": schemes})


@harm
def patterns_times_experts_times_layers(folder: Path) -> None:
    """experts in"""
    ignoring(folder, "re:.*experts\\.7\\..*")
    config(folder, n_routed_experts=90_000, num_hidden_layers=9_000, **quantization(folder))
    (folder / INDEX).unlink()
    for shard in SHARDS:
        (folder / shard).unlink()


def quantization(folder: Path) -> dict[str, Any]:
    """The quantization config that is there."""
    return {"quantization_config": json.loads((folder / "config.json").read_text())["quantization_config"]}


@harm
def config_nested_deep(folder: Path) -> None:
    """nested too deep"""
    (folder / "config.json").write_bytes(b'{"a":' * 800_000)


@harm
def config_nested_rather_deep(folder: Path) -> None:
    """nested deeper than"""
    (folder / "config.json").write_bytes(b'{"quantization_config":' + b'{"a":' * 300 + b"1" + b"}" * 301)


@harm
def config_of_not_a_number(folder: Path) -> None:
    """model.num_hidden_layers"""
    config(folder, num_hidden_layers=float("nan"))


@harm
def config_of_texts_for_numbers(folder: Path) -> None:
    """model.n_routed_experts"""
    config(folder, n_routed_experts=str(EXPERTS))


@harm
def config_of_a_trillion_layers(folder: Path) -> None:
    """model.num_hidden_layers"""
    config(folder, num_hidden_layers=10**18)


@harm
def config_of_a_trillion_experts(folder: Path) -> None:
    """experts"""
    config(folder, n_routed_experts=10**18)


@harm
def config_of_a_trillion_draft_layers(folder: Path) -> None:
    """model.num_nextn_predict_layers"""
    config(folder, num_nextn_predict_layers=10**18)


@harm
def config_of_a_number_of_a_million_digits(folder: Path) -> None:
    """digits"""
    text = json.dumps(CONFIG).replace('"num_hidden_layers": 2', '"num_hidden_layers": ' + "1" * 1_000_000)
    (folder / "config.json").write_text(text)


@harm
def config_negative(folder: Path) -> None:
    """model.n_routed_experts"""
    config(folder, n_routed_experts=-4)


@harm
def config_twice(folder: Path) -> None:
    """is there twice"""
    (folder / "config.json").write_text('{"model_type": "a", "model_type": "b"}')


@harm
def config_very_long(folder: Path) -> None:
    """is longer than"""
    (folder / "config.json").write_bytes(b'{"a": "' + b"x" * 10 * MEGABYTE + b'"}')


@harm
def config_of_empty_lists(folder: Path) -> None:
    """is not a JSON object"""
    (folder / "config.json").write_bytes(b"[" + b"[]," * MEGABYTE + b"[]]")


@harm
def config_not_an_object(folder: Path) -> None:
    """is not a JSON object"""
    (folder / "config.json").write_text("3")


@harm
def config_torn(folder: Path) -> None:
    """is not JSON"""
    (folder / "config.json").write_text(json.dumps(CONFIG)[:100])


@harm
def config_quantized_by_a_list(folder: Path) -> None:
    """is not a mapping"""
    config(folder, quantization_config=["int4"])


@harm
def config_ignores_numbers(folder: Path) -> None:
    """is not a list of module names"""
    ignoring(folder, *range(3))  # type: ignore[arg-type]


@harm
def config_missing(folder: Path) -> None:
    """there is no config.json in this folder"""
    (folder / "config.json").unlink()


def write(name: str, out: Path) -> Path:
    """Write one folder of the corpus below `out`."""
    folder = sound(out / name / "checkpoint")
    HARMS[name](folder)
    return folder


if __name__ == "__main__":
    for each in HARMS:
        print(write(each, Path(sys.argv[1])))
