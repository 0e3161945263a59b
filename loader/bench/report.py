"""What a bench came to: lines for people while it runs, JSON for those who compare, a plot for those who look."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loader.bench.run import Point
from loader.bench.timing import Ceilings


@dataclass(slots=True, kw_only=True)
class Report:
    """Points and what they were measured with."""

    device: str
    versions: dict[str, str]
    command: str
    ceilings: Ceilings
    points: list[Point] = field(default_factory=list)

    @classmethod
    def started(cls, limits: Ceilings, command: str) -> Report:
        """A report on this machine's GPU."""
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
        return cls(device=torch.cuda.get_device_name(), versions=versions, command=command, ceilings=limits)

    def as_json(self) -> dict[str, Any]:
        """``device``, ``versions``, ``command``, ``ceilings`` and ``points``."""
        return {
            "device": self.device,
            "versions": self.versions,
            "command": self.command,
            "ceilings": asdict(self.ceilings),
            "points": [point.as_json() for point in self.points],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    def heading(self) -> str:
        """The device, its ceilings and the columns' names."""
        c = self.ceilings
        return (
            f"{self.device}: copy {c.copy_bytes_per_second / 1e12:.2f} TB/s, bf16 {c.bf16_flops / 1e12:.0f} and "
            f"FP8 {c.fp8_flops / 1e12:.0f} TFLOP/s; microseconds of the experts of one layer\n"
            f"{'shape':<14} {'tp':>3} {'format':<10} {'tokens':>6} {'floor':>9} {'fused':>9} {'apart':>9} "
            f"{'x floor':>8}"
        )

    def line(self, point: Point) -> str:
        """One point, with each peer's time and how many times ours it is."""
        apart = "" if point.ours_apart_us is None else f"{point.ours_apart_us:.1f}"
        text = (
            f"{point.shape:<14} {point.tp:>3} {point.format:<10} {point.tokens:>6} {point.floor_us:>9.1f} "
            f"{point.ours_us:>9.1f} {apart:>9} {point.ours_over_floor:>8.2f}"
        )
        for name, us in point.peers.items():
            text += f"  {name} {us:.1f} ({us / point.best_us:.2f}x)"
        return text + ("" if point.measured else "  [settings counted, not measured]")

    def notes(self) -> list[str]:
        """Peers that did not run, each once with its reason: a comparison with them was not made."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            for name, reason in point.absent.items():
                found.setdefault(f"{name} did not run: {reason}", []).append(point)
        return [f"{text} ({len(points)} of {len(self.points)} points)" for text, points in found.items()]


def draw(report: Report, path: Path) -> None:
    """A panel for each shape and format: time over tokens on two logarithmic axes, the floor below all lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int, str], list[Point]] = {}
    for point in report.points:
        panels.setdefault((point.shape, point.tp, point.format), []).append(point)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, ((shape, tp, format_name), points) in zip(axes[0], panels.items(), strict=True):
        tokens = [point.tokens for point in points]
        floors = [point.floor_us for point in points]
        axis.fill_between(tokens, [min(floors) / 10] * len(tokens), floors, color="0.9", label="below the floor")
        axis.plot(tokens, floors, color="0.5", linestyle="--", label="floor")
        axis.plot(tokens, [point.best_us for point in points], color="C0", marker="o", linewidth=2, label="ours")
        for n, name in enumerate(dict.fromkeys(name for point in points for name in point.peers)):
            some = [(point.tokens, point.peers[name]) for point in points if name in point.peers]
            axis.plot(*zip(*some, strict=True), color=f"C{n + 1}", marker=".", label=name)
        axis.set(xscale="log", yscale="log", title=f"{shape}, tp {tp}, {format_name}", xlabel="tokens")
        axis.set_ylim(bottom=min(floors) / 2)
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("microseconds of one layer's experts")
    figure.suptitle(f"{report.device}, torch {report.versions['torch']}, Triton {report.versions['triton']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
