"""The public losses against the reference, in value and gradient."""

import pytest
import torch
from torch import nn

from pkt_fast import cka, losses, reference
from pkt_fast.errors import ConfigError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(vocabulary, width, bias, dtype=torch.float64):
    head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    head.weight.copy_(randn(vocabulary, width, seed=5))
    if bias:
        head.bias.copy_(randn(vocabulary, seed=6))
    return head


def labels_for(shape, vocabulary):
    labels = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(7))
    labels[..., ::3] = -100
    return labels


def test_layer_cosine_value_and_gradient():
    x, y = randn(3, 5, 17).requires_grad_(), randn(3, 5, 17, seed=1).requires_grad_()
    loss = losses.layer_cosine(x, y)
    gx, gy = torch.autograd.grad(loss, (x, y))
    expected = reference.layer_cosine(x.reshape(-1, 17), y.reshape(-1, 17))
    torch.testing.assert_close(loss, expected)
    for got, want in zip((gx, gy), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(ConfigError, match="layer_cosine"):
        losses.layer_cosine(x, y[:2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1,), (13,), (2, 7)])
def test_label_cosine(shape, bias, smoothing, softcap):
    head = linear(101, 16, bias)
    hidden = randn(*shape, 16, seed=2).requires_grad_()
    labels = labels_for((*shape[:-1], shape[-1] + 3), 101)[..., 1 : 1 + shape[-1]]
    loss = losses.label_cosine(hidden, head, labels, label_smoothing=smoothing, softcap=softcap)
    expected = reference.label_cosine(
        hidden.reshape(-1, 16),
        head.weight,
        labels.reshape(-1),
        bias=head.bias,
        label_smoothing=smoothing,
        softcap=softcap,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (got,), (want,) = (torch.autograd.grad(value, hidden) for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_head_that_trains_gets_its_gradient():
    head = linear(53, 8, bias=True)
    head.requires_grad_(True)
    hidden, labels = randn(11, 8, seed=2).requires_grad_(), labels_for((11,), 53)
    tensors = (hidden, head.weight, head.bias)
    got = torch.autograd.grad(losses.label_cosine(hidden, head, labels), tensors)
    want = torch.autograd.grad(
        reference.label_cosine(hidden, head.weight, labels, bias=head.bias), tensors
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_statistics_follow_the_weights():
    head = linear(40, 6, bias=False)
    hidden, labels = randn(9, 6), labels_for((9,), 40)
    first = losses.label_cosine(hidden, head, labels)
    assert losses.statistics_of(head) is losses.statistics_of(head)
    head.weight.mul_(torch.linspace(0.1, 2, 6, dtype=torch.float64))
    second = losses.label_cosine(hidden, head, labels)
    torch.testing.assert_close(second, reference.label_cosine(hidden, head.weight, labels))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("shape", [(40, 7, 5), (6, 30, 20), (2, 3, 3)])
def test_cka(shape):
    n, wide, narrow = shape
    x, y = randn(n, wide), randn(n, narrow, seed=1)
    torch.testing.assert_close(cka(x, y), reference.cka(x, y))
    torch.testing.assert_close(cka(x, x), torch.ones((), dtype=x.dtype))
    rotation = torch.linalg.qr(randn(wide, wide, seed=3)).Q
    torch.testing.assert_close(cka(x @ rotation * 3 + 1, y), cka(x, y))
    with pytest.raises(ConfigError, match="same N"):
        cka(x, y[:1])
