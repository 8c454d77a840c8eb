"""Triton kernels compiled for GPUs that this machine need not have: they build, and spill no register."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"),
]


def resources(
    kernel,
    types: dict[str, str],
    constants: dict[str, object],
    capability: int,
    warps: int,
    folder: Path,
    aligned: tuple[str, ...] = (),
):
    """Registers, stack, shared and local memory of a kernel compiled for one GPU architecture, and its PTX.

    `aligned`: the arguments whose value, or address, is a multiple of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    dump = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, encoding="utf-8", check=True
    ).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    return used, compiled.asm["ptx"]


SEQUENCES = {"bounds_ptr": "*i64", "n": "i64", "num_parts": "i32", "mask_ptr": "*u8", "parts_ptr": "*fp64"}
BLOCK = {"BLOCK": 1024}
SEQUENCE_KERNELS = {
    "gae": ("_gae_kernel", {"GAMMA": 0.99, "DECAY": 0.9, "HAS_BOOTSTRAP": True, **BLOCK}),
    "rewards k1": ("_rewards_kernel", {"CLAMP": 20.0, "ESTIMATOR": 1, "TERMS": 11, **BLOCK}),
    "rewards k3": ("_rewards_kernel", {"CLAMP": 20.0, "ESTIMATOR": 3, "TERMS": 19, **BLOCK}),
    "moments": ("_moments_kernel", {"HAS_MASK": True, **BLOCK}),
    "scale": ("_scale_kernel", {"EPS": 1e-8, "HAS_MASK": True, "SHIFT_MEAN": True, "PARTS": 512, **BLOCK}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", SEQUENCE_KERNELS)
def test_sequence_kernels(name, dtype, capability, tmp_path, record_property):
    from stable_rlhf.kernels import sequence

    kernel, constants = SEQUENCE_KERNELS[name]
    kernel = getattr(sequence, kernel)
    if "DTYPE" in kernel.arg_names:
        constants = {**constants, "DTYPE": getattr(tl, f"float{dtype[2:]}")}
    types = {argument: f"*{dtype}" if argument.endswith("_ptr") else "fp32" for argument in kernel.arg_names}
    types = {argument: SEQUENCES.get(argument, types[argument]) for argument in types if argument not in constants}
    used, _ = resources(kernel, types, constants, capability, 4, tmp_path)
    record_property("resources", used)
    # At 128 registers four programs of four warps fit a multiprocessor; a scan of pairs of float64 comes near.
    assert 0 < used["REG"] <= 128 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 4096, used


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_topk_kernels(bits, capability, tmp_path, record_property):
    from stable_rlhf.kernels import topk

    types = {"score_ptr": "*fp32", "cluster_ptr": "*i64", "prefix_ptr": "*i64", "wanted_ptr": "*i64", "kept_ptr": "*i1"}
    types |= {"bad_ptr": "*i32", "counts_ptr": "*i32", "n": "i32", "num_clusters": "i32", "k": "i32"}
    for kernel, shifts, warps in (
        (topk._count_kernel, (64 - bits, 0), 4),
        (topk._digit_kernel, (64 - bits, 0), 1),
        (topk._keep_kernel, (None,), 4),
    ):
        for shift in shifts:
            constants = {"SHIFT": shift, "BITS": bits, **BLOCK}
            constants = {argument: constants[argument] for argument in kernel.arg_names if argument.isupper()}
            own = {argument: types[argument] for argument in kernel.arg_names if argument.islower()}
            used, _ = resources(kernel, own, constants, capability, warps, tmp_path)
            record_property("resources", {"kernel": kernel.__name__, **used})
            assert 0 < used["REG"] <= 96 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 4096, used


ADVANTAGE_PARTS = {
    "no alternates": {"WEIGHED": False, "EXPECTED": False, "LISTED": False, "RULE": 0},
    "default pairs": {"WEIGHED": True, "EXPECTED": True, "LISTED": False, "RULE": 1},
    "rankings": {"WEIGHED": True, "EXPECTED": True, "LISTED": True, "RULE": 0},
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("part", ADVANTAGE_PARTS)
def test_advantage(capability, part, tmp_path, record_property):
    from stable_rlhf.kernels.advantage import TILE, _advantage_kernel

    whole = ("prompt", "pairs", "cu", "totals", "owner")
    double = ("partial", "weight_sum")
    names = [name for name in _advantage_kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(names, "*fp32")
    types |= {f"{name}_ptr": "*i64" for name in whole} | {f"{name}_ptr": "*fp64" for name in double}
    types |= {"counter_ptr": "*i32"} | dict.fromkeys(
        ("responses", "prompts", "pairs", "tokens", "policies", "K"), "i32"
    )
    types |= dict.fromkeys(("margin", "shift", "smoothing", "pair_weight"), "fp32")
    constants = {
        "LOSS": True, "NORMALIZED": True, "MAX_LOG_WEIGHT": 0.0, "BOUNDS": True, "MARGINS": True, "SHIFTS": True,
        "SMOOTHINGS": False, "PAIR_WEIGHTS": True, "DTYPE": tl.float32, "TILE": TILE, "BLOCK": 512,
        **ADVANTAGE_PARTS[part],
    }  # fmt: skip
    used, _ = resources(_advantage_kernel, types, constants, capability, 8, tmp_path)
    record_property("resources", used)
    assert 0 < used["REG"] <= 96 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 4096, used


ROW_TYPES = {
    **dict.fromkeys(("target_ptr", "row_ptr", "order_ptr"), "*i64"),
    "kind_ptr": "*i8",
    **dict.fromkeys(("logits_stride", "gradient_stride", "vocabulary"), "i32"),
}
PLAIN = {"TERMS": True, "KL": 0, "ENTROPY": False, "SOFTCAP": False, "HAS_ORDER": False}
EVERYTHING = {"TERMS": True, "KL": 3, "ENTROPY": True, "SOFTCAP": True, "HAS_ORDER": False, "HAS_ROW_WEIGHT": True}
ROW_KERNELS = {  # logits, gradient, which parts
    "statistics and coefficients": ("bf16", "bf16", {**PLAIN, "STATISTICS": True, "GRADIENT": False}),
    "gradient of kept rows": ("bf16", "bf16", {**PLAIN, "STATISTICS": False, "GRADIENT": True, "HAS_ORDER": True}),
    "all from float32 logits": ("fp32", "bf16", {**PLAIN, "STATISTICS": True, "GRADIENT": True}),
    "all of every option": ("bf16", "bf16", {**EVERYTHING, "STATISTICS": True, "GRADIENT": True}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_policy_rows(name, capability, tmp_path, record_property):
    """At the launch shape of vocabularies of 128,256, 151,936 and 250,880, which is one and the same."""
    from stable_rlhf.kernels.policy import _row_kernel, launch_shape

    logits, gradient, parts = ROW_KERNELS[name]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[logits]
    (block, warps), *others = {
        launch_shape(vocabulary, dtype, parts["SOFTCAP"]) for vocabulary in (128256, 151936, 250880)
    }
    assert not others
    types = {
        argument: ROW_TYPES.get(argument, "*fp32" if argument.endswith("_ptr") else "fp32")
        for argument in _row_kernel.arg_names
        if argument.islower()
    } | {"logits_ptr": f"*{logits}", "gradient_ptr": f"*{gradient}"}
    off = {argument: False for argument in _row_kernel.arg_names if argument.startswith("HAS_")}
    constants = {**off, **parts, "BLOCK": block, "LANES": 16 // dtype.itemsize}
    aligned = ("logits_ptr", "gradient_ptr", "logits_stride", "gradient_stride", "vocabulary")
    used, ptx = resources(_row_kernel, types, constants, capability, warps, tmp_path, aligned)
    record_property("resources", {"block": block, "warps": warps, **used})
    assert used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 1024, used
    # Two programs fit a multiprocessor of 65,536 registers, so that one works while the other waits.
    assert 0 < used["REG"] * 32 * warps <= 65536 // 2, used
    assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), "logits are not read 16 bytes at a time"
    # z is rounded before the maximum is subtracted: no fused multiply and subtract.
    assert re.search(r"fma\.rn\.f32[^;]*, 0f00000000;", ptx)
    if gradient == "bf16" and parts["GRADIENT"]:
        assert "cvt.rn.bf16x2.f32" in ptx and re.search(r"st\.global(\.\w+)*\.v[24]\.b32", ptx)


@pytest.mark.parametrize("name", ["_order_kernel", "_scale_kernel"])
def test_small_policy_kernels(name, tmp_path, record_property):
    from stable_rlhf.kernels import policy

    kernel = getattr(policy, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"count": "i32", "order_ptr": "*i64", "number_ptr": "*i32"}
    types = {argument: types[argument] for argument in kernel.arg_names if argument != "BLOCK"}
    used, _ = resources(kernel, types, {"BLOCK": 1024}, 90, 4, tmp_path)
    record_property("resources", used)
    assert 0 < used["REG"] <= 64 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 1024, used


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gradient", ["fp32", "bf16"])
def test_info_nce(gradient, capability, tmp_path, record_property):
    """The row kernel as InfoNCE runs it: float32 similarities of 256 to 8,192 rows."""
    from stable_rlhf.kernels.policy import _row_kernel, launch_shape

    ((block, warps),) = {launch_shape(rows, torch.float32) for rows in (256, 1000, 8192)}
    types = {
        argument: ROW_TYPES.get(argument, "*fp32" if argument.endswith("_ptr") else "fp32")
        for argument in _row_kernel.arg_names
        if argument.islower()
    } | {"gradient_ptr": f"*{gradient}"}
    off = {argument: False for argument in _row_kernel.arg_names if argument.startswith("HAS_")}
    constants = {**off, **PLAIN, "STATISTICS": True, "GRADIENT": True, "BLOCK": block, "LANES": 4}
    used, _ = resources(_row_kernel, types, constants, capability, warps, tmp_path, ("logits_ptr", "gradient_ptr"))
    record_property("resources", {"block": block, "warps": warps, **used})
    assert used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 1024, used
    assert 0 < used["REG"] * 32 * warps <= 65536 // 2, used


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("prototypes", [20, 50, 3000])
@pytest.mark.parametrize("name", ["_log_sums_kernel", "_loss_kernel"])
def test_swav(name, prototypes, capability, tmp_path, record_property):
    from stable_rlhf.kernels import swav

    kernel, (rows, width, warps) = getattr(swav, name), swav.launch_shape(prototypes)
    types = {argument: "*fp32" if argument.endswith("_ptr") else "fp32" for argument in kernel.arg_names}
    types |= {"rows": "i32", "prototypes": "i32"}
    types = {argument: types[argument] for argument in kernel.arg_names if argument.islower()}
    constants = {"HAS_POTENTIAL": True, "GRADIENT": True, "ROWS": rows, "WIDTH": width}
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument.isupper()}
    used, _ = resources(kernel, types, constants, capability, warps, tmp_path)
    record_property("resources", used)
    # At 168 registers three programs of four warps fit a multiprocessor.
    assert 0 < used["REG"] <= 168 and used["LOCAL"] == 0 and used["STACK"] == 0 and used["SHARED"] <= 4096, used
