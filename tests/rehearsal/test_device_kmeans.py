"""k-means on one device: here on CPU tensors, through the same code; marked gpu, on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bench.count.device import Device
from bench.count.kmeans import count_iterations
from stable_rlhf.rehearsal import cluster, cluster_embeddings, device_kmeans, device_rows
from stable_rlhf.rehearsal.cluster import Clusters, check_clustering
from stable_rlhf.rehearsal.device_rows import DeviceRows

HERE = torch.device("cpu")
gpu = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


def run(x: np.ndarray, c: int, *, seed: int = 0, device: str = "cpu", **options: Any) -> Clusters:
    given: dict[str, Any] = {
        "niter": 25, "spherical": False, "init": "kmeans++", "train_rows": None, **options,
    }  # fmt: skip
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return cluster._on_device(x, c, where, np.random.default_rng(seed), **given)


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def settled(x: np.ndarray, *, spherical: bool = False, resident: bool | None = None) -> DeviceRows:
    rows = DeviceRows(x, HERE, resident=resident)
    rows.measure()
    rows.settle(spherical)
    return rows


def same_bits(a: Clusters, b: Clusters) -> None:
    np.testing.assert_array_equal(a.assignment, b.assignment)
    np.testing.assert_array_equal(a.centroids, b.centroids)
    assert (a.inertia, a.iterations, a.notes) == (b.inertia, b.iterations, b.notes)


@pytest.fixture
def small_slabs(monkeypatch) -> None:
    """Slabs of 128 rows that are sent in pieces of about 30, products of 128 rows and 8 centroids."""
    monkeypatch.setattr(device_rows, "SLAB_BYTES", 1)
    monkeypatch.setattr(device_rows, "PIECE_BYTES", 1000)
    monkeypatch.setattr(device_kmeans, "SCORE_BYTES", 1)
    monkeypatch.setattr(device_kmeans, "WIDEST", 8)
    monkeypatch.setattr(device_kmeans, "RUN", 5)


# -- the results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("n", "d", "c"), [(1000, 7, 30), (515, 33, 17), (300, 1, 9), (129, 8, 1)])
def test_lloyd_is_lloyd(n, d, c, spherical, small_slabs):
    """The iterations against a plain float64 loop from the same start."""
    if spherical and d == 1:
        pytest.skip("two directions for nine clusters: all but two stay empty")
    x = normal(n, d, seed=1)
    rows = settled(x, spherical=spherical)
    places = np.arange(0, n, n // c)[:c]
    found = device_kmeans.lloyd(rows, rows.take(places), niter=5, spherical=spherical)
    wide = x.astype(np.float64)
    wide = wide / np.linalg.norm(wide, axis=1, keepdims=True) if spherical else wide - wide.mean(0)
    centroids = wide[places]
    for _ in range(found.iterations):
        labels = ((wide[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        centroids = np.stack([
            wide[labels == k].mean(axis=0) if (labels == k).any() else centroids[k] for k in range(c)
        ])  # fmt: skip
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    assert found.iterations == 5 or found.converged
    np.testing.assert_allclose(found.centroids.numpy(), centroids, atol=2e-6)
    np.testing.assert_array_equal(found.labels.numpy(), labels)
    exact = ((wide - centroids[labels]) ** 2).sum(-1)
    squared = device_kmeans.distances(rows, found.centroids, found.labels).numpy()
    np.testing.assert_allclose(squared, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_agrees_with_the_cpu_backend_from_the_same_rows(spherical):
    x = normal(3000, 24)
    own = cluster_embeddings(x, 20, niter=6, seed=2, spherical=spherical, init="random")
    other = run(x, 20, niter=6, seed=2, spherical=spherical, init="random")
    assert (other.backend, other.iterations) == ("cuda", own.iterations)
    assert (own.assignment == other.assignment).mean() > 0.999
    np.testing.assert_allclose(own.inertia, other.inertia, rtol=1e-4)
    np.testing.assert_array_equal(other.sizes, np.bincount(other.assignment, minlength=20))


def test_scores_have_the_digits_of_float32():
    """Beside float64: as near as float32's own products, where one bfloat16 product is 400 times as far off."""
    x, centroids = normal(400, 768), normal(50, 768, seed=1)
    rows, half = torch.from_numpy(x), torch.from_numpy(centroids).double().square().sum(1) / 2
    parts = torch.empty(400, 3 * device_rows.parts_width(768), dtype=torch.bfloat16)
    device_rows.fill_parts(parts, rows)
    matrix = device_kmeans.centroid_parts(torch.from_numpy(centroids), half)
    out = torch.empty(400, len(matrix))
    device_kmeans.multiply(parts, matrix.t(), out, units=False)
    exact = torch.from_numpy(x).double() @ torch.from_numpy(centroids).double().t() - half
    bound = torch.from_numpy(np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(centroids, axis=1)[None])
    off = ((out[:, :50] - exact).abs() / bound).max()
    one = ((rows.bfloat16().float() @ torch.from_numpy(centroids).bfloat16().float().t() - half - exact) / bound).abs()
    assert off < 2e-6 < 2e-4 < one.max()


def test_ties_go_to_the_lower_number_over_several_products(small_slabs):
    x = np.repeat(normal(3, 4), 50, axis=0)
    rows = settled(x)
    # Twenty equal centroids in three products, then the rows themselves.
    centroids = torch.cat([rows.take(np.zeros(20, np.int64)) + 9.0, rows.take(np.array([0, 50, 100] * 2))])
    labels = device_kmeans.assign(rows, centroids, spherical=False)
    assert labels.tolist() == [20] * 50 + [21] * 50 + [22] * 50
    away = device_kmeans.assign(rows, torch.cat([centroids[:20], centroids[:20]]), spherical=False)
    assert away.tolist() == [0] * 150


def test_an_offset_far_larger_than_the_data_hides_no_cluster():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), 50))
    x = (10 * rng.normal(size=(4, 8))[labels] + rng.normal(size=(200, 8)) + 20_000).astype(np.float32)
    found = run(x, 4)
    pairs = set(zip(found.assignment.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 4
    np.testing.assert_allclose(found.centroids[found.assignment[0]], x[labels == labels[0]].mean(0), rtol=1e-6)


@pytest.mark.parametrize("resident", [True, False])
def test_an_empty_cluster_moves_to_the_row_that_is_farthest(resident):
    x = np.array([[0.0], [0.1], [0.2], [5.0], [9.0]], dtype=np.float32)
    rows = settled(x, resident=resident)
    start = torch.tensor([[0.1], [100.0], [200.0]]) - float(x.mean())  # nobody is near the last two
    found = device_kmeans.lloyd(rows, start, niter=10, spherical=False)
    np.testing.assert_allclose(np.sort(found.centroids.numpy()[:, 0] + x.mean()), [0.1, 5, 9], rtol=1e-5)
    assert found.converged


def test_an_empty_cluster_takes_no_row_that_is_alone_or_on_its_centroid():
    """The farthest row is alone in its cluster: the next one is taken, and equal rows leave a cluster empty."""
    x = np.array([[0.0], [0.0], [1.0], [1.5], [50.0]], dtype=np.float32)
    rows = settled(x)
    start = torch.tensor([[0.0], [80.0], [1000.0]]) - float(x.mean())
    labels, new = torch.full((5,), -1), torch.empty(5, dtype=torch.int64)
    step = device_kmeans.iterate(rows, start, labels, new, False)
    assert new.tolist() == [0, 0, 0, 0, 1] and (step.changed, step.empty) == (5, 1)
    device_kmeans._move_empty(rows, new, start, step)
    np.testing.assert_allclose(step.centroids[:, 0].numpy() + x.mean(), [0.625, 50.0, 1.5], rtol=1e-6)
    equal = settled(np.ones((6, 2), np.float32))
    found = device_kmeans.lloyd(equal, torch.tensor([[0.0, 0.0], [9.0, 9.0]]), niter=5, spherical=False)
    assert found.labels.tolist() == [0] * 6 and found.centroids[1].tolist() == [9.0, 9.0]


def test_fewer_rows_than_clusters_repeated_rows_and_zeros():
    found = run(np.eye(2, 4, dtype=np.float32), 5)
    assert found.notes == ("5 clusters asked for, but only 2 distinct rows: 2 clusters made",)
    assert sorted(found.assignment.tolist()) == [0, 1] and found.inertia == 0
    repeated = run(np.repeat(np.eye(3, dtype=np.float32), 20, axis=0), 5)
    assert repeated.sizes.tolist() == [20, 20, 20] and repeated.inertia < 1e-10
    each = run(normal(7, 3), 7)
    assert each.sizes.tolist() == [1] * 7 and each.inertia < 1e-10
    with_zero = run(np.concatenate([normal(50, 6), np.zeros((3, 6), np.float32)]), 4, spherical=True)
    assert with_zero.sizes.sum() == 53 and np.isfinite(with_zero.centroids).all()
    np.testing.assert_allclose(np.linalg.norm(with_zero.centroids, axis=1), 1, rtol=1e-6)
    zeros = np.array([[0.0, 0.0], [-0.0, 0.0], [0.0, -0.0]], dtype=np.float32)
    assert run(zeros, 3).num_clusters == 1


def test_near_equal_rows_still_give_the_clusters_asked_for():
    x = np.ones((50, 4), dtype=np.float32)
    x[:, 0] += np.arange(50, dtype=np.float32) * np.float32(1.2e-7)
    distinct = len(np.unique(x, axis=0))
    assert run(x, distinct).num_clusters == distinct > 20


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_first_row_that_is_not_finite_is_named(bad, resident, small_slabs):
    x = np.zeros((700, 2), dtype=np.float32)
    x[600, 1] = x[690, 0] = bad
    message = "row 600 is too long" if bad == 1e30 else "row 600 holds NaN or infinite"
    with pytest.raises(ValueError, match=message):
        run(x, 2, resident=resident)


def test_plus_plus_draws_by_squared_distance():
    """Shares of the second centroid, against the definition, over many seeds."""
    x = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    counts, rows = np.zeros((3, 3)), settled(x)
    for seed in range(600):
        first, second = device_kmeans.plus_plus(rows, 2, np.arange(3), np.random.default_rng(seed))
        counts[first, second] += 1
    squared = (x - x.T) ** 2
    expected = squared / squared.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(counts / counts.sum(axis=1, keepdims=True), expected, atol=0.09)


def test_plus_plus_in_batches_spreads_like_the_cpu_backend():
    rng = np.random.default_rng(2)
    x = (10 * rng.normal(size=(40, 4))[rng.integers(40, size=1200)] + rng.normal(size=(1200, 4))).astype(np.float32)
    rows = settled(x)

    def potential(places: np.ndarray) -> float:
        return float(((x[:, None] - x[None, places]) ** 2).sum(-1).min(1).sum())

    from stable_rlhf.rehearsal import kmeans

    with kmeans.open_rows(x, threads=1) as host:
        own = [potential(kmeans.plus_plus(host, 60, np.arange(60), np.random.default_rng(s))) for s in range(25)]
    found = [device_kmeans.plus_plus(rows, 60, np.arange(60), np.random.default_rng(s)) for s in range(25)]
    assert all(len(set(places.tolist())) == 60 for places in found)
    assert abs(np.mean([potential(places) for places in found]) / np.mean(own) - 1) < 0.15


# -- rows that do not fit ----------------------------------------------------------------------------------------------


class Late(device_rows.Inline):
    """Copies happen as late as waiting allows, so that whoever does not wait finds old values."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.log: list[tuple[str, int]] = []
        self.begun = 0

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        self.waiting.append((target, source))
        number = self.begun = self.begun + 1

        def wait() -> None:
            while self.begun - len(self.waiting) < number:
                to, values = self.waiting.pop(0)
                to.copy_(values)

        return wait

    def sent(self) -> None:
        self.log.append(("sent", len(self.log)))
        while self.waiting:
            to, values = self.waiting.pop(0)
            to.copy_(values)

    def used(self) -> int:
        self.log.append(("used", len(self.log)))
        return len(self.log) - 1

    def send_after(self, mark: int) -> None:
        self.log.append(("after", mark))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"train_rows": 300}, {"init": "random"}])
def test_streamed_rows_give_the_bits_of_rows_that_stay(dtype, options, small_slabs, monkeypatch, tmp_path):
    x = normal(1000, 9).astype(dtype) + dtype(3)
    np.save(tmp_path / "x.npy", x)
    stay = run(x, 20, niter=7, resident=True, **options)
    same_bits(stay, run(np.load(tmp_path / "x.npy", mmap_mode="r"), 20, niter=7, resident=False, **options))
    same_bits(stay, run(np.asfortranarray(x)[::1], 20, niter=7, resident=False, **options))
    monkeypatch.setattr(device_rows, "transfers", lambda device: Late())
    same_bits(stay, run(x, 20, niter=7, resident=False, **options))


def test_a_slab_is_not_overwritten_before_it_has_been_used(small_slabs, monkeypatch):
    late = Late()
    monkeypatch.setattr(device_rows, "transfers", lambda device: late)
    rows = settled(normal(1000, 9), resident=False)
    late.log.clear()
    for _ in rows.slabs():
        late.log.append(("yielded", 0))
    kinds = [kind for kind, _ in late.log]
    yields = [place for place, kind in enumerate(kinds) if kind == "yielded"]
    marks = [mark for kind, mark in late.log if kind == "after"]
    assert len(yields) == len(marks) == 8
    for number in range(2, 8):
        assert marks[number] > yields[number - 2]  # made after the slab's last use was asked for


def test_only_rows_that_fit_stay(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    most = int((0.9 * (22 << 30) - device_rows.WORKSPACE_BYTES) / (4 * 768 + 6 * 776 + 64))
    device = torch.device("cuda", 0)
    assert device_rows._fits(most, 768, device) and not device_rows._fits(most + 1, 768, device)


def test_a_sample_of_streamed_rows_stays_where_it_fits(small_slabs, monkeypatch):
    x = normal(1000, 9)
    rows = settled(x, resident=False)
    rows._asked = None
    places = np.arange(3, 900, 2)
    some = rows.subset(places)
    assert some.resident and not rows.resident
    np.testing.assert_array_equal(some.take(np.arange(len(places))).numpy(), rows.take(places).numpy())
    apart = [parts.clone() for _, _, parts in rows.slabs()]
    assert torch.equal(torch.cat(apart)[places], torch.cat([parts for _, _, parts in some.slabs()]))


# -- what is asked of the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [0, 3])
@pytest.mark.parametrize(
    ("c", "spherical"), [(100, False), (100, True), (5000, True), pytest.param(5000, False, marks=pytest.mark.slow)]
)
def test_one_late_read_an_iteration_and_no_large_temporary(c, spherical, empty):
    n, d, niter = 400_000, 768, 3
    found = count_iterations(n, d, c, niter=niter, empty=empty, spherical=spherical)
    assert (found.late_reads, found.stops) == (niter, [])  # something is queued behind whatever the host waits for
    names = {work.name for work in found.work}
    assert not names & {"index_add_", "index_add", "scatter_add_", "scatter_add"}  # atomics: other bits every run
    if not empty:
        w = device_rows.parts_width(d)
        assert found.flops == niter * 2 * n * 3 * w * (-(-c // 8) * 8)  # every row meets every centroid once
        # Labels before and now and what changed, a slab's runs in float32 and 64, its order, scores; no [n, c], [n, d].
        runs = c + device_rows.SLAB_BYTES // (4 * d) // device_kmeans.RUN
        sums = 12 * d * runs + 48 * c * d
        assert found.peak_bytes < 2 * device_kmeans.SCORE_BYTES + 40 * n + sums < n * min(4 * c, 4 * d)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("options", [{}, {"spherical": True, "init": "random"}, {"train_rows": 300}])
def test_streams_events_and_pinned_memory(options, resident, small_slabs):
    """The code for CUDA on a device that is not there, whose pinned memory tells who reads it too early."""
    x = normal(700, 9)
    here = run(x, 20, niter=4, resident=resident, **options)
    device = Device()
    with device.present(), device.counting() as ledger:
        there = run(x, 20, niter=4, resident=resident, device="cuda", **options)
    same_bits(here, there)
    # Lengths, a block in which distinct rows are looked for, inertia, labels and centroids; and of the batches of first
    # centroids, each of which has a product of its own, what its proposals say of each other.
    batches = len([work for work in ledger.work if work.name.startswith("addmm")])
    assert len(ledger.stops) == 5 + batches
    assert "copy from the host" in {work.name for work in ledger.work}


def test_streamed_rows_take_no_more_memory_than_is_said():
    found = count_iterations(400_000, 768, 4096, resident=False)
    assert found.stops == []
    assert found.peak_bytes < device_rows.WORKSPACE_BYTES < 2 * found.peak_bytes


def test_streamed_iterations_stop_for_nothing(small_slabs):
    device = Device()
    with device.present():
        rows = DeviceRows(normal(1000, 9), torch.device("cuda", 0), resident=False)
        rows.measure()
        rows.settle(False)
        start = rows.take(np.arange(20))
        with device.counting() as ledger:
            found = device_kmeans.lloyd(rows, start, niter=3, spherical=False)
    assert found.iterations == 3
    assert ledger.stops == []
    moved = sum(work.bytes for work in ledger.work if work.name == "copy from the host")
    assert moved == 3 * 1000 * 9 * 4  # each row once an iteration


# -- the choice --------------------------------------------------------------------------------------------------------


def test_one_device_that_torch_sees_is_ours(monkeypatch):
    monkeypatch.setattr(cluster, "_cuda_devices", lambda: 4)
    assert check_clustering("kmeans", "auto", [3], True) == "cuda"
    assert check_clustering("kmeans", "auto", None, True) == "cpu"
    with pytest.raises(ValueError, match=r"devices \[4\]: torch .* sees 4 CUDA devices"):
        check_clustering("kmeans", "auto", [4], False)
    for devices in (None, [0, 1], []):
        with pytest.raises(ValueError, match="backend 'cuda' runs on one CUDA device"):
            check_clustering("kmeans", "cuda", devices, False)
    asked = []
    monkeypatch.setattr(cluster, "_cuda_device", lambda number: asked.append(number) or HERE)
    x = normal(200, 5)
    found = cluster_embeddings(x, 6, devices=[2], seed=3, train_rows=150)
    assert asked == [2, 2] and (found.backend, found.trained_on) == ("cuda", 150)
    same_bits(found, run(x, 6, seed=3, train_rows=150))


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("n", "d", "c"), [(30_000, 768, 100), (9001, 33, 5000), (777, 1, 13)])
def test_on_a_device_as_on_the_cpu_and_the_same_bits_again(device, n, d, c, spherical, monkeypatch):
    if spherical and d == 1:
        pytest.skip("two directions for thirteen clusters: rounding decides which of equal rows the others move to")
    monkeypatch.setattr(device_rows, "SLAB_BYTES", 4 << 20)
    x = normal(n, d)
    found = run(x, c, device=device, niter=4, spherical=spherical, init="random")
    same_bits(found, run(x, c, device=device, niter=4, spherical=spherical, init="random"))
    same_bits(found, run(x, c, device=device, niter=4, spherical=spherical, init="random", resident=False))
    here = run(x, c, niter=4, spherical=spherical, init="random")
    assert (found.assignment == here.assignment).mean() > 0.995
    np.testing.assert_allclose(found.inertia, here.inertia, rtol=1e-4)
    plus = run(x, c, device=device, niter=4, spherical=spherical)
    same_bits(plus, run(x, c, device=device, niter=4, spherical=spherical))


@pytest.mark.parametrize("device", [gpu])
def test_nothing_on_a_device_stops_between_iterations(device):
    where = torch.device(device, 0)
    rows = DeviceRows(normal(20_000, 64), where)
    rows.measure()
    rows.settle(False)
    start = rows.take(np.arange(300))
    torch.cuda.set_sync_debug_mode("error")  # waiting for the event of two integers is not what it looks for
    try:
        device_kmeans.lloyd(rows, start, niter=5, spherical=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
