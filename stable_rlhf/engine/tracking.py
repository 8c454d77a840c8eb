"""Metrics to ``metrics.jsonl``, TensorBoard, wandb and trackio, samples to ``samples.jsonl``; from rank 0 only."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_rlhf.data.jsonl import read_json, read_jsonl, to_json
from stable_rlhf.ranks import barrier
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
        if after:
            barrier()  # all ranks have read what the first writes anew
        self._folder, self._main = folder, is_main_process()
        self._file: Any = None
        self._board: Any = None
        self._services: dict[str, Any] = {}
        self._taken: dict[str, float] = {}  # the last step that a service has, of the run that it goes on with
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
        identity = ""
        for name in _SERVICES:
            if name in report_to:
                with self._served(name):
                    identity = identity or _identity(folder, after)
                    run = _service(name, folder, identity, settings)
                    self._services[name], self._taken[name] = run, _last_step(name, run, after)
                    for row in self.history:  # what it had in memory, a kill has taken
                        self._tell(name, int(row["step"]), {k: v for k, v in row.items() if k != "step"})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        self.history.append(row)
        if self._file is not None:
            self._file.write(to_json(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        for name in list(self._services):
            with self._served(name):
                self._tell(name, step, metrics)

    def _tell(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """But for a step that the service has: of a killed attempt, after the snapshot that this one goes on from."""
        if step > self._taken[name]:
            self._services[name].log({metric: float(value) for metric, value in metrics.items()}, step=step)

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


def _identity(folder: Path, after: int) -> str:
    """What all services know a stage's attempt by; a resumed stage keeps it."""
    path = folder / _IDENTITY
    if after and path.is_file():
        return str(read_json(path, "id")["id"])
    identity = secrets.token_hex(4)
    path.write_text(to_json({"id": identity}) + "\n", encoding="utf-8")
    return identity


def _service(name: str, folder: Path, identity: str, settings: dict[str, Any] | None) -> Any:
    """A run of wandb or trackio."""
    about: dict[str, Any] = {
        "project": os.environ.get(f"{name.upper()}_PROJECT", "stable_rlhf"),
        "name": f"{folder.resolve().parent.name}-{folder.name.removesuffix('.tmp')}-{identity}",
        "config": settings or {},
        "resume": "allow",
    }
    if name == "wandb":
        # Offline a killed attempt's file has what was on disk then; this attempt's gets all of it once more, and is the
        # one to send.
        for former in sorted(folder.glob(f"wandb/offline-run-*-{identity}")):
            former.rename(former.with_name(f"replaced-{former.name}"))
        about |= {"id": identity, "dir": str(folder)}
    return importlib.import_module(name).init(**about)


def _last_step(name: str, run: Any, after: int) -> int:
    """The last step that a service has of a run that has just been opened; below 0: none, or offline, in a new file. A
    trackio that does not tell is taken to have those up to the snapshot."""
    if name == "wandb":
        return -1 if getattr(run, "offline", False) else int(run.step) - 1
    return int(getattr(run, "_next_step", after + 1)) - 1
