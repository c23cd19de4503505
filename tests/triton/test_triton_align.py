from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, assert_close, bound, extreme_rows, rows
from op_cases import far_apart

from pkt_fast import reference

kernel = pytest.importorskip("pkt_fast.kernels.align")


def expect(hidden, matrix, normalize):
    unit = reference.unit_rows(hidden.double()) if normalize else hidden.double()
    return unit @ matrix.double().T


def check(hidden, matrix, normalize=True):
    """|error| <= 4·(ε/2 + ε_float32·√D)·‖h‖·‖m‖, the Cauchy-Schwarz size of a dot product."""
    got = kernel.align_rows(hidden, matrix, normalize)
    assert got.dtype == hidden.dtype
    sizes = matrix.double().norm(dim=1)[None, :]
    if not normalize:
        sizes = sizes * hidden.double().norm(dim=1, keepdim=True)
    assert_close(
        got, expect(hidden, matrix, normalize), bound(hidden.dtype, hidden.shape[1]),
        scale=sizes.clamp_min(1e-300),
    )  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "outputs"),
    [(1, 1, 1), (1, 64, 64), (37, 70, 50), (130, 64, 129), (64, 257, 67), (257, 96, 8), (3, 99, 5)],
)
def test_shapes(count, width, outputs, dtype, normalize, device):
    check(rows(count, width, dtype, device), rows(outputs, width, dtype, device), normalize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_strides(dtype, device):
    check(rows(33, 40, dtype, device, strided=True), rows(20, 40, dtype, device, strided=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_norms(dtype, device):
    hidden = extreme_rows(70, 90, dtype, device)
    matrix = rows(30, 90, dtype, device)
    check(hidden, matrix)
    assert (kernel.align_rows(hidden, matrix, True)[::4] == 0).all()


def test_one_extreme_element_among_ordinary_ones(device):
    hidden = rows(8, 90, torch.float32, device)
    hidden[3, 17], hidden[5] = 1e25, hidden[5] * 1e-25
    hidden[5, 4] = 1e-10
    check(hidden, rows(30, 90, torch.float32, device))


@pytest.mark.parametrize("width", [72, 64])  # only the second one's rows are 16-byte aligned
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_equal_single_launches(dtype, width, device):
    """Groups of unequal rows, one empty, one strided, and a second width, against one by one.

    Bits are compared where both run the same tile; on a GPU they may be tuned to different ones.
    """
    counts = [70, 1, 0, 129, 13]
    hidden = [rows(n, width, dtype, device, strided=n == 129 and width == 72) for n in counts]
    hidden.append(rows(20, 33, dtype, device))
    matrices = [rows(45, h.shape[1], dtype, device) for h in hidden]
    got = kernel.align_rows_grouped(hidden, matrices, True)
    assert [g.shape for g in got] == [(h.shape[0], 45) for h in hidden]
    for g, h, m in zip(got, hidden, matrices, strict=True):
        assert device.type == "cuda" or torch.equal(g, kernel.align_rows(h, m, True))
        assert_close(
            g, expect(h, m, True), bound(dtype, h.shape[1]), scale=m.double().norm(dim=1)[None, :]
        )


def test_offsets_beyond_32_bits(device):
    check(far_apart(300, 40, (1 << 23) - 16, device), rows(20, 40, torch.float16, device))
    check(far_apart(4, 40, 1 << 30, device), rows(20, 40, torch.float16, device))


def test_no_channels_gives_zeros(device):
    hidden, matrix = torch.zeros(3, 0, device=device), torch.zeros(2, 0, device=device)
    got = kernel.align_rows(hidden, matrix, True)
    assert (got == torch.zeros(3, 2, device=device)).all()


def test_nan_is_not_hidden(device):
    hidden = rows(3, 20, torch.float32, device)
    hidden[1, 4] = float("nan")
    got = kernel.align_rows(hidden, rows(6, 20, torch.float32, device), True)
    assert got.isnan().all(1).tolist() == [False, True, False]
