"""Readers of data files, in any format of tables.py, into records.

Rows are checked when they are read, one at a time: a row that cannot be trained on stops the reader with
``file:row: reason`` (or is counted, with ``on_bad_row="skip"``), so that nothing downstream has to ask again.
The formats are described in docs/guide/data.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from stable_rlhf.data.jsonl import BadRow, bad, is_finite, kind_of, short
from stable_rlhf.data.records import (
    Comparison,
    DataError,
    Demonstration,
    LogProbs,
    Message,
    PairStrength,
    Prompt,
    PromptRow,
    ResponseSet,
    as_messages,
)
from stable_rlhf.data.tables import rows_of
from stable_rlhf.show.progress import say

Record = TypeVar("Record")
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
OnBadRow: TypeAlias = Literal["error", "skip"]
Columns: TypeAlias = Mapping[str, str] | None
Rows: TypeAlias = Iterator[tuple[int, Callable[[], dict[str, Any]]]]

_ROLES = ("system", "user", "assistant")
_MAX_FLOAT32 = 3.4028234e38
_MAX_LOGPROB = 1e-6  # rounding in the model that wrote them may leave log 1 a hair above 0
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class ReadResult(Generic[Record]):
    """What a reader returns: ``rows`` in file order, and the errors of the rows that were skipped."""

    rows: list[Record]
    skipped: list[DataError] = field(default_factory=list)


def read_comparisons(
    paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None
) -> ReadResult[Comparison]:
    """Read preference pairs, rankings and HH-RLHF transcripts; the format is told from each row's keys. Rows of one
    ``response`` and its ``score`` that follow each other with the same prompt are one ranking.

    Args:
        paths: one file or several: ``.jsonl``, ``.csv``, ``.parquet``, ``.arrow``, a folder, or ``hub:NAME:SPLIT``.
        on_bad_row: ``"error"`` stops at the first bad row, ``"skip"`` collects the errors in ``skipped``.
        columns: the files' names of columns by ours, where they are others: ``{"prompt": "instruction"}``.

    Raises:
        DataError: a file is missing, unreadable or without rows; a row is bad; or no row is left after skipping.
        ValueError: ``on_bad_row`` is neither value.
    """
    first_k: tuple[int, str] | None = None

    def parse(row: dict[str, Any], source: str) -> Comparison:
        nonlocal first_k
        comparison = _comparison(row, source)
        alternates = comparison.alt_logprobs
        k = len(alternates[0]) if alternates is not None else 0
        if first_k is None:
            first_k = (k, source)
        elif first_k[0] != k:
            bad(f"'alt_logprobs' has K = {k} policies, but K = {first_k[0]} at {first_k[1]}; all rows need the same K")
        return comparison

    return _read(paths, parse, on_bad_row, columns, joined=_by_prompt)


def read_demonstrations(
    paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None
) -> ReadResult[Demonstration]:
    """Read ``prompt``/``response`` (or ``completion``), ``question``/``answer`` or ``messages`` rows; arguments and
    errors as `read_comparisons`."""
    return _read(paths, _demonstration, on_bad_row, columns)


def read_scored(paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None) -> ReadResult[Demonstration]:
    """Read demonstrations with a number ``score`` in ``meta``; arguments and errors as `read_comparisons`."""
    return _read(paths, _scored, on_bad_row, columns)


def read_prompts(
    paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None, most: int = 0, seed: int = 0
) -> ReadResult[PromptRow]:
    """Read rows with a ``prompt`` (or ``question``); arguments and errors as `read_comparisons`.

    ``most``: keep so many of the rows (0: all), drawn evenly with ``seed`` while they pass, so that the rest is never
    in memory; in file order."""
    return _read(paths, _prompt_row, on_bad_row, columns, most=most, seed=seed)


def read_responses(paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None) -> ReadResult[ResponseSet]:
    """Read rows with a ``prompt`` and its unlabelled ``responses``; arguments and errors as `read_comparisons`."""
    return _read(paths, _response_set, on_bad_row, columns)


def tell_skipped(what: str, result: ReadResult[Any]) -> None:
    """Say how many bad rows were left out of ``what``, if any were, and why the first."""
    if result.skipped:
        say(f"  {what}: {len(result.skipped)} bad rows left out, the first: {result.skipped[0]}")


def comparison_row(row: Comparison) -> dict[str, Any]:
    """The row of a data file that `read_comparisons` reads as ``row`` again; what `denoise` sets is left out."""
    paired = row.pairs == ((0, 1),) and len(row.responses) == 2

    def by_response(values: Sequence[Any]) -> Any:
        return dict(zip(("chosen", "rejected"), values, strict=True)) if paired else list(values)

    columns: dict[str, Any] = {"prompt": row.prompt}
    if paired:
        columns |= by_response(row.responses)
    else:
        columns["responses"] = list(row.responses)
        columns["ranks"] = [1 + sum(worse == i for _, worse in row.pairs) for i in range(len(row.responses))]
    for name in ("task", "margin"):
        if getattr(row, name) is not None:
            columns[name] = getattr(row, name)
    for name in ("logprobs", "alt_logprobs"):
        if getattr(row, name) is not None:
            columns[name] = by_response(getattr(row, name))
    if row.strength is not None:
        entries = [asdict(strength) for strength in row.strength]
        columns["strength"] = entries[0] if paired else entries
    return columns | row.meta


def _read(
    paths: Paths, parse: Callable[[dict[str, Any], str], Record], on_bad_row: OnBadRow, columns: Columns, *,
    most: int = 0, seed: int = 0, joined: Callable[[Rows], Rows] = lambda rows: rows,
) -> ReadResult[Record]:  # fmt: skip
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row must be "error" or "skip", got {on_bad_row!r}')
    files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not files:
        raise DataError("no data file was given")
    result: ReadResult[Record] = ReadResult([], [])
    kept: list[tuple[int, Record]] = []  # with the place among all good rows
    count, generator = 0, Random(seed)
    for path in files:
        empty = True
        for number, read in joined(rows_of(path, columns)):
            empty = False
            source = f"{path}:{number}"
            try:
                record = parse(read(), source)
                # Vitter's algorithm R: every row is as likely as any other to be among those that are kept.
                place = len(kept) if not most or count < most else generator.randrange(count + 1)
                if place < (most or count + 1):
                    kept[place : place + 1] = [(count, record)]
                count += 1
            except BadRow as reason:
                error = DataError(f"{source}: {reason}")
                if on_bad_row == "error":
                    raise error from None
                result.skipped.append(error)
        if empty:
            raise DataError(f"{path}: the file has no rows")
    result.rows.extend(record for _, record in sorted(kept, key=lambda each: each[0]))
    if not result.rows:
        names = ", ".join(str(path) for path in files)
        raise DataError(f"{names}: no row is left, all {len(result.skipped)} are bad; the first: {result.skipped[0]}")
    return result


def _by_prompt(rows: Rows) -> Rows:
    """Scored responses that follow each other with the same prompt as one row, at the place of the first; other rows as
    they are."""
    group: list[dict[str, Any]] = []
    start = 0
    for number, read in rows:
        try:
            row = read()
        except BadRow:
            row = {}
        scored = {"prompt", "response", "score"} <= row.keys() and not {"chosen", "responses"} & row.keys()
        if group and not (scored and row["prompt"] == group[0]["prompt"]):
            yield start, partial(_one_of, group)
            group = []
        if scored:
            start, group = (start if group else number), [*group, row]
        else:
            yield number, partial(dict, row) if row else read
    if group:
        yield start, partial(_one_of, group)


def _one_of(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one prompt as one: of columns that are no response's own those that all agree on."""
    if len(group) == 1:
        bad("a 'response' with a 'score' needs another one of the same prompt in the next row to be compared with")
    for row in group:
        if not is_finite(row["score"]):
            bad(f"'score' must be a number, not {kind_of(row['score'])} (of the response {short(row['response'])})")
    first, *others = group
    kept = {k: v for k, v in first.items() if all(k in row and row[k] == v for row in others)}
    joined = {"responses": [row["response"] for row in group], "scores": [row["score"] for row in group]}
    return {k: v for k, v in kept.items() if k not in ("response", "score")} | joined


# Rows. Each function takes the keys it understands out of the row; what stays is the record's meta.


def _comparison(row: dict[str, Any], source: str) -> Comparison:
    _rank_by_score(row)
    _pair_by_preference(row)
    ranked = "responses" in row or "ranks" in row
    paired = "chosen" in row or "rejected" in row
    if ranked and paired:
        bad("has keys of a pair ('chosen', 'rejected') and of a ranking ('responses', 'ranks')")
    if not (ranked or paired):
        bad("expected the keys 'prompt', 'chosen', 'rejected', or 'prompt', 'responses', 'ranks'")
    prompt: Prompt
    labels: Sequence[str]
    if ranked:
        prompt = _prompt(_take(row, "prompt"), "prompt")
        responses = _responses(_take(row, "responses"), prompt)
        labels = [f"responses[{index}]" for index in range(len(responses))]
        pairs = _pairs(_take(row, "ranks"), responses)
    else:
        labels = ("chosen", "rejected")
        chosen, rejected = _take(row, "chosen"), _take(row, "rejected")
        if "prompt" in row:
            prompt = _prompt(row.pop("prompt"), "prompt")
            responses = (_response(chosen, "chosen", prompt), _response(rejected, "rejected", prompt))
        else:
            prompt, responses = _common_prompt(_conversation(chosen, "chosen"), _conversation(rejected, "rejected"))
        pairs = ((0, 1),)
        if responses[0] == responses[1]:
            bad("'chosen' and 'rejected' are the same text, which is no preference")
    logprobs = _optional(row, "logprobs", lambda value: _per_response_logprobs(value, responses, labels))
    alternates = _optional(row, "alt_logprobs", lambda value: _alternates(value, responses, labels, logprobs))
    strength = _optional(row, "strength", lambda value: _strength(value, pairs, paired))
    return Comparison(
        prompt=prompt,
        responses=responses,
        pairs=pairs,
        task=_task(row),
        margin=_optional(row, "margin", _margin),
        logprobs=logprobs,
        alt_logprobs=alternates,
        strength=strength,
        source=source,
        meta=row,
    )


def _rank_by_score(row: dict[str, Any]) -> None:
    """Of responses with ``scores``, larger is better."""
    if "responses" not in row or "ranks" in row or "scores" not in row:
        return
    scores = row.pop("scores")
    if not isinstance(scores, list) or not all(is_finite(score) for score in scores):
        bad("'scores' must be a list with one number a response")
    row["ranks"] = [1 + sum(other > score for other in scores) for score in scores]


def _pair_by_preference(row: dict[str, Any]) -> None:
    """Of ``response_1`` and ``response_2`` a ``preference`` below 0 is for the first, above 0 for the second."""
    if "preference" not in row or not {"response_1", "response_2"} <= row.keys():
        return
    preference = row.pop("preference")
    if not is_finite(preference):
        bad(f"'preference' must be a number, not {kind_of(preference)}")
    if preference == 0:
        bad("'preference' is 0, which is no preference")
    first, second = row.pop("response_1"), row.pop("response_2")
    row["chosen"], row["rejected"] = (first, second) if preference < 0 else (second, first)


def _demonstration(row: dict[str, Any], source: str) -> Demonstration:
    if "messages" in row and not {"prompt", "question"} & row.keys():
        *turns, last = _conversation(row.pop("messages"), "messages")
        row = {"prompt": turns, "response": last["content"], **row}
    if "prompt" not in row and "question" not in row:
        bad("expected the keys 'prompt', 'response' or 'question', 'answer'")
    prompt_key, response_key = ("prompt", "response") if "prompt" in row else ("question", "answer")
    if response_key not in row and "completion" in row:
        response_key = "completion"
    prompt = _prompt(row.pop(prompt_key), prompt_key)
    response = _response(_take(row, response_key), response_key, prompt)
    _boolean(row.get("finished"), "finished")
    return Demonstration(prompt=prompt, response=response, task=_task(row), source=source, meta=row)


def _scored(row: dict[str, Any], source: str) -> Demonstration:
    if row.get("score") is None:
        bad("'score' is missing; every candidate needs the scorer's value")
    for name in ("score", "entropy", "satisfaction", "length"):
        value = row.get(name)
        if value is not None and type(value) not in (int, float):
            bad(f"'{name}' must be a number, not {kind_of(value)}")
    if not 0 <= (row.get("satisfaction") or 0) <= 1:
        bad(f"'satisfaction' is a rate in [0, 1], got {row['satisfaction']}")
    return _demonstration(row, source)


def _response_set(row: dict[str, Any], source: str) -> ResponseSet:
    prompt = _prompt(_take(row, "prompt"), "prompt")
    responses = _responses(_take(row, "responses"), prompt)
    finished = row.get("finished")
    if finished is not None:
        if not isinstance(finished, list):
            bad(f"'finished' must be a list with one boolean a response, not {kind_of(finished)}")
        if len(finished) != len(responses):
            bad(f"'finished' has {len(finished)} entries for {len(responses)} responses")
        for index, value in enumerate(finished):
            _boolean(value, f"finished[{index}]")
    return ResponseSet(prompt=prompt, responses=responses, task=_task(row), source=source, meta=row)


def _prompt_row(row: dict[str, Any], source: str) -> PromptRow:
    key = "question" if "question" in row and "prompt" not in row else "prompt"
    return PromptRow(prompt=_prompt(_take(row, key), key), task=_task(row), source=source, meta=row)


# Fields.


def _take(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        bad(f"'{key}' is missing")
    return row.pop(key)


def _optional(row: dict[str, Any], key: str, parse: Callable[[Any], Record]) -> Record | None:
    value = row.pop(key, None)
    return None if value is None else parse(value)


def _text(value: Any, name: str, *, may_be_empty: bool = False, expected: str = "a string") -> str:
    if not isinstance(value, str):
        bad(f"'{name}' must be {expected}, not {kind_of(value)}")
    if not may_be_empty and not value.strip():
        bad(f"'{name}' is empty")
    return value


def _boolean(value: Any, name: str) -> None:
    if not isinstance(value, bool) and value is not None:
        bad(f"'{name}' must be true or false, not {kind_of(value)}")


def _task(row: dict[str, Any]) -> str | None:
    key = "task" if "task" in row else "skill"
    return _optional(row, key, lambda value: _text(value, key))


def _margin(value: Any) -> float:
    if type(value) not in (int, float):
        bad(f"'margin' must be a number, not {kind_of(value)}")
    if not 0 < value <= _MAX_FLOAT32:
        bad(f"'margin' must be a number larger than 0 that float32 holds, got {float(value):g}")
    return float(value)


def _strength(value: Any, pairs: Sequence[tuple[int, int]], paired: bool) -> tuple[PairStrength, ...]:
    """Of a pair an object, of a ranking a list of them in the order of its pairs."""
    entries = [value] if paired else value
    if not isinstance(entries, list) or len(entries) != len(pairs):
        bad(f"'strength' must be a list with one entry for each of the {len(pairs)} pairs")
    strengths = []
    for entry in entries:
        numbers: list[Any] = [entry.get(key) for key in ("mean", "std")] if isinstance(entry, dict) else [None]
        if any(type(n) not in (int, float) or abs(n) > _MAX_FLOAT32 for n in numbers) or numbers[1] < 0:
            bad("'strength' must be an object with numbers 'mean' and 'std' that float32 holds, 'std' at least 0")
        strengths.append(PairStrength(float(numbers[0]), float(numbers[1])))
    return tuple(strengths)


def _messages(value: list[Any], name: str) -> list[Message]:
    if not value:
        bad(f"'{name}' is empty")
    messages: list[Message] = []
    for index, message in enumerate(value):
        here = f"{name}[{index}]"
        if not isinstance(message, dict):
            bad(f"'{here}' must be a chat message with 'role' and 'content', not {kind_of(message)}")
        role = message.get("role")
        if role not in _ROLES:
            bad(f"'{here}' has the role {short(role)}, expected one of {', '.join(_ROLES)}")
        # Only a user has nothing to ask: a policy's earlier turn, like its response, may be empty.
        content = _text(message.get("content"), f"{here}.content", may_be_empty=role != "user")
        messages.append({"role": role, "content": content})
    return messages


def _prompt(value: Any, name: str) -> Prompt:
    if not isinstance(value, list):
        return _text(value, name, expected="a string or a list of chat messages")
    messages = _messages(value, name)
    if messages[-1]["role"] != "user":
        bad(f"'{name}' must end with a user turn, its last role is {messages[-1]['role']}")
    return messages


def _response(value: Any, name: str, prompt: Prompt) -> str:
    """A string; or one assistant message, before which the prompt's own messages may be repeated."""
    if not isinstance(value, list):
        return _text(value, name, may_be_empty=True, expected="a string or a list of chat messages")
    *before, last = _messages(value, name)
    if last["role"] != "assistant" or (before and before != as_messages(prompt)):
        bad(f"'{name}' must be one assistant message, alone or after the messages of the prompt")
    return last["content"]


def _responses(value: Any, prompt: Prompt) -> tuple[str, ...]:
    if not isinstance(value, list):
        bad(f"'responses' must be a list, not {kind_of(value)}")
    if len(value) < 2:
        bad(f"'responses' needs at least two responses, got {len(value)}")
    return tuple(_response(item, f"responses[{index}]", prompt) for index, item in enumerate(value))


def _pairs(ranks: Any, responses: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    if not isinstance(ranks, list) or any(type(rank) is not int for rank in ranks):
        bad("'ranks' must be a list of integers, 1 for the best")
    if len(ranks) != len(responses):
        bad(f"'ranks' has {len(ranks)} entries for {len(responses)} responses")
    order = range(len(ranks))
    pairs = tuple((better, worse) for better in order for worse in order if ranks[better] < ranks[worse])
    if not pairs:
        bad(f"'ranks' are all equal ({ranks[0]}), which is no preference")
    for better, worse in pairs:
        if responses[better] == responses[worse]:
            bad(f"responses[{better}] and responses[{worse}] are the same text with different ranks")
    return pairs


def _conversation(value: Any, name: str) -> list[Message]:
    """A whole conversation, as chat messages or as an HH-RLHF transcript."""
    messages = _messages(value, name) if isinstance(value, list) else _transcript(value, name)
    if messages[-1]["role"] != "assistant":
        bad(f"'{name}' must end with an assistant turn")
    return messages


def _transcript(value: Any, name: str) -> list[Message]:
    """Split at "\\n\\nHuman:" and "\\n\\nAssistant:"; neighbouring turns of one speaker become one message."""
    start, *parts = _TURN.split(_text(value, name).strip())
    if start or not parts:
        bad(f"there is no 'prompt', and '{name}' is not a transcript that starts with \"Human:\"")
    messages: list[Message] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        text = text.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def _common_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, tuple[str, str]]:
    *prompt, chosen_last = chosen
    *other, rejected_last = rejected
    if prompt != other:
        same = len(list(takewhile(lambda turns: turns[0] == turns[1], zip(prompt, other, strict=False))))
        bad(
            f"there is no 'prompt', and 'chosen' and 'rejected' differ from turn {same + 1} on, "
            "before the last assistant turn: they do not answer one prompt"
        )
    return _prompt(prompt, "prompt (the turns before the response)"), (chosen_last["content"], rejected_last["content"])


# Log-probabilities.


def _logprob_list(value: Any, name: str, response: str) -> LogProbs:
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        bad(f"'{name}' must be a list of numbers, one per token")
    values = tuple(map(float, value))
    if values and min(values) < -_MAX_FLOAT32:
        bad(f"'{name}' holds {min(values):g}, which float32 does not hold")
    if values and max(values) > _MAX_LOGPROB:
        bad(f"'{name}' holds {max(values):g}; log-probabilities are at most 0")
    if response and not values:
        bad(f"'{name}' is empty, but its response is not")
    return values


def _by_response(value: Any, name: str, labels: Sequence[str]) -> list[Any]:
    """The values in the order of the responses: pairs name them, rankings list them."""
    if labels[0] == "chosen":
        if not isinstance(value, dict) or value.keys() != set(labels):
            bad(f"'{name}' must be an object with the keys 'chosen' and 'rejected'")
        return [value[label] for label in labels]
    if not isinstance(value, list) or len(value) != len(labels):
        bad(f"'{name}' must be a list with one entry for each of the {len(labels)} responses")
    return value


def _per_response_logprobs(value: Any, responses: Sequence[str], labels: Sequence[str]) -> tuple[LogProbs, ...]:
    entries = _by_response(value, "logprobs", labels)
    return tuple(
        _logprob_list(entry, f"logprobs of {label}", response)
        for entry, label, response in zip(entries, labels, responses, strict=True)
    )


def _alternates(
    value: Any, responses: Sequence[str], labels: Sequence[str], logprobs: Sequence[LogProbs] | None
) -> tuple[tuple[LogProbs, ...], ...]:
    result: list[tuple[LogProbs, ...]] = []
    for index, entry in enumerate(_by_response(value, "alt_logprobs", labels)):
        name = f"alt_logprobs of {labels[index]}"
        if not isinstance(entry, list) or not entry:
            bad(f"'{name}' must be a list of K >= 1 lists of numbers; leave 'alt_logprobs' out for K = 0")
        policies = tuple(_logprob_list(item, f"{name}[{k}]", responses[index]) for k, item in enumerate(entry))
        if result and len(policies) != len(result[0]):
            bad(f"'{name}' has K = {len(policies)} policies, {labels[0]} has K = {len(result[0])}")
        # All policies score the same tokens, so the weights can be taken token by token.
        lengths = {len(policy) for policy in policies}
        if logprobs is not None:
            lengths.add(len(logprobs[index]))
        if len(lengths) > 1:
            also = " and 'logprobs'" if logprobs is not None else ""
            bad(f"'{name}'{also} have different numbers of tokens: {', '.join(map(str, sorted(lengths)))}")
        result.append(policies)
    return tuple(result)
