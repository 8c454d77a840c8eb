"""The study of planted labels: what it plants, what it counts, what it draws."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from bench.studies.strength import draw, gold_accuracy, mended, plant, recall_precision, table
from stable_rlhf.data import Comparison


@pytest.fixture
def pairs(tmp_path):
    golds = [(1.0, 0.2), (0.1, 1.0), (0.3, 0.3), (0.4, 0.2)] * 250
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "task": "t", "gold_chosen": chosen,
         "gold_rejected": rejected, "flipped": i % 5 == 0}
        for i, (chosen, rejected) in enumerate(golds)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_planting_turns_round_labels_that_were_right_by_gold(pairs):
    rows = plant(pairs, 0.2, "gold", seed=0)
    assert len(rows) == 750  # without a difference in gold no label is right
    assert sum(row["planted"] for row in rows) == pytest.approx(150, abs=40)
    assert all((row["gold_chosen"] < row["gold_rejected"]) == row["planted"] for row in rows)
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in map(mended, rows))
    assert plant(pairs, 0.2, "gold", seed=0) == rows != plant(pairs, 0.2, "gold", seed=1)


def test_planting_on_the_annotators_labels_undoes_its_own_flips_first(pairs):
    for row, old in zip(plant(pairs, 0.0, "annotator", 0), (i for i in range(1000) if i % 4 != 2), strict=True):
        assert (row["chosen"] == "b") == (old % 5 == 0) and not row["planted"]


def test_recall_and_precision():
    found = recall_precision(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, True]))
    assert found == ([0.5, 0.5, 0.5, 1.0], [1.0, 0.5, 1 / 3, 0.5])


def test_table_and_picture():
    rows = [Comparison("p", ("a", "b"), ((0, 1),), meta={"gold_chosen": c, "gold_rejected": 0.5}) for c in (1.0, 0.0)]
    assert gold_accuracy(rows, [1.0, 2.0]) == 0.5
    result = {
        "train_pairs": 10, "test_pairs": 2, "planted": 0.2, "wrong_after": 0.1,
        "all": {"recall": 0.8, "precision": 0.7}, "clear": {"recall": 0.9, "precision": 0.8},
        "gold_accuracy": {"as they are": 0.7, "true labels": 0.75},
        "curves": {"strength": [(0.1, 1.0), (1.0, 0.2)], "annotator": [(0.2, 1.0), (1.0, 0.2)]},
    }  # fmt: skip
    better = {**result, "gold_accuracy": {"as they are": 0.72, "true labels": 0.79}}
    text = table([result, better])
    assert "| all pairs | 80.0 [80.0, 80.0] | 70.0 [70.0, 70.0] |" in text
    assert "| true labels | 77.0 [51.6, 102.4] | 6.0 [-6.7, 18.7] |" in text
    assert draw([result, better]).startswith(b"\x89PNG")
