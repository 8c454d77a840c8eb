"""swav_loss on every backend against its definition in float64, Sinkhorn's promises, closed forms, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import BACKENDS, INTERPRETED, ISAS, cpp, interpreted, not_interpreted, plain
from stable_rlhf.ops.contrastive import swav, unit_rows

pytest.importorskip("triton")


@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows, prototypes, width, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=g)
    b = a + 0.7 * torch.randn(rows, width, generator=g)
    return a.to(dtype), b.to(dtype), torch.randn(prototypes, width, generator=g).to(dtype)


def sinkhorn(scores, epsilon, iterations):
    """The paper's form: a matrix that is divided by the sums of its columns and rows in turn, each given its share."""
    q = torch.exp(scores.double() / epsilon)  # [N, K]
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q / q.sum(1, keepdim=True)


def definition(a, b, prototypes, temperature=0.1, epsilon=0.05, iterations=3):
    """Value and gradients in float64."""
    leaves = [x.double().requires_grad_() for x in (a, b, prototypes)]
    first, second, centres = (x / x.norm(dim=1, keepdim=True) for x in leaves)
    scores = [first @ centres.T, second @ centres.T]
    codes = [sinkhorn(s.detach(), epsilon, iterations) for s in scores]
    terms = [
        (q * torch.log_softmax(s / temperature, 1)).sum(1).mean() for q, s in zip(codes[::-1], scores, strict=True)
    ]
    loss = -0.5 * (terms[0] + terms[1])
    loss.backward()
    return loss.detach(), *(x.grad for x in leaves)


def run(a, b, prototypes, upstream=1.0, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, prototypes)]
    loss = ops.swav_loss(*leaves, **options)
    (upstream * loss).backward()
    return loss.detach(), *(x.grad for x in leaves)


def compare(got, want, near=1e-4):
    assert got[0].ndim == 0
    torch.testing.assert_close(got[0].double(), want[0], rtol=near, atol=1e-6)
    for mine, truth in zip(got[1:], want[1:], strict=True):
        error = float((mine.double() - truth).norm())
        assert error <= near * float(truth.norm()) + 1e-6  # p - q where a row is nearly sure


SHAPES = [
    (1, 1, 3),
    (1, 5, 4),
    (2, 3, 2),
    (17, 20, 8),
    (64, 50, 16),
    (65, 33, 5),
    (130, 16, 7),
    (3, 300, 9),
    (5, 2500, 6),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape, backend):
    inputs = problem(*shape, seed=shape[0])
    for options in ({}, {"temperature": 0.7, "epsilon": 0.3, "iterations": 1}, {"iterations": 0}):
        want = definition(*inputs, **options)
        with ops.backend(backend):
            got = run(*inputs, **options)
        assert all(x.dtype == torch.float32 for x in got)
        compare(got, want)


# Codes by masses and rows without a maximum; by logarithms; masses and rows with a maximum; and the last of either.
SHARPNESS = {
    "soft": {}, "hard codes": {"epsilon": 0.02}, "hard predictions": {"temperature": 0.02},
    "hardly soft": {"epsilon": 2 / 59, "temperature": 2 / 59},
    "hardly hard": {"epsilon": 2 / 61, "temperature": 2 / 61},
}  # fmt: skip


@cpp
@pytest.mark.parametrize("name", SHARPNESS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, name, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    for prototypes in (1, 3, 16, 37):
        inputs = problem(70, prototypes, 12)
        compare(run(*inputs, **SHARPNESS[name]), definition(*inputs, **SHARPNESS[name]))


@cpp
@pytest.mark.parametrize("name", SHARPNESS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_are_prototypes(isa, name, monkeypatch):
    """Cosines from -1 to 1, so masses of every size that there is; rounded, some are beyond 1."""
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    _, _, prototypes = problem(1, 21, 40, seed=5)
    a = torch.cat([prototypes, -prototypes, prototypes[:9]])
    b = torch.cat([-prototypes, prototypes.flip(0), 3.0 * prototypes[:9]])
    units = unit_rows.unit_rows(prototypes, "x")
    assert (units @ units.T).amax() > 1.0
    compare(run(a, b, prototypes, **SHARPNESS[name]), definition(a, b, prototypes, **SHARPNESS[name]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, backend):
    inputs = problem(30, 10, 24, dtype=dtype)
    want = definition(*inputs)
    with ops.backend(backend):
        got = run(*inputs)
    assert got[0].dtype == torch.float32 and all(x.dtype == dtype for x in got[1:])
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    for mine, truth in zip(got[1:], want[1:], strict=True):
        rounding = float((truth.to(dtype).double() - truth).norm())
        assert float((mine.double() - truth).norm()) <= 1.05 * rounding + 1e-4 * float(truth.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_rows_and_columns_sum_as_they_must(epsilon, backend):
    """A row's code to 1 after any number of iterations; after many, every prototype's mass to N / K."""
    rows, prototypes = 90, 12
    g = torch.Generator().manual_seed(1)
    scores = 2 * torch.rand(2, rows, prototypes, generator=g) - 1
    scores[:, :, 0] += 0.5  # the favourite of all
    kernels = None if backend == "torch" else swav.kernels_of(backend)
    for iterations in (0, 1, 3, 60):
        v = swav.potentials(scores, epsilon, iterations, None, kernels)
        z = scores / epsilon if v is None else scores / epsilon + v[:, None]
        codes = torch.softmax(z.double(), -1)
        for view in range(2):
            torch.testing.assert_close(codes[view], sinkhorn(scores[view], epsilon, iterations), rtol=2e-4, atol=1e-7)
        mass = codes.sum(1)
        torch.testing.assert_close(codes.sum(-1), torch.ones(2, rows, dtype=torch.float64))
        away = float((mass * prototypes / rows - 1).abs().max())
        assert away > 0.05 if iterations == 0 else away < (1e-3 if iterations == 60 else math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_their_prototypes(backend):
    """n orthonormal rows and prototypes: codes of 1 and predictions softmax((1, 0, ...) / t), nearly."""
    eye = torch.eye(6)
    with ops.backend(backend):
        loss, *_ = run(2 * eye, eye, 5 * eye, temperature=0.5, epsilon=0.02)
    assert float(loss) == pytest.approx(math.log(1 + 5 * math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_be_told_apart(backend):
    """Codes are then uniform, and so must predictions become: cross-entropy of the uniform against them."""
    a = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with ops.backend(backend):
        loss, *_ = run(a, a, prototypes, temperature=0.5)
    assert float(loss) == pytest.approx(0.5 * math.log1p(math.exp(-2)) + 0.5 * (2 + math.log1p(math.exp(-2))), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature, epsilon", [(1e-30, 0.05), (1e30, 0.05), (0.1, 1e-4), (0.1, 1e30), (1e-3, 1e-30)])
def test_extreme_temperatures(temperature, epsilon, backend):
    """Nothing overflows, and codes whose exponentials all vanish in float64 still sum to 1."""
    inputs = problem(12, 5, 4)
    with ops.backend(backend):
        loss, *grads = run(*inputs, temperature=temperature, epsilon=epsilon)
    assert math.isfinite(float(loss)) and float(loss) >= 0
    assert all(g.isfinite().all() for g in grads)
    if epsilon == 1e-4:
        wide = [x.double() for x in inputs]
        want = float(ops.swav_loss(*wide, temperature=temperature, epsilon=epsilon))
        assert float(loss) == pytest.approx(want, rel=1e-2)  # scores of 1e4 in float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_and_prototypes(backend):
    """Score 0, no gradient."""
    a, b, prototypes = problem(9, 4, 5)
    a[2], b[7], prototypes[1] = 0.0, 0.0, 0.0
    with ops.backend(backend):
        loss, *grads = run(a, b, prototypes)
    wide = [x.double().requires_grad_() for x in (a, b, prototypes)]
    with ops.backend("torch"):
        want = ops.swav_loss(*wide)
        want.backward()
    assert not grads[0][2].any() and not grads[1][7].any() and not grads[2][1].any()
    compare((loss, *grads), (want.detach(), *(x.grad for x in wide)))


@plain
def test_gradcheck():
    """Finite differences in float64. Codes carry no gradient, so here they are uniform whatever the scores."""
    a, b, prototypes = (x.requires_grad_() for x in problem(5, 3, 4, dtype=torch.float64))
    options = {"temperature": 0.4, "epsilon": 1e30, "iterations": 0}
    assert torch.autograd.gradcheck(lambda *x: ops.swav_loss(*x, **options), (a, b, prototypes))
    assert ops.swav_loss(a, b, prototypes).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    inputs = problem(11, 6, 7)
    with ops.backend(backend):
        loss, *grads = run(*inputs)
        assert not ops.swav_loss(*inputs).requires_grad
        torch.testing.assert_close(ops.swav_loss(*inputs), loss)
        for i in range(3):
            given = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            ops.swav_loss(*given).backward()
            torch.testing.assert_close(given[i].grad, grads[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients(backend):
    inputs = problem(8, 5, 4)
    with ops.backend(backend):
        once, thrice = run(*inputs), run(*inputs, upstream=3.0)
    for single, triple in zip(once[1:], thrice[1:], strict=True):
        torch.testing.assert_close(triple, 3 * single)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_again_and_on_any_number_of_threads(backend, monkeypatch):
    inputs = problem(300, 21, 6)
    results = []
    for threads in (1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)  # of the kernels, not of BLAS
        with ops.backend(backend):
            results.append(run(*inputs))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@cpp
def test_autocast_leaves_the_products_alone():
    inputs = problem(30, 8, 16)
    want = run(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(*inputs)
        with ops.backend("torch"):
            torch.testing.assert_close(ops.swav_loss(*inputs), want[0])
    assert all(torch.equal(mine, truth) for mine, truth in zip(got, want, strict=True))


@plain
@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.zeros(3)}, r"a: shape \(3,\) instead of \[B, D\]"),
        ({"b": torch.zeros(4, 2)}, r"b: shape \(4, 2\) instead of \(3, 2\)"),
        ({"prototypes": torch.zeros(4, 3)}, r"prototypes: shape \(4, 3\) instead of \[K, 2\]"),
        ({"prototypes": torch.zeros(0, 2)}, r"prototypes: shape \(0, 2\)"),
        ({"prototypes": torch.zeros(4, 2).double()}, "prototypes: type float64 is not one of float32"),
        ({"prototypes": torch.tensor([[1.0, math.nan]])}, "prototypes: non-finite value nan at position 1"),
        ({"a": torch.tensor([[1.0, math.inf]] * 3)}, "a: non-finite value inf at position 1"),
        ({"a": torch.zeros(0, 2), "b": torch.zeros(0, 2)}, "a: no rows"),
        ({"temperature": -1.0}, "temperature: -1.0 is not a positive number"),
        ({"epsilon": 0.0}, "epsilon: 0.0 is not a positive number"),
        ({"iterations": -1}, "iterations: -1 is negative"),
        ({"process_group": 3}, "process_group: expected a torch.distributed process group, got int"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.swav_loss(**{"a": torch.ones(3, 2), "b": torch.ones(3, 2), "prototypes": torch.ones(4, 2), **change})


@interpreted
def test_wrong_values_do_not_pass_for_a_result(monkeypatch):
    """On a GPU nothing is read back for a check: what is not finite gives NaN."""
    monkeypatch.setattr(unit_rows, "check_values", lambda device: False)
    for i in range(3):
        inputs = problem(4, 3, 5)
        inputs[i][1, 2] = math.inf
        with ops.backend("triton"):
            assert math.isnan(float(ops.swav_loss(*inputs)))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape):
    inputs = problem(*shape)
    got = run(*(x.cuda() for x in inputs))
    compare([x.cpu() for x in got], definition(*inputs))
