"""What a bench reports: figures for those who compare, lines for people, and who is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loader.bench.report import draw, first_line
from tests.loader.bench_fakes import point, report


def test_the_figures_are_those_that_results_are_compared_by() -> None:
    one = report(point(peers={"marlin": 148.00004, "sglang-triton": 779.0}, absent={"transformers": "not here"}))
    found = one.as_json()
    assert list(found) == ["device", "versions", "command", "ceilings", "points"]
    assert found["ceilings"] == {"copy_bytes_per_second": 4.2e12, "bf16_flops": 780e12, "fp8_flops": 1400e12}
    (figures,) = found["points"]
    least = {"shape", "format", "tokens", "ours_us", "floor_us", "ours_over_floor", "marlin_us", "sglang-triton_us"}
    assert figures.keys() >= least
    assert (figures["marlin_us"], figures["sglang-triton_us"]) == (148.0, 779.0)
    assert (figures["ours_us"], figures["floor_us"], figures["ours_over_floor"]) == (150.0, 100.0, 1.5)
    assert figures["absent"] == {"transformers": "not here"}
    assert "transformers_us" not in figures
    assert json.loads(json.dumps(found)) == found


def test_a_report_is_read_as_it_was_written() -> None:
    one = report(point(peers={"marlin": 148.0, "sglang-triton": 779.0}, absent={"transformers": "not here"}), point())
    assert type(one).from_json(one.as_json()) == one


def test_lines_for_people() -> None:
    one = point(ours_apart_us=120.0, peers={"marlin": 180.0}, measured=False)
    heading, line = report().heading(), report().line(one)
    assert "NVIDIA H200: copy 4.20 TB/s, bf16 780 and FP8 1400 TFLOP/s" in heading
    assert line.split()[:10] == [
        "kimi-k2.5",
        "8",
        "int4_g32",
        "16",
        "100.0",
        "150.0",
        "120.0",
        "165.0",
        "1.50",
        "158.0",
    ]
    assert "marlin 180.0 (1.20x)" in line
    assert line.endswith("[settings not measured for this number of tokens]")
    assert len(heading.splitlines()[1]) == line.index("  marlin")
    alone = report().line(point(ours_apart_us=None, ours_counted_us=None))
    assert alone.split()[6:] == ["1.50", "158.0"]
    assert len(alone) == len(heading.splitlines()[1])


def test_whoever_did_not_run_is_named_once_with_the_reason() -> None:
    points = [
        point(tokens=1, absent={"marlin": "needs sm80", "transformers": "multiplies bf16 weights only"}),
        point(tokens=4, absent={"marlin": "needs sm80"}),
        point(tokens=16, absent={"marlin": "failed: out of memory"}),
    ]
    assert report(*points).notes() == [
        "marlin did not run: needs sm80 (2 of 3 points)",
        "transformers did not run: multiplies bf16 weights only (1 of 3 points)",
        "marlin did not run: failed: out of memory (1 of 3 points)",
    ]
    assert report(point()).notes() == []


def test_a_file_is_whole_after_each_point(tmp_path: Path) -> None:
    path, one = tmp_path / "new" / "figures.json", report()
    for tokens in (1, 4, 16):
        one.points.append(point(tokens=tokens))
        one.save(path)
        assert json.loads(path.read_text(encoding="utf-8")) == one.as_json()
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_can_not_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, one = tmp_path / "figures.json", report(point())
    one.save(path)
    before = path.read_bytes()
    one.points.append(point(tokens=64))

    def cut(file: Path, text: str, encoding: str) -> int:
        file.write_bytes(text.encode(encoding)[:40])
        raise OSError(28, "no space left")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="no space left"):
        one.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "line"),
    [(RuntimeError("too large\nat line 7"), "too large"), (KeyError(), "KeyError"), (ValueError("x" * 999), "x" * 200)],
)
def test_a_failure_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_plot_has_a_panel_a_format_and_everybody_in_one_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="drawn where matplotlib is installed")
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.append(figure))
    drawn: list[object] = []
    bf16 = [point(format="bf16", tokens=n, peers={"transformers": 900.0}) for n in (16, 1)]
    draw(report(*bf16, point(peers={"marlin": 148.0, "transformers": 800.0})), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    first, second = figure.axes  # type: ignore[attr-defined]
    assert first.get_xscale() == first.get_yscale() == "log"
    styles = [
        [(each.get_label(), each.get_marker(), each.get_color()) for each in axis.lines] for axis in (first, second)
    ]
    assert styles[0] == styles[1]
    assert [label for label, *_ in styles[0]] == ["floor", "transformers", "marlin", "ours"]
    assert len({marker for _, marker, _ in styles[0]}) == 4
    assert [list(line.get_xdata()) for line in first.lines] == [[1, 16], [1, 16], [], [1, 16]]
