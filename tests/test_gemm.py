"""The extension's matrix product: every layout and dtype, its triangles, and who is chosen."""

from __future__ import annotations

import math

import pytest
import torch

from pkt_fast import ops
from pkt_fast.errors import BackendError, ShapeError
from pkt_fast.heads import streamed_gram
from pkt_fast.ops import _gemm
from pkt_fast.ops._blocks import times, times_transpose, upper_times

pytest.importorskip("pkt_fast._native")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (14, 256, 32), (15, 257, 33), (300, 700, 129), (7, 3000, 5), (61, 40, 2083)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def own(monkeypatch):
    """Our kernel serves whatever the machine and the number of rows."""
    monkeypatch.setattr(_gemm, "choice", lambda: _gemm.Choice(True, "test"))
    monkeypatch.setattr(_gemm, "SMALLEST_ROWS", 1)


def laid_out(rows, columns, dtype, layout):
    """Random values, contiguous in rows or in columns or in neither."""
    if layout == "rows":
        return torch.randn(rows, columns).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).T
    return torch.randn(2 * rows, 3 * columns).to(dtype)[::2, ::3]


def check(got, left, right):
    """|error| <= 2·ε·√K·‖left row‖·‖right column‖ (and one rounding): a sum of K products."""
    exact = left.double() @ right.double()
    size = left.double().norm(dim=1)[:, None] * right.double().norm(dim=0)
    limit = (2 * math.sqrt(left.shape[1]) + 2) * torch.finfo(got.dtype).eps
    assert ((got.double() - exact).abs() <= limit * size).all()


@pytest.mark.parametrize("left_layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("right_layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(shape, left_layout, right_layout):
    rows, depth, columns = shape
    for dtype in (torch.float32, torch.float64):
        left = laid_out(rows, depth, dtype, left_layout)
        right = laid_out(depth, columns, dtype, right_layout)
        got = _gemm.product(left, right)
        assert got.dtype == dtype
        check(got, left, right)


@pytest.mark.parametrize("left_dtype", DTYPES)
@pytest.mark.parametrize("right_dtype", DTYPES)
def test_dtypes_are_converted_exactly(left_dtype, right_dtype):
    for layout in ("rows", "columns", "neither"):
        left = laid_out(29, 300, left_dtype, layout)
        right = laid_out(300, 35, right_dtype, layout)
        got = _gemm.product(left, right)
        assert got.dtype == (torch.float64 if torch.float64 in (left_dtype, right_dtype)
                             else torch.float32)  # fmt: skip
        check(got, left, right)
        wide = torch.empty(29, 35, dtype=torch.float64)
        check(_gemm.product(left, right, out=wide), left, right)


@pytest.mark.parametrize("size", [1, 31, 64, 300, 1100])
@pytest.mark.parametrize("part", ["upper", "lower"])
def test_triangles_skip_what_is_zero(size, part):
    factor = torch.randn(size, size)
    factor = factor.triu() if part == "upper" else factor.tril()
    left = torch.randn(50, size)
    for right in (factor, factor.T.contiguous().T):
        check(_gemm.product(left, right, part=part), left, right)


def test_gram_is_symmetric_and_exact():
    for shape in [(1, 1), (5000, 17), (33, 40), (700, 300)]:
        for dtype in DTYPES:
            rows = torch.randn(shape).to(dtype)
            gram = _gemm.gram(rows)
            assert torch.equal(gram, gram.T)
            check(gram, rows.T, rows)
    assert _gemm.gram(torch.zeros(0, 3)).tolist() == [[0.0] * 3] * 3


def test_mirrored_in_place():
    for size in (0, 1, _gemm.MIRROR_BLOCK, 2 * _gemm.MIRROR_BLOCK + 3):
        whole = torch.randn(size, size)
        upper = whole.triu()
        assert torch.equal(_gemm.mirror_(whole), upper + upper.triu(1).T)
        assert torch.equal(whole, whole.T)


def test_unit_rows_of_any_norm():
    left = torch.randn(40, 600)
    scales = torch.tensor([0.0, 1.0, 1e-30, 1e30, 1e-42]).repeat(8)[:, None]
    left = left * scales
    exact = left.double() / left.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    right = torch.randn(600, 37)
    got = _gemm.product(left, right, unit_rows=True)
    check(got, exact, right)
    assert (got[::5] == 0).all()
    for layout in (left.T.contiguous().T, left.double()):
        check(_gemm.product(layout, right, unit_rows=True), exact, right)


def test_accumulates_into_a_strided_out():
    left, right = torch.randn(30, 70), torch.randn(70, 40)
    whole = torch.randn(60, 100)
    out, before = whole[::2, 7:47], whole.clone()
    _gemm.product(left, right, out=out, accumulate=True)
    expected = before.double()
    expected[::2, 7:47] += left.double() @ right.double()
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(60, 100, dtype=torch.bool)
    untouched[::2, 7:47] = False
    assert torch.equal(whole[untouched], before[untouched])


def test_out_is_not_read():
    out = torch.full((20, 50), math.nan)
    left, right = torch.randn(20, 900), torch.randn(900, 50)
    check(_gemm.product(left, right, out=out), left, right)


def test_nan_and_inf_stay_in_their_rows():
    left, right = torch.randn(20, 30), torch.randn(30, 40)
    left[3, 5], left[7, 1] = math.nan, math.inf
    got = _gemm.product(left, right)
    assert got[3].isnan().all()
    assert not got[7].isfinite().any()
    assert got[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


def test_empty():
    assert _gemm.product(torch.zeros(0, 4), torch.zeros(4, 3)).shape == (0, 3)
    assert _gemm.product(torch.zeros(2, 4), torch.zeros(4, 0)).shape == (2, 0)
    assert _gemm.product(torch.zeros(2, 0), torch.zeros(0, 3)).tolist() == [[0.0] * 3] * 2
    out = torch.ones(2, 3)
    assert torch.equal(
        _gemm.product(torch.zeros(2, 0), torch.zeros(0, 3), out=out, accumulate=True), out
    )


def test_bits_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    left, right = torch.randn(403, 700), torch.randn(700, 2100)
    factor = torch.randn(700, 700).triu()

    def results():
        return (
            _gemm.product(left, right, unit_rows=True),
            _gemm.product(left[:5], right),
            _gemm.product(left, factor, part="upper"),
            _gemm.gram(left),
        )

    try:
        torch.set_num_threads(1)
        expected = results()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused():
    x = torch.randn(4, 4)
    for left, right, options in [
        (x, torch.randn(5, 4), {}),
        (x, x.to(torch.int64), {}),
        (x, torch.randn(4, 3), {"part": "upper"}),
        (x, x, {"part": "left"}),
        (x, x, {"out": torch.empty(4, 3)}),
        (x, x, {"out": x}),
        (x, x, {"out": torch.empty(4, 4).T}),
        (x, x, {"out": torch.empty(1, 4).expand(4, 4)}),
        (x, x, {"out": torch.empty(4, 4, dtype=torch.bfloat16)}),
        (x.double(), x, {"out": torch.empty(4, 4)}),
        (x.to("meta"), x, {}),
        (x, x, {"accumulate": True, "unit_rows": True, "out": torch.empty(4, 4)}),
    ]:
        with pytest.raises(ShapeError, match="product"):
            _gemm.product(left, right, **options)


# --------------------------------------------------------------------------- who multiplies


@pytest.fixture
def chosen(monkeypatch):
    """``choice()`` for a value of PKT_FAST_GEMM, a maker, an instruction set and a library."""

    class Native:
        gemm = staticmethod(lambda: None)

    def run(wish=None, maker="amd", isa="avx512", mkl=True, built=True):
        Native.vendor = staticmethod(lambda: maker)
        Native.build_info = staticmethod(lambda: {"isa": isa})
        monkeypatch.delenv(_gemm.ENVIRONMENT_VARIABLE, raising=False)
        if wish is not None:
            monkeypatch.setenv(_gemm.ENVIRONMENT_VARIABLE, wish)
        monkeypatch.setattr(_gemm, "native_module", lambda: Native if built else None)
        monkeypatch.setattr("torch.backends.mkl.is_available", lambda: mkl)
        return _gemm.choice.__wrapped__()

    return run


def test_own_kernel_where_mkl_runs_avx2_code(chosen):
    assert chosen().own
    assert not chosen(maker="intel").own
    assert not chosen(isa="avx2").own
    assert not chosen(mkl=False).own
    assert not chosen(built=False).own


def test_the_choice_can_be_overruled(chosen):
    assert chosen("own", maker="intel", isa="baseline").own
    assert not chosen("library").own
    with pytest.raises(BackendError, match="auto, own, library"):
        chosen("mkl")
    with pytest.raises(BackendError, match="not built"):
        chosen("own", built=False)


def test_few_rows_are_the_librarys(own, monkeypatch):
    monkeypatch.setattr(_gemm, "SMALLEST_ROWS", 64)
    x = torch.randn(64, 5)
    assert _gemm.serves(x, x.T)
    assert not _gemm.serves(x[:63], x.T)
    assert not _gemm.serves(x.to("meta"), x.T)


def test_library_and_own_products_agree(own, monkeypatch):
    """The functions the ops multiply by, and the ops themselves, on both paths."""
    x, head = torch.randn(70, 40), torch.randn(301, 40)
    factor = torch.randn(300, 300).triu()
    hidden = torch.randn(70, 300)

    def results():
        return {
            "xWᵀ": times_transpose(x, head),
            "xWᵀ, bfloat16": times_transpose(x, head.bfloat16()),
            "xW": times(torch.ones(70, 301), head),
            "xR": upper_times(hidden, factor, transposed=False),
            "xRᵀ": upper_times(hidden, factor, transposed=True),
            "float64": times_transpose(x.double(), head),
            "Gram": streamed_gram(head),
            "align": ops.align_rows(x, head),
            "align, float16": ops.align_rows(x.half(), head.half()),
        }

    ours = results()
    monkeypatch.setattr(_gemm, "choice", lambda: _gemm.Choice(False, "test"))
    for name, theirs in results().items():
        assert ours[name].dtype == theirs.dtype, name
        tolerance = 1e-3 if theirs.dtype == torch.float16 else 2e-6
        assert (ours[name] - theirs).norm() <= tolerance * theirs.norm(), name
