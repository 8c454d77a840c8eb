"""Rows and chat templates: one that refuses a row, and none at all."""

from __future__ import annotations

import copy
import json
import signal

import pytest

from stable_rlhf.data import encoding as packing
from stable_rlhf.data import templates
from stable_rlhf.data.encoding import encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.readers import read_comparisons, read_responses
from stable_rlhf.data.records import DataError, PromptRow, RowError
from stable_rlhf.run.datasets import load_demonstrations, load_prompts
from stable_rlhf.run.evaluation import that_judge_reads
from stable_rlhf.scorer.comparisons import encode_comparisons
from stable_rlhf.scorer.metarm import encode_responses
from stable_rlhf.settings.recipe import DataArguments

GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
USER = {"role": "user", "content": "Write a"}
GOOD = [USER]
REFUSED = {
    "System role not supported": [{"role": "system", "content": "Be brief"}, USER],
    "Conversation roles must alternate": [USER, USER],
}


@pytest.fixture
def gemma(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.chat_template = GEMMA
    return found


def prompts(path, tokenizer, skip):
    arguments = DataArguments(prompts=[str(path)], on_bad_row=skip, forget_tasks=["x"], eval_prompts=1)
    return load_prompts(arguments, tokenizer, 0)


def demonstrations(path, tokenizer, skip):
    return load_demonstrations(DataArguments(on_bad_row=skip), [str(path)], tokenizer)[0]


def comparisons(path, tokenizer, skip):
    return encode_comparisons(read_comparisons(path).rows, tokenizer, 64, 64, on_bad_row=skip)[0]


def responses(path, tokenizer, skip):
    return encode_responses(read_responses(path).rows, tokenizer, 64, 64, on_bad_row=skip)


@pytest.mark.parametrize("words", list(REFUSED))
@pytest.mark.parametrize(
    ("load", "columns"),
    [
        (prompts, {}),
        (demonstrations, {"response": "a"}),
        (comparisons, {"chosen": "a", "rejected": "b"}),
        (responses, {"responses": ["a", "b"]}),
    ],
)
def test_a_row_that_the_template_refuses_is_told_or_skipped(gemma, tmp_path, capsys, load, columns, words):
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": "user", "content": f"Write {c}"}] for c in "abcdef"]
    rows = [{"prompt": chat, "task": "xy"[i % 2], **columns} for i, chat in enumerate(chats)]
    rows.insert(2, {"prompt": REFUSED[words], "task": "x", **columns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{path}:3: the chat template refuses this row: {words}"):
        load(path, gemma, "error")
    capsys.readouterr()
    load(path, gemma, "skip")
    assert f"1 bad rows left out, the first: {path}:3: the chat template refuses" in capsys.readouterr().err
    path.write_text(json.dumps(rows[2]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"no row is left, all 1 are bad; the first: {path}:1: .*{words}"):
        load(path, gemma, "skip")


def test_a_prompt_that_only_the_judges_template_refuses_is_told_before_sampling(gemma, tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    gemma.save_pretrained(tmp_path)
    refused = REFUSED["System role not supported"]
    prompts = [EncodedPrompt(PromptRow(p, source=f"a.jsonl:{i}"), [1]) for i, p in enumerate([GOOD, refused, GOOD])]
    with pytest.raises(RowError, match=r"^a\.jsonl:1: scorer '.*': the chat template refuses this row: System role"):
        that_judge_reads(str(tmp_path), prompts)
    assert that_judge_reads(str(tmp_path), prompts, "skip") == [prompts[0], prompts[2]]
    assert "1 bad rows left out, the first: a.jsonl:1" in capsys.readouterr().err


def test_a_template_that_makes_no_end_of_some_rows_refuses_those(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_ROW_SECONDS", 0.2)
    mine, loop = copy.deepcopy(tokenizer), "{% for i in range(99999) %}"
    mine.chat_template = f"{{% if messages[0].content == 'b' %}}{3 * loop}{3 * '{% endfor %}'}{{% endif %}}c"
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(RowError, match=r"^a\.jsonl:2: the chat template refuses this row: .*did not end within 0\.2"):
        encode_prompt(mine, "b", source="a.jsonl:2")
    assert encode_prompt(mine, "a") == [mine.convert_tokens_to_ids("c")]
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_without_a_template_lost_roles_are_told_once(tokenizer, capsys, monkeypatch):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    encode_prompt(plain, "Write a", source="a.jsonl:1")
    encode_prompt(plain, GOOD, source="a.jsonl:2")  # one user turn is its text
    assert capsys.readouterr().err == ""
    for chat in (*REFUSED.values(), GOOD):
        encode_prompt(plain, chat, source="a.jsonl:7")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a.jsonl:7: the tokenizer" in said and "no chat template" in said and "who says what is lost" in said
    encode_prompt(tokenizer, REFUSED["Conversation roles must alternate"])  # a template keeps them
    assert capsys.readouterr().err == ""
    assert plain in packing._told_of_roles and tokenizer not in packing._told_of_roles


def test_a_prompt_without_tokens_is_a_row_error(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(RowError, match=r"^a\.jsonl:4: the prompt '' has no tokens"):
        encode_prompt(plain, "", source="a.jsonl:4")
