"""The scorer: where scores are read, what they are invariant to, and that they survive a save."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.scorer import AdvantageModel, ScorerSettings

PROMPTS = [
    "Reverse the letters of abcd",
    "Sort the letters of dcb",
    "Reverse the letters of zyx",
    "Sort the letters of ba",
]
RESPONSES = ["dcba", "b", "", "abababab"]


@pytest.fixture
def make(tiny_model, tokenizer):
    def build(architecture="llama", objective="am", tokenizer=tokenizer, **settings):
        n = settings.pop("num_policies", 1)
        settings = ScorerSettings(objective=objective, num_policies=n, **settings)
        return AdvantageModel(tiny_model(architecture).base_model, tokenizer, settings).eval()

    return build


def test_score_ignores_padding_side_batch_size_and_neighbours(make, tokenizer, architecture):
    model = make(architecture)
    examples = [encode(tokenizer, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    alone = torch.stack([model.score_encoded([e])[0] for e in examples])
    for side in ("left", "right"):
        for tokens in (1, 40, 10_000):
            together = model.score_encoded(examples, max_tokens=tokens, side=side)
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert alone.std() > 1e-3  # the check above could not fail on constant scores


def test_pad_equal_to_eos_changes_nothing(make, tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    torch.testing.assert_close(
        make(tokenizer=same).score(PROMPTS, RESPONSES), make().score(PROMPTS, RESPONSES), rtol=0, atol=0
    )


@torch.no_grad()
def test_reward_is_read_at_the_last_response_token_and_expectation_at_the_last_prompt_token(make):
    model = make()
    examples = [Encoded((3, 4, 5, 6, 7, 8), 2), Encoded((9, 8, 7), 1)]
    reward, expected = model(*model.prepare(examples))
    for i, example in enumerate(examples):
        hidden = model.trunk.backbone(torch.tensor([example.ids])).last_hidden_state[0]
        assert reward[i] == pytest.approx(float(model.reward_head(hidden[len(example) - 1])), abs=1e-5)
        assert expected[i] == pytest.approx(float(model.expected_head(hidden[example.prompt_length - 1])), abs=1e-5)


def test_a_token_after_the_end_would_change_the_score(make):
    # Guards the guard: the position matters, so reading one token late is visible.
    model = make()
    short, late = Encoded((3, 4, 5, 6), 2), Encoded((3, 4, 5, 6, 7), 2)
    assert abs(float(model.score_encoded([short]) - model.score_encoded([late]))) > 1e-4


@pytest.mark.parametrize(("n", "k"), [(1, 0), (3, 2), (5, 1)])
@torch.no_grad()
def test_inference_scores_follow_equation_8_without_alternates(make, n, k):
    model = make(num_policies=n, num_alternates=k)
    example = Encoded((3, 4, 5, 6, 7), 3)
    reward, expected = model(*model.prepare([example]))
    assert float(model.score_encoded([example])) == pytest.approx(float((n - k) / n * (reward - expected)), abs=1e-6)


@torch.no_grad()
def test_reward_model_scores_the_reward(make):
    model = make(objective="rm")
    example = Encoded((3, 4, 5, 6, 7), 3)
    assert model.expected_head is None
    assert float(model.score_encoded([example])) == float(model(*model.prepare([example]))[0])


def test_save_and_load_keep_scores_and_plain_transformers_loads_the_backbone(make, tmp_path, architecture):
    model = make(architecture, num_policies=3, num_alternates=2, margin=1.5)
    scores = model.score(PROMPTS, RESPONSES)
    model.save_pretrained(tmp_path)
    again = AdvantageModel.from_pretrained(tmp_path)
    assert torch.equal(again.score(PROMPTS, RESPONSES), scores) and again.settings == model.settings
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == {"score.weight"}  # the reward head as a classifier has it
    trained = model.trunk.backbone.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in backbone.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == model.tokenizer.get_vocab()


def test_loading_what_is_not_there_is_an_error(make, tmp_path):
    with pytest.raises(ValueError, match=r"advantage_model\.json"):
        AdvantageModel.from_pretrained(tmp_path / "nowhere")
    make().save_pretrained(tmp_path)
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        AdvantageModel.from_pretrained(tmp_path)


def test_bad_calls_are_named(make):
    model = make()
    with pytest.raises(ValueError, match="same length"):
        model.score(PROMPTS, RESPONSES[:1])
    with pytest.raises(ValueError, match="context"):
        model.score([PROMPTS[0]], ["a" * (model.max_length + 1)])
    with pytest.raises(ValueError, match="N >= K"):
        ScorerSettings(num_policies=1, num_alternates=2)
    with pytest.raises(ValueError, match="objective"):
        ScorerSettings(objective="dpo")
