"""Where one rank fails, all fail: on two ranks."""

from __future__ import annotations

import json

import pytest

from helpers.forks import run_ranks
from stable_rlhf.ranks import on_first_rank, together


def test_two_ranks_leave_a_block_together(tmp_path):
    run_ranks("ranks_worker", tmp_path / "found.json", ranks=2)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == {
        "none": ["'went on'"] * 2,
        "second": ["ValueError: of rank 1"] * 2,
        "both": ["ValueError: of rank 0", "ValueError: of rank 1"],  # each its own
        "kind": ["ValueError: of rank 1", "DataError: of rank 1"],
        "told": ["OSError: rank 1: of rank 1", "ValueError: of rank 1"],
        "first": ["[0]"] * 2,
        "first fails": ["DataError: asked once", "ValueError: asked once"],
    }


def test_one_process_raises_its_own_error():
    with pytest.raises(KeyError), together(KeyError):
        raise KeyError("mine")
    with pytest.raises(TypeError), together(KeyError):  # not one of those that are waited for
        raise TypeError
    assert on_first_rank(lambda: 3, ValueError) == 3
