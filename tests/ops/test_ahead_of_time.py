"""Triton kernels compiled for GPUs that this machine need not have: they build, and spill no register."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"),
]


def resources(
    kernel, pointers: dict[str, str], constants: dict[str, object], capability: int, warps: int, folder: Path
):
    """Registers, stack, shared and local memory of a kernel compiled for one GPU architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    dump = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_gae(capability, dtype, tmp_path, record_property):
    from stable_rlhf.kernels.sequence_ops import _gae_kernel

    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("reward", "value", "bootstrap", "advantage", "return")}
    constants = {"GAMMA": 0.99, "DECAY": 0.9, "HAS_BOOTSTRAP": True, "DTYPE": getattr(tl, f"float{dtype[2:]}")}
    used = resources(_gae_kernel, {**pointers, "bounds_ptr": "*i64"}, constants, capability, 1, tmp_path)
    record_property("resources", used)
    assert 0 < used["REG"] <= 64 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 1024, used
