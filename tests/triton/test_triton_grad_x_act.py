from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, bound
from op_cases import far_apart

from pkt_fast import reference

kernel = pytest.importorskip("pkt_fast.kernels.grad_x_act")


def check(gradient, activation):
    signed, absolute = kernel.grad_x_act(gradient, activation)
    expected = reference.gradient_times_activation(gradient.double(), activation.double())
    assert signed.dtype == absolute.dtype == torch.float32
    # Sums of n float32 products: the error is relative to the sum of magnitudes.
    limit = bound(torch.float32, gradient[0].numel()) * expected[1]
    assert ((signed - expected[0]).abs() <= limit).all()
    assert ((absolute - expected[1]).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 67), (2, 131, 40), (5, 8, 2048), (2, 1, 9001)])
def test_sums(dtype, shape, device):
    check(torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype))


def test_strides(device):
    gradient = torch.randn(4, 9, 33, device=device)
    check(gradient[1:, 2:], gradient.flip(0)[:3, 1:8])
    check(gradient[:, :, 3:20], gradient.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :17])


def test_offsets_beyond_32_bits(device):
    near = torch.randn(2, 2, 40, device=device).half()
    far = far_apart(4, 40, 1 << 30, device).view(2, 2, 40)
    check(far, near)
    check(near, far)


def test_mixed_dtypes(device):
    check(torch.randn(2, 3, 50, device=device), torch.randn(2, 3, 50, device=device).bfloat16())


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_extreme_values(size, device):
    check(*(size * torch.randn(2, 4, 30, device=device) for _ in range(2)))


def test_products_beyond_float32_give_no_nan(device):
    huge = torch.tensor([1e30, -1e30], device=device).repeat(1, 4, 8)
    signed, absolute = kernel.grad_x_act(huge, huge.abs())
    assert not signed.isnan().any()
    assert absolute.isposinf().all()


def test_nan_is_not_hidden(device):
    gradient = torch.randn(2, 3, 5, device=device)
    gradient[1, 2, 2] = float("nan")
    signed, absolute = kernel.grad_x_act(gradient, torch.ones_like(gradient))
    assert signed.isnan().tolist() == absolute.isnan().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape, device):
    for total in kernel.grad_x_act(*torch.zeros(2, *shape, device=device)):
        assert total.tolist() == [0.0] * shape[0]


def test_repeats_bit_for_bit(device):
    operands = torch.randn(2, 2, 70, 300, device=device)
    first, second = kernel.grad_x_act(*operands), kernel.grad_x_act(*operands)
    assert torch.equal(first[0], second[0])
