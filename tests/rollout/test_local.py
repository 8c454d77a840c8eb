"""Rollouts: reproducible prompt by prompt, right at the end of a response."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from stable_rlhf.rollout.local import GenerationSettings, generate

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8]]


def test_samples_do_not_depend_on_the_batch(tiny_model, tokenizer, architecture):
    model, settings = tiny_model(architecture), GenerationSettings(8, temperature=1.0)
    seeds = [10, 11, 12, 13]
    together = generate(model, tokenizer, PROMPTS, settings, seeds=seeds)
    alone = [generate(model, tokenizer, [p], settings, seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert [r.encoded.ids for r in together] == [r.encoded.ids for r in alone]
    other = generate(model, tokenizer, PROMPTS, settings, seeds=[20, 21, 22, 23])
    assert [r.encoded.ids for r in together] != [r.encoded.ids for r in other]


def test_sampling_follows_the_models_distribution(tiny_model, tokenizer):
    model = tiny_model()
    count = 3000
    drawn = generate(model, tokenizer, [PROMPTS[0]] * count, GenerationSettings(1, temperature=0.7), seeds=range(count))
    expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    found = Counter(r.encoded.response[0] for r in drawn)
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        assert found[token] / count == pytest.approx(p, abs=4 * (p * (1 - p) / count) ** 0.5)


def test_top_p_keeps_the_nucleus(tiny_model, tokenizer):
    model = tiny_model()
    drawn = generate(model, tokenizer, [PROMPTS[0]] * 300, GenerationSettings(1, top_p=0.3), seeds=range(300))
    probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((probabilities.values.cumsum(0) < 0.3).sum()) + 1
    assert {r.encoded.response[0] for r in drawn} <= set(probabilities.indices[:size].tolist())


def test_greedy_equals_plain_generate(tiny_model, tokenizer):
    model = tiny_model()
    ours = generate(model, tokenizer, [PROMPTS[1]], GenerationSettings(6, temperature=0))[0]
    plain = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[0].tolist()  # fmt: skip
    assert list(ours.encoded.ids) == plain[: len(ours.encoded.ids)]


def test_response_ends_at_the_first_eos_even_when_pad_is_eos(tiny_model, tokenizer):
    import copy

    model = tiny_model()
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    with torch.no_grad():  # make EOS likely, so that some responses end early
        row = model.get_output_embeddings().weight
        row[same.eos_token_id] = row.mean(0) * 0
    rollouts = generate(model, same, PROMPTS * 20, GenerationSettings(12), seeds=range(80))
    eos = same.eos_token_id
    assert any(r.finished for r in rollouts) and len({len(r.encoded.response) for r in rollouts}) > 1
    for rollout in rollouts:
        response = rollout.encoded.response
        assert response.count(eos) == int(rollout.finished) and (not rollout.finished or response[-1] == eos)
        assert 1 <= len(response) <= 12 and (rollout.finished or len(response) == 12)


def test_bad_settings_are_named(tiny_model, tokenizer):
    for kwargs, name in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=name):
            GenerationSettings(**kwargs)
    with pytest.raises(ValueError, match="seeds"):
        generate(tiny_model(), tokenizer, PROMPTS, GenerationSettings(2))
