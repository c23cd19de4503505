"""Every op inside ``torch.compile(fullgraph=True)`` and inside a captured CUDA graph.

``inject_`` is left out: it changes its weights in place, once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pkt_fast import ops
from pkt_fast.heads import head_statistics

ROWS, WIDTH, LABELS = 300, 256, 1500
DIFFERENTIABLE = [
    "row_cosine", "align_rows", "label_cosine", "label_cosine_chunked", "linear_kl", "relation",
]  # fmt: skip
FORWARD_ONLY = ["capture_rows", "grad_x_act", "align_rows_grouped", "softmax", "top_k"]


@pytest.fixture(params=DIFFERENTIABLE + FORWARD_ONLY)
def call(request, device) -> Callable[[Tensor], list[Tensor]]:
    """The op as a function of one (ROWS, WIDTH) tensor; its other operands stay."""
    other = torch.randn(ROWS, WIDTH, device=device)
    weight = torch.randn(LABELS, WIDTH, device=device)
    labels = torch.randint(LABELS, (ROWS,), device=device)
    labels[::5] = -100
    index = torch.arange(0, ROWS, 2, device=device)
    starts = torch.tensor([0, 100, 170, ROWS], device=device)
    s = head_statistics(weight)
    statistics = (s.factor, s.shift, s.rest, s.label_sum, s.bias_sum)

    def capture(x: Tensor) -> list[Tensor]:
        out = x.new_zeros(len(index), WIDTH)
        ops.capture_rows(out, 0, index, x, other, normalize=True)
        return [out]

    return {
        "row_cosine": lambda x: [ops.row_cosine(x, other)],
        "align_rows": lambda x: [ops.align_rows(x, weight)],
        "label_cosine": lambda x: [
            ops.label_cosine(x, labels, weight, None, *statistics, smoothing=0.1)
        ],
        "label_cosine_chunked": lambda x: [
            ops.label_cosine_chunked(x, labels, weight, None, 0.1, 3.0)
        ],
        "linear_kl": lambda x: [ops.linear_kl(x, weight, other, weight, kind="jsd")],
        "relation": lambda x: list(ops.relation(x, other, starts)[:2]),
        "capture_rows": capture,
        "grad_x_act": lambda x: list(ops.grad_x_act(x[None], other[None])),
        "align_rows_grouped": lambda x: ops.align_rows_grouped([x, other], [weight, weight]),
        "softmax": lambda x: [ops.decompose(x, weight, weight, "softmax")],
        "top_k": lambda x: [ops.decompose(x, weight, weight, "top_k", k=5)],
    }[request.param]


@pytest.fixture
def differentiable(request) -> bool:
    return request.node.callspec.params["call"] in DIFFERENTIABLE


def run(call: Callable[[Tensor], list[Tensor]], x: Tensor, gradient: bool) -> list[Tensor]:
    """The op's results at ``x`` and, if wanted, the gradient of their sum."""
    x = x.detach().requires_grad_(gradient)
    results = call(x)
    if gradient:
        results = [*results, *torch.autograd.grad(sum(r.sum() for r in results), x)]
    return [r.detach() for r in results]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to 1e-4 of the largest element: the same kernels, perhaps of another tile."""
    for g, e in zip(got, expected, strict=True):
        assert g.isfinite().all()
        assert (g - e).abs().max() <= 1e-4 * e.abs().max()


def test_compiles_without_a_graph_break(call, differentiable, device):
    x = torch.randn(ROWS, WIDTH, device=device)
    compiled = torch.compile(call, fullgraph=True)
    assert_same(run(compiled, x, differentiable), run(call, x, differentiable))


def test_captured_graph_follows_its_input(call, differentiable, device):
    """Nothing waits for the device or depends on host memory: a replay takes new input."""
    x = torch.randn(ROWS, WIDTH, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and times the tuning lists
            run(call, x, differentiable)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, x, differentiable)
    x.copy_(torch.randn(ROWS, WIDTH, device=device))
    junk = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(4)]
    graph.replay()
    assert_same(captured, run(call, x, differentiable))
    del junk
