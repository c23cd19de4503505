"""Streamed Gram matrices, their roots, and what the label cosine needs of a head."""

import math

import pytest
import torch

from pkt_fast.heads import better_conditioned, gram_root, head_statistics, streamed_gram


def head(rows, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5000, 17), (4097, 64), (33, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gram_equals_the_product(shape, dtype):
    weight = head(*shape, dtype=dtype)
    exact = weight.double().T @ weight.double()
    gram = streamed_gram(weight)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))


def singular_heads():
    base = head(300, 12)
    duplicate = base.clone()
    duplicate[:, 7] = duplicate[:, 3]
    yield "fewer rows than columns", head(5, 12)
    yield "duplicated column", duplicate
    yield "zero column", base * (torch.arange(12) != 4)
    yield "zero padding rows", torch.cat([base, torch.zeros(20, 12, dtype=torch.float64)])
    yield "ill-conditioned", base * torch.logspace(0, -7, 12, dtype=torch.float64)
    yield "regular", base


@pytest.mark.parametrize(
    ("name", "weight"), list(singular_heads()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_root_and_inverse(name, weight):
    gram = streamed_gram(weight)
    root = gram_root(gram)
    rank = torch.linalg.matrix_rank(weight).item()
    scale = float(gram.abs().max())
    torch.testing.assert_close(root.factor.T @ root.factor, gram, rtol=0, atol=1e-11 * scale)
    if name != "ill-conditioned":
        assert root.rank == rank
        pinv = torch.linalg.pinv(weight, rtol=1e-9)
        torch.testing.assert_close(weight @ root.inverse, pinv.T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 1e-1, 1e-3, 1e-6, 1e-11])
def test_condition_is_judged_within_a_factor(ratio):
    size = 40
    rotation = torch.linalg.qr(head(size, size)).Q
    values = torch.logspace(0, math.log10(ratio), size, dtype=torch.float64)
    gram, inverse = ((rotation * x) @ rotation.T for x in (values, 1 / values))
    for scale in (1e-100, 1.0, 1e100):
        assert better_conditioned(gram * scale, inverse / scale, ratio / 2)
        assert not better_conditioned(gram * scale, inverse / scale, ratio * 4)
    assert not better_conditioned(gram, inverse * math.inf, ratio / 2)


@pytest.mark.parametrize("bias", [False, True])
def test_statistics_give_norm_and_sum_of_logits(bias):
    weight, offset = head(211, 9), head(1, 211, seed=1)[0] if bias else None
    known = head_statistics(weight, offset)
    hidden = head(31, 9, seed=2)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    squared = (hidden @ known.factor.T + known.shift).square().sum(-1) + known.rest
    torch.testing.assert_close(squared.sqrt(), logits.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden @ known.label_sum + known.bias_sum, logits.sum(-1))


def test_float32_heads_give_float32_statistics():
    known = head_statistics(head(50, 8, dtype=torch.bfloat16))
    assert known.factor.dtype == known.label_sum.dtype == torch.float32
