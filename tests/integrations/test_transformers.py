"""A transformers model with a fused head against its own logits, family by family, and wrapped as trainers wrap it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.forks import run_ranks
from stable_rlhf.integrations import transformers as fusing
from stable_rlhf.integrations.logit_map import LogitMap
from stable_rlhf.integrations.transformers import fuse_lm_head, fused_policy_loss
from stable_rlhf.ops import PolicyLossConfig, policy_loss

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "phi": {},  # its head has a bias
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "minicpm3": {"dim_model_base": 8},  # scales what goes into its head
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
}
SCALED = {"gemma2", "cohere", "granite", "hyperclovax"}
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, **settings: object):
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.get_output_embeddings().parameters():  # large logits, a bias that is not 0
            nn.init.normal_(parameter, std=2.0)
    return model


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def own(model, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs and entropies of the model's own logits, 0 where ignored, and its router loss."""
    inputs, labels = batch()
    outputs = model(**inputs)
    logits = (outputs.logits.float() / temperature).log_softmax(-1)[:, :-1]
    kept = labels[:, 1:] != -100
    logprob = logits.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    return logprob * kept, entropy * kept, getattr(outputs, "aux_loss", None)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 2
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


@each_family
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_entropy_and_gradients_are_of_the_models_own_logits(family, temperature):
    model = build(family)
    logprob, entropy, aux_loss = own(model, temperature)
    weight = torch.linspace(-1.0, 2.0, logprob.numel()).view_as(logprob)
    wanted = gradients(model, (logprob * weight + 0.1 * entropy).sum())
    fuse_lm_head(model)
    inputs, labels = batch()
    output = model(**inputs, labels=labels, fused=True, temperature=temperature, entropy=True)
    torch.testing.assert_close(output.logprob, logprob, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output.entropy, entropy, rtol=1e-5, atol=2e-5)
    assert output.loss is None and output.metrics == {}
    assert (output.aux_loss is None) == (family != "mixtral")
    if aux_loss is not None:
        torch.testing.assert_close(output.aux_loss, aux_loss)
    assert_same_gradients(gradients(model, (output.logprob * weight + 0.1 * output.entropy).sum()), wanted)
    moved = model(**inputs, shift_labels=shifted(labels), fused=True, temperature=temperature)
    torch.testing.assert_close(moved.logprob[:, :-1], logprob, rtol=1e-5, atol=2e-5)
    assert moved.entropy is None and moved.logprob.shape == labels.shape


@pytest.mark.parametrize("family", sorted(SCALED))
def test_without_the_familys_map_they_are_others(family, monkeypatch):
    monkeypatch.setattr(fusing, "logit_map", lambda model, behind_head: LogitMap())
    model = build(family)
    wanted = own(model)[0]
    fuse_lm_head(model)
    inputs, labels = batch()
    assert (model(**inputs, labels=labels, fused=True).logprob - wanted).abs().max() > 1e-2


@each_family
def test_the_policy_loss_is_that_of_the_models_own_logits(family):
    model = build(family)
    inputs, labels = batch()
    target, generator = shifted(labels), torch.Generator().manual_seed(2)
    rows = {
        "kind": (target != -100) * torch.tensor([[1], [2]]),  # a policy sequence, and a rehearsal one
        "old_logprob": -4.0 + torch.randn(target.shape, generator=generator),
        "advantage": torch.randn(2, generator=generator),
        "temperature": 0.7,
        "config": PolicyLossConfig(entropy_coef=0.01, rehearsal_coef=0.5),
    }
    wanted = policy_loss(model(**inputs).logits, target, **rows)
    wanted_gradients = gradients(model, wanted.loss)
    fuse_lm_head(model)
    output = fused_policy_loss(model, inputs, target, **rows)
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logprob, wanted.logprob, rtol=1e-5, atol=2e-5)
    assert output.metrics.keys() == wanted.metrics.keys()
    assert (output.aux_loss is None) == (family != "mixtral")
    assert_same_gradients(gradients(model, output.loss), wanted_gradients)


@pytest.mark.parametrize("training", [False, True])
def test_lora_on_the_head_counts(training):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(build("gemma2", tie_word_embeddings=False), config).train(training)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    fuse_lm_head(model)
    torch.manual_seed(4)  # the same dropout
    logprob, entropy, _ = own(model)
    wanted = gradients(model, (logprob + 0.1 * entropy).sum())
    inputs, labels = batch()
    torch.manual_seed(4)
    output = model(**inputs, labels=labels, fused=True, entropy=True)
    torch.testing.assert_close(output.logprob, logprob, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, (output.logprob + 0.1 * output.entropy).sum()), wanted)
    with model.disable_adapter():
        off = model(**inputs, labels=labels, fused=True).logprob
        torch.testing.assert_close(off, own(model)[0], rtol=1e-5, atol=2e-5)
    assert (off - logprob).abs().max() > 1e-2
    model.eval().merge_adapter()
    merged = model(**inputs, labels=labels, fused=True).logprob
    torch.testing.assert_close(merged, own(model)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "words"), [({"use_dora": True}, "is a variant of LoRA"), (None, "of its head is not LoRA")]
)
def test_other_adapters_of_the_head_are_refused(settings, words):
    peft = pytest.importorskip("peft")
    make = peft.IA3Config if settings is None else peft.LoraConfig
    extra = {"feedforward_modules": []} if settings is None else settings
    model = peft.get_peft_model(build("gemma2", tie_word_embeddings=False), make(target_modules=["lm_head"], **extra))
    fuse_lm_head(model)
    inputs, labels = batch()
    with pytest.raises(ValueError, match=words):
        model(**inputs, labels=labels, fused=True)


def test_a_head_that_peft_trains_whole():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(build("gemma2", tie_word_embeddings=False), config)
    fuse_lm_head(model)
    inputs, labels = batch()
    wanted = gradients(model, own(model)[0].sum())
    assert any("lm_head.modules_to_save" in name for name in wanted)
    assert_same_gradients(gradients(model, model(**inputs, labels=labels, fused=True).logprob.sum()), wanted)


def test_it_is_the_same_model_otherwise_and_undone_exactly():
    model = build("llama")
    inputs, labels = batch()
    before, weights, signature = dict(model.__dict__), model.state_dict(), inspect.signature(model.forward)
    plain, generated = model(**inputs, labels=labels), model.generate(inputs["input_ids"], max_new_tokens=3)
    undo = fuse_lm_head(model)
    assert inspect.signature(model.forward) == signature
    again = model(**inputs, labels=labels)
    assert torch.equal(again.loss, plain.loss) and torch.equal(again.logits, plain.logits)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3), generated)
    assert model.state_dict().keys() == weights.keys()
    with pytest.raises(ValueError, match="model: this LlamaForCausalLM is fused already"):
        fuse_lm_head(model)

    clone = copy.deepcopy(model)  # a reference model: it must read its own weights
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    assert (clone(**inputs, labels=labels, fused=True).logprob[0, 2] + torch.log(torch.tensor(64.0))).abs() < 1e-5
    assert (model(**inputs, labels=labels, fused=True).logprob - own(model)[0]).abs().max() < 1e-4

    model.forward, mine = (lambda **named: None), model.forward
    with pytest.raises(ValueError, match="was replaced after it was fused"):
        undo()
    model.forward = mine
    undo()
    assert model.__dict__ == before and "fused" not in model.forward.__code__.co_varnames
    fuse_lm_head(model)()
    assert model.__dict__ == before


def test_after_an_error_of_the_models_own_it_is_whole():
    model = build("llama")
    head = model.lm_head
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(labels=batch()[1], fused=True)
    assert model.lm_head is head and "forward" not in head.__dict__


def test_nothing_to_predict_is_a_zero_with_a_gradient():
    model = build("llama")
    fuse_lm_head(model)
    inputs, labels = batch()
    output = model(**inputs, labels=torch.full_like(labels, -100), fused=True)
    assert not output.logprob.any()
    assert not any(gradient.any() for gradient in gradients(model, output.logprob.sum()).values())


def test_no_logits_are_made(monkeypatch):
    model = build("llama")
    fuse_lm_head(model)
    inputs, labels = batch()
    shapes = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: shapes.append(w.shape) or linear(x, w, b))
    model(**inputs, labels=labels, fused=True)
    assert shapes and (64, 32) not in shapes
    model(**inputs)
    assert (64, 32) in shapes


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({}, "labels: required"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"labels: shape \(2, 5\) instead of \(2, 9\)"),
        ({"labels": batch()[1], "logits_to_keep": 3}, "logits_to_keep: has no meaning"),
    ],
)
def test_wrong_calls_are_told(named, words):
    model = build("llama")
    fuse_lm_head(model)
    with pytest.raises(ValueError, match=words):
        model(**batch()[0], fused=True, **named)


def test_wrong_models_and_losses_are_told():
    model = build("gemma2")
    inputs, labels = batch()
    target = shifted(labels)
    with pytest.raises(ValueError, match="model: expected a transformers model, got Linear"):
        fuse_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: this Gemma2ForCausalLM is not fused; call fuse_lm_head"):
        fused_policy_loss(model, inputs, target, advantage=torch.ones(2))
    fuse_lm_head(model)
    with pytest.raises(ValueError, match=r"config\.softcap: 3\.0, where the model's own is 5\.0"):
        fused_policy_loss(model, inputs, target, advantage=torch.ones(2), config=PolicyLossConfig(softcap=3.0))
    with pytest.raises(ValueError, match="weight: is the model's own"):
        fused_policy_loss(model, inputs, target, weight=torch.ones(2))
    with pytest.raises(ValueError, match="labels: a policy loss takes target"):
        fused_policy_loss(model, {**inputs, "labels": labels}, target)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["tied", "untied"])
@pytest.mark.parametrize("sharding", ["fsdp", "zero"])
def test_two_ranks_that_shard_the_model_train_as_one_process(sharding, heads):
    """FSDP2, the untied head in a group of its own, and ZeRO-3, on two processes."""
    run_ranks("fused_worker", sharding, heads, ranks=2)
