"""Lloyd's algorithm on the CPU over rows that may lie on disk: fast, repeatable, and in bounded memory.

Rows go through in blocks of a fixed size, and each block is worked on by one thread with BLAS kept to that thread. That
is faster than one product shared by all threads (a block's scores stay in its core's cache until the arg-max has read
them), and it makes every number independent of how many threads there are: the same block always meets the same code.
Rows that lie in memory (or a memory map) as C++ needs them go through it many blocks at a time, on torch's threads;
others, and all without the C++ module, on threads of Python.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from stable_rlhf.show.progress import progress

BLOCK_ROWS = 2048  # 8 MB of scores at c = 1,000; of 256 to 4,096 rows the fastest at c = 100 and c = 1,000
INIT_ROWS = 16_384  # k-means++ draws from this many rows, or 32 a cluster where that is more
LARGEST_PROPOSAL = 256
_SPAN = 64 * BLOCK_ROWS  # rows of one call of C++, which hears no interrupt
_LONG_OFFSET = 1e4  # squared length of an offset over the rows' variance

Result = TypeVar("Result")


def default_threads() -> int:
    """As many threads as BLAS may use at the moment (OMP_NUM_THREADS and threadpoolctl's limits count)."""
    limits = [pool["num_threads"] for pool in _libraries().info() if pool["user_api"] == "blas"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, min(limits, default=cores)))


class Rows:
    """Rows [n, d] of an array or memory map, handed out block by block to a few threads.

    scale: float32 [n], what each row is to be multiplied by (1 over its length for spherical clusters), or None.
    offset: float32 [d], what is subtracted from every row (`common_offset`), or None; not together with `scale`.
    """

    def __init__(self, array: np.ndarray, pool: ThreadPoolExecutor, threads: int, scale: np.ndarray | None = None):
        self.array, self.scale = array, scale
        self.offset: np.ndarray | None = None
        self.mean: np.ndarray | None = None  # float64 [d], of the rows as they are stored, where it is known
        self._pool, self.threads = pool, threads
        self._local = threading.local()

    def scratch(self, length: int, width: int, name: str = "scores") -> np.ndarray:
        """float32 [length, width] of this thread's own, over the last one it had of this name: fresh pages cost as much
        as a small product."""
        held = vars(self._local).get(name)
        if held is None or held.size < length * width:
            held = vars(self._local)[name] = np.empty(length * width, dtype=np.float32)
        return held[: length * width].reshape(length, width)

    @property
    def plain(self) -> bool:
        """Whether C++ takes the rows as they are stored, many blocks at a time: torch's threads are there at once,
        where those of Python take a tenth of a millisecond a pass to wake."""
        as_needed = self.array.dtype == np.float32 and self.array.flags.c_contiguous and self.array.flags.aligned
        return bool(as_needed) and _kernels()[0] is not None and _gemm() != 0

    def each(self, work: Callable[[slice, np.ndarray, int], None]) -> None:
        """work(which rows, these as they are stored, threads to work with) for all rows, part by part."""
        if self.plain:
            for start in range(0, len(self), _SPAN):
                here = slice(start, start + _SPAN)
                work(here, self.array[here], self.threads)
            return

        def one(start: int) -> None:
            work(slice(start, start + BLOCK_ROWS), self.stored(start), 1)

        for _ in self.map(one):
            pass

    def of(self, array: np.ndarray) -> Rows:
        """Other rows [m, d], as they are, on the same threads."""
        return Rows(array, self._pool, self.threads)

    def __len__(self) -> int:
        return len(self.array)

    def stored(self, start: int) -> np.ndarray:
        """Rows [start, start + BLOCK_ROWS), float32 and contiguous; no copy where they are that."""
        return np.ascontiguousarray(self.array[start : start + BLOCK_ROWS], dtype=np.float32)

    def block(self, start: int) -> np.ndarray:
        """The same less the offset, until this thread asks for others."""
        block = self.stored(start)
        if self.offset is None:
            return block
        return np.subtract(block, self.offset, out=self.scratch(len(block), block.shape[1], "rows"))

    def scaled(self, start: int) -> np.ndarray:
        block = self.block(start)
        return block if self.scale is None else block * self.scale[start : start + BLOCK_ROWS, None]

    def take(self, places: np.ndarray) -> np.ndarray:
        """The rows at `places`, scaled, float32 [m, d]."""
        block = np.asarray(self.array[places], dtype=np.float32)
        if self.offset is not None:
            return block - self.offset
        return block if self.scale is None else block * self.scale[places, None]

    def whole(self) -> np.ndarray:
        """All rows, scaled, float32 [n, d]; the array itself where it is that already. Not to be written to."""
        rows = np.ascontiguousarray(self.array, dtype=np.float32)
        if self.offset is not None:
            return rows - self.offset
        return rows if self.scale is None else rows * self.scale[:, None]

    def map(self, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
        """(start, work(start)) of every block in order; few are under way at a time, so results do not pile up."""
        waiting: deque[tuple[int, Future[Result]]] = deque()
        for start in range(0, len(self.array), BLOCK_ROWS):
            if self.threads == 1:
                yield start, work(start)
                continue
            waiting.append((start, self._pool.submit(work, start)))
            if len(waiting) > 2 * self.threads:
                yield _first(waiting, work)
        while waiting:
            yield _first(waiting, work)


def _first(waiting: deque[tuple[int, Future[Result]]], work: Callable[[int], Result]) -> tuple[int, Result]:
    """The first block's result; while others are at it, the caller, who is one of the threads, works on what none has
    begun."""
    while not waiting[0][1].done():
        place = next((place for place, (_, future) in enumerate(waiting) if future.cancel()), None)
        if place is None:
            break
        start, _ = waiting[place]
        mine: Future[Result] = Future()
        mine.set_result(work(start))
        waiting[place] = start, mine
    start, future = waiting.popleft()
    return start, future.result()


@cache
def _libraries() -> Any:
    """What sets BLAS's threads. To look through the process's libraries takes milliseconds; numpy's is among them, and
    scipy's."""
    from threadpoolctl import ThreadpoolController

    _gemm()
    return ThreadpoolController()


@cache
def _gemm() -> int:
    """The address of BLAS's sgemm, which scipy hands out for compiled code to call; 0 where its whole numbers are not
    those of C."""
    from scipy.linalg import cython_blas

    capsule = ctypes.py_object(cython_blas.__pyx_capi__["sgemm"])
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = name(capsule)
    return (
        int(pointer(capsule, signature)) if signature.startswith(b"void (char *, char *, int *, int *, int *,") else 0
    )


@contextmanager
def open_rows(array: np.ndarray, *, scale: np.ndarray | None = None, threads: int | None = None) -> Iterator[Rows]:
    """`Rows` with their threads; while it is open, BLAS uses one thread a call, in the whole process."""
    threads = default_threads() if threads is None else threads
    helpers = max(threads - 1, 1)  # the caller works too
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(helpers) as pool:
        yield Rows(array, pool, threads, scale)


def squared_lengths(rows: Rows) -> np.ndarray:
    """float32 [n], the squared length of every row as stored, or its squared distance to the offset; not finite where
    the row is not (or is too large)."""
    lengths = np.empty(len(rows), dtype=np.float32)
    origin = np.zeros(rows.array.shape[1], dtype=np.float32) if rows.offset is None else rows.offset
    rows.each(lambda here, stored, threads: _apart_from(stored, None, origin[None], None, lengths[here], threads))
    return lengths


def _apart_from(
    block: np.ndarray,
    scale: np.ndarray | None,
    centroids: np.ndarray,
    labels: np.ndarray | None,
    out: np.ndarray,
    threads: int,
) -> None:
    """Squared distances of scaled rows to the centroids of their labels (None: the only one) in float64, to `out`."""
    module, isa = _kernels()
    if module is not None:
        n, d = block.shape
        module.kmeans_distances(
            rows=block.ctypes.data, scale=_address(scale), centroids=centroids.ctypes.data, labels=_address(labels),
            n=n, d=d, out=out.ctypes.data, num_threads=threads, isa=isa,
        )  # fmt: skip
        return
    wide = block.astype(np.float64)
    if scale is not None:
        wide *= scale[:, None]
    wide -= centroids if labels is None else centroids[labels]
    with np.errstate(over="ignore"):  # that is for the caller to tell
        out[:] = np.einsum("nd,nd->n", wide, wide)


def common_offset(rows: Rows, squared: np.ndarray) -> np.ndarray | None:
    """float32 [d], what all rows share where that is a hundred times as long as what they differ by, else None.

    Distances are differences of products, in every backend. With an offset that long, float32's rounding of the
    products is as large as the distances, and all rows may end up in one cluster."""
    mean = rows.mean = _mean(rows)
    shared = float(mean @ mean)
    spread = float(squared.mean(dtype=np.float64)) - shared
    return mean.astype(np.float32) if spread * _LONG_OFFSET < shared else None


def _mean(rows: Rows) -> np.ndarray:
    """float64 [d], of the rows as `block` gives them; block by block, whoever adds them."""
    total = np.zeros(rows.array.shape[1])
    if rows.plain and rows.offset is None:
        module, isa = _kernels()
        assert module is not None

        def add(_here: slice, stored: np.ndarray, threads: int) -> None:
            module.kmeans_sum(
                rows=stored.ctypes.data, n=len(stored), d=len(total), sums=total.ctypes.data, block=BLOCK_ROWS,
                num_threads=threads, isa=isa,
            )  # fmt: skip

        rows.each(add)
    else:
        for _, part in rows.map(lambda start: rows.block(start).sum(axis=0, dtype=np.float64)):
            total += part
    return total / len(rows)


def _kernels() -> tuple[Any | None, str]:
    """The C++ module, or None, and the instruction set to run; imported late, for it takes torch along."""
    from stable_rlhf.ops.backends import cpu_isa, extension

    return extension(), cpu_isa()


class _Nearest:
    """Finds the nearest centroid of every row of a block; ties go to the lower number."""

    def __init__(self, centroids: np.ndarray, spherical: bool) -> None:
        # arg-min |x - c|^2 = arg-max x (c - m) - (c - m)(c + m) / 2 for any m. With m the centroids' mean the numbers
        # to compare are small, and less of them is lost to rounding where all rows share a large offset.
        # On the sphere all centroids have the same length, so nothing is subtracted (nor need rows be scaled).
        self._module, self._isa = _kernels()
        centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        c, d = centroids.shape
        self.matrix = np.empty((d, c), dtype=np.float32)
        self.half = None if spherical else np.empty(c, dtype=np.float32)
        if self._module is not None:
            self._module.kmeans_prepare(
                centroids=centroids.ctypes.data, c=c, d=d, matrix=self.matrix.ctypes.data, half=_address(self.half)
            )
            return
        wide = centroids.astype(np.float64)
        middle = wide.mean(axis=0)
        apart = wide - middle
        self.matrix[:] = apart.T
        if self.half is not None:
            self.half[:] = np.einsum("cd,cd->c", apart, wide + middle) / 2

    def __call__(self, rows: Rows, block: np.ndarray, labels: np.ndarray) -> None:
        """Write the nearest of every row into `labels`, int32 [block], contiguous."""
        scores = self._scores(rows, block)
        if self._module is not None:
            self._module.kmeans_nearest(**self._fields(scores, labels))
            return
        if self.half is not None:
            scores -= self.half
        labels[:] = scores.argmax(axis=1)

    def moves(self, rows: Rows, start: int, labels: np.ndarray) -> _Change | None:
        """Update the `labels` of the block at `start`; what that changes in its clusters, or None."""
        block = rows.block(start)
        here = slice(start, start + len(block))
        scale = None if rows.scale is None else rows.scale[here]
        if self._module is None:
            new = np.empty(len(block), dtype=np.int32)
            self(rows, block, new)
            return _changed(block, scale, labels[here], new)
        scores = self._scores(rows, block)
        (n, c), d = scores.shape, block.shape[1]
        room = min(c, 2 * n)
        change = _Change(np.empty(room, np.int32), np.empty(room, np.int64), np.empty((room, d)))
        number = self._module.kmeans_moves(
            **self._fields(scores, labels[here]), rows=block.ctypes.data, scale=_address(scale), d=d,
            touched=change.clusters.ctypes.data, counts=change.counts.ctypes.data, sums=change.sums.ctypes.data,
        )  # fmt: skip
        return _Change(*(part[:number] for part in change)) if number else None

    def through(
        self,
        rows: Rows,
        labels: np.ndarray,
        sums: np.ndarray | None,
        sizes: np.ndarray | None,
        tell: Callable[[int], object] = lambda done: None,
    ) -> bool:
        """All of `rows`, which are plain: their `labels`, and what that changes in `sums` and `sizes` of the clusters
        where those are given; whether a row moved then. `tell` is called with each number of rows that is done."""
        moved = False

        def work(here: slice, stored: np.ndarray, threads: int) -> None:
            nonlocal moved
            assert self._module is not None
            moved |= self._module.kmeans_pass(
                **_pass_fields(rows, stored, threads, self.matrix), half=_address(self.half),
                scale=0 if rows.scale is None else rows.scale[here].ctypes.data, labels=labels[here].ctypes.data,
                sums=_address(sums), sizes=_address(sizes),
            )  # fmt: skip
            tell(len(stored))

        rows.each(work)
        return moved

    def _fields(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """What both calls of C++ take."""
        n, c = scores.shape
        return {
            "scores": scores.ctypes.data, "half": _address(self.half), "n": n, "c": c, "labels": labels.ctypes.data,
            "isa": self._isa,
        }  # fmt: skip

    def _scores(self, rows: Rows, block: np.ndarray) -> np.ndarray:
        return np.matmul(block, self.matrix, out=rows.scratch(len(block), self.matrix.shape[1]))


def _pass_fields(rows: Rows, stored: np.ndarray, threads: int, matrix: np.ndarray) -> dict[str, Any]:
    """What the calls of C++ on many blocks take: some of the rows, less their offset, and the centroids [d, c]."""
    return {
        "rows": stored.ctypes.data, "offset": _address(rows.offset), "matrix": matrix.ctypes.data, "n": len(stored),
        "d": stored.shape[1], "c": matrix.shape[1], "block": BLOCK_ROWS, "gemm": _gemm(), "num_threads": threads,
        "isa": _kernels()[1],
    }  # fmt: skip


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


class _Change(NamedTuple):
    """What a block's moved rows change in `clusters`: how many more there are, and sums of rows come minus gone."""

    clusters: np.ndarray  # int32 [m], each once
    counts: np.ndarray  # int64 [m]
    sums: np.ndarray  # float64 [m, d]


def _changed(block: np.ndarray, scale: np.ndarray | None, labels: np.ndarray, new: np.ndarray) -> _Change | None:
    """`_C.kmeans_moves` without the C++ module: sums in the same order, with the same bits."""
    from scipy.sparse import csr_matrix

    moved = np.flatnonzero(new != labels)
    if not len(moved):
        return None
    weight = np.ones(len(moved)) if scale is None else scale[moved].astype(np.float64)
    into, out_of = new[moved], labels[moved]
    left = np.flatnonzero(out_of >= 0)
    touched, place = np.unique(np.concatenate([into, out_of[left]]), return_inverse=True)
    columns = np.concatenate([np.arange(len(moved)), left])
    values = np.concatenate([weight, -weight[left]])
    change = csr_matrix((values, (place, columns)), shape=(len(touched), len(moved)))
    count = np.bincount(place[: len(moved)], minlength=len(touched))
    count -= np.bincount(place[len(moved) :], minlength=len(touched))
    labels[moved] = into
    return _Change(touched, count, change @ block[moved].astype(np.float64))


def distances(rows: Rows, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 [n], the squared distance of every row to the centroid of its cluster, from differences."""
    squared, labels = np.empty(len(rows), dtype=np.float32), np.ascontiguousarray(labels, dtype=np.int32)
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)

    def work(here: slice, some: np.ndarray, threads: int) -> None:
        scale = None if rows.scale is None else rows.scale[here]
        _apart_from(some, scale, centroids, labels[here], squared[here], threads)

    if rows.offset is None:
        rows.each(work)
    else:
        for _ in rows.map(lambda start: work(slice(start, start + BLOCK_ROWS), rows.block(start), 1)):
            pass
    return squared


def assign(rows: Rows, centroids: np.ndarray, *, spherical: bool) -> np.ndarray:
    """int64 [n], the nearest centroid of every row."""
    nearest = _Nearest(centroids, spherical)
    assignment = np.empty(len(rows), dtype=np.int32)

    with progress("assigning", total=len(rows), unit="rows") as bar:
        if rows.plain:
            nearest.through(rows, assignment, None, None, bar.advance)
        else:
            for start, _ in rows.map(lambda at: nearest(rows, rows.block(at), assignment[at : at + BLOCK_ROWS])):
                bar.advance(min(BLOCK_ROWS, len(rows) - start))
    return assignment.astype(np.int64)


@dataclass
class Trained:
    centroids: np.ndarray  # float32 [c, d]
    labels: np.ndarray  # int32 [n], the nearest of them where it has converged
    iterations: int
    converged: bool


def lloyd(rows: Rows, centroids: np.ndarray, *, niter: int, spherical: bool) -> Trained:
    """Lloyd's iterations from the given centroids until no row changes its cluster, at most `niter`.

    Sums are kept in float64 and changed by the rows that moved only. A cluster that became empty takes over the row
    that is farthest from its own centroid.
    """
    c, d = centroids.shape
    labels = np.full(len(rows), -1, dtype=np.int32)
    sums, sizes = np.zeros((c, d)), np.zeros(c, dtype=np.int64)
    done, converged = 0, False
    with progress("k-means", total=niter, unit="iterations") as bar:
        while done < niter and not converged:
            nearest = _Nearest(centroids, spherical)
            if rows.plain:
                converged = not nearest.through(rows, labels, sums, sizes)
            else:
                converged = True
                for _, change in rows.map(partial(nearest.moves, rows, labels=labels)):
                    if change is not None:
                        sums[change.clusters] += change.sums
                        sizes[change.clusters] += change.counts
                        converged = False
            if converged:
                break
            if (sizes == 0).any():
                _refill(rows, labels, centroids, sums, sizes)
            centroids = _means(sums, sizes, centroids, spherical)
            done += 1
            bar.advance(1)
    return Trained(centroids, labels, done, converged)


def _means(sums: np.ndarray, sizes: np.ndarray, old: np.ndarray, spherical: bool) -> np.ndarray:
    means = sums / np.maximum(sizes, 1)[:, None]
    if spherical:
        length = np.linalg.norm(means, axis=1, keepdims=True)
        # Rows that cancel out have no direction: their centroid stays where it was.
        means = np.where(length > 1e-12, means / np.maximum(length, 1e-12), old)
    means[sizes == 0] = old[sizes == 0]
    return np.ascontiguousarray(means, dtype=np.float32)


def _refill(rows: Rows, labels: np.ndarray, centroids: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> None:
    """Give every empty cluster one row: those farthest from their own centroids, ties to the lower index."""
    distance = distances(rows, centroids, labels)
    empty = np.flatnonzero(sizes == 0)
    # More than needed, for some may be the last row of their cluster.
    count = min(len(rows), 4 * len(empty) + len(centroids))
    far = np.argpartition(-distance, count - 1)[:count]
    far = far[np.lexsort((far, -distance[far]))]
    waiting = deque(empty.tolist())
    for place in far.tolist():
        if not waiting or distance[place] <= 0:
            return
        home = int(labels[place])
        if sizes[home] > 1:
            into = waiting.popleft()
            row = rows.take(np.array([place]))[0].astype(np.float64)
            sums[home] -= row
            sizes[home] -= 1
            sums[into], sizes[into], labels[place] = row, 1, into


def _apart(squared: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Squared distances [..., n] to rows of these squared lengths: what rounding leaves of equal rows is none."""
    squared[squared < 2e-6 * lengths] = 0.0
    return squared


def plus_plus(rows: Rows, num_clusters: int, distinct: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Places of `num_clusters` first centroids by k-means++ over at most max(16,384, 32 c) rows, int64 [c].

    Each centroid is drawn with probability proportional to the squared distance D^2 from those before it. Drawing one
    at a time reads all rows c times. Here a batch of proposals is drawn from the distribution before the batch; each is
    accepted with probability (its D^2 by now) / (its D^2 when drawn): exactly the right distribution. To decide takes
    products of the proposals with each other; all rows are read once a batch, for those that were accepted.

    distinct: places of `num_clusters` rows of which no two are equal, used where distances of the rest are all 0.
    """
    n = len(rows)
    count = min(n, max(INIT_ROWS, 32 * num_clusters))
    places = np.arange(n) if count == n else np.sort(generator.choice(n, count, replace=False))
    sample = rows.of(rows.whole() if count == n else rows.take(places))
    # Distances come from products here: an offset that all rows share would drown them in rounding.
    known = rows.mean if count == n and rows.scale is None and rows.offset is None else None
    sample.offset = (_mean(sample) if known is None else known).astype(np.float32)
    lengths = squared_lengths(sample)
    nearest = np.full(count, np.inf, dtype=np.float32)
    chosen: list[int] = []
    proposals = np.array([generator.integers(count)])

    def of_block(minus_twice: np.ndarray, lengths_taken: np.ndarray, start: int) -> None:
        block = sample.block(start)
        here = slice(start, start + len(block))
        products = np.matmul(minus_twice, block.T, out=sample.scratch(len(minus_twice), len(block)))
        products += lengths_taken[:, None]
        np.minimum(nearest[here], _apart(products.min(axis=0) + lengths[here], lengths[here]), out=nearest[here])

    def approach(taken: np.ndarray, lengths_taken: np.ndarray) -> None:
        if not sample.plain:
            for _ in sample.map(partial(of_block, -2 * taken, lengths_taken)):
                pass
            return
        module: Any = _kernels()[0]
        matrix, half = np.ascontiguousarray(taken.T), lengths_taken / 2
        sample.each(lambda here, stored, threads: module.kmeans_approach(
            **_pass_fields(sample, stored, threads, matrix), half=half.ctypes.data, own=lengths_taken.ctypes.data,
            lengths=lengths[here].ctypes.data, squared=nearest[here].ctypes.data,
        ))  # fmt: skip

    while True:
        candidates, own = sample.take(proposals), lengths[proposals]
        apart = _apart(own[:, None] + own - 2 * (candidates @ candidates.T), own)
        now, accepted = nearest[proposals], []
        for index, before in enumerate(now.tolist()):
            fresh = np.isinf(before)
            if (fresh or generator.random() * before < now[index]) and len(chosen) < num_clusters:
                accepted.append(index)
                chosen.append(int(proposals[index]))
                np.minimum(now, apart[index], out=now)
        if len(chosen) == num_clusters:
            break
        if accepted:
            approach(candidates[accepted], own[accepted])
        nearest[proposals[accepted]] = 0.0
        ends = np.cumsum(nearest, dtype=np.float64)
        if ends[-1] <= 0:
            break
        size = min(2 * (num_clusters - len(chosen)), LARGEST_PROPOSAL)
        drawn = np.searchsorted(ends, generator.random(size) * ends[-1], side="right")
        proposals = np.minimum(drawn, count - 1)
    return filled_up(places[chosen], num_clusters, distinct, rows.take)


def filled_up(
    starts: np.ndarray, num_clusters: int, distinct: np.ndarray, take: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`starts`, and other distinct rows where every row drawn from sits on a centroid already, to rounding."""
    if len(starts) == num_clusters:
        return starts
    known = {row.tobytes() for row in take(starts) + np.float32(0)}
    spare = [p for p, row in zip(distinct, take(distinct) + np.float32(0), strict=True) if row.tobytes() not in known]
    return np.concatenate([starts, np.array(spare[: num_clusters - len(starts)], dtype=np.int64)])
