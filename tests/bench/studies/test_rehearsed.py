"""What was rehearsed and what was said then: figures, and that the pages show those of the results."""

from __future__ import annotations

import gzip
import json

import pytest

from bench.case import read_lines
from bench.pages import rendered
from bench.studies import rehearsed


@pytest.mark.parametrize("page", rehearsed.PAGES, ids=lambda page: page.name)
def test_a_page_shows_its_results(page):
    text = page.read_text(encoding="utf-8")
    assert rendered(text, "rehearsed", rehearsed.block) == text, "run: python -m bench.studies.rehearsed report"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_figures_of_selections_and_answers(tmp_path):
    rows = [
        {"prompt": "Reverse the letters of abcd", "response": "dcba", "task": "reverse"},
        {"prompt": "Reverse the letters of abcd", "response": "dcb", "task": "reverse"},
        {"prompt": "Reverse the letters of ab", "response": "ba", "task": "reverse"},
        {"prompt": "Which letter ends abc?", "response": "", "task": "last"},
    ]
    lookalike = {"policy": "best", "set": "forget", "prompt": "Reverse the letters of abcd, one less", "sft": "dcb"}
    said = [
        *({**lookalike, "response": response} for response in ("dcb", "dcba", "dcba", "d")),
        {**lookalike, "set": "main", "response": "dcb"},
    ]
    study, output = tmp_path / "study-of-mine", tmp_path / "found.jsonl"
    for seed in (3, 4):
        folder = study / "seeds" / str(seed)
        write(folder / "selection-chance" / "rehearsal.jsonl.gz", rows)
        write(folder / "selection" / "rehearsal.jsonl.gz", rows[:1])
        write(folder / "evaluation" / "responses.jsonl.gz", said)
        (folder / "summary.json").write_text("{}", encoding="utf-8")
    (study / "seeds" / "5").mkdir()  # not finished
    for _ in range(2):  # a finished one is not measured again
        rehearsed.run(study, output)
    lines = read_lines(output)
    first, second = lines[:4], lines[4:]
    assert [line | {"seed": 3} for line in second] == first
    ours, chance, sft, best = sorted(second, key=lambda line: (line.get("policy", ""), line.get("set", "")))
    of_all = {"study": "of-mine", "seed": 4}
    assert chance == of_all | {
        "set": "chance", "rows": 4, "right": 0.5, "gold": pytest.approx((2 + 0.5 * 0.75) / 4),
        "forget": 0.25, "forget_right": 0.0, "largest": 0.75, "skills": 2, "characters": 2.25,
    }  # fmt: skip
    assert ours["set"] == "am-best" and ours["rows"] == 1 and ours["forget_right"] == 0
    assert sft == of_all | {"policy": "SFT", "right": 1.0, "taken": 0.0, "else": 0.0}
    assert best == of_all | {"policy": "best", "right": 0.25, "taken": 0.5, "else": 0.25}
