from __future__ import annotations

import logging
import sys
import types

import numpy as np
import pytest

from helpers.interpreter import ISAS
from stable_rlhf.ops.backends import extension
from stable_rlhf.rehearsal import cluster, cluster_embeddings, kmeans

faiss = pytest.importorskip("faiss")


def blobs(centres: int = 6, each: int = 50, d: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of deviation 1 around centres about 57 apart, in mixed order, and their true labels."""
    rng = np.random.default_rng(seed)
    middle = 10 * rng.normal(size=(centres, d))
    labels = rng.permutation(np.repeat(np.arange(centres), each))
    return (middle[labels] + rng.normal(size=(len(labels), d))).astype(np.float32), labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def test_same_partition_tells_partitions_apart():
    assert same_partition(np.array([0, 0, 1]), np.array([5, 5, 2]))
    assert not same_partition(np.array([0, 0, 1]), np.array([0, 1, 1]))


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blobs_are_recovered(method, seed):
    x, labels = blobs(seed=seed)
    found = cluster_embeddings(x, 6, method=method, seed=seed)
    assert same_partition(found.assignment, labels)
    assert found.assignment.dtype == np.int64 and found.sizes.dtype == np.int64
    assert found.sizes.tolist() == [50] * 6
    assert found.centroids.shape == (6, 16) and found.centroids.dtype == np.float32
    assert (found.num_clusters, found.trained_on, found.method, found.notes) == (6, 300, method, ())
    means = np.stack([x[found.assignment == k].mean(axis=0, dtype=np.float64) for k in range(6)])
    np.testing.assert_allclose(found.centroids, means, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.inertia, ((x - means[found.assignment]) ** 2).sum(), rtol=1e-6)


def test_spread_out_starts_find_blobs_that_a_random_start_merges():
    x, labels = blobs(each=500, d=64)
    found = {
        init: [same_partition(cluster_embeddings(x, 6, init=init, seed=s).assignment, labels) for s in range(8)]
        for init in ("kmeans++", "random")
    }
    # By chance even k-means++ begins twice in one blob now and then, one draw in some dozens here.
    assert sum(found["kmeans++"]) >= 6 and sum(found["random"]) <= 3


def test_rows_go_to_their_nearest_centroid():
    x = np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    found = cluster_embeddings(x, 12)
    distances = ((x[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(-1)
    assert (found.assignment == distances.argmin(1)).all()
    np.testing.assert_allclose(found.inertia, distances.min(1).sum(), rtol=1e-6)


def test_more_iterations_lower_the_inertia():
    x = np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    assert cluster_embeddings(x, 12, niter=25).inertia < 0.99 * cluster_embeddings(x, 12, niter=1).inertia


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_same_seed_same_clusters_on_one_and_two_threads(method):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    x = np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float32)  # no structure: many close calls
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    before = faiss.omp_get_max_threads()
    runs = []
    try:
        for threads in (1, 2, 1):
            faiss.omp_set_num_threads(threads)
            with threadpoolctl.threadpool_limits(threads):
                runs.append(cluster_embeddings(x, 20, method=method, niter=10, seed=7))
    finally:
        faiss.omp_set_num_threads(before)
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0].assignment, other.assignment)
    np.testing.assert_array_equal(runs[0].centroids, runs[2].centroids)
    different = cluster_embeddings(x, 20, method=method, niter=10, seed=8)
    assert not same_partition(runs[0].assignment, different.assignment)


def test_all_points_train_unless_told_otherwise(caplog):
    x, labels = blobs(each=300)  # 1,800 points for 6 centroids: faiss alone would use 256 each, 1,536
    assert cluster_embeddings(x, 6).trained_on == 1800
    cut = cluster_embeddings(x, 6, train_rows=120)
    assert cut.trained_on == 120
    assert cut.notes == ("trained on a sample of 120 of 1800 rows",) == tuple(caplog.messages)
    assert same_partition(cut.assignment, labels)
    assert cluster_embeddings(x, 6, train_rows=1800).notes == ()


def test_mixture_trains_on_the_sample_it_reports():
    x, labels = blobs(each=100)
    cut = cluster_embeddings(x, 6, method="gmm", train_rows=120)
    assert cut.trained_on == 120
    assert same_partition(cut.assignment, labels)
    assert not np.allclose(cut.centroids, cluster_embeddings(x, 6, method="gmm").centroids, atol=1e-3)


def test_mixture_separates_what_distance_alone_cannot():
    # A tight and a wide component with one centre: KMeans halves them, a mixture tells them by their variance.
    rng = np.random.default_rng(0)
    x = np.concatenate([0.05 * rng.normal(size=(300, 8)), 3.0 * rng.normal(size=(300, 8)) + 0.5]).astype(np.float32)
    truth = np.repeat([0, 1], 300)

    def agreement(method: str) -> float:
        hit = (cluster_embeddings(x, 2, method=method, niter=100).assignment == truth).mean()
        return max(hit, 1 - hit)

    assert agreement("gmm") > 0.99
    assert agreement("kmeans") < 0.9


def test_mixture_says_when_it_did_not_converge():
    x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    assert cluster_embeddings(x, 10, method="gmm", niter=1).notes == (
        "the mixture had not converged after 1 iterations",
    )


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
@pytest.mark.parametrize("num_clusters", [3, 10])
def test_fewer_points_than_clusters(method, num_clusters, caplog):
    x = np.eye(2, 4, dtype=np.float32)
    with caplog.at_level(logging.WARNING, logger="stable_rlhf"):
        found = cluster_embeddings(x, num_clusters, method=method)
    message = f"{num_clusters} clusters asked for, but only 2 distinct rows: 2 clusters made"
    assert message in found.notes and message in caplog.text
    assert sorted(found.assignment.tolist()) == [0, 1] and found.sizes.tolist() == [1, 1]
    assert found.inertia == 0


def test_as_many_clusters_as_points_is_silent(caplog, capfd):
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    found = cluster_embeddings(x, 7)
    assert found.sizes.tolist() == [1] * 7 and found.inertia == 0 and found.notes == ()
    assert caplog.text == "" and capfd.readouterr() == ("", "")


def test_duplicates_are_counted_once():
    x = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    found = cluster_embeddings(x, 5)
    assert found.num_clusters == 3 and found.sizes.tolist() == [20, 20, 20] and found.inertia == 0
    assert same_partition(found.assignment, np.repeat(np.arange(3), 20))
    exact = cluster_embeddings(x, 3)
    assert exact.notes == () and same_partition(exact.assignment, np.repeat(np.arange(3), 20))


def test_zero_rows_of_either_sign_are_one_row():
    x = np.array([[0.0, 0.0], [-0.0, 0.0], [0.0, -0.0]], dtype=np.float32)
    assert cluster_embeddings(x, 3).num_clusters == 1


def test_spherical_ignores_length_and_takes_zero_rows():
    rng = np.random.default_rng(0)
    directions = np.eye(3, 8)
    labels = np.repeat(np.arange(3), 30)
    x = directions[labels] + 0.02 * rng.normal(size=(90, 8))
    x = (x * rng.uniform(0.1, 50, size=(90, 1))).astype(np.float32)
    found = cluster_embeddings(x, 3, spherical=True)
    assert same_partition(found.assignment, labels)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found.inertia, ((unit - found.centroids[found.assignment]) ** 2).sum(), rtol=1e-5)
    assert not same_partition(cluster_embeddings(x, 3).assignment, labels)
    with_zero = cluster_embeddings(np.concatenate([x, np.zeros((1, 8), np.float32)]), 3, spherical=True)
    assert with_zero.sizes.sum() == 91 and np.isfinite(with_zero.centroids).all()


def test_half_precision_and_strided_input():
    x, labels = blobs()
    assert same_partition(cluster_embeddings(x.astype(np.float16), 6).assignment, labels)
    assert same_partition(cluster_embeddings(np.asfortranarray(x), 6).assignment, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_row_that_is_not_finite_is_named(bad):
    x = np.zeros((70_000, 2), dtype=np.float32)  # more than one block of the check
    x[66_000, 1] = bad
    x[69_000, 0] = bad
    with pytest.raises(ValueError, match="row 66000 holds NaN or infinite"):
        cluster_embeddings(x, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ({"niter": 0}, "niter must be at least 1"),
        ({"train_rows": 0}, "train_rows must be at least 1"),
        ({"method": "dbscan"}, "method must be one of kmeans, gmm, got 'dbscan'"),
        ({"init": "first"}, "init must be one of"),
        ({"method": "gmm", "spherical": True}, "spherical: only KMeans"),
        ({"method": "gmm", "devices": [0]}, "devices: only KMeans"),
        ({"devices": []}, "devices"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"backend": "cuml"}, "backend must be one of auto, cpu, cuda, faiss, flash-kmeans"),
        ({"backend": "cpu", "devices": [0]}, "the cpu backend uses none"),
        ({"backend": "cuda"}, "backend 'cuda' runs on one CUDA device"),
        ({"backend": "cuda", "devices": [97]}, r"devices \[97\]: torch .* sees \d+ CUDA devices"),
        ({"backend": "flash-kmeans", "devices": [0]}, "needs the package flash-kmeans"),
        ({"embeddings": np.full((3, 2), 1e30, np.float32)}, "row 0 is too long"),
        ({"devices": [97]}, r"devices \[97\]: faiss .* sees \d+ GPUs"),
        ({"embeddings": np.zeros(3, np.float32)}, r"floating point \[n, d\], got float32 \[3\]"),
        ({"embeddings": np.zeros((3, 2), int)}, "floating point"),
        ({"embeddings": [[0.0]]}, "numpy array"),
        ({"embeddings": np.zeros((0, 2), np.float32)}, "nothing to cluster"),
    ],
)
def test_bad_arguments(arguments, message):
    call = {"embeddings": np.eye(3, dtype=np.float32), "num_clusters": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        cluster_embeddings(**call)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_any_number_of_threads_gives_the_same_bits(spherical, init):
    x = np.random.default_rng(0).normal(size=(9000, 33)).astype(np.float32)  # five blocks, the last one short
    runs = [cluster_embeddings(x, 70, niter=8, seed=3, spherical=spherical, init=init, threads=t) for t in (1, 2, 5)]
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0].assignment, other.assignment)
        np.testing.assert_array_equal(runs[0].centroids, other.centroids)
        assert runs[0].inertia == other.inertia


@pytest.mark.parametrize("spherical", [False, True])
def test_lloyd_is_lloyd(spherical):
    """The iterations against a plain float64 loop from the same start."""
    x = np.random.default_rng(1).normal(size=(5000, 6)).astype(np.float32)
    x[17] = 0
    start = x[20:50].copy()
    scale = (1 / np.maximum(np.linalg.norm(x, axis=1), 1e-30)).astype(np.float32) if spherical else None
    if spherical:
        start *= scale[20:50, None]
    with kmeans.open_rows(x, scale=scale, threads=2) as rows:
        found = kmeans.lloyd(rows, start, niter=6, spherical=spherical)
    wide = x.astype(np.float64) * (1 if scale is None else scale[:, None])
    centroids = start.astype(np.float64)
    for _ in range(6):
        labels = ((wide[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        centroids = np.stack([wide[labels == k].mean(axis=0) for k in range(30)])
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    assert found.iterations == 6
    np.testing.assert_allclose(found.centroids, centroids, atol=2e-5)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_have_the_bits_of_numpy(isa, spherical, monkeypatch):
    x = np.random.default_rng(2).normal(size=(5000, 45)).astype(np.float32)
    x[17], x[100:200] = 0, x[3]

    def found():
        return cluster_embeddings(x, 37, niter=8, seed=3, spherical=spherical)

    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    monkeypatch.setattr(kmeans, "_gemm", lambda: 0)  # block by block, so that both have numpy's product
    kernels = found()
    monkeypatch.setattr(kmeans, "_kernels", lambda: (None, ""))
    plain = found()
    assert kernels.iterations == plain.iterations == 8 and kernels.inertia == plain.inertia
    for name in ("assignment", "centroids", "sizes"):
        np.testing.assert_array_equal(getattr(kernels, name), getattr(plain, name))


@pytest.mark.parametrize("isa", ISAS)
def test_the_nearest_is_the_first_of_the_best(isa):
    rng = np.random.default_rng(0)
    for c in (1, 2, 7, 8, 15, 16, 17, 64, 131):
        scores = rng.integers(-3, 3, size=(200, c)).astype(np.float32)  # ties
        scores[0], scores[1, :-1] = -np.inf, -np.inf
        half = rng.integers(-2, 2, size=c).astype(np.float32)
        labels = np.empty(200, dtype=np.int32)
        for less in (None, half):
            address = 0 if less is None else less.ctypes.data
            extension().kmeans_nearest(
                scores=scores.ctypes.data, half=address, n=200, c=c, labels=labels.ctypes.data, isa=isa
            )
            np.testing.assert_array_equal(labels, (scores if less is None else scores - less).argmax(1))
        scores[0], scores[1, c // 2] = np.nan, np.nan  # no number at all is the first; some are passed over
        extension().kmeans_nearest(scores=scores.ctypes.data, half=0, n=2, c=c, labels=labels.ctypes.data, isa=isa)
        passed = np.where(np.isnan(scores[1]), -np.inf, scores[1])
        assert labels[:2].tolist() == [0, passed.argmax()]


def test_a_fault_of_a_block_reaches_the_caller():
    def work(start):
        if start:
            raise ValueError(f"at {start}")
        return start

    for threads in (1, 2, 3):
        with kmeans.open_rows(np.zeros((5 * kmeans.BLOCK_ROWS, 2), np.float32), threads=threads) as rows:
            assert [result for _, result in rows.map(lambda start: start + 1)] == [
                kmeans.BLOCK_ROWS * block + 1 for block in range(5)
            ]
            with pytest.raises(ValueError, match=f"at {kmeans.BLOCK_ROWS}"):
                list(rows.map(work))


def test_an_empty_cluster_takes_the_row_that_is_farthest():
    x = np.array([[0.0], [0.1], [0.2], [5.0], [9.0]], dtype=np.float32)
    start = np.array([[0.1], [100.0], [200.0]], dtype=np.float32)  # nobody is near the last two
    with kmeans.open_rows(x) as rows:
        found = kmeans.lloyd(rows, start, niter=10, spherical=False)
    np.testing.assert_allclose(np.sort(found.centroids[:, 0]), [0.1, 5, 9], rtol=1e-6)


def test_a_large_common_offset_does_not_hide_the_clusters():
    x, labels = blobs(centres=4, d=8)
    shifted = x + np.float32(20_000)  # |x|^2 is 3e9: its float32 rounding alone is larger than any distance here
    seeds = [cluster_embeddings(shifted, 4, seed=seed) for seed in range(4)]  # one draw in a dozen is a bad start
    found = min(seeds, key=lambda clusters: clusters.inertia)
    assert same_partition(found.assignment, labels)


@pytest.mark.parametrize("backend", ["cpu", "faiss", "flash-kmeans"])
@pytest.mark.parametrize("method", ["kmeans", "gmm"])
@pytest.mark.parametrize("settings", [{}, {"train_rows": 500}])
def test_an_offset_far_larger_than_the_data_hides_no_cluster(backend, method, settings, monkeypatch):
    """faiss put all rows into one cluster, in silence: its distances are differences of products of 1e12."""
    rows, labels = blobs(each=200)
    given: dict = {"backend": backend, "method": method, **settings}
    if backend == "flash-kmeans":
        if method == "gmm":
            pytest.skip("runs on no device")
        monkeypatch.setattr(cluster, "_flash", lambda train, start, *, niter, device: cluster._faiss(
            train, start, niter=niter, seed=0, spherical=False, devices=None))  # fmt: skip
        monkeypatch.setitem(sys.modules, "flash_kmeans", types.SimpleNamespace(__spec__=object()))
        given["devices"] = [0]
    x = (64 * rows).astype(np.float32)  # float32 has steps of 1/16 at 1e6
    near = cluster_embeddings(x, 6, **given)
    far = cluster_embeddings(x + np.float32(1e6), 6, **given)
    assert same_partition(near.assignment, far.assignment)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)
    np.testing.assert_allclose(far.centroids - np.float32(1e6), near.centroids, atol=0.2)
    assert same_partition(far.assignment, labels)


def test_an_ordinary_mean_is_left_where_it_is():
    """Nothing is subtracted, so that results stay what they were, to the bit."""
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    for offset, expected in ((0.0, False), (50.0, False), (1000.0, True)):
        with kmeans.open_rows(x + np.float32(offset)) as rows:
            assert (kmeans.common_offset(rows, kmeans.squared_lengths(rows)) is not None) == expected


def test_plus_plus_draws_by_squared_distance():
    """Shares of the second centroid, against the definition, over many seeds."""
    x = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    counts = np.zeros((3, 3))
    with kmeans.open_rows(x, threads=1) as rows:
        for seed in range(1500):
            first, second = kmeans.plus_plus(rows, 2, np.arange(3), np.random.default_rng(seed))
            counts[first, second] += 1
    squared = (x - x.T) ** 2
    expected = squared / squared.sum(axis=1, keepdims=True)
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, expected, atol=0.06)
    np.testing.assert_allclose(counts.sum(axis=1) / 1500, 1 / 3, atol=0.05)


def test_plus_plus_in_batches_spreads_like_one_at_a_time():
    """The potential after 60 draws in batches, against 60 single draws by the definition."""
    x = (blobs(centres=40, each=30, d=4, seed=2)[0]).astype(np.float32)

    def potential(places: np.ndarray) -> float:
        return float(((x[:, None] - x[None, places]) ** 2).sum(-1).min(1).sum())

    def one_at_a_time(generator: np.random.Generator) -> np.ndarray:
        places = [int(generator.integers(len(x)))]
        while len(places) < 60:
            near = ((x[:, None] - x[None, places]) ** 2).sum(-1).min(1).astype(np.float64)
            places.append(int(generator.choice(len(x), p=near / near.sum())))
        return np.array(places)

    with kmeans.open_rows(x, threads=1) as rows:
        batched = [potential(kmeans.plus_plus(rows, 60, np.arange(60), np.random.default_rng(s))) for s in range(25)]
    single = [potential(one_at_a_time(np.random.default_rng(s))) for s in range(25)]
    uniform = [potential(np.random.default_rng(s).choice(len(x), 60, replace=False)) for s in range(25)]
    assert abs(np.mean(batched) / np.mean(single) - 1) < 0.15
    assert np.mean(uniform) > 2 * np.mean(batched)


def test_near_equal_rows_still_give_the_clusters_asked_for():
    """Distances that float32 products cannot tell from 0: distinct rows fill up."""
    x = np.ones((50, 4), dtype=np.float32)
    x[:, 0] += np.arange(50, dtype=np.float32) * np.float32(1.2e-7)
    distinct = len(np.unique(x, axis=0))
    found = cluster_embeddings(x, distinct)
    assert found.num_clusters == distinct > 20


def test_rows_on_disk_are_clustered_as_in_memory(tmp_path):
    x, _ = blobs(each=700)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for options in ({}, {"train_rows": 500}, {"spherical": True}, {"method": "gmm", "train_rows": 500}):
        on_disk = cluster_embeddings(mapped, 6, **options)
        in_memory = cluster_embeddings(np.array(mapped), 6, **options)
        np.testing.assert_array_equal(on_disk.assignment, in_memory.assignment)
        assert on_disk.inertia == in_memory.inertia


@pytest.mark.parametrize("spherical", [False, True])
def test_faiss_agrees_from_the_same_start(spherical):
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    own = cluster_embeddings(x, 20, niter=5, seed=2, spherical=spherical)
    other = cluster_embeddings(x, 20, niter=5, seed=2, spherical=spherical, backend="faiss")
    assert (own.backend, other.backend, other.iterations) == ("cpu", "faiss", 5)
    assert (own.assignment == other.assignment).mean() > 0.999
    np.testing.assert_allclose(own.inertia, other.inertia, rtol=1e-4)


def test_flash_kmeans_gets_the_start_and_the_device(monkeypatch):
    """Without a GPU: the package's call is replaced, its arguments are checked, the assignment is ours."""
    torch = pytest.importorskip("torch")
    x, labels = blobs()
    seen = {}

    def fake(rows, count, *, max_iters, tol, init_centroids):
        seen.update(rows=tuple(rows.shape), count=count, max_iters=max_iters, tol=tol)
        means = torch.stack([rows[0][torch.from_numpy(labels == k)].mean(0) for k in range(6)])
        assert init_centroids.shape == (1, 6, 16)
        return None, means[None], max_iters

    monkeypatch.setitem(sys.modules, "flash_kmeans", types.SimpleNamespace(batch_kmeans_Euclid=fake, __spec__=object()))
    monkeypatch.setattr(torch, "device", lambda kind, index: seen.update(device=(kind, index)) or "cpu")
    found = cluster_embeddings(x, 6, niter=9, backend="flash-kmeans", devices=[2])
    assert found.backend == "flash-kmeans" and same_partition(found.assignment, labels)
    assert seen == {"rows": (1, 300, 16), "count": 6, "max_iters": 9, "tol": 0.0, "device": ("cuda", 2)}
    with pytest.raises(ValueError, match="runs on one CUDA device"):
        cluster_embeddings(x, 6, backend="flash-kmeans", devices=[0, 1])
    with pytest.raises(ValueError, match="no spherical"):
        cluster_embeddings(x, 6, backend="flash-kmeans", devices=[0], spherical=True)


def test_only_the_devices_named_are_used(monkeypatch):
    asked = []

    def to_gpus(index, gpus):
        asked.append(gpus)
        return index  # the search itself runs on the CPU here

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", to_gpus, raising=False)
    x, labels = blobs()
    assert same_partition(cluster_embeddings(x, 6, devices=[3, 1]).assignment, labels)
    assert asked == [[3, 1]]
    cluster_embeddings(x, 6)
    assert asked == [[3, 1]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [1, 7, 8, 33, 256])
def test_distances_lengths_and_means_are_those_of_float64(d, isa, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    rng = np.random.default_rng(d)
    x = (rng.normal(size=(kmeans.BLOCK_ROWS + 100, d)) + 30).astype(np.float32)
    centroids, labels = rng.normal(size=(5, d)).astype(np.float32), rng.integers(0, 5, size=len(x))
    scale = rng.uniform(0.1, 3, size=len(x)).astype(np.float32)
    wide = x.astype(np.float64)
    with kmeans.open_rows(x, threads=2) as rows:
        np.testing.assert_allclose(kmeans.squared_lengths(rows), (wide**2).sum(1), rtol=1e-7)
        np.testing.assert_allclose(kmeans._mean(rows), wide.mean(0), rtol=1e-12)
        apart = wide - centroids[labels]
        np.testing.assert_allclose(kmeans.distances(rows, centroids, labels), (apart**2).sum(1), rtol=1e-7)
        rows.offset = x[0].copy()
        apart = (x - x[0]).astype(np.float64) - centroids[labels]
        np.testing.assert_allclose(kmeans.distances(rows, centroids, labels), (apart**2).sum(1), rtol=1e-7)
    with kmeans.open_rows(x, scale=scale, threads=1) as rows:
        apart = wide * scale.astype(np.float64)[:, None] - centroids[labels]
        np.testing.assert_allclose(kmeans.distances(rows, centroids, labels), (apart**2).sum(1), rtol=1e-7)


def test_rows_that_have_settled_are_not_looked_at_again(monkeypatch):
    x, labels = blobs()

    def asked(*_arguments, **_more):
        raise AssertionError("the labels are known")

    monkeypatch.setattr(kmeans, "assign", asked)
    assert same_partition(cluster_embeddings(x, 6, niter=50).assignment, labels)
    with pytest.raises(AssertionError, match="the labels are known"):
        cluster_embeddings(x, 6, niter=1)


@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"train_rows": 3000}], ids=str)
def test_rows_that_are_stored_otherwise_make_the_same_clusters(options):
    """C++ takes float32 in order as it lies; others go through Python block by block, with another library's product:
    a row that is as near to one as to another may be either's."""
    x = np.random.default_rng(4).normal(size=(5000, 20)).astype(np.float32)
    plain = cluster_embeddings(x, 30, niter=6, seed=2, init="random", **options)
    for stored in (x.astype(np.float64), np.asfortranarray(x)):
        with kmeans.open_rows(stored) as rows:
            assert not rows.plain
        other = cluster_embeddings(stored, 30, niter=6, seed=2, init="random", **options)
        assert (other.assignment != plain.assignment).mean() < 0.01
        np.testing.assert_allclose(other.centroids, plain.centroids, atol=0.05)
        assert other.inertia == pytest.approx(plain.inertia, rel=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("taken", [1, 7, 40])
def test_distances_to_centroids_that_come(taken, isa):
    """One call of C++ on three blocks, less an offset, beside float64; equal rows are at no distance."""
    rng = np.random.default_rng(taken)
    n, d = 2 * kmeans.BLOCK_ROWS + 77, 19
    x = (rng.normal(size=(n, d)) + 3).astype(np.float32)
    offset = x.mean(0)
    centroids = x[:: n // taken][:taken] - offset
    own = (centroids.astype(np.float64) ** 2).sum(1).astype(np.float32)
    lengths = ((x - offset).astype(np.float64) ** 2).sum(1).astype(np.float32)
    before = rng.uniform(5, 60, size=n).astype(np.float32)
    squared, matrix, half = before.copy(), np.ascontiguousarray(centroids.T), own / 2
    extension().kmeans_approach(
        rows=x.ctypes.data, offset=offset.ctypes.data, matrix=matrix.ctypes.data, half=half.ctypes.data,
        own=own.ctypes.data, lengths=lengths.ctypes.data, squared=squared.ctypes.data, n=n, d=d, c=taken,
        block=kmeans.BLOCK_ROWS, gemm=kmeans._gemm(), num_threads=2, isa=isa,
    )  # fmt: skip
    apart = (((x - offset).astype(np.float64)[:, None] - centroids) ** 2).sum(-1).min(1)
    np.testing.assert_allclose(squared, np.minimum(before, apart), rtol=1e-5, atol=2e-4)
    assert (squared[:: n // taken][:taken] == 0).all()


def test_without_a_product_for_compiled_code_rows_go_through_python(monkeypatch):
    x, labels = blobs()
    monkeypatch.setattr(kmeans, "_gemm", lambda: 0)
    with kmeans.open_rows(x) as rows:
        assert not rows.plain
    assert same_partition(cluster_embeddings(x, 6).assignment, labels)
