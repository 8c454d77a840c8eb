"""Metrics to ``metrics.jsonl`` and TensorBoard, from rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.progress import is_main_process

METRICS = "metrics.jsonl"


class Tracker:
    """``tracker.log(step, {"loss": …})`` appends one JSON line, and one point per metric in TensorBoard.

    ``after``: the step that a resumed stage goes on from; what was logged beyond it will be logged again."""

    def __init__(self, folder: Path, report_to: Sequence[str] = ("tensorboard",), *, after: int = 0) -> None:
        self.history: list[dict[str, float]] = self._before(folder / METRICS, after) if after else []
        self._file: Any = None
        self._board: Any = None
        if not is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("w")
        self._file.writelines(json.dumps(row) + "\n" for row in self.history)
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)

    @staticmethod
    def _before(path: Path, after: int) -> list[dict[str, float]]:
        rows = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that was being written when the stage was killed
            if row["step"] <= after:
                rows.append(row)
        return rows

    def log(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        self.history.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
