"""info_nce on every backend against its definition in float64, closed forms, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import BACKENDS, INTERPRETED, ISAS, cpp, interpreted, not_interpreted, plain
from stable_rlhf.ops.contrastive import unit_rows
from stable_rlhf.ops.policy import products

pytest.importorskip("triton")


@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    ops.release_workspace()
    yield
    torch.use_deterministic_algorithms(False)


def views(rows, width, seed=0, dtype=torch.float32, apart=0.7):
    """Rows and their partners, near enough that the loss is neither 0 nor log B."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=g)
    return a.to(dtype), (a + apart * torch.randn(rows, width, generator=g)).to(dtype)


def definition(a, b, temperature):
    """Value and gradients, row by row in float64."""
    a, b = (x.double().requires_grad_() for x in (a, b))
    losses = []
    for i in range(a.shape[0]):
        cosines = torch.stack([torch.dot(a[i], y) / (a[i].norm() * y.norm()) for y in b])
        losses.append(torch.logsumexp(cosines / temperature, 0) - cosines[i] / temperature)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach(), a.grad, b.grad


def run(a, b, upstream=1.0, **options):
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    loss = ops.info_nce(a, b, **options)
    (upstream * loss).backward()
    return loss.detach(), a.grad, b.grad


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("rows, width", [(2, 1), (2, 3), (3, 16), (17, 5), (33, 257)])
def test_value_and_gradients(rows, width, temperature, backend):
    a, b = views(rows, width, seed=rows)
    want = definition(a, b, temperature)
    with ops.backend(backend):
        got = run(a, b, temperature=temperature, workspace_bytes=5 * 4 * rows)  # five rows a chunk
    assert got[0].dtype == torch.float32 and got[0].ndim == 0
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=1e-6)
    for mine, truth in zip(got[1:], want[1:], strict=True):
        if width == 1:  # on a line every direction is +1 or -1, and no gradient turns it
            assert float(truth.abs().max()) < 1e-12 and float(mine.abs().max()) < 1e-4 / temperature
        else:
            assert mine.dtype == torch.float32
            error = float((mine.double() - truth).norm())  # plain PyTorch rounds where p is near 1
            assert error < 1e-4 * float(truth.norm()) + (1e-7 / temperature if backend == "torch" else 1e-12)


@cpp
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    a, b = views(19, 24)
    for mine, truth in zip(run(a, b), definition(a, b, 0.05), strict=True):
        assert relative(mine, truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, backend):
    """Statistics and gradients in float32, rounded once at the end."""
    a, b = views(21, 40, dtype=dtype)
    want = definition(a, b, 0.05)
    with ops.backend(backend):
        loss, *grads = run(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    for mine, truth in zip(grads, want[1:], strict=True):
        assert mine.dtype == dtype
        assert relative(mine, truth) <= 1.05 * relative(truth.to(dtype), truth) + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormal_rows(backend):
    """Every partner at cosine 1, every other at 0: log(1 + (n - 1) exp(-1 / t)), which is tiny and keeps its digits."""
    eye = torch.eye(4)
    with ops.backend(backend):
        for temperature in (1.0, 0.05):
            loss, *_ = run(3 * eye, 0.5 * eye, temperature=temperature)
            want = math.log1p(3 * math.exp(-1 / temperature))
            near = 1e-5 if backend != "torch" or temperature == 1.0 else 1.0  # plain PyTorch rounds 1 + 6e-9 to 1
            assert float(loss) == pytest.approx(want, rel=near)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_be_told_apart(backend):
    a = torch.tensor([[3.0, 4.0]]).repeat(7, 1)
    with ops.backend(backend):
        loss, *grads = run(a, 2 * a)
    assert float(loss) == pytest.approx(math.log(7), rel=1e-6)
    assert max(float(g.abs().max()) for g in grads) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one(backend):
    a, b = views(1, 6)
    with ops.backend(backend):
        loss, *grads = run(a, b)
    assert float(loss) == 0.0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_no_direction(backend):
    """Similarity 0 to every row, no gradient; what is smaller than any normal number counts as zero."""
    a, b = views(5, 8)
    a[1], b[3], a[4] = 0.0, 0.0, 1e-39
    with ops.backend(backend):
        loss, a_grad, b_grad = run(a, b)
    cosines = torch.nn.functional.normalize(a.double()) @ torch.nn.functional.normalize(b.double()).T
    cosines[4] = 0.0
    want = (torch.logsumexp(cosines / 0.05, 1) - cosines.diag() / 0.05).mean()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    assert not a_grad[[1, 4]].any() and not b_grad[3].any() and a_grad[0].any() and b_grad[1].any()
    assert a_grad.isfinite().all() and b_grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lengths_of_rows_change_nothing(backend):
    """Also where their squares overflow or vanish in float32; gradients shrink as the rows grow."""
    a, b = views(6, 9)
    scale = torch.tensor([1e-25, 1e-12, 1.0, 3.0, 1e12, 1e25])[:, None]
    with ops.backend(backend):
        want, scaled = run(a, b), run(a * scale, b * scale.flip(0))
    torch.testing.assert_close(scaled[0], want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled[1].double() * scale.double(), want[1].double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled[2].double() * scale.double().flip(0), want[2].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e4, 1e30])
def test_extreme_temperatures(temperature, backend):
    a, b = views(4, 6)
    b = b.roll(1, 0)  # nobody's partner is the nearest
    with ops.backend(backend):
        loss, *grads = run(a, b, temperature=temperature)
    cosines = torch.nn.functional.normalize(a.double()) @ torch.nn.functional.normalize(b.double()).T
    want = (torch.logsumexp(cosines / temperature, 1) - cosines.diag() / temperature).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    assert all(g.isfinite().all() for g in grads)


@plain
def test_gradcheck():
    a, b = (x.requires_grad_() for x in views(5, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, y: ops.info_nce(x, y, temperature=0.3), (a, b))
    assert torch.autograd.gradcheck(lambda x: ops.info_nce(x, x, temperature=0.3), (a,))
    assert ops.info_nce(a, b).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    a, b = views(9, 7)
    with ops.backend(backend):
        loss, a_grad, b_grad = run(a, b)
        assert not ops.info_nce(a, b).requires_grad
        torch.testing.assert_close(ops.info_nce(a, b), loss)
        for first, second, want in ((a.clone().requires_grad_(), b, a_grad), (a, b.clone().requires_grad_(), b_grad)):
            leaf = first if first.requires_grad else second
            ops.info_nce(first, second).backward()
            torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_and_a_second_backward(backend):
    a, b = views(8, 5)
    with ops.backend(backend):
        once, thrice = run(a, b), run(a, b, upstream=3.0)
        torch.testing.assert_close(thrice[1], 3 * once[1])
        leaf = a.clone().requires_grad_()
        loss = ops.info_nce(leaf, b)
        (2 * loss).backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(leaf.grad, 3 * once[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    a, b = views(50, 30)
    with ops.backend(backend):
        first, second = run(a, b, workspace_bytes=1000), run(a, b, workspace_bytes=1000)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_not_contiguous(backend):
    a, b = views(12, 20)
    with ops.backend(backend):
        want = ops.info_nce(a[::2, 5:], b[::2, 5:])
        torch.testing.assert_close(ops.info_nce(a[::2, 5:].contiguous(), b[::2, 5:].contiguous()), want)


@cpp
def test_similarities_are_never_all_in_memory(monkeypatch):
    """Chunks of the workspace's size, whatever the batch."""
    sizes = []
    real = products.workspace

    def recorded(rows, columns, dtype, device):
        sizes.append(rows * columns * dtype.itemsize)
        return real(rows, columns, dtype, device)

    monkeypatch.setattr(products, "workspace", recorded)
    a, b = views(512, 8)
    run(a, b, workspace_bytes=64 << 10)
    assert sizes == [64 << 10]  # of 1 MiB
    sizes.clear()
    run(a, b, workspace_bytes=1)
    assert sizes == [512 * 4]  # one row at least


@cpp
def test_autocast_leaves_the_products_alone():
    a, b = views(30, 16)
    want = run(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(a, b)
        with ops.backend("torch"):
            torch.testing.assert_close(ops.info_nce(a, b), want[0])
    assert all(torch.equal(mine, truth) for mine, truth in zip(got, want, strict=True))


@plain
@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.zeros(3)}, r"a: shape \(3,\) instead of \[B, D\]"),
        ({"a": torch.zeros(3, 0)}, r"a: shape \(3, 0\)"),
        ({"a": torch.zeros(3, 2, dtype=torch.int64)}, "a: type int64"),
        ({"a": [1.0]}, "a: expected a tensor"),
        ({"b": torch.zeros(4, 2)}, r"b: shape \(4, 2\) instead of \(3, 2\)"),
        ({"b": torch.zeros(3, 2, dtype=torch.float64)}, "b: type float64 is not one of float32"),
        ({"b": torch.zeros(3, 2, device="meta")}, "b: on device meta"),
        ({"a": torch.zeros(0, 2), "b": torch.zeros(0, 2)}, "a: no rows"),
        ({"a": torch.tensor([[1.0, 2.0], [math.nan, 1.0], [0.0, 1.0]])}, "a: non-finite value nan at position 2"),
        ({"b": torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, -math.inf]])}, "b: non-finite value -inf at position 5"),
        ({"temperature": 0.0}, "temperature: 0.0 is not a positive number"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"workspace_bytes": 0}, "workspace_bytes: 0 is not positive"),
        ({"process_group": "world"}, "process_group: expected a torch.distributed process group, got str"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.info_nce(**{"a": torch.ones(3, 2), "b": torch.ones(3, 2), **change})


@interpreted
def test_wrong_values_do_not_pass_for_a_result(monkeypatch):
    """On a GPU nothing is read back for a check: what is not finite gives NaN."""
    monkeypatch.setattr(unit_rows, "check_values", lambda device: False)
    a, b = views(4, 3)
    for x in (a, b):
        other = x.clone()
        other[2, 1] = math.inf
        with ops.backend("triton"):
            assert math.isnan(float(ops.info_nce(other if x is a else a, other if x is b else b)))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    a, b = views(300, 96, dtype=dtype)
    want = definition(a[:300], b[:300], 0.05)
    loss, *grads = run(a.cuda(), b.cuda(), workspace_bytes=100_000)
    near = 1e-5 if dtype == torch.float32 else 2e-3  # unit rows rounded to the type
    torch.testing.assert_close(loss.double().cpu(), want[0], rtol=near, atol=near)
    for mine, truth in zip(grads, want[1:], strict=True):
        assert relative(mine.cpu(), truth) < (1e-4 if dtype == torch.float32 else 2e-2)
