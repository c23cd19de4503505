"""The kernels of label_cosine, decompose, relation and linear_kl against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import DTYPES, assert_close, bound, extreme_rows, rows
from op_cases import far_apart

from pkt_fast import reference
from pkt_fast.errors import DataError
from pkt_fast.heads import head_statistics

heads = pytest.importorskip("pkt_fast.kernels._heads")
label = pytest.importorskip("pkt_fast.kernels.label_cosine")
decomposition = pytest.importorskip("pkt_fast.kernels.decompose")
relations = pytest.importorskip("pkt_fast.kernels.relation")
divergence = pytest.importorskip("pkt_fast.kernels.linear_kl")

KINDS = ["forward", "reverse", "jsd"]
GAPPED = {
    "strided": lambda size, device: torch.randn(size, 3, device=device)[:, 1],
    "expanded": lambda size, device: torch.randn(1, device=device).expand(size),
}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Small workspaces: every stream over the labels is cut into runs of 160."""
    monkeypatch.setattr(heads, "SMALLEST_CHUNK", 160)
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1)


def test_runs_of_labels_change_with_the_size_class_of_the_rows_alone(monkeypatch):
    """Their lengths are keys of the tuner, which would time its list for every new length."""
    monkeypatch.setattr(heads, "SMALLEST_CHUNK", 1024)
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 64 << 20)
    counts = (513, 700, 1000, 1024)
    first, *others = [list(heads.label_chunks(count, 151_936, 4)) for count in counts]
    assert all(runs == first for runs in others)
    assert max(run.stop - run.start for run in first) * 1024 * 4 <= heads.WORKSPACE_BYTES
    assert first[-1].stop == 151_936


def gradient_of(values, inputs):
    (grad,) = torch.autograd.grad(values.sum(), inputs)
    return grad


# --------------------------------------------------------------------------- label cosine


def check_label_cosine(hidden, labels, weight, bias, smoothing, softcap):
    """``softcap`` None: the linear kernels; otherwise those that stream the vocabulary."""
    if softcap is None:
        s = head_statistics(weight, bias)
        cosines, gradient = label.label_cosine(
            hidden, labels, weight, bias, s.factor, s.shift, s.rest, s.label_sum, s.bias_sum,
            smoothing, True,
        )
    else:
        cosines, gradient = label.label_cosine_chunked(
            hidden, labels, weight, bias, smoothing, softcap, True
        )
    exact = hidden.double().requires_grad_()
    head, offset = weight.double(), None if bias is None else bias.double()
    expected = reference.label_cosine_rows(
        exact, head, labels, bias=offset, label_smoothing=smoothing, softcap=softcap or 0.0
    )
    assert cosines.dtype == torch.float32
    assert gradient.dtype == hidden.dtype
    length = max(weight.shape)
    work = torch.float32
    if hidden.is_cuda and softcap is None and hidden.dtype != torch.float32:
        work = hidden.dtype  # TF32 rounds R to eleven bits
    assert_close(cosines, expected.detach(), bound(work, length))
    logits = reference.head_logits(exact, head, offset, softcap or 0.0).detach()
    norm = logits.norm(dim=1, keepdim=True).clamp_min(1e-300)
    scale = torch.linalg.matrix_norm(head, 2) / norm + 1e-300
    limit = torch.finfo(hidden.dtype).max
    # float16 gradients below its smallest normal are rounded to its fixed spacing.
    spacing = torch.finfo(hidden.dtype).smallest_normal
    wanted = gradient_of(expected, exact).clamp(-limit, limit)
    live = (logits != 0).any(1, keepdim=True)
    assert_close(gradient, wanted, bound(hidden.dtype, length), scale=scale * live + spacing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("count", "labels", "width"), [(1, 5, 3), (70, 301, 150), (64, 128, 64)])
def test_label_cosine(dtype, softcap, bias, count, labels, width, device):
    weight = rows(labels, width, dtype, device)
    offset = rows(1, labels, dtype, device)[0] if bias else None
    target = torch.randint(labels, (count,), device=device)
    target[count // 2 :: 3] = -100
    smoothing = 0.1 if width == 150 else 0.0
    hidden = rows(count, width, dtype, device)
    check_label_cosine(hidden, target, weight, offset, smoothing, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.0, 3.0])
def test_label_cosine_of_extreme_rows(dtype, softcap, device):
    hidden = extreme_rows(12, 70, dtype, device)
    target = torch.randint(130, (12,), device=device)
    check_label_cosine(hidden, target, rows(130, 70, dtype, device), None, 0.0, softcap)


def test_label_cosine_with_a_bias_and_tiny_rows(device):
    hidden = extreme_rows(12, 70, torch.float32, device)
    hidden[3::4] = 1.0
    offset = rows(1, 130, torch.float32, device)[0]
    target = torch.randint(130, (12,), device=device)
    for softcap in (None, 0.0, 3.0):
        check_label_cosine(
            hidden, target, rows(130, 70, torch.float32, device), offset, 0.1, softcap
        )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_cosine_of_singular_heads_and_row_strides(softcap, device):
    weight = rows(130, 70, torch.float32, device, strided=True)
    weight[60:120] = weight[:60]
    weight[120:] = 0
    target = torch.randint(60, (9,), device=device)
    hidden = rows(9, 70, torch.float32, device, strided=True)
    check_label_cosine(hidden, target, weight, None, 0.0, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("form", GAPPED)
def test_label_cosine_of_a_bias_with_gaps(form, softcap, device):
    weight, hidden = rows(130, 70, torch.float32, device), rows(9, 70, torch.float32, device)
    target = torch.randint(130, (9,), device=device)
    check_label_cosine(hidden, target, weight, GAPPED[form](130, device), 0.1, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_cosine_of_ignored_rows_and_of_none(softcap, device):
    weight, hidden = rows(40, 16, torch.float32, device), rows(5, 16, torch.float32, device)
    check_label_cosine(hidden, torch.full((5,), -100, device=device), weight, None, 0.1, softcap)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    check_label_cosine(hidden[:0], none, weight, None, 0.1, softcap)


def test_label_cosine_of_a_label_outside_the_head(device):
    weight, hidden = rows(40, 16, torch.float32, device), rows(2, 16, torch.float32, device)
    target = torch.tensor([3, 40], device=device)
    call = (hidden, target, weight, None, 0.0, 0.0, False)
    if device.type == "cpu":
        with pytest.raises(DataError, match="label 40 "):
            label.label_cosine_chunked(*call)
    else:
        assert label.label_cosine_chunked(*call)[0].isnan().tolist() == [False, True]


def test_label_cosine_without_a_gradient(device):
    weight, hidden = rows(40, 16, torch.float32, device), rows(5, 16, torch.float32, device)
    target, s = torch.arange(5, device=device), head_statistics(weight, None)
    expected = reference.label_cosine_rows(hidden.double(), weight.double(), target)
    for cosines, gradient in (
        label.label_cosine_chunked(hidden, target, weight, None, 0.0, 0.0, False),
        label.label_cosine(
            hidden, target, weight, None, s.factor, s.shift, s.rest, s.label_sum, s.bias_sum,
            0.0, False,
        ),
    ):  # fmt: skip
        assert gradient.shape == (0, 16)
        assert_close(cosines, expected, bound(torch.float32, 40))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_cosine_of_rows_far_apart(softcap, device):
    """Offsets beyond 32 bits, of the hidden states and of the head."""
    hidden, weight = far_apart(4, 40, 1 << 30, device), rows(50, 40, torch.float16, device)
    target = torch.tensor([3, -100, 49, 0], device=device)
    check_label_cosine(hidden, target, weight, None, 0.0, softcap)
    if softcap:
        check_label_cosine(weight, target.repeat(13)[:50].clamp_max(3), hidden, None, 0.0, softcap)


def test_label_cosine_over_more_programs_than_runs(device):
    """14 tiles of labels among 6 programs: the last program has none."""
    hidden, weight = rows(3, 16, torch.float32, device), rows(896, 16, torch.float32, device)
    check_label_cosine(hidden, torch.tensor([0, 895, 400], device=device), weight, None, 0.1, 3.0)


def test_tanh_keeps_relative_precision(device):
    import triton

    x = torch.cat([torch.logspace(-30, 3, 400), torch.tensor([0.0, 0.0999, 0.1, 0.1001])])
    x = torch.cat([x, -x]).to(device)
    out = torch.empty_like(x)
    kernel = pytest.importorskip("tanh_kernel").tanh_kernel
    kernel[(triton.cdiv(len(x), 128),)](x, out, len(x), BLOCK=128)
    expected = x.double().tanh()
    assert_close(out, expected, 8 * torch.finfo(torch.float32).eps, scale=expected.abs() + 1e-300)


# --------------------------------------------------------------------------- decompose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("softmax", (0.05, 1, 0.0)),
        ("softmax", (1e-3, 1, 0.0)),
        ("top_k", (1.0, 7, 0.0)),
        ("top_k", (1.0, 301, 0.0)),
        ("threshold", (1.0, 1, 0.2)),
    ],
)
@pytest.mark.parametrize("width", [70, 64])
def test_decompose(dtype, kind, options, width, device):
    """Rows where rounding decides which coefficients are kept are left out."""
    source, target = (
        reference.unit_rows(torch.randn(301, d, device=device)).to(dtype) for d in (width, 40)
    )
    hidden = rows(70, width, dtype, device)
    temperature, k, threshold = options
    out = decomposition.decompose(hidden, source, target, kind, *options)
    exact = [x.double() for x in (hidden, source, target)]
    expected = reference.decompose_nonlinear(
        *exact, kind=kind, temperature=temperature, k=k, threshold=threshold
    )
    sizes = reference.coefficients(exact[0], exact[1]).abs().sort(dim=1, descending=True).values
    clear = torch.ones(70, dtype=torch.bool, device=device)
    if kind == "top_k" and k < 301:
        clear = sizes[:, k - 1] - sizes[:, k] > 1e-6
    if kind == "threshold":
        clear = (sizes - threshold).abs().amin(1) > 1e-6
    assert clear.sum() > 60
    used = 1.0 if kind == "softmax" else sizes.sum(1).max().item()
    limit = 2 * bound(dtype, 301)
    if kind == "softmax":
        limit += bound(torch.float32, 70) / temperature
    assert out.dtype == dtype
    assert_close(out[clear], expected[clear], limit, scale=used)


def test_decompose_keeps_ties_across_runs(device):
    """Coefficients are sums of quarters, exact in whatever order the interpreter's library adds."""
    source = torch.zeros(301, 20, device=device)
    for row in source:
        row[4 + torch.randperm(16)[:4]] = 0.5 - torch.randint(2, (4,), device=device).float()
    source[[3, 150, 299]] = 0.0
    source[[3, 150], :4], source[299, :4] = 0.5, -0.5
    target = torch.randn(301, 8, device=device)
    out = decomposition.decompose(2 * source[3:4], source, target, "top_k", 1.0, 2, 0.0)
    expected = (target[3] + target[150] - target[299]).double()
    assert_close(out[0], expected, bound(torch.float32, 20, 16.0))


def test_decompose_takes_one_tile_for_both_streams_of_top_k(device, monkeypatch):
    """A tuner that prefers its first tile when it times the first launch, and its second after."""
    import triton

    times = iter([1.0, 2.0, 2.0, 1.0])
    configs = [
        triton.Config({"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_K": k}, num_warps=4) for k in (16, 32)
    ]
    tuner = triton.autotune(configs, key=["width"], do_bench=lambda call, quantiles: next(times))(
        decomposition._coefficient_kernel
    )
    monkeypatch.setitem(decomposition._coefficients, True, tuner)
    source, target = (reference.unit_rows(torch.randn(301, d, device=device)) for d in (70, 20))
    hidden = rows(9, 70, torch.float32, device)
    out = decomposition.decompose(hidden, source, target, "top_k", 1.0, 4, 0.0)
    assert len(tuner.cache) == 1
    expected = reference.decompose_nonlinear(
        hidden.double(), source.double(), target.double(), kind="top_k", k=4
    )
    assert_close(out, expected, bound(torch.float32, 70), scale=4.0)


@pytest.mark.parametrize("kind", ["softmax", "top_k", "threshold"])
def test_decompose_does_not_hide_nan(kind, device):
    source, target = (reference.unit_rows(torch.randn(130, d, device=device)) for d in (33, 20))
    hidden = rows(3, 33, torch.float32, device)
    hidden[1, 4] = float("nan")
    out = decomposition.decompose(hidden, source, target, kind, 0.1, 3, 0.2)
    assert out.isnan().all(1).tolist() == [False, True, False]


def test_decompose_of_rows_far_apart(device):
    hidden = far_apart(4, 40, 1 << 30, device)
    source, target = (rows(130, d, torch.float16, device) for d in (40, 20))
    out = decomposition.decompose(hidden, source, target, "softmax", 1.0, 1, 0.0)
    expected = reference.decompose_nonlinear(
        hidden.double(), source.double(), target.double(), kind="softmax", temperature=1.0, k=1,
        threshold=0.0,
    )  # fmt: skip
    assert_close(out, expected, 2 * bound(torch.float16, 130), scale=4.0)


def test_decompose_of_extreme_rows_and_of_none(device):
    source = reference.unit_rows(torch.randn(130, 33, device=device))
    target = torch.randn(130, 20, device=device)
    unit = torch.randn(1, 33, device=device)
    norms = torch.tensor([1.0, 1e-30, 1e30, 0.0], device=device)
    for kind in ("softmax", "top_k"):
        out = decomposition.decompose(unit * norms[:, None], source, target, kind, 0.1, 3, 0.0)
        assert_close(out[1], out[0].double(), bound(torch.float32, 130, 16.0))
        assert_close(out[2], out[0].double(), bound(torch.float32, 130, 16.0))
        assert decomposition.decompose(unit[:0], source, target, kind, 0.1, 3, 0.0).shape == (0, 20)
    zero = decomposition.decompose(unit * 0, source, target, "softmax", 0.1, 3, 0.0)
    assert_close(zero[0], target.double().mean(0), bound(torch.float32, 130))


# --------------------------------------------------------------------------- relation

STARTS = [0, 5, 6, 6, 136, 138, 202]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(9, 4), (40, 70)])
def test_relation(dtype, widths, device):
    x, y = (rows(STARTS[-1], d, dtype, device) for d in widths)
    starts = torch.tensor(STARTS, device=device)
    inner, norm_x, norm_y, of_inner, of_norm = relations.relation(x, y, starts, True)
    without = relations.relation(x, y, starts, False)
    # On a GPU the two may be tuned to different tiles, which add up in another order.
    order = bound(torch.float32, STARTS[-1] * max(widths))
    for a, b, size in zip(
        (inner, norm_x, norm_y), without[:3], (norm_x * norm_y, norm_x, norm_y), strict=True
    ):
        assert_close(a, b.double(), order, scale=size.double() + 1e-30)
    assert without[3].shape == without[4].shape == (0, widths[0])
    for s, (start, end) in enumerate(itertools.pairwise(STARTS)):
        part = slice(start, end)
        if end - start < 2:
            assert inner[s] == norm_x[s] == norm_y[s] == 0
            assert (of_inner[part] == 0).all()
            assert (of_norm[part] == 0).all()
            continue
        exact = x[part].double().requires_grad_()
        terms = reference.relation_terms(exact, y[part].double())
        length = (end - start) * max(widths)
        sizes = [t.item() for t in (terms[1] * terms[2], terms[1], terms[2])]
        for actual, expected, size in zip((inner, norm_x, norm_y), terms, sizes, strict=True):
            assert_close(actual[s], expected.detach(), bound(torch.float32, length), scale=size)
        centred = (exact - exact.mean(0)).detach().norm().item()
        for actual, term, size in ((of_inner, terms[0], sizes[2]), (of_norm, terms[1], 1.0)):
            (wanted,) = torch.autograd.grad(term, exact, retain_graph=True)
            assert_close(actual[part], wanted, bound(torch.float32, length), 4 * size * centred)


def test_relation_of_constant_and_huge_sequences(device):
    x = torch.ones(4, 6, device=device)
    x[2:] = torch.randn(2, 6, device=device) * 1e30
    y = torch.randn(4, 6, device=device) * 1e-20
    outputs = relations.relation(x, y, torch.tensor([0, 2, 4], device=device), True)
    assert all(out.isfinite().all() for out in outputs)
    assert outputs[0][0] == outputs[1][0] == 0
    assert (outputs[3][:2] == 0).all()


@pytest.mark.parametrize(("count", "stride"), [(4, 1 << 30), (70, 1 << 25)])
def test_relation_of_rows_far_apart(count, stride, device):
    """Rows of one tile, which are copied, and tiles of one sequence beyond 32-bit reach."""
    x, y = far_apart(count, 9, stride, device), rows(count, 5, torch.float16, device)
    starts = torch.tensor([0, count], device=device)
    near, far = (relations.relation(z, y, starts, True) for z in (x.clone(), x))
    for actual, expected in zip(far, near, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 0, 0]])
def test_relation_of_no_tokens(starts, device):
    empty = torch.zeros(0, 3, device=device)
    outputs = relations.relation(empty, empty, torch.tensor(starts, device=device), True)
    assert outputs[0].tolist() == [0.0] * (len(starts) - 1)


# --------------------------------------------------------------------------- linear_kl


def check_linear_kl(inputs, softcaps=(0.0, 0.0), temperature=1.0, kind="forward"):
    """Errors are relative to ε times the largest logit, to which the normaliser is rounded."""
    h, w, h_s, w_s, b, b_s = inputs
    values, gradient = divergence.linear_kl(*inputs, *softcaps, temperature, kind, True)
    exact = [None if x is None else x.double() for x in inputs]
    exact[0].requires_grad_()
    expected = reference.linear_kl(
        *exact[:4], target_bias=exact[4], source_bias=exact[5], target_softcap=softcaps[0],
        source_softcap=softcaps[1], temperature=temperature, kind=kind,
    )
    largest = max(
        reference.head_logits(x.double(), m.double(), None if v is None else v.double(), cap)
        .abs().max().item() / temperature
        for x, m, v, cap in ((h, w, b, softcaps[0]), (h_s, w_s, b_s, softcaps[1]))
    )
    size, width = 1 + largest, max(h.shape[1], h_s.shape[1])
    assert values.dtype == torch.float32
    assert_close(values, expected.detach(), size * bound(torch.float32, width))
    # |∂/∂z|₁ is at most 2 (forward) or 2·max|g| <= 4·size; each label adds a row of the head.
    reach = exact[1].norm(dim=1).max().item() / temperature * (2 if kind == "forward" else 4 * size)
    limit = 2 * bound(h.dtype, 1) + size * bound(torch.float32, width)
    assert gradient.dtype == h.dtype
    assert_close(gradient, gradient_of(expected, exact[0]), limit, scale=reach)


def kl_inputs(count, labels, widths, dtype, device, bias=True, size=1.0):
    """Hidden states and heads whose logits have standard deviation ``size``."""
    hidden = [rows(count, d, dtype, device) for d in widths]
    head = [(rows(labels, d, torch.float32, device) * size / d**0.5).to(dtype) for d in widths]
    biases = [rows(1, labels, dtype, device)[0] if bias else None for _ in widths]
    return hidden[0], head[0], hidden[1], head[1], *biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 5, (3, 4)), (70, 301, (40, 70)), (64, 128, (64, 32))])
def test_linear_kl(dtype, kind, shape, device):
    check_linear_kl(kl_inputs(*shape, dtype, device, bias=shape[0] == 70), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", GAPPED)
def test_linear_kl_of_biases_with_gaps(form, kind, device):
    *inputs, _, _ = kl_inputs(9, 301, (20, 33), torch.float32, device)
    biases = [GAPPED[form](301, device) for _ in range(2)]
    check_linear_kl((*inputs, *biases), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcaps", [(3.0, 0.0), (5.0, 2.0)])
def test_linear_kl_softcap_and_temperature(kind, softcaps, device):
    inputs = kl_inputs(9, 301, (20, 33), torch.float32, device, size=4.0)
    check_linear_kl(inputs, softcaps, 0.5, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_extreme_logits(kind, device):
    inputs = kl_inputs(9, 301, (20, 33), torch.float32, device, size=3e3)
    inputs[0][2] = 0
    check_linear_kl(inputs, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_two_storages_and_of_no_rows(kind, device):
    h, w, *rest = kl_inputs(9, 130, (20, 33), torch.bfloat16, device)
    check_linear_kl((h.float(), w, *rest), kind=kind)
    none = (h[:0], w, rest[0][:0], *rest[1:], 0.0, 0.0, 1.0, kind, True)
    values, gradient = divergence.linear_kl(*none)
    assert values.shape == (0,)
    assert gradient.shape == (0, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_no_labels(kind, device):
    inputs = kl_inputs(3, 0, (20, 33), torch.float32, device)
    values, gradient = divergence.linear_kl(*inputs, 0.0, 0.0, 1.0, kind, True)
    assert values.tolist() == [0.0] * 3
    assert (gradient == torch.zeros(3, 20, device=device)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_linear_kl_of_rows_far_apart_and_more_programs_than_runs(kind, device):
    """Offsets beyond 32 bits; 14 tiles of labels among 6 programs, the last of which has none."""
    _, *others = kl_inputs(4, 896, (40, 33), torch.float16, device)
    check_linear_kl((far_apart(4, 40, 1 << 30, device), *others), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_kl_softcap_in_half_precision(dtype, kind, device):
    check_linear_kl(kl_inputs(9, 301, (20, 64), dtype, device), (5.0, 2.0), 2.0, kind)


# --------------------------------------------------------------------------- through the ops


@pytest.mark.parametrize("op", ["label_cosine_chunked", "linear_kl", "relation", "decompose"])
def test_ops_reach_their_kernels(op, device, monkeypatch):
    """Through dispatch, with autograd, the results are those of the kernel's host function."""
    from pkt_fast import ops

    weight = rows(40, 16, torch.float32, device)
    hidden = rows(6, 16, torch.float32, device).requires_grad_()
    starts = torch.tensor([0, 4, 6], device=device)
    calls = {
        "label_cosine_chunked": lambda: ops.label_cosine_chunked(hidden, starts.repeat(2), weight),
        "linear_kl": lambda: ops.linear_kl(hidden, weight, hidden.detach() * 2, weight),
        "relation": lambda: ops.relation(hidden, hidden.detach() * 2, starts)[0],
        "decompose": lambda: ops.decompose(hidden, weight, weight, "softmax"),
    }
    results = {}
    for name in ("triton", "reference"):
        with ops.backend(name):
            out = calls[op]()
            grad = gradient_of(out, hidden) if out.requires_grad else torch.zeros(())
            results[name] = out.detach(), grad
    for actual, expected in zip(results["triton"], results["reference"], strict=True):
        scale = expected.double().abs().max().item() + 1
        assert_close(actual, expected.double(), bound(torch.float32, 256), scale=scale)
