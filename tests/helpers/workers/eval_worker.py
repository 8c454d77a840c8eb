"""Trains a scorer with and without evaluations under each ZeRO stage; rank 0 writes metrics, and what became equal.

Run by test_eval_steps.py under one and two ranks. Arguments: folder, micro-batch per rank, ZeRO stages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison
from stable_rlhf.engine.process import finish, start
from stable_rlhf.ranks import barrier, gather_objects, rank
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.settings.stages import ScorerArguments
from stable_rlhf.world import build_model, build_tokenizer

EVERY = 2


def scorer(tokenizer) -> AdvantageModel:
    # Wide enough for weights that ZeRO-3 does not leave whole on every rank.
    model = build_model(tokenizer, hidden_size=192, num_hidden_layers=2, num_attention_heads=2, seed=0)
    assert max(p.numel() for p in model.base_model.layers.parameters()) > 1e5
    return AdvantageModel(model.base_model, tokenizer, ScorerSettings(objective="am"))


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    folder, micro, stages = Path(arguments[0]), int(arguments[1]), [int(s) for s in arguments[2].split(",")]
    torch.set_num_threads(1)
    start(0)
    tokenizer = build_tokenizer()
    rows = []
    for i in range(14):
        row = Comparison(f"Say {'abcdefg'[i % 7]}", ("abc"[i % 3] * (1 + i % 4), "z" * (1 + i % 3)), ((0, 1),))
        rows.append(EncodedComparison(row, [encode(tokenizer, row.prompt, r) for r in row.responses]))
    found = {}
    for stage in stages:
        states, files = [], []
        for every in (0, EVERY):
            here = folder / f"{stage}-{every}"
            settings = ScorerArguments(
                learning_rate=1e-3, num_train_epochs=2.5, per_device_train_batch_size=micro, eval_steps=every
            )
            seen: list[int] = []
            torch.manual_seed(7)
            recipe = quiet(scorer=settings, engine=EngineArguments(zero_stage=stage))
            train_scorer(scorer(tokenizer), rows[:8], recipe, here, seed=3, test=rows[8:], on_step=seen.append)
            states.append(torch.get_rng_state())
            files.append([(here / name).read_bytes() for name in ("model.safetensors", "heads.safetensors")])
        found[stage] = {
            "metrics": [json.loads(line) for line in (here / "metrics.jsonl").read_text(encoding="utf-8").splitlines()],
            "same_weights": files[0] == files[1], "same_random_state": torch.equal(*states),
            "seen": gather_objects(seen),
        }  # fmt: skip
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    barrier()
    finish()


main()
