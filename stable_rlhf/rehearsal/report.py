"""One page about a selection: what was there, what was kept and why, in one self-contained HTML file."""

from __future__ import annotations

from typing import Any

import numpy as np

from stable_rlhf.rehearsal import figures
from stable_rlhf.rehearsal.select import EXAMPLE_CHARACTERS, NO_TASK, Selection
from stable_rlhf.rehearsal.sweep import skill_purity
from stable_rlhf.show.page import Picture, render

MAP_POINTS = 1500
CLUSTERS = 30
_PRINCIPAL = 50
_FEWEST_FOR_TSNE = 30


def neighbour_map(embeddings: np.ndarray, places: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """t-SNE of the rows at `places`, float64 [m, 2], from their 50 first principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = np.asarray(embeddings[places], dtype=np.float32)
    reduced = PCA(min(_PRINCIPAL, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(reduced).astype(np.float64)


def _with_map(selection: Selection, embeddings: np.ndarray | None, seed: int) -> dict[str, Any]:
    """The summary with a t-SNE map of up to 1,500 candidates, half of them kept ones where there are enough."""
    summary = selection.summary()
    n = len(selection.clusters.assignment)
    if embeddings is None:
        return summary
    if len(np.unique(selection.clusters.centroids, axis=0)) < 2 or n < _FEWEST_FOR_TSNE or embeddings.shape[1] < 2:
        return summary
    generator = np.random.default_rng(seed)
    kept = np.zeros(n, dtype=bool)
    kept[selection.indices] = True
    sample_of_kept = generator.permutation(selection.indices)[: MAP_POINTS // 2]
    rest = generator.permutation(np.flatnonzero(~kept))[: MAP_POINTS - len(sample_of_kept)]
    places = np.sort(np.concatenate([sample_of_kept, rest]))
    xy = neighbour_map(embeddings, places, seed=seed)
    labels = selection.clusters.assignment
    points = [[float(x), float(y), int(labels[i]), int(kept[i])] for (x, y), i in zip(xy, places, strict=True)]
    sample = f" of a sample of {len(places):,}" if len(places) < n else ""
    return {
        **summary,
        "map": points,
        "map_method": f"t-SNE of the embeddings{sample}; only neighbourhoods mean anything",
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _plain_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {number:g}" for name, number in value.items()) or "–"
    return "–" if value is None else f"{value:,.6g}" if isinstance(value, float) else str(value)


def _cut(example: str) -> str:
    return example + "…" if len(example) == EXAMPLE_CHARACTERS else example


def _in_words(criteria: dict[str, float]) -> str:
    words = {
        "score": "score", "entropy": "low entropy", "satisfaction": "satisfaction rate", "length": "length",
        "random": "chance",
    }  # fmt: skip
    parts = [(words[name], weight) for name, weight in criteria.items() if weight]
    if len(parts) == 1:
        return parts[0][0] if parts[0][1] > 0 else f"{parts[0][0]}, reversed"
    return " + ".join(f"{weight:g} × {name}" for name, weight in parts) + " (z-scores)"


def render_selection(
    selection: Selection,
    embeddings: np.ndarray | None,
    *,
    title: str = "Rehearsal selection",
    embedding: dict[str, Any] | None = None,
    outside: int = 0,
    swept: list[dict[str, Any]] | None = None,
    seed: int = 0,
) -> str:
    """The page as HTML: pictures embedded, no script, no request to anywhere, every value escaped.

    embeddings: [n, d] of the candidates, where they were embedded; embedding: the manifest of their folder; outside:
    rows topped up from outside files; swept: rows of `sweep_clusters`.
    """
    summary = _with_map(selection, embeddings, seed)
    settings = selection.settings
    tasks = {name: row for name, row in selection.tasks.items() if name != NO_TASK}
    ranked = _in_words(settings["criteria"])
    groups = "tasks" if settings["method"] == "task" else "clusters of prompts"
    lead = [
        f"{summary['kept']:,} of {summary['candidates']:,} candidates are kept for rehearsal: of each of "
        f"{summary['num_clusters']:,} {groups} the best {settings['top_k']:,} by {ranked}."
    ]
    if summary["below_threshold"]:
        limits = [f"{n} ≥ {v:g}" for n, v in settings["minimum"].items()]
        limits += [f"{n} ≤ {v:g}" for n, v in settings["maximum"].items()]
        lead.append(f"{summary['below_threshold']:,} did not meet {' and '.join(limits)}.")
    if summary["near_duplicates"]:
        lead.append(
            f"{summary['near_duplicates']:,} were passed over as near-duplicates of better ones (cosine above "
            f"{settings['near_duplicate']:g})."
        )
    if outside:
        lead.append(f"{outside:,} rows of outside data are added.")
    notes = list(settings["notes"])
    if selection.empty_clusters:
        notes.append(f"{len(selection.empty_clusters)} clusters are empty")
    short = sum(0 < row["kept"] < settings["top_k"] for row in selection.cluster_stats)
    if short:
        notes.append(f"{short} clusters keep fewer than {settings['top_k']}: that is all they have to give")

    kept = np.zeros(len(selection.clusters.assignment), dtype=bool)
    kept[selection.indices] = True
    pictures = [
        Picture(
            "selection-map", "Map of the candidates",
            "Numbers are those of the table below. Kept ones are drawn more often than their share, so that they show."
            if len(kept) > MAP_POINTS else "Numbers are those of the table below.",
            figures.selection_map(summary),
        )
    ] if summary["map"] else []  # fmt: skip
    pictures.append(
        Picture(
            "cluster-sizes", "Cluster sizes",
            "Keeping equally many of every cluster gives rare kinds of prompts a place.",
            figures.cluster_sizes(summary),
        )
    )  # fmt: skip
    if len(selection.indices):
        pictures.append(
            Picture(
                "criteria", "Why these",
                f"Every known criterion over all candidates and over the kept ones (means above); ranked by {ranked}. "
                "The outermost half per cent on each side is drawn at the edge.",
                figures.criteria_histograms(selection.values, kept),
            )
        )  # fmt: skip
    facts: list[tuple[str, Any]] = []
    if tasks:
        labelled = np.array([str(name) != NO_TASK for name in selection.task_of])
        names = [name for name in selection.task_of if name != NO_TASK]
        purity = skill_purity(selection.clusters.assignment[labelled], names, seed=seed)
        sure = f"{100 * purity['purity']:.1f} % of labelled rows have the most frequent skill of their cluster"
        pictures.append(
            Picture(
                "coverage", "Coverage of the labelled skills",
                f"{sure}; in random clusters of the same sizes {100 * purity['random']:.1f} % are.",
                figures.coverage(tasks),
            )
        )  # fmt: skip
        facts.append(("skill purity", f"{purity['purity']:.4f} (random {purity['random']:.4f})"))
    if swept:
        pictures.append(
            Picture(
                "cluster-sweep", "Number of clusters",
                "Every point clusters anew and keeps about as many rows in all as this selection does.",
                figures.sweep(swept, summary["num_clusters"]),
            )
        )  # fmt: skip
    order = sorted(enumerate(selection.cluster_stats), key=lambda pair: (-pair[1]["size"], pair[0]))
    clusters = [
        {
            "number": number, "size": row["size"], "kept": row["kept"], "mean": _number(row["mean_score"]),
            "kept_mean": _number(row["kept_mean_score"]), "example": _cut(row["example"]),
            "tasks": ", ".join(
                f"{name} {count}" for name, count in sorted(row["tasks"].items(), key=lambda kv: (-kv[1], kv[0]))[:3]
            ) if tasks else "–",
        }
        for number, row in order[:CLUSTERS]
    ]  # fmt: skip
    facts += [(name.replace("_", " "), _plain_value(settings[name])) for name in (
        "method", "backend", "iterations", "trained_on", "inertia", "top_k", "criteria", "minimum", "maximum",
        "near_duplicate", "seed")]  # fmt: skip
    facts += [(f"embedding {k}", _plain_value((embedding or {}).get(k))) for k in (
        "model", "revision", "normalized", "pooling", "dtype", "dimensions", "checksum") if embedding]  # fmt: skip
    return render(
        "rehearsal/selection.html.j2",
        title=title, lead=lead, notes=notes, pictures=pictures, clusters=clusters, facts=facts,
        clusters_note=(
            f"The {len(clusters)} largest of {len(order)}." if len(order) > len(clusters) else "Largest first."
        ) + " Scores are the scorer's; a cluster's best prompt is that of its best-ranked kept row.",
    )  # fmt: skip
