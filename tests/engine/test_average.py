"""The moving average of a policy's weights: by hand, under each ZeRO stage, saved, and resumed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.weights import plain_weights
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import SFTArguments

DECAY = 0.7

pytestmark = pytest.mark.usefixtures("one_process")


def begin(model, accumulation: int = 1, **settings) -> tuple[PolicyModel, Engine]:
    policy = PolicyModel(model)
    engine = Engine(
        policy, EngineArguments(ema_decay=DECAY, **settings), Schedule(1e-2, 9),
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    engine.train()
    return policy, engine


def step(policy: PolicyModel, engine: Engine) -> dict[str, torch.Tensor]:
    for _ in range(engine.accumulation):
        engine.backward(-engine(policy.trunk.inputs([[5, 6, 7, 8]]), torch.full((1, 4), 7))["logprob"].mean())
        engine.step()
    return {k: v.clone() for k, v in plain_weights(policy.causal_lm).items()}


@pytest.mark.parametrize(
    "settings", [{}, {"accumulation": 2}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 3, "lora_r": 2}]
)
def test_it_is_the_average_of_what_was_after_each_step(tiny_model, tmp_path, settings):
    policy, engine = begin(tiny_model(), **settings)
    expected = {k: v.clone() for k, v in plain_weights(policy.causal_lm).items()}
    for _ in range(3):
        for name, tensor in step(policy, engine).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * tensor
    engine.save_model(tmp_path, average=True)
    engine.close()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in found.items():
        # The product of averaged adapters is not the average of their products: only close for small steps.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-2 if "lora_r" in settings else 1e-5)
    final = plain_weights(policy.causal_lm) if settings.get("zero_stage") != 3 else {}
    assert all(not torch.equal(found[n], t) for n, t in final.items() if "proj" in n)


@pytest.mark.parametrize("stage", [0, 3])
def test_it_goes_on_to_the_same_bits(tiny_model, tmp_path, stage):
    policy, engine = begin(tiny_model(), zero_stage=stage)
    step(policy, engine)
    engine.save(tmp_path)
    step(policy, engine)
    wanted = {k: v.clone() for k, v in engine.average.state().items()}
    engine.close()
    policy, engine = begin(tiny_model(seed=1), zero_stage=stage)
    engine.load(tmp_path)
    step(policy, engine)
    found = engine.average.state()
    engine.close()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_a_rank_that_cannot_write_takes_part_in_the_averages_collectives_first(tiny_model, tmp_path, monkeypatch):
    """Or the others would wait for it under ZeRO 3 for ever: it goes on to tell them of its full disk."""
    policy, engine = begin(tiny_model(), zero_stage=3)
    step(policy, engine)
    gathered, all_gather = [], dist.all_gather

    def count(parts, mine):
        gathered.append(mine)
        all_gather(parts, mine)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(dist, "all_gather", count)
    monkeypatch.setattr("stable_rlhf.engine.engine.save_pieces", full)
    with pytest.raises(OSError, match="No space left"):
        engine.save(tmp_path)
    engine.close()
    assert len(gathered) == len(list(policy.parameters()))


def test_a_scorer_is_not_averaged(tiny_model, tokenizer, tmp_path):
    scorer = AdvantageModel(tiny_model().base_model, tokenizer)
    engine = Engine(scorer, EngineArguments(ema_decay=DECAY), Schedule(1e-2, 1))
    engine.save(tmp_path)
    engine.close()
    assert engine.average is None and not list(tmp_path.glob("average*"))


def test_it_is_saved_beside_the_policy(tiny_model, tokenizer, tmp_path):
    examples = [encode(tokenizer, "Reverse abc", "cba")] * 2
    policy = PolicyModel(tiny_model())
    sizes = SFTArguments(learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=2)
    train_sft(policy, tokenizer, examples, quiet(sft=sizes, engine=EngineArguments(ema_decay=0.9)), tmp_path, seed=0)
    start, last, average = (
        m.state_dict()["lm_head.weight"]
        for m in (tiny_model(), *(AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path, tmp_path / "ema")))
    )
    assert (tmp_path / "ema" / "tokenizer.json").is_file()
    assert 0 < float((average - start).norm()) < 0.3 * float((last - start).norm())


def test_no_average_unless_asked_for_and_its_bounds(tiny_model, tokenizer, tmp_path):
    examples = [encode(tokenizer, "Reverse abc", "cba")] * 2
    sizes = SFTArguments(max_steps=1, per_device_train_batch_size=2)
    train_sft(PolicyModel(tiny_model()), tokenizer, examples, quiet(sft=sizes), tmp_path, seed=0)
    assert not (tmp_path / "ema").exists()
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"engine\.ema_decay"):
            check(Recipe(engine=EngineArguments(ema_decay=value)))
