"""Rewards of one's own: functions that score a step's responses, beside the scorer or in its place.

A function is called once a step and rank, by keyword and as TRL calls its ``reward_funcs``: ``prompts``,
``completions`` (text, or one assistant message where the prompt is a chat), ``completion_ids``, ``trainer_state`` and
every other column of the prompts' rows, each a list; and ``responses``, which are always text. It gets what it has
parameters for, and returns a number a response, or None where it does not apply. Functions keep no state here, so a
resumed run calls them as an unbroken one does.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from stable_rlhf.data.records import PromptRow
from stable_rlhf.policy.reward_rules import built_in
from stable_rlhf.ranks import sum_over_ranks, together
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.settings.stages import EXACT_NUMBER, SCORER, RewardArguments
from stable_rlhf.show.progress import say
from stable_rlhf.system import plugins

_SETTING = "rewards.functions"
_OFFERED = ("prompts", "completions", "completion_ids", "responses", "trainer_state")
_PROBED = 2  # rows that a function is tried on before the first step


@dataclass(frozen=True)
class _Failure:
    """Why there is no reward of one row."""

    reason: str


_Value = float | None | _Failure


@dataclass(frozen=True)
class _Function:
    name: str
    call: Callable[..., Any]

    @property
    def is_async(self) -> bool:
        call = self.call if inspect.isroutine(self.call) else getattr(self.call, "__call__", None)  # noqa: B004
        return inspect.iscoroutinefunction(call)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.call).parameters
        except (
            TypeError,
            ValueError,
        ):  # some that are written in C say nothing of themselves
            return {}

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Parameters that it must be given and that nothing has."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [n for n, p in self.parameters.items() if p.kind in named and p.default is p.empty]
        return [name for name in needed if name not in columns and name not in _OFFERED]

    def arguments(self, offered: dict[str, Any]) -> dict[str, Any]:
        """What of ``offered`` it has parameters for; a parameter without a column in this batch is None a row."""
        parameters = self.parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            taken = dict(offered)
        else:
            taken = {name: value for name, value in offered.items() if name in parameters}
        none = [None] * len(offered["prompts"])
        return taken | dict.fromkeys(self.missing(list(offered)), none)


class Rewards:
    """The rewards of the settings, loaded and ready to be asked.

    Raises:
        ValueError: a function that is not there, or cannot be imported.
    """

    def __init__(self, arguments: RewardArguments, max_new_tokens: int) -> None:
        self.arguments = arguments
        self.weights = arguments.weights or [1.0] * len(arguments.functions)
        names = [_name(spec) for spec in arguments.functions]
        self.names = [n if names.count(n) == 1 else spec for n, spec in zip(names, arguments.functions, strict=True)]
        self.functions: list[_Function | None] = [  # None: the scorer
            None if spec == SCORER else _Function(name, _callable(spec, arguments, max_new_tokens))
            for name, spec in zip(self.names, arguments.functions, strict=True)
        ]
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def own(self) -> bool:
        """Whether anything but the scorer scores."""
        return any(function is not None for function in self.functions)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Try every function on the first rows, with an empty response: what is wrong is told before the first step.
        Without rows, those of a skill world that is yet to be made, nothing is tried.

        Raises:
            ValueError: a parameter that no row has a column for; it fails, or gives what is no reward.
        """
        columns = sorted({name for row in rows for name in _columns(row)})
        for function in self.functions:
            if function is None or not rows:
                continue
            missing = function.missing(columns)
            if function.name == EXACT_NUMBER and self.arguments.answer not in columns:
                missing = [self.arguments.answer]
            if missing:
                raise ValueError(
                    f"{_SETTING}: {function.name!r} takes {missing[0]!r}, which is no column of the prompts; they have "
                    f"{', '.join(columns) or 'none'}"
                )
            few = list(rows[:_PROBED])
            values = self._ask([function], few, [""] * len(few), [[0] for _ in few], 0, 0)[0]
            for row, value in zip(few, values, strict=True):
                if not isinstance(value, _Failure):
                    continue
                if self.arguments.on_failure == "stop":
                    raise ValueError(f"{_SETTING}: {_failed(function.name, row, value)}, tried on an empty response")
                say(f"  warning: {_failed(function.name, row, value)}, tried on an empty response: it scores 0 there")

    def of(
        self, rows: Sequence[PromptRow], rollouts: Sequence[Rollout], of_scorer: Sequence[float], *, step: int = 0,
        steps: int = 0,
    ) -> tuple[list[float], dict[str, float]]:  # fmt: skip
        """The score of each of this rank's responses, the weighted sum of the rewards that apply to it; and each
        reward's mean over all ranks' responses to which it applies.

        Raises:
            ValueError: a function failed and the settings say to stop, gave another number of rewards than there are
                responses, or no reward applies to a response; on every rank.
        """
        if not self.own:
            weight = self.weights[0]
            return [weight * score for score in of_scorer], {}
        own = [function for function in self.functions if function is not None]
        with together(ValueError):
            ids = [list(r.encoded.response) for r in rollouts]
            asked = iter(self._ask(own, rows, [r.text for r in rollouts], ids, step, steps))
            values = [list(of_scorer) if function is None else next(asked) for function in self.functions]
            scores, failures = self._combined(values, rows), 0
            for column in values:
                failures += sum(isinstance(value, _Failure) for value in column)
        applying = [[0.0 if isinstance(v, _Failure) else v for v in column if v is not None] for column in values]
        *sums, failed = sum_over_ranks([f for c in applying for f in (sum(c), len(c))] + [failures])
        means = zip(self.names, sums[::2], sums[1::2], strict=True)
        return scores, {f"reward/{name}": total / n for name, total, n in means if n} | {"reward_failures": failed}

    def each(self, rows: Sequence[PromptRow], rollouts: Sequence[Rollout]) -> dict[str, list[float | None]]:
        """What each function but the scorer gives each of these responses, None where it does not apply; a failure is 0
        where the settings say so. Of one process alone.

        Raises:
            ValueError: as in :meth:`of`.
        """
        own = {name: f for name, f in zip(self.names, self.functions, strict=True) if f is not None}
        ids = [list(r.encoded.response) for r in rollouts]
        asked = self._ask(list(own.values()), rows, [r.text for r in rollouts], ids, 0, 0)
        return {
            name: [self._settled(name, value, row) for value, row in zip(column, rows, strict=True)]
            for name, column in zip(own, asked, strict=True)
        }

    def _settled(self, name: str, value: _Value, row: PromptRow) -> float | None:
        if not isinstance(value, _Failure):
            return value
        if self.arguments.on_failure == "stop":
            words = "rewards.on_failure zero counts it as 0 and goes on"
            raise ValueError(f"{_SETTING}: {_failed(name, row, value)}; {words}")
        return 0.0

    def _combined(self, values: Sequence[Sequence[_Value]], rows: Sequence[PromptRow]) -> list[float]:
        scores = []
        for i, row in enumerate(rows):
            score, applies = 0.0, False
            for name, weight, column in zip(self.names, self.weights, values, strict=True):
                value = self._settled(name, column[i], row)
                if value is not None:
                    score, applies = score + weight * value, True
            if not applies:
                raise ValueError(
                    f"{_SETTING}: no reward applies to a response to {_place(row)}: all gave None; return a number, or "
                    "leave the row out"
                )
            scores.append(score)
        return scores

    # -- asking --------------------------------------------------------------------------------------------------------

    def _ask(
        self, functions: Sequence[_Function], rows: Sequence[PromptRow], texts: Sequence[str],
        ids: Sequence[Sequence[int]], step: int, steps: int,
    ) -> list[list[_Value]]:  # fmt: skip
        """What every function gives: asynchronous ones at the same time, and beside them the others in turn."""

        def offered(which: Sequence[int]) -> dict[str, Any]:
            return _offered([rows[i] for i in which], [texts[i] for i in which], [ids[i] for i in which], step, steps)

        limit = self.arguments.timeout
        waiting = {
            id(f): asyncio.run_coroutine_threadsafe(_asked_async(f, offered, len(rows), limit), self._running())
            for f in functions if f.is_async
        }  # fmt: skip
        deadline = time.monotonic() + limit
        answers = {id(f): _asked(f, offered, len(rows), limit) for f in functions if not f.is_async}
        for f in functions:
            if id(f) in waiting:
                answers[id(f)] = self._waited(waiting[id(f)], len(rows), deadline)
        found = []
        for f in functions:
            values = answers[id(f)]
            if isinstance(values, ValueError):
                raise values
            found.append(values)
        return found

    def _running(self) -> asyncio.AbstractEventLoop:
        """One event loop for the whole run: clients that functions keep belong to theirs."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="rewards").start()
        return self._loop

    def _waited(self, future: futures.Future[Any], count: int, deadline: float) -> Any:
        try:  # a little longer than the coroutine's own limit, which an await that blocks the loop does not see
            return future.result(max(0.0, deadline - time.monotonic()) + 1.0)
        except futures.TimeoutError:
            future.cancel()
            self._loop = None  # a function holds it up
            return _late(count, self.arguments.timeout)


def _name(spec: str) -> str:
    return spec.rpartition(":")[2]


def _callable(spec: str, arguments: RewardArguments, max_new_tokens: int) -> Callable[..., Any]:
    return built_in(spec, arguments, max_new_tokens) or plugins.load(_SETTING, spec)


def _columns(row: PromptRow) -> dict[str, Any]:
    return row.meta if row.task is None else {"task": row.task, **row.meta}


def _offered(
    rows: Sequence[PromptRow], texts: Sequence[str], ids: Sequence[Sequence[int]], step: int, steps: int
) -> dict[str, Any]:
    columns = [copy.deepcopy(_columns(row)) for row in rows]  # a function may change what it is given
    names = dict.fromkeys(name for each in columns for name in each)
    return {name: [each.get(name) for each in columns] for name in names} | {
        "prompts": [copy.deepcopy(row.prompt) for row in rows],
        "completions": [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        "completion_ids": [list(each) for each in ids],
        "responses": list(texts),
        "trainer_state": SimpleNamespace(global_step=step, max_steps=steps),
    }


def _place(row: PromptRow) -> str:
    return f"row {row.source}" if row.source else f"the prompt {str(row.prompt)[:60]!r}"


def _failed(name: str, row: PromptRow, failure: _Failure) -> str:
    return f"{name!r} gave no reward of {_place(row)}: {failure.reason}"


def _late(count: int, seconds: float) -> list[_Value]:
    return [_Failure(f"not done after {seconds:g} s (rewards.timeout)")] * count


def _value(value: Any) -> _Value:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # whatever its class says to being made a number
        number = math.nan
    return number if math.isfinite(number) else _Failure(f"expected a finite number or None, got {str(value)[:40]!r}")


def _values(name: str, given: Any, count: int) -> list[_Value] | ValueError:
    """An error where the function is wrong whatever the rows: it would be at every step."""
    try:
        values = [given] if isinstance(given, str) else list(given)
    except TypeError:
        return ValueError(f"{_SETTING}: {name!r} gave {type(given).__name__}, expected a list with a reward a response")
    if len(values) != count:
        return ValueError(f"{_SETTING}: {name!r} gave {len(values)} rewards for {count} responses")
    return [_value(value) for value in values]


def _raised(error: BaseException) -> _Failure:
    return _Failure(f"{type(error).__name__}: {str(error)[:200]}")


_Offer = Callable[[Sequence[int]], dict[str, Any]]


def _asked(function: _Function, offered: _Offer, count: int, seconds: float) -> list[_Value] | ValueError:
    """A plain function's rewards, in a thread of its own that is left behind where it takes too long."""
    box: list[list[_Value] | ValueError] = []
    alone: list[_Value] = []

    def call(which: Sequence[int]) -> list[_Value] | ValueError:
        return _values(function.name, function.call(**function.arguments(offered(which))), len(which))

    def work() -> None:
        try:
            box.append(call(range(count)))
        except BaseException:  # which row was it? SystemExit as well: it would end the thread without a word
            for i in range(count):
                try:
                    values = call([i])
                    alone.append(_raised(values) if isinstance(values, ValueError) else values[0])
                except BaseException as error:
                    alone.append(_raised(error))
            box.append(list(alone))

    thread = threading.Thread(target=work, daemon=True, name=f"reward {function.name}")
    thread.start()
    thread.join(seconds)
    if box:
        return box[0]
    known = list(alone)
    return [*known, *_late(count - len(known), seconds)]


async def _asked_async(function: _Function, offered: _Offer, count: int, seconds: float) -> list[_Value] | ValueError:
    """The same of an asynchronous one, whose rows are looked at together where the whole fails."""

    async def call(which: Sequence[int]) -> list[_Value] | ValueError:
        given: Awaitable[Any] = function.call(**function.arguments(offered(which)))
        return _values(function.name, await given, len(which))

    async def one(i: int) -> _Value:
        try:
            values = await call([i])
            return _raised(values) if isinstance(values, ValueError) else values[0]
        except Exception as error:
            return _raised(error)

    async def every() -> list[_Value] | ValueError:
        try:
            return await call(range(count))
        except Exception:
            return list(await asyncio.gather(*(one(i) for i in range(count))))

    try:
        return await asyncio.wait_for(every(), seconds)
    except TimeoutError:
        return _late(count, seconds)
