"""Small files to run on, and what a run left."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def tiny_files(folder: Path, *, pairs: int = 40, prompts: int = 40, demonstrations: int = 24, seed: int = 0) -> Path:
    """``folder`` with a saved model of some thousand weights, and files of the skill world small enough for seconds."""
    from transformers.utils import logging

    from stable_rlhf.world import SKILLS, STRONG_SKILLS, build_model, build_tokenizer, near_miss

    logging.disable_progress_bar()
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, seed=seed).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    seen: set[str] = set()

    def draw(index: int) -> tuple[str, str, str]:
        task = sorted(SKILLS)[index % len(SKILLS)]
        while True:
            prompt, answer = SKILLS[task].sample(rng)
            if prompt not in seen:
                seen.add(prompt)
                return prompt, answer, task

    made = [draw(i) for i in range(pairs)]
    write_lines(
        folder / "pairs.jsonl",
        [{"prompt": p, "chosen": a, "rejected": near_miss(a, rng), "task": t} for p, a, t in made],
    )
    made = [draw(i) for i in range(prompts)]
    rows = [{"prompt": p, "task": "old" if t in STRONG_SKILLS else "new"} for p, _, t in made]
    write_lines(folder / "prompts.jsonl", rows)
    made = [draw(i) for i in range(demonstrations)]
    write_lines(folder / "sft.jsonl", [{"prompt": p, "response": a, "task": t} for p, a, t in made])
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """What a stage saved, bit for bit."""
    found = {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}
    assert found
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """What a training in ``folder`` logged, a step each."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
