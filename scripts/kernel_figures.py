"""Keep the kernels' figures in benchmarks/README.md: `python scripts/kernel_figures.py` rewrites them in place.

They stand between `<!-- generated: SHAPE TP -->` and `<!-- end -->`, and come from the runs in benchmarks/results. With
`--plots` it draws these runs again, too (needs matplotlib).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gatekeeper.markdown import table
from loader.bench.report import Point, Report, draw
from loader.kernels.tuned import LUCK

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = re.compile(
    r"(^<!-- generated: (?P<shape>\S+) (?P<tp>\d+) -->\n).*?(^<!-- end -->$)", re.MULTILINE | re.DOTALL
)

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
AT_TP8: Mapping[str, Sequence[float]] = {
    "bf16": (1.3, 1.12, 1.08, 1.05, 1.06, 1.1, 1.4, 1.8),
    "fp8_block": (1.7, 1.2, 1.1, 1.07, 1.1, 1.3, 2.1, 2.1),
    "int4_g32": (0.6, 0.6, 0.67, 0.7, 0.67, 0.62, 0.52, 0.54),
}
TARGETS: Mapping[tuple[str, int], Mapping[str, Sequence[float]]] = {
    ("kimi-k2.5", 8): AT_TP8,
    ("deepseek-v3", 8): AT_TP8,
    ("deepseek-v3", 1): {"bf16": (1.05, 1.03, 1.03, 1.03, 1.04, 1.08, 1.35, 1.25)},
}
"""What we are after at each of TOKENS: a multiple of the floor, of int4 a share of Marlin's time."""
SGLANG = "sglang-triton-tuned"


def reports() -> dict[str, Report]:
    """All runs that are kept, by file name."""
    paths = [path for path in sorted(RESULTS.glob("h200-*.json")) if ".partial." not in path.name]
    return {path.name: Report.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths}


def points() -> list[Point]:
    """Of all runs that are kept; raises `SystemExit` where two of them have the same one."""
    found: dict[tuple[str, int, str, int], tuple[str, Point]] = {}
    for name, report in reports().items():
        for point in report.points:
            key = (point.shape, point.tp, point.format, point.tokens)
            if key in found:
                what = ", ".join(map(str, key))
                raise SystemExit(f"{found[key][0]} and {name} both have {what} tokens; delete one of them")
            found[key] = (name, point)
    return [point for _, point in found.values()]


def fresh(page: str) -> str:
    """The page with the figures of the runs that are kept."""
    found_points = points()

    def part(found: re.Match[str]) -> str:
        shape, tp = found["shape"], int(found["tp"])
        some = [point for point in found_points if (point.shape, point.tp) == (shape, tp)]
        lines = table(("", *map(str, TOKENS)), _rows(some, TARGETS.get((shape, tp), {})))
        return found[1] + "\n".join(lines) + found[4]

    shown = {(found["shape"], int(found["tp"])) for found in GENERATED.finditer(page)}
    if left := sorted({(point.shape, point.tp) for point in found_points} - shown):
        shape, tp = left[0]
        raise SystemExit(
            f"{PAGE.name} has no table for {shape} at TP{tp}; put `<!-- generated: {shape} {tp} -->` there"
        )
    return GENERATED.sub(part, page)


def _rows(points: Sequence[Point], targets: Mapping[str, Sequence[float]]) -> Iterator[Sequence[str]]:
    for name in dict.fromkeys(point.format for point in points):
        by_tokens = {point.tokens: point for point in points if point.format == name}
        here = [by_tokens.get(count) for count in TOKENS]

        def row(title: str, figures: Iterable[str | None]) -> Sequence[str]:
            return [title, *(figure or "" for figure in figures)]

        yield row(f"**{name}**, µs", (each and microseconds(each.ours_us) for each in here))
        yield row("times the floor", (each and f"{each.ours_over_floor:.2f}" for each in here))
        if any(each and SGLANG in each.peers for each in here):
            yield row("SGLang / ours", (each and _ratio(each.peers.get(SGLANG), each.ours_us) for each in here))
        if name == "int4_g32":
            yield row("of Marlin", (each and _ratio(each.ours_us, each.peers.get("marlin")) for each in here))
        if name == "mxfp4":
            int4 = {point.tokens: point.ours_us for point in points if point.format == "int4_g32"}
            yield row("of int4", (each and _ratio(each.ours_us, int4.get(each.tokens)) for each in here))
        if any(each and each.ours_apart_us for each in here):
            yield row("apart / ours", (each and _ratio(each.ours_apart_us, each.ours_us) for each in here))
        if any(each and each.ours_counted_us for each in here):
            yield row("counted / ours", (each and _ratio(each.ours_counted_us, each.ours_us) for each in here))
        yield row("router adds, µs", (each and _added(each) for each in here))
        if name in targets:
            yield row(f"target, {'of Marlin' if name == 'int4_g32' else 'times the floor'}", map(str, targets[name]))


def _ratio(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part and whole else ""


def _added(point: Point) -> str:
    """By the router; nothing where that is no more than readings of the same differ by."""
    added = point.layer_us - point.ours_us
    return f"{added:.0f}" if added > max(LUCK, point.spread or 0.0) * point.ours_us else ""


def microseconds(us: float) -> str:
    """Three digits of it."""
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def plots() -> None:
    """One figure for each shape and number of ranks, all formats beside each other."""
    drawn: dict[tuple[str, int], list[Report]] = {}
    for report in reports().values():
        for shape, tp in dict.fromkeys((point.shape, point.tp) for point in report.points):
            some = [point for point in report.points if (point.shape, point.tp) == (shape, tp)]
            drawn.setdefault((shape, tp), []).append(replace(report, points=some))
    for (shape, tp), some_reports in drawn.items():
        all_points = [point for report in some_reports for point in report.points]
        draw(replace(some_reports[0], points=all_points), RESULTS / f"h200-{shape}-tp{tp}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true", help="draw the runs again, too")
    draws = parser.parse_args().plots
    if draws and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plots needs matplotlib: `pip install matplotlib`")
    PAGE.write_text(fresh(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if draws:
        plots()
