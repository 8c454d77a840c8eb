"""What the steps of a run share: where they run, at which sizes, where their rows go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stable_rlhf.kernels.tuning import VARIABLE

Row = dict[str, Any]
DRY = "DRY RUN on a CPU: tiny shapes, interpreted kernels; no figure below is of a GPU"
FAIL = "BENCH_GPU_FAIL"  # the hook of the tests: "step=raise", "step=die" or "step=hang"


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        run: run1 or run2.
        dry: every step without a GPU, at sizes for that.
        output: the folder of what a run leaves.
        tuned: a table of tuned choices to measure beside the defaults.
        deadline: when the whole run has to be over, by `time.time()`.
    """

    run: str
    dry: bool
    output: Path
    tuned: Path | None
    deadline: float

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def backend(self) -> str:
        """Which of our implementations is measured: the kernels, also where they are interpreted."""
        return "triton"

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def lines(self) -> Path:
        return self.output / f"{self.run}.jsonl"

    @property
    def log(self) -> Path:
        return self.output / f"{self.run}.log"


class Step(NamedTuple):
    """`work` yields rows of results; what it yielded before it failed, or its time was over, stays."""

    name: str
    work: Callable[[Plan], Iterator[Row]]
    limit: float  # seconds


@contextmanager
def table(path: Path) -> Iterator[None]:
    """The table of tuned choices in force."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def sabotaged(step: str) -> None:
    """What the tests asked to go wrong in a step."""
    name, _, how = os.environ.get(FAIL, "").partition("=")
    if name != step:
        return
    if how == "die":
        os._exit(1)
    if how == "hang":
        time.sleep(3600)
    raise RuntimeError("as the test asked")
