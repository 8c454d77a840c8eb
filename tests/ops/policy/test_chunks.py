"""How many rows' logits exist at once, by device; and the weight's gradient becoming narrow within its own memory."""

from __future__ import annotations

import types

import pytest
import torch

from stable_rlhf.ops.policy import chunks, wide_products
from stable_rlhf.ops.policy.products import HeadProducts
from stable_rlhf.ops.policy.wide_products import narrow_in_place

GIB = 1 << 30
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """torch's answers on a GPU of 141 GB, most of it free; `free` and `capturing` may be changed."""
    state = types.SimpleNamespace(total=141 * 10**9, free=120 * 10**9, cached=0, capturing=False, asked=0)

    def mem_get_info(device):
        state.asked += 1
        return state.free, state.total

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(total_memory=state.total))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: state.cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def room(rows, width, vocabulary, ask=True, gradient=True):
    sum_bytes = 4 * vocabulary * width if gradient else 0
    return chunks.workspace_bytes(CUDA, 2 * rows * vocabulary, sum_bytes, ask=ask)


@pytest.mark.parametrize(("rows", "width", "vocabulary", "number"), [
    (8192, 4096, 250880, 1), (8192, 4096, 128256, 1), (16384, 2048, 151936, 1), (8192, 1024, 250880, 1),
    (65536, 4096, 128256, 3),
])  # fmt: skip
def test_one_chunk_up_to_what_the_sum_would_take_or_a_share_of_memory(gpu, rows, width, vocabulary, number):
    most = room(rows, width, vocabulary) // (2 * vocabulary)
    parts = list(chunks.chunks(rows, most, chunks.TILE_ROWS))
    assert len(parts) == number
    assert [last for _, last in parts] == [False] * (number - 1) + [True]


def test_bounds(gpu):
    assert chunks.workspace_bytes(torch.device("cpu"), 8 * GIB, GIB, ask=True) == 256 << 20
    assert room(8192, 1024, 250880, gradient=False) == GIB
    assert room(100, 64, 1000) == 256 << 20 and gpu.asked == 1  # little is not asked about
    gpu.free = 4 * GIB
    assert room(8192, 4096, 250880) == 2 * GIB  # half of what is free
    gpu.cached = 2 * GIB
    assert room(8192, 4096, 250880) == 3 * GIB  # what torch keeps for itself is free too
    gpu.free = gpu.cached = 0
    assert room(8192, 4096, 250880) == 256 << 20
    asked = gpu.asked
    assert room(8192, 4096, 250880, ask=False) == 2 * 8192 * 250880  # ranks have to agree
    gpu.capturing = True
    assert room(8192, 4096, 250880) == 2 * 8192 * 250880 and gpu.asked == asked


@pytest.mark.parametrize(("count", "most", "multiple"), [
    (0, 5, 1), (1, 1, 1), (10, 3, 1), (820, 600, 128), (8192, 4100, 128), (1000, 100, 128), (127, 128, 128),
    (16384, 863, 128), (129, 128, 128), (3686, 3686, 128),
])  # fmt: skip
def test_chunks_cover_every_row_once(count, most, multiple):
    parts = [part for part, _ in chunks.chunks(count, most, multiple)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= most for size in sizes) and (len(sizes) <= 1 or count > most)
    if len(parts) > 1 and most >= multiple:
        assert all(size % multiple == 0 for size in sizes[:-1])


def test_sixteen_bit_logits_begin_at_multiples_of_sixteen_bytes_on_a_gpu():
    hidden, weight = (torch.zeros(rows, 4, dtype=torch.bfloat16) for rows in (3, 13))
    products = HeadProducts(hidden, weight, None, None)
    products.on_cpu, products.logits_dtype, products.gradient_dtype = False, torch.bfloat16, torch.bfloat16
    logits, gradient = products.buffers(5)
    assert logits.shape == (5, 13) and logits.stride() == (16, 1) and gradient is logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 4), (64, 33)])
@pytest.mark.parametrize("first", [1, 3, 8 << 20])
def test_narrowing_in_place(dtype, shape, first, monkeypatch):
    monkeypatch.setattr(wide_products, "SLICE_BYTES", 4 * first)
    total = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want, memory = total.to(dtype), total.untyped_storage().data_ptr()
    narrow = narrow_in_place(total, dtype)
    assert narrow.dtype == dtype and narrow.shape == shape and narrow.is_contiguous()
    assert torch.equal(narrow, want)
    assert narrow.untyped_storage().data_ptr() == memory


def test_a_sum_in_the_product_is_tried_before_it_is_trusted(monkeypatch):
    """A CPU has no such product; one that gives something else is not taken either."""
    wide_products.sums_in_product.cache_clear()
    assert wide_products.sums_in_product(torch.bfloat16, torch.device("cpu")) is False
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, out_dtype, out: out.copy_(total + a.float() @ b.float()))
    wide_products.sums_in_product.cache_clear()
    assert wide_products.sums_in_product(torch.bfloat16, torch.device("cpu")) is True
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, out_dtype, out: out.copy_(a.float() @ b.float()))
    wide_products.sums_in_product.cache_clear()
    assert wide_products.sums_in_product(torch.bfloat16, torch.device("cpu")) is False
    wide_products.sums_in_product.cache_clear()


def test_a_gpu_adds_no_parts_of_a_product_up_in_sixteen_bits(monkeypatch):
    """Few rows by a large vocabulary: cuBLAS splits the long sum, and may add the parts up in the output's type."""
    asked = []

    def add_product(a, b, total, *, fresh):
        asked.append(total.dtype)
        total.copy_(a.float() @ b.float())

    monkeypatch.setattr("stable_rlhf.ops.policy.products.add_product", add_product)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=g).bfloat16() for n in (6, 13))
    products = HeadProducts(hidden, weight, None, None, (True, False, False))
    products.on_cpu, products.sliced = False, False
    gradient = torch.randn(6, 13, generator=g).bfloat16()
    for order in (None, torch.tensor([4, 0, 2])):
        rows = gradient if order is None else gradient[: len(order)]
        products.backward(slice(0, 6), rows, order, True)
        want = torch.zeros(6, 4)
        want[slice(None) if order is None else order] = rows.float() @ weight.float()
        assert torch.equal(products.hidden_grad, want.bfloat16())
    assert asked == [torch.float32, torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 256])
def test_long_sums_on_a_gpu(rows):
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=g, device="cuda").bfloat16() for n in (rows, 250_880))
    gradient = torch.randn(rows, 250_880, generator=g, device="cuda").bfloat16()
    products = HeadProducts(hidden, weight, None, None, (True, True, False))
    products.backward(slice(0, rows), gradient, None, True)
    products.finish()
    for got, want in (
        (products.hidden_grad, gradient.double() @ weight.double()),
        (products.weight_grad, gradient.double().t() @ hidden.double()),
    ):
        rounding = (want.bfloat16().double() - want).norm()
        assert (got.double() - want).norm() <= 1.25 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_sums_in_the_product(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    assert wide_products.sums_in_product(dtype, device)
    total = torch.randn(3 << 20, 4, device="cuda")
    assert torch.equal(narrow_in_place(total.clone(), dtype), total.to(dtype))
