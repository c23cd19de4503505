"""The figures' numbers against direct computation, and what analyze() writes."""

import importlib.util
import json

import pytest
import torch
import toy_tokenizers
from models import tiny_model
from toy_pairs import TOKENIZER, sums

from pkt_fast.analysis import (
    analyze,
    basis_moment,
    cka_matrix,
    layer_activations,
    recomposition_cosines,
    round_trip,
)
from pkt_fast.data import batches, collate, encode
from pkt_fast.delta import LayerDelta, LowRank
from pkt_fast.errors import NumericsError, OutputError
from pkt_fast.phases import AlignedPositions, processing_batches

ROWS = sums(6, 4)


def model(family="llama", seed=0, **options):
    return tiny_model(family, seed=seed, vocab_size=len(TOKENIZER), **options)


def batched(size=7):
    return batches(encode(ROWS, TOKENIZER), size, pad_token_id=2)


def unit(rows):
    return torch.nn.functional.normalize(rows.double(), dim=-1)


def cosine(x, y):
    return float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def test_activations_are_those_of_single_rows():
    net = model()
    found = layer_activations(net, batched(), interface="block")
    singly = layer_activations(net, batched(1), interface="block")
    assert len(found) == 4
    for ours, theirs in zip(found, singly, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_activations_stop_at_max_rows():
    net = model()
    full = layer_activations(net, batched())
    some = layer_activations(net, batched(), max_rows=11)
    assert [len(rows) for rows in some] == [11] * 4
    assert torch.equal(some[2], full[2][:11])


def test_activations_that_are_not_finite_name_the_layer():
    net = model()
    layer_activations(net, batched())
    with torch.no_grad():
        net.model.layers[2].mlp.down_proj.weight[1, 1] = float("nan")
    with pytest.raises(NumericsError, match="layer 2"):
        layer_activations(net, batched())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomposition_equals_the_paper_written_out(family):
    """Decompose into V coefficients, recompose from them, for bases made by pinv."""
    net = model(family)
    acts = layer_activations(net, batched())
    output = unit(torch.linalg.pinv(net.get_output_embeddings().weight.detach().double()).T)
    incoming = unit(net.get_input_embeddings().weight.detach())
    found = recomposition_cosines(net, acts)
    for name, basis in (("output", output), ("input", incoming)):
        expected = [cosine(h, (unit(h) @ basis.T) @ basis) for h in acts]
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_many_random_vectors_recompose_almost_exactly():
    net = tiny_model("llama", vocab_size=9000, hidden_size=32)
    moment = basis_moment(net, "random")
    h = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).double()
    assert cosine(h, h @ moment) > 0.99
    assert torch.equal(moment, basis_moment(net, "random"))
    assert not torch.equal(moment, basis_moment(net, "random", seed=1))
    # Unit vectors, all of them: the trace is their number.
    assert float(moment.trace()) == pytest.approx(9000)


def test_the_input_basis_leaves_the_embedding_alone():
    net = model().double()
    before = net.get_input_embeddings().weight.detach().clone()
    basis_moment(net, "input")
    assert torch.equal(before, net.get_input_embeddings().weight)


def test_an_embedding_of_another_width_has_no_input_basis():
    net = model("opt", word_embed_proj_dim=24)
    wide = net.get_input_embeddings().weight.shape[1]
    moment = basis_moment(net, "input")
    from pkt_fast.anatomy import Anatomy

    assert (moment is None) == (wide != Anatomy.of(net).hidden_size)


def test_round_trip_is_exact_for_dual_and_logit_only():
    net = model()
    trips = round_trip(net, layer_activations(net, batched()))
    assert trips["dual"] == pytest.approx([1.0] * 4, abs=1e-5)
    assert trips["logit"] == pytest.approx([1.0] * 4, abs=1e-5)
    assert all(value < 0.999 for value in trips["frame"])


def test_cka_matrix_has_rows_of_the_first():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(40, d, generator=generator) for d in (5, 9)]
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    ys = [3 * xs[0] @ turn + 1, torch.randn(40, 6, generator=generator), xs[1]]
    matrix = cka_matrix(xs, ys)
    assert [len(row) for row in matrix] == [3, 3]
    assert matrix[0][0] == pytest.approx(1, abs=1e-6)
    assert matrix[1][2] == pytest.approx(1, abs=1e-6)
    x, y = (z.double() - z.double().mean(0) for z in (xs[1], ys[1]))
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert matrix[1][1] == pytest.approx(float(expected), rel=1e-6)


def delta_of(net):
    path = "model.layers.1.mlp.down_proj"
    out, inner = net.get_submodule(path).weight.shape
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=generator) for s in ((2, inner), (out, 2)))
    return LayerDelta(
        {path: LowRank(down, up, 2.0)}, {"peft_type": "LORA", "lora_alpha": 4, "r": 2}
    )


@pytest.fixture(scope="module")
def analysis():
    source = model(seed=1, num_hidden_layers=6)
    target = model(seed=2, hidden_size=32)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    found = analyze(source, target, ROWS, TOKENIZER, delta=delta_of(target), batch_size=5)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    return found


def test_analyze_measures_before_and_after(analysis):
    assert analysis.positions == sum(e.num_supervised for e in encode(ROWS, TOKENIZER))
    shapes = {name: (len(m), len(m[0])) for name, m in analysis.cka.items()}
    assert shapes == {
        "source × target": (6, 4),
        "target × target": (4, 4),
        "source × target after": (6, 4),
        "target × target after": (4, 4),
    }
    assert [analysis.cka["target × target"][i][i] for i in range(4)] == pytest.approx([1.0] * 4)
    after = [analysis.cka["target × target after"][i][i] for i in range(4)]
    assert after[0] == pytest.approx(1, abs=1e-6)
    assert after[1] < 0.999
    assert {len(values) for values in analysis.prediction.values()} == {4}


def test_a_model_predicts_itself_perfectly_through_the_dual():
    net = model(seed=1)
    found = analyze(net, net, ROWS, TOKENIZER)
    assert found.prediction["dual"] == pytest.approx([1.0] * 4, abs=1e-5)


def test_save_writes_numbers_tables_and_pictures(analysis, tmp_path):
    written = {path.name for path in analysis.save(tmp_path / "a")}
    assert {"analysis.json", "analysis.md"} <= written
    if importlib.util.find_spec("matplotlib") is not None:
        for name in ("cka.png", "recomposition.png", "round_trip.png"):
            assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "a" / "analysis.json").read_text()) == analysis.as_dict()
    text = (tmp_path / "a" / "analysis.md").read_text()
    assert text.count("## CKA") == 4
    with pytest.raises(OutputError, match="not empty"):
        analysis.save(tmp_path / "a")


def test_save_without_matplotlib(analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = [path.name for path in analysis.save(tmp_path / "a")]
    assert names == ["analysis.json", "analysis.md"]


def test_analyze_aligns_texts_that_are_cut_differently():
    other = toy_tokenizers.metaspace()
    source = tiny_model("llama", vocab_size=len(other))
    examples = encode(ROWS, TOKENIZER)
    found = analyze(source, model(), ROWS, (other, TOKENIZER))
    assert found.positions == examples.summary.supervised_tokens
    aligned = AlignedPositions.across(examples, other)
    # The first layer's rows, example by example without any batching.
    expected = []
    for example, positions in zip(aligned.examples, aligned.positions, strict=True):
        batch = collate([example], [0], pad_token_id=0)
        expected.append(layer_activations(source, [batch], [positions])[0])
    batches = processing_batches(aligned.examples, range(len(examples)), 4, 0)
    together = layer_activations(source, batches, aligned.positions)[0]
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-4, atol=1e-5)
