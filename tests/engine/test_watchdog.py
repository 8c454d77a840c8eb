"""A rank that hangs ends all of them, with one line on where it stands; one that works, however long, does not."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.launch import run_worker
from stable_rlhf.engine import watchdog
from stable_rlhf.engine.watchdog import Watchdog
from stable_rlhf.show import progress


class Store:
    """Of all ranks, in this process."""

    def __init__(self) -> None:
        self.held: dict[str, object] = {}

    def add(self, key: str, amount: int) -> int:
        self.held[key] = int(self.held.get(key, 0)) + amount  # type: ignore[call-overload]
        return self.held[key]  # type: ignore[return-value]

    def set(self, key: str, value: str) -> None:
        self.held[key] = value

    def get(self, key: str) -> str:
        return self.held[key]  # type: ignore[return-value]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two of them with a limit of 100 seconds, whose time and place the test says; each with its marks."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    store, me = Store(), watchdog._process(os.getpid())
    found = [Watchdog(100.0, tmp_path, store, rank, [me, {**me, "pid": 7}]) for rank in (0, 1)]
    counts = [0, 0]

    def turn(seconds: float, *moving: int) -> list[bool]:
        clock[0] += seconds
        for rank in moving:
            counts[rank] += 1
        ended = []
        for rank, dog in enumerate(found):
            monkeypatch.setattr(progress, "marks", lambda rank=rank: counts[rank])
            monkeypatch.setattr(dog, "_frames", lambda: [])
            ended.append(dog.look(clock[0]))
            dog.talk()
        for dog in found:
            dog.talk()
        return ended

    return found, turn


def test_one_rank_that_works_keeps_all_of_them(ranks):
    """However long the other one waits; when nobody moves, all end within the limit and a look."""
    _, turn = ranks
    turn(0, 0, 1)
    for _ in range(1000):
        assert turn(5, 0) == [False, False]
    for _ in range(20):
        assert turn(5) == [False, False]
    assert turn(5) == [True, True]


def test_a_rank_that_was_stopped_itself_begins_to_count_again(ranks):
    _, turn = ranks
    turn(0, 0, 1)
    assert turn(3600) == [False, False]
    assert not any(any(turn(5)) for _ in range(20))
    assert turn(5) == [True, True]


def test_a_place_in_the_code_that_changes_is_progress_and_one_that_does_not_is_none(tmp_path, monkeypatch):
    def work():
        yield
        yield

    at = work()
    dog = Watchdog(100.0, tmp_path, Store(), 0, [{}, {}])
    monkeypatch.setattr(progress, "marks", lambda: 0)
    monkeypatch.setattr(dog, "_frames", lambda: [at.gi_frame])
    next(at)
    start = dog.looked
    assert [dog.look(start + seconds) for seconds in range(0, 116, 5)] == [False] * 21 + [True] * 3
    next(at)
    assert not dog.look(start + 120)


STANDS = {"doing": "stage sft, SFT 7/90 steps", "place": "sft.py:80 (train_sft)", "waits": False, "since": 0.0}


@pytest.mark.parametrize(
    ("stands", "silent", "words", "not_words"),
    [
        ({0: {"waits": True}, 1: {}}, [], "rank 1 stands still since ", "rank 0"),
        ({0: {"waits": True}, 1: {"waits": True}}, [], "all wait for each other: rank 0 waits since ", "stands still"),
        ({0: {"waits": True}}, [1], "and rank 1 (process 7 on ", "stands still"),
    ],
)
def test_the_line_names_who_hangs(ranks, stands, silent, words, not_words):
    dog = ranks[0][0]
    dog.reports = {rank: STANDS | more for rank, more in stands.items()}
    said = dog.words(dog._silent())
    assert dog._silent() == silent and said.startswith("no rank has got on for 1.66667 minutes") and words in said
    assert "sft.py:80 (train_sft) (stage sft, SFT 7/90 steps)" in said and not_words not in said and "\n" not in said


def test_who_makes_it_is_watched(tmp_path):
    """In a notebook the main thread need not be the one that trains."""
    with ThreadPoolExecutor(1) as pool:
        dog = pool.submit(Watchdog, 100.0, tmp_path, Store(), 0, [{}, {}]).result()
        assert "thread" in dog._frames()[0].f_code.co_filename


def test_reports_are_gathered(ranks):
    dogs, _ = ranks
    dogs[1].reports[1] = STANDS
    dogs[1].store.set("stable_rlhf/stands/0", json.dumps({**STANDS, "waits": True}))
    dogs[1].collect()
    assert dogs[1].collected.is_set() and dogs[1].reports[0]["waits"]
    assert dogs[0]._stand()["place"].startswith("watchdog.py:")  # the main thread's own, here


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    """A rank that sleeps, a rank that is stopped by a signal (which holds the store, or does not), and rank 0 that
    works alone for three times the limit."""
    codes = json.loads(run_worker("watchdog_worker", tmp_path))
    said = {name: (tmp_path / name.split("/")[0] / f"said-{name[-1]}").read_text(encoding="utf-8") for name in codes}
    for rank in (0, 1):
        assert codes[f"alone/{rank}"] == 0, said
        for other in (0, 1):
            lines = [x for x in said[f"sleeps-{rank}/{other}"].splitlines() if x.startswith("stable-rlhf: error: ")]
            assert codes[f"sleeps-{rank}/{other}"] == 2 and len(lines) == 1, said
            assert ("checkpoint.hang_minutes (0: never)" in said[f"sleeps-{rank}/{other}"]) == (other == 0)
            assert f": rank {rank} stands still since " in lines[0] and "(stage sft, SFT 7/90 steps)" in lines[0]
            stacks = (tmp_path / f"sleeps-{rank}" / f"hang-{other}.txt").read_text(encoding="utf-8")
            assert "rank_of" in stacks
        assert codes[f"stops-{rank}/{rank}"] == -9 and codes[f"stops-{rank}/{1 - rank}"] == 2, (codes, said)
        assert f"and rank {rank} (process " in said[f"stops-{rank}/{1 - rank}"]
