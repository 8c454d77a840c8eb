"""Rehearsal on real text: prompts by use, nats a token of held-out text, and that the page shows the results."""

from __future__ import annotations

import math

import pytest
import torch

from bench.case import read_lines
from bench.pages import rendered
from bench.studies import rehearsed_text
from stable_rlhf.data import write_jsonl
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel


def test_the_page_shows_its_results():
    text = rehearsed_text.PAGE.read_text(encoding="utf-8")
    again = rendered(text, "rehearsed-text", rehearsed_text.block)
    assert again == text, "run: python -m bench.studies.rehearsed_text report"


@pytest.fixture
def study(tmp_path, tiny_model, tokenizer):
    """The files, and a finished seed with another that is not: one policy is the initial one, the other is not."""
    data = tmp_path / "data"
    write_jsonl(
        data / "prompts.jsonl.gz",
        [{"prompt": f"p{i}", "skill": "math" if i % 3 else "writing", "source": "s"} for i in range(9)],
    )
    write_jsonl(data / "gsm8k-train.jsonl.gz", [{"question": f"p{i}", "answer": "ab" * (1 + i)} for i in range(9)])
    write_jsonl(
        data / "pairs.jsonl.gz",
        [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "task": "math" if i < 2 else "w"} for i in range(5)],
    )
    rehearsed_text.prepare(data, tmp_path / "text")
    seed = tmp_path / "study" / "seeds" / "7"
    write_jsonl(seed / "selection-rm" / "rehearsal.jsonl.gz", [
        {"prompt": "p1", "response": "x", "task": "math", "finished": False, "length": 3},
        {"prompt": "p3", "response": "x", "task": "writing", "finished": True, "length": 1},
    ])  # fmt: skip
    torch.manual_seed(0)
    for number, name in enumerate(("initial-policy", "ppo-rm", "ppo-am")):
        model = tiny_model(layers=3)
        if number == 2:
            torch.nn.init.normal_(model.model.layers[2].mlp.up_proj.weight)
        model.save_pretrained(seed / name)
        tokenizer.save_pretrained(seed / name)
    (seed / "summary.json").write_text("{}", encoding="utf-8")
    (tmp_path / "study" / "seeds" / "8").mkdir()
    return tmp_path


def test_prompts_are_divided_by_use(study):
    main, math_prompts = (read_jsonl(study / "text" / f"{name}_prompts.jsonl.gz") for name in ("main", "math"))
    assert [row["prompt"] for row in main] == ["p0", "p3", "p6"] and len(math_prompts) == 6
    assert all(row["skill"] == "math" for row in math_prompts)
    assert {path.name for path in (study / "text").iterdir()} >= {"pairs.jsonl.gz", "gsm8k-train.jsonl.gz"}


def test_a_seed_is_measured_once_and_whole(study):
    output = study / "lines.jsonl"
    for _ in range(2):
        rehearsed_text.run(study / "study", study / "text", output)
    (study / "study").rename(study / "study-other")  # the same seed of another study
    rehearsed_text.run(study / "study-other", study / "text", output)
    assert [line["study"] for line in read_lines(output)] == ["study"] * 4 + ["other"] * 4
    first, *policies = read_lines(output)[:4]
    assert first == {"study": "study", "seed": 7, "set": "rm", "rows": 2, "math": 0.5, "finished": 0.5, "tokens": 2.0}
    by_name = {line["policy"]: line for line in policies}
    assert list(by_name) == ["SFT", "am", "rm"] and len(policies) == 3
    for on in ("math", "main"):
        assert by_name["rm"][on] == by_name["SFT"][on] != by_name["am"][on] and math.isfinite(by_name["am"][on])


def test_held_out_text_was_not_rehearsed_and_is_no_longer_than_allowed(study, tokenizer, monkeypatch):
    texts = rehearsed_text.held_out(study / "text", tokenizer, {"p1", "p2"})
    assert len(texts["math"]) == 7 and len(texts["main"]) == 3
    longest = sorted(len(example) for example in texts["math"])[3]
    monkeypatch.setattr(rehearsed_text, "LONGEST", longest)
    assert len(rehearsed_text.held_out(study / "text", tokenizer, {"p1", "p2"})["math"]) == 4
    monkeypatch.setattr(rehearsed_text, "ROWS", 2)
    assert len(rehearsed_text.held_out(study / "text", tokenizer, set())["math"]) == 2


def test_nats_a_token_are_plain_pytorchs(tiny_model, tokenizer):
    model = tiny_model(layers=3)
    examples = [encode(tokenizer, "ab", "abc" * n, source="") for n in range(1, 12)]
    policy = PolicyModel(model, num_trainable_layers=2)
    with torch.no_grad():
        found = rehearsed_text.nats_a_token(policy, examples, FeatureCache())
        total, count = 0.0, 0
        for e in examples:
            logits = model(torch.tensor([e.ids])).logits[0, e.prompt_length - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(e.response), reduction="sum"))
            count += len(e.response)
    assert found == pytest.approx(total / count, rel=1e-5)
