"""The kernels' figures in benchmarks/README.md are those of the runs that are kept beside it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from loader.bench.report import Report
from scripts import kernel_figures
from scripts.kernel_figures import GENERATED, PAGE, RESULTS, TOKENS, fresh
from tests.loader.bench_fakes import point, report

PACKED = "h200-kimi-k2.5-tp8-int4_g32-mxfp4.json"


def test_the_page_has_the_figures_of_the_runs() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fresh(page) == page, "run `python scripts/kernel_figures.py`"
    shown = {(found["shape"], int(found["tp"])) for found in GENERATED.finditer(page)}
    kept = {(point.shape, point.tp) for report in kernel_figures.reports().values() for point in report.points}
    assert shown == kept
    for shape, tp in kept:
        assert f"(results/h200-{shape}-tp{tp}.png)" in page


def test_a_table_has_each_format_and_what_it_is_compared_with() -> None:
    (found,) = (
        f for f in GENERATED.finditer(PAGE.read_text(encoding="utf-8")) if (f["shape"], f["tp"]) == ("kimi-k2.5", "8")
    )
    rows = {}
    for line in found[0].splitlines():
        title, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        rows.setdefault(title, []).append(figures)
    assert [*map(int, rows[""][0])] == list(TOKENS)
    report = json.loads((RESULTS / PACKED).read_text(encoding="utf-8"))
    point = next(one for one in report["points"] if (one["format"], one["tokens"]) == ("int4_g32", 16))
    assert rows["**int4_g32**, µs"][0][2] == f"{point['ours_us']:.0f}"
    assert rows["of Marlin"][0][2] == f"{point['ours_us'] / point['marlin_us']:.2f}"
    assert len(rows["of int4"]) == 1
    assert len(rows["apart / ours"]) == len(rows["router adds, µs"]) == 4


def test_a_point_that_was_not_run_is_an_empty_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    (report,) = (one for name, one in kernel_figures.reports().items() if name == PACKED)
    report.points = [point for point in report.points if (point.format, point.tokens) == ("mxfp4", 4)]
    report.points[0] = replace(report.points[0], ours_counted_us=None)
    monkeypatch.setattr(kernel_figures, "reports", lambda: {"one": report})
    page = fresh("<!-- generated: kimi-k2.5 8 -->\nold\n<!-- end -->\n")
    assert re.search(r"^\| \*\*mxfp4\*\*, µs \|\s+\| 39\.5 (\|\s+){6}\|$", page, re.MULTILINE), page
    assert "old" not in page and "counted" not in page


def test_what_a_device_without_a_table_takes_is_told_where_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [point(tokens=16), point(tokens=64, ours_counted_us=None)]
    monkeypatch.setattr(kernel_figures, "reports", lambda: {"one": report(*some)})
    page = fresh("<!-- generated: kimi-k2.5 8 -->\n<!-- end -->\n")
    assert re.search(r"^\| counted / ours \|\s+\|\s+\| 1\.10 (\|\s+){5}\|$", page, re.MULTILINE), page


def test_a_point_of_two_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"h200-new.json": report(point(tokens=1), point(tokens=4)), "h200-old.json": report(point(tokens=4))}
    monkeypatch.setattr(kernel_figures, "reports", lambda: two)
    with pytest.raises(SystemExit, match=r"h200-new.json and h200-old.json both have kimi-k2.5, 8, int4_g32, 4 tokens"):
        fresh("<!-- generated: kimi-k2.5 8 -->\n<!-- end -->\n")


def test_a_run_without_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_figures, "reports", lambda: {"one": report(point(), point(shape="deepseek-v3", tp=1))})
    with pytest.raises(
        SystemExit, match="no table for deepseek-v3 at TP1; put `<!-- generated: deepseek-v3 1 -->` there"
    ):
        fresh("<!-- generated: kimi-k2.5 8 -->\n<!-- end -->\n")


@pytest.mark.parametrize(("spread", "told"), [(None, "8"), (0.06, "")])
def test_what_the_router_adds_is_told_where_it_can_be_told_from_noise(spread: float | None, told: str) -> None:
    assert kernel_figures._added(point(ours_us=150.0, layer_us=158.0, spread=spread)) == told
    assert kernel_figures._added(point(ours_us=1000.0, layer_us=1008.0, spread=spread)) == ""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_run_is_read_as_it_was_written(path: object) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    assert Report.from_json(raw).as_json() == raw


@pytest.mark.parametrize(("us", "text"), [(7.584, "7.6"), (99.94, "99.9"), (107.4, "107"), (2439.4, "2439")])
def test_three_digits_are_enough(us: float, text: str) -> None:
    assert kernel_figures.microseconds(us) == text
