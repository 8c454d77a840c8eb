"""TRL's GRPO beside the fused one, in an environment that has it: `trl_grpo_worker.py CASE`. Prints what it found."""

from __future__ import annotations

import functools
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from helpers.tiny_model import redraw
from stable_rlhf import ops
from stable_rlhf.integrations.trl import FusedGRPOTrainer, grpo
from stable_rlhf.integrations.trl.rehearsal import encode, padded
from stable_rlhf.world import build_model, build_tokenizer

TOKENIZER = build_tokenizer()
PROMPTS = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(1, 9)])
REHEARSAL = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(1, 6)] + [{"text": "1+2=3"}]
# Each with the default KL, times the ratio, where beta is not 0.
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "grpo, KL, delta, clip-higher": {"loss_type": "grpo", "beta": 0.5, "delta": 1.6, "epsilon_high": 0.3},
    "grpo, KL without the ratio": {"loss_type": "grpo", "beta": 0.5, "use_bias_correction_kl": False},
    "grpo, entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.1},
    "grpo, adaptive entropy": {
        "loss_type": "grpo",
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,
        "entropy_coef": 0.1,
    },
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo, KL, delta": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.5, "delta": 1.5},
    "bnpo, KL": {"loss_type": "bnpo", "beta": 0.5},
    "dr_grpo, entropy bonus": {"loss_type": "dr_grpo", "entropy_coef": 0.1},
    "dapo, KL": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "cispo, KL, entropy bonus": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.5, "entropy_coef": 0.1},
    "cispo, sequence": {"loss_type": "cispo", "epsilon_high": 1.2, "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.5},
    "luspo, token": {"loss_type": "luspo"},
}
# What is TRL's own loss on our log-probs.
OWN = {
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "top entropy": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "tight delta": {"loss_type": "grpo", "delta": 1.1},
    "wide clip": {"loss_type": "grpo", "epsilon": 1.5},
    "low cispo": {"loss_type": "cispo", "epsilon_high": 0.9},
}


@functools.cache
def folder() -> str:
    """A tiny model on disk, where TRL finds the reference model."""
    model = build_model(TOKENIZER, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=0)
    place = tempfile.mkdtemp()
    redraw(model, 0.2, torch.Generator().manual_seed(0)).save_pretrained(place)
    return place


def tiny():
    return AutoModelForCausalLM.from_pretrained(folder())


def share_of_digits(completions, **_) -> list[float]:
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


def trainer(kind, settings, **named):
    arguments = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 4,
        "learning_rate": 0.2, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 5, "temperature": 0.9,
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
    }  # fmt: skip
    return kind(
        model=named.pop("model", None) or tiny(), reward_funcs=share_of_digits, train_dataset=PROMPTS,
        processing_class=TOKENIZER, args=GRPOConfig(tempfile.mkdtemp(), **(arguments | settings)), **named,
    )  # fmt: skip


def batch(first: int = 4) -> dict[str, torch.Tensor]:
    """Ragged, an empty completion, tool tokens, ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 40, (5, first + 7), generator=generator)
    lengths = torch.tensor([7, 3, 0, 5, 1])
    prompt_mask = torch.ones(5, first, dtype=torch.int64)
    prompt_mask[1, :2] = 0
    completion_mask = (torch.arange(7) < lengths[:, None]).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 2:4] = 0
    return {
        "prompt_ids": ids[:, :first], "prompt_mask": prompt_mask, "completion_ids": ids[:, first:],
        "completion_mask": completion_mask, "tool_mask": tool_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.3, -1.5, 0.4]), "num_items_in_batch": torch.tensor(29),
        "noise": 0.5 * torch.randn(5, 7, generator=generator),
        "importance_sampling_ratio": 2 * torch.rand(5, 7, generator=generator),
    }  # fmt: skip


def around(loss_of, inputs) -> dict[str, torch.Tensor]:
    """Old and reference log-probs near the model's own."""
    own, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        loss_of, loss_of.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), 7,
    )  # fmt: skip
    noise = inputs["noise"]
    old = (own.detach() + noise).masked_fill(inputs["completion_mask"] == 0, float("nan"))
    return {
        **inputs,
        "old_per_token_logps": torch.nan_to_num(old, nan=0.0),
        "ref_per_token_logps": own.detach() - noise / 2,
    }


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def compared(own, fused, inputs) -> tuple[float, float, float]:
    """The difference of two trainers' losses, of their gradients (relative), and of their metrics."""
    for one in (own, fused):
        one.model.train()
        one.current_gradient_accumulation_steps = 2
        one._metrics["train"].clear()
    found, wanted = (one._compute_loss(one.model, dict(inputs)) for one in (fused, own))
    theirs, ours = gradients(own.model, wanted), gradients(fused.model, found)
    assert fused._metrics["train"].keys() == own._metrics["train"].keys(), fused._metrics
    figures = [torch.tensor(list(one._metrics["train"].values())).nan_to_num() for one in (fused, own)]
    off = float((figures[0] - figures[1]).abs().max())
    return float((found - wanted).detach().abs()), float((ours - theirs).norm() / theirs.norm()), off


def losses() -> None:
    """TRL's own function and ours on the same rows: loss to 1e-6, gradient to 1e-5 relative, metrics to 1e-5."""
    for name, settings in {**VARIANTS, **OWN}.items():
        own, fused = trainer(GRPOTrainer, settings), trainer(FusedGRPOTrainer, settings)
        assert (fused._unsaid is None) == (name in VARIANTS), (name, fused._unsaid)
        given = around(own, batch())
        on_policy = {k: v for k, v in given.items() if k != "old_per_token_logps"}
        nothing = {**given, "completion_mask": torch.zeros_like(given["completion_mask"])}
        cases = {"off policy": given, "on policy": on_policy, "by token": {**given, "advantages": given["noise"]}}
        for case, inputs in cases.items():
            loss, gradient, metrics = compared(own, fused, inputs)
            print(f"{name}, {case}: loss {loss:.1e} gradient {gradient:.1e} metrics {metrics:.1e}")
            assert loss < 1e-6 and gradient < 1e-5 and metrics < 1e-5, (name, case)
        for one in (own, fused):  # as if vLLM had sampled
            one.use_vllm = one.vllm_importance_sampling_correction = True
        if name != "vespo":
            loss, gradient, _ = compared(own, fused, given)
            assert loss < 1e-6 and gradient < 1e-5, (name, "vllm", loss, gradient)
        zero = fused._compute_loss(fused.model, nothing)
        assert not gradients(fused.model, zero).any(), name
    lora = LoraConfig(r=2, target_modules=["q_proj"])  # TRL refuses adapters of the head
    own, fused = (trainer(kind, {"loss_type": "grpo"}, peft_config=lora) for kind in (GRPOTrainer, FusedGRPOTrainer))
    loss, gradient, _ = compared(own, fused, around(own, batch()))
    print(f"LoRA: loss {loss:.1e} gradient {gradient:.1e}")
    assert loss < 1e-6 and gradient < 1e-5
    # bfloat16 autocast, TRL's default: each to that type's rounding.
    settings = {"loss_type": "grpo", "beta": 0.5}
    own, fused = (trainer(kind, {**settings, "bf16": True}) for kind in (GRPOTrainer, FusedGRPOTrainer))
    inputs, exact = around(own, batch()), trainer(GRPOTrainer, settings)
    theirs, ours = compared(exact, own, inputs), compared(exact, fused, inputs)
    print(f"bfloat16, off float32: theirs {theirs[1]:.1e} ours {ours[1]:.1e}")
    assert ours[1] < 1.5 * theirs[1] + 1e-3 and ours[0] < 0.02
    # Negative control: a setting moved by a little is seen.
    own = trainer(GRPOTrainer, {"loss_type": "grpo", "beta": 0.5})
    for moved in ({"beta": 0.51}, {"beta": 0.5, "epsilon": 0.9}, {"beta": 0.5, "use_bias_correction_kl": False}):
        fused = trainer(FusedGRPOTrainer, {"loss_type": "grpo", **moved})
        assert compared(own, fused, around(own, batch()))[1] > 1e-3, moved


def train() -> None:
    """A few steps of the whole trainer: the same completions, losses and weights."""
    for name in ("grpo, KL, delta, clip-higher", "bnpo, KL", "dr_grpo, entropy bonus", "dapo, KL", "cispo", "gspo"):
        runs = []
        for kind in (GRPOTrainer, FusedGRPOTrainer):
            # Two passes over each batch of completions, so that ratios are not 1.
            one = trainer(kind, {**VARIANTS[name], "num_iterations": 2, "steps_per_generation": 2})
            before = [p.detach().clone() for p in one.model.parameters()]
            one.train()
            moved = max(
                float((p - q).detach().abs().max()) for p, q in zip(one.model.parameters(), before, strict=True)
            )
            runs.append((one, moved, [entry for entry in one.state.log_history if "loss" in entry]))
        (own, moved, wanted), (fused, _, found) = runs
        weights = zip(own.model.parameters(), fused.model.parameters(), strict=True)
        off = max(float((p - q).detach().abs().max()) for p, q in weights)
        print(f"{name}: weights moved {moved:.1e}, off by {off:.1e}, losses {[entry['loss'] for entry in found]}")
        assert moved > 1e-3 and off < 1e-3 * moved, name
        assert list(own._logs["completion"]) == list(fused._logs["completion"])
        for one, other in zip(found, wanted, strict=True):
            assert one.keys() == other.keys() and abs(one["loss"] - other["loss"]) < 1e-5, (one, other)


def rehearsal() -> None:
    """The rehearsal rows' loss and gradient come on top of TRL's, from one pass and one backward."""
    settings = {"loss_type": "dapo", "beta": 0.5}
    own = trainer(GRPOTrainer, settings)
    fused = trainer(FusedGRPOTrainer, settings, rehearsal_dataset=REHEARSAL, rehearsal_coef=0.5)
    given = around(own, batch())
    for one in (own, fused):
        one.model.train()
        one.current_gradient_accumulation_steps = 2
    calls = []
    linear_policy_loss = ops.linear_policy_loss
    ops.linear_policy_loss = lambda *a, **k: calls.append(1) or linear_policy_loss(*a, **k)
    loss = fused._compute_loss(fused.model, dict(given))
    found = gradients(fused.model, loss)
    ops.linear_policy_loss = linear_policy_loss
    assert len(calls) == 1
    theirs = own._compute_loss(own.model, dict(given))
    rows, total, count = fused._rehearsal.batch(0, 5), 0.0, 0
    for row in rows:
        ids = torch.tensor(row.ids)
        logprob = own.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        learnt = range(max(row.first, 1), len(ids))
        total = total - sum(logprob[i - 1, ids[i]] for i in learnt)
        count += len(learnt)
    wanted = theirs + 0.5 * total / count / 2
    off = float((found - gradients(own.model, wanted)).norm() / found.norm())
    plain = float((found - gradients(own.model, own._compute_loss(own.model, dict(given)))).norm() / found.norm())
    print(f"rehearsal: loss {float((loss - wanted).detach()):.1e} gradient {off:.1e}, without its rows {plain:.1e}")
    assert abs(float((loss - wanted).detach())) < 2e-6 and off < 1e-5 and plain > 1e-2
    (logged,) = fused._metrics["train"]["rehearsal_loss"]
    assert abs(logged - float((total / count).detach())) < 1e-5

    # Every row once an epoch, and a batch that depends on its number alone.
    again = trainer(FusedGRPOTrainer, settings, rehearsal_dataset=Dataset.from_list(REHEARSAL[:5]))._rehearsal
    first = [tuple(row.ids) for i in range(5) for row in again.batch(i, 1)]
    assert len({*first}) == 5 and [tuple(row.ids) for row in again.batch(1, 2)] == first[2:4]
    talk = encode({"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}, TOKENIZER)
    assert talk.first == 0 and TOKENIZER.eos_token_id == talk.ids[-1]
    parts = {"prompt": [{"role": "user", "content": "1+1="}], "completion": [{"role": "assistant", "content": "2"}]}
    assert encode(parts, TOKENIZER).ids == talk.ids
    assert TOKENIZER.decode(talk.ids[encode(parts, TOKENIZER).first :]) == "2" + TOKENIZER.eos_token

    # What a mask leaves out inside of a completion is not learnt, whatever the data set's format is.
    masked = {"input_ids": [5, 6, 7, 8, 9, 10], "completion_mask": [0, 1, 1, 0, 0, 1]}
    for made in (list, np.array, torch.tensor):
        row = encode({name: made(values) for name, values in masked.items()}, TOKENIZER)
        assert padded([row, talk], 0, torch.device("cpu"))[2][0, :6].tolist() == [6, 7, -100, -100, 10, -100]
    for wrong, words in (([1] * 5, "6 input_ids have 5"), ([1, 0, 0, 0, 0, 0], "nothing to learn")):
        try:
            encode({**masked, "completion_mask": wrong}, TOKENIZER)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    plain = TOKENIZER.chat_template
    TOKENIZER.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + plain
    for tools in ([{"name": "plus"}], '[{"name": "plus"}]'):
        with_tools = encode({**parts, "tools": tools}, TOKENIZER)
        assert TOKENIZER.decode(with_tools.ids).startswith("plus")
        assert with_tools.ids[with_tools.first :] == talk.ids[encode(parts, TOKENIZER).first :]
    TOKENIZER.chat_template = plain

    # In fp16 the gradients are made with the scale that the loss will have.
    scaled = trainer(FusedGRPOTrainer, settings)
    scaled.model.train()
    scaled.current_gradient_accumulation_steps = 2
    seen, fused_policy_loss = [], grpo.fused_policy_loss

    def watched(*given, **named):
        seen.append(named["grad_scale"])
        return fused_policy_loss(*given, **named)

    grpo.fused_policy_loss, scaled.accelerator.scaler = watched, SimpleNamespace(get_scale=lambda: 1024.0)
    loss = scaled._compute_loss(scaled.model, dict(given))
    got = gradients(scaled.model, loss * 1024.0)
    grpo.fused_policy_loss, scaled.accelerator.scaler = fused_policy_loss, None
    wanted = gradients(scaled.model, scaled._compute_loss(scaled.model, dict(given)))
    assert seen == [1024.0] and float((got / 1024.0 - wanted).norm() / wanted.norm()) < 1e-5

    whole = trainer(FusedGRPOTrainer, settings, rehearsal_dataset=REHEARSAL, rehearsal_coef=1.0)
    whole.train()
    logged = [entry["rehearsal_loss"] for entry in whole.state.log_history if "rehearsal_loss" in entry]
    print("rehearsal losses", logged)
    assert len(logged) == 4 and logged[-1] < logged[0]
    bent = tiny()

    class Bent(type(bent)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits.relu()
            return output

    bent.__class__ = Bent
    for named, words in (
        ({"rehearsal_dataset": REHEARSAL, "model": bent}, "cannot join a loss with this model: Bent turns"),
        ({"rehearsal_dataset": REHEARSAL, "settings": OWN["sapo"]}, "cannot join a loss with loss_type='sapo'"),
        ({"rehearsal_dataset": []}, "got list of no row"),
        ({"rehearsal_dataset": iter(REHEARSAL)}, "takes a data set with a length"),
        ({"rehearsal_dataset": [{"question": "?"}]}, "these hold question"),
        ({"rehearsal_dataset": REHEARSAL, "rehearsal_coef": float("nan")}, "rehearsal_coef"),
    ):
        try:
            trainer(FusedGRPOTrainer, named.pop("settings", settings), **named)
        except ValueError as error:
            assert words in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
    {"losses": losses, "train": train, "rehearsal": rehearsal}[sys.argv[1]]()
