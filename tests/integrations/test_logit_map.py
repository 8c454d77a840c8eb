"""Log-probs of families that scale or cap their logits: those that the model itself gives, and samples from."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stable_rlhf.data.encoding import pad_sequences
from stable_rlhf.integrations.logit_map import LogitMap, logit_map
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ops import PolicyLossConfig

FAMILIES = {
    "llama": ({}, LogitMap()),
    "gemma2": ({"final_logit_softcapping": 5.0}, LogitMap(1.0, 5.0)),
    "granite": ({"logits_scaling": 8.0, "embedding_multiplier": 12.0}, LogitMap(0.125)),
    "cohere2": ({"logit_scale": 0.0625}, LogitMap(0.0625)),
    "hyperclovax": ({"logits_scaling": 0.25}, LogitMap(0.25)),  # Granite's field, and it multiplies
    "minicpm3": ({"hidden_size": 32, "dim_model_base": 8}, LogitMap(0.25)),  # scales what goes into its head
}
SEQUENCES = [[3, 4, 5, 6, 7, 8], [9, 8, 7]]


def build(family: str, **settings: object):
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, ({}, None))[0] | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(
            std=4.0, generator=torch.Generator().manual_seed(1)
        )  # large logits
    return model


def own_log_softmax(model, temperature: float = 1.0) -> torch.Tensor:
    batch = pad_sequences(SEQUENCES)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return (logits.float() / temperature).log_softmax(-1)  # [B, L, V]


def targets() -> torch.Tensor:
    target = torch.full((2, 6), -100)
    target[0, :5], target[1, :2] = torch.tensor(SEQUENCES[0][1:]), torch.tensor(SEQUENCES[1][1:])
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_the_familys(family):
    assert logit_map(build(family)) == FAMILIES[family][1]


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_policy_and_reference_are_the_models_own(family, temperature):
    model = build(family)
    policy, target = PolicyModel(model), targets()
    wanted = own_log_softmax(model, temperature)
    kept = target >= 0
    for reader in (policy, policy.reference()):
        found = reader(policy.trunk.inputs(SEQUENCES), target, temperature=temperature, entropy=True)
        logprob = wanted.gather(-1, target.clamp_min(0)[..., None])[..., 0]
        torch.testing.assert_close(found["logprob"][kept], logprob[kept], atol=2e-5, rtol=1e-5)
        entropy = -(wanted.exp() * wanted).sum(-1)
        torch.testing.assert_close(found["entropy"][kept], entropy[kept], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_of_the_models_own_logits(family):
    model, target = build(family), targets()
    policy = PolicyModel(model)
    loss = {"kind": (target >= 0).long() * 2, "config": PolicyLossConfig(rehearsal_coef=1.0)}  # as SFT asks for it
    temperature = torch.ones(target.shape)  # of every row, as PPO gives it
    ours = policy(policy.trunk.inputs(SEQUENCES), target, temperature=temperature, loss=loss)["output"].loss
    ours.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = torch.nn.functional.nll_loss(own_log_softmax(model).flatten(0, 1), target.flatten())
    wanted.backward()
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert len(found) > 5
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_no_weight_is_touched():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", num_hidden_layers=1))
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert logit_map(model) == LogitMap(0.0625)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_a_scale_before_a_cap():
    model = build("llama")

    class Both(type(model)):
        def forward(self, **named):
            output = super().forward(**named)
            output.logits = 6.0 * torch.tanh(0.5 * output.logits / 6.0)
            return output

    model.__class__ = Both
    policy, target = PolicyModel(model), targets()
    assert policy.logit_map == LogitMap(0.5, 12.0)
    found = policy(policy.trunk.inputs(SEQUENCES), target)["logprob"]
    wanted = own_log_softmax(model).gather(-1, target.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(found[target >= 0], wanted[target >= 0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["bent", "masked", "turned"])
def test_what_is_neither_a_scale_nor_a_softcap_is_refused(what):
    model = build("llama")

    class Other(type(model)):
        def forward(self, **named):
            output = super().forward(**named)
            if what == "bent":
                output.logits = output.logits.relu()
            elif what == "masked":
                output.logits[..., 17] = -1e9
            else:
                output.logits = -output.logits
            return output

    model.__class__ = Other
    with pytest.raises(ValueError, match="Other turns its head's output into logits otherwise"):
        PolicyModel(model)
