"""The ledger of calls that multiply matrices in a kernel of ours, and of calls whose counts are read late."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import stable_rlhf.ops as ops
from bench.count.device import CUDA
from bench.count.work import Ledger, Sort, Stop, Tiles, Wait, Work
from helpers.counted import RATES, counted, new
from helpers.forks import run_interpreted
from helpers.interpreter import interpreted, not_interpreted


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def device():
    with counted() as made:
        yield made


def scored(rows: int, width: int, vocabulary: int, **given: object) -> None:
    hidden, weight = (new(n, width, dtype=torch.bfloat16) for n in (rows, vocabulary))
    target = torch.zeros(rows, dtype=torch.int64, device=CUDA)
    with torch.no_grad():
        ops.linear_logprob(hidden, weight, target, **given)


@interpreted
def test_a_product_s_tiles_are_counted_by_one_of_them(device):
    """Rests of the matrices are multiplied like the rest of them, and the longest program decides."""
    scored(300, 200, 40_000)
    (work,) = (work for work in device.entries if isinstance(work, Work) and work.tiles is not None)
    tiles = work.tiles
    assert tiles.number == 3 * 157 and tiles.most == math.ceil(3 * 157 / 132)
    assert tiles.flops == 2.0 * 128 * 256 * 256 and tiles.elements == 128 * 256
    assert work.flops == tiles.number * tiles.flops and work.product is None
    operands, partial_sums = 2 * 200 * (300 + 40_000), 4 * 300 * (3 * 157 + 1)
    assert operands + partial_sums <= work.bytes <= 1.02 * (operands + partial_sums)
    assert device.peak < 4 * (operands + partial_sums), "no logits, which are 24 MB"


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_matrices_are_multiplied(dtype, device):
    """Every tile of them, since what comes after reads the results."""
    hidden, weight = new(5, 8, dtype=dtype).fill_(0.5), new(600, 8, dtype=dtype).fill_(0.25)
    weight[300:] = 0.75
    target = torch.tensor([0, 299, 300, 599, 2], dtype=torch.int64, device=CUDA)
    with torch.no_grad():
        logprob, _ = ops.linear_logprob(hidden, weight, target)
    total = math.log(300 * math.exp(1.0) + 300 * math.exp(3.0))
    assert logprob.tolist() == pytest.approx([1.0 - total, 1.0 - total, 3.0 - total, 3.0 - total, 1.0 - total])


@interpreted
def test_a_tile_s_seconds():
    tiles = Tiles(1000, 8, 2.0 * 128 * 256 * 4096, 128 * 256)
    each = tiles.flops / RATES.tile_flops + tiles.elements * RATES.end_instructions / RATES.issued
    assert RATES.tiles_seconds(tiles, 0.0) == pytest.approx(8 * each)
    short = replace(RATES, end_instructions=0.1)
    assert short.tiles_seconds(tiles, 0.0) == pytest.approx(8 * (tiles.flops / RATES.tile_flops + RATES.tile_start))
    assert RATES.tiles_seconds(tiles, 1e12) == pytest.approx(1e12 / RATES.copy_bytes)


def lost(rows: int, vocabulary: int, **given: object) -> None:
    logits = new(rows, vocabulary, dtype=torch.bfloat16).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64, device=CUDA)
    advantage = torch.ones(rows, dtype=torch.float32, device=CUDA)
    ops.policy_loss(logits, target, advantage=advantage, **given).loss.backward()


CALLS = {"linear_logprob": lambda **given: scored(300, 64, 40_000, **given), "policy_loss": partial(lost, 300, 40_000)}


@interpreted
@pytest.mark.parametrize(
    ("name", "given"), [("linear_logprob", {}), ("linear_logprob", {"active_rows": 300}), ("policy_loss", {})]
)
def test_counts_are_read_behind_queued_work_or_never(name, given, device):
    CALLS[name](**given)
    ledger = Ledger(device.entries)
    assert not ledger.stops and ledger.late_reads == (not given)


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_under_capture_nothing_is_read(name):
    with counted(capturing=True) as made:
        CALLS[name]()
    assert any(isinstance(entry, Work) and entry.sort is Sort.KERNEL for entry in made.entries)
    assert not any(isinstance(entry, Stop | Wait) for entry in made.entries)
