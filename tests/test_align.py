from __future__ import annotations

import math

import pytest
import torch

import pkt_fast
from pkt_fast import reference
from pkt_fast.errors import ShapeError
from pkt_fast.ops import _registry, align_rows, align_rows_grouped
from pkt_fast.ops.align import _multiplies

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seeded(nan_in_fresh_memory):
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "native"])
def backend(request):
    with pkt_fast.backend(request.param):
        yield request.param


def check(hidden, matrix, normalize=True):
    """|error| <= (2·ε + 4·ε_accumulate·√D)·‖h‖·‖m‖: storage rounds twice, a sum of D products."""
    got = align_rows(hidden, matrix, normalize)
    assert got.dtype == hidden.dtype
    assert got.isfinite().all()
    rows = hidden.double()
    expected = (reference.unit_rows(rows) if normalize else rows) @ matrix.double().T
    size = matrix.double().norm(dim=1)[None, :]
    if not normalize:
        size = size * rows.norm(dim=1, keepdim=True)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    limit = 2 * torch.finfo(hidden.dtype).eps
    limit += 4 * torch.finfo(wide).eps * math.sqrt(hidden.shape[1])
    assert ((got.double() - expected).abs() <= limit * size).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "outputs"), [(1, 1, 1), (37, 70, 50), (130, 64, 129), (3, 1021, 7)]
)
def test_equals_the_reference(count, width, outputs, dtype, normalize, backend):
    hidden, matrix = torch.randn(count, width).to(dtype), torch.randn(outputs, width).to(dtype)
    check(hidden, matrix, normalize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_norms(dtype, backend):
    hidden = torch.randn(12, 45, dtype=torch.float64)
    tiny, huge = (1e-6, 1e4) if dtype == torch.float16 else (1e-30, 1e30)
    hidden *= torch.tensor([0.0, 1.0, tiny, huge], dtype=torch.float64).repeat(3)[:, None]
    hidden = hidden.to(dtype)
    matrix = torch.randn(8, 45).to(dtype)
    check(hidden, matrix)
    assert (align_rows(hidden, matrix)[::4] == 0).all()


def test_norm_below_the_reciprocal_of_the_largest_float(backend):
    hidden = torch.zeros(2, 4)
    hidden[:, 1] = torch.tensor([1e-42, 2.0])
    got = align_rows(hidden, torch.randn(3, 4))
    assert got.isfinite().all()


def test_sixteen_bit_product(backend, monkeypatch):
    """The path of CPUs with bf16 instructions gives the same within its own rounding."""
    monkeypatch.setattr("pkt_fast.ops.align._multiplies", lambda dtype: True)
    check(torch.randn(20, 33).bfloat16(), torch.randn(9, 33).bfloat16())
    check((1e-20 * torch.randn(20, 33)).bfloat16(), torch.randn(9, 33).bfloat16())
    assert _multiplies(torch.float32)


def test_strided_operands(backend):
    wide = torch.randn(20, 60)
    check(wide[::2, 7:40], torch.randn(33, 9).T)


def test_empty(backend):
    assert align_rows(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert align_rows(torch.zeros(2, 0), torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 2
    assert align_rows_grouped([], []) == []


def test_dtypes_are_promoted(backend):
    assert align_rows(torch.randn(2, 4).bfloat16(), torch.randn(3, 4)).dtype == torch.float32


def test_groups_equal_single_calls(backend):
    hidden = [torch.randn(n, d) for n, d in [(5, 16), (0, 16), (9, 7)]]
    matrices = [torch.randn(6, h.shape[1]) for h in hidden]
    for got, h, m in zip(align_rows_grouped(hidden, matrices), hidden, matrices, strict=True):
        assert torch.equal(got, align_rows(h, m))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(normalize):
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, m: align_rows(h, m, normalize), (hidden, matrix))


def test_no_gradient_at_a_zero_row():
    hidden = torch.zeros(2, 3, requires_grad=True)
    align_rows(hidden, torch.randn(4, 3)).sum().backward()
    assert (hidden.grad == 0).all()


def test_opcheck():
    hidden = torch.randn(5, 7, requires_grad=True)
    matrix = torch.randn(4, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.pkt_fast.align_rows.default, (hidden, matrix, True))
    groups = ([hidden.detach()] * 2, [matrix.detach()] * 2, True)
    torch.library.opcheck(torch.ops.pkt_fast.align_rows_grouped.default, groups)


def test_compiles_without_graph_break():
    hidden, matrix = torch.randn(5, 7), torch.randn(4, 7)
    compiled = torch.compile(
        lambda h, m: align_rows(h, m).sin(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(hidden, matrix), align_rows(hidden, matrix).sin())


@pytest.mark.parametrize(
    ("hidden", "matrix"), [((2, 3), (4, 5)), ((3,), (4, 3)), ((2, 3), (3,))]
)
def test_shapes_that_do_not_fit(hidden, matrix):
    with pytest.raises(ShapeError, match="align_rows"):
        align_rows(torch.zeros(hidden), torch.zeros(matrix))


def test_groups_that_do_not_fit():
    with pytest.raises(ShapeError, match="2 hidden, but 1 matrices"):
        align_rows_grouped([torch.zeros(2, 3)] * 2, [torch.zeros(4, 3)])
    with pytest.raises(ShapeError, match="float dtype"):
        align_rows(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64))


def test_float64_on_a_gpu_is_left_to_the_reference():
    takes = _registry._ops["align_rows"].supports["triton"]
    assert not takes(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1), True)
    assert takes(torch.zeros(1, 1), torch.zeros(1, 1), True)
