"""The two-phase transfer equals the loop that runs both models whole in every step.

Losses to 1e-5, adapters to 1e-4 relative, in float32: on ragged batches padded on either side, for
sliding-window and full attention, and for every objective that has an equation in reference.py.
"""

import functools

import pytest
from toy_pairs import TOKENIZER, one_phase, relative_error, sized_model, sums

import pkt_fast
from pkt_fast import TransferConfig
from pkt_fast.data import collate

ROWS = sums(8, 5)
QUICK = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 3e-3}


def pair(family, **options):
    return sized_model(family, 1, 48, 6, **options), sized_model(family, 2, 32, 4, **options)


def check(family, padding_side="right", architecture=None, shares=None, **options):
    config = TransferConfig.make(**{**QUICK, **options})
    architecture = architecture or {}
    result = pkt_fast.transfer(
        *pair(family, **architecture), ROWS, tokenizer=TOKENIZER, progress=False, config=config
    )
    history, delta = one_phase(
        *pair(family, **architecture), ROWS, result.pairs, config,
        padding_side=padding_side, shares=shares,
    )  # fmt: skip
    for ours, theirs in zip(result.history, history, strict=True):
        for name, loss in theirs.items():
            assert ours[name] == pytest.approx(loss, abs=1e-5), name
    assert relative_error(result.delta, delta) < 1e-4
    return result


@pytest.fixture
def padded(request, monkeypatch):
    """Both phases pad on this side, as the one-phase loop does."""
    sided = functools.partial(collate, padding_side=request.param)
    monkeypatch.setattr("pkt_fast.phases.collate", sided)
    monkeypatch.setattr("pkt_fast.steering.collate", sided)
    return request.param


@pytest.mark.parametrize(
    ("layers", "padded"),
    [([0], "right"), ([2], "right"), ([1, 3], "right"), ([0], "left"), ([1, 3], "left")],
    indirect=["padded"],
    ids=str,
)
@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 4}), ("gemma2", {})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_families_and_padding(family, architecture, layers, padded):
    check(family, padded, architecture, layers=layers)


@pytest.mark.parametrize("padded", ["left"], indirect=True)
def test_rows_that_attribution_saw_come_from_left_padded_batches_too(padded):
    check("llama", padded, attribution_examples=6, num_layers=2)


@pytest.mark.parametrize("interface", ["attention", "block", "contribution"])
def test_interfaces(interface):
    check("llama", layers=[1], interface=interface)


def test_one_source_layer_alone():
    result = check("llama", layers=[1, 2], pairing="single")
    assert [link.source for link in result.pairs] == [(2,), (3,)]


@pytest.mark.parametrize(
    ("budget", "shares"), [({"epochs": 2}, [2, 2, 2]), ({"steps": 5}, [1, 2, 2])], ids=str
)
def test_the_frontier_shares_the_steps_and_leaves_earlier_layers_as_trained(budget, shares):
    result = check("llama", layers=[0, 1, 3], schedule="frontier", shares=shares, **budget)
    assert [record["step"] for record in result.history] == list(range(sum(shares)))


OBJECTIVES = [
    {"objective": "relation", "interface": "contribution", "recompose": "dual",
     "output_loss": "kl", "layers": [1, 3]},
    {"objective": "fisher", "recompose": "dual", "output_loss": "kl", "kl_kind": "reverse",
     "temperature": 2.0, "layers": [1, 2]},
    {"objective": "squared", "interface": "block", "recompose": "logit", "output_loss": "kl",
     "kl_kind": "jsd", "label_weight": 0.5, "label_smoothing": 0.2, "layer_weight": 0.3,
     "layers": [2]},
    {"objective": "none", "output_loss": "logit_cosine", "layers": [1, 3]},
    {"objective": "none", "output_loss": "cross_entropy", "output_weight": 0.5,
     "weight_decay": 0.5, "layers": [2]},
]  # fmt: skip


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_objectives(family, options):
    check(family, **options)
