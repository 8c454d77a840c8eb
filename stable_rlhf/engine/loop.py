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
        recipe: Its ``report_to`` and ``checkpoint`` count: where metrics go, when to write snapshots, and where to go
            on from.
        folder: The stage's working folder.
        steps: How many there are.
        kept: See :class:`Snapshots`.
        settings: See :class:`Tracker`.
    """

    def __init__(
        self, title: str, batches: Iterable[Sequence[int]], engine: Engine, recipe: Recipe, folder: Path, *, steps: int,
        kept: Sequence[Kept] = (), settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.batches, self.engine, self.steps = batches, engine, steps
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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step's metrics, with what every trainer has, without ending it: it is the last one."""
        common = {"tokens": self.tokens, "learning_rate": self.engine.learning_rate}
        self.tracker.log(step + 1, metrics | common | self.engine.scaling_metrics())

    def end(self, step: int, metrics: dict[str, float], state: dict[str, Any] | None = None, *, note: str = "") -> bool:
        """Log the step, count it, and write a snapshot where one is due or a signal asks for the end: in this order, so
        that a snapshot holds its own step's metrics. ``state``: what it keeps of the trainer's own numbers besides.

        Returns whether a snapshot was due, and with it whatever else a trainer keeps now and then.

        Raises:
            Stopped, OSError: see :meth:`Snapshots.save`.
        """
        self.log(step, metrics)
        if self._bar is not None:
            self._bar.advance(note=note)
        self.snapshots.save(step + 1, {"tokens": self.tokens} | (state or {}), last=self.steps)
        return self.snapshots.due(step + 1)
