"""Every training term against its equation written out, in value and gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pkt_fast import chunked, reference
from pkt_fast.anatomy import HeadTransform
from pkt_fast.config import TransferConfig
from pkt_fast.objectives import (
    FrozenHead,
    Rows,
    cosine_term,
    cross_entropy_term,
    fisher_term,
    kl_term,
    label_cosine_term,
    logit_cosine_term,
    relation_term,
    squared_term,
    training_terms,
)
from pkt_fast.vocabulary import SharedVocabulary

N, WIDE, NARROW, VOCAB = 11, 12, 7, 61
STARTS = torch.tensor([0, 4, 5, 11])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(width, seed, scale=1.0, softcap=0.0, bias=False):
    module = nn.Linear(width, VOCAB, bias=bias, dtype=torch.float64).requires_grad_(False)
    module.weight.copy_(randn(VOCAB, width, seed=seed))
    if bias:
        module.bias.copy_(randn(VOCAB, seed=seed + 50))
    return module, HeadTransform(scale, softcap, bias, exact=True)


def make_rows():
    return Rows(
        layers={2: randn(N, NARROW, seed=1).requires_grad_()},
        head=randn(N, NARROW, seed=2).requires_grad_(),
        labels=torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(3)),
        starts=STARTS,
        supervision={"layer2": randn(N, NARROW, seed=4), "head": randn(N, WIDE, seed=5)},
    )


def compare(got, want, tensor):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weights = randn(*got.shape, seed=9)
    (a,) = torch.autograd.grad((got * weights).sum(), tensor)
    (b,) = torch.autograd.grad((want * weights).sum(), tensor)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.fixture(params=[1, 10**9], ids=["row by row", "whole"])
def logit_bytes(request, monkeypatch):
    monkeypatch.setattr(chunked, "LOGIT_BYTES", request.param)


def test_cosine_and_squared():
    rows = make_rows()
    h, t = rows.layers[2], rows.supervision["layer2"]
    compare(cosine_term(2)(rows), 1 - reference.row_cosine(h, t), h)
    want = (h - t).square().sum(1) / t.square().sum(1)
    compare(squared_term(2)(rows), want, h)


def test_relation_is_one_minus_cka_per_sequence():
    rows = make_rows()
    h, t = rows.layers[2], rows.supervision["layer2"]
    want = torch.stack(
        [
            1 - reference.cka(h[a:b], t[a:b]) if b - a > 1 else h.sum() * 0
            for a, b in ((0, 4), (4, 5), (5, 11))
        ]
    )
    compare(relation_term(2)(rows), want, h)


@pytest.mark.usefixtures("logit_bytes")
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_fisher(softcap):
    rows = make_rows()
    frozen = FrozenHead.of(*head(NARROW, 6, 1.5, softcap))
    h, t = rows.layers[2], rows.supervision["layer2"]
    p = torch.softmax(frozen.logits(t), -1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    d = (h - t) @ frozen.weight.T
    compare(fisher_term(2, frozen)(rows), torch.einsum("nv,nvw,nw->n", d, fisher, d) / 2, h)


@pytest.mark.usefixtures("logit_bytes")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_cross_entropy(bias, softcap):
    rows = make_rows()
    module, transform = head(NARROW, 6, 0.7, softcap, bias)
    logits = transform(module(rows.head))
    want = F.cross_entropy(logits, rows.labels, reduction="none", label_smoothing=0.1)
    term = cross_entropy_term(FrozenHead.of(module, transform), 0.1)
    compare(term(rows), want, rows.head)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_label_cosine_ignores_a_scale_and_knows_a_softcap(softcap):
    rows = make_rows()
    module, transform = head(NARROW, 6, 0.7, softcap)
    logits = transform(module(rows.head))
    want = 1 - reference.row_cosine(logits, F.one_hot(rows.labels, VOCAB).to(logits.dtype))
    compare(label_cosine_term(module, transform, 0.0)(rows), want, rows.head)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_kl(kind, softcap, bias):
    rows = make_rows()
    ours, transform = head(NARROW, 6, 0.7, softcap, bias)
    theirs, source_transform = head(WIDE, 7, 1.3, 0.0, bias)
    q = F.log_softmax(transform(ours(rows.head)) / 2, -1)
    p = F.log_softmax(source_transform(theirs(rows.supervision["head"])) / 2, -1)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    kl = {
        "forward": (p.exp() * (p - q)).sum(1),
        "reverse": (q.exp() * (q - p)).sum(1),
        "jsd": ((p.exp() * (p - m)).sum(1) + (q.exp() * (q - m)).sum(1)) / 2,
    }[kind]
    term = kl_term(
        FrozenHead.of(ours, transform), FrozenHead.of(theirs, source_transform), 2.0, kind
    )
    compare(term(rows), 4 * kl, rows.head)


def test_logit_cosine():
    rows = make_rows()
    ours, theirs = head(NARROW, 6), head(WIDE, 7)
    want = 1 - reference.logit_cosine_rows(
        rows.head, ours[0].weight, rows.supervision["head"], theirs[0].weight
    )
    compare(logit_cosine_term(FrozenHead.of(*ours), FrozenHead.of(*theirs))(rows), want, rows.head)


def test_terms_follow_the_configuration():
    module, transform = head(NARROW, 6)
    config = TransferConfig.make(
        objective="squared", layer_weight=3.0, output_loss="kl", output_weight=0.5, label_weight=2.0
    )
    shared = SharedVocabulary(torch.arange(9), torch.arange(9) + 3)
    source = FrozenHead.of(*head(WIDE, 7))
    terms = training_terms(config, [2, 4], module, transform, source, shared)
    assert [(t.name, t.weight) for t in terms] == [
        ("layer_loss", 1.5),
        ("layer_loss", 1.5),
        ("output_loss", 0.5),
        ("label_loss", 2.0),
    ]
    rows = make_rows()
    q = F.log_softmax(rows.head @ module.weight[3:12].T, -1)
    p = F.log_softmax(rows.supervision["head"] @ source.weight[:9].T, -1)
    compare(terms[2].term(rows), (p.exp() * (p - q)).sum(1), rows.head)
