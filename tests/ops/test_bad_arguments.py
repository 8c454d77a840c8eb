"""Arguments of every operation that mean nothing: one ValueError each, which begins with the argument's name. And what
is masked is not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension

needs_cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
CU, SCORE = torch.tensor([0, 2, 4]), torch.ones(2)
TARGET = torch.tensor([0, 1, 4, -100])
ROWS: dict[str, Any] = {"old_logprob": -torch.ones(4), "advantage": torch.ones(4)}
LINEAR: dict[str, Any] = {"hidden": torch.ones(4, 3), "weight": torch.ones(5, 3), "target": TARGET}
PACKED: dict[str, Any] = {"logprob": -torch.ones(4), "alt_logprob": -torch.ones(1, 4), "cu_seqlens": CU}
GOOD: dict[str, dict[str, Any]] = {
    "linear_policy_loss": {**LINEAR, **ROWS, "kind": torch.tensor([1, 2, 1, 0]), "bias": torch.zeros(5)},
    "policy_loss": {"logits": torch.ones(4, 5), "target": TARGET, **ROWS},
    "linear_logprob": LINEAR,
    "advantage_loss": {"reward": torch.ones(2), "expected": torch.ones(1), **PACKED},
    "advantage_score": {"reward": torch.ones(2), "expected": torch.ones(2), **PACKED},
    "info_nce": {"a": torch.ones(4, 3), "b": torch.ones(4, 3)},
    "swav_loss": {"a": torch.ones(4, 3), "b": torch.ones(4, 3), "prototypes": torch.ones(2, 3)},
    "gae": {"reward": torch.ones(4), "value": torch.ones(4), "cu_seqlens": CU, "bootstrap_value": SCORE},
    "masked_whiten": {"x": torch.ones(4), "mask": torch.ones(4)},
    "token_rewards": {"logprob": -torch.ones(4), "ref_logprob": -torch.ones(4), "score": SCORE, "cu_seqlens": CU,
                      "kl_coef": 0.1},
    "topk_by_cluster": {"score": torch.ones(4), "cluster": torch.tensor([0, 0, 1, 1]), "num_clusters": 2, "k": 1},
}  # fmt: skip
NOT_NUMBERS = ["1", True, None, [1.0], 1j, math.nan, torch.ones(2), torch.ones((), dtype=torch.complex64)]
TOO_SMALL = [0.0, -1.0, 1e-300, math.inf, 10**400]
NOT_POSITIVE = [*NOT_NUMBERS, *TOO_SMALL]
NOT_COUNTS = [1.5, 2.0, True, "3", None, -1, 2**63, math.nan, torch.ones(2)]
NESTED = torch.nested.nested_tensor([torch.ones(1)])
CONSTANT = [torch.ones((), requires_grad=True)]
BAD: list[tuple[str, str, list[Any]]] = [
    *((op, "temperature", [*NOT_POSITIVE, *CONSTANT, torch.tensor([1.0, 1.0, math.nan, 1.0]), torch.ones(4, 1)])
      for op in ("linear_policy_loss", "policy_loss", "linear_logprob")),
    *((op, name, [v for v in NOT_COUNTS if v is not None] + [wrong])
      for op in ("linear_policy_loss", "linear_logprob")
      for name, wrong in (("workspace_bytes", 0), ("active_rows", 5))),
    ("info_nce", "workspace_bytes", [*NOT_COUNTS, 0]),
    *((op, "config", [{}, None, "k3", PolicyLossConfig]) for op in ("linear_policy_loss", "policy_loss")),
    *((op, name, [-1.0, math.nan, "2", True, *CONSTANT, torch.ones(3), 0.0, torch.zeros(())])
      for op in ("linear_policy_loss", "policy_loss") for name in ("policy_denominator",)),
    *((op, name, [torch.ones(1).to_sparse(), torch.ones((), device="meta"), NESTED])
      for op in ("linear_policy_loss", "policy_loss") for name in ("policy_denominator", "rehearsal_denominator")),
    *(("advantage_loss", name, [1e300, -1e300, 1e39]) for name in ("margin", "rank_margin", "pair_weight")),
    *((op, "row_weight", ["1", 1.0, torch.ones(4, requires_grad=True), torch.full((4,), math.nan)])
      for op in ("linear_policy_loss", "policy_loss")),
    ("linear_policy_loss", "grad_tolerance", [v for v in NOT_NUMBERS if v is not None] + [1.0, -0.1]),
    ("linear_policy_loss", "grad_scale", NOT_POSITIVE),
    ("linear_policy_loss", "logits_dtype", ["float32", 1]),
    ("linear_policy_loss", "hidden", [torch.ones(4, 0), torch.ones(())]),
    ("linear_logprob", "softcap", [v for v in NOT_POSITIVE if v is not None]),
    ("linear_logprob", "entropy", ["yes", None, 1]),
    ("advantage_loss", "margin", ["2", True, math.nan, math.inf, 1j, *CONSTANT, torch.ones(2, requires_grad=True)]),
    *(("advantage_loss", name, ["2", True, math.nan, 1j, *CONSTANT, torch.ones(1, requires_grad=True), torch.ones(3)])
      for name in ("rank_margin", "label_smoothing", "pair_weight")),
    ("advantage_loss", "label_smoothing", [-0.1, 1.1, torch.tensor([2.0])]),
    *((op, "max_weight", [0.0, -1.0, "2", True, math.nan]) for op in ("advantage_loss", "advantage_score")),
    *((op, "num_policies", [1.5, True, "3", -1, 2**63, 0]) for op in ("advantage_loss", "advantage_score")),
    *((op, "weight_mode", ["paper", 1, None, ["sequence"]]) for op in ("advantage_loss", "advantage_score")),
    ("advantage_score", "num_alternates", [1.5, True, "3", -1, 2**63]),
    *((op, "temperature", NOT_POSITIVE) for op in ("info_nce", "swav_loss")),
    ("swav_loss", "epsilon", NOT_POSITIVE),
    ("swav_loss", "iterations", NOT_COUNTS),
    *(("gae", name, [*NOT_NUMBERS, -0.1, 1.1]) for name in ("gamma", "lam")),
    ("masked_whiten", "eps", [*NOT_NUMBERS, -1e-8, math.inf]),
    ("masked_whiten", "shift_mean", ["no", 0, None]),
    ("masked_whiten", "group", ["world", 1]),
    ("masked_whiten", "mask", [torch.tensor([1.0, math.nan, 0.0, 1.0]), [True], torch.ones(3)]),
    ("token_rewards", "kl_coef", [*NOT_NUMBERS, -0.1, math.inf]),
    ("token_rewards", "clamp", [*NOT_NUMBERS, 0.0, -1.0]),
    ("token_rewards", "kl_estimator", ["k4", 1, None]),
    *(("topk_by_cluster", name, NOT_COUNTS) for name in ("k", "num_clusters")),
]  # fmt: skip


@pytest.fixture(params=["torch", pytest.param("cpu", marks=needs_cpp)])
def backend(request):
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("op", GOOD)
def test_the_good_ones(op, backend):
    getattr(ops, op)(**GOOD[op])


@pytest.mark.parametrize(("op", "name", "values"), BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_values(op, name, values, backend):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}:") as caught:
            getattr(ops, op)(**{**GOOD[op], name: value})
        assert "\n" not in str(caught.value), value


ARGUMENTS = [(op, name) for op, good in GOOD.items() for name, value in good.items() if torch.is_tensor(value)]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_tensors_of_another_kind(op, name, backend):
    good = GOOD[op][name]
    bad = {
        "sparse": good.to_sparse(),
        "meta": good.to("meta"),
        "complex": good.to(torch.complex64),
        "list": good.tolist(),
        "string": "x",
        "quantized": torch.quantize_per_tensor(good.float(), 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged).to(good.dtype),
        "nested and strided": torch.nested.nested_tensor([good]),
    }
    if good.is_floating_point():
        bad["negated"] = torch.complex(good.float(), good.float()).conj().imag
    if name != next(iter(GOOD[op])):  # the first gives the shape
        bad["another shape"] = good[..., None].expand(*good.shape, 2)
    for value in bad.values():
        with pytest.raises(ValueError, match=rf"^{name}:") as caught:
            getattr(ops, op)(**{**GOOD[op], name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kl_coef", [-1.0, math.nan, math.inf, "1", True]),
        ("softcap", [0.0, -1.0, math.nan, math.inf, 1e-300, "1"]),
        ("clip_low", [-0.1, 1.1, math.nan, "1"]),
        ("clip_high", [-0.1, math.nan, "1"]),
        ("dual_clip", [1.0, math.nan, "2"]),
        ("entropy_coef", [math.nan, math.inf, "1", None]),
        ("rehearsal_coef", [math.nan, math.inf, "1", None]),
        ("log_ratio_clamp", [0.0, -1.0, math.nan, None]),
        ("kl_estimator", ["k4", 1, None]),
    ],
)
def test_settings(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}:"):
            PolicyLossConfig(**{name: value})


def test_a_bound_beyond_float32_is_none(backend):
    values = {**GOOD["token_rewards"], "kl_estimator": "k3"}
    assert torch.equal(ops.token_rewards(**values, clamp=1e300), ops.token_rewards(**values, clamp=1e30))


def test_what_is_masked_is_not_read(backend):
    """NaN, infinities and targets out of range, wherever nothing is asked: the bits are those without them."""
    nan = torch.tensor([0.0, 0.0, math.nan, math.inf, 0.0, math.nan])
    clean = torch.zeros(6)
    kind = torch.tensor([1, 2, 0, 1, 1, 0])
    target = torch.tensor([0, 1, 2, -100, 3, 3])
    beyond = torch.where(kind == 0, torch.tensor(99), target)  # not active: may be anything
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)
    g = torch.Generator(device="cpu").manual_seed(0)
    hidden, weight = torch.randn(6, 3, generator=g), torch.randn(5, 3, generator=g)

    def loss(values, target, of_rehearsal):
        rows = torch.tensor([-1.0, of_rehearsal, -1.0, -1.0, -2.0, -1.0]) + values
        leaf, head = (hidden + values[:, None]).requires_grad_(), weight.clone().requires_grad_()
        per_row = {"old_logprob": rows, "advantage": rows, "ref_logprob": rows, "config": config}
        common = {"row_weight": 1.0 + values, "temperature": 1.0 + values, **per_row}
        out = ops.linear_policy_loss(leaf, head, target, kind, grad_scale=2.0, **common)
        other = ops.policy_loss(leaf @ torch.eye(3), target.clamp(max=2), kind, **common)
        logprob, entropy = ops.linear_logprob(leaf, head, torch.where(kind == 0, -100, target), entropy=True)
        upstream = torch.ones(6) + values  # of rows that have no log-prob
        torch.autograd.backward([out.loss, logprob, entropy], [None, upstream, upstream])
        return [*out[:3], *other[:3], logprob, entropy, leaf.grad, head.grad]

    for x, y in zip(loss(nan, beyond, math.nan), loss(clean, target, -1.0), strict=True):
        assert torch.equal(x.detach(), y.detach())
    without = ops.policy_loss(hidden, target.clamp(max=2), kind, old_logprob=clean, advantage=clean, ref_logprob=nan)
    assert without.loss.isfinite()  # kl_coef 0: nobody asks for the reference
    mask = nan.isfinite()
    assert torch.equal(ops.masked_whiten(nan, mask), ops.masked_whiten(clean, mask))
