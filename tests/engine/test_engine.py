"""The engine's settings that save memory train the same model: checkpointing, offloading, bfloat16."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from stable_rlhf.engine import engine as engine_module
from stable_rlhf.engine import process
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.frozen import read_only
from stable_rlhf.engine.process import start
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.settings.recipe import EngineArguments


def losses(model, arguments: EngineArguments) -> list[float]:
    policy = PolicyModel(model, value_head=True)
    engine = Engine(policy, arguments, Schedule(3e-3, 4))
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


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (None, True)])
def test_a_head_learning_rate_of_0_leaves_the_head_alone(plain, tiny_model, rate, moves):
    policy = PolicyModel(tiny_model(), value_head=True)
    engine = Engine(policy, EngineArguments(), Schedule(1e-2, 1, head_learning_rate=rate))
    trunk, head = (p.detach().clone() for p in (policy.trunk.upper.norm.weight, policy.value_head.weight))
    output = engine(policy.trunk.inputs([[5, 6, 7, 8]]), torch.full((1, 4), 7))
    engine.backward(output["value"].mean() - output["logprob"].mean())
    engine.step()
    engine.close()
    assert not torch.equal(policy.trunk.upper.norm.weight, trunk)
    assert torch.equal(policy.value_head.weight, head) != moves


def test_adams_coefficients_are_those_of_the_settings(plain, tiny_model):
    arguments = EngineArguments(adam_beta1=0.8, adam_beta2=0.7)
    engine = Engine(PolicyModel(tiny_model()), arguments, Schedule(1e-3, 1))
    assert {group["betas"] for group in engine.optimizer.param_groups} == {(0.8, 0.7)}
    engine.close()


def test_models_that_only_read_take_the_engines_type(tiny_model, tokenizer):
    scorer = AdvantageModel(tiny_model().base_model, tokenizer)
    whole = scorer.score(["Reverse abc"] * 2, ["cba", "abc"])
    read_only(scorer, EngineArguments(bf16=True))
    assert next(scorer.trunk.parameters()).dtype == torch.bfloat16
    assert scorer.reward_head.weight.dtype == torch.float32
    torch.testing.assert_close(scorer.score(["Reverse abc"] * 2, ["cba", "abc"]), whole, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("given", "wanted"), [(None, timedelta(hours=6)), ("45", timedelta(minutes=45))])
def test_ranks_wait_for_hours_or_as_long_as_deepspeed_is_told(plain, monkeypatch, given, wanted):
    import deepspeed

    asked = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **settings: asked.update(settings))
    monkeypatch.setattr(process, "_meet", lambda backend, timeout: asked.update(met=timeout))
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if given is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", given)
    start(0)
    assert asked["timeout"] == asked["met"] == wanted
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "45 min")
    with pytest.raises(ValueError, match=r"^DEEPSPEED_TIMEOUT: '45 min' is no number of minutes"):
        start(0)


def test_a_reference_keeps_tied_weights_tied(tiny_model):
    policy = PolicyModel(tiny_model("bloom"))
    reference = policy.reference()
    assert reference.head.weight is reference.trunk.upper.word_embeddings.weight
    assert reference.head.weight is not policy.head.weight


# -- gradients that are not finite -------------------------------------------------------------------------------------

EVERY_STAGE = [{"zero_stage": stage} for stage in (0, 1, 2, 3)] + [
    {"bf16": True}, {"bf16": True, "zero_stage": 2}, {"bf16": True, "zero_stage": 3},
    {"zero_stage": 0, "max_grad_norm": 0.0}, {"zero_stage": 2, "max_grad_norm": 0.0},
    {"zero_stage": 2, "offload_optimizer": True},
]  # fmt: skip


def steps(model, settings: dict, kinds: str, skip: bool) -> tuple[list[bool], list[torch.Tensor]]:
    """Optimiser steps of two micro-steps each: ``.`` an ordinary one, ``i`` one whose first loss is finite and has an
    infinite gradient, ``n`` one whose first loss is not a number, ``d`` one that is dropped. Returns what ``step`` said
    at each boundary, and the weights at the start and after each."""
    policy = PolicyModel(model, value_head=True)
    engine = Engine(policy, EngineArguments(**settings), Schedule(1e-2, 9), gradient_accumulation_steps=2)
    engine.skip_nonfinite = skip
    engine.train()

    def weights() -> torch.Tensor:
        with gathered(list(engine.module.parameters())):
            return torch.cat([p.detach().float().flatten() for p in policy.parameters()]).clone()

    moved, found = [], [weights()]
    try:
        for kind in kinds:
            for first in (True, False):
                inputs = policy.trunk.inputs([[5, 6, 7, 8], [9, 10, 11]])
                logprob = engine(inputs, torch.full((2, 4), 7))["logprob"]
                loss = -logprob.mean()
                if first and kind == "i":
                    # The root's slope at 0 is infinite: the loss is as before, its gradient is not.
                    loss = loss + (logprob - logprob.detach()).clamp_min(0).sqrt().sum()
                if first and kind == "n":
                    loss = loss * float("nan")
                engine.backward(loss, drop=kind == "d" and not first)
                said = engine.step()
            moved.append(said)
            found.append(weights())
    finally:
        engine.close()
    return moved, found


@pytest.mark.parametrize("settings", EVERY_STAGE, ids=str)
def test_an_infinite_gradient_never_reaches_the_weights(plain, tiny_model, settings):
    with pytest.raises(FloatingPointError, match=r"gradient's norm is not finite; the weights are those of the step"):
        steps(tiny_model(), settings, ".i", skip=False)
    moved, weights = steps(tiny_model(), settings, ".ind.", skip=True)
    assert moved == [True, False, False, False, True]
    for at in (1, 2, 3):
        assert torch.equal(weights[at], weights[at + 1])
    # Nothing of the steps that were left out stays behind, in gradients or in Adam's moments.
    without, expected = steps(tiny_model(), settings, "..", skip=False)
    assert without == [True, True] and not torch.equal(expected[1], expected[2])
    assert torch.equal(weights[1], expected[1]) and torch.equal(weights[5], expected[2])


def test_the_weights_are_whole_after_the_error(plain, tiny_model, monkeypatch):
    """The error leaves the model as it was before the step, so that it can be saved."""
    kept = []
    close = Engine.close

    def keep(engine):
        kept.append([p.detach().clone() for p in engine.module.parameters()])
        close(engine)

    monkeypatch.setattr(Engine, "close", keep)
    model = tiny_model()
    before = [p.detach().clone() for p in PolicyModel(model, value_head=True).parameters()]
    with pytest.raises(FloatingPointError):
        steps(model, {"zero_stage": 1}, "i", skip=False)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], before, strict=True))


@pytest.mark.usefixtures("one_process")
def test_checkpointed_blocks_drop_out_the_same_again(tiny_model):
    """Their masks are drawn twice, in the forward and when backward comes back to them."""
    found = []
    for checkpointing, seed in ((False, 3), (True, 3), (True, 4)):
        policy = PolicyModel(tiny_model())
        for layer in policy.trunk.upper.layers:
            layer.self_attn.attention_dropout = 0.5
        arguments = EngineArguments(gradient_checkpointing=checkpointing)
        engine = Engine(policy, arguments, Schedule(1e-3, 2))
        engine.train()
        torch.manual_seed(seed)
        inputs = policy.trunk.inputs([[5, 6, 7, 8], [8, 9, 10, 11]])
        engine.backward(-engine(inputs, torch.full((2, 4), 7))["logprob"].mean())
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        engine.close()
    plain, checkpointed, other = found
    torch.testing.assert_close(checkpointed, plain)
    assert float((other - plain).norm() / plain.norm()) > 0.1


@pytest.mark.usefixtures("one_process")
def test_the_generators_part_once_when_the_model_is_made(tiny_model, monkeypatch):
    seeds = []
    monkeypatch.setattr(engine_module, "gather_objects", lambda value: [5])
    for rank in (0, 1, 2):
        monkeypatch.setattr(engine_module, "rank", lambda rank=rank: rank)
        torch.manual_seed(5)
        for _ in range(2):
            seeds.append(torch.initial_seed())
            Engine(PolicyModel(tiny_model()), EngineArguments(), Schedule(1e-3, 2)).close()
        seeds.append(torch.initial_seed())
    assert seeds[:3] == [5, 5, 5] and seeds[3] == seeds[6] == 5  # one process alone is as it was
    assert seeds[4] == seeds[5] and seeds[7] == seeds[8] and len({*seeds}) == 3


@pytest.mark.usefixtures("one_process")
def test_a_bound_of_memory_that_the_caller_gave_stays(tiny_model):
    policies = [PolicyModel(tiny_model()) for _ in range(2)]
    policies[0].workspace_bytes = 1 << 20
    for policy in policies:
        Engine(policy, EngineArguments(loss_workspace_mib=3), Schedule(1e-3, 1)).close()
    assert [policy.workspace_bytes for policy in policies] == [1 << 20, 3 << 20]
