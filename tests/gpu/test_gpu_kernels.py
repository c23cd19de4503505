"""Every op on a GPU: against float64 there, and its time.

Each test prints one line: median microseconds, bytes and operations a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pkt_fast
from pkt_fast import ops, reference
from pkt_fast.heads import head_statistics
from pkt_fast.ops import _registry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def timed(capsys) -> Callable[..., None]:
    def run(label: str, call: Callable[[], object], *, moved: int, operations: int = 0) -> None:
        from triton.testing import do_bench

        seconds = do_bench(call, return_mode="median") / 1e3
        rate = f"{moved / seconds / 1e9:8.0f} GB/s"
        if operations:
            rate += f" {operations / seconds / 1e12:8.1f} TFLOP/s"
        with capsys.disabled():
            print(f"\n{label:55s} {seconds * 1e6:9.1f} us {rate}")

    return run


def assert_close(got: Tensor, expected: Tensor, length: int, scale: Tensor | float = 1.0) -> None:
    """|error| <= 4·(ε_storage/2 + ε_float32·√length)·scale, and nothing that is not finite."""
    limit = torch.finfo(got.dtype).eps / 2 + torch.finfo(torch.float32).eps * math.sqrt(length)
    assert got.isfinite().all()
    assert ((got.double() - expected).abs() / scale).max() <= 4 * limit


def gradients(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of ``call`` at x, and the gradient of their sum."""
    x = x.detach().requires_grad_()
    values = call(x)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


@pytest.mark.parametrize("operands", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_capture_rows(dtype, operands, device, timed):
    count, shape = 4096, (8, 1024, 4096)
    value, *rest = (torch.randn(shape, device=device).to(dtype) for _ in range(operands))
    index = torch.randperm(8192, device=device)[:count].sort().values
    out = torch.full((count + 8, shape[-1]), math.nan, dtype=dtype, device=device)
    args = (out, 4, index, value, *rest, *[None] * (4 - operands), 0.25 * bool(rest), 1.0, True)
    ops.capture_rows(*args)
    doubles = [x.double().flatten(0, 1) for x in (value, *rest)]
    companions = dict(zip(("minus", "other", "other_minus"), doubles[1:], strict=False))
    expected = reference.gather_rows(
        doubles[0], index, lam=args[-3], normalize=True, **companions
    )
    assert_close(out[4:-4], expected, shape[-1])
    assert out[:4].isnan().all()
    assert out[-4:].isnan().all()
    moved = (operands + 1) * count * shape[-1] * dtype.itemsize
    timed(f"capture_rows {dtype} {operands} operands", lambda: ops.capture_rows(*args), moved=moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_x_act(dtype, device, timed):
    shape = (8, 1024, 4096)
    gradient, activation = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    got = ops.grad_x_act(gradient, activation)
    expected = reference.gradient_times_activation(gradient.double(), activation.double())
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, gradient[0].numel(), scale=expected[1])
    moved = 2 * gradient.numel() * dtype.itemsize
    timed(f"grad_x_act {dtype}", lambda: ops.grad_x_act(gradient, activation), moved=moved)


@pytest.mark.parametrize("width", [4096, 3584])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_cosine(dtype, width, device, timed):
    x, y = (torch.randn(8192, width, device=device).to(dtype) for _ in range(2))
    cosines, gradient = gradients(lambda x: ops.row_cosine(x, y), x)
    expected, wanted = gradients(lambda x: reference.row_cosine(x, y.double()), x.double())
    assert_close(cosines, expected, width)
    assert_close(gradient, wanted, width, scale=1 / x.double().norm(dim=1, keepdim=True))
    timed(
        f"row_cosine with gradient {dtype} {width}",
        lambda: gradients(lambda x: ops.row_cosine(x, y), x),
        moved=5 * x.numel() * dtype.itemsize,
    )


@pytest.mark.parametrize("layers", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_align_rows(dtype, layers, device, timed):
    count, width, outputs = 4096, 5120, 4096
    hidden = [torch.randn(count, width, device=device).to(dtype) for _ in range(layers)]
    matrices = [torch.randn(outputs, width, device=device).to(dtype) for _ in range(layers)]
    got = ops.align_rows_grouped(hidden, matrices)
    for g, h, m in zip(got, hidden, matrices, strict=True):
        expected = reference.unit_rows(h.double()) @ m.double().T
        assert_close(g, expected, width, scale=m.double().norm(dim=1)[None, :])
    timed(
        f"align_rows {dtype} {layers} layers",
        lambda: ops.align_rows_grouped(hidden, matrices),
        moved=layers * (count * (width + outputs) + width * outputs) * dtype.itemsize,
        operations=layers * 2 * count * width * outputs,
    )


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inject(dtype, seed, backend, device, timed):
    if backend == "native" and "cuda" not in _registry._ops["inject_"].implementations:
        pytest.skip("the extension was built without CUDA kernels")
    pkt_fast.backend(backend)
    shape, rank, matrices = (4096, 11008), 16, 4
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(matrices)]
    a = [torch.randn(rank, shape[1], device=device) for _ in weights]
    b = [torch.randn(shape[0], rank, device=device) / 4 for _ in weights]
    old = [w.clone() for w in weights]
    backups = [torch.empty_like(w) for w in weights]
    args = (weights, a, b, [0.01] * matrices, [False] * matrices, backups, seed)
    unchanged = ops.inject_(*args)
    for g, weight in enumerate(weights):
        expected = reference.inject(old[g].double(), a[g].double(), b[g].double(), 0.01)
        assert_close(weight, expected, rank, scale=8.0)
        assert torch.equal(backups[g], old[g])
        assert unchanged[g] == (weight == old[g]).sum()
    moved = matrices * 3 * weights[0].numel() * dtype.itemsize
    label = f"inject_ {backend} {dtype}, {'nearest' if seed is None else 'stochastic'}"
    timed(label, lambda: ops.inject_(*args), moved=moved)


# --------------------------------------------------------------------------- streamed vocabularies


def random_head(labels: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A head whose logits have about unit size for hidden states of unit variance."""
    return (torch.randn(labels, width, device=device) / width**0.5).to(dtype)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_label_cosine(dtype, softcap, device, timed):
    """Softcapped heads stream the vocabulary; the others meet an upper triangular factor.

    Every eighth row is compared: the logits of all would be several times 2 GB in float64.
    """
    count, width, labels = (8192, 4096, 32000) if softcap is None else (2048, 4096, 32000)
    weight = random_head(labels, width, dtype, device)
    hidden = torch.randn(count, width, device=device).to(dtype)
    target = torch.randint(labels, (count,), device=device)
    if softcap is None:
        s = head_statistics(weight)
        rest = (None, s.factor, s.shift, s.rest, s.label_sum, s.bias_sum, 0.1)
        operations = 2 * count * width * width

        def call(x: Tensor) -> Tensor:
            return ops.label_cosine(x, target, weight, *rest)
    else:
        operations = 6 * count * width * labels

        def call(x: Tensor) -> Tensor:
            return ops.label_cosine_chunked(x, target, weight, None, 0.1, softcap)

    values, gradient = gradients(call, hidden)
    head, exact = weight.double(), hidden[::8].double()
    expected, wanted = gradients(
        lambda x: reference.label_cosine_rows(
            x, head, target[::8], label_smoothing=0.1, softcap=softcap or 0.0
        ),
        exact,
    )
    # Half-precision hidden states meet the factor in one TF32 product, which rounds it.
    work = values.to(dtype) if softcap is None else values
    assert_close(work[::8], expected, labels)
    logits = reference.head_logits(exact, head, None, softcap or 0.0)
    largest = torch.linalg.eigvalsh(head.T @ head)[-1].sqrt()
    assert_close(gradient[::8], wanted, labels, scale=largest / logits.norm(dim=1, keepdim=True))
    name = "label_cosine" if softcap is None else "label_cosine_chunked"
    moved = (2 * count + labels) * width * dtype.itemsize
    timed(
        f"{name} with gradient {dtype}", lambda: gradients(call, hidden),
        moved=moved, operations=operations,
    )


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_kl(dtype, kind, device, timed):
    count, labels, widths = 1024, 32000, (4096, 5120)
    heads = [random_head(labels, width, dtype, device) for width in widths]
    hidden, source = (torch.randn(count, width, device=device).to(dtype) for width in widths)

    def call(x: Tensor) -> Tensor:
        return ops.linear_kl(x, heads[0], source, heads[1], kind=kind)

    values, gradient = gradients(call, hidden)
    head, source_head = (h.double() for h in heads)
    expected, wanted = gradients(
        lambda x: reference.linear_kl(x, head, source.double(), source_head, kind=kind),
        hidden.double(),
    )
    # Logits of unit size stay below 6.  A row's slopes sum to at most 2 (forward) or 2·max|g|.
    largest = 7
    assert_close(values, expected, max(widths), scale=largest)
    reach = head.norm(dim=1).max() * (2 if kind == "forward" else 4 * largest)
    assert_close(gradient, wanted, max(widths), scale=2 * largest * reach)
    streams = 3 if kind == "jsd" else 2
    timed(
        f"linear_kl with gradient {dtype} {kind}",
        lambda: gradients(call, hidden),
        moved=(count + labels) * sum(widths) * dtype.itemsize,
        operations=2 * count * labels * (streams * sum(widths) + widths[0]),
    )


@pytest.mark.parametrize("kind", ["softmax", "top_k"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decompose(dtype, kind, device, timed):
    count, labels, widths, k = 1024, 32000, (5120, 4096), 32
    source, target = (
        reference.unit_rows(torch.randn(labels, width, device=device)).to(dtype)
        for width in widths
    )
    hidden = torch.randn(count, widths[0], device=device).to(dtype)

    def call() -> Tensor:
        return ops.decompose(hidden, source, target, kind, temperature=0.05, k=k)

    expected = reference.decompose_nonlinear(
        hidden.double(), source.double(), target.double(), kind=kind, temperature=0.05, k=k,
        threshold=0.0,
    )  # fmt: skip
    sizes = reference.coefficients(hidden.double(), source.double()).abs()
    largest = sizes.topk(k + 1, dim=1).values
    if kind == "top_k":  # rows where rounding decides which coefficient is the k-th are left out
        clear, used = largest[:, k - 1] - largest[:, k] > 1e-6, largest.sum(1).max()
    else:
        clear, used = torch.ones(count, dtype=torch.bool, device=device), 1 / 0.05
    assert clear.sum() > 0.9 * count
    assert_close(call()[clear], expected[clear], labels, scale=used)
    timed(
        f"decompose {dtype} {kind}",
        call,
        moved=(labels * sum(widths) + count * sum(widths)) * dtype.itemsize,
        operations=2 * count * labels * (widths[0] * (2 if kind == "top_k" else 1) + widths[1]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_relation(dtype, device, timed):
    sequences, tokens, widths = 16, 512, (4096, 5120)
    x, y = (torch.randn(sequences * tokens, width, device=device).to(dtype) for width in widths)
    starts = torch.arange(0, len(x) + 1, tokens, device=device)
    parts = [slice(s * tokens, (s + 1) * tokens) for s in range(sequences)]
    inner, norm_x, norm_y = ops.relation(x, y, starts)
    length = tokens * max(widths)
    for s, part in enumerate(parts):
        terms = reference.relation_terms(x[part].double(), y[part].double())
        assert_close(inner[s], terms[0], length, scale=terms[1] * terms[2])
        assert_close(norm_x[s], terms[1], length, scale=terms[1])
        assert_close(norm_y[s], terms[2], length, scale=terms[2])
    _, gradient = gradients(lambda x: ops.relation(x, y, starts)[0], x)
    for part in parts:
        exact, other = x[part].double(), y[part].double()
        _, wanted = gradients(lambda x, y=other: reference.relation_terms(x, y)[0], exact)
        _, norm, other = reference.relation_terms(exact, other)
        assert_close(gradient[part], wanted, length, scale=4 * other * norm.sqrt())
    timed(
        f"relation with gradient {dtype}",
        lambda: gradients(lambda x: ops.relation(x, y, starts)[0], x),
        moved=len(x) * sum(widths) * dtype.itemsize,
        operations=2 * len(x) * tokens * (3 * widths[0] + widths[1]),
    )
