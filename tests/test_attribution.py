"""Layer scores equal Captum's LayerGradientXActivation, summed per example."""

import importlib

import pytest
import torch
from captum.attr import LayerGradientXActivation
from models import tiny_model
from torch.nn import functional as F

from pkt_fast import attribute
from pkt_fast.anatomy import Anatomy
from pkt_fast.attribution import gradient_x_activation
from pkt_fast.data import Batch, Example, collate
from pkt_fast.errors import ConfigError, DataError, NumericsError

attribution = importlib.import_module("pkt_fast.attribution")  # the package has a function too


def make_batch(vocabulary, lengths=(9, 5, 7), seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row, length in enumerate(lengths):
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        examples.append(Example(tuple(ids), tuple(labels), row))
    return collate(examples, range(len(lengths)), pad_token_id=0)


def example_losses(model, batch):
    logits = model(**batch.model_inputs(), use_cache=False).logits
    losses = F.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=-100, reduction="none"
    )
    return losses.sum(1) / batch.supervised.sum(1)


# opt flattens its tokens inside the block, falcon adds in place to what its MLP returned, ctrl
# scales its embeddings in place.  Captum cannot read blocks that return tuples (falcon, ctrl).
CAPTUM_CASES = [
    (family, interface)
    for family in ("llama", "gpt2", "gpt_neox", "gemma2", "opt", "falcon", "ctrl")
    for interface in ("mlp", "attention", "block")
    if interface != "block" or family not in ("falcon", "ctrl")
]


@pytest.mark.parametrize(("family", "interface"), CAPTUM_CASES)
def test_equals_captum(family, interface):
    model = tiny_model(family, seed=4).double()
    anatomy = Anatomy.of(model)
    batch = make_batch(anatomy.vocab_size)
    signed, absolute = gradient_x_activation(model, batch, interface=interface)
    for layer in range(anatomy.num_layers):
        # Captum cannot read a module that returns (tensor, None), as attention modules do; the
        # projection inside returns the same tensor alone.
        projection = anatomy.output_projection(layer, interface)
        module = projection[1] if projection else anatomy.tap(layer, interface).module

        def forward(ids):
            return example_losses(
                model,
                Batch(ids, batch.attention_mask, batch.labels, batch.position_ids, batch.rows),
            )

        product = LayerGradientXActivation(forward, module).attribute(batch.input_ids)
        product = product[0] if isinstance(product, tuple) else product
        product = product.reshape(len(batch), -1)
        torch.testing.assert_close(signed[layer], product.sum(1), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(absolute[layer], product.abs().sum(1), rtol=1e-8, atol=1e-12)


def test_contribution_uses_the_gradient_of_what_is_added():
    model = tiny_model("llama", seed=4).double()
    batch = make_batch(96)
    (mlp, _), (attention, _), (both, _) = (
        gradient_x_activation(model, batch, interface=name)
        for name in ("mlp", "attention", "contribution")
    )
    # At the block's end the MLP's share of g·(a + m) is its own product; attention's gradient
    # differs because the MLP reads it, so only the MLP's part can be compared: g·a = both − mlp.
    assert (both - mlp).abs().max() > 0
    assert not torch.allclose(both - mlp, attention)


@pytest.mark.parametrize("reduction", ["absolute", "signed", "net"])
def test_reductions(reduction):
    model = tiny_model("llama", seed=4)
    batches = [make_batch(96, seed=1), make_batch(96, lengths=(6,), seed=2)]
    per_example = [gradient_x_activation(model, batch) for batch in batches]
    signed = torch.cat([s for s, _ in per_example], 1)
    absolute = torch.cat([a for _, a in per_example], 1)
    expected = {"absolute": absolute, "signed": signed, "net": signed.abs()}[reduction].mean(1)
    torch.testing.assert_close(attribute(model, batches, reduction=reduction), expected)


def test_padding_changes_nothing():
    model = tiny_model("llama", seed=4)
    together = attribute(model, [make_batch(96)])
    batch = make_batch(96)
    alone = []
    for row in range(3):
        keep = batch.attention_mask[row].bool()
        cut = [
            t[row : row + 1, keep]
            for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids)
        ]
        alone.append(Batch(*cut, rows=(row,)))
    torch.testing.assert_close(attribute(model, alone), together, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("strength", [0.01, 1.0, 50.0])
def test_float16_gradients_neither_vanish_nor_overflow(family, strength):
    model = tiny_model(family, seed=4)
    # Gradients scale with the final norm; the activations below it stay as they are.
    with torch.no_grad():
        for parameter in Anatomy.of(model).final_norm.parameters():
            parameter.mul_(strength)
    batch = make_batch(Anatomy.of(model).vocab_size, lengths=(60, 40))
    exact = attribute(model, [batch])
    torch.testing.assert_close(attribute(model.half(), [batch]), exact, rtol=0.05, atol=0)


def test_float16_retries_with_a_smaller_loss(monkeypatch):
    model = tiny_model("llama", seed=4).half()
    batch = make_batch(96)
    expected = attribute(model, [batch])
    monkeypatch.setattr(attribution, "_FLOAT16_SCALES", (2.0**40, 2.0**4))
    torch.testing.assert_close(attribute(model, [batch]), expected, rtol=0.01, atol=0)


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].eval()
    before = [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    attribute(model, [make_batch(96)])
    assert [p.requires_grad for p in model.parameters()] == before
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_can_be_a_mapping(side):
    model = tiny_model("llama", seed=4)
    examples = [
        Example(tuple(range(1, n)), (-100, *range(2, n)), row) for row, n in enumerate((9, 5, 7))
    ]
    batch = collate(examples, range(3), pad_token_id=0, padding_side=side)
    labels = batch.labels.masked_fill(batch.attention_mask == 0, 3)  # never learnt from
    given = {
        "input_ids": batch.input_ids.int(),
        "attention_mask": batch.attention_mask.bool(),
        "labels": labels,
    }
    assert torch.equal(attribute(model, [given]), attribute(model, [batch]))
    right = collate(examples, range(3), pad_token_id=0)
    torch.testing.assert_close(attribute(model, [given]), attribute(model, [right]))
    alone = collate(examples, [0], pad_token_id=0)
    unpadded = {"input_ids": alone.input_ids, "labels": alone.labels}
    assert torch.equal(attribute(model, [unpadded]), attribute(model, [alone]))


IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": IDS}, r"needs labels, a \(B, T\) tensor of integers; here it is NoneType"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"needs input_ids, .* here it is \(4,\)"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"one shape, not \(2, 4\), \(2, 3\), \(2, 4\)"),
        (IDS, "a batch is a Tensor: give pkt_fast.data.Batch objects, or mappings"),
    ],
)
def test_other_batches_are_refused(batch, words):
    with pytest.raises(DataError, match=words) as caught:
        attribute(tiny_model("llama"), [batch])
    assert "\n" not in str(caught.value)


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(DataError, match="no batch"):
        attribute(model, [])
    with pytest.raises(ConfigError, match="absolute, signed, net"):
        attribute(model, [make_batch(96)], reduction="mean")
    batch = make_batch(96)
    empty = Batch(
        batch.input_ids,
        batch.attention_mask,
        torch.full_like(batch.labels, -100),
        batch.position_ids,
        batch.rows,
    )
    with pytest.raises(DataError, match="no supervised token"):
        attribute(model, [empty])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="layer 2 gives NaN"):
        attribute(model, [make_batch(96)])
