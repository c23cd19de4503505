"""The models' linear layers by our matrix kernel: same values, same gradients, nothing else
touched.
"""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pkt_fast import ops
from pkt_fast.ops import _gemm, linear
from pkt_fast.ops.linear import own_products

pytest.importorskip("pkt_fast._native")
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """Our kernel serves whatever the machine; the list grows with every product of it."""
    made = []

    def counted(left, right, **options):
        made.append((tuple(left.shape), tuple(right.shape)))
        return _gemm.product(left, right, **options)

    for module in (_gemm, linear):
        monkeypatch.setattr(module, "choice", lambda: _gemm.Choice(True, "test"))
    monkeypatch.setattr(linear, "product", counted)
    return made


def close(got, expected, depth):
    """A sum of ``depth`` products, each within a few units in the last place."""
    size = expected.abs().max().clamp_min(1)
    limit = 4 * depth**0.5 * torch.finfo(got.dtype).eps * size
    assert (got.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 1), (3, 30, 33), (2, 5, 13, 40), (130, 64)])
def test_values_and_gradients_of_a_linear_layer(calls, dtype, bias, shape):
    layer = nn.Linear(shape[-1], 70, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)[..., ::1].requires_grad_()
    upstream = torch.randn(*shape[:-1], 70, dtype=dtype)
    with own_products():
        y = layer(x)
        y.backward(upstream)
    exact_x = x.detach().double().requires_grad_()
    exact = [p.detach().double().requires_grad_() for p in layer.parameters()]
    expected = F.linear(exact_x, *exact)
    expected.backward(upstream.double())
    rows = upstream[..., 0].numel()
    close(y, expected, shape[-1])
    close(x.grad, exact_x.grad, 70)
    for parameter, twin in zip(layer.parameters(), exact, strict=True):
        close(parameter.grad, twin.grad, rows)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert len(calls) == 3


def test_strided_operands(calls):
    x = torch.randn(40, 3, 100)[:, ::2, ::3]
    weight = torch.randn(34, 90).T[:66, :]
    with own_products():
        got = F.linear(x, weight)
    close(got, F.linear(x.double(), weight.double()), 34)
    assert calls == [((80, 34), (34, 66))]


def test_conv1d_and_its_gradients(calls):
    layer = Conv1D(48, 36)
    x = torch.randn(4, 20, 36, requires_grad=True)
    upstream = torch.randn(4, 20, 48)
    with own_products():
        layer(x).backward(upstream)
    found = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = layer.weight.grad = layer.bias.grad = None
    layer(x).backward(upstream)
    for got, expected in zip(found, [x.grad, layer.weight.grad, layer.bias.grad], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert calls


def test_only_what_needs_a_gradient_is_multiplied(calls):
    x, weight = torch.randn(70, 20), torch.randn(30, 20)
    with own_products():
        F.linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    assert len(calls) == 2
    calls.clear()
    with own_products():
        F.linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert len(calls) == 1  # the weight's gradient has 30 rows: the library's


def test_the_result_may_be_changed_in_place(calls):
    x = torch.randn(2, 40, 8, requires_grad=True)
    with own_products():
        y = F.linear(x, torch.randn(9, 8))
        y.add_(1)
        y.sum().backward()
    assert calls


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(63, 8), torch.randn(9, 8), None),
        (torch.randn(64, 8).bfloat16(), torch.randn(9, 8).bfloat16(), None),
        (torch.randn(8), torch.randn(9, 8), None),
        (torch.randn(0, 8), torch.randn(9, 8), None),
        (torch.randn(64, 8, device="meta"), torch.randn(9, 8, device="meta"), None),
    ],
)
def test_everything_else_is_left_alone(calls, x, weight, bias):
    with own_products():
        got = F.linear(x, weight, bias)
    assert got.shape == (*x.shape[:-1], 9)
    assert not calls


def test_errors_are_torchs_own(calls):
    with own_products():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(torch.randn(64, 8), torch.randn(9, 7))
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(torch.randn(64, 8), torch.randn(9, 8).double())
    assert not calls


def test_autocast_and_subclasses_are_left_alone(calls):
    class Marked(torch.Tensor):
        pass

    x, weight = torch.randn(64, 8), torch.randn(9, 8)
    with own_products(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
    with own_products():
        assert type(F.linear(x.as_subclass(Marked), weight)) is Marked
    assert not calls


def test_addmm_that_is_no_linear_layer_is_left_alone(calls):
    x, weight = torch.randn(64, 8), torch.randn(8, 9)
    with own_products():
        torch.addmm(torch.randn(64, 9), x, weight)
        torch.addmm(torch.randn(64, 1), x, weight)
        torch.addmm(torch.randn(9), x, weight, beta=2)
    assert not calls


@pytest.mark.parametrize("wanted", [True, False])
def test_backend_reference_and_not_wanted(calls, wanted):
    with ops.backend("reference" if wanted else "auto"), own_products(wanted):
        F.linear(torch.randn(64, 8), torch.randn(9, 8))
    assert not calls


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_gives_the_same_logits_and_gradients(calls, kind):
    model = tiny_model(kind)
    ids = torch.randint(5, 50, (4, 20))

    def run():
        model.zero_grad()
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        return [result.logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = [value.detach().clone() for value in run()]
    with own_products():
        found = run()
    assert calls
    for got, other in zip(found, expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
