from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from stable_rlhf.data import Demonstration
from stable_rlhf.rehearsal import Clusters, cluster_embeddings, select_rehearsal, top_up

torch = pytest.importorskip("torch")


def given(assignment: list[int], num_clusters: int) -> Clusters:
    a = np.array(assignment, dtype=np.int64)
    return Clusters(
        a, np.zeros((num_clusters, 2), np.float32), np.bincount(a, minlength=num_clusters), 0.0, len(a), "kmeans"
    )


def candidates(n: int, **columns) -> list[dict]:
    return [
        {"prompt": f"p{i}", "response": f"r{i}", "task": f"t{i % 2}"}
        | {name: column[i] for name, column in columns.items()}
        for i in range(n)
    ]


def brute_force(value: np.ndarray, cluster: np.ndarray, num_clusters: int, k: int) -> list[int]:
    kept = []
    for c in range(num_clusters):
        inside = [i for i in range(len(value)) if cluster[i] == c]
        kept += sorted(inside, key=lambda i: (-value[i], i))[:k]
    return sorted(kept)


def random_case(n: int = 120, num_clusters: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    cluster = given(rng.integers(num_clusters - 1, size=n).tolist(), num_clusters)  # the last one is empty
    columns = {
        "entropy": rng.gamma(2.0, size=n),
        "satisfaction": rng.integers(5, size=n) / 4,
        "length": rng.integers(1, 200, size=n).astype(float),
    }
    return rng.normal(size=n), columns, cluster


def z(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean())


@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize(
    ("criteria", "value"),
    [
        (None, lambda s, c: s),
        ({"score": 3.0}, lambda s, c: s),
        ({"score": -1.0}, lambda s, c: -s),
        ({"entropy": 1.0}, lambda s, c: -c["entropy"]),
        ({"satisfaction": 1.0, "score": 0.0}, lambda s, c: c["satisfaction"]),  # many ties
        ({"length": -0.5}, lambda s, c: -c["length"]),
        ({"score": 1.0, "entropy": 0.5}, lambda s, c: z(s) - 0.5 * z(c["entropy"])),
        (
            {"score": 1.0, "entropy": 2.0, "satisfaction": 0.7, "length": -0.3},
            lambda s, c: z(s) - 2 * z(c["entropy"]) + 0.7 * z(c["satisfaction"]) - 0.3 * z(c["length"]),
        ),
    ],
)
def test_criteria_against_brute_force(criteria, value, k):
    scores, columns, clusters = random_case()
    chosen = select_rehearsal(candidates(120, **columns), scores, clusters, top_k=k, criteria=criteria)
    reference = value(scores, columns)
    assert chosen.indices.tolist() == brute_force(reference, clusters.assignment, 7, k)
    for row in chosen.rows:
        place = row["provenance"]
        i, inside = place["index"], np.flatnonzero(clusters.assignment == place["cluster"])
        assert i in inside
        better = [j for j in inside if (-reference[j], j) < (-reference[i], i)]
        assert place["rank_in_cluster"] == len(better) + 1 <= k
        np.testing.assert_allclose(place["value"], reference[i], rtol=1e-12, atol=1e-12)
        expected = {"score": scores[i]} | {name: column[i] for name, column in columns.items()}
        assert place["criteria"] == {name: float(x) for name, x in expected.items()}
        assert place["origin"] == "selected"


@pytest.mark.parametrize("constant", [1.0, 0.1])  # computed deviations: 0, and rounding noise
def test_constant_criterion_adds_nothing(constant):
    scores, columns, clusters = random_case()
    columns["entropy"] = np.full(120, constant)
    weights = {"score": 1.0, "entropy": 1e6}
    mixed = select_rehearsal(candidates(120, **columns), scores, clusters, top_k=3, criteria=weights)
    assert mixed.indices.tolist() == brute_force(scores, clusters.assignment, 7, 3)
    values = [row["provenance"]["value"] for row in mixed.rows]
    np.testing.assert_allclose(values, z(scores)[[row["provenance"]["index"] for row in mixed.rows]], rtol=1e-12)


def test_ties_break_by_index_and_small_clusters_are_kept_whole():
    chosen = select_rehearsal(candidates(6), [1.0] * 6, given([0, 0, 0, 0, 2, 2], 4), top_k=3)
    assert chosen.indices.tolist() == [0, 1, 2, 4, 5]
    ranks = {row["provenance"]["index"]: row["provenance"]["rank_in_cluster"] for row in chosen.rows}
    assert ranks == {0: 1, 1: 2, 2: 3, 4: 1, 5: 2}
    assert chosen.empty_clusters == [1, 3]
    assert chosen.summary()["empty_clusters"] == 2


def test_scores_a_rounding_apart_are_not_a_tie():
    scores = [1e8, np.nextafter(1e8, 2e8)]  # z-scores of these are coarser than the scores
    assert select_rehearsal(candidates(2), scores, given([0, 0], 1), top_k=1).indices.tolist() == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_may_be_tensors(dtype):
    scores = torch.tensor([0.0, 2.0, 1.0], dtype=getattr(torch, dtype), requires_grad=True)
    assert select_rehearsal(candidates(3), scores, given([0, 0, 0], 1), top_k=1).indices.tolist() == [1]


def test_rows_are_shuffled_copies():
    rows = candidates(60)
    before = json.dumps(rows)
    clusters = given([0] * 60, 1)
    first, again, other = (select_rehearsal(rows, np.zeros(60), clusters, top_k=40, seed=s) for s in (1, 1, 2))
    assert first.rows == again.rows != other.rows
    order = [row["provenance"]["index"] for row in first.rows]
    assert sorted(order) == first.indices.tolist() == list(range(40)) and order != sorted(order)
    assert first.indices.tolist() == other.indices.tolist()
    assert json.dumps(rows) == before
    assert all({key: row[key] for key in rows[0]} == rows[row["provenance"]["index"]] for row in first.rows)


def test_summary():
    rows = [
        {"prompt": "x" * 300, "response": "one", "task": "math"},
        {"prompt": [{"role": "user", "content": "hello"}], "response": "three", "task": None},
        {"prompt": "b", "response": "", "task": "math"},
        {"prompt": "c", "response": "r"},
    ]
    chosen = select_rehearsal(rows, [1.0, 3.0, 2.0, 0.0], given([0, 1, 0, 0], 3), top_k=1, seed=5)
    summary = chosen.summary()
    assert summary["clusters"] == [
        {
            "size": 3,
            "kept": 1,
            "example": "b",
            "mean_score": 1.0,
            "kept_mean_score": 2.0,
            "tasks": {"(none)": 1, "math": 2},
        },
        {"size": 1, "kept": 1, "example": "hello", "mean_score": 3.0, "kept_mean_score": 3.0, "tasks": {"(none)": 1}},
        {"size": 0, "kept": 0, "example": "", "mean_score": None, "kept_mean_score": None, "tasks": {}},
    ]
    assert summary["tasks"] == {"(none)": {"candidates": 2, "kept": 1}, "math": {"candidates": 2, "kept": 1}}
    assert (summary["candidates"], summary["kept"], summary["num_clusters"], summary["map"]) == (4, 2, 3, [])
    assert (summary["top_k"], summary["criteria"], summary["seed"]) == (1, {"score": 1.0}, 5)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    # characters stand in for tokens where no row tells its length
    assert {
        row["prompt"] if row["prompt"] == "b" else "hello": row["provenance"]["criteria"] for row in chosen.rows
    } == {
        "b": {"score": 2.0, "length": 0.0},
        "hello": {"score": 3.0, "length": 5.0},
    }
    long = select_rehearsal(rows[:1], [0.0], given([0], 1), top_k=1).summary()
    assert long["clusters"][0]["example"] == "x" * 200
    assert select_rehearsal(rows[3:], [0.0], given([0], 1), top_k=1).summary()["tasks"] == {}


def blob_embeddings(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.eye(3, 8)[np.arange(n) % 3] * 20 + rng.normal(size=(n, 8))).astype(np.float32)


def test_embeddings_are_clustered_here():
    x = blob_embeddings(90)
    scores = np.random.default_rng(1).normal(size=90)
    chosen = select_rehearsal(candidates(90), scores, x, num_clusters=3, top_k=4, seed=3)
    apart = cluster_embeddings(x, 3, seed=3)
    np.testing.assert_array_equal(chosen.clusters.assignment, apart.assignment)
    assert chosen.indices.tolist() == brute_force(scores, np.arange(90) % 3, 3, 4)
    summary = chosen.summary()
    assert (summary["method"], summary["trained_on"], summary["inertia"]) == ("kmeans", 90, apart.inertia)
    later = select_rehearsal(candidates(90), scores, apart, top_k=4, seed=3, embeddings=x)
    assert later.rows == chosen.rows and later.map == chosen.map
    soft = select_rehearsal(candidates(90), scores, x, num_clusters=3, top_k=4, method="gmm")
    assert soft.summary()["method"] == "gmm" and soft.indices.tolist() == chosen.indices.tolist()
    few = select_rehearsal(candidates(90), scores, x, num_clusters=30, top_k=1, niter=1)
    assert few.clusters.inertia == cluster_embeddings(x, 30, niter=1).inertia
    ball = select_rehearsal(candidates(90), scores, x, num_clusters=3, top_k=1, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(ball.clusters.centroids, axis=1), 1, rtol=1e-6)


def test_chance_is_a_criterion_of_its_own():
    """By the seed, whatever the scores, each candidate as likely as any other; a hundredth of it decides ties alone."""
    x, rows = cluster_embeddings(np.repeat(np.eye(2, 4, dtype=np.float32), 30, axis=0), 2), candidates(60)

    def chosen(seed: int, criteria: dict[str, float], scores: list[float]) -> list[int]:
        return select_rehearsal(rows, scores, x, top_k=5, criteria=criteria, seed=seed).indices.tolist()

    flat, steep = [0.0] * 60, list(map(float, range(60)))
    assert chosen(3, {"random": 1}, flat) == chosen(3, {"random": 1}, steep) != chosen(4, {"random": 1}, steep)
    counts = np.bincount(np.concatenate([chosen(seed, {"random": 1}, steep) for seed in range(200)]), minlength=60)
    assert counts.sum() == 2000 and counts[:30].sum() == 1000 and counts.min() > 12 and counts.max() < 60
    assert chosen(3, {"score": 1, "random": 1e-6}, steep) == [*range(25, 30), *range(55, 60)]
    kept = select_rehearsal(rows, flat, x, top_k=5, criteria={"random": 1}).rows[0]["provenance"]
    assert kept["criteria"]["random"] == kept["value"] and 0 <= kept["value"] < 1
    assert "random" not in select_rehearsal(rows, flat, x, top_k=5).rows[0]["provenance"]["criteria"]


def test_fewer_distinct_prompts_than_clusters_is_reported():
    x = np.repeat(np.eye(2, 4, dtype=np.float32), 3, axis=0)
    chosen = select_rehearsal(candidates(6), [0.0, 1, 2, 3, 4, 5], x, num_clusters=5, top_k=1)
    assert chosen.indices.tolist() == [2, 5]
    summary = chosen.summary()
    assert summary["num_clusters"] == 2
    assert summary["notes"] == ["5 clusters asked for, but only 2 distinct rows: 2 clusters made"]


def test_map_is_the_plane_of_largest_variance():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(200, 2)) * [9.0, 4.0]
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    x = (plane @ turn[:2] + 5).astype(np.float32)
    scores = np.arange(200.0)
    chosen = select_rehearsal(candidates(200), scores, x, num_clusters=4, top_k=2)
    drawn = np.array(chosen.map)
    assert drawn.shape == (200, 4)
    np.testing.assert_array_equal(drawn[:, 2], chosen.clusters.assignment)
    assert np.flatnonzero(drawn[:, 3]).tolist() == chosen.indices.tolist()
    distance = np.linalg.norm(drawn[:, None, :2] - drawn[None, :, :2], axis=-1)
    np.testing.assert_allclose(distance, np.linalg.norm(x[:, None] - x[None], axis=-1), atol=5e-4)  # 4 decimals
    assert drawn[:, 0].var() > drawn[:, 1].var() and abs(np.cov(drawn[:, 0], drawn[:, 1])[0, 1]) < 1e-3


def test_map_is_a_sample_of_1500_and_takes_one_dimension():
    x = np.arange(1600, dtype=np.float32)[:, None]
    chosen = select_rehearsal(candidates(1600), np.zeros(1600), x, num_clusters=2, top_k=1)
    assert len(chosen.map) == 1500
    assert {point[1] for point in chosen.map} == {0.0}
    xs = [point[0] for point in chosen.map]
    assert xs == sorted(xs)  # the axis' sign is settled
    one = select_rehearsal(candidates(1), [0.0], np.ones((1, 3), np.float32), num_clusters=1, top_k=1)
    assert one.map == [[0.0, 0.0, 0, 1]]


def test_thresholds_refuse_but_do_not_move_the_ranks():
    scores, columns, clusters = random_case()
    limits = {"minimum": {"score": -0.2, "satisfaction": 0.25}, "maximum": {"entropy": 2.0}}
    chosen = select_rehearsal(candidates(120, **columns), scores, clusters, top_k=5, **limits)
    allowed = (scores >= -0.2) & (columns["satisfaction"] >= 0.25) & (columns["entropy"] <= 2.0)
    barred = np.where(allowed, scores, -np.inf)
    expected = [i for i in brute_force(barred, clusters.assignment, 7, 5) if allowed[i]]
    assert chosen.indices.tolist() == expected and 0 < len(expected) < 30
    assert chosen.left_out[0].tolist() == np.flatnonzero(~allowed).tolist()
    assert chosen.summary()["below_threshold"] == int((~allowed).sum())
    for row in chosen.rows:
        place = row["provenance"]
        inside = np.flatnonzero(clusters.assignment == place["cluster"])
        assert place["rank_in_cluster"] == 1 + int((scores[inside] > scores[place["index"]]).sum())
    nothing = select_rehearsal(candidates(120, **columns), scores, clusters, top_k=5, minimum={"score": 99.0})
    assert nothing.rows == [] and nothing.summary()["kept"] == 0
    exact = select_rehearsal(candidates(3), [0.0, 1.0, 2.0], given([0, 0, 0], 1), top_k=3, minimum={"score": 1.0})
    assert exact.indices.tolist() == [1, 2]  # the limit itself is allowed


@pytest.mark.parametrize("allowed_share", [1.0, 0.6])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_near_duplicates_against_brute_force(k, allowed_share, monkeypatch):
    from stable_rlhf.rehearsal import select

    monkeypatch.setattr(select, "_ROWS_PER_COMPARISON", 7)  # several parts a cluster
    rng = np.random.default_rng(5)
    originals = rng.normal(size=(40, 8))
    x = (originals[rng.integers(40, size=150)] + 0.02 * rng.normal(size=(150, 8))).astype(np.float32)
    x *= rng.uniform(0.1, 9, size=(150, 1)).astype(np.float32)  # a cosine does not see lengths
    x[10] = x[20] = 0
    scores, cluster = rng.normal(size=150), rng.integers(4, size=150)
    allowed = rng.random(150) < allowed_share
    found = select.choose(scores, cluster, 5, k, allowed=allowed, embeddings=x, near_duplicate=0.99)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    expected, passed = [], []
    for c in range(5):
        kept: list[int] = []
        for i in sorted(np.flatnonzero((cluster == c) & allowed), key=lambda i: (-scores[i], i)):
            if len(kept) == k:
                break
            if any(unit[i] @ unit[j] > 0.99 for j in kept):
                passed.append(int(i))
            else:
                kept.append(int(i))
        expected += kept
    assert found.indices.tolist() == sorted(expected)
    assert found.duplicates.tolist() == sorted(passed)
    assert k < 50 or passed


def test_no_cosine_is_above_one():
    from stable_rlhf.rehearsal import select

    x = np.repeat(np.random.default_rng(0).normal(size=(200, 384)).astype(np.float32), 2, axis=0)
    found = select.choose(np.arange(400.0), np.zeros(400, np.int64), 1, 400, embeddings=x, near_duplicate=1.0)
    assert len(found.indices) == 400 and not len(found.duplicates)
    found = select.choose(np.arange(400.0), np.zeros(400, np.int64), 1, 400, embeddings=x, near_duplicate=0.9999)
    assert len(found.indices) == len(found.duplicates) == 200


def test_near_duplicates_of_nothing():
    from stable_rlhf.rehearsal import select

    allowed = np.zeros(3, dtype=bool)
    found = select.choose(np.ones(3), np.zeros(3, dtype=np.int64), 1, 2, allowed=allowed, embeddings=np.eye(3),
                          near_duplicate=0.5)  # fmt: skip
    assert len(found.indices) == 0 and len(found.duplicates) == 0


def test_near_duplicates_are_counted_and_replaced():
    x = np.array([[1, 0], [1, 0.001], [0, 1], [1, 0]], dtype=np.float32)
    rows = candidates(4)
    plain = select_rehearsal(rows, [3.0, 2.0, 1.0, 9.0], given([0, 0, 0, 1], 2), top_k=2, embeddings=x)
    assert plain.indices.tolist() == [0, 1, 3]
    spread = select_rehearsal(
        rows, [3.0, 2.0, 1.0, 9.0], given([0, 0, 0, 1], 2), top_k=2, embeddings=x, near_duplicate=0.95
    )
    assert spread.indices.tolist() == [0, 2, 3]  # another cluster's row 3 is no duplicate of row 0
    assert spread.summary()["near_duplicates"] == 1 and spread.left_out[1].tolist() == [1]
    assert {r["provenance"]["index"]: r["provenance"]["rank_in_cluster"] for r in spread.rows} == {0: 1, 2: 3, 3: 1}


def test_nan_embedding_is_named():
    x = blob_embeddings(9)
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match="row 4 holds NaN"):
        select_rehearsal(candidates(9), np.zeros(9), x, num_clusters=3, top_k=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "candidates: nothing to select from"),
        ({"candidates": [*candidates(2), {"prompt": "p"}]}, r"candidates\[2\]: needs"),
        ({"candidates": [*candidates(2), {"prompt": "", "response": "r"}]}, r"candidates\[2\]: needs"),
        ({"scores": [0.0, 1.0]}, r"scores: expected one number for each of 3 candidates, got shape \(2,\)"),
        ({"scores": [0.0, float("nan"), 1.0]}, "scores: candidate 1 has nan"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"criteria": {}}, "at least one criterion"),
        ({"criteria": {"score": 0.0}}, "at least one criterion"),
        ({"criteria": {"score": float("inf")}}, "weight of 'score' is inf"),
        ({"criteria": {"entropie": 1.0}}, "unknown criterion 'entropie'; did you mean 'entropy'"),
        ({"criteria": {"xyz": 1.0}}, "known are score, entropy, satisfaction, length"),
        ({"criteria": {"entropy": 1.0}}, "'entropy' has weight 1.0, but not every candidate carries it"),
        (
            {
                "criteria": {"length": 1.0},
                "candidates": [*candidates(2), {"prompt": "p", "response": "r", "length": 1}],
            },
            "'length' has weight 1.0, but not every candidate",
        ),
        ({"candidates": candidates(3, satisfaction=[0.0, 1.5, 1.0])}, r"satisfaction: .* candidate 1 has 1\.5"),
        ({"candidates": candidates(3, entropy=[0.0, 1.0, float("inf")])}, "entropy: candidate 2 has inf"),
        ({"minimum": {"scor": 1.0}}, "minimum: unknown criterion 'scor'; did you mean 'score'"),
        ({"maximum": {"score": float("nan")}}, "maximum: limit of 'score' is nan"),
        ({"maximum": {"entropy": 1.0}}, "maximum: 'entropy' has a limit, but not every candidate carries it"),
        ({"near_duplicate": 0.0}, r"near_duplicate must be a cosine in \(0, 1\], got 0.0"),
        ({"near_duplicate": 1.1}, "near_duplicate must be a cosine"),
        ({"near_duplicate": 0.9}, "near_duplicate: needs the embeddings"),
        ({"niter": 3}, "niter: the clusters are given"),
        ({"num_clusters": 4}, "num_clusters is 4, but the clusters given are 2"),
        ({"groups": given([0, 1], 2)}, "groups: clusters of 2 rows for 3 candidates"),
        ({"groups": blob_embeddings(3)}, "num_clusters: needed"),
        ({"groups": blob_embeddings(2), "num_clusters": 2}, "groups: 2 embeddings for 3 candidates"),
        ({"embeddings": blob_embeddings(2)}, "embeddings: 2 rows for 3 candidates"),
    ],
)
def test_bad_arguments(change, message):
    call = {"candidates": candidates(3), "scores": [0.0, 1.0, 2.0], "groups": given([0, 1, 0], 2), "top_k": 1, **change}
    with pytest.raises(ValueError, match=message):
        select_rehearsal(**call)


def test_top_up():
    chosen = select_rehearsal(candidates(30), np.zeros(30), given([0] * 30, 1), top_k=30)
    outside = [
        Demonstration("q1", "a1", "math", "skills.jsonl:7", {"level": 3, "prompt": "not this"}),
        {"prompt": "q2", "response": "a2", "provenance": "older"},
    ]
    mixed = top_up(chosen.rows, outside, seed=1)
    added = [row for row in mixed if row["provenance"]["origin"] == "outside"]
    assert sorted(added, key=lambda row: row["prompt"]) == [
        {
            "prompt": "q1",
            "response": "a1",
            "task": "math",
            "level": 3,
            "provenance": {"origin": "outside", "source": "skills.jsonl:7"},
        },
        {"prompt": "q2", "response": "a2", "provenance": {"origin": "outside", "source": None}},
    ]
    rest = [row for row in mixed if row["provenance"]["origin"] == "selected"]
    assert sorted(row["prompt"] for row in rest) == sorted(row["prompt"] for row in chosen.rows)
    assert mixed == top_up(chosen.rows, outside, seed=1) != top_up(chosen.rows, outside, seed=2)
    assert len(chosen.rows) == 30 and outside[1]["provenance"] == "older"
    assert [row["prompt"] for row in top_up([], outside[:1])] == ["q1"]
    with pytest.raises(ValueError, match=r"outside_rows\[0\]: needs"):
        top_up([], [{"prompt": "q"}])


def test_importing_the_room_loads_nothing_heavy():
    heavy = [
        "deepspeed",
        "matplotlib",
        "scipy",
        "faiss",
        "sklearn",
        "sentence_transformers",
        "transformers",
        "torch",
        "stable_rlhf.engine",
        "stable_rlhf.policy",
    ]
    code = f"import sys, stable_rlhf.rehearsal; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert out.strip() == "[]"
