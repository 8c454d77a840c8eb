"""Texts of megabytes are found too long without being tokenised whole, and no other text is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.data.encoding import surely_longer
from stable_rlhf.run.datasets import load_demonstrations, load_prompts
from stable_rlhf.scorer.comparisons import encode_comparisons
from stable_rlhf.scorer.metarm import encode_responses
from stable_rlhf.settings.recipe import DataArguments


class Tokenizer:
    """``count`` of a text as so many tokens; ``seen`` characters were looked at."""

    def __init__(self, count: Any) -> None:
        self.count, self.seen = count, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.seen += len(text)
        return {"input_ids": [0] * self.count(text)}


def pieces(text: str) -> int:
    """As WordPiece: pieces of up to three characters, a word of more than a hundred is one unknown token."""
    return sum(-(-len(word) // 3) if len(word) <= 100 else 1 for word in text.split())


@pytest.mark.parametrize("count", [len, pieces, lambda text: len(text.split()), lambda text: -(-len(text) // 400)])
def test_only_what_is_longer_is_surely_longer(count: Any) -> None:
    draw, found = random.Random(0), set()
    for limit in (1, 7, 64):
        for _ in range(60):
            words = draw.choices(
                ["a", "of", "river", "x" * 90, "y" * 3000, " " * 500, "\n"], k=draw.choice([9, 90, 900])
            )
            text = draw.choice(["", " "]).join(words)
            if surely_longer(Tokenizer(count), text, limit):
                assert count(text) > limit
                found.add(limit)
    assert found == {1, 7, 64} or count("x" * 4000) < 400


def test_how_much_of_a_long_text_is_looked_at() -> None:
    text = "river " * 10**6
    words, spaces = Tokenizer(lambda text: len(text.split())), Tokenizer(lambda text: 1)
    assert surely_longer(words, text, 512) and words.seen < 100_000
    assert surely_longer(words, [{"role": "user", "content": text}], 512)
    assert not surely_longer(words, [{"role": "assistant", "content": text}, {"role": "user", "content": "a"}], 512)
    assert not surely_longer(words, " " * 10**7, 512)  # a template may take them off
    assert not surely_longer(spaces, "a" * 10**6, 512) and spaces.seen < 1.2 * 10**6


def test_every_reader_leaves_megabytes_out_quickly(
    tokenizer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from stable_rlhf.data import read_comparisons, read_responses

    texts = [f"{'reverse' if i % 2 else 'upper'} {chr(97 + i)}" for i in range(12)]
    long, task = "ab" * 10**6, ["upper", "reverse"]
    prompts = [{"prompt": text, "task": task[i % 2]} for i, text in enumerate(texts)]
    files = {
        "p": [*prompts, {"prompt": long, "task": "upper"}],
        "d": [{"prompt": "a", "response": "b"}, {"prompt": long, "response": "b"}, {"prompt": "a", "response": long}],
        "c": [{"prompt": p, "chosen": c, "rejected": "r"} for p, c in (("a", "b"), (long, "b"), ("a", long))],
        "r": [{"prompt": p, "responses": ["r", c]} for p, c in (("a", "b"), (long, "b"), ("a", long))],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    seen, call = [0], type(tokenizer).__call__

    def counting(self: Any, text: str, *given: Any, **settings: Any) -> Any:
        seen[0] += len(text)
        return call(self, text, *given, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    settings = DataArguments(
        data_dir=str(tmp_path), prompts=["p"], forget_tasks=["reverse"], max_prompt_length=32, max_length=64
    )
    splits = load_prompts(settings, tokenizer, 0)
    assert len(splits.train) + len(splits.main) + len(splits.forget) == 12
    assert len(load_demonstrations(settings, ["d"], tokenizer)[0]) == 1
    kept, left_out = encode_comparisons(read_comparisons(tmp_path / "c").rows, tokenizer, 64, 32)
    assert (len(kept), left_out) == (1, 2)
    assert len(encode_responses(read_responses(tmp_path / "r").rows, tokenizer, 64, 32)) == 1
    told = capsys.readouterr().err
    assert "1 of 13 prompts have over 32 tokens" in told and "2 of 3 demonstrations are too long" in told
    assert "2 of 3 rows of unlabelled responses are too long" in told
    assert seen[0] < 100_000
