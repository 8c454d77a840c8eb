"""Servers that are slow, mistaken or hostile: one clear line within a bounded time, and nobody's key in it."""

from __future__ import annotations

import base64
import datetime
import gzip
import html
import json
import threading
import time
import urllib.parse
from typing import Any

import pytest

from helpers.raw_server import answering, forever, http
from stable_rlhf.evaluate.chat import ChatJudge
from stable_rlhf.rollout.local import GenerationSettings
from stable_rlhf.rollout.vllm import VLLMRollouts
from stable_rlhf.run.bounds import check
from stable_rlhf.run.evaluation import make_judge
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show import progress
from stable_rlhf.show.progress import console, printable, say
from stable_rlhf.system.http import Server, ServerError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MODELS = http({"data": [{"id": "policy"}]})


def server(url: str, **settings: Any) -> Server:
    plain = {"setting": "rollout.server", "timeout": 5.0, "timeout_setting": "rollout.timeout", "retries": 0}
    return Server("vLLM server", url, **{"pause": 0.001, **plain, **settings})


def one_line(error: BaseException, url: str) -> str:
    text = str(error)
    assert isinstance(error, ServerError) and url in text and "\n" not in text and len(text) < 1000, text
    assert printable(text, lines=False) == text
    return text


# -- time and size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        forever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02),  # in the header
        forever(HEAD + b"Content-Length: 999999\r\n\r\n[", b" ", 0.02),  # in the content
        forever(CHUNKED, b"1\r\n \r\n", 0.02),
        forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),  # as fast as it can, and never an answer
        forever(CHUNKED + b"2\r\n{}\r\n0\r\n", b"Trailer: x\r\n"),
        forever(b"", b"", 0.02),
    ],
    ids=["header", "content", "chunks", "continue", "trailers", "silence"],
)
def test_an_answer_has_a_whole_time(answer):
    with answering(answer) as slow:
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"tried 2 times; .*no whole answer within 0\.3 s; .*rollout\.timeout"):
            server(slow.url, timeout=0.3, retries=1).ask("/x")
        assert time.monotonic() - began < 30  # and not the hours that it would take


def test_a_wish_to_be_asked_later_is_granted_within_bounds():
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    wishes = ("3600", "1e9", "nan", "-5", "²", "7", "Wed, 21 Oct 2065 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT")
    with answering(*(http(b"", "429 Slow Down", Retry_After=wish) for wish in wishes), http({"a": 1})) as made:
        assert server(made.url, retries=9, pause=1.0).ask("/x", stop=Stop()) == {"a": 1}
    assert waits == [60.0, 60.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(
    "answer",
    [
        forever(HEAD + b"\r\n[", b" " * 65536),  # no length, no end
        forever(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
        http(b"[" + b" " * 300_000 + b"]"),
        http(gzip.compress(b" " * 50_000_000, mtime=0), Content_Encoding="gzip"),
    ],
    ids=["endless", "chunks", "long", "gzip"],
)
def test_an_answer_has_a_largest_size(answer):
    with answering(answer) as large, pytest.raises(ServerError, match="has more than 200,000 bytes") as caught:
        server(large.url, retries=3).ask("/x", limit=200_000)
    one_line(caught.value, large.url)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (http(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
        (http(b"\xff\xfe{\x00"), "not JSON"),
        (http(b'{"a": NaN}'), "NaN is no number"),
        (http(b"<html>\x1b[31m a proxy</html>", Content_Type="text/html"), "not JSON .*<html> a proxy"),
        (http(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", "no answer .*IncompleteRead"),
        (CHUNKED + b"5\r\n{", "no answer .*IncompleteRead"),
        (CHUNKED + b"zz\r\n{", "no answer"),
        (b"", "no answer .*closed"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "no answer"),
        (b"SSH-2.0-OpenSSH\r\n", "no answer .*SSH"),
        (http(b"{}")[:30], "no answer"),
        (http(gzip.compress(b"{}" * 999, mtime=0)[:30], Content_Encoding="gzip"), "no answer .*packed"),
        (http(b"x", Content_Encoding="br"), "no answer .*packed as 'br'"),
        (http(b"x", Content_Encoding="gzip"), "no answer"),
        (http({"detail": "\x1b]0;title\x07no\x9b31m\u202egood"}, "400 Bad"), "refused: 400 Bad"),
        (http(b"e" * 10_000_000, "500 Oh"), r"no answer .*500 Oh: e{300}…"),
        (http(b"", "302 Found", Location="http://user:pass@127.0.0.2/else"), r"sends to http://\*\*\*@127.0.0.2/else"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none(answer, problem):
    with answering(answer) as odd:
        with pytest.raises(ServerError, match=problem) as caught:
            server(odd.url).ask("/x", {})
        assert "pass" not in one_line(caught.value, odd.url)
        assert len(odd.seen) == 1


@pytest.mark.parametrize(
    "answer", [b'HTTP/1.0 200 OK\r\n\r\n{"a": 1}', http(gzip.compress(b'{"a": 1}', mtime=0), Content_Encoding="gzip"),
               CHUNKED + b'8\r\n{"a": 1}\r\n0\r\n\r\n'],
)  # fmt: skip
def test_what_is_unusual_and_right_is_read(answer):
    with answering(answer) as odd:
        assert server(odd.url).ask("/x") == {"a": 1}


def test_a_server_that_comes_back_is_asked_again():
    with answering(b"", b"garbage\r\n", http(b"", "503 Busy"), http({"a": 1})) as made:
        assert server(made.url, retries=3).ask("/x", {"q": 2}) == {"a": 1}
        assert [json.loads(seen.partition(b"\r\n\r\n")[2]) for seen in made.seen] == [{"q": 2}] * 4


def test_the_first_error_ends_all_that_wait():
    with answering(http(b"no", "403 No"), forever(b"", b"", 0.01)) as made:
        began = time.monotonic()
        with pytest.raises(ServerError, match="403"):
            server(made.url, timeout=600.0).ask_all("/x", [{}] * 50, lambda _, x: x, at_once=2, advance=lambda: None)
        assert len(made.seen) <= 3 and time.monotonic() - began < 60


# -- answers of a rollout engine ---------------------------------------------------------------------------------------


def choice(**changes: Any) -> dict[str, Any]:
    plain = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, -1]}, "finish_reason": "length"}
    return {k: v for k, v in {**plain, **changes}.items() if v != "absent"}


def logprobs(*values: Any) -> dict[str, Any]:
    return {"logprobs": {"token_logprobs": list(values)}}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (choice(token_ids=[5] * 50, **logprobs(*[-1.0] * 50)), "50 token ids .* where 1 to 6"),
        (choice(token_ids=[], **logprobs()), "0 token ids"),
        (choice(token_ids=[5], **logprobs(-1, -2)), "1 token ids with 2 log-probs"),
        *[(choice(token_ids=[5, bad]), "a token id must be a whole number from 0 to") for bad in
          (10**6, -1, 10**30, 5.0, "6", True, None, [6])],
        *[(choice(**logprobs(-1.0, bad)), "a log-prob must be a finite number of at most 0") for bad in
          (None, 0.5, "-1", True, 10**400, -(10**400), [])],
        (choice(logprobs=None), "without token ids and log-probs.*return_token_ids"),
        (choice(token_ids="absent"), "without token ids and log-probs.*return_token_ids"),
        (choice(token_ids={"5": 6}), "without token ids"),
        *[(choice(finish_reason=bad), "finish_reason must be") for bad in ("abort", None, 3, "absent")],
        ([], "one choice is wanted, got a list of 0"),
        ([choice(), choice()], "one choice is wanted, got a list of 2"),
        ([3], "one choice is wanted"),
        ({"choices": 5}, "one choice is wanted, got 5"),
        ({}, "one choice is wanted"),
        ({"choices": [choice()], "model": "other"}, "of model 'other', not of 'policy'"),
    ],
)  # fmt: skip
def test_what_a_rollout_engine_may_not_answer(answer, problem, tokenizer):
    if isinstance(answer, list) or "finish_reason" in answer or "token_ids" in answer:
        answer = {"choices": answer if isinstance(answer, list) else [answer]}
    with answering(MODELS, http(answer)) as made, pytest.raises(ServerError, match=problem) as caught:
        VLLMRollouts(made.url, tokenizer).sample([[1, 5]], GenerationSettings(6), seeds=[1])
    one_line(caught.value, made.url)


@pytest.mark.parametrize("token", [b"NaN", b"Infinity", b"-Infinity", b"-1e999"])
def test_numbers_that_json_does_not_have(token, tokenizer):
    body = b'{"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [%s]}, "finish_reason": "stop"}]}' % token
    with answering(MODELS, http(body)) as made, pytest.raises(ServerError, match=r"is no number|must be a finite"):
        VLLMRollouts(made.url, tokenizer).sample([[1, 5]], GenerationSettings(6), seeds=[1])


def test_a_right_answer_is_taken(tokenizer):
    with answering(MODELS, http({"choices": [choice()]})) as made:
        (rollout,) = VLLMRollouts(made.url, tokenizer).sample([[1, 5]], GenerationSettings(6), seeds=[1])
    assert (rollout.encoded.ids, rollout.logprobs, rollout.finished) == ((1, 5, 5, 6), (-0.5, -1.0), False)


@pytest.mark.parametrize("answer", [{"data": 5}, {"data": []}, {}, [], {"data": [5]}, {"data": [{"id": 5}]},
                                    {"data": [{"id": ""}]}, {"data": {"id": "x"}}, 3, None])  # fmt: skip
def test_a_list_of_models_that_is_none(answer, tokenizer):
    with (
        answering(http(answer)) as made,
        pytest.raises(ServerError, match="/v1/models is not what was asked") as caught,
    ):
        VLLMRollouts(made.url, tokenizer)
    one_line(caught.value, made.url)


# -- answers of a judge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [5, [], {}, {"choices": {}}, {"choices": []}, {"choices": [1]}, {"choices": [{"message": "[[A]]"}]},
     {"choices": [{"message": {}}]}, {"choices": [{"message": {"content": 1}}]},
     {"choices": [{"message": {"content": [{"text": "[[A]]"}]}}]},
     {"choices": [{"message": {"content": "[[A]]"}}] * 2}],
)  # fmt: skip
def test_what_a_judge_may_not_answer(answer):
    with answering(http(answer)) as made, pytest.raises(ServerError, match="is not what was asked for") as caught:
        ChatJudge(made.url, "m").verdicts(["p"], ["a"], ["b"])
    one_line(caught.value, made.url)


# -- secrets -----------------------------------------------------------------------------------------------------------

KEY = "sk-proj/a+b=c&d-0123456789"


@pytest.mark.parametrize("key", [KEY, "Basic " + base64.b64encode(b"user:geh/eim").decode()])
def test_a_server_that_echoes_the_key(key):
    login = base64.b64decode(key[6:]).decode() if key.startswith("Basic") else key
    quoted, packed = urllib.parse.quote(login, safe=""), base64.b64encode(login.encode()).decode()
    forms = [key, login, quoted, quoted.lower(), json.dumps(key), packed, login.partition(":")[2] or login,
             urllib.parse.quote(login), login.replace("/", "\\/"), html.escape(login), login.replace("/", "&#x2F;"),
             "".join(f"\\u{ord(letter):04X}" for letter in login), f"{key[:18]}…"]  # fmt: skip
    said = " ".join(["Incorrect API key", *forms, "end"]).encode()
    reply = {"choices": [{"message": {"content": said.decode()}}]}
    for answer in (http(said, "401 Unauthorized"), http(said, f"401 {key}"), http(said), http(b"", "302", Location=key),
                   http(reply), http(said * 99, "500 Oh")):  # fmt: skip
        with answering(answer) as made, pytest.raises(ServerError) as caught:
            ChatJudge(made.url, "m", api_key=key, retries=0).verdicts(["p"], ["a"], ["b"])
        text = one_line(caught.value, made.url)
        assert "***" in text
        for form in (*forms, login[:12], "geh"):
            assert form.strip('"') not in text
        assert key.encode() in made.seen[0]


def test_a_wait_that_has_an_end_is_progress():
    """Else a watchdog with less patience than the setting of the server would end the run first."""
    before = progress.marks()
    with answering(forever(b"", b"")) as made, pytest.raises(ServerError, match="no whole answer within"):
        server(made.url, timeout=0.5).ask("/x")
    assert progress.marks() > before


def test_a_key_never_follows_a_redirect():
    with answering(http({})) as other, answering(http(b"", "307 Go", Location=other.url)) as made:
        with pytest.raises(ServerError, match=rf"sends to {other.url}; give the address .* as rollout\.server"):
            server(made.url, key=KEY).ask("/x", {})
        assert not other.seen


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("evaluate.judge_base_url", "https://user:pa@ss/word@host/v1", r"'https://\*\*\*@host/v1' holds credentials"),
        ("rollout.server", "http://token@host:1", r"'http://\*\*\*@host:1' holds credentials"),
        ("title", "see https://user:password@host/x", r"title: 'see https://\*\*\*@host/x' holds credentials"),
        ("data.pairs", ["ok", "s3://user:password@host/x"], r"data\.pairs.*holds credentials"),
        ("evaluate.judge_base_url", "http://host/v1?key=1", "must be an address without query"),
        ("evaluate.judge_base_url", "http://host:port/v1", "must be an address"),
        ("evaluate.judge_base_url", "http:///v1", "must be an address"),
        ("evaluate.judge_base_url", "http://host/ v1\x1b[31m", "must be an address"),
        ("evaluate.judge_api_key_env", "sk-password", "the name of an environment variable, not the key itself"),
        ("evaluate.judge_request", {"api_key": "password"}, r"judge_request\.api_key: .*every record"),
        ("evaluate.judge_request", {"messages": []}, r"judge_request\.messages: .*cannot be set"),
        ("evaluate.judge_request", {"when": datetime.date(2026, 1, 1)}, r"judge_request\.when"),
        ("evaluate.judge_timeout", 0.0, r"judge_timeout must be above 0"),
        ("evaluate.judge_timeout", float("inf"), "judge_timeout"),
        ("rollout.timeout", 1e9, r"rollout\.timeout must be at most 86400"),
        ("rollout.timeout", float("nan"), "rollout.timeout"),
    ],
)  # fmt: skip
def test_settings_of_servers(setting, value, problem):
    recipe = Recipe()
    section, _, name = setting.rpartition(".")
    setattr(getattr(recipe, section) if section else recipe, name, value)
    with pytest.raises(ValueError, match=problem) as caught:
        check(recipe)
    for part in ("password", "pa@ss", "ss/word", "token"):
        assert part not in str(caught.value)


def test_max_tokens_is_no_secret():
    recipe = Recipe()
    recipe.evaluate.judge_request = {"temperature": 0.0, "max_tokens": 5, "max_completion_tokens": 5, "seed": 1}
    check(recipe)


def test_a_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    recipe = Recipe()
    recipe.evaluate.judge, recipe.evaluate.judge_model = "chat", "m"
    monkeypatch.setenv("MY_KEY", "  geheim\n")
    recipe.evaluate.judge_api_key_env = "MY_KEY"
    with answering(http({"choices": [{"message": {"content": "[[tie]]"}}]})) as made:
        recipe.evaluate.judge_base_url = made.url
        make_judge(recipe, None).verdicts(["p"], ["a"], ["b"])
        assert b"Authorization: Bearer geheim\r\n" in made.seen[0]
    monkeypatch.setenv("MY_KEY", "gehéim\x01")
    with pytest.raises(ValueError, match=r"evaluate\.judge_api_key_env: .*characters that no key has") as caught:
        make_judge(recipe, None)
    assert "geh" not in str(caught.value)
    recipe.evaluate.judge_api_key_env = "sk_geheim"
    with pytest.raises(ValueError, match=r"evaluate\.judge_api_key_env: .*is not set") as caught:
        make_judge(recipe, None)
    assert "geheim" not in str(caught.value)


# -- what reaches a terminal -------------------------------------------------------------------------------------------

ODD = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x08\x7f\u202ee\r\nf\ud800 é 漢"


def test_text_from_outside_moves_no_terminal(capsys):
    assert printable(ODD) == "abcde\nf\\ud800 é 漢"
    assert printable(ODD, lines=False) == "abcde f\\ud800 é 漢"
    say(ODD)
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("\x1b[2Jtitle"))
    table.add_column("\x1b[31mhead")
    table.add_row(Text("cell\x9b31m\x07"))
    console(width=40).print(table)
    said = "".join(capsys.readouterr())
    assert not any(c in said for c in "\x1b\x9b\x07\x08\u202e\r\ud800") and "cell" in said and "title" in said


@pytest.mark.parametrize("argument", ["--titel\x1b[31m", "--seed=\x1b[31mred", "--config=\x1b[2J.yaml", "\x1b[31mx"])
def test_errors_move_no_terminal(argument, capsys):
    from stable_rlhf.cli.commands import main

    with pytest.raises(SystemExit):
        main(["sft", argument])
    said = capsys.readouterr().err
    assert "\x1b" not in said and len(said.splitlines()) <= 2 and "stable-rlhf: error: " in said


SECRETS = ("HF_PASSWD", "HF_AUTH", "NCCL_CRED", "SLURM_JWT", "TORCH_SESSION", "STABLE_RLHF_PASSPHRASE", "DS_LOGIN",
           "HF_TOKEN", "CUDA_BEARER", "OMPI_MCA_anything", "TRITON_WHATEVER")  # fmt: skip


def test_the_environments_report_shows_what_is_known_to_be_no_secret(monkeypatch):
    from stable_rlhf.cli.environment import _variables

    for name in SECRETS:
        monkeypatch.setenv(name, "geheim")
    shown = {"HF_ENDPOINT": "https://user:geheim@host/x", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0,1"}
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    found = dict(_variables())
    assert all(found[name] == "(set, not shown)" for name in SECRETS)
    assert found["HF_ENDPOINT"] == "https://***@host/x" and found["NCCL_DEBUG"] == "INFO"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1" and "geheim" not in str(found)


def test_no_secret_goes_into_another_nodes_command_line(monkeypatch):
    from stable_rlhf.launch import torchrun as launch

    commands = []
    monkeypatch.setattr(launch, "is_local", lambda name: False)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, **_: commands.append(" ".join(command)))
    for name in SECRETS:
        monkeypatch.setenv(name, "geheim" if launch.SECRET_NAME.search(name) else "plain")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:geheim@host/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    launch.start_on(launch.Host("far", 1), ["true"])
    assert "geheim" not in commands[0] and "NCCL_DEBUG=INFO" in commands[0]
