"""Pictures of a selection, each a function of `Selection.summary()` that returns PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stable_rlhf.show.pictures import FAINT, INK, KEPT, legend_below, picture, plain, png

MAX_LABELS = 24
_NAMED = 12  # clusters whose number stands on the map


def selection_map(selection: dict[str, Any]) -> bytes:
    """Candidates in two dimensions, coloured by cluster, the kept ones ringed, the largest clusters numbered."""
    import matplotlib
    from matplotlib.patheffects import withStroke

    points = np.asarray(selection["map"], dtype=float)
    cluster, kept = points[:, 2].astype(int), points[:, 3] > 0
    palette = matplotlib.colormaps["tab20"](np.arange(20))
    how = selection.get("map_method", "the two first principal components")
    with picture(1, size=(9, 5.8)) as (figure, axes):
        ax = axes[0, 0]
        small = float(np.clip(12000 / len(points), 6, 30))
        ax.scatter(points[~kept, 0], points[~kept, 1], s=small, c=palette[cluster[~kept] % 20], alpha=0.4, linewidths=0)
        ax.scatter(
            points[kept, 0], points[kept, 1], s=small * 1.6, c=palette[cluster[kept] % 20], edgecolors=INK,
            linewidths=0.9,
        )  # fmt: skip
        numbers, counts = np.unique(cluster, return_counts=True)
        for number in numbers[np.argsort(-counts, kind="stable")][:_NAMED]:
            inside = points[cluster == number, :2]
            # At the member nearest to the middle: the middle itself of a cluster in two parts belongs to others.
            x, y = inside[((inside - np.median(inside, axis=0)) ** 2).sum(axis=1).argmin()]
            ax.text(
                x, y, str(number), ha="center", va="center", weight="bold", color=INK,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
        ax.scatter([], [], s=30, color=FAINT, label="candidate (colour: its cluster)")
        ax.scatter([], [], s=48, color=FAINT, edgecolors=INK, linewidths=0.9, label="kept for rehearsal")
        ax.set(xlabel=f"prompts by meaning: {how}", xticks=[], yticks=[])
        ax.grid(visible=False)
        share = f"{int(kept.sum()):,} of {len(points):,} candidates shown are kept"
        ax.set_title(f"{share}; {len(numbers)} clusters, the largest {min(_NAMED, len(numbers))} numbered")
        legend_below(figure, ax, 2)
        return png(figure)


def cluster_sizes(selection: dict[str, Any]) -> bytes:
    """Candidates in each cluster, largest first, and how many of them are kept."""
    clusters = sorted(enumerate(selection["clusters"]), key=lambda pair: -pair[1]["size"])
    place = np.arange(len(clusters))
    sizes, kept = ([row[key] for _, row in clusters] for key in ("size", "kept"))
    with picture(1, size=(9, 3.2)) as (figure, axes):
        ax = axes[0, 0]
        ax.bar(place, sizes, width=0.85, color=FAINT, label="candidates")
        ax.bar(place, kept, width=0.85, color=KEPT, label="kept")
        uneven = max(sizes) > 30 * max(1, min(kept, default=1))
        ax.set(xlabel="cluster, largest first", ylabel="responses", xlim=(-0.7, len(clusters) - 0.3))
        if uneven:
            ax.set_yscale("symlog", linthresh=1)
            ax.set_ylabel("responses (logarithmic)")
        ax.set_title(f"Sizes of the {len(clusters)} clusters")
        few = len(clusters) <= 40
        ax.set_xticks(place if few else [])
        ax.set_xticklabels([str(number) for number, _ in clusters] if few else [])
        ax.grid(axis="x", visible=False)
        legend_below(figure, ax, 2)
        return png(figure)


def criteria_histograms(values: dict[str, np.ndarray], kept: np.ndarray) -> bytes:
    """Each criterion's values over all candidates and over the kept ones, as shares of each."""
    names = list(values)
    with picture(len(names), size=(9, 2.9)) as (figure, axes):
        for ax, name in zip(axes[0], names, strict=True):
            low, high = np.percentile(values[name], [0.5, 99.5])
            edges = np.linspace(low, high if high > low else low + 1, 31)
            for chosen, colour, label in ((~np.zeros_like(kept), FAINT, "all"), (kept, KEPT, "kept")):
                part = np.clip(values[name][chosen], edges[0], edges[-1])
                weights = np.full(len(part), 100 / max(len(part), 1))
                ax.hist(part, edges, weights=weights, histtype="stepfilled", alpha=0.6, color=colour, label=label)
            ax.set(xlabel=name, title=f"mean {values[name].mean():.3g} → {values[name][kept].mean():.3g}")
        axes[0][0].set_ylabel("share, %")
        legend_below(figure, axes[0][0], 2)
        return png(figure)


def coverage(tasks: dict[str, dict[str, int]]) -> bytes:
    """Candidates and kept rows of each labelled skill, most frequent first."""
    names = sorted(tasks, key=lambda name: (-tasks[name]["candidates"], name))
    largest = names[:MAX_LABELS]
    place = np.arange(len(largest))
    with picture(1, size=(9, 1.2 + 0.24 * len(largest))) as (figure, axes):
        ax = axes[0, 0]
        ax.barh(place, [tasks[n]["candidates"] for n in largest], height=0.8, color=FAINT, label="candidates")
        ax.barh(place, [tasks[n]["kept"] for n in largest], height=0.8, color=KEPT, label="kept")
        for at, name in zip(place, largest, strict=True):
            ax.text(
                tasks[name]["candidates"] * 1.02, at, f"{tasks[name]['kept']} of {tasks[name]['candidates']}",
                va="center", fontsize=8,
            )  # fmt: skip
        ax.set_yticks(place, [plain(name, 30) for name in largest])
        most = max(tasks[name]["candidates"] for name in largest)
        uneven = most > 100
        if uneven:
            ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, most * (4 if uneven else 1.15))
        ax.set(ylim=(len(largest) - 0.4, -0.6), xlabel="rows (logarithmic)" if uneven else "rows")
        more = f", the {len(largest)} most frequent shown" if len(names) > len(largest) else ""
        ax.set_title(f"{sum(t['kept'] > 0 for t in tasks.values())} of {len(names)} skills have a kept row{more}")
        ax.grid(axis="y", visible=False)
        legend_below(figure, ax, 2)
        return png(figure)


def sweep(rows: Sequence[dict[str, Any]], chosen: int) -> bytes:
    """Inertia, silhouette and mean value of what is kept, against the number of clusters."""
    panels = [("inertia", "inertia"), ("silhouette", "silhouette (sample)"), ("kept_value", "mean value of kept rows")]
    panels = [panel for panel in panels if any(row.get(panel[0]) is not None for row in rows)]
    with picture(len(panels), size=(9, 3)) as (figure, axes):
        for ax, (key, name) in zip(axes[0], panels, strict=True):
            known = [row for row in rows if row.get(key) is not None]
            ax.plot([r["num_clusters"] for r in known], [r[key] for r in known], marker="o", color=KEPT)
            ax.axvline(chosen, color=INK, linestyle="--", linewidth=1)
            ax.set(xlabel="clusters c (dashed: used here)", xscale="log")
            ax.set_xticks([r["num_clusters"] for r in known], [str(r["num_clusters"]) for r in known])
            ax.minorticks_off()
            values = [r[key] for r in known]
            spread = f"\nspread {max(values) - min(values):.3g}" if key == "kept_value" else ""
            ax.set_title(name + spread)
        return png(figure)
