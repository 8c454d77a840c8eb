"""info_nce and swav_loss over several ranks."""

from __future__ import annotations

from helpers.launch import run_worker


def test_two_ranks_equal_one():
    run_worker("contrastive_worker", ranks=2)
