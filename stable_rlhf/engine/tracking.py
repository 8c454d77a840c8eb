"""Metrics to ``metrics.jsonl``, TensorBoard, wandb and trackio, samples to ``samples.jsonl``; from rank 0 only."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_rlhf.data.jsonl import read_json, read_jsonl, to_json
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.system.http import without_credentials

METRICS, _SAMPLES, _IDENTITY = "metrics.jsonl", "samples.jsonl", "tracking.json"
_SERVICES = ("wandb", "trackio")


def check_reporters(report_to: Iterable[str]) -> None:
    """Refuse a package that is not installed.

    Raises:
        ValueError: names the package, and the extra that brings it."""
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"report_to: {name} is not installed; `pip install 'stable-rlhf[tracking]'`, or leave it out"
            )


class Tracker:
    """``tracker.log(step, {"loss": …})`` appends one JSON line, and one point per metric elsewhere.

    Args:
        folder: The stage's working folder.
        report_to: ``tensorboard``, ``wandb``, ``trackio``. The project is WANDB_PROJECT or TRACKIO_PROJECT, else
            ``stable_rlhf``; account and mode (WANDB_MODE=offline) come from the packages' own variables. One that
            fails is a warning.
        after: The step that a resumed stage goes on from; what was logged beyond it will be logged again.
        settings: What wandb and trackio show as the run's configuration.
    """

    def __init__(
        self, folder: Path, report_to: Sequence[str] = ("tensorboard",), *, after: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_reporters(report_to)
        self.history: list[dict[str, float]] = read_metrics(folder / METRICS, after) if after else []
        # Samples of a step are taken before that step's update, so those of ``after`` itself come again.
        samples = read_jsonl(folder / _SAMPLES, torn_end=True) if after and (folder / _SAMPLES).is_file() else []
        self.samples: list[dict[str, Any]] = [row for row in samples if row["step"] < after]
        self._folder, self._main = folder, is_main_process()
        self._file: Any = None
        self._board: Any = None
        self._services: dict[str, Any] = {}
        if not self._main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("w", encoding="utf-8")
        self._file.writelines(to_json(row) + "\n" for row in self.history)
        (folder / _SAMPLES).unlink(missing_ok=True)
        self._write_samples(self.samples)
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)
        for name in _SERVICES:
            if name in report_to:
                with self._served(name):
                    self._services[name] = _service(name, folder, after, settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        self.history.append(row)
        if self._file is not None:
            self._file.write(to_json(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        for name, service in list(self._services.items()):
            with self._served(name):
                service.log({metric: float(value) for metric, value in metrics.items()}, step=step)

    def sample(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep what the policy answers after ``step`` steps."""
        answers = [{"step": step, **row} for row in rows]
        self.samples += answers
        if self._main:
            self._write_samples(answers)

    def _write_samples(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            with (self._folder / _SAMPLES).open("a", encoding="utf-8") as file:
                file.writelines(to_json(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        for name, service in list(self._services.items()):
            with self._served(name):
                service.finish()

    @contextmanager
    def _served(self, name: str) -> Iterator[None]:
        """A service outside that fails is told once and left out: it shows the training, and must not end it."""
        try:
            yield
        except Exception as error:  # any: theirs are not ours to list
            self._services.pop(name, None)
            why = without_credentials(" ".join(str(error).split()) or type(error).__name__)[:300]
            say(f"  WARNING: report_to: {name} fails ({why}); from here on this stage's metrics are in "
                f"{self._folder / METRICS} alone")  # fmt: skip


def read_metrics(path: Path, after: int | None = None) -> list[dict[str, float]]:
    """The rows of a stage's metrics, up to step ``after``; the line that was being written when it was killed is left
    out. What was not finite stands in the file as null, and is NaN again."""
    rows = read_jsonl(path, torn_end=True) if path.is_file() else []
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in rows if after is None or row["step"] <= after
    ]  # fmt: skip


def _service(name: str, folder: Path, after: int, settings: dict[str, Any] | None) -> Any:
    """A run of wandb or trackio; a resumed stage goes on with the run that it had."""
    path = folder / _IDENTITY
    identity = read_json(path, "id")["id"] if after and path.is_file() else secrets.token_hex(4)
    path.write_text(to_json({"id": identity}) + "\n", encoding="utf-8")
    about: dict[str, Any] = {
        "project": os.environ.get(f"{name.upper()}_PROJECT", "stable_rlhf"),
        "name": f"{folder.resolve().parent.name}-{folder.name.removesuffix('.tmp')}-{identity}",
        "config": settings or {},
        "resume": "allow",
    }
    if name == "wandb":
        about |= {"id": identity, "dir": str(folder)}
    return importlib.import_module(name).init(**about)
