"""Triton kernels compiled for GPUs that this machine need not have: they build, spill no register, leave room for as
many programs as they count on, and move 16 bytes at a time where they stream. `make test-triton36` holds the same under
triton 3.6.0."""

from __future__ import annotations

import re

import pytest
import torch

tl = pytest.importorskip("triton.language")
machine_code = pytest.importorskip("helpers.machine_code")
build = machine_code.build

pytestmark = machine_code.needed
# An H200 is what the kernels are tuned for; the other two rarely differ from it where it holds.
CAPABILITIES = pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))]
)


def holds(code, residency, shared=4096, stack=0):
    """Nothing is spilled in a loop, and elsewhere at most so many bytes; so many programs fit a multiprocessor."""
    assert code.registers > 0 and code.shared <= shared and code.local == 0 and code.stack <= stack, code.resources
    assert not any(x.spills for loop in code.loops for x in loop.instructions), "spilled in a loop"
    assert stack or not code.spills, code.resources
    assert code.residency >= residency, code.resources


SEQUENCES = {
    "bounds_ptr": "*i64", "n": "i64", "tokens": "i32", "num_parts": "i32", "mask_ptr": "*u8", "parts_ptr": "*fp64",
    "notes_ptr": "*i32",
}  # fmt: skip
BLOCK = {"BLOCK": 1024}
SEQUENCE_KERNELS = {
    "gae": ("_gae_kernel", {"GAMMA": 0.99, "DECAY": 0.9, "HAS_BOOTSTRAP": True, **BLOCK}),
    "rewards k1": ("_rewards_kernel", {"CLAMP": 20.0, "ESTIMATOR": 1, "TERMS": 11, **BLOCK}),
    "rewards k3": ("_rewards_kernel", {"CLAMP": 20.0, "ESTIMATOR": 3, "TERMS": 19, **BLOCK}),
    "moments": ("_moments_kernel", {"HAS_MASK": True, **BLOCK}),
    "scale": ("_scale_kernel", {"EPS": 1e-8, "HAS_MASK": True, "SHIFT_MEAN": True, "PARTS": 512, **BLOCK}),
}


@CAPABILITIES
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SEQUENCE_KERNELS)
def test_sequence_kernels(name, dtype, capability, tmp_path, record_property):
    from stable_rlhf.kernels import sequence

    kernel, constants = SEQUENCE_KERNELS[name]
    kernel = getattr(sequence, kernel)
    if "DTYPE" in kernel.arg_names:
        constants = {**constants, "DTYPE": getattr(tl, f"float{dtype[2:]}")}
    types = {argument: f"*{dtype}" if argument.endswith("_ptr") else "fp32" for argument in kernel.arg_names}
    types = {argument: SEQUENCES.get(argument, types[argument]) for argument in types if argument not in constants}
    code = build(kernel, types, constants, capability, 4, tmp_path)
    record_property("resources", code.resources)
    holds(code, residency=4)  # 128 registers; a scan of pairs of float64 comes near


TOPK_TYPES = {
    **dict.fromkeys(("cluster_ptr", "prefix_ptr", "wanted_ptr", "rows_ptr"), "*i64"),
    **dict.fromkeys(("counts_ptr", "candidates_ptr", "bucket_ptr", "kept_ptr", "groups_ptr", "status_ptr"), "*i32"),
    "score_ptr": "*fp32",
}
TOPK_KERNELS = {  # constants, warps
    "_count_kernel": ({"SAMPLED": 8, "SHIFT": 48, "BITS": 8, **BLOCK}, 4),
    "_digit_kernel": ({"SHIFT": 48, "BITS": 8}, 1),
    "_collect_kernel": ({"CAPACITY": 512, **BLOCK}, 4),
    "_select_kernel": ({"CAPACITY": 512}, 2),
    "_keep_kernel": (BLOCK, 8),
    "_order_kernel": ({"WORDS": 1024, **BLOCK}, 8),
}


@CAPABILITIES
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in TOPK_KERNELS),
        ("_count_kernel", {"SHIFT": 60, "BITS": 4, "SAMPLED": 1}),
        ("_count_kernel", {"SHIFT": 0, "SAMPLED": 1}),
        ("_digit_kernel", {"SHIFT": 60, "BITS": 4}),
        ("_select_kernel", {"CAPACITY": 8192}),
    ],
)
def test_topk_kernels(name, changes, capability, tmp_path, record_property):
    from stable_rlhf.kernels import topk

    constants, warps = TOPK_KERNELS[name]
    kernel, constants = getattr(topk, name), {**constants, **changes}
    largest = constants.get("CAPACITY") == topk._MOST_CANDIDATES
    warps = 8 if largest else warps
    types = {argument: TOPK_TYPES.get(argument, "i32") for argument in kernel.arg_names if argument.islower()}
    code = build(kernel, types, constants, capability, warps, tmp_path)
    record_property("resources", {"kernel": name, **code.resources})
    holds(code, residency=1 if largest else 32 // warps)  # 1,024 threads that read rows


ADVANTAGE_PARTS = {
    "no alternates": {"WEIGHED": False, "EXPECTED": False, "LISTED": False, "RULE": 0, "ALONE": True, "ITEMS": 1024},
    "default pairs": {"WEIGHED": True, "EXPECTED": True, "LISTED": False, "RULE": 1, "ALONE": False, "ITEMS": 256},
    "pairs of prompts": {"WEIGHED": True, "EXPECTED": True, "LISTED": True, "RULE": 2, "ALONE": False, "ITEMS": 256},
    "rankings": {"WEIGHED": True, "EXPECTED": True, "LISTED": True, "RULE": 0, "ALONE": False, "ITEMS": 256},
}
ADVANTAGE_TYPES = {
    **dict.fromkeys(("prompt_ptr", "pairs_ptr", "cu_ptr", "totals_ptr"), "*i64"),
    **dict.fromkeys(("partial_ptr", "spread_ptr", "figures_ptr", "heaviest_ptr"), "*fp64"),
    "notes_ptr": "*i32",
    **dict.fromkeys(("margin", "shift", "smoothing", "pair_weight"), "fp32"),
}


def advantage_types(kernel):
    """Of the arguments that are not constants: float32 arrays and 32-bit numbers, but for those of ADVANTAGE_TYPES."""
    return {
        name: ADVANTAGE_TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if not name.isupper() or name == "K"
    }


@CAPABILITIES
@pytest.mark.parametrize("part", ADVANTAGE_PARTS)
def test_advantage(capability, part, tmp_path, record_property):
    from stable_rlhf.kernels.advantage import TILE, _advantage_kernel

    constants = {
        "LOSS": True, "NORMALIZED": True, "MAX_LOG_WEIGHT": 0.0, "BOUNDS": True, "MARGINS": True, "SHIFTS": True,
        "SMOOTHINGS": False, "PAIR_WEIGHTS": True, "DTYPE": tl.float32, "ALTERNATES": 4, "TILE": TILE,
        **ADVANTAGE_PARTS[part],
    }  # fmt: skip
    types = advantage_types(_advantage_kernel)
    code = build(_advantage_kernel, types, constants, capability, 8, tmp_path)
    record_property("resources", code.resources)
    holds(code, residency=1)  # on 132 multiprocessors 33,792 responses
    if part == "default pairs":  # where the only atomic operation takes the ticket
        before, after = re.split(r"atom\.\S*acq_rel\S*", code.ptx)
        # All threads have written before the ticket, and read what other programs wrote after it.
        assert "bar.sync" in before[before.rindex("st.global") :]
        assert "bar.sync" in after[: after.index("ld.global")]


@CAPABILITIES
@pytest.mark.parametrize("alternates", [1, 4])
def test_advantage_pieces(capability, alternates, tmp_path, record_property):
    """Reads all tokens: seven programs must fit a multiprocessor."""
    from stable_rlhf.kernels.advantage import TILE, _prepare_kernel

    constants = {"WEIGHED": True, "HEAVIEST": True, "ALTERNATES": alternates, "TILE": TILE, "PROBES": 256}
    code = build(_prepare_kernel, advantage_types(_prepare_kernel), constants, capability, 4, tmp_path)
    record_property("resources", code.resources)
    holds(code, residency=7)


def test_an_alternate_times_the_number_of_tokens_may_pass_two_to_the_31():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stable_rlhf.kernels.advantage import TILE, _prepare_kernel

    constants = {"WEIGHED": True, "HEAVIEST": True, "ALTERNATES": 4, "TILE": TILE, "PROBES": 256}
    signature = dict.fromkeys(_prepare_kernel.arg_names, "constexpr") | advantage_types(_prepare_kernel)
    source = ASTSource(_prepare_kernel, signature, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ttir"]
    products = set(re.findall(r"arith\.muli .*: tensor<4x1x(i\d+)>", code))
    assert products == {"i64"}


ROW_TYPES = {
    **dict.fromkeys(("target_ptr", "row_ptr"), "*i64"),
    "kind_ptr": "*i8",
    **dict.fromkeys(("logits_stride", "gradient_stride", "count", "vocabulary"), "i32"),
}
ALL_PARTS = {"STATISTICS": True, "TERMS": True, "GRADIENT": True, "LEAVE_OUT": True}
PLAIN = {**ALL_PARTS, "KL": 0, "ENTROPY": False, "SOFTCAP": False}
EVERYTHING = {"KL": 3, "ENTROPY": True, "SOFTCAP": True, "LEAVE_OUT": False, "HAS_ROW": True, "HAS_ROW_WEIGHT": True}
# Logits, gradient, which parts, and the most instructions a logit in the loop of each: somewhat more than both versions
# of triton make. By count, an H200 at 1.76 GHz issues 13.8 while it reads or writes one bf16 logit at 4.3 TB/s.
ROW_KERNELS = {
    "statistics": ("bf16", "bf16", {**PLAIN, "TERMS": False, "GRADIENT": False}, (11.2,)),
    "all": ("bf16", "bf16", PLAIN, (11.2, 10.5)),
    "all of chosen rows": ("bf16", "bf16", {**PLAIN, "HAS_ROW": True, "LEAVE_OUT": False}, (11.2, 10.5)),
    "gradient for coefficients": (
        "bf16", "bf16", {**PLAIN, "STATISTICS": False, "TERMS": False, "LEAVE_OUT": False, "ENTROPY": True}, (13.5,)
    ),
    "all from float32 logits": ("fp32", "bf16", PLAIN, (13.0, 14.2)),
    "all of every option": ("bf16", "bf16", {**PLAIN, **EVERYTHING}, (34.0, 39.0)),
}  # fmt: skip


def gradient_bits(logits: torch.dtype, gradient: str) -> int:
    """Of the gradient of as many logits as a 16-byte load brings."""
    return 128 // logits.itemsize * {"bf16": 2, "fp32": 4}[gradient]


def row_code(shape, logits, gradient, parts, capability, folder, aligned):
    """The machine code of the row kernel, with the registers that its launch allows. Rows that are aligned are so by
    eight 16-bit logits, which Triton does not see from their stride."""
    from stable_rlhf.kernels.policy import block_of, registers_of
    from stable_rlhf.kernels.policy_rows import row_kernel

    types = {
        argument: ROW_TYPES.get(argument, "*fp32" if argument.endswith("_ptr") else "fp32")
        for argument in row_kernel.arg_names
        if argument.islower()
    } | {"logits_ptr": f"*{logits}", "gradient_ptr": f"*{gradient}"}
    off = {argument: False for argument in row_kernel.arg_names if argument.startswith("HAS_")}
    constants = {**off, **parts, "LANES": {"bf16": 8, "fp32": 4}[logits]}
    constants["ALIGNED"] = "logits_ptr" in aligned
    constants["BLOCK"] = block_of(shape, {"bf16": torch.bfloat16, "fp32": torch.float32}[logits], constants["ALIGNED"])
    options = {"maxnreg": registers_of(shape, constants["ALIGNED"] and not parts["SOFTCAP"])}
    return build(row_kernel, types, constants, capability, shape.warps, folder, aligned, options)


@CAPABILITIES
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_policy_rows(name, capability, tmp_path, record_property):
    """At the launch shape of vocabularies of 128,256, 151,936 and 250,880, which is one and the same."""
    from stable_rlhf.kernels.policy import launch_shape

    logits, gradient, parts, most = ROW_KERNELS[name]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[logits]
    (shape,) = {launch_shape(vocabulary, dtype, parts["SOFTCAP"]) for vocabulary in (128256, 151936, 250880)}
    aligned = ("logits_ptr", "gradient_ptr", "vocabulary")
    code = row_code(shape, logits, gradient, parts, capability, tmp_path, aligned)
    # Both ways of loading and storing, with a mask and without, are in the code; one of them runs.
    counted = [round(len(loop.instructions) * 32 * shape.warps / shape.block, 1) for loop in code.wide_loops]
    record_property("resources", {"block": shape.block, "instructions a logit": counted, **code.resources})
    # With a softcap triton 3.6 stops at 64 registers on sm_90 and sm_100, and puts some numbers of a row aside.
    holds(code, residency=shape.residency, shared=1024, stack=32 if parts["SOFTCAP"] else 0)
    assert len(counted) == len(most), f"a loop over whole blocks does not load 16 bytes at a time: {counted}"
    assert all(number <= bound for number, bound in zip(counted, most, strict=True)), counted
    if parts["GRADIENT"]:
        wide = gradient_bits(dtype, gradient)
        assert code.wide_loops[-1].stored(wide) == code.wide_loops[-1].loaded(), "narrow stores"
        assert code.waits_before_wide_stores(8 * dtype.itemsize)
    if not parts["STATISTICS"]:
        # z is rounded before the maximum is subtracted: no fused multiply and subtract.
        assert re.search(r"fma\.rn\.f32[^;]*, 0f00000000;", code.ptx)
    if gradient == "bf16" and parts["GRADIENT"]:
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", code.ptx)


@CAPABILITIES
@pytest.mark.parametrize("softcap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_policy_rows_of_any_width(softcap, capability, tmp_path, record_property):
    """Rows whose width is odd and whose beginnings lie anywhere: narrow loads, but as many programs as at best."""
    from stable_rlhf.kernels.policy import launch_shape

    for vocabulary in (1000, 50257):
        shape = launch_shape(vocabulary, torch.bfloat16, softcap)
        code = row_code(shape, "bf16", "bf16", {**PLAIN, "SOFTCAP": softcap}, capability, tmp_path, ())
        record_property("resources", {"block": shape.block, **code.resources})
        holds(code, residency=shape.residency, shared=1024)


@pytest.mark.parametrize("block, warps", [(1024, 4), (4096, 16)])
@pytest.mark.parametrize("name", ["_order_kernel", "_scale_kernel", "_move_kernel"])
def test_small_policy_kernels(name, block, warps, tmp_path, record_property):
    from stable_rlhf.kernels import policy

    kernel = getattr(policy, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("count", "stride", "vocabulary"), "i32")
    types |= {"order_ptr": "*i64", "number_ptr": "*i32", "gap_ptr": "*i32", "gradient_ptr": "*bf16"}
    types = {argument: types[argument] for argument in kernel.arg_names if argument != "BLOCK"}
    if name == "_move_kernel":
        block, warps = policy._MOVE_WARPS * 32 * 16, policy._MOVE_WARPS
    aligned = tuple(argument for argument in ("gradient_ptr", "stride", "vocabulary") if argument in types)
    code = build(kernel, types, {"BLOCK": block}, 90, warps, tmp_path, aligned)
    record_property("resources", code.resources)
    holds(code, residency=16 // warps)
    if name == "_move_kernel":
        assert all(loop.stored() == loop.loaded() > 0 for loop in code.wide_loops) and code.wide_loops


@CAPABILITIES
@pytest.mark.parametrize("gradient", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_info_nce(gradient, capability, tmp_path, record_property):
    """The row kernel as InfoNCE runs it: float32 similarities of 256 to 8,192 rows."""
    from stable_rlhf.kernels.policy import launch_shape

    for shape in {launch_shape(rows, torch.float32) for rows in (256, 1000, 8192)}:
        parts = {**PLAIN, "LEAVE_OUT": False}
        code = row_code(shape, "fp32", gradient, parts, capability, tmp_path, ("logits_ptr", "gradient_ptr"))
        record_property("resources", {"block": shape.block, **code.resources})
        holds(code, residency=shape.residency, shared=1024)


@CAPABILITIES
@pytest.mark.parametrize("prototypes", [50, *(pytest.param(number, marks=pytest.mark.slow) for number in (20, 3000))])
@pytest.mark.parametrize("name", ["_log_sums_kernel", "_loss_kernel"])
def test_swav(name, prototypes, capability, tmp_path, record_property):
    from stable_rlhf.kernels import swav

    kernel, (rows, width, warps) = getattr(swav, name), swav.launch_shape(prototypes)
    types = {argument: "*fp32" if argument.endswith("_ptr") else "fp32" for argument in kernel.arg_names}
    types |= {"rows": "i32", "prototypes": "i32"}
    types = {argument: types[argument] for argument in kernel.arg_names if argument.islower()}
    constants = {"HAS_POTENTIAL": True, "GRADIENT": True, "ROWS": rows, "WIDTH": width}
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument.isupper()}
    code = build(kernel, types, constants, capability, warps, tmp_path)
    record_property("resources", code.resources)
    holds(code, residency=12 // warps)  # 168 registers


HEAD_TYPES = {"room": "i32", "vocabulary": "i32", "width": "i32", "target_ptr": "*i64", "count_ptr": "*i64"}
HEADS = {
    "bf16": ("bf16", "bf16", 10.75),
    "fp16": pytest.param(("fp16", "fp16", None), marks=pytest.mark.slow),
    "float32 logits": pytest.param(("bf16", "fp32", 10.0), marks=pytest.mark.slow),
}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_head(case, tmp_path, record_property):
    """A tile of the product with the head and its statistics stay in registers, on the only kind of GPU that it is for.
    What follows a tile's last step is counted in instructions an element, which the ledger's time of a tile rests on.
    """
    from bench.count.rates import Rates
    from stable_rlhf.kernels import policy_head as head

    inputs, logits, most = case
    names = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    types = {name: "*fp32" for name in head.head_kernel.arg_names if name.endswith("_ptr")} | HEAD_TYPES
    for name, rows in (("hidden", head.ROWS), ("weight", head.COLUMNS)):
        types[name] = f"tensordesc<{inputs}[{rows},{head.INNER}]>"
    constants = {
        "COUNTED": True, "DTYPE": names[logits], "ROWS": head.ROWS, "COLUMNS": head.COLUMNS,
        "INNER": head.INNER, "GROUP": head.GROUP, "ASSEMBLY": True,
    }  # fmt: skip
    aligned = tuple(name for name in types if name.endswith("_ptr") or name == "width")
    options = {"num_stages": head.STAGES}
    code = build(head.head_kernel, types, constants, 90, head.WARPS, tmp_path, aligned, options)
    record_property("resources", code.resources)
    assert not code.spills and code.shared <= 227 << 10, code.resources
    (loop,) = (loop for loop in code.loops if any(x.kind == "HGMMA" for x in loop.instructions))
    products = [x.name for x in loop.instructions if x.kind == "HGMMA"]
    assert len(products) == head.INNER // 16 and all(name.startswith("HGMMA.64x256x16.F32") for name in products)
    assert any(x.kind == "UTMALDG" for x in loop.instructions), "the copy engine brings the next blocks"
    if most is not None:
        counted = code.after_product * 32 * head.WARPS / (head.ROWS * head.COLUMNS)
        record_property("instructions an element", counted)
        assert 8.0 < counted <= most
    if case == HEADS["bf16"]:
        assert most == Rates().end_instructions
