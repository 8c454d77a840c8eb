"""Pictures of the lines: time against rows, vocabulary and active share, memory, the roofline, the parts of a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.case import OURS, Line

COLORS = {OURS: "#0b6e4f", "plain PyTorch": "#c8553d", "torch.compile": "#e09f3e", "cut-cross-entropy": "#335c9e",
          "Liger GRPO": "#7b4b94", "TRL chunked log-prob": "#5f6b6d", "TRL selective_log_softmax": "#a3b18a",
          "F.linear_cross_entropy": "#b08968", "Liger scaled cross-entropy": "#b88cc4",
          "verl fused head and PPO loss": "#d1495b"}  # fmt: skip
SWEEPS = {
    "rows": ("rows", "rows T, all active", True),
    "vocabulary": ("vocabulary", "vocabulary V", True),
    "active": ("active", "share of active rows", False),
}


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Every plot that the lines suffice for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (
        ("sweeps", sweeps(lines)), ("memory", memory(lines)), ("roofline", roofline(lines)), ("parts", parts(lines)),
    ):  # fmt: skip
        if figure is not None:
            path = folder / f"bench-{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight")
            plt.close(figure)
            paths.append(path)
    return paths


def _series(lines: Sequence[Line], study: str, axis: str, value: str) -> dict[str, list[tuple[float, Line]]]:
    """Points by contender, along one number of the shape."""
    series: dict[str, list[tuple[float, Line]]] = {}
    for line in lines:
        shown = line["role"] == "ours" or line["peer"] in COLORS
        if line["study"] == study and line.get(value) is not None and shown and not line["peer"].endswith(", all rows"):
            series.setdefault(line["peer"], []).append((float(line["shape"].get(axis, 1.0)), line))
    for points in series.values():
        points.sort(key=lambda point: point[0])
    return series


def _plot(axes: Any, name: str, points: list[tuple[float, Line]], value: str, factor: float = 1.0) -> None:
    own = name.startswith(OURS)
    style = {
        "linewidth": 2.6 if own else 1.4,
        "zorder": 5 if own else 3,
        "marker": "o",
        "markersize": 5 if own else 3.5,
    }
    numbers = [factor * line[value] for _, line in points]
    axes.plot([x for x, _ in points], numbers, color=COLORS.get(name), label=name, **style)


def _finish(axes: Any, points: Sequence[float], logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(sorted(set(points)), [f"{x:,.0f}" if x > 1 else f"{x:.0%}" for x in sorted(set(points))])
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def sweeps(lines: Sequence[Line]) -> Any:
    """Times of the floor, one panel a sweep: ratios share an axis where milliseconds would not."""
    panels = {name: _series(lines, f"sweep:{name}", SWEEPS[name][0], "times_floor") for name in SWEEPS}
    panels = {name: series for name, series in panels.items() if series}
    if not panels:
        return None
    figure, all_axes = plt.subplots(2, len(panels), figsize=(4.6 * len(panels), 7.2), squeeze=False, sharey="row")
    for column, (name, series) in zip(all_axes.T, panels.items(), strict=True):
        _, label, logarithmic = SWEEPS[name]
        for peer, points in series.items():
            _plot(column[0], peer, points, "median_s", 1e3)
            _plot(column[1], peer, points, "times_floor")
        places = [x for points in series.values() for x, _ in points]
        for axes in column:
            _finish(axes, places, logarithmic)
            axes.set_yscale("log")
        column[1].axhline(1.0, color="#444444", linewidth=1.0, linestyle="--")
        column[1].set(xlabel=label)
        column[0].yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        column[1].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        column[1].yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if y in (1, 2, 3, 5, 8) or 1 < y < 2 else "")
    all_axes[0][0].set_ylabel("ms, forward + backward")
    all_axes[1][0].set_ylabel("times of the floor")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.0))
    shown = [line for series in panels.values() for points in series.values() for _, line in points]
    figure.suptitle(_where(shown), y=0.02, fontsize=8, color="#555555")
    figure.subplots_adjust(top=0.9, hspace=0.18, wspace=0.12)
    return figure


def memory(lines: Sequence[Line]) -> Any:
    series = _series(lines, "sweep:memory", "vocabulary", "peak_mib")
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for peer, points in series.items():
        _plot(axes, peer, points, "peak_mib")
    _finish(axes, [x for points in series.values() for x, _ in points], True)
    axes.set(xlabel="vocabulary V, T 1,024", ylabel="MiB that a call adds, gradients included", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    shown = [line for points in series.values() for _, line in points]
    axes.set_title(_where(shown), fontsize=8, color="#555555")
    return figure


def _span(rates: Sequence[float], digits: int) -> str:
    low, high = (f"{end / 1e9:,.{digits}f}" for end in (min(rates), max(rates)))
    return low if low == high else f"{low} to {high}"


def roofline(lines: Sequence[Line]) -> Any:
    """Every operation of ours by flops a byte, beside the rates that each run measured for itself: a line a run."""
    own = [x for x in lines if x["peer"] == OURS and x["status"] == "ok" and x.get("flops") and x.get("bytes")]
    own = [x for x in own if not x["study"].startswith("sweep")] or own
    roofs: dict[tuple[float, float], None] = {}  # matrix products and copies, a second
    for line in own:
        rates = line["environment"].get("rates") or {}
        peak = rates.get(f"{line['dtype']}_flops_per_s") or rates.get("float32_flops_per_s")
        if peak and rates.get("copy_bytes_per_s"):
            roofs[peak, rates["copy_bytes_per_s"]] = None
    if not roofs:
        return None
    peaks, copies = zip(*roofs, strict=True)
    peak, copied = max(peaks), max(copies)
    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    points: dict[str, list[Line]] = {}
    for line in own:
        points.setdefault(line["op"], []).append(line)
    intensities = [x["flops"] / x["bytes"] for x in own]
    left, right = min(*intensities, 0.1) / 2, max(*intensities, peak / copied) * 4
    ridge = peak / copied
    for level, slope in roofs:
        axes.plot([left, level / slope, right], [left * slope, level, level], color="#444444", linewidth=0.8, alpha=0.7)
    colors = plt.get_cmap("tab20")
    for i, (op, group) in enumerate(points.items()):
        xs, ys = zip(*((x["flops"] / x["bytes"], x["flops_per_s"]) for x in group), strict=True)
        axes.scatter(xs, ys, s=46, color=colors(i % 20), label=op, zorder=4, edgecolor="white", linewidth=0.7)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte that has to move", ylabel="FLOP/s", xlim=(left, right))
    axes.text(ridge, peak * 1.12, f"matrix products, {_span(peaks, 0)} GFLOP/s", fontsize=8, color="#444444")
    axes.text(
        ridge / 3, ridge / 3 * copied * 1.5, f"copy, {_span(copies, 1)} GB/s", ha="right", fontsize=8, color="#444444"
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(_where(own), fontsize=8, color="#555555")
    return figure


def parts(lines: Sequence[Line]) -> Any:
    """Where the time of an update goes, a stacked bar a contender."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line.get("parts_s"):
            groups.setdefault(line["case"], []).append(line)
    if not groups:
        return None
    count = sum(len(group) for group in groups.values())
    figure, all_axes = plt.subplots(
        len(groups), 1, figsize=(8.4, 0.52 * count + 0.85 * len(groups) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": [len(group) for group in groups.values()]},
    )  # fmt: skip
    colors = ("#335c9e", "#0b6e4f", "#7fa3d1", "#b8b8b8")
    for axes, group in zip(all_axes[:, 0], groups.values(), strict=True):
        ordered = sorted(group, key=lambda line: -sum(line["parts_s"].values()))
        left = [0.0] * len(ordered)
        for color, part in zip(colors, ordered[0]["parts_s"], strict=False):
            widths = [1e3 * line["parts_s"][part] for line in ordered]
            axes.barh([line["peer"] for line in ordered], widths, left=left, color=color, label=part, height=0.66)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        shape = ordered[0]["shape"]
        axes.set_title(
            f"{ordered[0]['op']}, {shape['model']}, {shape['batch']} × {shape['length']} tokens, H {shape['width']}, "
            f"{shape['layers']} layers, V {shape['vocabulary']:,}", fontsize=9, loc="left",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    all_axes[-1, 0].set_xlabel("ms")
    figure.text(
        0.99,
        0.005,
        _where([line for group in groups.values() for line in group]),
        ha="right",
        fontsize=7,
        color="#555555",
    )
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.02, 1, 0.95))
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=8, bbox_to_anchor=(0.5, 1.0))
    return figure


def _where(lines: Sequence[Line]) -> str:
    """Device, versions, and the commits and days of all lines."""
    seen = lines[0]["environment"]
    device = seen.get("gpu") or f"{seen['cpu']}, {seen['threads']} threads"
    runs = [line["environment"] for line in lines]
    commits = ", ".join(sorted({(run["commit"] or "unknown")[:8] for run in runs}))
    days = sorted({run["time"][:10] for run in runs})
    return f"{device}, torch {seen['versions']['torch']}, commit {commits}, {' to '.join(days[:: len(days) - 1 or 1])}"
