"""The steps of a stage that trains: resume, metrics, progress and snapshots, alike for every trainer.

with Loop("SFT", batches, engine, recipe, folder, steps=steps) as loop:
    for step, rows in loop:      # `step` steps are done; `rows` are this one's
        ...                      # the algorithm
        loop.end(step, {"loss": loss})
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.engine.engine import Engine
from stable_rlhf.engine.hooks import Hooks, StageState
from stable_rlhf.engine.signals import StoppedByCallback
from stable_rlhf.engine.snapshots import Kept, Snapshots
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.progress import Bar


class Loop:
    """Making one restores the newest snapshot and opens the metrics; leaving the ``with`` closes what it opened.

    ``step`` counts the steps done before this one; metrics and snapshots carry ``step + 1``.

    ``done``: the steps that were done before; ``carried``: what the snapshot kept of the trainer's own numbers;
    ``tokens``: those seen so far, which the trainer counts up.

    Args:
        title: What the progress bar says.
        batches: The rows of every step, from the first one on, those that are done too.
        engine: What is trained.
        recipe: Its ``report_to``, ``checkpoint`` and ``callbacks`` count: where metrics go, when to write snapshots,
            where to go on from, and who looks on.
        folder: The stage's working folder.
        steps: How many there are.
        kept: See :class:`Snapshots`.
        settings: See :class:`Tracker`.
    """

    def __init__(
        self, title: str, batches: Iterable[Sequence[int]], engine: Engine, recipe: Recipe, folder: Path, *, steps: int,
        kept: Sequence[Kept] = (), settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.batches, self.engine, self.steps, self.folder = batches, engine, steps, folder
        self.hooks = Hooks(recipe.callbacks)
        self.snapshots = Snapshots(folder, engine, recipe.checkpoint, kept)
        self.done, self.carried = self.snapshots.restore()
        self.tracker = Tracker(folder, recipe.report_to, after=self.done, settings=settings)
        self.tokens = float(self.carried.get("tokens", 0.0))
        self._title, self._began = title, time.monotonic()
        self._bar: Bar | None = None  # drawn with the first step: what is prepared until then has bars of its own

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            last = self.tracker.history[-1] if self.tracker.history else {}
            self.hooks.stage_end(last, self._state(self.steps))
        if kind is None:  # else a service outside must not show the run as one that ended well
            self.tracker.close()

    def __iter__(self) -> Iterator[tuple[int, Sequence[int]]]:
        """The steps that are left, with the rows of each."""
        self._bar = Bar(self._title, self.steps, "steps")
        self._bar.advance(self.done)
        for step, rows in enumerate(self.batches):
            if step >= self.done:
                self._began = time.monotonic()
                yield step, rows

    @property
    def seconds(self) -> float:
        """How long the present step has taken so far."""
        return time.monotonic() - self._began

    def _state(self, step: int) -> StageState:
        return StageState(self.snapshots.stage, step, self.steps, self.tokens, self.folder)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step's metrics, with what every trainer has, without ending it: it is the last one."""
        common = {"tokens": self.tokens, "learning_rate": self.engine.learning_rate}
        self.tracker.log(step + 1, metrics | common | self.engine.scaling_metrics())

    def end(self, step: int, metrics: dict[str, float], state: dict[str, Any] | None = None, *, note: str = "") -> bool:
        """Log the step, count it, show it to the callbacks, and write a snapshot where one is due or somebody asks for
        the end: in this order, so that a snapshot holds its own step's metrics. ``state``: what it keeps of the
        trainer's own numbers besides.

        Returns whether a snapshot was due, and with it whatever else a trainer keeps now and then.

        Raises:
            Stopped, OSError: see :meth:`Snapshots.save`.
            StoppedByCallback: a callback ends the stage here; the snapshot is written.
            ValueError: a callback failed.
        """
        self.log(step, metrics)
        if self._bar is not None:
            self._bar.advance(note=note)
        here = self._state(step + 1)
        stopped = self.hooks.step_end(self.tracker.history[-1], here)
        kept = {"tokens": self.tokens} | (state or {})
        self.snapshots.save(step + 1, kept, last=self.steps, asked=stopped is not None)
        if stopped is not None and step + 1 < self.steps:
            where = f"stage {here.stage}, which is saved after step {here.step}"
            raise StoppedByCallback(f"callback {stopped} stopped {where}")
        return self.snapshots.due(step + 1)
