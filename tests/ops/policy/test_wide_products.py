"""Gradients from several chunks of 16-bit rows: as good as plain PyTorch's however many there are, on any processor.

Whether the processor multiplies 16-bit matrices and whether torch's BLAS writes float32 from them is forced both ways,
so that every path is tried everywhere.
"""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy import products as head_products
from stable_rlhf.ops.policy import wide_products
from stable_rlhf.ops.policy.products import HeadProducts, Selection, has_native_products
from stable_rlhf.ops.policy.wide_products import add_product, narrow_sum

CPP = pytest.mark.skipif(extension() is None, reason="the C++ module is not installed")
HALVES = [torch.bfloat16, torch.float16]
ROWS, VOCABULARY, WIDTH = 102, 301, 48
CONFIG = PolicyLossConfig(rehearsal_coef=1.0, clip_low=1.0, clip_high=1e4)  # no row falls to the one or the other side


def own_product() -> bool:
    module = extension()
    return module is not None and module.has_wide_product()


OWN = pytest.mark.skipif(not own_product(), reason="the C++ module has a product for AVX-512 BF16 alone")


@pytest.fixture(params=["native, by C++", "native, by BLAS", "native, by float32", "emulated"])
def products(request, monkeypatch):
    monkeypatch.setattr(head_products, "has_native_products", lambda *_: request.param != "emulated")
    own = request.param == "native, by C++"
    if own and not own_product():
        pytest.skip("the C++ module has a product for AVX-512 BF16 alone")
    for module in (head_products, wide_products):
        monkeypatch.setattr(module, "takes_places", lambda dtype: own and dtype == torch.bfloat16)
    if request.param == "native, by float32":
        monkeypatch.setattr(wide_products, "_blas", lambda _: None)
    elif request.param == "native, by BLAS" and wide_products._blas(torch.bfloat16) is None:
        pytest.skip("torch has no such BLAS here")


def gradients(call, dtype, chunks: int, workspace_dtype=None):
    """Of hidden and weight by `call(hidden, weight, workspace_bytes)`, in about so many chunks."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=g).to(workspace_dtype or dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=g) / 4).to(workspace_dtype or dtype)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    call(*leaves, math.ceil(ROWS / chunks) * VOCABULARY * 4).backward()
    return [leaf.grad for leaf in leaves]


def policy(hidden, weight, workspace_bytes, **options):
    g = torch.Generator().manual_seed(7)
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=g)
    return ops.linear_policy_loss(
        hidden, weight, target, torch.randint(0, 3, (ROWS,), generator=g), advantage=torch.randn(ROWS, generator=g),
        old_logprob=torch.full((ROWS,), -math.log(VOCABULARY)), config=CONFIG,
        policy_denominator=1.0, rehearsal_denominator=1.0,
        workspace_bytes=workspace_bytes, **options,
    ).loss  # fmt: skip


def logprob(hidden, weight, workspace_bytes):
    g = torch.Generator().manual_seed(7)
    target, factors = torch.randint(0, VOCABULARY, (ROWS,), generator=g), torch.randn(2, ROWS, generator=g)
    found, entropy = ops.linear_logprob(hidden, weight, target, entropy=True, workspace_bytes=workspace_bytes)
    return (found * factors[0] + entropy * factors[1]).sum()


@CPP
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("chunks", [1, 2, 6, 51])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("call", [policy, logprob])
def test_as_good_as_plain_pytorch_in_any_number_of_chunks(call, dtype, chunks):
    with ops.backend("torch"):
        truth = gradients(call, torch.float64, 1, dtype)
        plain = gradients(call, dtype, 1)
    for ours, theirs, want in zip(gradients(call, dtype, chunks), plain, truth, strict=True):
        assert distance(ours, want) <= 1.25 * distance(theirs, want)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm())


def by_rows(made: HeadProducts, gradient: torch.Tensor, parts: list[slice]) -> None:
    """Every other row has a gradient."""
    for part in parts:
        some = torch.arange(0, part.stop - part.start, 2)
        made.backward(part, gradient[part][some], some, last=part.stop == len(gradient))


def by_columns(made: HeadProducts, gradient: torch.Tensor, parts: list[slice]) -> None:
    """Half the rows through some of the columns, the others, which wait, through all."""
    assert made.hidden_grad is not None
    made.hidden_grad.zero_()
    for part in parts:
        rows = torch.arange(part.start, part.stop)
        bounded = torch.arange(0, len(rows), 2)
        selection = Selection(torch.arange(0, VOCABULARY, 3), bounded, bounded[:-1] + 1)
        made.backward_columns(rows, gradient[part], selection)


def by_chunks(made: HeadProducts, gradient: torch.Tensor, parts: list[slice]) -> None:
    for part in parts:
        made.backward(part, gradient[part], None, last=part.stop == len(gradient))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", [by_chunks, by_rows, by_columns])
def test_sums_over_chunks_are_rounded_once(way, dtype, wide, monkeypatch):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(510, WIDTH, generator=g).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype)
    gradient = torch.randn(510, VOCABULARY, generator=g).to(dtype)
    parts = [slice(begin, begin + 51) for begin in range(0, 510, 51)]
    monkeypatch.setattr(head_products, "CHUNK_ROWS", 60)  # rows that wait are added several times
    made = HeadProducts(hidden, weight, None, None, (True, True, False))
    if wide:
        made.keep_hidden_wide()
    way(made, gradient.to(made.gradient_dtype), parts)
    made.finish()
    reaches = gradient.double()  # what the way lets through
    if way is by_rows:
        reaches = torch.cat([torch.where(torch.arange(51)[:, None] % 2 == 0, gradient[p].double(), 0) for p in parts])
    elif way is by_columns:
        few = (torch.arange(51)[:, None] % 2 == 0) & (torch.arange(VOCABULARY) % 3 != 0)
        reaches = torch.cat([torch.where(few, 0, gradient[p].double()) for p in parts])
    # Rounding the true product once is the best that its own type allows.
    for ours, truth in (
        (made.weight_grad, reaches.t() @ hidden.double()),
        (made.hidden_grad, reaches @ weight.double()),
    ):
        once = distance(truth.to(dtype), truth)
        assert distance(ours, truth) <= (1e-5 * float(truth.norm()) if ours.dtype == torch.float32 else 1.02 * once)
    assert made.hidden_grad.dtype == (torch.float32 if wide else dtype) and made.weight_grad.dtype == dtype


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 5, 3), (7, 1, 3), (7, 5, 1), (1, 1, 1), (7, 0, 3), (0, 5, 3)])
def test_a_product_in_float32_of_whatever_lies_in_memory(shape, dtype, monkeypatch):
    monkeypatch.setattr(wide_products, "SLICE_BYTES", 48)
    g = torch.Generator().manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)
    want = a.double() @ b.double()

    def laid_out(x):
        rows, columns = x.shape
        apart = torch.zeros(rows, 2 * columns + 1, dtype=dtype)
        apart[:, :columns] = x
        scattered = torch.zeros(rows, 2 * columns, dtype=dtype)
        scattered[:, ::2] = x
        return x, x.t().contiguous().t(), apart[:, :columns], scattered[:, ::2]

    for left in laid_out(a):
        for right in laid_out(b):
            total = torch.full((m, n), math.nan)
            add_product(left, right, total, fresh=True)
            torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
            add_product(left, right, total, fresh=False)
            torch.testing.assert_close(total.double(), 2 * want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("size", [0, 1, 20])
@pytest.mark.parametrize(("width", "as_columns"), [(19, False), (19, True), (1, False)])
def test_rows_by_their_places(width, as_columns, size, fresh, dtype):
    """Some rows of the total and of the second operand; the others are not looked at."""
    g = torch.Generator().manual_seed(2)
    places, rows = (torch.randperm(n, generator=g)[:size].sort().values for n in (70, 90))
    a = torch.randn(size, size, generator=g).to(dtype)
    b = torch.full((90, width), math.nan, dtype=dtype)
    b[rows] = torch.randn(size, width, generator=g).to(dtype)
    if as_columns:
        b = b.t().contiguous().t()
    total = torch.full((70, width), math.nan)
    total[places] = math.nan if fresh else 1.0
    add_product(a, b, total, fresh=fresh, places=places, rows=rows)
    want = a.double() @ b[rows].double() + (0 if fresh else 1)
    torch.testing.assert_close(total[places].double(), want, rtol=1e-5, atol=1e-5)
    assert total.isnan().all(1).sum() == 70 - size


@OWN
@pytest.mark.parametrize("shape", [
    (8, 2, 48), (9, 3, 49), (17, 65, 33), (100, 1025, 40), (64, 33, 500), (33, 9000, 17), (40, 40000, 110),
    (700, 3001, 60), (2000, 530, 96),
])  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_our_own_product_of_any_size(shape, threads, monkeypatch):
    """Ends of panels, odd depths, more depth than is packed at a time, one side larger or the other; infinities, and
    numbers that are none, reach their own rows and columns alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(wide_products, "takes_places", lambda dtype: dtype == torch.bfloat16)
    m, k, n = shape
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=g).bfloat16() for size in ((m, k), (k, n)))
    want = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            total = torch.full((m, n), math.nan)
            add_product(left, right, total, fresh=True)
            assert distance(total, want) <= 1e-6 * float(want.norm())
            again = torch.full((m, n), math.nan)
            add_product(left, right, again, fresh=True)
            assert torch.equal(again, total)
    a[m // 2, k - 1], b[0, n - 1] = math.inf, math.nan
    add_product(a, b, total, fresh=True)
    told = ~total.isfinite()
    assert told[m // 2].all() and told[:, n - 1].all() and told.sum() == m + n - 1


@OWN
@pytest.mark.parametrize(("rows", "width", "depths"), [
    (1, 1, (1,)), (50, 3, (1, 2, 1)), (1000, 64, (5, 33)), (333, 576, (256, 70, 700)), (2111, 129, (256, 1)),
    (90, 40, ()),
])  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sum_of_products_that_is_rounded_once(rows, width, depths, threads, monkeypatch):
    """To the bit what the products would add up to in a float32 sum of full size, rows that no part has included."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(wide_products, "takes_places", lambda dtype: dtype == torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    total, parts = torch.zeros(rows, width), []
    for i, depth in enumerate(depths):
        columns = torch.randperm(rows, generator=g)[: rows // 3].sort().values if i % 3 != 2 else None
        wide = torch.randn(depth, 2 * rows + 7, generator=g).bfloat16()
        a = wide[:, 3 : 3 + (rows if columns is None else len(columns))]
        b = torch.randn(width, depth, generator=g).bfloat16().t() if i == 1 else torch.randn(
            depth, width, generator=g
        ).bfloat16()  # fmt: skip
        parts.append((a, b, columns))
        add_product(a.t(), b, total, fresh=False, places=columns)
    out = torch.full((rows, width), math.nan, dtype=torch.bfloat16)
    narrow_sum(parts, out)
    assert torch.equal(out, total.bfloat16())


@OWN
def test_the_rounding_of_a_sum_is_torchs():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F7F7FFF, 0xBF818000, 0x42FF7FFF])
    values = bits.to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    # As sums of two numbers of bfloat16 each, times 1: what rounding has to decide on lies in the second.
    values = torch.cat([values, special])
    high = values.bfloat16()
    low = torch.where(values.isfinite() & high.isfinite(), values - high.float(), 0.0).bfloat16()
    total = high.float() + low.float()
    a = torch.stack([high, low])  # [2, m]
    out = torch.empty(len(values), 1, dtype=torch.bfloat16)
    narrow_sum([(a, torch.ones(2, 1, dtype=torch.bfloat16), None)], out)
    assert torch.equal(out[:, 0], total.bfloat16())  # signs too, but for that of 0
    narrow_sum([(torch.tensor([[math.nan, 1.0]]).bfloat16(), torch.ones(1, 1, dtype=torch.bfloat16), None)], out[:2])
    assert out[0].isnan() and out[1] == 1


@OWN
def test_who_makes_the_product_of_bfloat16(monkeypatch):
    monkeypatch.delenv("STABLE_RLHF_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert wide_products.takes_places(torch.bfloat16) and not wide_products.takes_places(torch.float16)
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", "avx2")
    assert not wide_products.takes_places(torch.bfloat16)
    monkeypatch.delenv("STABLE_RLHF_CPU_ISA")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # MKL's is faster
    assert not wide_products.takes_places(torch.bfloat16)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("kept", [10**9, 0])
def test_the_weights_gradient_in_slices(dtype, kept, monkeypatch):
    """Parts that are kept, or too large to be kept, give the same sum."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(90, WIDTH, generator=g).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype)
    gradient = torch.randn(90, VOCABULARY, generator=g).to(dtype)
    monkeypatch.setattr(head_products, "SLICE_BYTES", 4 * WIDTH * 50)
    made = HeadProducts(hidden, weight, None, None, (False, True, False))
    monkeypatch.setattr(made, "weight", _of_size(weight, kept))
    rows, none = torch.arange(90), torch.arange(0)
    columns = torch.tensor([0, 49, 50, 51, 149, 300])
    ours = gradient.to(made.gradient_dtype)
    made.backward_columns(rows, ours, Selection(columns, rows[:40], rows[40:45]))
    made.backward_columns(rows, ours, Selection(columns[2:4], rows[45:60], none))
    made.backward_columns(rows, ours, Selection(none, rows[60:70], rows[70:]))
    made.finish()
    through = torch.zeros(90, VOCABULARY, dtype=torch.float64)
    through[:40, columns] = gradient[:40].double()[:, columns]
    through[45:60, columns[2:4]] = gradient[45:60].double()[:, columns[2:4]]
    through[40:45], through[70:] = gradient[40:45].double(), gradient[70:].double()
    truth = through.t() @ hidden.double()
    assert made.weight_grad is not None and made.weight_grad.dtype == dtype
    assert distance(made.weight_grad, truth) <= 1.02 * distance(truth.to(dtype), truth) + 1e-6 * float(truth.norm())


def _of_size(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The weight, which says that it has so many numbers."""

    class Told(torch.Tensor):
        def numel(self) -> int:
            return size

    return weight.as_subclass(Told)


@pytest.mark.parametrize(
    ("limit", "bfloat16", "float16"),
    [
        ("", True, True), ("default", True, True), ("AVX512_CORE_AMX_FP16", True, True), ("of tomorrow", True, True),
        ("AVX512_CORE_AMX", True, False), ("AVX512_CORE_BF16", True, False),
        ("avx512_core", False, False), ("AVX2", False, False), ("SSE41", False, False),
    ],
)  # fmt: skip
def test_the_path_follows_what_onednn_may_use(limit, bfloat16, float16, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    cpu = torch.device("cpu")
    assert [has_native_products(d, cpu) for d in HALVES] == [bfloat16, float16]
    assert has_native_products(torch.float32, cpu)


def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    assert not wide_products._works(lambda *_: None, torch.bfloat16)
    monkeypatch.setattr(wide_products, "_works", lambda *_: False)
    wide_products._blas.cache_clear()
    try:
        assert wide_products._blas(torch.bfloat16) is None
    finally:
        wide_products._blas.cache_clear()


@pytest.mark.parametrize("dtype", HALVES)
def test_hidden_rows_that_lie_as_columns(dtype, products):
    """A hidden gradient that is summed over ranks is written by BLAS, which takes rows."""
    g = torch.Generator(device="cpu").manual_seed(5)
    hidden, weight = torch.randn(8, 6, generator=g).to(dtype).t(), torch.randn(9, 8, generator=g).to(dtype)
    assert hidden.stride() == (1, 6)
    made = HeadProducts(hidden, weight, None, None, (True, False, False))
    made.keep_hidden_wide()
    gradient = torch.randn(6, 9, generator=g).to(made.gradient_dtype)
    made.backward(slice(0, 6), gradient, None, last=True)
    assert made.hidden_grad is not None
    torch.testing.assert_close(made.hidden_grad, (gradient.double() @ weight.double()).float())


def test_no_distance_beyond_32_bits_goes_to_blas():
    """One row's stride may be anything, and BLAS takes it as an int."""
    row = torch.zeros(3, dtype=torch.bfloat16).as_strided((1, 3), (2**31, 1))
    for x in (row, row.t()):
        made, _, lead = wide_products._layout(x)
        assert lead == 3 and made.data_ptr() == row.data_ptr()
