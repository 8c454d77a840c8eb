"""Lloyd's algorithm on one device: rows, products, sums and distances stay there; one synchronisation an iteration.

The products are of bfloat16 parts with float32 sums. A row is high + low to 2^-18 of itself, a centroid likewise, and
all but low x low is added up: a score is off by some 2^-16 |row| |centroid| at most, as much as sums in float32 may
lose, at the rate of 16-bit matrix units, and whatever the settings for TF32 are.

Every run gives the same bits: nothing is added by atomics. Rows are sorted by cluster and added in that order, in
float32 over at most 128 rows and in float64 beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from stable_rlhf.rehearsal.device_rows import ONES, DeviceRows, parts_width, split
from stable_rlhf.rehearsal.kmeans import INIT_ROWS, filled_up
from stable_rlhf.show.progress import progress

SCORE_BYTES = 32 << 20  # scores that stay in the second-level cache between the product and the arg-max
WIDEST = 4096  # centroids of one product
LARGEST_PROPOSAL = 128  # rows of one batch of k-means++, whose distances to all others are held
RUN = 128  # rows of one cluster that are added up in float32
_EQUAL = 1e-12  # of two squared lengths: what rounding leaves of the distance between equal rows


def has_matrix_units(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices with float32 results are the device's own."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class _Nearest:
    """Finds the nearest centroid of every row of a slab; ties go to the lower number.

    Scores of at most 32 MiB at a time (128 rows at least); of more than 4096 centroids the best so far is kept."""

    def __init__(self, centroids: torch.Tensor, spherical: bool) -> None:
        # As on the CPU: arg-min |x - c|^2 = arg-max x (c - m) - (c - m)(c + m) / 2, with m the centroids' mean.
        wide = centroids.double()
        middle = wide.mean(0)
        apart = wide - middle
        half = None if spherical else (apart * (wide + middle)).sum(1) / 2
        self._matrix = matrix = centroid_parts(apart.float(), half)
        self._count = len(centroids)
        self._columns = min(len(matrix), WIDEST)
        self._rows = max(128, SCORE_BYTES // (4 * self._columns) // 128 * 128)
        self._scores: torch.Tensor | None = None
        self._units = has_matrix_units(centroids.device)

    def __call__(self, parts: torch.Tensor, labels: torch.Tensor) -> None:
        """Write int64 [m] into `labels`."""
        m = len(parts)
        # Even tiles: a short one at the end would leave most of the device idle.
        rows = min(m, -(-m // -(-m // self._rows) // 128) * 128)
        if self._scores is None or len(self._scores) < rows:
            self._scores = torch.empty(rows, self._columns, dtype=torch.float32, device=parts.device)
        for start in range(0, m, rows):
            self._tile(parts[start : start + rows], self._scores, labels[start : start + rows])

    def _tile(self, tile: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        best: torch.Tensor | None = None
        for first in range(0, self._count, WIDEST):
            some = self._matrix[first : first + WIDEST]
            out = scores[: len(tile)] if len(some) == self._columns else scores.new_empty(len(tile), len(some))
            multiply(tile, some.t(), out, self._units)
            out = out[:, : self._count - first]  # without the columns that pad it
            if self._count <= WIDEST:
                torch.argmax(out, 1, out=labels)
                return
            value, place = out.max(1)
            if best is None:
                best, label = value, place
            else:
                # The earlier one where they are equal.
                label = torch.where(value > best, place + first, label)
                best = torch.maximum(value, best)
        labels.copy_(label)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, units: bool) -> None:
    """out = a b from bfloat16, summed and kept in float32."""
    if units:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def centroid_parts(centroids: torch.Tensor, half: torch.Tensor | None) -> torch.Tensor:
    """bfloat16 [c to the next 8, 3 w] that goes with rows' parts; `half` (float64 [c]) is subtracted from products."""
    c, d = centroids.shape
    w = parts_width(d)
    matrix = torch.zeros(-(-c // 8) * 8, 3 * w, dtype=torch.bfloat16, device=centroids.device)
    high, low = split(centroids)
    for part, values in enumerate((high, high, low)):
        matrix[:c, part * w : part * w + d].copy_(values)
    if half is not None:
        rest = -half
        for column in range(d, d + ONES):  # 24 bits of it
            piece = rest.to(torch.bfloat16)
            matrix[:c, column].copy_(piece)
            rest = rest - piece.double()
    return matrix


# -- sums --------------------------------------------------------------------------------------------------------------


class _Sums:
    """Rows of every cluster, added up slab by slab: float64 `sums` [c, d], int64 `sizes` [c]."""

    def __init__(self, c: int, d: int, slab_rows: int, device: torch.device) -> None:
        self.sums = torch.zeros(c, d, dtype=torch.float64, device=device)
        self.sizes = torch.zeros(c, dtype=torch.int64, device=device)
        self._clusters = torch.arange(c + 1, dtype=torch.int32, device=device)
        self._runs = torch.arange(c + slab_rows // RUN, dtype=torch.int64, device=device)

    def count(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of a slab's rows by cluster, int64 [m], and where each cluster begins and ends among them, [c + 1]."""
        ordered, order = torch.sort(labels.int(), stable=True)  # half the passes
        bounds = torch.searchsorted(ordered, self._clusters)
        self.sizes += bounds.diff()
        return order, bounds

    def add(self, x: torch.Tensor, order: torch.Tensor, bounds: torch.Tensor) -> None:
        """Runs of at most 128 rows first, each cluster's runs then.

        How many runs there are stays on the device; there is room for as many as there can be."""
        m, c = len(x), len(self.sizes)
        ends = ((bounds.diff() + RUN - 1) // RUN).cumsum(0)
        first = F.pad(ends, (1, 0))  # [c + 1], the first run of each cluster, and how many there are
        number = self._runs[: c + m // RUN]
        owner = torch.searchsorted(ends, number, right=True)  # c for runs that are not there, which begin and end at m
        begins = (bounds[owner] + (number - first[owner]) * RUN).clamp(max=m)
        runs = F.embedding_bag(order, x, begins, mode="sum")
        self.sums += F.embedding_bag(number, runs.double(), first[:-1], mode="sum")


def _means(sums: torch.Tensor, sizes: torch.Tensor, old: torch.Tensor, spherical: bool) -> torch.Tensor:
    means = sums / sizes.clamp(min=1)[:, None]
    if spherical:
        length = means.norm(dim=1, keepdim=True)
        # Rows that cancel out have no direction: their centroid stays where it was.
        means = torch.where(length > 1e-12, means / length.clamp(min=1e-12), old.double())
    return torch.where(sizes[:, None] > 0, means.float(), old)


# -- iterations --------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    centroids: torch.Tensor  # float32 [c, d]
    labels: torch.Tensor  # int64 [n], of the last iteration
    iterations: int
    converged: bool  # labels are those of the centroids


def lloyd(rows: DeviceRows, centroids: torch.Tensor, *, niter: int, spherical: bool) -> Trained:
    """Lloyd's iterations from the given centroids until no row changes its cluster, at most `niter`.

    The centroid of a cluster that became empty moves to the row that is farthest from its own centroid.
    """
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    new, done, converged = torch.empty_like(labels), 0, False
    with progress("k-means", total=niter, unit="iterations") as bar:
        while done < niter and not converged:
            step = iterate(rows, centroids, labels, new, spherical)
            labels, new = new, labels
            converged = step.changed == 0
            if not converged:
                if step.empty:
                    _move_empty(rows, labels, centroids, step)
                centroids = step.centroids
                done += 1
                bar.advance(1)
    return Trained(centroids, labels, done, converged)


@dataclass
class _Step:
    centroids: torch.Tensor  # float32 [c, d], the means of the rows
    sizes: torch.Tensor  # int64 [c]
    changed: int  # rows
    empty: int  # clusters


def iterate(
    rows: DeviceRows, centroids: torch.Tensor, labels: torch.Tensor, new: torch.Tensor, spherical: bool
) -> _Step:
    """The nearest centroid of every row into `new`, and the means of the clusters; `labels` are those before."""
    nearest = _Nearest(centroids, spherical)
    totals = _Sums(len(centroids), rows.d, rows.slab_rows, rows.device)
    for places, x, parts in rows.slabs():
        nearest(parts, new[places])
        order, bounds = totals.count(new[places])
        if places.stop == len(rows):
            # On its way while the last slab is added up, so that the device does not wait for the host.
            news = rows.transfers.read(torch.stack([(new != labels).sum(), (totals.sizes == 0).sum()]))
        totals.add(x, order, bounds)
    means = _means(totals.sums, totals.sizes, centroids, spherical)
    changed, empty = news()
    return _Step(means, totals.sizes, changed, empty)


def _move_empty(rows: DeviceRows, labels: torch.Tensor, centroids: torch.Tensor, step: _Step) -> None:
    """Put centroids of empty clusters on the rows farthest from their own centroids, ties to the lower index.

    A row alone in its cluster stays, and so does one that sits on its centroid. All is decided on the device."""
    c, empty, sizes = len(centroids), step.empty, step.sizes
    # More than needed, for some may be the last row of their cluster.
    distance, place = torch.sort(distances(rows, centroids, labels), descending=True, stable=True)
    distance, place = distance[: 4 * empty + c], place[: 4 * empty + c]
    home = labels[place]
    by_home, order = torch.sort(home, stable=True)
    before = torch.empty_like(place)  # rows of the same cluster that are farther
    before[order] = torch.arange(len(place), dtype=torch.int64, device=place.device) - torch.searchsorted(
        by_home, by_home
    )
    allowed = (before < sizes[home] - 1) & (distance > 0)
    picks = torch.sort(allowed.to(torch.int8), descending=True, stable=True)[1][:empty]
    into = torch.sort((sizes == 0).to(torch.int8), descending=True, stable=True)[1][: len(picks)]
    step.centroids[into] = torch.where(allowed[picks, None], rows.at(place[picks]), step.centroids[into])


def assign(rows: DeviceRows, centroids: torch.Tensor, *, spherical: bool) -> torch.Tensor:
    """int64 [n], the nearest centroid of every row."""
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    nearest = _Nearest(centroids, spherical)
    with progress("assigning", total=len(rows), unit="rows") as bar:
        for places, _, parts in rows.slabs():
            nearest(parts, labels[places])
            bar.advance(len(parts))
    return labels


def distances(rows: DeviceRows, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float32 [n], the squared distance of every row to the centroid of its cluster, from differences."""
    squared = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for places, x, _ in rows.slabs():
        squared[places] = centroids.index_select(0, labels[places]).sub_(x).square_().sum(1)
    return squared


# -- first centroids ---------------------------------------------------------------------------------------------------


def plus_plus(rows: DeviceRows, num_clusters: int, distinct: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """`kmeans.plus_plus` on the device, which holds the rows drawn from in float64 (8 bytes a value) and the distances
    of one batch of proposals.

    Float64, for distances come from products, which have to tell equal rows from near ones: 16-bit matrix units are
    believed to cut sums off where float32 would round. One synchronisation a batch: what its proposals say of each
    other goes to the host, which accepts some. The distribution is that of the CPU's; weights are rounded to integers
    here, whose running sums have the same bits every run.
    """
    n, device = len(rows), rows.device
    count = min(n, max(INIT_ROWS, 32 * num_clusters))
    places = np.arange(n) if count == n else np.sort(generator.choice(n, count, replace=False))
    sample = rows.take(places).double()
    sample -= sample.mean(0)
    lengths = sample.square().sum(1)
    nearest = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    chosen: list[int] = []
    proposals, weight = rows.transfers.move(np.array([generator.integers(count)])), nearest.new_ones(1)
    while True:
        squared = lengths[proposals, None] + lengths
        equal = _EQUAL * squared
        squared.addmm_(sample[proposals], sample.t(), alpha=-2.0)
        squared.masked_fill_(squared < equal, 0.0)
        known = [weight, proposals.double(), nearest[proposals], squared[:, proposals].flatten()]
        table = torch.cat(known).cpu().numpy()
        if table[0] <= 0:
            break  # every row sits on a centroid
        size = len(proposals)
        who, before = table[1 : 1 + size], table[1 + size : 1 + 2 * size]
        apart, now, accepted = table[1 + 2 * size :].reshape(size, size), before.copy(), []
        for index in range(size):
            fresh = bool(np.isinf(before[index]))
            if (fresh or generator.random() * before[index] < now[index]) and len(chosen) < num_clusters:
                accepted.append(index)
                chosen.append(int(who[index]))
                np.minimum(now, apart[index], out=now)
        if len(chosen) == num_clusters:
            break
        if accepted:
            taken = rows.transfers.move(np.array(accepted))
            torch.minimum(nearest, squared[taken].amin(0), out=nearest)
            nearest.index_fill_(0, proposals[taken], 0.0)
        size = min(max(len(chosen) // 2, 1), num_clusters - len(chosen), LARGEST_PROPOSAL)
        proposals, weight = _draw(nearest, rows.transfers.move(generator.random(size)))
    return filled_up(places[chosen], num_clusters, distinct, lambda some: rows.take(some).cpu().numpy())


def _draw(nearest: torch.Tensor, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places drawn with probability proportional to `nearest`, one for each number of [0, 1), and the whole weight."""
    largest = float(2**62 // len(nearest))  # sums stay below 2^62
    weights = (nearest / nearest.max().clamp(min=1e-300) * largest).long()
    ends = weights.cumsum(0)
    goal = (random * ends[-1]).long()
    return torch.searchsorted(ends, goal, right=True).clamp(max=len(ends) - 1), ends[-1:].double()
