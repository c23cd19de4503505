"""label_cosine, decompose, relation and linear_kl against the float64 reference, on the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from pkt_fast import reference
from pkt_fast.errors import ConfigError, DataError, NumericsError, ShapeError
from pkt_fast.heads import head_statistics
from pkt_fast.ops import _blocks as blocks
from pkt_fast.ops import (
    backend,
    decompose,
    label_cosine,
    label_cosine_chunked,
    linear_kl,
    relation,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["forward", "reverse", "jsd"]


@pytest.fixture(autouse=True)
def _seeded(nan_in_fresh_memory):
    torch.manual_seed(0)


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    with backend(request.param):
        yield request.param


def bound(dtype: torch.dtype, length: int, factor: float = 4.0) -> float:
    """factor·(ε_storage/2 + ε_work·√length): one rounding, and a sum of ``length`` terms."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return factor * (torch.finfo(dtype).eps / 2 + torch.finfo(work).eps * math.sqrt(length))


def assert_close(actual, expected, limit, scale=1.0):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if actual.numel():
        error = ((actual.double() - expected).abs() / scale).max().item()
        assert error <= limit, f"error {error:.3g} over the bound {limit:.3g}"


def gradient_of(values, inputs, weights):
    grads = torch.autograd.grad(values, inputs, weights.to(values.dtype))
    return grads if isinstance(inputs, (list, tuple)) else grads[0]


# --------------------------------------------------------------------------- label cosine


def random_head(labels, width, dtype, bias=True):
    weight = torch.randn(labels, width).to(dtype)
    return weight, torch.randn(labels).to(dtype) if bias else None


def linear_cosine(hidden, labels, weight, bias, smoothing=0.0, statistics=None):
    s = statistics or head_statistics(weight, bias)
    return label_cosine(
        hidden, labels, weight, bias, s.factor, s.shift, s.rest, s.label_sum, s.bias_sum, smoothing
    )


def check_label_cosine(call, hidden, labels, weight, bias, smoothing=0.0, softcap=0.0):
    """Value against ε·√V, gradient against the size of ∂cos/∂h, which is ‖W‖/‖z‖."""
    exact = hidden.detach().double().requires_grad_()
    head, offset = weight.double(), None if bias is None else bias.double()
    expected = reference.label_cosine_rows(
        exact, head, labels, bias=offset, label_smoothing=smoothing, softcap=softcap
    )
    cosines = call()
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    assert cosines.dtype == work
    length = max(weight.shape)
    assert_close(cosines.detach(), expected.detach(), bound(work, length))
    weights = torch.rand(len(hidden), dtype=torch.float64) + 0.5
    got = gradient_of(cosines, hidden, weights)
    wanted = gradient_of(expected, exact, weights)
    assert got.dtype == hidden.dtype
    norm = reference.head_logits(exact, head, offset, softcap).detach().norm(dim=1, keepdim=True)
    scale = torch.linalg.matrix_norm(head, 2) / norm.clamp_min(1e-300) + 1e-300
    assert_close(got, wanted, bound(hidden.dtype, length), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "labels", "width"), [(1, 5, 3), (37, 301, 70), (19, 500, 300)])
def test_label_cosine(dtype, bias, smoothing, rows, labels, width, implementation):
    weight, offset = random_head(labels, width, dtype, bias)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    target = torch.randint(labels, (rows,))
    target[rows // 2 :: 3] = -100
    check_label_cosine(
        lambda: linear_cosine(hidden, target, weight, offset, smoothing),
        hidden, target, weight, offset, smoothing,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_label_cosine_chunked(dtype, bias, smoothing, softcap, implementation):
    weight, offset = random_head(301, 33, dtype, bias)
    hidden = torch.randn(37, 33).to(dtype).requires_grad_()
    target = torch.randint(301, (37,))
    target[::4] = -100
    check_label_cosine(
        lambda: label_cosine_chunked(hidden, target, weight, offset, smoothing, softcap),
        hidden, target, weight, offset, smoothing, softcap,
    )


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_label_cosine_chunked_trains_the_head(softcap, monkeypatch):
    monkeypatch.setattr(blocks, "MEMORY_BUDGET", 1)  # several blocks
    weight, bias = (x.double().requires_grad_() for x in random_head(57, 9, torch.float32))
    hidden = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(57, (40,))
    labels[3] = -100
    weights = torch.randn(40, dtype=torch.float64)
    inputs = [hidden, weight, bias]
    got = gradient_of(
        label_cosine_chunked(hidden, labels, weight, bias, 0.1, softcap), inputs, weights
    )
    rows = reference.label_cosine_rows(
        hidden, weight, labels, bias=bias, label_smoothing=0.1, softcap=softcap
    )
    for actual, expected in zip(got, gradient_of(rows, inputs, weights), strict=True):
        assert_close(actual, expected, bound(torch.float64, 57))


@pytest.mark.parametrize("softcap", [None, 0.0, 3.0])
def test_label_cosine_of_extreme_rows(softcap):
    """Rows of norm 0 and 1e±30 have the cosine and the direction of gradient of their unit row."""
    weight, _ = random_head(301, 70, torch.float32, bias=False)
    unit = torch.randn(4, 70)
    unit /= unit.norm(dim=1, keepdim=True)
    norms = torch.tensor([0.0, 1.0, 1e-30, 1e30])
    hidden = (unit * norms[:, None]).requires_grad_()
    labels = torch.randint(301, (4,))
    if softcap is None:
        cosines = linear_cosine(hidden, labels, weight, None)
    else:
        cosines = label_cosine_chunked(hidden, labels, weight, None, 0.0, softcap)
    exact = hidden.detach().double().requires_grad_()
    expected = reference.label_cosine_rows(exact, weight.double(), labels, softcap=softcap or 0.0)
    assert_close(cosines.detach(), expected.detach(), bound(torch.float32, 301))
    assert cosines[0] == 0
    got = gradient_of(cosines, hidden, torch.ones(4))
    wanted = gradient_of(expected, exact, torch.ones(4))
    scale = 10 / norms[:, None].double().clamp_min(1e-300)
    assert_close(got, wanted, bound(torch.float32, 301), scale=scale)
    assert (got[0] == 0).all()


def test_label_cosine_of_all_rows_ignored_is_zero(implementation):
    weight, bias = random_head(20, 8, torch.float32)
    hidden = torch.randn(5, 8, requires_grad=True)
    labels = torch.full((5,), -100)
    for cosines in (
        linear_cosine(hidden, labels, weight, bias, 0.1),
        label_cosine_chunked(hidden, labels, weight, bias, 0.1, 2.0),
    ):
        assert cosines.tolist() == [0.0] * 5
        assert (gradient_of(cosines, hidden, torch.ones(5)) == 0).all()


def test_label_cosine_of_no_rows(implementation):
    weight, bias = random_head(20, 8, torch.float32)
    hidden = torch.randn(0, 8, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    for cosines in (
        linear_cosine(hidden, labels, weight, bias),
        label_cosine_chunked(hidden, labels, weight, bias),
    ):
        assert cosines.shape == (0,)
        cosines.sum().backward()
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["duplicates", "padding", "narrow vocabulary", "zero channel"])
def test_label_cosine_of_a_singular_head(case, bias):
    weight, offset = random_head(12 if case == "narrow vocabulary" else 90, 40, torch.float64, bias)
    if case == "duplicates":
        weight = weight[:30].repeat(3, 1)
    if case == "padding":
        weight[25:] = 0
    if case == "zero channel":
        weight[:, 3] = 0
    hidden = torch.randn(11, 40, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(12, (11,))
    factor = head_statistics(weight, offset).factor
    assert_close(factor.T @ factor, weight.T @ weight, 1e-12, scale=weight.square().sum())
    assert torch.equal(factor, factor.triu())
    exact = hidden.detach().requires_grad_()
    expected = reference.label_cosine_rows(exact, weight, labels, bias=offset)
    cosines = linear_cosine(hidden, labels, weight, offset)
    # A cut-off direction loses at most √(cut-off) of the largest singular value.
    assert_close(cosines.detach(), expected.detach(), 1e-10)
    ones = torch.ones(11)
    assert_close(
        gradient_of(cosines, hidden, ones), gradient_of(expected, exact, ones), 1e-9
    )


@pytest.mark.parametrize("wrong", [30, -1, -101])
def test_label_cosine_names_a_label_outside_the_head(wrong, implementation):
    weight, _ = random_head(30, 8, torch.float32, bias=False)
    hidden, labels = torch.randn(3, 8), torch.tensor([1, wrong, 2])
    for call in (linear_cosine, label_cosine_chunked):
        with pytest.raises(DataError, match=f"label {wrong} "):
            call(hidden, labels, weight, None)


def test_label_cosine_refuses_what_does_not_fit():
    weight, bias = random_head(30, 8, torch.float32)
    hidden, labels = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"\(N, D\) and \(V, D\)"):
        label_cosine_chunked(torch.randn(3, 9), labels, weight)
    with pytest.raises(ShapeError, match="no labels"):
        label_cosine_chunked(hidden, labels, weight[:0])
    with pytest.raises(ShapeError, match="3 integers"):
        label_cosine_chunked(hidden, labels[:2], weight)
    with pytest.raises(ShapeError, match="bias"):
        label_cosine_chunked(hidden, labels, weight, bias[:4])
    with pytest.raises(ConfigError, match="smoothing"):
        label_cosine_chunked(hidden, labels, weight, bias, 1.0)
    with pytest.raises(ConfigError, match="softcap"):
        label_cosine_chunked(hidden, labels, weight, bias, 0.0, -1.0)
    statistics = head_statistics(weight[:, :7])
    with pytest.raises(ShapeError, match="head_statistics"):
        linear_cosine(hidden, labels, weight, bias, statistics=statistics)


def test_head_statistics_refuse_a_head_that_is_not_finite():
    weight, _ = random_head(30, 8, torch.float32)
    weight[4, 2] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        head_statistics(weight)
    with pytest.raises(NumericsError, match="inf"):
        head_statistics(weight.nan_to_num(), torch.full((30,), float("inf")))


def test_label_cosine_passes_gradcheck_opcheck_and_compile():
    weight, bias = (x.double() for x in random_head(23, 7, torch.float32))
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 22, 0, 7])
    s = head_statistics(weight, bias)
    rest = (s.factor, s.shift, s.rest, s.label_sum, s.bias_sum, 0.1)

    def call(hidden):
        return label_cosine(hidden, labels, weight, bias, *rest)

    assert torch.autograd.gradcheck(call, hidden)
    opcheck(torch.ops.pkt_fast.label_cosine, (hidden, labels, weight, bias, *rest, True))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), call(hidden))
    grads = [gradient_of(f(hidden), hidden, torch.ones(5)) for f in (compiled, call)]
    assert torch.equal(*grads)


def test_label_cosine_chunked_passes_gradcheck_opcheck_and_compile():
    shapes = ((5, 7), (23, 7), (23,))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    labels = torch.tensor([3, -100, 22, 0, 7])

    def call(hidden, weight, bias):
        return label_cosine_chunked(hidden, labels, weight, bias, 0.1, 2.0)

    assert torch.autograd.gradcheck(call, inputs)
    hidden, weight, bias = inputs
    opcheck(
        torch.ops.pkt_fast.label_cosine_chunked, (hidden, labels, weight, bias, 0.1, 2.0, True)
    )
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), call(*inputs))


# --------------------------------------------------------------------------- decompose


def bases(labels, source, target, dtype):
    return tuple(reference.unit_rows(torch.randn(labels, d)).to(dtype) for d in (source, target))


DECOMPOSITIONS = [
    ("softmax", {"temperature": 0.05}),
    ("softmax", {"temperature": 1e-3}),
    ("top_k", {"k": 1}),
    ("top_k", {"k": 7}),
    ("top_k", {"k": 301}),
    ("threshold", {"threshold": 0.2}),
    ("threshold", {"threshold": 0.0}),
    ("threshold", {"threshold": 2.0}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "options"), DECOMPOSITIONS)
def test_decompose(dtype, kind, options, implementation, monkeypatch):
    """Rows where rounding decides which coefficients are kept are left out."""
    monkeypatch.setattr(blocks, "MEMORY_BUDGET", 1)
    source, target = bases(301, 33, 20, dtype)
    hidden = torch.randn(41, 33).to(dtype)
    exact = [x.double() for x in (hidden, source, target)]
    expected = reference.decompose_nonlinear(*exact, kind=kind, **options)
    out = decompose(hidden, source, target, kind, **options)
    assert out.dtype == dtype
    magnitude = reference.coefficients(exact[0], exact[1]).abs().sort(dim=1, descending=True).values
    clear = torch.ones(41, dtype=torch.bool)
    if kind == "top_k" and options["k"] < 301:
        k = options["k"]
        clear = magnitude[:, k - 1] - magnitude[:, k] > 1e-6
    if kind == "threshold":
        clear = (magnitude - options["threshold"]).abs().amin(1) > 1e-6
    if kind != "softmax" and options != {"threshold": 0.0}:
        assert clear.sum() > 30
    # Σ|f(a)| bounds the output; at temperature τ an error of a is magnified by 1/τ.
    used = 1.0 if kind == "softmax" else magnitude.sum(1).max().item()
    gain = 1 / options.get("temperature", 1.0)
    limit = bound(dtype, 301) + gain * bound(
        torch.float64 if dtype == torch.float64 else torch.float32, 33
    )
    keep = clear if options != {"threshold": 0.0} else slice(None)
    assert_close(out[keep], expected[keep], limit, scale=used)


def test_decompose_keeps_ties(implementation):
    source, target = bases(50, 6, 4, torch.float64)
    source[9] = source[3]
    source[17] = -source[3]
    hidden = 2.5 * source[3:4]
    out = decompose(hidden, source, target, "top_k", k=2)
    expected = (target[3] + target[9] - target[17]) * source[3].norm()
    assert_close(out[0], expected, 1e-14)


@pytest.mark.parametrize(("kind", "options"), DECOMPOSITIONS[:1] + DECOMPOSITIONS[3:4])
def test_decompose_of_extreme_rows(kind, options):
    source, target = bases(50, 33, 20, torch.float32)
    unit = torch.randn(1, 33).repeat(4, 1)
    hidden = unit * torch.tensor([1.0, 1e-30, 1e30, 0.0])[:, None]
    out = decompose(hidden, source, target, kind, **options)
    assert_close(out[1], out[0].double(), bound(torch.float32, 50))
    assert_close(out[2], out[0].double(), bound(torch.float32, 50))
    flat = target.double().mean(0) if kind == "softmax" else torch.zeros(20, dtype=torch.float64)
    assert_close(out[3], flat, bound(torch.float32, 50))


def test_decompose_of_no_rows(implementation):
    source, target = bases(50, 6, 4, torch.float32)
    assert decompose(torch.zeros(0, 6), source, target, "softmax").shape == (0, 4)


def test_decompose_needs_no_gradient():
    source, target = bases(50, 6, 4, torch.float32)
    hidden = torch.randn(3, 6, requires_grad=True)
    assert not decompose(hidden, source, target, "softmax").requires_grad


def test_decompose_refuses_what_does_not_fit():
    source, target = bases(50, 6, 4, torch.float32)
    hidden = torch.randn(3, 6)
    with pytest.raises(ShapeError, match="D_src"):
        decompose(torch.randn(3, 5), source, target, "softmax")
    with pytest.raises(ShapeError, match="D_src"):
        decompose(hidden, source, target[:4], "softmax")
    for kind, options, word in [
        ("sofmax", {}, "sofmax"),
        ("softmax", {"temperature": 0.0}, "temperature"),
        ("top_k", {"k": 51}, "k = 51"),
        ("top_k", {"k": 0}, "k = 0"),
        ("threshold", {"threshold": -0.1}, "threshold"),
    ]:
        with pytest.raises(ConfigError, match=word):
            decompose(hidden, source, target, kind, **options)


def test_decompose_passes_opcheck_and_compile():
    source, target = bases(50, 6, 4, torch.float32)
    hidden = torch.randn(3, 6)
    opcheck(torch.ops.pkt_fast.decompose, (hidden, source, target, "top_k", 1.0, 3, 0.0))

    def call(x):
        return decompose(x, source, target, "softmax", temperature=0.1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), call(hidden))


# --------------------------------------------------------------------------- relation


def reference_relation(x, y, starts):
    terms = [
        reference.relation_terms(x[a:b], y[a:b]) if b - a > 1 else (x.new_zeros(()),) * 3
        for a, b in itertools.pairwise(starts)
    ]
    return [torch.stack(column) for column in zip(*terms, strict=True)]


STARTS = [0, 5, 6, 6, 40, 42, 120]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(9, 4), (20, 50), (200, 130), (1, 1)])
def test_relation(dtype, widths, implementation):
    x, y = ((torch.randn(120, d) + 0.5).to(dtype) for d in widths)
    x.requires_grad_()
    exact_x, exact_y = x.detach().double().requires_grad_(), y.double()
    expected = reference_relation(exact_x, exact_y, STARTS)
    terms = relation(x, y, torch.tensor(STARTS))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    length = 120 * max(widths)
    sizes = [expected[1] * expected[2], expected[1], expected[2]]
    for actual, wanted, size in zip(terms, expected, sizes, strict=True):
        assert actual.dtype == work
        assert_close(
            actual.detach(), wanted.detach(), bound(work, length), scale=size.detach() + 1e-300
        )
    inner, norm = torch.rand(2, len(STARTS) - 1, dtype=torch.float64) + 0.5
    loss = (terms[0] * inner.to(work) + terms[1] * norm.to(work)).sum()
    got = gradient_of(loss, x, torch.ones(()))
    live = [s for s in range(len(STARTS) - 1) if STARTS[s + 1] - STARTS[s] > 1]
    total = sum(expected[0][s] * inner[s] + expected[1][s] * norm[s] for s in live)
    wanted = gradient_of(total, exact_x, torch.ones(()))
    assert got.dtype == dtype
    for s in live:
        part = slice(STARTS[s], STARTS[s + 1])
        centred = exact_x[part].detach() - exact_x[part].detach().mean(0)
        size = 4 * (expected[2][s] * inner[s] + norm[s]).detach() * centred.norm()
        assert_close(got[part], wanted[part], bound(dtype, length), scale=size)
    assert (got[5:6] == 0).all()


def test_relation_of_constant_and_huge_sequences():
    x = torch.ones(4, 6)
    x[2:] = torch.randn(2, 6) * 1e30
    x.requires_grad_()
    y = torch.randn(4, 6) * 1e-20
    terms = relation(x, y, torch.tensor([0, 2, 4]))
    assert all(t.isfinite().all() for t in terms)
    assert terms[0][0] == terms[1][0] == 0
    grad = gradient_of(terms[0].sum() + terms[1].clamp_max(1.0).sum(), x, torch.ones(()))
    assert grad.isfinite().all()
    assert (grad[:2] == 0).all()


def test_relation_of_equal_tokens_is_nothing(implementation):
    """Whatever their value and number: what is left beside a mean is rounding, no relation."""
    x = torch.full((7, 40), 0.1, requires_grad=True)
    inner, norm, _ = relation(x, torch.randn(7, 5), torch.tensor([0, 7]))
    assert abs(inner.item()) + norm.item() < 1e-10
    assert gradient_of(inner.sum() + norm.sum(), x, torch.ones(())).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_relation_of_the_largest_numbers_is_finite(dtype):
    pytest.importorskip("pkt_fast._native")
    largest = torch.finfo(dtype).max
    x = torch.randn(9, 40, dtype=dtype).sign() * largest
    y = torch.randn(9, 3, dtype=dtype) * torch.finfo(dtype).tiny
    for a, b in ((x, y), (y, x), (x, x), (y, y)):
        a = a.clone().requires_grad_()
        terms = relation(a, b, torch.tensor([0, 2, 9]))
        assert all(t.isfinite().all() for t in terms)
        for term in terms[:2]:
            (slope,) = torch.autograd.grad(term.sum(), a, retain_graph=True)
            assert slope.isfinite().all()


@pytest.mark.parametrize("starts", [[0, 300], [0, 40, 90, 91, 300], [0, *range(1, 301, 13), 300]])
@pytest.mark.parametrize("widths", [(260, 190), (30, 20)])
def test_relation_has_the_same_bits_on_any_number_of_threads(starts, widths):
    x, y = (torch.randn(300, d) for d in widths)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.ops.pkt_fast.relation(x, y, torch.tensor(starts), True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_relation_of_strided_rows_and_mixed_dtypes(implementation):
    x, y = torch.randn(24, 60, dtype=torch.float64)[::2, ::3], torch.randn(9, 12).bfloat16().T
    starts = torch.tensor([0, -1, 5, -1, 12])[::2]
    for a, b in ((x, y), (x.float(), y.double()), (x.half(), y)):
        expected = reference_relation(a.double(), b.double(), starts.tolist())
        work = torch.float64 if a.dtype == torch.float64 else torch.float32
        for actual, wanted in zip(relation(a, b, starts), expected, strict=True):
            assert actual.dtype == work
            assert_close(actual, wanted, bound(work, 240), scale=wanted.abs() + 1)


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 0, 0]])
def test_relation_of_no_tokens(starts, implementation):
    terms = relation(torch.zeros(0, 3), torch.zeros(0, 2), torch.tensor(starts))
    assert [t.tolist() for t in terms] == [[0.0] * (len(starts) - 1)] * 3


def test_relation_gives_cka():
    x, y = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    inner, norm_x, norm_y = relation(x, y, torch.tensor([0, 50]))
    assert_close(inner / (norm_x * norm_y), reference.cka(x, y)[None], 1e-14)


def test_relation_refuses_what_does_not_fit(implementation):
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ShapeError, match="D_x"):
        relation(x, y[:4], torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match="int64"):
        relation(x, y, torch.tensor([0.0, 5.0]))
    for starts in ([0, 4], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ShapeError, match="rise from 0"):
            relation(x, y, torch.tensor(starts))


def test_relation_passes_gradcheck_opcheck_and_compile():
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    y, starts = torch.randn(12, 4, dtype=torch.float64), torch.tensor([0, 4, 5, 12])

    def call(x):
        inner, norm, _ = relation(x, y, starts)
        return inner, norm[norm > 0]

    assert torch.autograd.gradcheck(call, x)
    opcheck(torch.ops.pkt_fast.relation, (x, y, starts, True))
    compiled = torch.compile(
        lambda x: relation(x, y, starts)[0], fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), relation(x, y, starts)[0])


# --------------------------------------------------------------------------- linear_kl


def kl_inputs(rows, labels, widths, dtype, bias=True, size=1.0):
    """Hidden states and heads whose logits have standard deviation ``size``."""
    hidden = [torch.randn(rows, d) for d in widths]
    heads = [torch.randn(labels, d) * size / d**0.5 for d in widths]
    biases = [torch.randn(labels).to(dtype) if bias else None for _ in widths]
    (h, h_s), (w, w_s) = ([x.to(dtype) for x in pair] for pair in (hidden, heads))
    return h.requires_grad_(), w, h_s, w_s, *biases


def check_linear_kl(inputs, softcaps=(0.0, 0.0), temperature=1.0, kind="forward"):
    """Errors are relative to ε times the largest logit, to which the normaliser is rounded."""
    hidden, dtype = inputs[0], inputs[0].dtype
    exact = [None if x is None else x.detach().double() for x in inputs]
    exact[0].requires_grad_()
    expected = reference.linear_kl(
        *exact[:4], target_bias=exact[4], source_bias=exact[5], target_softcap=softcaps[0],
        source_softcap=softcaps[1], temperature=temperature, kind=kind,
    )
    values = linear_kl(*inputs, *softcaps, temperature, kind)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert values.dtype == work
    largest = max(
        reference.head_logits(exact[i].detach(), exact[i + 1], exact[4 + i // 2], softcaps[i // 2])
        .abs().max().item() / temperature
        for i in (0, 2)
    )
    size = 1 + largest
    width = max(hidden.shape[1], inputs[2].shape[1])
    assert_close(values.detach(), expected.detach(), size * bound(work, width))
    weights = torch.rand(len(hidden), dtype=torch.float64) + 0.5
    got = gradient_of(values, hidden, weights)
    wanted = gradient_of(expected, exact[0], weights)
    assert got.dtype == dtype
    # |∂/∂z|₁ is at most 2 (forward) or 2·max|g| <= 4·size; each label adds a row of the head.
    reach = exact[1].norm(dim=1).max().item() / temperature * (2 if kind == "forward" else 4 * size)
    limit = bound(dtype, 1) + size * bound(work, width)
    assert_close(got, wanted, limit, scale=reach)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_kl(dtype, kind, bias, implementation, monkeypatch):
    monkeypatch.setattr(blocks, "MEMORY_BUDGET", 1)
    check_linear_kl(kl_inputs(41, 301, (20, 33), dtype, bias), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcaps", [(3.0, 0.0), (0.0, 3.0), (5.0, 2.0)])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_linear_kl_softcap_and_temperature(kind, softcaps, temperature, implementation):
    inputs = kl_inputs(9, 301, (20, 33), torch.float32, size=4.0)
    check_linear_kl(inputs, softcaps, temperature, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_extreme_logits(kind, implementation):
    check_linear_kl(kl_inputs(9, 301, (20, 33), torch.float32, size=3e3), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_equal_distributions_is_zero(kind, implementation):
    hidden, head, *_ = kl_inputs(9, 301, (20, 33), torch.float64)
    values = linear_kl(hidden, head, hidden.detach(), head, kind=kind)
    assert_close(values.detach(), torch.zeros(9, dtype=torch.float64), 1e-14)
    grad = gradient_of(values, hidden, torch.ones(9))
    assert_close(grad, torch.zeros_like(grad), 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_zero_rows_and_of_none(kind, implementation):
    inputs = kl_inputs(2, 50, (20, 33), torch.float32, bias=False)
    zero = inputs[0].detach() * torch.tensor([[0.0], [1.0]])
    check_linear_kl((zero.requires_grad_(), *inputs[1:]), kind=kind)
    none = inputs[0].detach()[:0].requires_grad_()
    values = linear_kl(none, inputs[1], inputs[2][:0], inputs[3], kind=kind)
    assert values.shape == (0,)
    values.sum().backward()


def test_linear_kl_refuses_what_does_not_fit():
    h, w, h_s, w_s, b, _ = kl_inputs(4, 30, (5, 6), torch.float32)
    with pytest.raises(ShapeError, match=r"target hidden"):
        linear_kl(h_s, w, h_s, w_s)
    with pytest.raises(ShapeError, match="both pairs"):
        linear_kl(h, w, h_s[:3], w_s)
    with pytest.raises(ShapeError, match="both pairs"):
        linear_kl(h, w, h_s, w_s[:29])
    with pytest.raises(ShapeError, match="target bias"):
        linear_kl(h, w, h_s, w_s, b[:3])
    with pytest.raises(ConfigError, match="backward"):
        linear_kl(h, w, h_s, w_s, kind="backward")
    with pytest.raises(ConfigError, match="temperature"):
        linear_kl(h, w, h_s, w_s, temperature=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_passes_gradcheck_opcheck_and_compile(kind):
    h, w, h_s, w_s, b, b_s = kl_inputs(4, 30, (5, 6), torch.float64)

    def call(h):
        return linear_kl(h, w, h_s, w_s, b, b_s, 3.0, 2.0, 1.5, kind)

    assert torch.autograd.gradcheck(call, h)
    opcheck(
        torch.ops.pkt_fast.linear_kl, (h, w, h_s, w_s, b, b_s, 3.0, 2.0, 1.5, kind, True)
    )
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), call(h))


# --------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("rows", "row_bytes"), [(0, 8), (1, 1 << 40), (1000, 1 << 20), (7, 1)])
def test_row_blocks_cover_every_row_within_the_budget(rows, row_bytes):
    cut = list(blocks.row_blocks(rows, row_bytes, budget=100 << 20))
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in cut]
    assert all(n * row_bytes <= 100 << 20 or n <= blocks.SMALLEST_BLOCK for n in sizes)


@pytest.mark.parametrize("op", ["linear_kl", "chunked", "decompose"])
def test_memory_stays_far_below_the_logits(op):
    """The largest tensor any of them makes is one block's, however many rows there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    rows, labels = 4096, 4000
    head = torch.randn(labels, 4)
    hidden = torch.randn(rows, 4)
    with Largest() as largest:
        if op == "linear_kl":
            linear_kl(hidden, head, hidden, head)
        elif op == "chunked":
            label_cosine_chunked(hidden, torch.zeros(rows, dtype=torch.int64), head, None, 0.0, 2.0)
        else:
            decompose(hidden, head, head, "softmax")
    assert largest.elements <= blocks.MEMORY_BUDGET // 8 < rows * labels


def test_devices_must_match():
    """An address of another device would be read by the kernel."""
    rows, head, labels = torch.randn(3, 8), torch.randn(5, 8), torch.zeros(3, dtype=torch.int64)
    there, s = head.to("meta"), head_statistics(head)
    statistics = (s.factor, s.shift, s.rest, s.label_sum, s.bias_sum)
    starts = torch.tensor([0, 3])
    for call in (
        lambda: label_cosine(rows, labels.to("meta"), head, None, *statistics),
        lambda: label_cosine(rows, labels, head, None, s.factor.to("meta"), *statistics[1:]),
        lambda: label_cosine_chunked(rows, labels, there),
        lambda: linear_kl(rows, head, rows, there),
        lambda: decompose(rows, head, there, "softmax"),
        lambda: relation(rows, rows, starts.to("meta")),
    ):
        with pytest.raises(ShapeError, match="is on meta, the rows are on cpu"):
            call()
