"""Splitting a backbone, caching features, and log-probs through PolicyModel."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stable_rlhf.data.encoding import Encoded, encode, response_targets
from stable_rlhf.models import trunk
from stable_rlhf.models.features import FeatureCache, share_lower
from stable_rlhf.models.loading import resolve_model
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk, length_batches, split_backbone

SEQUENCES = [[3, 4, 5, 6, 7, 8], [9, 8, 7], [5, 6, 7, 8, 9, 10, 11, 12]]


@torch.no_grad()
def test_split_backbone_equals_the_whole(tiny_model, architecture):
    whole = tiny_model(architecture)
    reference = Trunk(tiny_model(architecture).base_model)
    split = Trunk(whole.base_model, num_trainable_layers=1)
    expected = reference(**reference.inputs(SEQUENCES))
    got = split(**split.inputs(SEQUENCES))
    mask = reference.inputs(SEQUENCES)["attention_mask"].bool()
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=2e-6)
    names = {n for n, p in split.named_parameters() if p.requires_grad}
    assert names and not any("embed" in n for n in names)
    blocks = [p for n, p in whole.base_model.named_parameters() if ".0." in n or ".1." in n]
    assert blocks and not any(p.requires_grad for p in blocks)
    # Under ZeRO-3 a module of both parts would be traced with calls that ranks make in different numbers.
    assert not {*map(id, split.lower.modules())} & {*map(id, split.modules())}


def test_split_whole_model_still_generates(tiny_model):
    model = tiny_model()
    before = model.generate(torch.tensor([SEQUENCES[0]]), max_new_tokens=5, do_sample=False)
    Trunk(model.base_model, num_trainable_layers=1)
    after = model.generate(torch.tensor([SEQUENCES[0]]), max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)


KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES = {  # each with blocks that differ by their place, or an embedding that is scaled
    "gemma3_text": {"layer_types": KINDS, "sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "qwen3": {"layer_types": KINDS, "use_sliding_window": True, "sliding_window": 8},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere2": {"sliding_window": 8},
}


def family(name: str, **settings: object):
    """A small untrained model of another family than those of `tiny_model`."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(sizes | FAMILIES.get(name, {}) | settings))
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_split_equals_the_whole(name, layers, monkeypatch):
    monkeypatch.setattr(trunk, "_check_split", lambda *parts: None)
    model, sequences = family(name), [*SEQUENCES, list(range(3, 33))]
    before = model.config.to_dict()
    whole, split = Trunk(model.base_model), Trunk(model.base_model, num_trainable_layers=layers)
    mask = whole.inputs(sequences)["attention_mask"].bool()
    wanted, found = (trunk(**trunk.inputs(sequences))[mask] for trunk in (whole, split))
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert model.config.to_dict() == before  # what is saved stays whole


def test_a_family_whose_split_computes_something_else_is_refused():
    model = family("llama")

    class Scaled(type(model.base_model)):
        def forward(self, input_ids=None, inputs_embeds=None, **named):
            inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=1.1 * inputs_embeds, **named)

    model.base_model.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled cannot be split: its blocks in two parts compute something else"):
        PolicyModel(model, num_trainable_layers=2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_family_that_does_not_run_in_two_parts_is_refused():
    model = family("llama")

    class Needs(type(model.base_model)):
        def forward(self, input_ids=None, **named):
            self.embed_tokens(input_ids)
            return super().forward(input_ids=input_ids, **named)

    model.base_model.__class__ = Needs
    with pytest.raises(ValueError, match="Needs cannot be split: its blocks do not run in two parts"):
        Trunk(model.base_model, num_trainable_layers=2)


def test_trying_a_split_leaves_the_model_as_it_was():
    model = family("qwen3", attention_dropout=0.5).train()
    model.base_model.layers[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    lower, upper = split_backbone(model.base_model, 2)
    assert [m.training for m in model.modules()] == modes and lower.training and upper.training
    assert {part.config._attn_implementation for part in (model, lower, upper)} == {"sdpa"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, 3, 4])
def test_split_refuses_impossible_counts(tiny_model, count):
    with pytest.raises(ValueError, match="num_trainable_layers"):
        split_backbone(tiny_model().base_model, count)


@torch.no_grad()
def test_cached_features_equal_fresh_ones_and_are_computed_once(tiny_model, monkeypatch):
    trunk = Trunk(tiny_model().base_model, num_trainable_layers=1)
    cache = FeatureCache()
    cache.fill(trunk, SEQUENCES)
    fresh = trunk(**trunk.inputs(SEQUENCES))
    monkeypatch.setattr(trunk, "features", lambda *a, **k: pytest.fail("computed again"))
    cached = trunk(**trunk.inputs(SEQUENCES, features=cache.get(trunk, SEQUENCES)))
    torch.testing.assert_close(cached, fresh, rtol=0, atol=2e-6)


def test_a_stage_has_the_features_that_it_would_have_alone(tiny_model, monkeypatch):
    """From the same batches, which are computed once for all stages."""
    trunk, computed = Trunk(tiny_model().base_model, num_trainable_layers=1), []

    def features(batch):  # which tell what was in the batch
        computed.append(batch)
        return [torch.full((len(s), 1), float(sum(map(sum, batch)))) for s in batch]

    monkeypatch.setattr(trunk, "features", features)
    shared, (train, held_out, judge) = FeatureCache(), ([[4, 5], [6]], [[7, 8, 9]], [[9, 9], [8]])
    for _ in range(2):
        shared.for_stage().fill(trunk, [*train, *held_out])
        assert len(computed) == 1
    found = []
    for cache in (shared.for_stage(), FeatureCache()):
        cache.fill(trunk, [*judge, *held_out])
        found.append(cache.get(trunk, held_out)[0].tolist())
    assert found[0] == found[1] and len(computed) == 3


@torch.no_grad()
def test_saved_features_are_taken_up(tiny_model, monkeypatch, tmp_path):
    trunk, saved, cache = Trunk(tiny_model().base_model, num_trainable_layers=1), FeatureCache(), FeatureCache()
    saved.fill(trunk, SEQUENCES)
    saved.save(tmp_path / "hidden.safetensors")
    cache.fill(trunk, [[5, 5]])
    cache.load(tmp_path / "hidden.safetensors")
    monkeypatch.setattr(trunk, "features", lambda *a, **k: pytest.fail("computed again"))
    found = zip(cache.get(trunk, [*SEQUENCES, [5, 5]]), saved.get(trunk, SEQUENCES), strict=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in found)


@torch.no_grad()
def test_features_of_another_type_are_given_in_the_trunks_own(tiny_model):
    cache = FeatureCache()
    cache.fill(Trunk(tiny_model().base_model, num_trainable_layers=1), SEQUENCES[:1])
    trunk = Trunk(tiny_model().bfloat16().base_model, num_trainable_layers=1)
    for order in (SEQUENCES, SEQUENCES[::-1]):  # one that was there before one that is computed now, and after it
        features = cache.get(trunk, order)
        assert {f.dtype for f in features} == {torch.bfloat16}
        assert trunk(**trunk.inputs(order, features=features)).isfinite().all()


def test_share_lower_compares_weights(tiny_model):
    one, same, other = (Trunk(tiny_model(seed=s).base_model, num_trainable_layers=1) for s in (0, 0, 1))
    assert share_lower(one, same) and not share_lower(one, other)
    assert not share_lower(one, Trunk(tiny_model().base_model, num_trainable_layers=2))
    assert not share_lower(one, Trunk(tiny_model().base_model))


@torch.no_grad()
def test_policy_logprobs_equal_the_models_own(tiny_model, tokenizer, architecture):
    model = tiny_model(architecture)
    policy = PolicyModel(model)
    examples = [encode(tokenizer, "Reverse the letters of abc", "cba"), Encoded((3, 4, 5, 6, 7), 2)]
    inputs = policy.trunk.inputs([e.ids for e in examples])
    target = response_targets(examples, inputs["attention_mask"].shape[1])
    result = policy(inputs, target, entropy=True)
    for row, example in enumerate(examples):
        logits = model(torch.tensor([example.ids])).logits[0].double()
        for place in range(example.prompt_length, len(example)):
            logprob = logits[place - 1].log_softmax(-1)
            assert result["logprob"][row, place - 1] == pytest.approx(float(logprob[example.ids[place]]), abs=2e-5)
            assert result["entropy"][row, place - 1] == pytest.approx(float(-(logprob.exp() * logprob).sum()), abs=2e-5)
    assert (result["logprob"][target < 0] == 0).all()


@torch.no_grad()
def test_reference_stays_when_the_policy_moves(tiny_model):
    policy = PolicyModel(tiny_model(), num_trainable_layers=1, value_head=True)
    reference = policy.reference()
    inputs = policy.trunk.inputs(SEQUENCES)
    target = torch.full(inputs["attention_mask"].shape, 5)
    before = reference(inputs, target)["logprob"]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(reference(inputs, target)["logprob"], before)
    assert not torch.allclose(policy(inputs, target)["logprob"], before)
    assert not any(p.requires_grad for p in reference.parameters())


def test_length_batches_cover_everything_within_bounds():
    lengths = [5, 1, 9, 3, 3, 12, 7]
    batches = length_batches(lengths, 12)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 12 for b in batches)


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        resolve_model(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("layers", [None, 1])
def test_conversions_reach_the_frozen_lower_blocks(tiny_model, architecture, layers):
    policy = PolicyModel(tiny_model(architecture), num_trainable_layers=layers).double()
    assert {p.dtype for p in policy.causal_lm.parameters()} == {torch.float64}
    assert policy.trunk.lower is None or {p.dtype for p in policy.trunk.lower.parameters()} == {torch.float64}


@pytest.mark.parametrize("padding", [None, 9])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embeddings_gradient_joins_the_heads(tiny_model, architecture, tied, padding):
    """Added in place, over two backward passes, to what autograd makes of it; the embedding of padding has none."""
    found = []
    for join in (False, True):
        model = tiny_model(architecture)
        embedding = model.get_input_embeddings()
        embedding.padding_idx = padding
        if tied:
            model.get_output_embeddings().weight = embedding.weight
        elif embedding.weight is model.get_output_embeddings().weight:
            model.get_output_embeddings().weight = torch.nn.Parameter(embedding.weight.detach().clone())
        policy = PolicyModel(model)
        if join:
            policy.join_tied_gradients()
            assert bool(embedding._forward_hooks) == tied
        for target in (6, 7):
            inputs = policy.trunk.inputs([[5, 6, 7, 5], [9, 10]])
            policy(inputs, torch.full((2, 4), target))["logprob"].sum().backward()
        found.append({name: p.grad for name, p in policy.named_parameters()})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=2e-5, rtol=1e-5)
