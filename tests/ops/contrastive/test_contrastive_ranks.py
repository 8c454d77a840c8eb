"""info_nce and swav_loss over several ranks."""

from __future__ import annotations

from helpers.forks import run_ranks


def test_two_ranks_equal_one():
    run_ranks("contrastive_worker", ranks=2)
