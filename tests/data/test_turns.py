"""What ends a turn: templates of several families, lists in a model's generation configuration, in every place."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Demonstration, ResponseSet
from stable_rlhf.data.turns import end_of_turn, ends_of_turn
from stable_rlhf.rollout.local import GenerationSettings, LocalRollouts, response_text
from stable_rlhf.run.datasets import encode_demonstrations
from stable_rlhf.run.stages import check_same_tokenizer
from stable_rlhf.scorer.metarm import encode_responses

_CHAT = "{% for m in messages %}{OPEN}{{ m['role'] }}\n{{ m['content'] | trim }}{CLOSE}{% endfor %}"


def with_template(tokenizer, template: str, *added: str, special: bool = True):
    """A copy with another chat template, and tokens of its own that are ``special`` or not."""
    from tokenizers import AddedToken

    found = copy.deepcopy(tokenizer)
    found.add_tokens([AddedToken(t, special=special, normalized=False) for t in added], special_tokens=special)
    found.chat_template = template
    return found


@pytest.fixture
def gemma(tokenizer):
    """A tokenizer whose template closes a turn with another token than its EOS."""
    template = _CHAT.replace("{OPEN}", "<bos>").replace("{CLOSE}", "<end_of_turn>\n")
    return with_template(tokenizer, template, "<end_of_turn>")


@pytest.mark.parametrize(
    ("close", "end"),
    [
        ("<|im_end|>\n", "<|im_end|>"),  # ChatML
        ("<end_of_turn>\n", "<end_of_turn>"),  # Gemma
        ("<|eot_id|>", "<|eot_id|>"),  # Llama 3
        (" <eos>", "<eos>"),  # Llama 2, Mistral
        ("\n", "<eos>"),  # nothing of its own
        ("{% if not loop.last %}<|eot_id|>{% endif %}", "<eos>"),
        ("\n### Input:", "<eos>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_a_template_closes_an_answer_with_a_token(tokenizer, close, end, special):
    mine = with_template(
        tokenizer, _CHAT.replace("{OPEN}", "<bos>").replace("{CLOSE}", close),
        "<|im_end|>", "<end_of_turn>", "<|eot_id|>", special=special,
    )  # fmt: skip
    wanted = mine.convert_tokens_to_ids(end)
    assert end_of_turn(mine) == wanted != mine.unk_token_id
    encoded = encode(mine, "Write abc", "cba")
    assert encoded.ids[-1] == wanted and len(encoded.response) == 4
    assert encode(mine, "Write abc", "").response == (wanted,)
    assert encode(mine, "Write abc", "", finished=False).response == ()


def test_ends_are_the_templates_the_tokenizers_and_the_models(tokenizer, gemma):
    close = gemma.convert_tokens_to_ids("<end_of_turn>")
    for named, more in ((None, []), (2, []), (7, [7]), ([2, 9, 8], [9, 8]), (torch.tensor([2, 9]), [9])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
        assert ends_of_turn(tokenizer, model) == (2, *more)
        assert ends_of_turn(gemma, model) == (close, 2, *more)
    gemma.chat_template = None  # what was found out belongs to the template
    assert ends_of_turn(gemma) == (2,)


@pytest.mark.parametrize("finished", [True, False])
def test_no_token_is_appended_to_what_was_cut_off_and_nothing_at_all_is_left_out(gemma, finished, capsys):
    rows = [Demonstration("Write a", text, meta={"finished": finished}) for text in ("b", "")]
    kept = encode_demonstrations(rows, gemma)
    assert [e.response for e, _ in kept] == [encode(gemma, "Write a", r.response, finished=finished).response
                                             for _, r in kept]  # fmt: skip
    assert [r.response for _, r in kept] == (["b", ""] if finished else ["b"])
    sets = [ResponseSet("Write a", ("b", "", "c"), meta={"finished": [True, finished, False]}),
            ResponseSet("Write b", ("b", ""), meta={"finished": [True, finished]})]  # fmt: skip
    read = encode_responses(sets, gemma, 99, 99)
    assert [len(row) for row in read] == ([3, 2] if finished else [2])
    assert all(e.response for row in read for e in row)
    assert ("cut off before their first token" in capsys.readouterr().err) is not finished


def test_policy_and_scorer_end_a_turn_alike(tokenizer, gemma):
    other = copy.deepcopy(gemma)
    check_same_tokenizer(gemma, other, "s")
    other.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match="ends a response with another token"):
        check_same_tokenizer(gemma, other, "s")


# -- stop strings that are or hold special tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "holds", "text"),
    [
        ("<sep>", True, "ab"),
        ("b<sep>", True, "a"),
        ("<sep>c", True, "ab"),
        ("c<eos>", True, "ab"),  # the special token before it is not part of the text
        ("bc", True, "a"),  # in the text without special tokens
        ("<bos>", False, "abc"),
    ],
)
def test_a_stop_string_with_special_tokens(tokenizer, tiny_model, stop, holds, text):
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "<sep>", "c", "<eos>")]
    assert response_text(tokenizer, ids, (stop,), (2,)) == text
    assert response_text(tokenizer, ids, ("zz", stop), (2,)) == text
    model = tiny_model()
    forced = iter(ids[:-1] + ids[-1:])

    class Forced(torch.nn.Module):
        """A head that answers with the tokens above."""

        weight, bias = model.lm_head.weight, None

        def forward(self, hidden):
            found = torch.full((*hidden.shape[:-1], len(tokenizer)), -9.0)
            found[..., next(forced, 2)] = 9.0
            return found

    model.lm_head = Forced()
    (rollout,) = LocalRollouts(model, tokenizer).sample([[5, 6]], GenerationSettings(9, 0.0, stop=(stop,)))
    assert rollout.finished and rollout.text == text
    shown = tokenizer.decode(rollout.encoded.response)
    assert (stop in shown or stop in shown.replace("<sep>", "")) is holds


def test_an_end_that_is_no_special_token_is_not_text(tokenizer):
    mine = with_template(tokenizer, _CHAT.replace("{OPEN}", "").replace("{CLOSE}", "<end>"), "<end>", special=False)
    ids = [*mine("ab", add_special_tokens=False)["input_ids"], end_of_turn(mine)]
    assert response_text(mine, ids, (), ends_of_turn(mine)) == "ab"
