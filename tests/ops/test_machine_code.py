"""The reader of machine code finds what it is asked to find: narrow loads, spills, a missing barrier, loops."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.launch import ROOT

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
machine_code = pytest.importorskip("helpers.machine_code")
build = machine_code.build

pytestmark = machine_code.needed
CONSTANTS = {"BLOCK": 4096}
TYPES = {"x_ptr": "*bf16", "place_ptr": "*i32", "stride": "i32", "count": "i32"}
POINTERS = ("x_ptr", "count")


@triton.jit
def _in_place(x_ptr, place_ptr, stride, count, BLOCK: tl.constexpr, WAIT: tl.constexpr, SPILLS: tl.constexpr):
    """A row less one of its own elements, over itself."""
    x_ptr += tl.program_id(0).to(tl.int64) * stride
    own = tl.load(x_ptr + tl.load(place_ptr))
    if WAIT:
        tl.debug_barrier()
    lanes = tl.arange(0, BLOCK)
    if SPILLS:  # a whole row in the registers of one warp
        held = tl.load(x_ptr + lanes).to(tl.float32)
        for _ in range(count):
            held = tl.cumsum(held * own.to(tl.float32))
        tl.store(x_ptr + lanes, held.to(tl.bfloat16))
    else:
        for begin in range(0, count // BLOCK * BLOCK, BLOCK):
            at = x_ptr + begin + lanes
            tl.store(at, (tl.load(at).to(tl.float32) - own.to(tl.float32)).to(tl.bfloat16))


def made(tmp_path, capability=90, aligned=("stride", *POINTERS), warps=8, wait=True, spills=False, constants=CONSTANTS):
    return build(_in_place, TYPES, {**constants, "WAIT": wait, "SPILLS": spills}, capability, warps, tmp_path, aligned)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_loop_that_streams(capability, tmp_path):
    code = made(tmp_path, capability)
    (loop,) = code.wide_loops
    assert not code.spills and loop.loaded() == loop.stored()
    assert loop.loaded() % (4096 // (8 * 32 * 8)) == 0  # whole iterations, as many as the compiler unrolled
    assert 0.5 < loop.per_logit(2) < 8.0 and code.residency >= 4
    assert code.waits_before_wide_stores(16)


def test_a_row_of_any_length_is_not_read_widely(tmp_path):
    code = made(tmp_path, aligned=POINTERS)
    assert code.loops and not code.wide_loops


def test_a_missing_barrier_is_seen(tmp_path):
    assert not made(tmp_path, wait=False).waits_before_wide_stores(16)


def test_spilled_registers_are_seen(tmp_path):
    code = made(tmp_path, warps=1, spills=True, constants={"BLOCK": 16384})
    assert code.spills and any(x.spills for x in code.instructions)


@pytest.mark.parametrize(
    "registers, warps, shared, programs",
    [(40, 16, 0, 3), (41, 16, 0, 2), (64, 16, 0, 2), (255, 1, 0, 8), (32, 4, 0, 16), (32, 1, 0, 32), (32, 8, 30000, 3)],
)
def test_how_many_programs_fit(registers, warps, shared, programs):
    assert machine_code.MachineCode(registers, 0, shared, 0, warps, (), "").residency == programs


def test_loops_of_a_dump():
    code = machine_code.parse(
        """
        /*0000*/                   LDG.E.128 R8, desc[UR12][R28.64] ;        /* 0x0000000c1c087981 */
                                                                             /* 0x000ea2000c1e1d00 */
        /*0010*/               @P0 BRA 0x40 ;                                /* 0x0000000000200947 */
        /*0020*/             @!UP1 STG.E.U16 desc[UR12][R4.64], R4 ;         /* 0x0000000404009986 */
        /*0030*/                   NOP;                                      /* 0x0000000000007918 */
        /*0040*/              @!P3 BRA P2, 0x10 ;                            /* 0xfffffff0002cb947 */
        /*0050*/                   BRA 0x50;                                 /* 0xfffffffc00fc7947 */
        """
    )
    assert [(x.address, x.name, x.guard, x.target) for x in code] == [
        (0x00, "LDG.E.128", "", None), (0x10, "BRA", "@P0", 0x40), (0x20, "STG.E.U16", "@!UP1", None),
        (0x40, "BRA", "@!P3", 0x10), (0x50, "BRA", "", 0x50),
    ]  # fmt: skip
    assert [x.bits for x in code[:3:2]] == [128, 16]


@pytest.mark.slow
def test_the_gates_hold_under_triton_3_6():
    """The version that cards' images hold. It is downloaded once into build/; without a network this is left out."""
    # As it is installed here: no setup from inside a test.
    command = ["make", "--old-file=.venv/.installed", "test-triton36", f"BIN={os.path.dirname(sys.executable)}"]
    done = subprocess.run(
        [*command, "PYTEST_ARGS=-n 0 -p no:cacheprovider -rs"],
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=1800,
    )  # fmt: skip
    if "triton 3.6.0 could not be downloaded" in done.stderr:
        pytest.skip("triton 3.6.0 could not be downloaded")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "triton 3.6.0" in done.stdout and " passed" in done.stdout and "SKIPPED" not in done.stdout
