from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, assert_close, bound, extreme_rows, rows
from op_cases import far_apart

from pkt_fast import reference

kernel = pytest.importorskip("pkt_fast.kernels.row_cosine")


def check(x, y):
    """Cosines and both gradients, whose errors are measured against 1/‖row‖, their natural size.

    Every row has another weight, up to 2.
    """
    weight = torch.linspace(-2, 1, len(x), device=x.device)
    cosines, dx, dy = kernel.row_cosine_gradient(x, y, weight, True, True)
    # On a GPU the two may be tuned to different tiles, which add up in another order.
    assert_close(kernel.row_cosine(x, y), cosines.double(), bound(torch.float32, x.shape[1]))
    exact_x, exact_y = (z.double().detach().requires_grad_() for z in (x, y))
    expected = reference.row_cosine(exact_x, exact_y)
    (expected * weight).sum().backward()
    assert cosines.dtype == torch.float32
    assert_close(cosines, expected.detach(), bound(torch.float32, x.shape[1]))
    for got, exact in ((dx, exact_x), (dy, exact_y)):
        limit = torch.finfo(got.dtype).max
        assert got.dtype in DTYPES
        inverse = 1 / exact.detach().norm(dim=1, keepdim=True).clamp_min(1e-300)
        # float16 gradients below its smallest normal are rounded to its fixed spacing.
        spacing = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        scale = inverse + spacing / torch.finfo(got.dtype).eps
        wanted = exact.grad.clamp(-limit, limit)
        assert_close(got, wanted, bound(got.dtype, x.shape[1]), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 70), (64, 64), (5, 1021), (3, 4096), (130, 16)])
def test_cosines_and_gradients(dtype, shape, device):
    check(rows(*shape, dtype, device), rows(*shape, dtype, device))


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
def test_operands_of_two_dtypes(other, device):
    check(rows(9, 33, torch.float32, device), rows(9, 33, other, device))


def test_row_strides(device):
    check(rows(9, 33, torch.float32, device, strided=True), rows(9, 33, torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_norms(dtype, device):
    x = extreme_rows(16, 29, dtype, device)
    check(x, rows(16, 29, dtype, device))
    check(x, x.flip(0))


def test_offsets_beyond_32_bits(device):
    check(far_apart(4, 40, 1 << 30, device), rows(4, 40, torch.float32, device))


def test_parallel_rows_have_no_gradient(device):
    x = rows(4, 50, torch.float32, device)
    weight = torch.ones(1, device=device).expand(4)
    cosines, dx, _ = kernel.row_cosine_gradient(x, -3 * x, weight, True, False)
    assert_close(cosines, -torch.ones(4, device=device).double(), bound(torch.float32, 50))
    assert_close(dx, torch.zeros_like(x).double(), bound(torch.float32, 50))


def test_only_wanted_gradients_are_written(device):
    x, y = rows(4, 5, torch.float32, device), rows(4, 5, torch.float16, device)
    _, dx, dy = kernel.row_cosine_gradient(x, y, torch.ones(4, device=device), False, True)
    assert dx.shape == (0,)
    assert dy.shape == (4, 5)


def test_smallest_float_saturates_instead_of_overflowing(device):
    x = torch.zeros(2, 4, device=device)
    x[:, 0] = 1e-45
    weight = torch.tensor([1.0, 0.0], device=device)
    _, dx, _ = kernel.row_cosine_gradient(x, torch.ones(2, 4, device=device), weight, True, False)
    assert dx.isfinite().all()
    assert (dx[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape, device):
    zeros = torch.zeros(2, *shape, device=device)
    weight = torch.ones(shape[0], device=device)
    cosines, dx, dy = kernel.row_cosine_gradient(*zeros, weight, True, True)
    assert cosines.tolist() == [0.0] * shape[0]
    assert dx.shape == dy.shape == shape
