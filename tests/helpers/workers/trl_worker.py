"""TRL beside our adapters, in an environment that has it: `trl_worker.py CASE [FOLDER]`. Prints what it found."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.trainer import utils

from helpers.tiny_model import redraw
from stable_rlhf import ops
from stable_rlhf.integrations.trl import AdvantageRewardTrainer, patch_logprob
from stable_rlhf.integrations.trl.reward import _prompt_length
from stable_rlhf.world import build_model, build_tokenizer

TOKENIZER = build_tokenizer()


def tiny(seed: int = 0):
    model = build_model(TOKENIZER, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=seed)
    return redraw(model, 0.2, torch.Generator().manual_seed(seed))


def distance(one, other) -> float:
    """The largest difference of two models' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def logprob() -> None:
    """TRL's fused head with its own function and with ours."""
    own = utils._ChunkedLogProbFunction
    calls = []
    linear_logprob = ops.linear_logprob

    def counted(*arguments, **named):
        calls.append(named["temperature"])
        return linear_logprob(*arguments, **named)

    ops.linear_logprob = counted
    for softcap, scale, temperature in ((None, None, 1.0), (5.0, None, 0.7), (3.0, 0.5, 0.7)):
        model = tiny()
        model.config.final_logit_softcapping, model.config.logit_scale = softcap, scale
        utils.add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        ids = torch.randint(5, 40, (3, 11), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, :4] = -100
        labels[0] = -100
        weight = torch.linspace(-1.0, 2.0, 30).view(3, 10)

        def scored(model=model, ids=ids, labels=labels, weight=weight):
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
            gradient = gradients(model, ((output.log_probs + 0.1 * output.entropy) * weight).sum())
            return output.log_probs.detach(), output.entropy.detach(), gradient

        wanted, before = scored(), len(calls)
        with patch_logprob():
            found = scored()
        assert len(calls) == before + 1  # once, and not before the patch
        assert utils._ChunkedLogProbFunction is own
        for one, other in zip(found, wanted, strict=True):
            assert relative(one, other) < 2e-6, (softcap, scale, relative(one, other))
        print("logprob", softcap, scale, temperature, [f"{relative(*p):.1e}" for p in zip(found, wanted, strict=True)])
    # Negative control: another temperature is another function.
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    targets, rest = torch.arange(5), (16, 5.0, 0.5, ("log_probs", "entropy"))
    with patch_logprob():
        cold = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, *rest)
        every = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, *rest[:-1])  # TRL's: all five
    assert relative(own.apply(hidden, weight, None, targets, 0.7, *rest)[0], cold[0]) < 2e-6
    assert relative(own.apply(hidden, weight, None, targets, 0.8, *rest)[0], cold[0]) > 1e-2
    assert cold[2:] == (None, None, None) and all(value is not None for value in every)

    patch = patch_logprob()
    inner = patch_logprob()
    try:
        patch.undo()
    except RuntimeError as error:
        assert "undo the last patch first" in str(error)
    else:
        raise AssertionError("undone out of order")
    inner.undo()
    patch.undo()
    assert utils._ChunkedLogProbFunction is own


def preferences(**columns) -> Dataset:
    rows = [(f"{i}+{i}=", str(2 * i), str(2 * i + 1)) for i in range(1, 9)]
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_dict({**{n: [row[j] for row in rows] for j, n in enumerate(names)}, **columns})


def reward_trainer(kind, data, **named):
    folder = tempfile.mkdtemp()
    base = tiny().config
    base.num_labels, base.pad_token_id = 1, TOKENIZER.pad_token_id
    torch.manual_seed(0)
    model = redraw(AutoModelForSequenceClassification.from_config(base), 0.3, torch.Generator().manual_seed(3))
    arguments = RewardConfig(
        folder, per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, optim="sgd", logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", seed=3,
        center_rewards_coefficient=named.pop("center", None), disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=data, processing_class=TOKENIZER, **named)


def trained(trainer) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


def reward() -> None:
    """Without bounds TRL's own losses, weights and metrics; with them the operation's."""
    for columns, center in (({}, None), ({"margin": [0.5, 1.0] * 4}, 0.01)):
        data = preferences(**columns)
        own, wanted = trained(reward_trainer(RewardTrainer, data, center=center))
        ours, found = trained(reward_trainer(AdvantageRewardTrainer, data, center=center, margin=None))
        assert distance(ours, own) < 2e-6, distance(ours, own)
        assert found[0].keys() == wanted[0].keys()
        for one, other in zip(found, wanted, strict=True):
            for name in ("loss", "accuracy", "mean_reward", "margin", "num_tokens"):
                assert abs(one[name] - other[name]) < 1e-4, (name, one, other)
        bounded, _ = trained(reward_trainer(AdvantageRewardTrainer, data, center=center, margin=0.5))
        assert distance(bounded, own) > 1e-3  # negative control
        print("reward", center, f"{distance(ours, own):.1e}", f"bounded {distance(bounded, own):.1e}")

    trainer = reward_trainer(AdvantageRewardTrainer, preferences(), expected_head=True)
    row = trainer.train_dataset[2]
    assert row["prompt_length"] == len(TOKENIZER("3+3=")["input_ids"]), row
    plain, asked = TOKENIZER.chat_template, [{"role": "user", "content": "3+3="}]
    TOKENIZER.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + plain
    for tools in ([{"name": "plus"}], '[{"name": "plus"}]'):  # stand before the prompt
        begin = TOKENIZER.apply_chat_template(
            asked, tools=[{"name": "plus"}], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        example = {"prompt": asked, "tools": tools, "chosen_ids": [*begin, 7, 8], "rejected_ids": [*begin, 9]}
        assert _prompt_length(example, TOKENIZER) == {"prompt_length": len(begin)}
    TOKENIZER.chat_template = plain
    before = copy.deepcopy(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(trainer.model, batch)
    scores = before(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    states = before.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = before.expected_head(states[torch.arange(3), batch["prompt_length"] - 1])[:, 0]
    c, r = scores[:3] - expected, scores[3:] - expected
    by_hand = -sum(torch.nn.functional.logsigmoid(x) for x in (c - r, 2.5 - c, 2.5 + r)).mean()
    assert abs(float(loss - by_hand)) < 1e-5, (loss, by_hand)
    model, logs = trained(trainer)
    assert distance(model.expected_head, before.expected_head) > 1e-4 and "mean_expected" in logs[0]
    folder = Path(tempfile.mkdtemp())
    trainer.save_model(str(folder))
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    found = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.eval()
    wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(found, wanted, atol=1e-6)

    for data, named, words in (
        (preferences().remove_columns("prompt"), {"expected_head": True}, "needs to know where prompts end"),
        (preferences(), {"expected_head": True, "peft_config": object()}, "train without peft_config"),
    ):
        try:
            reward_trainer(AdvantageRewardTrainer, data, **named)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
    {"logprob": logprob, "reward": reward}[sys.argv[1]]()
