"""Cut a folder of collected model configs down to what the rules read: ``distill_corpus.py SOURCE [OUT]``.

SOURCE has one ``OWNER__MODEL[@REVISION].json`` a model (a config.json, with hf_quant_config.json under that key and
remarks under keys that start with ``_``) and ``INDEX.tsv``, a first reading of each. OUT (``tests/corpus``) gets
``NAME/config.json``, ``NAME/hf_quant_config.json``, ``rows.yaml`` and ``NOTICE``. Exclude lists are kept whole: they
are the point.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
NESTED = ("text_config", "language_config", "llm_config")
ALWAYS = frozenset({"architectures", "model_type", "quantization_config"})
NOTICE = """\
Model configurations in this folder
===================================
Each folder holds the config.json (and hf_quant_config.json, where the model has one) of a published model, cut down by
scripts/distill_corpus.py to the keys that the rules read. These are statements of fact about models (sizes, layer
counts, names of modules, quantization parameters), kept so that the rules are tested on the shapes of real ones. No
weights, code or prose of these models are here; each model itself is under the licence that its repository states.
Most files were read from copies in ai-dynamo/aiconfigurator (Apache-2.0). Where a source below says that something was
reconstructed, it is not the model's own; rows.yaml marks it.

"""


def kept_keys() -> frozenset[str]:
    """First keys of every path that the catalogue or a family looks up in config.json."""
    paths: list[str] = []
    for file in sorted((ROOT / "rules" / "facts").glob("*.yaml")):
        for spec in yaml.safe_load(file.read_text("utf-8"))["facts"].values():
            paths += spec.get("from", [])
    for file in sorted((ROOT / "rules" / "families").glob("*.yaml")):
        for own in yaml.safe_load(file.read_text("utf-8")).get("from", {}).values():
            paths += own
    return ALWAYS | {path.partition(".")[0] for path in paths}


def cut(config: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """The kept keys of a config and of its language model's config."""
    kept = {key: value for key, value in config.items() if key in keys}
    nested = next((key for key in NESTED if isinstance(config.get(key), dict)), None)
    if nested is not None:
        kept[nested] = {key: value for key, value in config[nested].items() if key in keys}
    return kept


def cited(text: str) -> str:
    """A remark on a source without the numbers of the collection that it was found in."""
    text = re.sub(r" \(quoted in several stored files[^)]*\)", "", text)
    return re.sub(r"stored (public )?file id \d+", "a public source file", text)


def number(text: str) -> int | None:
    """A cell of the index: `2048`, `1*` or `None`."""
    return None if text in ("", "None") else int(text.rstrip("*"))


def row(name: str, remarks: Mapping[str, Any], first: Mapping[str, str]) -> dict[str, Any]:
    """What tests know of one model."""
    repository, _, revision = name.replace("__", "/").partition("@")
    result: dict[str, Any] = {"from": name, "repository": repository}
    if revision:
        result["revision"] = str(remarks.get("_revision", revision)).split()[0]
    if remarks.get("_reconstructed"):
        result["reconstructed"] = [cited(item) for item in remarks["_reconstructed"]]
    if remarks.get("_unknown"):
        result["unread"] = ["quant", "layer"]
        result["unread_because"] = "; ".join(cited(item) for item in remarks["_unknown"])
    result["first_reading"] = {
        "routed_vs_shared_format": first["routed_vs_shared_format"],
        "routed_width": number(first["routed_width"]),
        "shared_width": number(first["shared_width"]),
    }
    return result


def dump(path: Path, content: Any) -> None:
    """Write JSON that git diffs well."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main(source: Path, out: Path) -> None:
    """Write the whole corpus."""
    with (source / "INDEX.tsv").open(encoding="utf-8") as file:
        index = {entry["name"]: entry for entry in csv.DictReader(file, delimiter="\t")}
    keys = kept_keys()
    rows, notice = [], [NOTICE]
    for path in sorted(source.glob("*.json")):
        name = path.name.removesuffix(".json")
        config = json.loads(path.read_text("utf-8"))
        hf_quant = config.pop("hf_quant_config.json", None)
        remarks = {key: config.pop(key) for key in list(config) if key.startswith("_")}
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        dump(folder / "config.json", cut(config, keys))
        if hf_quant is not None:
            dump(folder / "hf_quant_config.json", hf_quant)
        rows.append(row(name, remarks, index[name]))
        notice.append(f"{name}\n  repository: {rows[-1]['repository']}\n")
        notice += [f"  {key}: {cited(value)}\n" for key, value in remarks.get("_source", {}).items()]
        notice += [f"  reconstructed: {cited(value)}\n" for value in remarks.get("_reconstructed", ())]
    head = "# Written by scripts/distill_corpus.py: the models of this folder, and what a first reading made of each.\n"
    listed = yaml.safe_dump({"rows": rows}, sort_keys=False, allow_unicode=True, width=110)
    (out / "rows.yaml").write_text(head + listed, "utf-8")
    (out / "NOTICE").write_text("".join(notice), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else ROOT / "tests" / "corpus")
