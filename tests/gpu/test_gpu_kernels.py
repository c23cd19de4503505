"""The memory-bound and alignment ops on a GPU: against float64 there, and their time.

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
from pkt_fast.ops import _registry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _triton():
    """Every op runs as its Triton kernel; one that cannot raises BackendError."""
    torch.manual_seed(0)
    with pkt_fast.backend("triton"):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


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
    x = torch.randn(8192, width, device=device).to(dtype).requires_grad_()
    y = torch.randn(8192, width, device=device).to(dtype)
    cosines = ops.row_cosine(x, y)
    cosines.sum().backward()
    exact = x.detach().double().requires_grad_()
    expected = reference.row_cosine(exact, y.double())
    expected.sum().backward()
    assert_close(cosines.detach(), expected.detach(), width)
    assert_close(x.grad, exact.grad, width, scale=1 / exact.detach().norm(dim=1, keepdim=True))
    moved = 3 * x.numel() * dtype.itemsize
    timed(f"row_cosine with gradient {dtype} {width}", lambda: ops.row_cosine(x, y), moved=moved)


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
