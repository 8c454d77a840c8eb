"""The engine's settings that save memory train the same model: checkpointing, offloading, bfloat16."""

from __future__ import annotations

import pytest
import torch

from stable_rlhf.models import PolicyModel
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.train.config import EngineArguments
from stable_rlhf.train.engine import Engine, read_only


def losses(model, arguments: EngineArguments) -> list[float]:
    policy = PolicyModel(model, value_head=True)
    engine = Engine(policy, arguments, learning_rate=3e-3, total_steps=4)
    engine.train()
    found = []
    for _ in range(4):
        inputs = policy.trunk.inputs([[5, 6, 7, 8], [9, 10, 11]])
        loss = -engine(inputs, torch.full((2, 4), 7))["logprob"].mean()
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    engine.close()
    return found


@pytest.fixture(scope="module")
def plain(one_process) -> dict:
    return {}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"zero_stage": 2, "offload_optimizer": True}, 1e-4),
        ({"zero_stage": 3, "gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 0.1),
        ({"bf16": True, "zero_stage": 2}, 0.1),
        ({"bf16": True, "zero_stage": 2, "offload_optimizer": True, "gradient_checkpointing": True}, 0.1),
    ],
)
def test_the_same_steps(plain, tiny_model, settings, tolerance):
    wanted = losses(tiny_model(), EngineArguments())
    assert wanted[-1] < wanted[0] - 0.3  # it learns
    assert losses(tiny_model(), EngineArguments(**settings)) == pytest.approx(wanted, abs=tolerance)


def test_models_that_only_read_take_the_engines_type(tiny_model, tokenizer):
    scorer = AdvantageModel(tiny_model().base_model, tokenizer)
    whole = scorer.score(["Reverse abc"] * 2, ["cba", "abc"])
    read_only(scorer, EngineArguments(bf16=True))
    assert next(scorer.trunk.parameters()).dtype == torch.bfloat16
    assert scorer.reward_head.weight.dtype == torch.float32
    torch.testing.assert_close(scorer.score(["Reverse abc"] * 2, ["cba", "abc"]), whole, atol=0.05, rtol=0.05)


def test_a_reference_keeps_tied_weights_tied(tiny_model):
    policy = PolicyModel(tiny_model("bloom"))
    reference = policy.reference()
    assert reference.head.weight is reference.trunk.upper.word_embeddings.weight
    assert reference.head.weight is not policy.head.weight
