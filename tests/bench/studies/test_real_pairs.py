"""The table of both scorers on all pairs: its figures, its intervals, and the page that holds them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.pages import marked, rendered
from bench.studies import real_pairs


def content(pairs=40):
    """A scorer that is right three times of four and sure, and one whose scores are half as far apart."""
    g = np.random.default_rng(0)
    apart = np.where(np.arange(pairs) % 4 == 0, -3.0, 3.0)
    rejected, prompts = g.standard_normal(pairs), [place // 2 for place in range(pairs)]
    scores = {
        objective: {"1": {"chosen": list(rejected + scale * apart), "rejected": list(rejected), "prompts": prompts}}
        for objective, scale in (("rm", 1.0), ("am", 0.5))
    }
    environment = {"cpu": "A processor", "time": "2030-01-02T03:04:05+00:00"}
    line = {"pairs": {"fit": 160, "train": 120}, "tokens": 12345, "cpu_seconds": 60.0, "environment": environment}
    return {"lines": [line | {"objective": o} for o in ("rm", "am")], "scores": scores, "prompts": prompts}


def test_figures_of_known_scores():
    figures = real_pairs.statistics_of(content()["scores"]["rm"]["1"])
    alone = np.ones((1, 40))
    assert figures["accuracy"](alone)[0] == pytest.approx(0.75)
    sure = 1.0 / (1.0 + np.exp(-3.0))
    assert figures["ece"](alone)[0] == pytest.approx(sure - 0.75)
    assert figures["loss"](alone)[0] == pytest.approx(0.75 * -np.log(sure) + 0.25 * -np.log(1.0 - sure))
    twice = np.where(np.arange(40) % 4 == 0, 0.0, 4.0 / 3.0)[None]
    assert figures["accuracy"](twice)[0] == pytest.approx(1.0)


def test_the_table_compares_on_the_same_pairs():
    text = real_pairs.block(content())
    assert "| Reward model, 1 | 75.0 [" in text and "| Advantage Model, 1 | 75.0 [" in text
    assert "| difference, 1 | +0.0 [+0.0, +0.0] |" in text, "which rank alike, pair by pair"
    assert "160 pairs, 120 train (12,345 tokens an epoch) and 40 test, of 20 prompts" in text
    assert "Reward model 60, Advantage Model 60" in text and "A processor, 2030-01-02" in text


def test_the_page_shows_what_was_kept():
    page = real_pairs.PAGE.read_text(encoding="utf-8")
    kept = json.loads(real_pairs.KEPT.read_text(encoding="utf-8"))
    assert [match["name"] for match in marked("real-pairs").finditer(page)] == list(kept)
    assert rendered(page, "real-pairs", lambda dataset: real_pairs.block(kept[dataset])) == page


def test_what_is_kept_of_one_dataset_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(real_pairs, "KEPT", tmp_path / "kept.json")
    (tmp_path / "scores").mkdir()
    for dataset in ("pairs", "hh-rlhf", "pairs"):
        run = content()
        lines = "".join(json.dumps(line | {"dataset": dataset}) + "\n" for line in run["lines"])
        (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
        for objective, scores in run["scores"].items():
            (tmp_path / "scores" / f"{dataset}-{objective}-seed-1.json").write_text(
                json.dumps(scores), encoding="utf-8"
            )
        real_pairs.keep(tmp_path)
    kept = json.loads(real_pairs.KEPT.read_text(encoding="utf-8"))
    assert list(kept) == ["pairs", "hh-rlhf"] and len(kept["pairs"]["lines"]) == 2
    assert "| difference, 1 |" in real_pairs.block(kept["hh-rlhf"])
    assert kept["pairs"]["prompts"] == content()["prompts"]
    once = kept["pairs"] | {"prompts": list(range(40))}  # pairs of one prompt tell less
    assert real_pairs.block(once) != real_pairs.block(kept["pairs"])
