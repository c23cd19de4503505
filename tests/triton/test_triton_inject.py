from __future__ import annotations

import math
import os

import pytest
import torch
from kernel_checks import DTYPES, assert_close, bound, poison
from op_cases import far_apart

from pkt_fast import reference
from pkt_fast.ops.inject import philox_words, round_stochastically

kernel = pytest.importorskip("pkt_fast.kernels.inject")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SHAPES = [(1, 1), (70, 133), (64, 128), (3, 1000), (129, 7), (257, 65)]
RANKS = [1, 3, 8, 17, 70, 16]


def problem(dtype, factors, device, shapes=SHAPES, ranks=RANKS):
    """Matrices of many shapes, every second one stored transposed."""
    transposed = [g % 2 == 1 for g in range(len(shapes))]
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    a, b = [], []
    for (rows, columns), rank, flip in zip(shapes, ranks, transposed, strict=True):
        out, inside = (columns, rows) if flip else (rows, columns)
        a.append(torch.randn(rank, inside, device=device).to(factors))
        b.append((torch.randn(out, rank, device=device) / math.sqrt(rank)).to(factors))
    scales = [0.5, -1.0, 2.0, 1e-4, 0.0, 0.25][: len(shapes)]
    return weights, a, b, scales, transposed


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, [(64, 128), (80, 16)]], ids=["odd", "aligned"])
def test_list_of_matrices(dtype, factors, shapes, device):
    ranks = RANKS[: len(shapes)]
    weights, a, b, scales, transposed = problem(dtype, factors, device, shapes, ranks)
    old = [w.clone() for w in weights]
    backups = [poison(*w.shape, dtype=dtype, device=device) for w in weights]
    counts = kernel.inject_(weights, a, b, scales, transposed, backups, None)
    for g, weight in enumerate(weights):
        expected = reference.inject(
            old[g].double(), a[g].double(), b[g].double(), scales[g], transposed=transposed[g]
        )
        # A float32 sum over the rank, rounded once; elements stay below 16.
        assert_close(weight, expected, bound(dtype, ranks[g]), scale=16.0)
        assert torch.equal(backups[g], old[g])
        assert counts[g] == (weight == old[g]).sum()
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding(dtype, device):
    """The float32 sum is rounded once: within half a unit of the last place of the exact result."""
    weights, a, b, scales, transposed = problem(dtype, torch.float32, device, SHAPES[:2], [1, 1])
    old = [w.clone() for w in weights]
    kernel.inject_(weights, a, b, scales, transposed, [], None)
    for g, weight in enumerate(weights):
        exact = reference.inject(
            old[g].double(), a[g].double(), b[g].double(), scales[g], transposed=transposed[g]
        )
        half = torch.finfo(dtype).eps / 2 * torch.exp2(exact.abs().log2().floor())
        if INTERPRETED and dtype == torch.bfloat16:  # which it truncates
            half = 2 * half
        slack = 1e-6 * (1 + old[g].double().abs())
        assert ((weight.double() - exact).abs() <= half + slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_draws_the_documented_words(dtype, device):
    """Factors of small integers make the float32 sums exact, so the bits must agree."""
    shapes, ranks = [(70, 133), (5, 9)], [4, 3]
    weights, a, b, _, transposed = problem(dtype, torch.float32, device, shapes, ranks)
    a, b = [x.mul(3).round() for x in a], [x.mul(3).round() for x in b]
    scales, seed = [2.0**-12, 2.0**-13], (5 << 32) + 77
    exact = [
        reference.inject(w.float(), x, y, s, transposed=t)
        for w, x, y, s, t in zip(weights, a, b, scales, transposed, strict=True)
    ]
    kernel.inject_(weights, a, b, scales, transposed, [], seed)
    for g, weight in enumerate(weights):
        words = philox_words(seed, g, *weight.shape).to(device)
        assert torch.equal(weight, round_stochastically(exact[g], words, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_right_on_average(dtype, device):
    """A change below half a unit vanishes when rounded to nearest and survives on average here."""
    weight = torch.ones(128, 512, device=device).to(dtype)
    a, b = torch.ones(1, 512, device=device), torch.ones(128, 1, device=device)
    step = torch.finfo(dtype).eps
    kept = kernel.inject_([weight], [a], [b], [step / 8], [False], [], 3)
    mean = (weight.double() - 1).mean() / step
    # 65,536 draws of probability 1/8: five standard deviations.
    assert abs(mean - 0.125) < 5 * math.sqrt(0.125 * 0.875 / weight.numel())
    assert kept[0] == (weight == 1).sum()


def test_subnormal_float16_weights(device):
    weight = (torch.randn(64, 64, device=device) * 1e-6).half()
    old = weight.double()
    zero = torch.zeros(1, 64, device=device), torch.zeros(64, 1, device=device)
    kernel.inject_([weight], [zero[0]], [zero[1]], [1.0], [False], [], 9)
    assert torch.equal(weight.double(), old)


def test_factors_of_two_dtypes(device):
    weights, a, b, scales, transposed = problem(torch.float32, torch.float32, device)
    exact = [
        reference.inject(w.double(), x.double(), y.bfloat16().double(), s, transposed=t)
        for w, x, y, s, t in zip(weights, a, b, scales, transposed, strict=True)
    ]
    kernel.inject_(weights, a, [y.bfloat16() for y in b], scales, transposed, [], None)
    for g, weight in enumerate(weights):
        assert_close(weight, exact[g], bound(torch.float32, RANKS[g]), scale=16.0)


def test_weights_of_several_dtypes_in_one_list(device):
    lists = [problem(dtype, torch.float32, device, SHAPES[:1], [3]) for dtype in DTYPES]
    weights = [p[0][0] for p in lists]
    exact = [reference.inject(*(p[k][0].double() for k in range(3)), 0.5) for p in lists]
    args = [[p[k][0] for p in lists] for k in (1, 2)]
    counts = kernel.inject_(weights, *args, [0.5] * 3, [False] * 3, [], None)
    assert counts.shape == (3,)
    for weight, expected in zip(weights, exact, strict=True):
        assert_close(weight, expected, bound(weight.dtype, 3), scale=16.0)


def test_row_strides_leave_the_gap_alone(device):
    wide = poison(30, 50, dtype=torch.float32, device=device)
    wide[:, 4:37] = torch.randn(30, 33, device=device)
    weight = wide[:, 4:37]
    a, b = torch.randn(4, 33, device=device), torch.randn(30, 4, device=device)
    expected = reference.inject(weight.double(), a.double(), b.double(), 1.0)
    kernel.inject_([weight], [a], [b], [1.0], [False], [], None)
    assert_close(weight, expected, bound(torch.float32, 4), scale=16.0)
    assert wide[:, :4].isnan().all()
    assert wide[:, 37:].isnan().all()


def test_offsets_beyond_32_bits(device):
    """Rows of the weight, of its copy and of the factor beside them."""
    weight, kept, b = (far_apart(300, n, (1 << 23) - 16, device) for n in (40, 40, 3))
    a = torch.randn(3, 40, device=device).half()
    old = weight.clone()
    kernel.inject_([weight], [a], [b], [0.5], [False], [kept], None)
    expected = reference.inject(old.double(), a.double(), b.double(), 0.5)
    assert_close(weight, expected, bound(weight.dtype, 3), scale=16.0)
    assert torch.equal(kept, old)


def test_empty(device):
    assert kernel.inject_([], [], [], [], [], [], None).shape == (0,)
    weight = torch.randn(0, 4, device=device)
    a, b = torch.randn(2, 4, device=device), torch.randn(0, 2, device=device)
    assert kernel.inject_([weight], [a], [b], [1.0], [False], [], None).tolist() == [0]


def test_rank_zero_changes_nothing(device):
    weight = torch.randn(5, 4, device=device)
    old = weight.clone()
    a, b = torch.randn(0, 4, device=device), torch.randn(5, 0, device=device)
    counts = kernel.inject_([weight], [a], [b], [1.0], [False], [], None)
    assert torch.equal(weight, old)
    assert counts.tolist() == [20]
