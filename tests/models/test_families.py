"""Families whose configuration is not the plain one: projected embeddings, and text as one part of several."""

from __future__ import annotations

import copy

import pytest
import torch

from stable_rlhf.data.encoding import encode
from stable_rlhf.launch.memory import model_sizes
from stable_rlhf.models.loading import context_length, hidden_width, load_backbone, load_causal_lm
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.rollout.local import GenerationSettings, generate
from stable_rlhf.scorer import AdvantageModel


def projected_opt(tokenizer, width: int):
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=width, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def multimodal_gemma(tokenizer, width: int):
    from transformers import AutoModelForCausalLM, Gemma3Config

    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 999,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
            "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=[(projected_opt, 16), (projected_opt, 32), (multimodal_gemma, 16)],
                ids=["OPT projected", "OPT", "multimodal Gemma 3"])  # fmt: skip
def family(request, tokenizer):
    make, width = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(tokenizer, width).eval(), width


def test_heads_have_the_width_of_the_last_hidden_state(family, tokenizer, tmp_path):
    model, width = family
    assert hidden_width(model.config) == width == model.get_output_embeddings().in_features
    policy = PolicyModel(model, value_head=True)
    examples = [encode(tokenizer, "Write abc", "cba"), encode(tokenizer, "Write a", "a")]
    inputs = policy.trunk.inputs([e.ids for e in examples])
    target = torch.full(inputs["attention_mask"].shape, -100)
    target[:, 3] = 5
    found = policy(inputs, target)
    assert found["value"].shape == target.shape
    with torch.no_grad():
        wanted = model(torch.tensor([examples[0].ids])).logits[0, 3].log_softmax(-1)[5]
    torch.testing.assert_close(found["logprob"][0, 3], wanted, rtol=0, atol=1e-5)
    (rollout,) = generate(model, tokenizer, [examples[0].ids], GenerationSettings(3, 0.0))
    assert rollout.encoded.response

    # A scorer stands on the same decoder, from the policy's own files, and comes back from its folder.
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    scorer = AdvantageModel(load_backbone(str(tmp_path / "policy")), tokenizer).eval()
    pairs = (["Write abc", "Write a"], ["cba", "a"])
    scores = scorer.score(*pairs)
    scorer.save_pretrained(tmp_path / "scorer")
    assert torch.equal(AdvantageModel.from_pretrained(tmp_path / "scorer").score(*pairs), scores)
    assert torch.equal(scorer.trunk(**inputs), policy.trunk(**inputs))
    again = load_causal_lm(str(tmp_path / "policy"))
    assert torch.equal(again(torch.tensor([examples[0].ids])).logits, model(torch.tensor([examples[0].ids])).logits)


def test_the_texts_own_numbers_count(family):
    model, _ = family
    text = model.config.get_text_config()
    assert context_length(model.config) == text.max_position_embeddings
    for scorer in (True, False):
        sizes = model_sizes(copy.deepcopy(model.config), "here", None, scorer=scorer)
        assert (sizes.blocks, sizes.vocabulary, sizes.context) == (
            text.num_hidden_layers, text.vocab_size, text.max_position_embeddings,
        )  # fmt: skip


def test_the_text_part_of_a_multimodal_model_can_be_split(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = multimodal_gemma(tokenizer, 16).eval()
    ids = [[5, 6, 7, 8]]
    whole = PolicyModel(model)
    wanted = whole.trunk(**whole.trunk.inputs(ids))
    split = PolicyModel(model, num_trainable_layers=1)
    torch.testing.assert_close(split.trunk(**split.trunk.inputs(ids)), wanted, rtol=0, atol=1e-5)
