"""What two ranks meet where one of them fails. As a program, under torchrun: to a JSON file (rank 0)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stable_rlhf.data.records import DataError
from stable_rlhf.engine.process import finish, start
from stable_rlhf.ranks import gather_objects, on_first_rank, rank, together


def outcome(work) -> str:
    try:
        return repr(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failing(who: tuple[int, ...], error: type[Exception], **settings):
    """Leave a block together in which these ranks fail."""

    def work() -> str:
        with together(ValueError, **settings):
            if rank() in who:
                raise error(f"of rank {rank()}")
        return "went on"

    return work


def first(error: type[Exception] | None):
    def work() -> list[int]:
        if error is not None:
            raise error("asked once")
        return [rank()]

    return lambda: on_first_rank(work, ValueError)


def main() -> None:
    start(0)
    cases = {
        "none": failing((), ValueError),
        "second": failing((1,), ValueError),
        "both": failing((0, 1), ValueError),
        "kind": failing((1,), DataError),
        "told": failing((1,), ValueError, told_as=OSError, words=lambda error: f"rank {rank()}: {error}"),
        "first": first(None),
        "first fails": first(DataError),
    }
    found = {name: gather_objects(outcome(work)) for name, work in cases.items()}
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    finish()


main()
