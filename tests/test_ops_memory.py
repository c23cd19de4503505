"""capture_rows, grad_x_act, row_cosine and inject_: every backend against the float64 reference.

The Triton kernels have their own run under the interpreter (tests/triton) and on hardware
(tests/gpu); they take their inputs from op_cases as these tests do.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from op_cases import (
    DTYPES,
    HALVES,
    WIDTHS,
    accumulator_eps,
    capture,
    eps,
    far_apart,
    injection,
    normal,
    pair,
    poison,
)

from pkt_fast import ops, reference
from pkt_fast.errors import PktFastError, ShapeError
from pkt_fast.ops import _registry
from pkt_fast.ops._native import accumulator
from pkt_fast.ops.inject import philox_words, round_stochastically
from pkt_fast.ops.row_cosine import row_cosine_gradient

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native":
        pytest.importorskip("pkt_fast._native")
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_memory_that_no_op_has_written_shows():
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


# --------------------------------------------------------------------------- capture_rows


def captured(case, out_dtype, dtype=torch.float64):
    """The reference on float64 inputs, rounded to ``out_dtype`` at the end."""
    flat = [
        None if x is None else x.to(dtype).reshape(-1, x.shape[-1])
        for x in (case.value, case.minus, case.other, case.other_minus)
    ]
    value, minus, other, other_minus = flat
    return reference.gather_rows(
        value, case.index, minus=minus, other=other, other_minus=other_minus,
        lam=case.lam, scale=case.scale, normalize=case.normalize,
    )  # fmt: skip


def capture_pairs():
    """(input dtype, output dtype): the native kernel keeps float64 to itself."""
    single = (torch.float32, *HALVES)
    return [(a, b) for a in single for b in single] + [(torch.float64, torch.float64)]


@pytest.mark.parametrize(("dtype", "out_dtype"), capture_pairs())
@pytest.mark.parametrize("operands", [1, 2, 3, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_capture_rows(backend, dtype, out_dtype, operands, normalize):
    for width in WIDTHS:
        case = capture(dtype, width, operands, normalize)
        out = poison(11, width, dtype=out_dtype)
        ops.capture_rows(out, 3, *case.arguments())
        expected = captured(case, out_dtype)
        got = out[3:10].double()
        if out_dtype == torch.float16:
            # What overflows float16 does so on both sides.
            expected = expected.half().double()
        # A few roundings in the accumulator, each of the size of the largest operand (they cancel),
        # a float32 sum of D squares, and one rounding to the output.
        size = max(
            x.double().reshape(-1, width)[case.index].abs().amax(1, keepdim=True)
            for x in (case.value, case.minus, case.other, case.other_minus)
            if x is not None
        ) if operands == 1 else torch.stack([
            x.double().reshape(-1, width)[case.index].abs().amax(1, keepdim=True)
            for x in (case.value, case.minus, case.other, case.other_minus)
            if x is not None
        ]).amax(0)
        if normalize:
            size = expected.abs().amax(1, keepdim=True) if operands == 1 else torch.ones_like(size)
        bound = (
            accumulator_eps(dtype) * (8 + math.sqrt(width)) * size * 4
            + eps(out_dtype) * expected.abs()
            + torch.finfo(out_dtype).smallest_normal * eps(out_dtype)
        )
        same = (got == expected) | ((got - expected).abs() <= bound)
        assert bool(same.all()), (width, (got - expected).abs().max())
        assert bool(out[:3].isnan().all())
        assert bool(out[10:].isnan().all())


def test_capture_unit_rows(backend):
    """Tiny, huge and ordinary rows come out with length 1, a zero row as zero."""
    case = capture(torch.float32, 1024, 1, True)
    out = poison(7, 1024, dtype=torch.float32)
    ops.capture_rows(out, 0, *case.arguments())
    lengths = out.double().norm(dim=1)
    assert lengths[0] == 0
    assert (lengths[1:] - 1).abs().max() < 1e-6


def test_capture_differences_of_the_largest_floats(backend):
    """Neither a float32 difference nor its square may overflow on the way to a unit row."""
    top = torch.finfo(torch.float32).max
    value = torch.tensor([[top, top, -top]])
    index = torch.tensor([0])
    for others in ((None, None), (value, value / 2)):
        out = poison(1, 3, dtype=torch.float32)
        ops.capture_rows(out, 0, index, value, -value, *others, 0.5, 1.0, True)
        unit = torch.tensor([[1.0, 1.0, -1.0]]) / math.sqrt(3)
        assert torch.allclose(out, unit, atol=1e-6)
    out = poison(1, 3, dtype=torch.float32)
    ops.capture_rows(out, 0, index, value, -value, -value, value, 0.5, 1.0, False)
    assert bool((out == 0).all())


def test_capture_strided_inputs_and_outputs(backend):
    generator = torch.Generator().manual_seed(0)
    base = normal(generator, 6, 4, 2, 24, dtype=torch.bfloat16)
    index = torch.tensor([5, 0, 23, 11])
    strided = {
        "batch and token strides": base[:, :, 1],
        "a column slice": base[:, :, 0, 3:20],
        "last dimension not contiguous": base[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": base[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1),
        "repeated rows": base[:1, :, 0].expand(6, 4, 24),
    }
    for name, value in strided.items():
        width = value.shape[-1]
        store = poison(9, width + 5, dtype=torch.float32)
        ops.capture_rows(store[1:8:2, 2:-3], 0, index, value, normalize=True)
        expected = reference.gather_rows(value.reshape(24, width).double(), index, normalize=True)
        assert (store[1:8:2, 2:-3] - expected).abs().max() < 1e-6, name
        store[1:8:2, 2:-3] = math.nan
        assert bool(store.isnan().all()), name
    every_second = index.repeat_interleave(2)[::2]
    out = poison(4, 24, dtype=torch.bfloat16)
    ops.capture_rows(out, 0, every_second, base[:, :, 1])
    assert torch.equal(out, base[:, :, 1].reshape(24, 24)[index])


@pytest.mark.parametrize("dtype", HALVES)
def test_capture_converts_exactly(backend, dtype):
    """Every 16-bit value to float32, and float32 at and beside every tie back, as torch does."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)[None]
    wide = torch.empty(1, 1 << 16)
    ops.capture_rows(wide, 0, torch.tensor([0]), every)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    finite = every[every.isfinite()].double().unique()
    step = finite[-1] - finite[-2]
    ties = (torch.cat([finite[:1] - step, finite]) + torch.cat([finite, finite[-1:] + step])) / 2
    bits = ties.float().view(torch.int32)
    values = torch.stack([bits - 1, bits, bits + 1]).view(torch.float32)
    narrow = torch.empty(values.shape, dtype=dtype)
    ops.capture_rows(narrow, 0, torch.arange(len(values)), values)
    torch.testing.assert_close(narrow, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_capture_nothing(backend):
    out = poison(2, 4, dtype=torch.float32)
    ops.capture_rows(out, 2, torch.empty(0, dtype=torch.int64), torch.ones(3, 4))
    assert bool(out.isnan().all())
    ops.capture_rows(out[:, :0], 0, torch.tensor([1, 2]), torch.ones(3, 0), normalize=True)
    ops.capture_rows(out, 0, torch.empty(0, dtype=torch.int64), torch.ones(0, 5, 4))


def test_capture_larger_than_the_caches(backend, threads):
    """Streaming stores, several threads, an offset that is not aligned."""
    threads(2)
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(700, 4096, generator=generator).bfloat16()
    index = torch.randint(700, (900,), generator=generator)
    for dtype, width in ((torch.float32, 4096), (torch.bfloat16, 4096), (torch.float32, 4091)):
        out = poison(901, width, dtype=dtype)
        ops.capture_rows(out, 1, index, value[:, :width], normalize=True)
        expected = reference.unit_rows(value[:, :width].double())[index]
        assert (out[1:].double() - expected).abs().max() <= eps(dtype) * 0.3
        assert bool(out[0].isnan().all())


# What capture_rows must refuse: what to replace in a valid call.
REFUSED_CAPTURES = {
    "index too large": {"index": torch.tensor([0, 6])},
    "index negative": {"index": torch.tensor([0, -1])},
    "index of another dtype": {"index": torch.tensor([0, 1], dtype=torch.int32)},
    "index of two dimensions": {"index": torch.tensor([[0, 1]])},
    "no room": {"offset": 3},
    "offset negative": {"offset": -1},
    "another width": {"out": torch.zeros(4, 5)},
    "value of one dimension": {"value": torch.ones(4)},
    "integers": {"value": torch.ones(6, 4, dtype=torch.int64)},
    "minus of another shape": {"minus": torch.ones(5, 4)},
    "other_minus alone": {"other_minus": torch.ones(6, 4)},
}


@pytest.mark.parametrize("change", REFUSED_CAPTURES.values(), ids=REFUSED_CAPTURES.keys())
def test_capture_refuses(backend, change):
    valid = {
        "out": poison(4, 4, dtype=torch.float32), "offset": 0,
        "index": torch.tensor([0, 5]), "value": torch.ones(6, 4),
    }  # fmt: skip
    ops.capture_rows(**valid)
    valid["out"].fill_(math.nan)
    with pytest.raises(ShapeError, match="capture_rows"):
        ops.capture_rows(**valid | change)
    assert bool(valid["out"].isnan().all())


def test_capture_refuses_overlap(backend):
    value = torch.ones(6, 4)
    with pytest.raises(ShapeError, match="shares memory"):
        ops.capture_rows(value[2:], 0, torch.tensor([0]), value)


def test_native_leaves_mixed_dtypes_to_the_reference():
    """A difference between a bfloat16 and a float32 tensor is right, whoever computes it."""
    value, minus = torch.full((1, 3), 1.5).bfloat16(), torch.full((1, 3), 1.25)
    out = poison(1, 3, dtype=torch.float32)
    ops.capture_rows(out, 0, torch.tensor([0]), value, minus)
    assert bool((out == 0.25).all())


# --------------------------------------------------------------------------- grad_x_act

SINGLE = [(a, b) for a in DTYPES[:3] for b in DTYPES[:3]]


@pytest.mark.parametrize(("g_dtype", "a_dtype"), [*SINGLE, (torch.float64, torch.float64)])
def test_grad_x_act(backend, g_dtype, a_dtype):
    generator = torch.Generator().manual_seed(2)
    for shape in ((1, 1, 1), (3, 5, 7), (2, 3, 64), (1, 2, 5000), (5, 1, 33), (2, 40, 100)):
        g = normal(generator, *shape, dtype=g_dtype)
        a = normal(generator, *shape, dtype=a_dtype)
        signed, absolute = ops.grad_x_act(g, a)
        expected = reference.gradient_times_activation(g.double(), a.double())
        count = shape[1] * shape[2]
        # Rounding errors of a sum of `count` terms, relative to the sum of magnitudes.
        bound = accumulator_eps(g_dtype) * (2 + math.sqrt(count)) * expected[1]
        assert signed.shape == absolute.shape == shape[:1]
        assert signed.dtype == (torch.float64 if g_dtype == torch.float64 else torch.float32)
        assert bool(((signed.double() - expected[0]).abs() <= bound).all()), shape
        assert bool(((absolute.double() - expected[1]).abs() <= bound).all()), shape


def test_grad_x_act_strides_and_nothing(backend):
    generator = torch.Generator().manual_seed(3)
    g, a = normal(generator, 4, 6, 2, 50), normal(generator, 6, 50, 4)
    for x, y in (
        (g[:, :, 1], a.permute(2, 0, 1)),
        (g[:, ::2, 0, 5:40], a.permute(2, 0, 1)[:, ::2, 5:40]),
        (g[:1, :1, 0].expand(4, 6, 50), g[:, :, 0]),
    ):
        expected = reference.gradient_times_activation(x.double(), y.double())
        for got, want in zip(ops.grad_x_act(x, y), expected, strict=True):
            assert (got - want).abs().max() < 1e-4
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for got in ops.grad_x_act(torch.ones(shape), torch.ones(shape)):
            assert torch.equal(got, torch.zeros(shape[0]))


def test_grad_x_act_offsets_beyond_32_bits(backend):
    near = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(3)).half()
    far = far_apart(4, 40, 1 << 30).view(2, 2, 40)
    for x, y in ((far, near), (near, far), (far.view(1, 4, 40), near.view(1, 4, 40))):
        expected = reference.gradient_times_activation(x.double(), y.double())
        for got, want in zip(ops.grad_x_act(x, y), expected, strict=True):
            assert (got - want).abs().max() < 1e-4


def test_grad_x_act_beyond_float32(backend):
    """Products of 1e60 and 1e-60 cancel or vanish; nothing becomes NaN."""
    big = torch.tensor([[[1e30, -1e30, 1e-30, 2.0]]])
    signed, absolute = ops.grad_x_act(big, torch.tensor([[[1e30, 1e30, 1e-30, 3.0]]]))
    assert signed.item() == 6.0
    assert absolute.item() == math.inf


def test_grad_x_act_does_not_depend_on_threads(threads):
    pytest.importorskip("pkt_fast._native")
    generator = torch.Generator().manual_seed(4)
    g, a = normal(generator, 3, 100, 1000), normal(generator, 3, 100, 1000)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.stack(ops.grad_x_act(g, a)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("g", "a"),
    [
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int32)),
    ],
)
def test_grad_x_act_refuses(g, a):
    with pytest.raises(ShapeError, match="grad_x_act"):
        ops.grad_x_act(g, a)


# --------------------------------------------------------------------------- row_cosine


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [*SINGLE, (torch.float64, torch.float64)])
def test_row_cosine(backend, x_dtype, y_dtype):
    for rows, width in ((1, 1), (9, 5), (4, 64), (7, 257), (5, 1024)):
        x, y = pair(x_dtype, y_dtype, rows, width)
        wide_x, wide_y = x.double().requires_grad_(), y.double().requires_grad_()
        expected = reference.row_cosine(wide_x, wide_y)
        weight = torch.linspace(-2, 1, rows, dtype=expected.dtype).to(accumulator(x, y))
        (expected * weight).sum().backward()
        cosines, dx, dy = row_cosine_gradient(x, y, weight, True, True)
        assert torch.equal(ops.row_cosine(x, y), cosines)
        tolerance = accumulator_eps(x_dtype) * (4 + math.sqrt(width))
        assert cosines.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
        assert (cosines.double() - expected).abs().max() <= tolerance
        for got, operand, other, grad in (
            (dx, x, y, wide_x.grad), (dy, y, x, wide_y.grad),
        ):  # fmt: skip
            assert got.dtype == operand.dtype
            assert got.shape == operand.shape
            assert bool(got.isfinite().all())
            zero = (operand == 0).all(1) | (other == 0).all(1)
            assert bool((got[zero] == 0).all())
            # Relative to w/‖x‖, and no further than the dtype reaches.
            top = torch.finfo(operand.dtype).max
            scale = weight.abs()[:, None] / operand.double().norm(dim=1, keepdim=True)
            grad = grad.clamp(-top, top)
            bound = scale * tolerance * 4 + eps(operand.dtype) * grad.abs() + 1e-7 * (
                operand.dtype == torch.float16
            )
            error = (got.double() - grad).abs()[~zero]
            assert bool((error <= bound[~zero]).all()), (rows, width)


def test_row_cosine_unwanted_gradients_are_empty(backend):
    x, y = pair(torch.float32, torch.float32, 4, 8)
    _, dx, dy = row_cosine_gradient(x, y, torch.ones(4), False, True)
    assert dx.numel() == 0
    assert dy.shape == y.shape


def test_row_cosine_gradcheck(backend):
    generator = torch.Generator().manual_seed(5)
    x = normal(generator, 4, 6, dtype=torch.float64).requires_grad_()
    y = normal(generator, 4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.row_cosine, (x, y))
    assert torch.autograd.gradcheck(lambda x: ops.row_cosine(x, y.detach()), (x,))
    assert torch.autograd.gradcheck(lambda y: ops.row_cosine(x.detach(), y), (y,))


def test_row_cosine_backward_scales_rows(backend):
    generator = torch.Generator().manual_seed(6)
    x = normal(generator, 5, 33).bfloat16().requires_grad_()
    y = normal(generator, 5, 33).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    (ops.row_cosine(x, y) * weights).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    (reference.row_cosine(*wide) * weights).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    # One rounding to bfloat16.
    assert torch.allclose(x.grad.double(), wide[0].grad, rtol=eps(torch.bfloat16) / 2, atol=1e-6)
    assert torch.allclose(y.grad.double(), wide[1].grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not ops.row_cosine(x, y).requires_grad


def test_row_cosine_weights_of_any_size(backend):
    """Rows of weight 0 have no gradient, however small they are; a NaN or a huge weight shows."""
    x = torch.tensor([[1e-30, 0.0], [1e-45, 0.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    y = torch.tensor([[1.0, 1.0]]).expand(5, 2)
    weight = torch.tensor([0.0, 0.0, 1e30, 3e38, math.nan])
    _, dx, _ = row_cosine_gradient(x, y, weight, True, False)
    assert bool((dx[:2] == 0).all())
    unit = torch.tensor([3.0, 4.0], dtype=torch.float64) / 5
    other = torch.ones(2, dtype=torch.float64) / math.sqrt(2)
    exact = (other - (unit @ other) * unit) / 5
    assert torch.allclose(dx[2:4].double() / weight[2:4, None].double(), exact, rtol=1e-5)
    assert bool(dx[4].isnan().all())


def test_row_cosine_has_no_second_derivative(backend):
    x, y = pair(torch.float64, torch.float64, 4, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.row_cosine(x, y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "weight", [torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.float64)]
)
def test_row_cosine_gradient_refuses(backend, weight):
    with pytest.raises(ShapeError, match="weight"):
        row_cosine_gradient(torch.ones(3, 4), torch.ones(3, 4), weight, True, True)


def test_row_cosine_strides_and_nothing(backend):
    generator = torch.Generator().manual_seed(8)
    base = normal(generator, 8, 40)
    for x, y in (
        (base[::2, 3:20], base[1::2, 5:22]),
        (base[:, :8].T, base[:, 8:16]),
        (base[:1].expand(8, 40), base),
    ):
        got = row_cosine_gradient(x, y, torch.ones(1).expand(len(x)), True, True)
        wide = [t.double().clone().requires_grad_() for t in (x, y)]
        expected = reference.row_cosine(*wide)
        expected.sum().backward()
        for a, b in zip(got, (expected, wide[0].grad, wide[1].grad), strict=True):
            assert (a - b).abs().max() < 1e-5
    assert ops.row_cosine(torch.ones(0, 4), torch.ones(0, 4)).shape == (0,)
    assert torch.equal(ops.row_cosine(torch.ones(3, 0), torch.ones(3, 0)), torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)),
    ],
)
def test_row_cosine_refuses(x, y):
    with pytest.raises(ShapeError, match="row_cosine"):
        ops.row_cosine(x, y)


# --------------------------------------------------------------------------- inject_


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [False, True])
def test_inject(backend, dtype, factors, keep):
    case = injection(dtype, factors)
    backups = [poison(*w.shape, dtype=dtype) for w in case.weights] if keep else []
    counts = ops.inject_(case.weights, *case.factors(), backups)
    for g, (weight, old) in enumerate(zip(case.weights, case.before, strict=True)):
        exact = reference.inject(
            old.double(), case.lora_a[g].double(), case.lora_b[g].double(), case.scales[g],
            transposed=case.transposed[g],
        )  # fmt: skip
        # A sum over the rank in the accumulator, then one rounding.
        bound = 16 * accumulator_eps(dtype) * (2 + math.sqrt(case.lora_a[g].shape[0]))
        error = (weight.double() - exact).abs()
        assert bool((error <= bound + eps(dtype) * exact.abs() / 1.99).all()), g
        assert counts[g] == (weight == old).sum()
        if keep:
            assert torch.equal(backups[g], old)
    assert counts.dtype == torch.int64
    assert counts[4] == case.weights[4].numel()  # its scale is 0


def test_inject_counts_what_is_swallowed(backend):
    """Changes under half a unit in the last place leave a bfloat16 weight as it was."""
    weight = torch.full((40, 50), 1.0).bfloat16()
    weight[:3] = 0.0
    weight[3, 0] = -0.0
    factors = [torch.ones(1, 50)], [torch.ones(40, 1)]
    counts = ops.inject_([weight], *factors, [1e-3], [False])
    assert counts.tolist() == [37 * 50 - 1]
    weight[3, 0] = -0.0
    assert ops.inject_([weight], *factors, [0.0], [False]).tolist() == [40 * 50]


def test_inject_into_slices(backend):
    """Rows of a larger matrix, odd strides of the factors: nothing else is touched."""
    generator = torch.Generator().manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16):
        whole = normal(generator, 20, 90, dtype=dtype)
        kept = poison(20, 90, dtype=dtype)
        before = whole.clone()
        a, b = normal(generator, 77, 8).T[::2], normal(generator, 4, 10).T
        ops.inject_([whole[5:15, 6:83]], [a], [b], [0.5], [False], [kept[:10, :77]])
        exact = reference.inject(before[5:15, 6:83].double(), a.double(), b.double(), 0.5)
        assert (whole[5:15, 6:83] - exact).abs().max() < 8 * eps(dtype)
        assert torch.equal(kept[:10, :77], before[5:15, 6:83])
        whole[5:15, 6:83] = before[5:15, 6:83]
        assert torch.equal(whole, before)
        assert bool(kept[10:].isnan().all())
        assert bool(kept[:, 77:].isnan().all())


def test_inject_offsets_beyond_32_bits(backend):
    """Rows of the weight, of its copy and of both factors, whichever way the weight is stored."""
    stride = 1 << 30
    for transposed in (False, True):
        weight, kept, b = (far_apart(4, width, stride) for width in (40, 40, 3))
        a = far_apart(3, 40, (1 << 30) + 64)
        factors = (b.T, a.T) if transposed else (a, b)
        before = weight.clone()
        ops.inject_([weight], [factors[0]], [factors[1]], [0.5], [transposed], [kept])
        exact = reference.inject(before.double(), a.double(), b.double(), 0.5)
        assert (weight - exact).abs().max() < 16 * eps(weight.dtype)
        assert torch.equal(kept, before)


@pytest.mark.parametrize("far", ["weight", "lora_a", "lora_b", "backup"])
def test_triton_leaves_offsets_beyond_32_bits_within_a_tile_to_others(far):
    takes = importlib.import_module("pkt_fast.ops.inject")._triton_takes
    shapes = {"weight": (4, 40), "lora_a": (4, 40), "lora_b": (4, 4), "backup": (4, 40)}
    given = {name: torch.zeros(shape).half() for name, shape in shapes.items()}
    for allowed in (True, False):
        weight, a, b, kept = ([x] for x in given.values())
        assert takes(weight, a, b, [0.5], [False], kept, None) == allowed
        given[far] = far_apart(*shapes[far], 1 << 30)


def test_inject_empty(backend):
    assert ops.inject_([], [], [], [], []).shape == (0,)
    weight = torch.ones(3, 4)
    counts = ops.inject_(
        [weight, torch.ones(0, 4)],
        [torch.ones(0, 4), torch.ones(2, 4)], [torch.ones(3, 0), torch.ones(0, 2)],
        [1.0, 1.0], [False, False],
    )  # fmt: skip
    assert counts.tolist() == [12, 0]
    assert bool((weight == 1).all())


def test_philox_known_answers():
    """Known-answer vectors of Random123 for Philox-4x32-10, counter and key 0."""
    assert philox_words(0, 0, 1, 4).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_draws_the_documented_words(backend, dtype):
    case = injection(dtype, torch.float32)
    seed = (3 << 40) + 5
    counts = ops.inject_(case.weights, *case.factors(), [], seed)
    for g, (weight, old) in enumerate(zip(case.weights, case.before, strict=True)):
        exact = reference.inject(
            old.float(), case.lora_a[g], case.lora_b[g], case.scales[g],
            transposed=case.transposed[g],
        )  # fmt: skip
        expected = round_stochastically(exact, philox_words(seed, g, *weight.shape), dtype)
        # The float32 sums may differ in their last bits, and then fall on another side of a word.
        differing = (weight != expected).double().mean()
        assert differing <= (0 if g == 0 else 2e-3), g
        assert counts[g] == (weight == old).sum()
        spacing = eps(dtype) * exact.abs() + torch.finfo(dtype).smallest_normal * eps(dtype)
        assert bool(((weight.float() - exact).abs() <= spacing * 1.01).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_inject_rounds_every_weight_to_nearest_even(backend, dtype):
    """All 65,536 bit patterns plus parts of a unit in the last place: ties, overflow, inf, NaN."""
    weight = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).reshape(256, 256)
    exact = weight.float()
    unit = torch.nextafter(weight.abs(), torch.full_like(weight, math.inf)).float() - exact.abs()
    for part in (0.0, 0.5, -0.5, 0.25, 0.75, -0.25, 1.5, 0.5000001):
        delta = torch.where(unit.isfinite(), part * unit, 1.0)
        changed = weight.clone()
        (same,) = ops.inject_([changed], [delta], [torch.eye(256)], [1.0], [False])
        wanted = (exact + delta).to(dtype)
        torch.testing.assert_close(changed, wanted, rtol=0, atol=0, equal_nan=True)
        kept = (changed == weight) | (changed.view(torch.int16) == weight.view(torch.int16))
        assert abs(same - kept.sum()) <= weight.isnan().sum()


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, -0x400000])
@pytest.mark.parametrize("where", ["lora_a", "lora_b", "weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inject_keeps_every_nan(backend, dtype, where, bits):
    """Whatever its bits are: a rounding that counts them up must not run over into a zero."""
    tensors = {"weight": torch.zeros(7, 64, dtype=dtype), "lora_a": torch.ones(2, 64),
               "lora_b": torch.ones(7, 2)}  # fmt: skip
    odd = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    into = tensors[where]
    if into.dtype == torch.float32:
        into.view(torch.int32)[0, 0] = bits
    else:
        into[0, 0] = odd.to(dtype)[0]
    ops.inject_([tensors["weight"]], [tensors["lora_a"]], [tensors["lora_b"]], [1.0], [False])
    assert tensors["weight"][0, 0].isnan()


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_equals_the_reference_to_the_bit(dtype):
    """Where every float32 sum is rounded once by both: all magnitudes, overflow, inf and NaN."""
    generator = torch.Generator().manual_seed(21)

    def spread(rows, low, high):
        exponents = torch.randint(low, high, (rows, 205), generator=generator)
        return normal(generator, rows, 205) * 2.0**exponents

    delta = spread(1, -40, 20)
    delta[0, :5] = torch.tensor([math.inf, math.nan, 3e38, -65519.0, -0.0])
    start = spread(61, -30, 16).to(dtype)
    start[7] = 0.0
    results = {}
    for name in ("native", "reference"):
        weights = [start.clone(), start.T.contiguous()]
        with ops.backend(name):
            counts = ops.inject_(
                weights, [delta] * 2, [torch.ones(61, 1)] * 2, [1.0] * 2, [False, True], [], 1 << 35
            )
        results[name] = [counts, *weights]
    for got, expected in zip(results["native"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_right_on_average(backend, dtype):
    """Subnormal, normal and near-overflow values: the mean error falls as 1/√n."""
    for level in (3e-7, 3e-5, 1.0, 1000.0):
        weight = torch.full((64, 1000), level).to(dtype)
        exact = weight.float() + 0.3 * eps(dtype) * level
        delta = [torch.full((1, 1000), float(exact[0, 0] - weight[0, 0].float()))]
        ops.inject_([weight], delta, [torch.ones(64, 1)], [1.0], [False], [], 11)
        step = max(eps(dtype) * level, torch.finfo(dtype).smallest_normal * eps(dtype))
        assert abs(float((weight.double() - exact.double()).mean())) < 4 * step / math.sqrt(64000)
        assert len(weight.unique()) <= 2


def test_stochastic_rounding_leaves_float32_alone(backend):
    plain, seeded = injection(torch.float32, torch.float32), injection(torch.float32, torch.float32)
    ops.inject_(plain.weights, *plain.factors())
    ops.inject_(seeded.weights, *seeded.factors(), [], 3)
    assert all(map(torch.equal, plain.weights, seeded.weights))


def test_inject_does_not_depend_on_threads(threads):
    pytest.importorskip("pkt_fast._native")
    generator = torch.Generator().manual_seed(10)
    start = normal(generator, 500, 700, dtype=torch.bfloat16)
    factors = [normal(generator, 8, 700)], [normal(generator, 500, 8)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        for seed in (None, 5):
            weight = start.clone()
            ops.inject_([weight], *factors, [0.1], [False], [], seed)
            results.append(weight)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[4])
    assert torch.equal(results[1], results[3])
    assert torch.equal(results[1], results[5])



REFUSED_INJECTIONS = {
    "a list too short": {"scales": []},
    "backups for some": {"backups": [torch.ones(4, 6)] * 2},
    "weight transposed": {"transposed": [True]},
    "ranks differ": {"lora_a": [torch.ones(3, 6)]},
    "not a matrix": {"lora_b": [torch.ones(4)]},
    "integers": {"lora_a": [torch.ones(2, 6, dtype=torch.int64)]},
    "backup of another dtype": {"backups": [torch.ones(4, 6, dtype=torch.float64)]},
    "negative seed": {"seed": -1},
    "factor is the weight": {"shared": "factor"},
    "backup is the weight": {"shared": "backup"},
}


@pytest.mark.parametrize("change", REFUSED_INJECTIONS.values(), ids=REFUSED_INJECTIONS.keys())
def test_inject_refuses(backend, change):
    weight = torch.ones(4, 6)
    valid = {
        "weights": [weight], "lora_a": [torch.ones(2, 6)], "lora_b": [torch.ones(4, 2)],
        "scales": [1.0], "transposed": [False], "backups": [torch.zeros(4, 6)], "seed": None,
    }  # fmt: skip
    change = dict(change)
    if (what := change.pop("shared", None)) is not None:
        change = {"lora_a": [weight[:2]]} if what == "factor" else {"backups": [weight]}
    with pytest.raises(ShapeError, match="inject_"):
        ops.inject_(**valid | change)
    assert bool((weight == 1).all())
    assert issubclass(ShapeError, PktFastError)


# --------------------------------------------------------------------------- registration


@pytest.mark.parametrize("op", ["inject_", "capture_rows"])
def test_triton_serves_where_cuda_kernels_cannot_run(op, monkeypatch):
    """The driver is older than the runtime nvcc linked, or the GPU than what it compiled for."""
    if "cuda" not in _registry._ops[op].implementations:
        pytest.skip("built without nvcc")
    if op == "inject_":
        case = injection(torch.bfloat16, torch.float32)
        args = (case.weights, *case.factors(), [], None)
    else:
        case = capture(torch.float32, 16, 1, normalize=True)
        args = (torch.zeros(9, 16), 0, *case.arguments())
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    module = importlib.import_module(f"pkt_fast.ops.{op.rstrip('_')}")
    for problem, chosen in ((None, "cuda"), ("no kernel image", "triton")):
        monkeypatch.setattr(module, "cuda_problem", lambda device, problem=problem: problem)
        assert _registry.select(op, torch.device("cuda"), args) == chosen


def test_devices_must_match():
    """Asked of what the dispatcher calls, with "meta" as the second device there always is."""
    here, there = torch.ones(1, 3, 4), torch.ones(1, 3, 4, device="meta")
    index = torch.tensor([0])
    modules = {name: importlib.import_module(f"pkt_fast.ops.{name}") for name in
               ("capture_rows", "grad_x_act", "row_cosine", "inject")}  # fmt: skip
    with pytest.raises(ShapeError, match="meta"):
        modules["capture_rows"]._run(
            torch.zeros(1, 4), 0, index, here, there, None, None, 0.0, 1.0, False
        )
    with pytest.raises(ShapeError, match="meta"):
        modules["grad_x_act"]._run(here, there)
    with pytest.raises(ShapeError, match="meta"):
        modules["row_cosine"]._run(here[0], there[0])
    with pytest.raises(ShapeError, match="meta"):
        modules["inject"]._run([here[0]], [there[0, :1]], [torch.ones(3, 1)], [1.0], [False], [], 0)


def test_index_is_moved_to_the_activations():
    """A kernel reads it by its address."""
    absent = (None, None, None, 0.0, 1.0, False)
    run = importlib.import_module("pkt_fast.ops.capture_rows")._run
    with pytest.raises(NotImplementedError, match="meta"):  # there is nothing to move
        run(torch.zeros(1, 4), 0, torch.tensor([0], device="meta"), torch.ones(3, 4), *absent)


def operators():
    case = capture(torch.float32, 16, 4, True)
    generator = torch.Generator().manual_seed(12)
    x = normal(generator, 3, 8).requires_grad_()
    y = normal(generator, 3, 8).requires_grad_()
    small = [normal(generator, 4, 6)], [normal(generator, 2, 6)], [normal(generator, 4, 2)]
    namespace = torch.ops.pkt_fast
    return {
        "capture_rows": (namespace.capture_rows, (torch.zeros(9, 16), 1, *case.arguments())),
        "grad_x_act": (namespace.grad_x_act, (x.detach()[None], y.detach()[None])),
        "row_cosine": (namespace.row_cosine, (x, y)),
        "row_cosine, one side": (namespace.row_cosine, (x, y.detach())),
        "row_cosine_gradient": (
            namespace.row_cosine_gradient, (x.detach(), y.detach(), torch.ones(3), True, False),
        ),
        "inject_": (namespace.inject_, (*small, [0.5], [False], [torch.zeros(4, 6)], None)),
    }


@pytest.mark.parametrize("name", ["capture_rows", "grad_x_act", "row_cosine",
                                  "row_cosine, one side", "row_cosine_gradient",
                                  "inject_"])  # fmt: skip
def test_opcheck(backend, name):
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


def test_under_compile_fullgraph():
    """One graph, the same results; what the ops mutate is seen outside of it."""

    def step(out, index, value, x, y, weight, a, b):
        ops.capture_rows(out, 1, index, value, normalize=True)
        signed, absolute = ops.grad_x_act(value[None], value[None] * 2)
        loss = (1 - ops.row_cosine(x, y)).mean()
        counts = ops.inject_([weight], [a], [b], [0.5], [False])
        return out * 2, signed + absolute, loss, counts, weight + 1

    def inputs():
        generator = torch.Generator().manual_seed(13)
        return [
            torch.zeros(5, 8), torch.tensor([2, 0, 1]), normal(generator, 4, 8),
            normal(generator, 3, 8).requires_grad_(), normal(generator, 3, 8),
            normal(generator, 4, 6), normal(generator, 2, 6), normal(generator, 4, 2),
        ]  # fmt: skip

    eager_in, compiled_in = inputs(), inputs()
    eager = step(*eager_in)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled_in)
    for got, expected in zip(compiled, eager, strict=True):
        assert torch.equal(got, expected)
    eager[2].backward()
    compiled[2].backward()
    assert torch.equal(compiled_in[3].grad, eager_in[3].grad)
    assert torch.equal(compiled_in[0], eager_in[0])
    assert torch.equal(compiled_in[5], eager_in[5])


def test_mutation_is_known_to_autograd():
    """Writing into a tensor that a graph has saved is noticed at backward."""
    x = torch.ones(2, 3, requires_grad=True)
    saved = torch.ones(2, 3)
    product = (x * saved).sum()
    ops.capture_rows(saved, 0, torch.tensor([1]), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
