"""Triton kernels compiled for GPUs that this machine need not have, and what their machine code does.

`build` compiles a kernel for one architecture and reads it back with cuobjdump: registers and memory, and the
instructions with their loops. A loop is what a backward branch closes; the instructions in it over the logits that its
loads bring a thread are the instructions a logit.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needed = [  # of tests that build kernels
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"),
]
REGISTERS, WARPS, SHARED, PROGRAMS = 65536, 64, 100 << 10, 32  # of a multiprocessor, the least of sm_80, 90 and 100

_INSTRUCTION = re.compile(r"^\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?P<text>[^;]*?)\s*;", re.MULTILINE)
_TEXT = re.compile(r"(?:(?P<guard>@!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*)", re.DOTALL)
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers, such as LDG.E.128
    operands: str
    guard: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bits(self) -> int:
        """What a load or store moves for a thread."""
        return next((bits for part in self.name.split(".") if (bits := _BITS.get(part))), 32)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.kind != "BRA":
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else None

    @property
    def loads(self) -> bool:
        return self.kind in ("LDG", "LDGSTS")

    @property
    def stores(self) -> bool:
        return self.kind == "STG"

    @property
    def spills(self) -> bool:
        return self.kind in ("LDL", "STL")

    @property
    def waits(self) -> bool:
        """For all threads of the program."""
        return self.kind == "BAR" and "ARV" not in self.name


@dataclass(frozen=True)
class Loop:
    """Instructions from a backward branch's target to the branch."""

    instructions: tuple[Instruction, ...]

    @property
    def begin(self) -> int:
        return self.instructions[0].address

    @property
    def end(self) -> int:
        return self.instructions[-1].address

    def loaded(self, bits: int = 128) -> int:
        """Loads of so many bits."""
        return sum(x.loads and x.bits == bits for x in self.instructions)

    def stored(self, bits: int = 128) -> int:
        return sum(x.stores and x.bits == bits for x in self.instructions)

    def per_logit(self, itemsize: int) -> float:
        """Instructions a logit, where all that the wide loads bring are logits."""
        return len(self.instructions) / (self.loaded() * 16 // itemsize)


@dataclass(frozen=True)
class MachineCode:
    registers: int
    stack: int
    shared: int
    local: int
    warps: int
    instructions: tuple[Instruction, ...]
    ptx: str = field(repr=False)

    @property
    def resources(self) -> dict[str, int]:
        names = ("registers", "stack", "shared", "local", "warps")
        return {name: getattr(self, name) for name in names}

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local or any(x.spills for x in self.instructions))

    @property
    def residency(self) -> int:
        """How many programs fit a multiprocessor at a time. Registers are given out by eight a thread."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        fits = [REGISTERS // registers, WARPS // self.warps, PROGRAMS]
        return min(*fits, SHARED // (self.shared + 1024))  # a program's own 1 KiB is the system's

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Innermost loops, in the order of the code. Branches of later iterations (`continue`) to one head are one
        loop; a branch to itself, which stands behind the end, is none."""
        ends: dict[int, int] = {}
        for x in self.instructions:
            if x.target is not None and x.target < x.address:
                ends[x.target] = max(x.address, ends.get(x.target, 0))
        spans = sorted(ends.items())
        inner = [
            (begin, end)
            for begin, end in spans
            if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
        ]
        return tuple(Loop(tuple(x for x in self.instructions if begin <= x.address <= end)) for begin, end in inner)

    @property
    def wide_loops(self) -> tuple[Loop, ...]:
        """Innermost loops that load 16 bytes at a time."""
        return tuple(loop for loop in self.loops if loop.loaded())

    @property
    def after_product(self) -> int:
        """Instructions from the wait for the last step of a product to the end of the loop over its tiles, by the
        shortest way: every forward branch is taken."""
        loop = max(self.loops, key=lambda loop: sum(x.kind == "HGMMA" for x in loop.instructions))
        at = max(i for i, x in enumerate(loop.instructions) if "DEPBAR" in x.name and x.operands.endswith("0x0"))
        passed = 0
        while at < len(loop.instructions):
            passed += 1
            here = loop.instructions[at]
            if here.target is None or here.target <= here.address:
                at += 1
            else:
                at = sum(x.address < here.target for x in loop.instructions)
        return passed

    def waits_before_wide_stores(self, bits: int) -> bool:
        """Whether all threads wait for each other between the last single logit of so many bits that is read before the
        first wide store, and that store: a gradient in the logits' place must not overwrite what others still read."""
        first = next((x.address for x in self.instructions if x.stores and x.bits >= 64), None)
        if first is None:
            return False
        read = [x.address for x in self.instructions if x.loads and x.bits == bits and x.address < first]
        return any(x.waits and max(read, default=0) < x.address < first for x in self.instructions)


def parse(sass: str) -> tuple[Instruction, ...]:
    """The instructions of a dump of one kernel, without those that do nothing."""
    found = []
    for line in _INSTRUCTION.finditer(sass):
        parts = _TEXT.fullmatch(line["text"])
        if parts is None:
            raise ValueError(f"not an instruction: {line['text']!r}")
        if parts["name"] != "NOP":
            found.append(
                Instruction(int(line["address"], 16), parts["name"], parts["operands"].strip(), parts["guard"] or "")
            )
    return tuple(found)


def build(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    capability: int,
    warps: int,
    folder: Path,
    aligned: tuple[str, ...] = (),
    options: dict[str, object] | None = None,
) -> MachineCode:
    """A kernel compiled for one architecture. `aligned`: arguments whose value, or address, is a multiple of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, **(options or {})}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    done = subprocess.run([CUOBJDUMP, "-res-usage", "-sass", binary], capture_output=True, encoding="utf-8", check=True)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return MachineCode(
        used["REG"], used["STACK"], compiled.metadata.shared, used["LOCAL"], warps, parse(done.stdout),
        compiled.asm["ptx"],
    )  # fmt: skip
