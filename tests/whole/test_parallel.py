"""Two ranks with micro-batch b equal one rank with 2b, under ZeRO 0 to 3: scorer, PPO, rejection and sampling."""

from __future__ import annotations

import functools
import json

import pytest

from helpers.forks import run_ranks


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory):
    """(one rank, two ranks) of a ZeRO stage, and stage 0 on one rank: 3 in two launches, the others in two more."""

    @functools.cache
    def run(stages: str) -> tuple[dict, dict]:
        folder = tmp_path_factory.mktemp("parallel")
        run_ranks("parallel_worker", folder / "one.json", 4, f"0,{stages}", ranks=1)
        run_ranks("parallel_worker", folder / "two.json", 2, "3" if stages == "3" else f"0,{stages}", ranks=2)
        return json.loads((folder / "one.json").read_text(encoding="utf-8")), json.loads(
            (folder / "two.json").read_text(encoding="utf-8")
        )

    return lambda stage: run("3" if stage == "3" else "1,2")


@pytest.fixture
def losses(losses_of, stage) -> tuple[dict, dict]:
    return losses_of(stage)


STAGES = pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in "012"), "3"])


@STAGES
@pytest.mark.parametrize(
    ("what", "rel"),
    [
        ("scorer", 0), ("simcse", 1e-4), ("swav", 1e-4), ("ppo", 0), ("ppo-sr", 0), ("mini-batches", 0),
        ("norms", 1e-4), ("grpo", 1e-5), ("rloo", 1e-5), ("head", 0), ("tied head", 0),
        ("imitation", 0), ("split imitation", 0),
    ],
)  # fmt: skip
def test_two_ranks_equal_one(losses, stage, what, rel):
    """Losses of five updates, norms of their gradients, and gradients of the head through the fused loss."""
    one, two = losses
    assert two[stage][what] == pytest.approx(one[stage][what], abs=1e-5, rel=rel)
    assert one[stage][what] == pytest.approx(one["0"][what], abs=1e-5, rel=rel)  # every ZeRO stage is plain training
    assert len(set(one[stage][what])) == len(one[stage][what])  # the model moved


@STAGES
def test_live_sampling_draws_the_same_tokens_on_any_number_of_ranks(losses, stage):
    one, two = losses
    assert one[stage]["drawn"] == two[stage]["drawn"] == one["0"]["drawn"]
    assert all(len({tuple(row) for row in drawn}) > 8 for drawn in one["0"]["drawn"])


@STAGES
def test_groups_are_sampled_anew_alike_on_any_number_of_ranks(losses, stage):
    one, two = losses
    assert one[stage]["sampled anew"] == two[stage]["sampled anew"] == one["0"]["sampled anew"]
    *rows, (count,) = one["0"]["sampled anew"]
    assert count > 1 and len(rows) == 16
    assert all(a[: a.index(-1)] == b[: b.index(-1)] for a, b in zip(rows[::2], rows[1::2], strict=True))


@STAGES
def test_an_infinite_gradient_on_one_rank_moves_the_weights_of_none(losses, stage):
    for ranks in losses:
        moved, by_how_much, then_moved, then_by_how_much = ranks[stage]["nonfinite"]
        assert (moved, by_how_much) == (0.0, 0.0) and then_moved == 1.0 and 1e-4 < then_by_how_much < 1.0


@STAGES
def test_every_rank_draws_dropout_masks_of_its_own(losses, stage):
    """The first rank those of one process alone; from a snapshot each goes on with its own, to the bit."""
    (one,), two = (ranks[stage]["dropout"] for ranks in losses)
    for before, after, again in (one, *two):
        assert before != after == again
    assert two[0] == pytest.approx(one, rel=1e-6)
    assert len({value for rank in two for value in rank}) == 4
