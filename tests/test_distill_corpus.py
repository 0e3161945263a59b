"""The script that cuts the corpus: what it keeps, what it drops, and what it says of sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
INDEX = "name\trouted_vs_shared_format\trouted_width\tshared_width\nO__M@r1\tunknown\t8\t1*\n"
MODEL = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "vocab_size": 3,
    "text_config": {
        "n_routed_experts": 4,
        "vocab_size": 5,
        "quantization_config": {"quant_method": "fp8", "ignore": ["x"]},
    },
    "vision_config": {"hidden_size": 3},
    "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}},
    "_revision": "r1abc (a remark)",
    "_source": {"config.json": "stored public file id 123 (X)"},
    "_reconstructed": ["text_config"],
    "_unknown": ["the exclude list"],
}


def test_a_model_is_cut_to_what_is_read(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "INDEX.tsv").write_text(INDEX)
    (source / "O__M@r1.json").write_text(json.dumps(MODEL))
    subprocess.run([sys.executable, str(ROOT / "scripts" / "distill_corpus.py"), str(source), str(out)], check=True)
    assert json.loads((out / "O__M@r1" / "config.json").read_text()) == {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": {
            "n_routed_experts": 4,
            "quantization_config": {"quant_method": "fp8", "ignore": ["x"]},
        },
    }
    assert json.loads((out / "O__M@r1" / "hf_quant_config.json").read_text()) == MODEL["hf_quant_config.json"]
    (row,) = yaml.safe_load((out / "rows.yaml").read_text())["rows"]
    assert row == {
        "from": "O__M@r1",
        "repository": "O/M",
        "revision": "r1abc",
        "reconstructed": ["text_config"],
        "unread": ["quant", "layer"],
        "unread_because": "the exclude list",
        "first_reading": {"routed_vs_shared_format": "unknown", "routed_width": 8, "shared_width": 1},
    }
    notice = (out / "NOTICE").read_text()
    assert (
        "O__M@r1\n  repository: O/M\n  config.json: a public source file (X)\n  reconstructed: text_config\n" in notice
    )


def test_without_arguments_it_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "distill_corpus.py")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "SOURCE" in done.stderr
