"""What a bench came to: lines for people while it runs, JSON for those who compare, a plot for those who look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from loader.bench.timing import Ceilings
from loader.kernels.tuned import write_json


@dataclass(slots=True, kw_only=True)
class Point:
    """One shape, format and number of tokens."""

    shape: str
    tp: int
    format: str
    tokens: int
    floor_us: float
    """The larger of one pass over the touched weights and the arithmetic at the measured rate."""
    memory_us: float
    arithmetic_us: float
    ours_us: float
    """Fused layout, experts only."""
    ours_apart_us: float | None
    """Routed slots, with the shared ones computed before them; None without shared ones."""
    ours_counted_us: float | None
    """Fused layout with the settings of a device that has no table; None in runs from before it was timed."""
    layer_us: float
    """Fused layout with the router before it."""
    error: float
    """Of ours from the reference."""
    touched_bytes: int | None = None
    """Of weights and scales that a call reads at least; None in runs from before it was noted."""
    spread: float | None = None
    """Within which half of a contender's replays were, as a share of their median: the largest of all contenders'."""
    config: dict[str, Any]
    measured: bool
    """Whether the configuration was measured for this very number of tokens."""
    peers: dict[str, float] = field(default_factory=dict)
    """Microseconds by name."""
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that did not run, and why."""

    @property
    def ours_over_floor(self) -> float:
        """Of both as they are written, so that it can be worked out from them."""
        return float(_rounded(self.ours_us) / _rounded(self.floor_us))

    def as_json(self) -> dict[str, Any]:
        """Flat, with each peer's time under its own name."""
        what = ("shape", "tp", "format", "tokens")
        figures = ("ours_us", "floor_us", "ours_over_floor", "ours_apart_us", "ours_counted_us", "layer_us", "error")
        answer = {
            name: _rounded(getattr(self, name))
            for name in (*what, *figures, "memory_us", "arithmetic_us", "touched_bytes", "spread")
        }
        answer |= {f"{name}_us": _rounded(value) for name, value in self.peers.items()}
        return answer | {"absent": self.absent, "config": self.config, "measured": self.measured}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Point:
        """What `as_json` gave."""
        own = {one.name for one in fields(cls)}
        peers = {name.removesuffix("_us"): us for name, us in raw.items() if name.endswith("_us") and name not in own}
        return cls(peers=peers, **{name: value for name, value in raw.items() if name in own})


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def first_line(error: Exception) -> str:
    """What an exception says, in one line of a sensible length; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Report:
        """What `as_json` gave."""
        points = [Point.from_json(point) for point in raw["points"]]
        return cls(**{**raw, "ceilings": Ceilings(**raw["ceilings"]), "points": points})

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, self.as_json())

    def heading(self) -> str:
        """The device, its ceilings and the columns' names."""
        c = self.ceilings
        return (
            f"{self.device}: copy {c.copy_bytes_per_second / 1e12:.2f} TB/s, bf16 {c.bf16_flops / 1e12:.0f} and "
            f"FP8 {c.fp8_flops / 1e12:.0f} TFLOP/s; microseconds of the experts of one layer; "
            f"counted: fused, without a table; layer: fused, with the router before it\n"
            f"{'shape':<16} {'tp':>3} {'format':<10} {'tokens':>6} {'floor':>9} {'fused':>9} {'apart':>9} "
            f"{'counted':>9} {'x floor':>8} {'layer':>8}"
        )

    def line(self, point: Point) -> str:
        """One point, with each peer's time and how many times ours it is."""
        apart, counted = ("" if us is None else f"{us:.1f}" for us in (point.ours_apart_us, point.ours_counted_us))
        text = (
            f"{point.shape:<16} {point.tp:>3} {point.format:<10} {point.tokens:>6} {point.floor_us:>9.1f} "
            f"{point.ours_us:>9.1f} {apart:>9} {counted:>9} {point.ours_over_floor:>8.2f} "
            f"{point.layer_us:>8.1f}"
        )
        for name, us in point.peers.items():
            text += f"  {name} {us:.1f} ({us / point.ours_us:.2f}x)"
        return text + ("" if point.measured else "  [settings not measured for this number of tokens]")

    def notes(self) -> list[str]:
        """Peers that did not run, each once with its reason: a comparison with them was not made."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            for name, reason in point.absent.items():
                found.setdefault(f"{name} did not run: {reason}", []).append(point)
        return [f"{text} ({len(points)} of {len(self.points)} points)" for text, points in found.items()]


MARKERS = "sD^vPX<>"
"""Of the peers, in the order in which they occur; each keeps its own in all panels."""


def draw(report: Report, path: Path) -> None:
    """A panel for each shape and format: time over tokens on two logarithmic axes, the floor below all lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int, str], list[Point]] = {}
    for point in report.points:
        panels.setdefault((point.shape, point.tp, point.format), []).append(point)
    peers = list(dict.fromkeys(name for point in report.points for name in point.peers))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3 + 5 * len(panels), 6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, ((shape, tp, format_name), points) in zip(axes[0], panels.items(), strict=True):
        points = sorted(points, key=lambda point: point.tokens)
        tokens, floors = [point.tokens for point in points], [point.floor_us for point in points]
        axis.set(xscale="log", yscale="log", title=f"{shape}, tp {tp}, {format_name}", xlabel="tokens of a call")
        axis.fill_between(tokens, 0.1, floors, color="0.9", zorder=0)
        axis.plot(tokens, floors, color="0.4", linestyle="--", marker="_", label="floor")
        for n, name in enumerate(peers):
            some = [(point.tokens, point.peers[name]) for point in points if name in point.peers]
            marker, color = MARKERS[n % len(MARKERS)], f"C{1 + n % 9}"
            # Also where it has no point, so that the figure's legend has everybody, whichever panel it is of.
            axis.plot(*(zip(*some, strict=True) if some else ([], [])), color=color, marker=marker, label=name)
        axis.plot(tokens, [point.ours_us for point in points], color="C0", marker="o", linewidth=2.5, label="ours")
        axis.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
        axis.set_xticks([], minor=True)
        axis.grid(visible=True, which="major", alpha=0.4)
        axis.grid(visible=True, which="minor", axis="y", alpha=0.15)
    times = [us for point in report.points for us in (point.floor_us, point.ours_us, *point.peers.values())]
    axes[0][0].set_ylim(min(times) / 1.5, max(times) * 1.5)
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("microseconds of one layer's experts")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{report.device}, torch {report.versions['torch']}, Triton {report.versions['triton']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
