"""Lines of JSON: what can be written again is read, everything else is one error with file and line."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.data import DataError, read_comparisons, read_demonstrations, read_prompts, read_responses, write_jsonl
from stable_rlhf.data.jsonl import read_json, read_jsonl, to_json
from stable_rlhf.data.readers import read_scored

READERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (read_comparisons, {"prompt": "p", "chosen": "a", "rejected": "b"}),
    (read_demonstrations, {"prompt": "p", "response": "a"}),
    (read_scored, {"prompt": "p", "response": "a", "score": 1}),
    (read_prompts, {"prompt": "p"}),
    (read_responses, {"prompt": "p", "responses": ["a", "b"]}),
]
UNWRITABLE = {
    '"x": NaN': "'x' holds NaN",
    '"x": [1, {"y": -Infinity}]': "'x[1].y' holds a number that is infinite or too large",
    '"x": 1e999': "'x' holds a number that is infinite or too large",
    '"x": -1' + "0" * 400: "'x' holds a number that is infinite or too large",
    '"x": {"y": ["\\ud800"]}': "'x.y[0]' holds half of a surrogate pair",
    '"\\udfff": 1': "the key '\\udfff' holds half of a surrogate pair",
    '"prompt": "again"': "the key 'prompt' is given twice",
    '"x": {"y": 1, "y": 1}': "the key 'y' is given twice",
    '"' + "k" * 10**5 + '": NaN': "k' holds NaN",
    '"x": ' + "[" * 200 + "]" * 200: "nested more than 100 deep",
    '"x": ' + "[" * 10**5 + "]" * 10**5: "nested more than 100 deep",
    '"x": ' + '{"a":' * 150 + "1" + "}" * 150: "nested more than 100 deep",
}


@pytest.mark.parametrize(("read", "row"), READERS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_written_again_is_told_when_it_is_read(tmp_path: Path, read: Any, row: dict[str, Any]) -> None:
    good = json.dumps(row)
    for column, reason in UNWRITABLE.items():
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{good}\n\n{good[:-1]}, {column}}}\n{good}\n", encoding="utf-8")
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
        found = read(path, on_bad_row="skip")
        assert [row.source for row in found.rows] == [f"{path}:1", f"{path}:4"]
        assert [str(error) for error in found.skipped] == [str(caught.value)]


def test_other_columns_come_back_as_they_were(tmp_path: Path) -> None:
    """Among them numbers that float64 does not hold exactly, and characters at which str.splitlines breaks."""
    meta = {
        "id": 2**70 + 1,
        "deep": json.loads("[" * 90 + "]" * 90),
        "small": 5e-324,
        "ends": "\u2028\u2029\x85\v\f\x1c",
    }
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, [{"prompt": "a\u2028b", **meta}] * 2)
    first, second = read_prompts(path).rows
    assert (first.prompt, first.meta, second.meta) == ("a\u2028b", meta, meta)
    assert read_jsonl(path) == [{"prompt": "a\u2028b", **meta}] * 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \t\r\n{"prompt": 1}\r\n', ":4: 'prompt' must be a string or a list"),
        (b'{"prompt": "a"}\r{"prompt": "b"}', ":1: not JSON: Extra data"),
        (b'[{"prompt": "a"}, {"prompt": "b"}]', ":1: expected a JSON object, found an array; the file must hold one"),
        ('{"prompt": "a"}\n{"prompt": "é"}'.encode("latin-1"), ":2: not UTF-8 text: "),
        ('{"prompt": "a"}'.encode("utf-16"), ":1: not UTF-8 text: "),
        (b"\n \n", ": the file has no rows"),
        (b"", ": the file has no rows"),
    ],
)
def test_odd_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}{reason}")


def test_broken_archives(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    for content in (whole[:-20], whole[:60] + b"\0\0\0" + whole[63:], whole + b"rest", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{path}: not a whole gzip file: "):
            read_prompts(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "loop", "nothing"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """Told at once; a pipe would be waited for, a device read without end."""
    path, server = tmp_path / "rows.jsonl", socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        server.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    words = {"pipe": "a named pipe", "device": "a device", "socket": "a socket", "folder": "a directory"}
    with server, pytest.raises(DataError) as caught:
        read_prompts(path)
    expected = f"is {words[kind]}, expected a .jsonl" if kind in words else "no such file" if kind == "nothing" else ""
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "n" * 5000):
        with pytest.raises(DataError, match="cannot be read"):
            read_prompts(tmp_path / name)


def test_our_own_files_end_where_the_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "text": "a\u2028b"}\n{"step": 2, "te', encoding="utf-8")
    assert read_jsonl(path, torn_end=True) == [{"step": 1, "text": "a\u2028b"}]
    with pytest.raises(DataError, match=f"^{path}:2: not JSON: "):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "cannot be read as JSON"), ("[1]", "found an array"), ("{}", "has no 'chosen'"), ("[" * 10**5, "cannot be")],
)
def test_a_broken_file_of_our_own_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"^{path}: .*{reason}"):
        read_json(path, "chosen")


def test_json_that_is_written_has_no_nan() -> None:
    found = {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": "NaN"}
    assert json.loads(to_json(found), parse_constant=pytest.fail) == {"a": None, "b": [None, [1.5, None]], "c": "NaN"}


@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_finished_is_a_boolean(tmp_path: Path, value: Any) -> None:
    """`"false"` and 0 counted as finished, so that a cut-off answer was taught an end."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "p", "response": "r", "score": 1, "finished": value}])
    for read in (read_demonstrations, read_scored):
        with pytest.raises(DataError, match=":1: 'finished' must be true or false, not "):
            read(path)
    write_jsonl(path, [{"prompt": "p", "responses": ["a", "b"], "finished": [True, value]}])
    with pytest.raises(DataError, match=r":1: 'finished\[1\]' must be true or false, not "):
        read_responses(path)
    write_jsonl(path, [{"prompt": "p", "responses": ["a", "b"], "finished": value}])
    with pytest.raises(DataError, match=":1: 'finished' "):
        read_responses(path)


@pytest.mark.parametrize("name", ["score", "entropy", "satisfaction", "length"])
@pytest.mark.parametrize("value", ["1", True, [1]])
def test_criteria_are_numbers(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "p", "response": "r", "score": 1, name: value}])
    with pytest.raises(DataError, match=f":1: '{name}' must be a number, not "):
        read_scored(path)
