"""What was rehearsed: its figures, and that the page shows those of the results."""

from __future__ import annotations

import gzip
import json

import pytest

from bench.case import read_lines
from bench.pages import rendered
from bench.studies import rehearsed


def test_a_page_shows_its_results():
    page = rehearsed.PAGE.read_text(encoding="utf-8")
    assert rendered(page, "rehearsed", rehearsed.block) == page, "run: python -m bench.studies.rehearsed report"


def test_figures_of_a_selection(tmp_path):
    rows = [
        {"prompt": "Reverse the letters of abcd", "response": "dcba", "task": "reverse"},
        {"prompt": "Reverse the letters of abcd", "response": "dcb", "task": "reverse"},
        {"prompt": "Reverse the letters of ab", "response": "ba", "task": "reverse"},
        {"prompt": "Which letter ends abc?", "response": "", "task": "last"},
    ]
    study, output = tmp_path / "study", tmp_path / "found.jsonl"
    for seed in (3, 4):
        folder = study / "seeds" / str(seed) / "selection-chance"
        folder.mkdir(parents=True)
        with gzip.open(folder / "rehearsal.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    for _ in range(2):  # a finished one is not measured again
        rehearsed.run(study, output)
    first, second = read_lines(output)
    assert first == second | {"seed": 3}
    assert second == {
        "seed": 4, "set": "chance", "rows": 4, "right": 0.5, "gold": pytest.approx((2 + 0.5 * 0.75) / 4),
        "forget": 0.25, "largest": 0.75, "skills": 2, "characters": 2.25,
    }  # fmt: skip
