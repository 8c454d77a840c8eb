"""Selective Rehearsal: from clustered candidates (prompt, response) to the rehearsal set D_R."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stable_rlhf.data import Demonstration, Prompt
from stable_rlhf.rehearsal.cluster import Clusters, cluster_embeddings
from stable_rlhf.rehearsal.embed import prompt_text

# Direction in which a criterion is better: a peaked policy knows the skill, so low entropy is good.
CRITERIA: dict[str, int] = {"score": 1, "entropy": -1, "satisfaction": 1, "length": 1, "random": 1}
NO_TASK = "(none)"
MAP_POINTS = 1500
EXAMPLE_CHARACTERS = 200
_ROWS_PER_COMPARISON = 512
_CHANCE = 1  # of the seed's streams that of the criterion ``random``


@dataclass(frozen=True)
class Candidate:
    """An answer that may be rehearsed.

    criteria: what is known of it beside the score: "entropy", "satisfaction", "length".
    row: its row as it was read or given, of which a kept candidate's row in D_R is a copy.
    """

    prompt: Prompt
    response: str
    task: str
    criteria: dict[str, Any]
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What of it is embedded, and shown as an example."""
        return prompt_text(self.prompt)


def as_candidates(rows: Sequence[Mapping[str, Any] | Candidate]) -> list[Candidate]:
    """Rows with "prompt", "response" and, where known, "task" and criteria; a ValueError names the first without an
    answer."""
    candidates = []
    for index, row in enumerate(rows):
        if not isinstance(row, Candidate):
            prompt, response, task = row.get("prompt"), row.get("response"), row.get("task")
            if not isinstance(response, str) or not prompt:
                raise ValueError(f"candidates[{index}]: needs a 'prompt' and a 'response' string")
            known = {name: row[name] for name in CRITERIA if name != "score" and row.get(name) is not None}
            row = Candidate(prompt, response, NO_TASK if task is None else str(task), known, row)
        candidates.append(row)
    return candidates


@dataclass(frozen=True)
class Selection:
    """The rehearsal set and how it came about.

    rows: the kept candidates in shuffled order, each a copy of its row with a further key "provenance":
        {"origin": "selected", "index": place among the candidates, "cluster", "rank_in_cluster": 1 for the best,
        "value": what it was ranked by, "criteria": every criterion known of it}.
    indices: int64 [kept], places of the kept candidates, ascending.
    clusters: the clusters the candidates fell into.
    cluster_stats: per cluster {"size", "kept", "example", "mean_score", "kept_mean_score", "tasks"}; the
        example is the start of the best kept prompt (empty where none is kept), means are over all its
        candidates and over the kept ones (None without any), tasks count all its candidates.
    map: [x, y, cluster, 1 if kept] of at most 1,500 candidates, the two first principal components of the embeddings;
        empty when the embeddings are not known.
    values: every criterion that is known of all candidates, float64 [n] each.
    value: float64 [n], what they were ranked by.
    task_of: the task of every candidate, "(none)" where it has none.
    left_out: int64 [candidates that a threshold refused], int64 [near-duplicates passed over], ascending places.
    empty_clusters: the clusters without a candidate.
    tasks: per task {"candidates", "kept"}; rows without a task count under "(none)"; empty if no row has one.
    settings: what shaped the selection: top_k, criteria (weights), minimum, maximum, near_duplicate, method, backend,
        iterations, seed, trained_on, inertia, notes.
    """

    rows: list[dict[str, Any]]
    indices: np.ndarray
    clusters: Clusters
    cluster_stats: list[dict[str, Any]]
    map: list[list[float]]
    empty_clusters: list[int]
    tasks: dict[str, dict[str, int]]
    settings: dict[str, Any]
    values: dict[str, np.ndarray]
    value: np.ndarray
    task_of: list[str]
    left_out: tuple[np.ndarray, np.ndarray]

    def summary(self) -> dict[str, Any]:
        """All figures as plain JSON values; the rows themselves are not in it."""
        return {
            "candidates": len(self.clusters.assignment),
            "kept": len(self.rows),
            "num_clusters": self.clusters.num_clusters,
            "empty_clusters": len(self.empty_clusters),
            "below_threshold": len(self.left_out[0]),
            "near_duplicates": len(self.left_out[1]),
            "clusters": self.cluster_stats,
            "map": self.map,
            "tasks": self.tasks,
            **self.settings,
        }


def _to_numpy(values: Any, name: str, n: int) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # widened here: fewer bytes from a device
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"{name}: expected one number for each of {n} candidates, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}: candidate {bad[0]} has {array[bad[0]]}; every value must be finite")
    return array


def _criteria_values(candidates: Sequence[Candidate], scores: Any) -> dict[str, np.ndarray]:
    """Every criterion that is known of all candidates, float64 [n] each."""
    n = len(candidates)
    values = {"score": _to_numpy(scores, "scores", n)}
    for name in ("entropy", "satisfaction", "length"):
        column = [candidate.criteria.get(name) for candidate in candidates]
        if all(value is not None for value in column):
            values[name] = _to_numpy(column, name, n)
        elif name == "length" and not any(value is not None for value in column):
            values[name] = np.array([len(candidate.response) for candidate in candidates], dtype=np.float64)
    rate = values.get("satisfaction")
    if rate is not None and (rate.min() < 0 or rate.max() > 1):
        bad = int(np.argmax((rate < 0) | (rate > 1)))
        raise ValueError(f"satisfaction: a rate lies in [0, 1], candidate {bad} has {rate[bad]}")
    return values


def check_criteria(argument: str, numbers: Mapping[str, float]) -> None:
    """Raise a ValueError for a criterion that does not exist or a number that is not finite."""
    for name, number in numbers.items():
        if name not in CRITERIA:
            near = difflib.get_close_matches(name, CRITERIA, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(CRITERIA)}"
            raise ValueError(f"{argument}: unknown criterion {name!r}{hint}")
        if not math.isfinite(number):
            raise ValueError(
                f"{argument}: {'weight' if argument.endswith('criteria') else 'limit'} of {name!r} is {number}"
            )


def _mixed(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """What candidates are ranked by, float64 [n]: larger is better."""
    check_criteria("criteria", weights)
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


def _ranks(value: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places by cluster and then best first, ties to the lower index, and each place's rank: int64 [n] each."""
    order = np.lexsort((-value, cluster))
    ordered = cluster[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ranks = np.empty(len(value), dtype=np.int64)
    ranks[order] = np.arange(len(value)) - np.repeat(first, np.diff(np.r_[first, len(value)])) + 1
    return order, ranks


def _near_duplicates(
    order: np.ndarray, cluster: np.ndarray, embeddings: np.ndarray, top_k: int, threshold: float
) -> np.ndarray:
    """Places to pass over, ascending: their cosine with a better one kept of their cluster is above the threshold.

    `order` is by cluster and best first. A cluster is read in parts of 512 rows, only until `top_k` of it are kept, and
    compared with those alone: memory is (512 + top_k) rows.
    """
    if not len(order):  # the thresholds refuse every row
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, cluster[order[1:]] != cluster[order[:-1]]])
    passed: list[int] = []
    for start, end in zip(starts, np.r_[starts[1:], len(order)], strict=True):
        kept = np.zeros((0, embeddings.shape[1]), dtype=np.float32)
        for first in range(start, end, _ROWS_PER_COMPARISON):
            places = order[first : min(first + _ROWS_PER_COMPARISON, end)]
            rows = np.asarray(embeddings[places], dtype=np.float32)
            # A zero row has no direction, so it is nobody's duplicate.
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-30))
            # Rounding makes some cosines of equal rows larger than 1, which no threshold is.
            with_kept, with_each_other = (np.minimum(rows @ other.T, np.float32(1)) for other in (kept, rows))
            fresh: list[int] = []
            for i, place in enumerate(places.tolist()):
                if (with_kept[i] > threshold).any() or (with_each_other[i, fresh] > threshold).any():
                    passed.append(place)
                else:
                    fresh.append(i)
                    if len(kept) + len(fresh) == top_k:
                        break
            kept = np.concatenate([kept, rows[fresh]])
            if len(kept) == top_k:
                break
    return np.array(sorted(passed), dtype=np.int64)


@dataclass(frozen=True)
class Choice:
    """What `choose` kept: places of the kept rows (int64, ascending), rank of every row in its cluster (int64 [n], 1 is
    the best), places that a threshold refused, and near-duplicates passed over (int64, ascending)."""

    indices: np.ndarray
    ranks: np.ndarray
    refused: np.ndarray
    duplicates: np.ndarray


def choose(
    value: np.ndarray,
    cluster: np.ndarray,
    num_clusters: int,
    top_k: int,
    *,
    allowed: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    near_duplicate: float | None = None,
) -> Choice:
    """The `top_k` best rows of every cluster, from arrays alone: what `select_rehearsal` does to ten million rows too.

    value: float64 [n], larger is better; ties go to the lower index. cluster: int64 [n] in [0, num_clusters).
    allowed: bool [n], rows that may be kept; None is all. Ranks count every row all the same.
    near_duplicate: with `embeddings` [n, d], which may be a memory map: a row whose cosine with a better one kept of
        its cluster is above this is passed over, and the next best takes its place.
    """
    import torch

    from stable_rlhf.ops import topk_by_cluster

    order, ranks = _ranks(value, cluster)
    places = np.arange(len(value)) if allowed is None else np.flatnonzero(allowed)
    refused = np.zeros(0, np.int64) if allowed is None else np.flatnonzero(~allowed)
    duplicates = np.zeros(0, np.int64)
    if near_duplicate is not None:
        if embeddings is None:
            raise ValueError("near_duplicate: needs the embeddings")
        best_first = order if allowed is None else order[allowed[order]]
        duplicates = _near_duplicates(best_first, cluster, embeddings, top_k, near_duplicate)
        places = np.setdiff1d(places, duplicates, assume_unique=True)
    kept = topk_by_cluster(torch.from_numpy(value[places]), torch.from_numpy(cluster[places]), num_clusters, top_k)
    return Choice(places[kept.cpu().numpy()], ranks, refused, duplicates)


def _allowed(
    values: Mapping[str, np.ndarray], minimum: Mapping[str, float], maximum: Mapping[str, float]
) -> np.ndarray | None:
    """bool [n], the candidates within all limits; None without any."""
    if not minimum and not maximum:
        return None
    allowed = np.ones(len(values["score"]), dtype=bool)
    for argument, limits in (("minimum", minimum), ("maximum", maximum)):
        check_criteria(argument, limits)
        for name, limit in limits.items():
            if name not in values:
                raise ValueError(f"{argument}: {name!r} has a limit, but not every candidate carries it")
            allowed &= values[name] >= limit if argument == "minimum" else values[name] <= limit
    return allowed


def _map(embeddings: np.ndarray, cluster: np.ndarray, kept: np.ndarray, seed: int) -> list[list[float]]:
    n = len(embeddings)
    places = np.sort(np.random.default_rng(seed).permutation(n)[:MAP_POINTS])
    x = np.asarray(embeddings[places], dtype=np.float64)
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


def _cluster_stats(
    candidates: Sequence[Candidate], clusters: Clusters, kept: np.ndarray, ranks: np.ndarray, score: np.ndarray
) -> list[dict[str, Any]]:
    """`Selection.cluster_stats`; kept: bool [n], ranks: int64 [n], 1 for the best of its cluster."""
    stats = []
    by_cluster = np.split(np.argsort(clusters.assignment, kind="stable"), np.cumsum(clusters.sizes)[:-1])
    for members in by_cluster:
        best = members[kept[members]]
        example = candidates[best[ranks[best].argmin()]].text if len(best) else ""
        stats.append(
            {
                "size": len(members),
                "kept": len(best),
                "example": example[:EXAMPLE_CHARACTERS],
                "mean_score": float(score[members].mean()) if len(members) else None,
                "kept_mean_score": float(score[best].mean()) if len(best) else None,
                "tasks": dict(sorted(Counter(candidates[i].task for i in members).items())),
            }
        )
    return stats


def select_rehearsal(
    candidates: Sequence[Mapping[str, Any] | Candidate],
    scores: Any,
    groups: np.ndarray | Clusters,
    *,
    top_k: int,
    num_clusters: int | None = None,
    criteria: Mapping[str, float] | None = None,
    minimum: Mapping[str, float] | None = None,
    maximum: Mapping[str, float] | None = None,
    near_duplicate: float | None = None,
    embeddings: np.ndarray | None = None,
    seed: int = 0,
    **clustering: Any,
) -> Selection:
    """Keep the `top_k` best candidates of every cluster and shuffle them into D_R (arXiv 2309.10202, section on
    Selective Rehearsal: x is embedded and clustered, y comes from the initial policy, Advantage Model scores rank).

    candidates: n rows with "prompt", "response" and, where known, "task", "entropy" (mean nats a token of the initial
        policy), "satisfaction" (a rate in [0, 1]) and "length" (tokens; counted in characters where no row has it).
    scores: [n], the scorer's value of each candidate (numpy, list or tensor).
    groups: the prompts' embeddings [n, d], in memory or a memory map, clustered here into `num_clusters` with `seed`
        and the further keywords of `cluster_embeddings` (method, niter, spherical, ...); or finished `Clusters` of the
        candidates, with `embeddings` for the map and for near-duplicates.
    criteria: weights, default {"score": 1.0}. A single criterion ranks by its own values. Several are mixed as
        sum_j weight_j * sign_j * (v_j - mean_j) / std_j with mean and population deviation over all n candidates;
        sign is -1 for entropy (low is better) and +1 for score, satisfaction and length. A criterion whose values are
        all equal adds 0; a negative weight turns a criterion round (short responses first: {"length": -1}). ``random``
        is a number in [0, 1) drawn by `seed`: alone it chooses by chance, which is what others are measured against.

    Ties go to the lower index; a cluster with fewer than `top_k` candidates keeps all it has; empty clusters are
    listed. Selecting does not depend on the order of D_R, which `seed` shuffles. Raises ValueError for empty or
    malformed candidates, values that are not finite (the candidate is named) and arguments out of range.
    """
    candidates = as_candidates(candidates)
    n = len(candidates)
    if n == 0:
        raise ValueError("candidates: nothing to select from")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if near_duplicate is not None and not 0 < near_duplicate <= 1:
        raise ValueError(f"near_duplicate must be a cosine in (0, 1], got {near_duplicate}")
    weights = {"score": 1.0} if criteria is None else dict(criteria)
    low, high = dict(minimum or {}), dict(maximum or {})
    values = _criteria_values(candidates, scores)
    if weights.get("random"):
        values["random"] = np.random.default_rng([seed, _CHANCE]).random(n)
    value = _mixed(values, weights)
    allowed = _allowed(values, low, high)

    if isinstance(groups, Clusters):
        if clustering:
            raise ValueError(f"{sorted(clustering)[0]}: the clusters are given, nothing is clustered here")
        if num_clusters not in (None, groups.num_clusters):
            raise ValueError(f"num_clusters is {num_clusters}, but the clusters given are {groups.num_clusters}")
        clusters = groups
    else:
        if num_clusters is None:
            raise ValueError("num_clusters: needed to cluster embeddings")
        if len(groups) != n:
            raise ValueError(f"groups: {len(groups)} embeddings for {n} candidates")
        embeddings = groups
        clusters = cluster_embeddings(groups, num_clusters, seed=seed, **clustering)
    if len(clusters.assignment) != n:
        raise ValueError(f"groups: clusters of {len(clusters.assignment)} rows for {n} candidates")
    if embeddings is not None and len(embeddings) != n:
        raise ValueError(f"embeddings: {len(embeddings)} rows for {n} candidates")

    cluster = clusters.assignment
    choice = choose(
        value, cluster, clusters.num_clusters, top_k, allowed=allowed, embeddings=embeddings,
        near_duplicate=near_duplicate,
    )  # fmt: skip
    indices, ranks = choice.indices, choice.ranks
    kept = np.zeros(n, dtype=bool)
    kept[indices] = True

    rows = [
        {
            **candidates[i].row,
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
    task_of = [candidate.task for candidate in candidates]
    total, kept_by_task = Counter(task_of), Counter(task_of[i] for i in indices)
    tasks = {name: {"candidates": total[name], "kept": kept_by_task[name]} for name in sorted(total)}
    return Selection(
        rows=rows,
        indices=indices,
        clusters=clusters,
        cluster_stats=_cluster_stats(candidates, clusters, kept, ranks, values["score"]),
        map=[] if embeddings is None else _map(embeddings, cluster, kept, seed),
        empty_clusters=[int(k) for k in np.flatnonzero(clusters.sizes == 0)],
        tasks={} if set(total) == {NO_TASK} else tasks,
        settings={
            "top_k": top_k,
            "criteria": weights,
            "minimum": low,
            "maximum": high,
            "near_duplicate": near_duplicate,
            "method": clusters.method,
            "backend": clusters.backend,
            "iterations": clusters.iterations,
            "seed": seed,
            "trained_on": clusters.trained_on,
            "inertia": clusters.inertia if math.isfinite(clusters.inertia) else None,
            "notes": list(clusters.notes),
        },
        values=values,
        value=value,
        task_of=task_of,
        left_out=(choice.refused, choice.duplicates),
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
