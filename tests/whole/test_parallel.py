"""Two ranks with micro-batch b equal one rank with 2b, under ZeRO 0 to 3: scorer, PPO, rejection and sampling."""

from __future__ import annotations

import functools
import json

import pytest

from helpers.forks import run_ranks


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory):
    """What ``ranks`` ranks give under ``stages`` of ZeRO, a launch for each that is asked for."""

    @functools.cache
    def run(ranks: int, stages: str) -> dict[str, dict]:
        path = tmp_path_factory.mktemp("parallel") / "found.json"
        run_ranks("parallel_worker", path, 4 // ranks, stages, ranks=ranks)
        return json.loads(path.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def losses(losses_of, stage) -> tuple[dict, dict]:
    """Of one rank without ZeRO, and of two under ``stage``."""
    return losses_of(1, "0")["0"], losses_of(2, "3" if stage == "3" else "0,1,2")[stage]


STAGES = pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in "012"), "3"])


WHAT = pytest.mark.parametrize(
    ("what", "rel"),
    [
        ("scorer", 0), ("simcse", 1e-4), ("swav", 1e-4), ("ppo", 0), ("ppo-sr", 0), ("mini-batches", 0),
        ("norms", 1e-4), ("grpo", 1e-5), ("rloo", 1e-5), ("head", 0), ("tied head", 0),
        ("imitation", 0), ("split imitation", 0),
    ],
)  # fmt: skip


@STAGES
@WHAT
def test_two_ranks_equal_one(losses, stage, what, rel):
    """Losses of five updates, norms of their gradients, and gradients of the head through the fused loss."""
    one, two = losses
    assert two[what] == pytest.approx(one[what], abs=1e-5, rel=rel)
    assert len(set(one[what])) == len(one[what])  # the model moved


@pytest.mark.slow
@WHAT
@pytest.mark.parametrize("stage", "123")
def test_every_stage_of_zero_is_plain_training(losses_of, stage, what, rel):
    one = losses_of(1, "0,1,2,3")
    assert one[stage][what] == pytest.approx(one["0"][what], abs=1e-5, rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("stage", "123")
def test_one_rank_does_under_every_stage_what_it_does_without(losses_of, stage):
    one = losses_of(1, "0,1,2,3")
    assert one[stage]["drawn"] == one["0"]["drawn"] and one[stage]["sampled anew"] == one["0"]["sampled anew"]
    ((before, after, again),) = one[stage]["dropout"]
    assert before != after == again
    moved, by_how_much, then_moved, then_by_how_much = one[stage]["nonfinite"]
    assert (moved, by_how_much) == (0.0, 0.0) and then_moved == 1.0 and 1e-4 < then_by_how_much < 1.0


@STAGES
def test_live_sampling_draws_the_same_tokens_on_any_number_of_ranks(losses, stage):
    one, two = losses
    assert one["drawn"] == two["drawn"]
    assert all(len({tuple(row) for row in drawn}) > 8 for drawn in one["drawn"])


@STAGES
def test_groups_are_sampled_anew_alike_on_any_number_of_ranks(losses, stage):
    one, two = losses
    assert one["sampled anew"] == two["sampled anew"]
    *rows, (count,) = one["sampled anew"]
    assert count > 1 and len(rows) == 16
    assert all(a[: a.index(-1)] == b[: b.index(-1)] for a, b in zip(rows[::2], rows[1::2], strict=True))


@STAGES
def test_an_infinite_gradient_on_one_rank_moves_the_weights_of_none(losses, stage):
    for found in losses:
        moved, by_how_much, then_moved, then_by_how_much = found["nonfinite"]
        assert (moved, by_how_much) == (0.0, 0.0) and then_moved == 1.0 and 1e-4 < then_by_how_much < 1.0


@STAGES
def test_every_rank_draws_dropout_masks_of_its_own(losses, stage):
    """The first rank those of one process alone; from a snapshot each goes on with its own, to the bit."""
    (one,), two = (found["dropout"] for found in losses)
    for before, after, again in (one, *two):
        assert before != after == again
    assert two[0] == pytest.approx(one, rel=1e-6)
    assert len({value for rank in two for value in rank}) == 4
