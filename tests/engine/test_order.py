"""Which rows meet in which micro-step: every row once a pass, the same for any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from stable_rlhf.engine.order import count_steps, micro_steps, shuffled_steps, stream_seed


def drawn(rows: int, global_batch: int, steps: int, seed: int = 0) -> list[list[int]]:
    return list(shuffled_steps(rows, global_batch, steps, seed))


@pytest.mark.parametrize(("rows", "global_batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (9, 1)])
def test_every_pass_has_every_row_once(rows, global_batch):
    passes = 3
    steps = drawn(rows, global_batch, -(-rows * passes // global_batch))
    order = list(chain.from_iterable(steps))
    for start in range(0, rows * passes, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))
    assert order[:rows] != order[rows : 2 * rows]  # and every pass is another permutation


def test_every_step_is_full_and_goes_on_with_the_next_pass():
    steps = drawn(10, 4, 5)
    assert [len(s) for s in steps] == [4] * 5
    assert len(set(steps[0] + steps[1])) == 8
    assert set(steps[0] + steps[1] + steps[2][:2]) == set(range(10))
    assert Counter(chain.from_iterable(steps)) == dict.fromkeys(range(10), 2)


def test_a_batch_larger_than_the_data_repeats_rows_evenly():
    (step,) = drawn(3, 8, 1)
    assert len(step) == 8
    assert sorted(Counter(step).values()) == [2, 3, 3]
    assert sorted(step[:3]) == sorted(step[3:6]) == [0, 1, 2]


def test_the_order_depends_on_the_seed_alone():
    assert drawn(20, 6, 4, seed=1) == drawn(20, 6, 4, seed=1)
    assert drawn(20, 6, 4, seed=1) != drawn(20, 6, 4, seed=2)
    assert drawn(20, 6, 9, seed=1)[:4] == drawn(20, 6, 4, seed=1)  # and not on how long the run is
    assert list(chain.from_iterable(drawn(20, 5, 4))) == list(chain.from_iterable(drawn(20, 4, 5)))


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        drawn(0, 4, 1)


@pytest.mark.parametrize(("per_device", "world"), [(2, 2), (1, 4), (3, 1), (2, 3)])
def test_ranks_together_see_the_micro_steps_of_one_rank_with_the_whole_width(per_device, world):
    width = per_device * world
    indices = [7 * i % 101 for i in range(4 * width)]
    one = micro_steps(indices, width, 0, 1)
    shares = [micro_steps(indices, per_device, rank, world) for rank in range(world)]
    assert len(one) == 4 and all(len(share) == 4 for share in shares)
    for number, whole in enumerate(one):
        parts = [share[number] for share in shares]
        assert all(len(part) == per_device for part in parts)
        assert list(chain.from_iterable(parts)) == whole
    assert list(chain.from_iterable(one)) == indices


@pytest.mark.parametrize(("rows", "per_device", "world"), [(6, 2, 2), (5, 2, 1), (3, 1, 2)])
def test_rows_that_do_not_divide_are_an_error_that_names_the_numbers(rows, per_device, world):
    with pytest.raises(ValueError, match=rf"{rows} rows .* {per_device} x {world} ranks"):
        micro_steps(list(range(rows)), per_device, 0, world)


@pytest.mark.parametrize(
    ("rows", "global_batch", "epochs", "max_steps", "steps"),
    [
        (100, 10, 1, 0, 10),
        (101, 10, 1, 0, 11),
        (100, 10, 2.5, 0, 25),
        (100, 10, 1.1, 0, 11),  # 100 * 1.1 is 110.00000000000001
        (100, 10, 0.05, 0, 1),
        (3, 10, 1, 0, 1),
        (3, 10, 0, 0, 1),
        (100, 10, 1, 4, 4),
        (100, 10, 1, 40, 10),
    ],
)
def test_steps_are_counted_by_passes_and_capped(rows, global_batch, epochs, max_steps, steps):
    assert count_steps(rows, global_batch, epochs, max_steps) == steps


def test_counted_steps_cover_every_row():
    for rows, global_batch in [(10, 4), (16, 8), (5, 9)]:
        steps = drawn(rows, global_batch, count_steps(rows, global_batch, 1))
        assert set(chain.from_iterable(steps)) == set(range(rows))


def test_stream_seeds_differ_by_seed_name_number_and_order():
    calls = [
        (0,), (1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0, "a", 2), (0, "a", 1, 2), (0, "a", 2, 1),
        (0, "a", 12), (0, "a", 1, 1), (0, "a", 11), (10, "a"), (0, "a", "b"), (0, "b", "a"),
    ]  # fmt: skip
    seeds = [stream_seed(*call) for call in calls]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    many = {stream_seed(0, "rollout", step, place) for step in range(40) for place in range(50)}
    assert len(many) == 2000


def test_stream_seeds_stay_what_they_are():
    # Another value would change every run that somebody wants to repeat.
    assert stream_seed(0, "rollout", 3, 17) == 4418265435923313744
