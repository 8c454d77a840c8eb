"""Readers: every accepted format, every refusal with file, line and reason, and the published data where it is."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stable_rlhf.data import (
    Comparison,
    DataError,
    Demonstration,
    PairStrength,
    PromptRow,
    comparison_row,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_responses,
    write_jsonl,
)

PAIR = {"prompt": "Say hi", "chosen": "hi", "rejected": "no"}
RANKING = {"prompt": "Say hi", "responses": ["no", "hi", "hey"], "ranks": [2, 1, 1]}
USER = {"role": "user", "content": "Say hi"}
ASSISTANT = {"role": "assistant", "content": "hi"}
CHAT = [
    {"role": "system", "content": ""},
    USER,
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Again"},
]


def one(tmp_path: Path, row: Any, read: Any = read_comparisons) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (record,) = read(path).rows
    return record


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if turn[0] == 'H' else 'Assistant'}: {turn[1:]}" for turn in turns)


# Accepted formats.


def test_pair(tmp_path: Path) -> None:
    row = {
        **PAIR,
        "task": "greet",
        "margin": 2,
        "logprobs": {"chosen": [-0.5, 0], "rejected": [-1.5]},
        "alt_logprobs": {"chosen": [[-1, -2], [-3, 1e-7]], "rejected": [[-4], [-5.5]]},
        "agreement": 0.5,
        "skill": "kept",
    }
    assert one(tmp_path, row) == Comparison(
        prompt="Say hi",
        responses=("hi", "no"),
        pairs=((0, 1),),
        task="greet",
        margin=2.0,
        logprobs=((-0.5, 0.0), (-1.5,)),
        alt_logprobs=(((-1.0, -2.0), (-3.0, 1e-7)), ((-4.0,), (-5.5,))),
        source=f"{tmp_path / 'rows.jsonl'}:1",
        meta={"agreement": 0.5, "skill": "kept"},
    )


def test_optional_fields_may_be_absent_or_null(tmp_path: Path) -> None:
    nulls = dict.fromkeys(["task", "margin", "logprobs", "alt_logprobs"])
    assert one(tmp_path, {**PAIR, **nulls}) == one(tmp_path, PAIR)
    assert one(tmp_path, {**PAIR, "skill": "sort"}).task == "sort"


@pytest.mark.parametrize("chosen", ["hi", [ASSISTANT], [*CHAT, ASSISTANT]])
def test_pair_of_chats(tmp_path: Path, chosen: Any) -> None:
    comparison = one(tmp_path, {"prompt": CHAT, "chosen": chosen, "rejected": ""})
    assert comparison.prompt == CHAT
    assert comparison.responses == ("hi", "")


def test_text_prompt_may_be_repeated_in_the_chosen_chat(tmp_path: Path) -> None:
    comparison = one(tmp_path, {**PAIR, "chosen": [USER, ASSISTANT]})
    assert (comparison.prompt, comparison.responses) == ("Say hi", ("hi", "no"))


def test_pair_of_whole_chats_without_prompt(tmp_path: Path) -> None:
    rejected = [*CHAT, {"role": "assistant", "content": "no", "name": "ignored"}]
    comparison = one(tmp_path, {"chosen": [*CHAT, ASSISTANT], "rejected": rejected})
    assert (comparison.prompt, comparison.responses) == (CHAT, ("hi", "no"))


def test_ranking(tmp_path: Path) -> None:
    row = {
        **RANKING,
        "logprobs": [[-1], [-2], [-3]],
        "alt_logprobs": [[[-1]], [[-2]], [[-3]]],
        "margin": 0.5,
    }
    comparison = one(tmp_path, row)
    assert comparison.responses == ("no", "hi", "hey")
    assert comparison.pairs == ((1, 0), (2, 0))
    assert comparison.logprobs == ((-1.0,), (-2.0,), (-3.0,))
    assert comparison.alt_logprobs == (((-1.0,),), ((-2.0,),), ((-3.0,),))
    assert comparison.margin == 0.5
    row = {"prompt": "x", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}
    assert one(tmp_path, row).pairs == ((1, 0), (1, 2), (2, 0))


def test_equal_texts_of_equal_rank_are_no_contradiction(tmp_path: Path) -> None:
    assert one(tmp_path, {**RANKING, "responses": ["no", "hi", "hi"]}).pairs == ((1, 0), (2, 0))


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_a_response_of_zero_tokens_is_a_response(tmp_path: Path, key: str) -> None:
    alternates = {"chosen": [[-1]], "rejected": [[-1]], key: [[]]}
    comparison = one(tmp_path, {**PAIR, key: "", "alt_logprobs": alternates})
    empty = 0 if key == "chosen" else 1
    assert comparison.responses[empty] == ""
    assert comparison.alt_logprobs[empty] == ((),)
    assert one(tmp_path, {"prompt": "x", "response": ""}, read_demonstrations).response == ""


def test_hh_transcript(tmp_path: Path) -> None:
    common = ("HHello", "AHi. Human: is no turn\n\nnor is this", "HAnd?\n")
    chosen, rejected = transcript(*common, "A Good.\n\nBye "), transcript(*common, "A")
    comparison = one(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert comparison.prompt == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. Human: is no turn\n\nnor is this"},
        {"role": "user", "content": "And?"},
    ]
    assert comparison.responses == ("Good.\n\nBye", "")
    assert one(tmp_path, {"chosen": chosen.strip(), "rejected": rejected}).prompt == comparison.prompt


def test_hh_neighbouring_turns_of_one_speaker_are_one_message(tmp_path: Path) -> None:
    chosen, rejected = transcript("HHello", "HThere", "AOne", "ATwo"), transcript("HHello", "HThere", "AOne")
    comparison = one(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert comparison.prompt == [{"role": "user", "content": "Hello\n\nThere"}]
    assert comparison.responses == ("One\n\nTwo", "One")


def test_formats_are_told_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    hh = {"chosen": transcript("HHello", "AHi"), "rejected": transcript("HHello", "ANo")}
    assert write_jsonl(path, [PAIR, RANKING, hh]) == 3
    assert [len(row.responses) for row in read_comparisons(path).rows] == [2, 3, 2]


def test_demonstrations_and_prompts(tmp_path: Path) -> None:
    source = f"{tmp_path / 'rows.jsonl'}:1"
    row = {"prompt": CHAT, "response": [ASSISTANT], "task": "greet", "id": 3}
    assert one(tmp_path, row, read_demonstrations) == Demonstration(CHAT, "hi", "greet", source, {"id": 3})
    row = {"question": "1+1?", "answer": "2"}
    assert one(tmp_path, row, read_demonstrations) == Demonstration("1+1?", "2", None, source)
    assert one(tmp_path, row, read_prompts) == PromptRow("1+1?", None, source, {"answer": "2"})
    assert one(tmp_path, {"prompt": "p", "question": "q"}, read_prompts) == PromptRow(
        "p", None, source, {"question": "q"}
    )


# Files.


@pytest.mark.parametrize("compress", [False, True])
def test_bytes_of_the_wild(tmp_path: Path, compress: bool) -> None:
    """Byte-order mark, CRLF, blank lines, no last newline, and line separators that are no newlines in JSON."""
    rows = [{"prompt": "naïve 日本 😀"}, {"prompt": "a\u2028b\x85c"}]
    first, second = (json.dumps(row, ensure_ascii=False).encode() for row in rows)
    data = b"\xef\xbb\xbf" + first + b"\r\n\r\n  \t\n\n" + second
    path = tmp_path / ("rows.jsonl.gz" if compress else "rows.jsonl")
    path.write_bytes(gzip.compress(data, mtime=0) if compress else data)
    read = read_prompts(str(path)).rows
    assert [row.prompt for row in read] == [row["prompt"] for row in rows]
    assert [row.source for row in read] == [f"{path}:1", f"{path}:5"]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "b.jsonl", tmp_path / "a.jsonl.gz"]
    for path in paths:
        write_jsonl(path, [{"prompt": path.name}])
    assert [row.prompt for row in read_prompts(paths).rows] == ["b.jsonl", "a.jsonl.gz"]


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("none.jsonl", None, "no such file"),
        ("none.jsonl.gz", None, "no such file"),
        ("zero.jsonl", b"", "the file has no rows"),
        ("zero.jsonl.gz", b"", "the file has no rows"),
        ("blank.jsonl", b"\n \r\n", "the file has no rows"),
        ("bom.jsonl", b"\xef\xbb\xbf", "the file has no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "the file has no rows"),
        ("plain.jsonl.gz", b'{"prompt": "x"}\n', "not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 9, mtime=0)[:-12], "not a whole gzip file"),
        ("checksum.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n', mtime=0)[:-8] + b"\0" * 8, "not a whole gzip file"),
        ("stream.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "not a whole gzip file"),
        ("zipped.jsonl", gzip.compress(b'{"prompt": "x"}\n', mtime=0), "name must end in .gz"),
    ],
)
def test_bad_files_stop_in_both_modes(tmp_path: Path, name: str, data: bytes | None, reason: str, mode: Any) -> None:
    path, good = tmp_path / name, tmp_path / "good.jsonl"
    write_jsonl(good, [{"prompt": "x"}])
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_prompts([good, path], on_bad_row=mode)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_directory_no_file_and_wrong_mode(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}: is a directory"):
        read_comparisons(tmp_path)
    with pytest.raises(DataError, match="no data file was given"):
        read_comparisons([])
    with pytest.raises(ValueError, match='"error" or "skip", got \'ignore\''):
        read_comparisons(tmp_path / "x.jsonl", on_bad_row="ignore")  # type: ignore[arg-type]


# Bad rows.

BAD_LINES = [
    (b"{oops}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"prompt": "x"} {"prompt": "y"}', "not JSON: Extra data at column 17"),
    (b"[" * 100_000, "nested more than 100 deep"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    (b'{"prompt": "\xff"}', "not UTF-8 text: invalid start byte at byte 12"),
    (b"[1]", "expected a JSON object, found an array"),
    (b'"x"', "expected a JSON object, found a string"),
    (b"3", "expected a JSON object, found a number"),
    (b"NaN", "expected a JSON object, found a number"),
    (b"null", "expected a JSON object, found null"),
    (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "'prompt' holds half of a surrogate pair"),
]

BAD_COMPARISONS: list[tuple[dict[str, Any], str]] = [
    ({}, "expected the keys 'prompt', 'chosen', 'rejected', or 'prompt', 'responses', 'ranks'"),
    ({"prompt": "x"}, "expected the keys"),
    ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
    ({"prompt": "x", "rejected": "a"}, "'chosen' is missing"),
    ({**PAIR, "responses": ["a", "b"]}, "has keys of a pair"),
    ({**PAIR, "prompt": ""}, "'prompt' is empty"),
    *[
        ({**PAIR, "strength": value}, "'strength' must be an object with numbers 'mean' and 'std'")
        for value in (
            3,
            [],
            {"mean": 1},
            {"mean": 1, "std": -0.1},
            {"mean": True, "std": 0},
            {"mean": 1e300, "std": 0},
        )
    ],
    ({**PAIR, "strength": {"mean": float("nan"), "std": 0}}, "'strength.mean' holds NaN"),
    (
        {**RANKING, "strength": {"mean": 1, "std": 0}},
        "'strength' must be a list with one entry for each of the 2 pairs",
    ),
    (
        {**RANKING, "strength": [{"mean": 1, "std": 0}]},
        "'strength' must be a list with one entry for each of the 2 pairs",
    ),
    ({**PAIR, "prompt": " \n"}, "'prompt' is empty"),
    ({**PAIR, "prompt": None}, "'prompt' must be a string or a list of chat messages, not null"),
    ({**PAIR, "prompt": 3}, "'prompt' must be a string or a list of chat messages, not a number"),
    ({**PAIR, "chosen": {}}, "'chosen' must be a string or a list of chat messages, not an object"),
    ({**PAIR, "rejected": True}, "'rejected' must be a string or a list of chat messages, not a boolean"),
    ({**PAIR, "chosen": "no"}, "'chosen' and 'rejected' are the same text"),
    ({**PAIR, "chosen": "", "rejected": ""}, "'chosen' and 'rejected' are the same text"),
    ({**PAIR, "prompt": []}, "'prompt' is empty"),
    ({**PAIR, "prompt": ["x"]}, "'prompt[0]' must be a chat message with 'role' and 'content', not a string"),
    ({**PAIR, "prompt": [USER, ASSISTANT]}, "'prompt' must end with a user turn, its last role is assistant"),
    (
        {**PAIR, "prompt": [{"role": "human", "content": "x"}]},
        "'prompt[0]' has the role 'human', expected one of system",
    ),
    ({**PAIR, "prompt": [{"content": "x"}]}, "'prompt[0]' has the role None"),
    ({**PAIR, "prompt": [{"role": "user", "content": ""}]}, "'prompt[0].content' is empty"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "'prompt[0].content' must be a string, not null"),
    ({**PAIR, "chosen": []}, "'chosen' is empty"),
    ({**PAIR, "chosen": [USER]}, "'chosen' must be one assistant message"),
    ({**PAIR, "chosen": [{**USER, "content": "Other"}, ASSISTANT]}, "'chosen' must be one assistant message"),
    ({**PAIR, "task": 3}, "'task' must be a string, not a number"),
    ({**PAIR, "skill": ""}, "'skill' is empty"),
    ({**PAIR, "margin": "2"}, "'margin' must be a number, not a string"),
    ({**PAIR, "margin": True}, "'margin' must be a number, not a boolean"),
    ({**PAIR, "margin": 0}, "'margin' must be a number larger than 0 that float32 holds, got 0"),
    ({**PAIR, "margin": -1.5}, "'margin' must be a number larger than 0 that float32 holds, got -1.5"),
    ({**PAIR, "margin": float("nan")}, "'margin' holds NaN, which is no number"),
    ({**PAIR, "margin": float("inf")}, "'margin' holds a number that is infinite or too large"),
    ({**PAIR, "margin": 10**400}, "'margin' holds a number that is infinite or too large"),
    ({**PAIR, "margin": 1e300}, "'margin' must be a number larger than 0 that float32 holds, got 1e+300"),
    ({**PAIR, "logprobs": [[-1], [-1]]}, "'logprobs' must be an object with the keys 'chosen' and 'rejected'"),
    ({**PAIR, "logprobs": {"chosen": [-1]}}, "'logprobs' must be an object with the keys"),
    ({**PAIR, "logprobs": {"chosen": -1, "rejected": [-1]}}, "'logprobs of chosen' must be a list of numbers"),
    ({**PAIR, "logprobs": {"chosen": [True], "rejected": [-1]}}, "'logprobs of chosen' must be a list of numbers"),
    ({**PAIR, "logprobs": {"chosen": [-1], "rejected": [None]}}, "'logprobs of rejected' must be a list of numbers"),
    ({**PAIR, "logprobs": {"chosen": [-1], "rejected": [float("nan")]}}, "'logprobs.rejected[0]' holds NaN"),
    ({**PAIR, "logprobs": {"chosen": [-(10**400)], "rejected": [-1]}}, "'logprobs.chosen[0]' holds a number that is"),
    ({**PAIR, "logprobs": {"chosen": [-1e300], "rejected": [-1]}}, "holds -1e+300, which float32 does not hold"),
    ({**PAIR, "logprobs": {"chosen": [-1, 1e-5], "rejected": [-1]}}, "holds 1e-05; log-probabilities are at most 0"),
    ({**PAIR, "logprobs": {"chosen": [], "rejected": [-1]}}, "'logprobs of chosen' is empty, but its response is not"),
    ({**PAIR, "alt_logprobs": {"chosen": [], "rejected": []}}, "leave 'alt_logprobs' out for K = 0"),
    (
        {**PAIR, "alt_logprobs": {"chosen": [-1], "rejected": [-1]}},
        "'alt_logprobs of chosen[0]' must be a list of numbers",
    ),
    (
        {**PAIR, "alt_logprobs": {"chosen": [[-1], [-1]], "rejected": [[-1]]}},
        "'alt_logprobs of rejected' has K = 1 policies, chosen has K = 2",
    ),
    (
        {**PAIR, "alt_logprobs": {"chosen": [[-1], [-1, -2]], "rejected": [[-1], [-1]]}},
        "'alt_logprobs of chosen' have different numbers of tokens: 1, 2",
    ),
    (
        {
            **PAIR,
            "logprobs": {"chosen": [-1], "rejected": [-1, -2]},
            "alt_logprobs": {"chosen": [[-1]], "rejected": [[-1]]},
        },
        "'alt_logprobs of rejected' and 'logprobs' have different numbers of tokens: 1, 2",
    ),
    ({"prompt": "x", "responses": ["a", "b"]}, "'ranks' is missing"),
    ({"prompt": "x", "ranks": [1, 2]}, "'responses' is missing"),
    ({"responses": ["a", "b"], "ranks": [1, 2]}, "'prompt' is missing"),
    ({**RANKING, "responses": "ab"}, "'responses' must be a list, not a string"),
    ({**RANKING, "responses": ["a"], "ranks": [1]}, "'responses' needs at least two responses, got 1"),
    ({**RANKING, "responses": ["a", "b", 3]}, "'responses[2]' must be a string or a list of chat messages"),
    ({**RANKING, "ranks": [1, 2]}, "'ranks' has 2 entries for 3 responses"),
    ({**RANKING, "ranks": [1, 2, 2.5]}, "'ranks' must be a list of integers"),
    ({**RANKING, "ranks": [1, 2, True]}, "'ranks' must be a list of integers"),
    ({**RANKING, "ranks": None}, "'ranks' must be a list of integers"),
    ({**RANKING, "ranks": [1, 1, 1]}, "'ranks' are all equal (1), which is no preference"),
    ({**RANKING, "responses": ["hi", "hi", "no"]}, "responses[1] and responses[0] are the same text with different"),
    ({**RANKING, "logprobs": [[-1], [-1]]}, "'logprobs' must be a list with one entry for each of the 3 responses"),
    ({**RANKING, "alt_logprobs": [[[-1]], [[-1]], [[-1], [-1]]]}, "has K = 2 policies, responses[0] has K = 1"),
    ({"chosen": "a", "rejected": "b"}, "there is no 'prompt', and 'chosen' is not a transcript"),
    ({"chosen": transcript("HHello", "Aa"), "rejected": ""}, "'rejected' is empty"),
    (
        {"chosen": transcript("HHello", "Aa"), "rejected": "intro" + transcript("HHello", "Aa")},
        "'rejected' is not a transcr",
    ),
    (
        {"chosen": transcript("HHello"), "rejected": transcript("HHello", "Aa")},
        "'chosen' must end with an assistant turn",
    ),
    ({"chosen": transcript("HHello", "Aa"), "rejected": transcript("HHello", "A a ")}, "are the same text"),
    ({"chosen": transcript("Aa"), "rejected": transcript("Ab")}, "'prompt (the turns before the response)' is empty"),
    (
        {"chosen": transcript("Hx", "Aa", "Hy", "Ab"), "rejected": transcript("Hx", "Ac", "Hy", "Ab")},
        "differ from turn 2 on, before the last assistant turn",
    ),
    (
        {"chosen": transcript("Hx", "Aa", "Hy", "Ab"), "rejected": transcript("Hx", "Aa")},
        "differ from turn 2 on, before the last assistant turn",
    ),
    ({"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "?"}, ASSISTANT]}, "differ from turn 1 on"),
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES + [(json.dumps(row).encode(), reason) for row, reason in BAD_COMPARISONS]
)
def test_bad_comparisons_name_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PAIR).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    with pytest.raises(DataError) as caught:
        read_comparisons(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    result = read_comparisons(path, on_bad_row="skip")
    assert [row.source for row in result.rows] == [f"{path}:1", f"{path}:4"]
    assert [str(error) for error in result.skipped] == [str(caught.value)]


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (read_demonstrations, {"response": "a"}, "expected the keys 'prompt', 'response' or 'question', 'answer'"),
        (read_demonstrations, {"prompt": "x"}, "'response' is missing"),
        (read_demonstrations, {"prompt": "x", "answer": "a"}, "'response' is missing"),
        (read_demonstrations, {"question": "x"}, "'answer' is missing"),
        (read_demonstrations, {"question": "", "answer": "a"}, "'question' is empty"),
        (read_demonstrations, {"prompt": "x", "response": 3}, "'response' must be a string"),
        (read_demonstrations, {"prompt": "x", "response": [USER]}, "'response' must be one assistant message"),
        (read_prompts, {"text": "x"}, "'prompt' is missing"),
        (read_prompts, {"prompt": "\t"}, "'prompt' is empty"),
        (read_prompts, {"prompt": [ASSISTANT]}, "'prompt' must end with a user turn"),
        (read_prompts, {"prompt": "x", "task": []}, "'task' must be a string, not an array"),
    ],
)
def test_bad_demonstrations_and_prompts(tmp_path: Path, read: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        one(tmp_path, row, read)
    assert f"rows.jsonl:1: {reason}" in str(caught.value)


def test_k_agrees_over_the_file_set(tmp_path: Path) -> None:
    def with_k(k: int) -> dict[str, Any]:
        return {**PAIR, "alt_logprobs": {"chosen": [[-1]] * k, "rejected": [[-2]] * k}} if k else PAIR

    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for k, other in [(2, 1), (2, 0), (0, 2)]:
        write_jsonl(first, [with_k(k)])
        write_jsonl(second, [with_k(k), with_k(other)])
        with pytest.raises(DataError) as caught:
            read_comparisons([first, second])
        expected = f"{second}:2: 'alt_logprobs' has K = {other} policies, but K = {k} at {first}:1"
        assert str(caught.value).startswith(expected)
        result = read_comparisons([first, second], on_bad_row="skip")
        assert (len(result.rows), len(result.skipped)) == (2, 1)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    path.write_text("{}\n[]\n", encoding="utf-8")
    write_jsonl(good, [PAIR])
    with pytest.raises(DataError, match=f"^{path}: no row is left, all 2 are bad; the first: {path}:1: expected"):
        read_comparisons(path, on_bad_row="skip")
    assert len(read_comparisons([path, good], on_bad_row="skip").skipped) == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "chosen"]), inner),
    max_leaves=6,
)
_KEYS = ["prompt", "chosen", "rejected", "responses", "ranks", "margin", "logprobs", "alt_logprobs", "task", "response"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sampled_from([{}, PAIR, RANKING]), change=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=3))
def test_any_row_is_read_or_refused_by_name(tmp_path: Path, base: dict[str, Any], change: dict[str, Any]) -> None:
    for read in (read_comparisons, read_demonstrations, read_prompts, read_responses):
        try:
            record = one(tmp_path, {**base, **change}, read)
        except DataError as error:
            assert f"{tmp_path / 'rows.jsonl'}:1: " in str(error)
        else:
            assert record.prompt


def test_unlabelled_responses(tmp_path: Path) -> None:
    row = {"prompt": "x", "responses": ["a", "", "a"], "task": "t", "ranks": [1, 2, 3]}
    found = one(tmp_path, row, read_responses)
    assert (found.prompt, found.responses, found.task) == ("x", ("a", "", "a"), "t")
    assert found.meta == {"ranks": [1, 2, 3]} and found.source.endswith(":1")
    for bad, message in (
        ({"prompt": "x"}, "'responses' is missing"), ({"responses": ["a", "b"]}, "'prompt' is missing"),
        ({"prompt": "x", "responses": ["a"]}, "'responses' needs at least two responses, got 1"),
        ({"prompt": "x", "responses": "ab"}, "'responses' must be a list"),
        ({"prompt": "x", "responses": ["a", 3]}, r"'responses\[1\]' must be a string"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: {message}"):
            one(tmp_path, bad, read_responses)


# Writing.


def test_written_rows_read_back(tmp_path: Path) -> None:
    rows = [{"prompt": '日本\n\u2028 "x"', "n": i} for i in range(3)]
    plain, packed = tmp_path / "new" / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    for path in (plain, packed):
        assert write_jsonl(path, iter(rows)) == 3
        assert [{"prompt": row.prompt, **row.meta} for row in read_prompts(path).rows] == rows
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert "日本" in plain.read_text(encoding="utf-8")
    other = tmp_path / "other.jsonl.gz"
    write_jsonl(other, rows)
    assert other.read_bytes() == packed.read_bytes()
    assert packed.read_bytes()[4:8] == bytes(4)  # the header's time, which would tell two runs apart


def test_strength_of_pairs_and_rankings(tmp_path: Path) -> None:
    given = [{"mean": -1.5, "std": 0.25}, {"mean": 2, "std": 0}]
    assert one(tmp_path, {**PAIR, "strength": given[0]}).strength == (PairStrength(-1.5, 0.25),)
    assert one(tmp_path, {**RANKING, "strength": given}).strength == (PairStrength(-1.5, 0.25), PairStrength(2.0, 0.0))
    assert one(tmp_path, {**PAIR, "strength": None}).strength is None


STRENGTH = {"mean": -1.5, "std": 0.25}
LOGPROBS = {
    "logprobs": {"chosen": [-0.5], "rejected": [-1.5, 0]},
    "alt_logprobs": {"chosen": [[-1]], "rejected": [[-4, -2]]},
}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, **LOGPROBS, "task": "t", "margin": 2, "strength": STRENGTH, "agreement": 0.5, "denoise": [{}]},
        {
            **RANKING,
            "strength": [STRENGTH] * 2,
            "logprobs": [[-1], [-2], [-3]],
            "alt_logprobs": [[[-1]], [[-2]], [[-3]]],
        },
        {"prompt": CHAT, "responses": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 2]},
        {"prompt": "x", "responses": ["a", "b"], "ranks": [2, 1], "strength": [STRENGTH]},
        {"prompt": "x", "responses": ["a", "b"], "ranks": [7, 9], "strength": [STRENGTH]},
        {"chosen": transcript("HHello", "Aa"), "rejected": transcript("HHello", "Ab"), "skill": "s"},
    ],
)
def test_a_comparison_written_is_read_as_it_was(tmp_path: Path, row: dict[str, Any]) -> None:
    comparison = one(tmp_path, row)
    assert one(tmp_path, comparison_row(comparison)) == comparison


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, "\ud800"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [PAIR])
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"^{path}: cannot write row 2: "):
        write_jsonl(path, [PAIR, {"prompt": value}])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


# Documentation.


def test_the_examples_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```jsonl\n(.*?)```", text, flags=re.DOTALL)
    kinds = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block, encoding="utf-8")
        row = json.loads(block.splitlines()[0])
        if row.get("score") == 4:  # a response a row: both are one comparison
            (found,) = read_comparisons(path).rows
            assert found.responses == ("cba", "abc") and found.pairs == ((0, 1),)
            continue
        by_key = (("chosen ranks", read_comparisons), ("response answer", read_demonstrations),
                  ("responses", read_responses))  # fmt: skip
        read: Any = next((reader for keys, reader in by_key if {*keys.split()} & row.keys()), read_prompts)
        assert len(read(path).rows) == len(block.splitlines())
        kinds.append(read.__name__)
    assert kinds == ["read_comparisons"] * 4 + ["read_demonstrations"] * 2 + ["read_prompts", "read_responses"]


# Published data.


def test_published_pairs(data_dir: Path) -> None:
    result = read_comparisons(data_dir / "pairs.jsonl.gz")
    assert (len(result.rows), len(result.skipped)) == (2450, 0)
    assert all(row.task and row.pairs == ((0, 1),) and row.meta["source"] for row in result.rows)
    assert sum("agreement" in row.meta for row in result.rows) == 836


def test_published_transcripts(data_dir: Path) -> None:
    rows = read_comparisons(data_dir / "hh-rlhf-harmless-base.jsonl.gz").rows
    assert len(rows) == 2312
    for row in rows:
        assert isinstance(row.prompt, list)
        roles = [message["role"] for message in row.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert sum("" in row.responses for row in rows) == 4
    assert sum(any("\n\nAssistant:" in text for text in row.responses) for row in rows) == 0


def test_published_prompts_and_demonstrations(data_dir: Path) -> None:
    prompts = read_prompts(data_dir / "prompts.jsonl.gz").rows
    assert len(prompts) == 7885
    assert all(row.task for row in prompts)
    demonstrations = read_demonstrations(data_dir / "gsm8k-train.jsonl.gz").rows
    assert len(demonstrations) == 7473
    assert all("####" in row.response for row in demonstrations)
