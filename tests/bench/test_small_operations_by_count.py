"""What the small operations cost on a GPU, by count: the bounds that a change of their kernels must not cross."""

from __future__ import annotations

import functools

import pytest

from helpers.forks import run_interpreted
from helpers.interpreter import interpreted, not_interpreted

pytest.importorskip("triton")


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter():
    run_interpreted(__file__)


@functools.cache
def counter():
    """One for all, as in `python -m bench count`: what the operations keep on a device is this one's."""
    from bench.count.counting import Counter

    return Counter()


def count(op: str) -> dict[str, dict]:
    """By case."""
    from bench.count.cases import small_cases

    return {case.name: counter().count(case) for case in small_cases() if case.op == op}


def kernels(line: dict) -> dict[str, int]:
    """Launches of our own kernels, which have underscores before their names."""
    return {part["name"].split(",")[0]: part["launches"] for part in line["kernels"] if part["name"].startswith("_")}


@interpreted
def test_advantage_loss():
    none, four = count("advantage_loss").values()
    assert kernels(none) == {"_advantage_kernel": 1} and none["seconds"] <= 10e-6
    assert kernels(four) == {"_prepare_kernel": 1, "_advantage_kernel": 1} and four["seconds"] <= 30e-6
    assert four["bytes"] <= 1.1 * (5 * 4 * 2048 * 512)
    assert none["synchronisations"] == four["synchronisations"] == 0


@interpreted
@pytest.mark.parametrize(
    ("op", "launches", "share"), [("gae", 1, 0.75), ("token_rewards", 1, 0.75), ("masked_whiten", 2, 0.35)]
)
def test_sequences(op, launches, share):
    (line,) = count(op).values()
    assert sum(kernels(line).values()) == line["launches"] == launches and line["share"] >= share
    assert line["synchronisations"] == line["late_reads"] == 0


@interpreted
def test_topk_by_cluster():
    (line,) = count("topk_by_cluster").values()
    assert line["seconds"] <= 160e-6 and line["synchronisations"] <= 1
    # Rows of four bytes of score and eight of cluster: once, and an eighth of them four times.
    assert line["bytes"] <= 1.2 * (1 + 4 / 8) * 12 * 10_000_000
