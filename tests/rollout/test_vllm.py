"""The interface of rollouts, once over the policy itself and once over a vLLM server (a stub of its protocol)."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.vllm_stub import serving
from stable_rlhf.data.turns import ends_in_text, ends_of_turn
from stable_rlhf.rollout.local import GenerationSettings, LocalRollouts, _StopAtStrings, response_text
from stable_rlhf.rollout.vllm import VLLMRollouts

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8]]
SEEDS = [10, 11, 12, 13]


@pytest.fixture
def server(tiny_model, tokenizer):
    with serving(tiny_model(), tokenizer) as made:
        yield made


@pytest.fixture(params=["transformers", "vllm"])
def rollouts(request, tiny_model, tokenizer):
    if request.param == "transformers":
        return LocalRollouts(tiny_model(), tokenizer)
    return VLLMRollouts(request.getfixturevalue("server").url, tokenizer)


def model_logprobs(model, ids, prompt_length: int, temperature: float, top_p: float) -> list[float]:
    """By hand: each response token's log-probability at the temperature, among the nucleus alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, prompt_length - 1 : -1].float() / temperature
    found = []
    for row, token in zip(logits.softmax(-1), ids[prompt_length:], strict=True):
        kept = row.sort(descending=True)
        inside = kept.values.cumsum(0) - kept.values < top_p
        nucleus = {int(i): float(p) for i, p in zip(kept.indices[inside], kept.values[inside], strict=True)}
        found.append(float(torch.tensor(nucleus[token] / sum(nucleus.values())).log()))
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(rollouts, tiny_model, temperature, top_p):
    model = tiny_model()
    for rollout in rollouts.sample(PROMPTS, GenerationSettings(6, temperature, top_p), seeds=SEEDS):
        encoded = rollout.encoded
        expected = model_logprobs(model, encoded.ids, encoded.prompt_length, temperature, top_p)
        assert rollout.logprobs == pytest.approx(expected, abs=2e-5) and len(expected) == len(encoded.response)


def test_greedy_draws_have_no_logprobs(rollouts):
    assert all(r.logprobs is None for r in rollouts.sample(PROMPTS, GenerationSettings(3, temperature=0.0)))


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(rollouts, tokenizer):
    free = rollouts.sample(PROMPTS, GenerationSettings(12), seeds=SEEDS)
    text = free[0].text
    stop = text[2:4]
    cut = rollouts.sample(PROMPTS, GenerationSettings(12, stop=("no such thing", stop)), seeds=SEEDS)
    ended = 0
    for before, after in zip(free, cut, strict=True):
        whole = tokenizer.decode(before.encoded.response, skip_special_tokens=True)
        response = after.encoded.response
        assert response == before.encoded.response[: len(response)]
        assert after.logprobs == pytest.approx(before.logprobs[: len(response)], abs=1e-6)
        if stop in whole:
            ended += 1
            assert after.finished and after.text == whole[: whole.index(stop)]
            texts = [tokenizer.decode(r, skip_special_tokens=True) for r in (response, response[:-1])]
            assert stop in texts[0] and stop not in texts[1]
        else:
            assert (after.text, after.finished, response) == (before.text, before.finished, before.encoded.response)
    assert ended and len(cut[0].encoded.response) < 12


def test_a_stop_string_in_the_prompt_ends_nothing(rollouts, tokenizer):
    stop = tokenizer.decode([PROMPTS[1][-1]])
    free = rollouts.sample(PROMPTS[1:2], GenerationSettings(4), seeds=[1])
    assert stop not in free[0].text  # or this test says nothing
    assert rollouts.sample(PROMPTS[1:2], GenerationSettings(4, stop=(stop,)), seeds=[1]) == free


def test_neither_the_batch_nor_the_side_of_padding_changes_a_response(rollouts, tokenizer):
    settings = GenerationSettings(8, top_p=0.9)
    together = rollouts.sample(PROMPTS, settings, seeds=SEEDS)
    assert len({len(p) for p in PROMPTS}) > 2  # so that some are padded
    for prompt, seed, rollout in zip(PROMPTS, SEEDS, together, strict=True):
        (alone,) = rollouts.sample([prompt], settings, seeds=[seed])
        assert (alone.encoded, alone.text, alone.finished) == (rollout.encoded, rollout.text, rollout.finished)
        assert alone.logprobs == pytest.approx(rollout.logprobs, abs=1e-5)
    for side in ("left", "right"):
        rollouts.tokenizer = copy.deepcopy(tokenizer)
        rollouts.tokenizer.padding_side = side
        assert rollouts.sample(PROMPTS, settings, seeds=SEEDS) == together


def test_a_prompt_that_holds_eos_is_not_a_finished_response(rollouts, tokenizer):
    prompt = [5, tokenizer.eos_token_id, 6]
    (rollout,) = rollouts.sample([prompt], GenerationSettings(2), seeds=[3])
    assert rollout.encoded.ids[:3] == tuple(prompt)
    assert rollout.finished == (tokenizer.eos_token_id in rollout.encoded.response)


@pytest.mark.parametrize("named", ["a number", "a list", "the template", "a text"])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_every_end_that_model_or_template_has_ends_a_response(engine, named, tiny_model, tokenizer):
    model, settings = tiny_model(), GenerationSettings(8, temperature=0.0)
    free = LocalRollouts(model, tokenizer).sample(PROMPTS, settings)
    end = next(t for t in free[0].encoded.response[1:] if t != tokenizer.eos_token_id)
    eos = model.generation_config.eos_token_id
    if named == "the template":
        tokenizer = copy.deepcopy(tokenizer)
        text = tokenizer.decode([end])
        tokenizer.add_tokens([text])
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + text + "{% endfor %}"
    elif named == "a text":
        model.generation_config.stop_strings = tokenizer.decode([end])
    else:
        model.generation_config.eos_token_id = [eos, end] if named == "a list" else end
    with serving(model, tokenizer) as server:
        rollouts = LocalRollouts(model, tokenizer)
        if engine == "vllm":
            rollouts = VLLMRollouts(
                server.url, tokenizer, ends=ends_of_turn(tokenizer, model), stop=ends_in_text(model)
            )
        found = rollouts.sample(PROMPTS, settings)
    for before, after in zip(free, found, strict=True):
        tokens = before.encoded.response
        at = next((i for i, t in enumerate(tokens, start=1) if t in (eos, end)), None)
        assert after.encoded.response == tokens[:at] and after.finished == (at is not None)
        assert after.text == tokenizer.decode([t for t in tokens[:at] if t != end], skip_special_tokens=True)
    assert found[0].encoded.response[-1] == end


def test_seeds_are_needed_to_sample(rollouts):
    with pytest.raises(ValueError, match="seeds"):
        rollouts.sample(PROMPTS, GenerationSettings(2))


def test_the_models_own_generation_settings_do_not_leak_into_rollouts(tiny_model, tokenizer):
    """transformers takes what is left open from the model's generation_config.json."""
    model, settings = tiny_model(), GenerationSettings(10)
    plain = LocalRollouts(model, tokenizer).sample(PROMPTS, settings, seeds=SEEDS)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 1
    assert LocalRollouts(model, tokenizer).sample(PROMPTS, settings, seeds=SEEDS) == plain
    assert model.generation_config.repetition_penalty == 3.0  # and it is saved with the model as it was


# -- the server alone --------------------------------------------------------------------------------------------------


def test_the_server_samples_from_the_weights_that_it_was_given(server, tiny_model, tokenizer, tmp_path):
    rollouts, settings = VLLMRollouts(server.url, tokenizer), GenerationSettings(8)
    before = rollouts.sample(PROMPTS, settings, seeds=SEEDS)
    other = tiny_model(seed=5)
    other.save_pretrained(tmp_path)
    rollouts.load(tmp_path)
    after = rollouts.sample(PROMPTS, settings, seeds=SEEDS)
    assert after != before and server.loaded == [str(tmp_path)]
    assert [r.encoded for r in after] == [
        r.encoded for r in LocalRollouts(other, tokenizer).sample(PROMPTS, settings, seeds=SEEDS)
    ]


def test_what_a_server_may_do_wrong_is_one_clear_error(server, tiny_model, tokenizer, tmp_path):
    rollouts, settings = VLLMRollouts(server.url, tokenizer), GenerationSettings(60)
    with pytest.raises(
        ValueError, match=r"its context has 64 tokens, and prompt 1 has 5 .*max_new_tokens 60: raise --max"
    ):
        rollouts.sample(PROMPTS, settings, seeds=SEEDS)  # it would cut what does not fit, and say nothing
    tiny_model().save_pretrained(tmp_path)
    server.emptied = {"success": True}
    rollouts.load(tmp_path)
    server.emptied = {"success": False}
    with pytest.raises(ValueError, match=r"/reset_prefix_cache .*success is false, so it still holds"):
        rollouts.load(tmp_path)
    server.dev_mode = False
    with pytest.raises(ValueError, match=r"/collective_rpc is refused: 404 .*start it with VLLM_SERVER_DEV_MODE=1"):
        rollouts.load(tmp_path)
    server.knows_token_ids = False
    with pytest.raises(ValueError, match=r"an answer without token ids .*return_token_ids"):
        rollouts.sample(PROMPTS, GenerationSettings(2), seeds=SEEDS)
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=rf"vLLM server {url}: no answer to /v1/models, tried 1 .*is it up"):
        VLLMRollouts(url, tokenizer, retries=0)


def test_a_key_is_sent_with_every_request(server, tiny_model, tokenizer, tmp_path):
    server.key = "sk-stimmt"
    with pytest.raises(ValueError, match=r"/v1/models is refused: 401 .*rollout\.api_key_env names") as caught:
        VLLMRollouts(server.url, tokenizer, api_key="sk-stimmt-nicht")
    assert "stimmt" not in str(caught.value)
    rollouts = VLLMRollouts(server.url, tokenizer, api_key="sk-stimmt")
    tiny_model().save_pretrained(tmp_path)
    rollouts.load(tmp_path)
    assert len(rollouts.sample(PROMPTS, GenerationSettings(2), seeds=SEEDS)) == len(PROMPTS)


# -- stop strings and tokens that are not characters -------------------------------------------------------------------


class Pieces:
    """A tokenizer whose tokens are given pieces of bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "stop", "end", "text"),
    [
        ([b"la", b"s", b"to", b"pper", b"x"], "stop", 4, "la"),  # the completing token goes on after the string
        ([b"last", b"opera", b"x"], "stop", 2, "la"),  # and the first one begins before it
        ([b"a", b"\xc3", b"\xa9", b"b"], "é", 3, "a"),  # a character in two tokens
        ([b"w", b"ord", b" ", b"\n", b"\n", b"User:"], "\n\nUser:", 6, "word "),
        ([b"st", b"ap", b"st", b"ep"], "stop", None, "stapstep"),
        ([b"x" * 9] * 30 + [b"s", b"t", b"o", b"p"], "stop", 34, "x" * 270),  # far more text than is looked at
    ],
)
def test_where_a_stop_string_ends(pieces, stop, end, text):
    tokenizer, prompt = Pieces(*pieces, stop.encode()), len(pieces)  # the prompt is one token: the stop string itself
    stopper = _StopAtStrings(tokenizer, (stop,), 1, 2)
    ids = torch.tensor([[prompt, *range(len(pieces))], [prompt] + [0] * len(pieces)])
    said = [stopper(ids[:, : 1 + n], None).tolist() for n in range(1, len(pieces) + 1)]
    assert [row[0] for row in said] == [end is not None and n >= end for n in range(1, len(pieces) + 1)]
    assert not any(row[1] for row in said) and stopper.ends == [end, None]
    assert response_text(tokenizer, range(end or len(pieces)), (stop,)) == text
