"""Selective Rehearsal: from clustered candidates (prompt, response) to the rehearsal set D_R."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stable_rlhf.data import Demonstration
from stable_rlhf.rehearsal.cluster import Clusters, cluster_embeddings
from stable_rlhf.rehearsal.embed import prompt_text

# Direction in which a criterion is better: a peaked policy knows the skill, so low entropy is good.
CRITERIA: dict[str, int] = {"score": 1, "entropy": -1, "satisfaction": 1, "length": 1}
NO_TASK = "(none)"
MAP_POINTS = 1500
_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class Selection:
    """The rehearsal set and how it came about.

    rows: the kept candidates in shuffled order, each a copy of its row with a further key "provenance":
        {"origin": "selected", "index": place among the candidates, "cluster", "rank_in_cluster": 1 for the best,
        "value": what it was ranked by, "criteria": every criterion known of it}.
    indices: int64 [kept], places of the kept candidates, ascending.
    clusters: the clusters the candidates fell into.
    cluster_stats: per cluster {"size", "kept", "example", "mean_score", "tasks"}; the example is the start of the
        best kept prompt, mean_score is over all its candidates (None when empty), tasks count all its candidates.
    map: [x, y, cluster, 1 if kept] of at most 1,500 candidates, the two first principal components of the embeddings;
        empty when the embeddings are not known.
    empty_clusters: the clusters without a candidate.
    tasks: per task {"candidates", "kept"}; rows without a task count under "(none)"; empty if no row has one.
    settings: what shaped the selection: top_k, criteria (weights), method, seed, trained_on, inertia, notes.
    """

    rows: list[dict[str, Any]]
    indices: np.ndarray
    clusters: Clusters
    cluster_stats: list[dict[str, Any]]
    map: list[list[float]]
    empty_clusters: list[int]
    tasks: dict[str, dict[str, int]]
    settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """All figures as plain JSON values; the rows themselves are not in it."""
        return {
            "candidates": len(self.clusters.assignment),
            "kept": len(self.rows),
            "num_clusters": self.clusters.num_clusters,
            "empty_clusters": len(self.empty_clusters),
            "clusters": self.cluster_stats,
            "map": self.map,
            "tasks": self.tasks,
            **self.settings,
        }


def _to_numpy(values: Any, name: str, n: int) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"{name}: expected one number for each of {n} candidates, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}: candidate {bad[0]} has {array[bad[0]]}; every value must be finite")
    return array


def _criteria_values(candidates: Sequence[Mapping[str, Any]], scores: Any) -> dict[str, np.ndarray]:
    """Every criterion that is known of all candidates, float64 [n] each."""
    n = len(candidates)
    values = {"score": _to_numpy(scores, "scores", n)}
    for name in ("entropy", "satisfaction", "length"):
        column = [row.get(name) for row in candidates]
        if all(value is not None for value in column):
            values[name] = _to_numpy(column, name, n)
        elif name == "length" and not any(value is not None for value in column):
            values[name] = np.array([len(row["response"]) for row in candidates], dtype=np.float64)
    rate = values.get("satisfaction")
    if rate is not None and (rate.min() < 0 or rate.max() > 1):
        bad = int(np.argmax((rate < 0) | (rate > 1)))
        raise ValueError(f"satisfaction: a rate lies in [0, 1], candidate {bad} has {rate[bad]}")
    return values


def _mixed(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """What candidates are ranked by, float64 [n]: larger is better."""
    for name, weight in weights.items():
        if name not in CRITERIA:
            near = difflib.get_close_matches(name, CRITERIA, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(CRITERIA)}"
            raise ValueError(f"criteria: unknown criterion {name!r}{hint}")
        if not math.isfinite(weight):
            raise ValueError(f"criteria: weight of {name!r} is {weight}")
    active = {name: float(weight) for name, weight in weights.items() if weight != 0}
    if not active:
        raise ValueError("criteria: at least one criterion needs a weight other than 0")
    for name in active:
        if name not in values:
            raise ValueError(f"criteria: {name!r} has weight {active[name]}, but not every candidate carries it")
    if len(active) == 1:
        # Its own values, not z-scores: rounding must not make ties of scores that differ.
        ((name, weight),) = active.items()
        return math.copysign(1.0, weight) * CRITERIA[name] * values[name]
    mixed = np.zeros(len(values["score"]))
    for name, weight in active.items():
        x = values[name]
        if x.max() > x.min():  # the deviation of equal values is rounding noise, not 0
            mixed += weight * CRITERIA[name] * (x - x.mean()) / x.std()
    return mixed


def _ranks(value: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """int64 [n], 1 for the largest value of its cluster; ties go to the lower index."""
    order = np.lexsort((np.arange(len(value)), -value, cluster))
    starts = np.searchsorted(cluster[order], cluster[order], side="left")
    ranks = np.empty(len(value), dtype=np.int64)
    ranks[order] = np.arange(len(value)) - starts + 1
    return ranks


def _map(embeddings: np.ndarray, cluster: np.ndarray, kept: np.ndarray, seed: int) -> list[list[float]]:
    n = len(embeddings)
    places = np.sort(np.random.default_rng(seed).permutation(n)[:MAP_POINTS])
    x = embeddings[places].astype(np.float64)
    x -= x.mean(axis=0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:2]
    # The sign of a principal axis is arbitrary: make its largest entry positive, so that pictures repeat.
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    xy = np.zeros((len(places), 2))
    xy[:, : len(axes)] = x @ axes.T
    return [
        [round(float(a), 4), round(float(b), 4), int(cluster[i]), int(kept[i])]
        for (a, b), i in zip(xy, places, strict=True)
    ]


def _task(row: Mapping[str, Any]) -> str:
    task = row.get("task")
    return NO_TASK if task is None else str(task)


def select_rehearsal(
    candidates: Sequence[Mapping[str, Any]],
    scores: Any,
    groups: np.ndarray | Clusters,
    *,
    top_k: int,
    num_clusters: int | None = None,
    criteria: Mapping[str, float] | None = None,
    method: str = "kmeans",
    niter: int = 25,
    spherical: bool = False,
    embeddings: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """Keep the `top_k` best candidates of every cluster and shuffle them into D_R (arXiv 2309.10202, section on
    Selective Rehearsal: x is embedded and clustered, y comes from the initial policy, Advantage Model scores rank).

    candidates: n rows with "prompt", "response" and, where known, "task", "entropy" (mean nats a token of the initial
        policy), "satisfaction" (a rate in [0, 1]) and "length" (tokens; counted in characters where no row has it).
    scores: [n], the scorer's value of each candidate (numpy, list or tensor).
    groups: the prompts' embeddings [n, d], clustered here into `num_clusters` by `method`, `niter`, `spherical` and
        `seed` (see `cluster_embeddings`), or finished `Clusters` of the candidates; `embeddings` may then be given
        for the map.
    criteria: weights, default {"score": 1.0}. A single criterion ranks by its own values. Several are mixed as
        sum_j weight_j * sign_j * (v_j - mean_j) / std_j with mean and population deviation over all n candidates;
        sign is -1 for entropy (low is better) and +1 for score, satisfaction and length. A criterion whose values are
        all equal adds 0; a negative weight turns a criterion round (short responses first: {"length": -1}).

    Ties go to the lower index; a cluster with fewer than `top_k` candidates keeps all it has; empty clusters are
    listed. Selecting does not depend on the order of D_R, which `seed` shuffles. Raises ValueError for empty or
    malformed candidates, values that are not finite (the candidate is named) and arguments out of range.
    """
    import torch

    from stable_rlhf.ops import topk_by_cluster

    n = len(candidates)
    if n == 0:
        raise ValueError("candidates: nothing to select from")
    for index, row in enumerate(candidates):
        if not isinstance(row.get("response"), str) or not row.get("prompt"):
            raise ValueError(f"candidates[{index}]: needs a 'prompt' and a 'response' string")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    weights = {"score": 1.0} if criteria is None else dict(criteria)
    values = _criteria_values(candidates, scores)
    value = _mixed(values, weights)

    if isinstance(groups, Clusters):
        if num_clusters not in (None, groups.num_clusters):
            raise ValueError(f"num_clusters is {num_clusters}, but the clusters given are {groups.num_clusters}")
        clusters = groups
    else:
        if num_clusters is None:
            raise ValueError("num_clusters: needed to cluster embeddings")
        if len(groups) != n:
            raise ValueError(f"groups: {len(groups)} embeddings for {n} candidates")
        embeddings = groups
        clusters = cluster_embeddings(groups, num_clusters, method=method, niter=niter, spherical=spherical, seed=seed)
    if len(clusters.assignment) != n:
        raise ValueError(f"groups: clusters of {len(clusters.assignment)} rows for {n} candidates")
    if embeddings is not None and len(embeddings) != n:
        raise ValueError(f"embeddings: {len(embeddings)} rows for {n} candidates")

    cluster, c = clusters.assignment, clusters.num_clusters
    indices = topk_by_cluster(torch.from_numpy(value), torch.from_numpy(cluster), c, top_k).cpu().numpy()
    kept = np.zeros(n, dtype=bool)
    kept[indices] = True
    ranks = _ranks(value, cluster)

    rows = [
        {
            **candidates[i],
            "provenance": {
                "origin": "selected",
                "index": int(i),
                "cluster": int(cluster[i]),
                "rank_in_cluster": int(ranks[i]),
                "value": float(value[i]),
                "criteria": {name: float(column[i]) for name, column in values.items()},
            },
        }
        for i in np.random.default_rng(seed).permutation(indices)
    ]
    stats = []
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(clusters.sizes)[:-1])
    for inside in members:
        best = inside[ranks[inside] == 1]
        stats.append(
            {
                "size": len(inside),
                "kept": int(kept[inside].sum()),
                "example": prompt_text(candidates[best[0]]["prompt"])[:_EXAMPLE_CHARACTERS] if len(best) else "",
                "mean_score": float(values["score"][inside].mean()) if len(inside) else None,
                "tasks": dict(sorted(Counter(_task(candidates[i]) for i in inside).items())),
            }
        )
    names = [_task(row) for row in candidates]
    total, taken = Counter(names), Counter(names[i] for i in indices)
    tasks = {name: {"candidates": total[name], "kept": taken[name]} for name in sorted(total)}
    return Selection(
        rows=rows,
        indices=indices,
        clusters=clusters,
        cluster_stats=stats,
        map=[] if embeddings is None else _map(embeddings, cluster, kept, seed),
        empty_clusters=[int(k) for k in np.flatnonzero(clusters.sizes == 0)],
        tasks={} if set(total) == {NO_TASK} else tasks,
        settings={
            "top_k": top_k,
            "criteria": weights,
            "method": clusters.method,
            "seed": seed,
            "trained_on": clusters.trained_on,
            "inertia": clusters.inertia,
            "notes": list(clusters.notes),
        },
    )


def top_up(
    rows: Iterable[Mapping[str, Any]], outside_rows: Iterable[Mapping[str, Any] | Demonstration], *, seed: int = 0
) -> list[dict[str, Any]]:
    """D_R with an outside file of demonstrations added, shuffled together by `seed`.

    outside_rows: records of `stable_rlhf.data.read_demonstrations` or dicts with "prompt" and "response". Each gets
    "provenance" {"origin": "outside", "source": "file:line" where known}. `rows` may be empty: D_R is then the outside
    data alone. Nothing is dropped, also not an outside row that repeats a selected one.
    """
    mixed: list[dict[str, Any]] = [dict(row) for row in rows]
    for index, outside in enumerate(outside_rows):
        if isinstance(outside, Demonstration):
            known = {"prompt": outside.prompt, "response": outside.response, "task": outside.task}
            row = {**outside.meta, **known, "source": outside.source}
        else:
            row = dict(outside)
        if not isinstance(row.get("response"), str) or not row.get("prompt"):
            raise ValueError(f"outside_rows[{index}]: needs a 'prompt' and a 'response' string")
        row["provenance"] = {"origin": "outside", "source": row.pop("source", None)}
        mixed.append(row)
    return [mixed[i] for i in np.random.default_rng(seed).permutation(len(mixed))]
