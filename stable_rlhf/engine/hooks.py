"""What a user's own classes do at the end of each step and of each stage: the setting `callbacks`.

They see figures and may stop a stage. They are made anew for every stage, and on the first rank alone, so that the
other ranks need none of what they import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_rlhf.ranks import on_first_rank
from stable_rlhf.system import plugins

_SETTING = "callbacks"
HOOKS = ("on_step_end", "on_stage_end")


@dataclass
class StageState:
    """Where a stage is.

    Attributes:
        stage: its name, the folder's.
        step: steps that are done, this one included.
        steps: how many there are.
        tokens: seen so far, over all ranks.
        folder: what the stage writes to.
        stop_reason: what `stop` was called with; None: go on.
    """

    stage: str
    step: int
    steps: int
    tokens: float
    folder: Path
    stop_reason: str | None = field(default=None, init=False)

    def stop(self, reason: str = "") -> None:
        """End the stage after this step, which is saved first; the same command goes on from there."""
        self.stop_reason = reason


def check_callbacks(specs: Sequence[str]) -> list[Callable[[], Any]]:
    """The classes that the setting names.

    Raises:
        ValueError: names the class: it is not there, or has none of the hooks.
    """
    found = [plugins.load(_SETTING, spec) for spec in specs]
    for spec, each in zip(specs, found, strict=True):
        if not any(callable(getattr(each, hook, None)) for hook in HOOKS):
            raise ValueError(f"{_SETTING}: {spec!r} has neither of {' and '.join(HOOKS)}")
    return found


class Hooks:
    """The callbacks of one stage.

    Raises:
        ValueError: as `check_callbacks`, or a class that cannot be made; on every rank, as what hooks raise.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self._specs = list(specs)
        self._made: list[Any] = []
        if specs:
            on_first_rank(self._make, ValueError)

    def step_end(self, metrics: Mapping[str, float], state: StageState) -> str | None:
        """Call every ``on_step_end``; returns who stops the stage and why, None where nobody does."""
        return self._call("on_step_end", metrics, state)

    def stage_end(self, metrics: Mapping[str, float], state: StageState) -> None:
        """Call every ``on_stage_end``."""
        self._call("on_stage_end", metrics, state)

    def _make(self) -> None:
        for spec, kind in zip(self._specs, check_callbacks(self._specs), strict=True):
            try:
                self._made.append(kind())
            except Exception as error:
                raise ValueError(f"{_SETTING}: {spec!r} cannot be made: {_words(error)}") from error

    def _call(self, hook: str, metrics: Mapping[str, float], state: StageState) -> str | None:
        return on_first_rank(lambda: self._called(hook, metrics, state), ValueError) if self._specs else None

    def _called(self, hook: str, metrics: Mapping[str, float], state: StageState) -> str | None:
        who = None
        for spec, each in zip(self._specs, self._made, strict=True):
            method = getattr(each, hook, None)
            if method is None:
                continue
            try:
                method(dict(metrics), state)
            except Exception as error:
                words = f"{_SETTING}: {spec!r}: {hook} failed after step {state.step} of stage {state.stage}"
                raise ValueError(f"{words}: {_words(error)}") from error
            if who is None and state.stop_reason is not None:
                who = f"{spec!r}" + (f" ({state.stop_reason})" if state.stop_reason else "")
        return who


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
