"""Devices, streams, graphs and random states: where things run and what is left behind."""

from __future__ import annotations

import pytest
import torch
from op_cases import capture, injection
from toy_pairs import TOKENIZER, sized_model, sums

import pkt_fast
from pkt_fast import ops
from pkt_fast.errors import BackendError
from pkt_fast.ops import _registry, synchronize_captures
from pkt_fast.ops._registry import cuda_problem

needs_cuda_kernels = pytest.mark.skipif(
    "cuda" not in _registry._ops["inject_"].implementations
    or (torch.cuda.is_available() and cuda_problem(torch.device("cuda")) is not None),
    reason="the extension's CUDA kernels were not built, or do not run here",
)


def transfer(source, target, device, **options):
    options = {"steps": 3, "batch_size": 8, "rank": 4, **options}
    return pkt_fast.transfer(
        source, target, sums(4, 4), tokenizer=TOKENIZER, device=str(device), progress=False,
        backend="auto", **options,
    )  # fmt: skip


def models():
    return sized_model("llama", 1, 64, 4), sized_model("llama", 2, 48, 3)


def places(model):
    return {parameter.device for parameter in model.parameters()}


@pytest.fixture
def last() -> torch.device:
    """The last GPU: not the current one where there are several."""
    return torch.device("cuda", torch.cuda.device_count() - 1)


def test_a_transfer_on_another_than_the_current_gpu(last):
    """Kernels are launched, rows stored and batches copied where the tensors are."""
    source, target = models()
    result = transfer(source.to(last), target, last, dropout=0.1)
    assert places(result.model) == places(source) == {last}
    assert torch.cuda.current_device() == 0
    assert all(change.matrix().isfinite().all() for change in result.delta.changes.values())


def test_a_transfer_inside_a_stream_equals_one_outside(device):
    """Nothing but the stream orders the copy of a batch before its use."""
    outside = transfer(*models(), device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        inside = transfer(*models(), device)
    for name, change in outside.delta.changes.items():
        torch.testing.assert_close(inside.delta.changes[name].matrix(), change.matrix())


def test_borrowed_models_and_random_states_are_as_before(device):
    source, target = models()
    torch.manual_seed(5)
    states = torch.cuda.get_rng_state(device).clone(), torch.get_rng_state().clone()
    transfer(source, target, device, dropout=0.1)
    assert places(source) == {torch.device("cpu")}
    assert torch.equal(torch.cuda.get_rng_state(device), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=needs_cuda_kernels)])
@pytest.mark.parametrize("seed", [None, 2**40 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inject_of_many_shapes_on_the_last_gpu(dtype, seed, backend, last):
    """Odd sizes, transposed weights, ranks beyond a tile; the same random words as on the CPU."""
    theirs, ours = injection(dtype, torch.float32), injection(dtype, torch.float32, last)
    with pkt_fast.backend("reference"):
        ops.inject_(theirs.weights, *theirs.factors(), [], seed)
    backups = [torch.empty_like(weight) for weight in ours.weights]
    with pkt_fast.backend(backend):
        unchanged = ops.inject_(ours.weights, *ours.factors(), backups, seed)
    for g, (weight, expected) in enumerate(zip(ours.weights, theirs.weights, strict=True)):
        weight = weight.cpu()
        assert torch.equal(backups[g].cpu(), ours.before[g].cpu())
        assert unchanged[g] == (weight == theirs.before[g]).sum()
        size = 1 + expected.double().abs()
        # The sums differ in their last bits, and so may, in one of many, what they round to.
        ulp = torch.finfo(dtype).eps if dtype != torch.float32 else 8 * torch.finfo(dtype).eps
        assert ((weight.double() - expected.double()).abs() <= 2 * ulp * size).all()


@needs_cuda_kernels
@pytest.mark.parametrize("operands", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 63, 64, 257, 2056])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captures_into_pinned_memory_of_the_last_gpu(dtype, width, operands, last):
    case = capture(dtype, width, operands, normalize=True)
    out = torch.full((9, width), float("nan"), dtype=dtype).pin_memory()
    expected = torch.zeros(9, width, dtype=dtype)
    with pkt_fast.backend("native"):
        ops.capture_rows(out, 1, *case.arguments(last))
    synchronize_captures()
    with pkt_fast.backend("reference"):
        ops.capture_rows(expected, 1, *case.arguments())
    assert out[0].isnan().all()
    assert out[8].isnan().all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out[1:8], expected[1:8], rtol=2 * eps, atol=2 * eps)


@needs_cuda_kernels
def test_pinned_memory_in_flight_is_not_lent_again(device):
    value = torch.ones(8192, 4096, device=device)
    index = torch.arange(8192, device=device)
    with pkt_fast.backend("native"):
        out = torch.empty(8192, 4096, pin_memory=True)
        ops.capture_rows(out, 0, index, value)
    del out
    other = torch.zeros(8192, 4096, pin_memory=True)
    synchronize_captures()
    assert not other.any()


@pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=needs_cuda_kernels)])
def test_inject_refuses_to_be_captured(backend, device):
    weight, a, b = (torch.ones(16, 16, device=device) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with (
        pkt_fast.backend(backend),
        torch.cuda.graph(graph),
        pytest.raises(BackendError, match="captured"),
    ):
        ops.inject_([weight], [a], [b], [1.0], [False])
    assert (weight == 1).all()
