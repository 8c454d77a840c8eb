"""A chat model as judge, against a server that answers as one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.chat_endpoint import Endpoint, longest
from stable_rlhf.data.records import PromptRow
from stable_rlhf.evaluate.chat import ChatJudge, read_verdict
from stable_rlhf.evaluate.judge import PairJudge, compare


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


def judge(endpoint: Endpoint, **settings: Any) -> ChatJudge:
    return ChatJudge(endpoint.url, "stub", **{"pause": 0.001, **settings})


def test_the_last_verdict_of_a_reply_counts() -> None:
    assert read_verdict("[[A]]") == 1
    assert read_verdict("<think>[[A]]?</think> so\n[[ b ]]") == -1
    assert read_verdict("[[Tie]]") == read_verdict("neither: [[C]]") == 0
    assert read_verdict("A is better") is read_verdict("") is None


def test_a_judge_that_means_it(endpoint: Endpoint) -> None:
    endpoint.reply = longest
    asked = judge(endpoint)
    assert isinstance(asked, PairJudge)
    rows = [PromptRow("p {0}"), PromptRow([{"role": "user", "content": "q"}]), PromptRow("r"), PromptRow("s")]
    got = compare(asked, rows, ["long one", "x", "same", "ab"], ["short", "xyz", "same", "ba"])
    assert got["verdicts"] == [1, -1, 0, 0]
    assert (got["win"], got["lose"], got["tie"], got["judge"]) == (0.25, 0.25, 0.5, "chat model stub")
    assert (got["asked"], got["order_agreement"], got["order_kappa"]) == (3, 1.0, 1.0)
    assert (got["first_position"], got["unreadable"]) == (0.5, 0)
    assert got["gold"] is None
    assert len(endpoint.seen) == 6  # equal answers are not asked about
    shown = [seen["messages"][0]["content"] for seen in endpoint.seen]
    assert sum("<request>\np {0}\n</request>" in text for text in shown) == 2
    assert sum("user: q" in text for text in shown) == 2


def test_a_judge_that_favours_a_place_decides_nothing(endpoint: Endpoint) -> None:
    endpoint.reply = lambda first, second: "[[A]]"
    got = judge(endpoint).verdicts(["p", "q"], ["a", "b"], ["c", "d"])
    assert got.values == [0, 0]
    assert (got.about["order_agreement"], got.about["first_position"]) == (0.0, 1.0)


def test_half_a_verdict_is_a_tie_and_unreadable_replies_are_told(endpoint: Endpoint) -> None:
    endpoint.reply = lambda first, second: "[[A]]" if first == "ours" else "I cannot say"
    got = judge(endpoint).verdicts(["p"], ["ours"], ["theirs"])
    assert got.values == [0]
    assert (got.about["unreadable"], got.about["order_agreement"]) == (1, 0.0)
    endpoint.reply = lambda first, second: "no idea"
    with pytest.raises(ValueError, match=r"no reply of 'stub' ends with \[\[A\]\].*'no idea'"):
        judge(endpoint).verdicts(["p"], ["a"], ["b"])


def test_nothing_to_ask(endpoint: Endpoint) -> None:
    got = judge(endpoint).verdicts(["p"], ["a"], ["a"])
    assert got.values == [0] and not endpoint.seen
    assert got.about == {
        "asked": 0,
        "order_agreement": None,
        "order_kappa": None,
        "first_position": None,
        "unreadable": 0,
    }


def test_replies_stay_with_their_pairs_when_they_come_out_of_order(endpoint: Endpoint) -> None:
    def slow(first: str, second: str) -> str:
        time.sleep(0.002 * (len(first) % 7))
        return longest(first, second)

    endpoint.reply = slow
    ours = ["x" * (1 + i % 5) for i in range(30)]
    theirs = ["y" * (1 + i % 3) for i in range(30)]
    wanted = [(len(a) > len(b)) - (len(a) < len(b)) for a, b in zip(ours, theirs, strict=True)]
    for workers in (1, 8):
        assert judge(endpoint, workers=workers).verdicts(["p"] * 30, ours, theirs).values == wanted


def test_what_is_sent(endpoint: Endpoint) -> None:
    judge(endpoint, api_key="secret", request={"temperature": 0.0, "seed": 3}).verdicts(["p"], ["a"], ["b"])
    for seen in endpoint.seen:
        assert seen["path"] == "/v1/chat/completions" and seen["key"] == "Bearer secret"
        assert (seen["model"], seen["temperature"], seen["seed"]) == ("stub", 0.0, 3)
    endpoint.seen.clear()
    ChatJudge(endpoint.url + "/", "stub").verdicts(["p"], ["a"], ["b"])
    assert {(seen["path"], seen["key"]) for seen in endpoint.seen} == {("/v1/chat/completions", None)}


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = longest
    endpoint.failures = [(503, {}), (429, {"Retry-After": "0"}), (500, {})]
    assert judge(endpoint, workers=1).verdicts(["p"], ["long"], ["s"]).values == [1]
    assert len(endpoint.seen) == 5
    endpoint.failures = [(503, {})] * 9
    with pytest.raises(ValueError, match="tried 3 times; the last: 503"):
        judge(endpoint, workers=1, retries=2).verdicts(["p"], ["a"], ["b"])


def test_refusals_are_errors_at_once_and_never_show_the_key(endpoint: Endpoint) -> None:
    endpoint.failures = [(401, {})] * 4
    with pytest.raises(ValueError, match=r"refused: 401 .*: busy or refused") as error:
        judge(endpoint, api_key="secret", workers=1).verdicts(["p"] * 9, ["a"] * 9, ["b"] * 9)
    assert "secret" not in str(error.value)
    assert len(endpoint.seen) <= 2  # what waited was not asked any more


def test_other_mistakes_are_named(endpoint: Endpoint) -> None:
    endpoint.raw = b"<html>a proxy</html>"
    with pytest.raises(ValueError, match=r"judge http.* is not JSON .*: <html>"):
        judge(endpoint).verdicts(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="no answer to /chat/completions, tried 1 times"):
        ChatJudge("http://127.0.0.1:9/v1", "stub", retries=0).verdicts(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match=r"judge_base_url must be an address"):
        ChatJudge("file:///etc", "stub")
    with pytest.raises(ValueError, match="has no name"):
        ChatJudge("http://x", "")
