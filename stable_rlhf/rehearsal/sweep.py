"""How many clusters? And do clusters mean anything: their purity where skills are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stable_rlhf.rehearsal.cluster import cluster_embeddings
from stable_rlhf.rehearsal.select import choose

SILHOUETTE_ROWS = 2000


def skill_purity(assignment: np.ndarray, labels: Sequence[Any], *, seed: int = 0, draws: int = 20) -> dict[str, float]:
    """Share of rows whose cluster's most frequent label is their own, and the same of random clusters of equal sizes.

    assignment: [n] integer clusters; labels: n labels. "random" is the mean over `draws` random permutations of the
    assignment, "random_std" their deviation. Purity rises with the number of clusters by itself: compare it with
    "random" of the same clusters only.
    """
    if len(assignment) != len(labels) or not len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(assignment)} rows")
    _, label = np.unique(np.array([str(one) for one in labels]), return_inverse=True)
    _, cluster = np.unique(assignment, return_inverse=True)
    width = int(label.max()) + 1

    def purity(groups: np.ndarray) -> float:
        table = np.bincount(groups * width + label, minlength=(int(cluster.max()) + 1) * width).reshape(-1, width)
        return float(table.max(axis=1).sum() / len(label))

    generator = np.random.default_rng(seed)
    chance = [purity(generator.permutation(cluster)) for _ in range(draws)]
    return {"purity": purity(cluster), "random": float(np.mean(chance)), "random_std": float(np.std(chance))}


def sweep_clusters(
    embeddings: np.ndarray,
    counts: Sequence[int],
    *,
    value: np.ndarray | None = None,
    budget: int | None = None,
    allowed: np.ndarray | None = None,
    near_duplicate: float | None = None,
    seed: int = 0,
    **clustering: Any,
) -> list[dict[str, Any]]:
    """Cluster with every number of clusters in `counts` and say how they differ, one row a count.

    Each row: "num_clusters" (those made), "inertia", "silhouette" (cosine or Euclidean as the clustering, on a seeded
    sample of at most 2,000 rows; None where it has fewer than two clusters), and with `value` (what candidates are
    ranked by, [n]) "kept" and "kept_value": number and mean value of the best max(1, `budget` // c) of every cluster,
    so that all counts keep about equally many and can be compared (the paper's Fig. 6 shows the reward after
    PPO against c; its spread over c was about 0.05). `allowed`, `near_duplicate`: as in `select_rehearsal`'s `choose`.
    `clustering`: keywords of `cluster_embeddings`.
    """
    from sklearn.metrics import silhouette_score

    if not counts or any(count < 1 for count in counts):
        raise ValueError(f"sweep: needs numbers of clusters of at least 1, got {list(counts)}")
    if value is not None and budget is None:
        raise ValueError("sweep: budget says how many to keep in all; it is needed with value")
    n = len(embeddings)
    places = np.sort(np.random.default_rng(seed).permutation(n)[:SILHOUETTE_ROWS])
    sample = np.asarray(embeddings[places], dtype=np.float32)
    metric = "cosine" if clustering.get("spherical") else "euclidean"
    table = []
    for count in counts:
        clusters = cluster_embeddings(embeddings, count, seed=seed, **clustering)
        labels = clusters.assignment[places]
        row: dict[str, Any] = {
            "num_clusters": clusters.num_clusters,
            "inertia": clusters.inertia,
            "silhouette": float(silhouette_score(sample, labels, metric=metric))
            if 1 < len(np.unique(labels)) < len(labels)
            else None,
        }
        if value is not None and budget is not None:
            each = max(1, budget // clusters.num_clusters)
            kept = choose(
                value, clusters.assignment, clusters.num_clusters, each, allowed=allowed, embeddings=embeddings,
                near_duplicate=near_duplicate,
            ).indices  # fmt: skip
            row |= {"kept": len(kept), "kept_value": float(value[kept].mean()) if len(kept) else None}
        table.append(row)
    return table
