"""Fitted, lens and coefficient maps, the transferred change, and the figures that judge them."""

import io
import json

import pytest
import torch
from models import tiny_model
from rich.console import Console
from toy_pairs import TOKENIZER, rows, sized_model, sums

import pkt_fast
from pkt_fast import SemanticBasis, SemanticMap, reference
from pkt_fast.anatomy import Anatomy
from pkt_fast.capture import capture
from pkt_fast.data import collate, encode
from pkt_fast.errors import ConfigError, ModelError, NumericsError
from pkt_fast.fitting import Affine, PairedMoments, fit_procrustes, fit_ridge, solve_ridge
from pkt_fast.maps import (
    CoefficientMap,
    PairedModels,
    build_maps,
    diagnose,
    judge_maps,
    split_examples,
    summarize,
)
from pkt_fast.pairing import source_for
from pkt_fast.phases import AlignedPositions
from pkt_fast.progress import Phases
from pkt_fast.vocabulary import SharedVocabulary, match_vocabularies

ROWS = sums(6, 4)
QUICK = {"epochs": 1, "batch_size": 12, "micro_batch_size": 6, "progress": False}


def pair(family="llama"):
    return sized_model(family, 1, 48, 5), sized_model(family, 2, 32, 4)


def transfer(source, target, **options):
    return pkt_fast.transfer(source, target, ROWS, tokenizer=TOKENIZER, **{**QUICK, **options})


def paired(source, target, layers=(1, 2), interface="block", batch_size=6):
    positions = AlignedPositions.same(encode(ROWS, TOKENIZER))
    counts = Anatomy.of(source).num_layers, Anatomy.of(target).num_layers
    return PairedModels(
        source,
        target,
        positions,
        positions,
        [source_for(*counts, layer) for layer in layers],
        interface,
        batch_size,
        (0, 0),
        match_vocabularies(len(TOKENIZER), len(TOKENIZER), TOKENIZER, TOKENIZER),
    )


def config(**options):
    return pkt_fast.TransferConfig.make(**options)


def layer_rows(model, layers, weight, examples, interface="block"):
    """The interpolated layer at the supervised positions, and the head's input: no padding."""
    hidden, heads = [], []
    data = encode(ROWS, TOKENIZER)
    for i in examples:
        batch = collate(data, [i], pad_token_id=0)
        with torch.no_grad(), capture(model, layers, interface=interface) as acts:
            found = []
            handle = Anatomy.of(model).head.register_forward_pre_hook(
                lambda m, args, found=found: found.append(args[0])
            )
            model(**batch.model_inputs())
            handle.remove()
        both = [acts[k].reshape(*batch.supervised.shape, -1)[batch.supervised] for k in layers]
        hidden.append(reference.interpolate(both, weight))
        heads.append(found[0][batch.supervised])
    return torch.cat(hidden), torch.cat(heads)


def affine_lstsq(x, y, strength):
    """argmin Σ‖M·x + c − y‖² + λ‖M‖², c free, as ordinary least squares; returns (M, c)."""
    penalty = strength * (x - x.mean(0)).square().sum() / x.shape[1]
    left = torch.cat([x, x.new_ones(len(x), 1)], 1)
    extra = torch.cat([penalty.sqrt() * torch.eye(x.shape[1]).to(x), x.new_zeros(x.shape[1], 1)], 1)
    answer = torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])
    solution = torch.linalg.lstsq(torch.cat([left, extra]), answer, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


# --------------------------------------------------------------------------- fitting


def moments_of(x, y, batch=7):
    moments = PairedMoments(x.shape[1], y.shape[1])
    for start in range(0, len(x), batch):
        moments.add(x[start : start + batch], y[start : start + batch])
    return moments


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_moments_equal_whole_ones(batch, mean):
    x, y = mean + rows(51, 6, seed=1), rows(51, 4, seed=2) - 3 * mean
    moments = moments_of(x, y, batch)
    xc, yc = x - x.mean(0), y - y.mean(0)
    assert moments.count == 51
    tolerance = {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(moments.mean_x, x.mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moments.xx, xc.T @ xc, **tolerance)
    torch.testing.assert_close(moments.xy, xc.T @ yc, **tolerance)
    torch.testing.assert_close(moments.yy, yc.square().sum(), **tolerance)


def test_an_empty_batch_changes_nothing():
    x, y = rows(9, 3, seed=1), rows(9, 2, seed=2)
    moments = moments_of(x, y)
    moments.add(x[:0], y[:0])
    torch.testing.assert_close(moments.xx, moments_of(x, y).xx)


@pytest.mark.parametrize("strength", [1e-9, 1e-2, 5.0])
@pytest.mark.parametrize("shape", [(60, 9, 5), (8, 13, 4), (40, 3, 17)], ids=str)
def test_ridge_fit_equals_least_squares_on_the_rows(shape, strength):
    count, wide, narrow = shape
    x, y = 2 + rows(count, wide, seed=1), rows(count, narrow, seed=2) - 5
    if count < wide and strength < 1e-6:
        strength = 1e-6
    fit = fit_ridge(moments_of(x, y), strength)
    matrix, offset = affine_lstsq(x, y, strength)
    assert (fit.matrix - matrix).norm() / matrix.norm() < 1e-6
    torch.testing.assert_close(fit.offset, offset, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_procrustes_recovers_a_rotation_scale_and_shift(sizes):
    wide, narrow = sizes
    rotation = torch.linalg.qr(rows(max(sizes), max(sizes), seed=3)).Q[:narrow, :wide]
    x = rows(70, wide, seed=4) + 3
    if narrow < wide:  # only what the projection keeps may vary, or it is not recoverable
        x = x @ rotation.T @ rotation + 1
    y = 2.5 * x @ rotation.T + rows(narrow, seed=5)
    fit = fit_procrustes(moments_of(x, y))
    torch.testing.assert_close(fit(x), y, rtol=1e-9, atol=1e-9)
    gram = fit.matrix @ fit.matrix.T if narrow <= wide else fit.matrix.T @ fit.matrix
    torch.testing.assert_close(gram, 6.25 * torch.eye(len(gram)).double(), rtol=1e-9, atol=1e-9)


def test_procrustes_beats_other_rotations_on_noisy_rows():
    x, y = rows(50, 5, seed=6), rows(50, 5, seed=7) + rows(50, 5, seed=6)
    fit = fit_procrustes(moments_of(x, y))
    best = (fit(x) - y).square().sum()
    xc, yc = x - x.mean(0), y - y.mean(0)
    for seed in range(50):
        rotation = torch.linalg.qr(rows(5, 5, seed=seed)).Q
        scale = ((xc @ rotation.T) * yc).sum() / xc.square().sum()
        assert (scale * xc @ rotation.T - yc).square().sum() > best
    nudged = fit.matrix @ torch.linalg.matrix_exp(1e-3 * (rows(5, 5) - rows(5, 5).T))
    assert (xc @ nudged.T - yc).square().sum() > best


def test_affine_maps_compose_and_invert():
    first, second = (Affine(rows(5, 5, seed=s), rows(5, seed=s + 9)) for s in (1, 2))
    x = rows(11, 5, seed=3)
    torch.testing.assert_close(second.after(first)(x), second(first(x)))
    back = first.inverse(1e-13, rows(5, seed=4))
    torch.testing.assert_close(back(first(x)), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 4), (3, 6)], ids=str)
def test_inverse_is_the_regularised_least_squares_answer(shape):
    forward, about = Affine(rows(*shape, seed=1), rows(shape[0], seed=2)), rows(shape[1], seed=3)
    y, strength = rows(shape[0], seed=4), 0.1
    penalty = strength * forward.matrix.square().sum() / shape[1]
    left = torch.cat([forward.matrix, penalty.sqrt() * torch.eye(shape[1]).double()])
    right = torch.cat([y - forward.offset, penalty.sqrt() * about])
    expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    torch.testing.assert_close(forward.inverse(strength, about)(y), expected)


def test_constant_activations_and_broken_ones():
    moments = moments_of(torch.ones(9, 3).double(), rows(9, 2))
    torch.testing.assert_close(fit_ridge(moments, 1e-2)(torch.ones(1, 3))[0], moments.mean_y)
    with pytest.raises(NumericsError, match="ridge strength"):
        solve_ridge(torch.full((2, 2), torch.nan).double(), rows(2, 1), 0.1)


# --------------------------------------------------------------------------- coefficient maps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["softmax", "top_k", "threshold"])
def test_coefficient_maps_equal_the_reference(kind, dtype):
    source, target = rows(301, 24, seed=1), rows(301, 13, seed=2)
    shared = SharedVocabulary(torch.arange(0, 300, 3), torch.arange(1, 301, 3))
    hidden = rows(3, 5, 24, seed=3).to(dtype)
    mapping = CoefficientMap.between(
        SemanticBasis.from_weight(source), SemanticBasis.from_weight(target), kind, shared,
        temperature=0.2, k=9, threshold=0.1,
    )
    expected = reference.decompose_nonlinear(
        hidden.double().flatten(0, 1),
        reference.semantic_basis(source)[shared.source],
        reference.semantic_basis(target)[shared.target],
        kind=kind, temperature=0.2, k=9, threshold=0.1,
    ).reshape(3, 5, 13)
    got = mapping(hidden).double()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (got - expected).norm() / expected.norm() < tolerance


def test_coefficient_maps_refuse():
    basis = SemanticBasis.from_weight(rows(20, 4))
    shared = SharedVocabulary(torch.arange(20), torch.arange(20))
    with pytest.raises(ConfigError, match="share 20 tokens"):
        CoefficientMap.between(basis, basis, "top_k", shared, k=21)
    with pytest.raises(ConfigError, match="softmax, top_k, threshold"):
        CoefficientMap.between(basis, basis, "frame", shared)


# --------------------------------------------------------------------------- maps fitted on models


@pytest.mark.parametrize("interface", ["mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fitted_maps_equal_the_materialised_fit(family, interface):
    source, target = (m.double() for m in pair(family))
    models, fit_on = paired(source, target, interface=interface), list(range(0, 24, 2))
    built = build_maps(models, config(recompose="fitted", fit_ridge=0.1), fit_on)
    for link in models.pairs:
        x, _ = layer_rows(source, link.source, link.weight, fit_on, interface)
        y, _ = layer_rows(target, (link.target,), 0.0, fit_on, interface)
        matrix, offset = affine_lstsq(x, y, 0.1)
        mapping = built.maps[link.target]
        assert mapping.matrix.dtype == torch.float64
        assert (mapping.matrix - matrix).norm() / matrix.norm() < 1e-7
        torch.testing.assert_close(mapping.offset, offset, rtol=1e-6, atol=1e-7)
    assert not built.round_trips


def test_lens_maps_equal_the_materialised_fit():
    source, target = (m.double() for m in pair())
    models, fit_on = paired(source, target, [2]), list(range(24))
    mapping = build_maps(models, config(recompose="lens", fit_ridge=0.05), fit_on).maps[2]
    link = models.pairs[0]
    x, source_head = layer_rows(source, link.source, link.weight, fit_on)
    y, target_head = layer_rows(target, (2,), 0.0, fit_on)
    lens_s, shift_s = affine_lstsq(x, source_head, 0.05)
    lens_t, shift_t = affine_lstsq(y, target_head, 0.05)
    wanted = reference.align_dual(
        x @ lens_s.T + shift_s, source.lm_head.weight, target.lm_head.weight
    )
    penalty = 0.05 * lens_t.square().sum() / lens_t.shape[1]
    gram = lens_t.T @ lens_t + penalty * torch.eye(32).double()
    deviation = wanted - (y.mean(0) @ lens_t.T + shift_t)
    expected = y.mean(0) + torch.linalg.solve(gram, lens_t.T @ deviation.T).T
    got = mapping(x)
    assert (got - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("recompose", ["fitted", "lens"])
def test_padding_and_batches_do_not_change_a_fit(recompose):
    source, target = (m.double() for m in pair())
    settings = config(recompose=recompose)
    one, many = (
        build_maps(paired(source, target, batch_size=size), settings, range(24)).maps
        for size in (1, 24)
    )
    for layer, mapping in one.items():
        other = many[layer].matrix
        assert (mapping.matrix - other).norm() / other.norm() < 1e-7


@pytest.mark.parametrize("recompose", ["dual", "logit", "lens", "fitted"])
def test_a_model_maps_to_itself(recompose):
    # Narrow and with many more rows than channels, so that every direction is seen.
    target = tiny_model(
        "llama", seed=3, vocab_size=len(TOKENIZER), hidden_size=16, num_attention_heads=2
    ).double()
    models = paired(target, target, [0, 2])
    built = build_maps(models, config(recompose=recompose, fit_ridge=1e-10), range(20))
    for alignment in judge_maps(models, built, range(20, 24)):
        if len(alignment.source) == 1 and alignment.source[0] == alignment.target:
            assert alignment.cosine == pytest.approx(1, abs=1e-4)
            assert alignment.r2 == pytest.approx(1, abs=1e-3)
            assert alignment.chance < 0.99
        if recompose != "fitted":
            assert alignment.round_trip == pytest.approx(1, abs=1e-4)


# --------------------------------------------------------------------------- judging


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dual_is_an_exact_round_trip_and_frame_is_not(family):
    models = paired(*pair(family))
    dual, frame = (
        judge_maps(models, build_maps(models, config(recompose=r), []), range(20, 24))
        for r in ("dual", "frame")
    )
    assert all(a.round_trip == pytest.approx(1, abs=1e-6) for a in dual)
    assert all(a.round_trip < 0.999 for a in frame)
    assert all(a.r2 is None for a in frame)
    assert all(a.r2 is not None for a in dual)


def test_figures_equal_the_materialised_ones():
    source, target = (m.double() for m in pair())
    models, held_out = paired(source, target, [2], batch_size=24), list(range(18, 24))
    built = build_maps(models, config(recompose="fitted"), range(18))
    (alignment,) = judge_maps(models, built, held_out)
    link = models.pairs[0]
    x, _ = layer_rows(source, link.source, link.weight, held_out)
    y, _ = layer_rows(target, (2,), 0.0, held_out)
    predicted = built.maps[2](x)
    assert alignment.rows == len(y)
    cosine = torch.cosine_similarity(predicted, y, dim=-1).mean()
    assert alignment.cosine == pytest.approx(float(cosine), abs=1e-9)
    residual = (predicted - y).square().sum() / (y - y.mean(0)).square().sum()
    assert alignment.r2 == pytest.approx(1 - float(residual), abs=1e-9)
    assert alignment.cosine > alignment.chance


def test_held_out_examples_are_not_fitted_on():
    fit_on, held_out = split_examples(100, 64, 7)
    assert (len(fit_on), len(held_out)) == (58, 6)
    assert not set(fit_on) & set(held_out)
    assert split_examples(100, 64, 7) == (fit_on, held_out)
    assert split_examples(100, 64, 8) != (fit_on, held_out)
    assert split_examples(1, 64, 0) == ([0], [])
    assert [len(part) for part in split_examples(2, 64, 0)] == [1, 1]
    source, target = pair()
    data = encode(ROWS, TOKENIZER)
    models, seen = paired(source, target), []
    handle = source.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(map(len, kwargs["input_ids"])), with_kwargs=True
    )
    fit_on, _ = split_examples(len(data), 10, 0)
    build_maps(models, config(recompose="fitted"), fit_on)
    handle.remove()
    assert len(seen) == len(fit_on) == 9


def test_nothing_held_out_is_said():
    models = paired(*pair())
    alignments = judge_maps(models, build_maps(models, config(recompose="dual"), []), [])
    assert [a.rows for a in alignments] == [0, 0]
    assert "nothing held out" in summarize(alignments)


# --------------------------------------------------------------------------- whole transfers

EVERY = [
    {"recompose": "dual"},
    {"recompose": "softmax"},
    {"recompose": "top_k", "top_k": 20},
    {"recompose": "threshold", "threshold": 0.01},
    {"recompose": "fitted"},
    {"recompose": "fitted", "fit": "procrustes"},
    {"recompose": "lens"},
]


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_recomposition_transfers_and_repeats_itself(family, options, tmp_path):
    names = ["first", "second"] if family == "llama" else ["first"]
    for name in names:
        result = transfer(*pair(family), layers=[1, 2], interface="block", **options)
        result.save(tmp_path / name)
    adapters = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}
    assert len(adapters) == 1
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert [a["target"] for a in report["alignment"]] == [1, 2]
    assert all(-1 <= a["cosine"] <= 1 for a in report["alignment"])
    assert "layer 1: cosine" in report["summary"]["alignment"]


def test_each_target_layer_has_its_own_map():
    source, target = pair()
    result = transfer(
        source, target, layers=[1, 2], recompose="fitted", objective="squared",
        output_loss="none", interface="block", learning_rate=1e-12, fit_examples=24,
    )
    models = paired(source, result.model.unload())
    fit_on, _ = split_examples(24, 24, 0)
    built = build_maps(models, config(recompose="fitted"), fit_on)
    losses = [record["layer_loss"] for record in result.history]
    errors = []
    for link in models.pairs:
        x, _ = layer_rows(source, link.source, link.weight, range(24))
        y, _ = layer_rows(models.target, (link.target,), 0.0, range(24))
        wanted = built.maps[link.target](x)
        errors.append((y - wanted).square().sum(-1) / wanted.square().sum(-1))
    counts = [record["rows"] for record in result.history]
    mean = sum(l * n for l, n in zip(losses, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@pytest.mark.parametrize("recompose", ["frame", "dual", "logit", "fitted", "lens"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_source_that_did_not_change_asks_for_nothing(family, recompose):
    source, target = pair(family)
    result = transfer(
        source, target, source_base=source, recompose=recompose, objective="squared",
        interface="block", layers=[1], output_loss="none",
    )
    assert result.history[0]["layer_loss"] < 1e-9


@pytest.mark.parametrize("recompose", ["frame", "dual", "fitted"])
def test_supervision_is_own_activation_plus_mapped_change(recompose):
    base, target = (m.double() for m in pair())
    source = pair()[0].double()
    with torch.no_grad():
        for parameter in source.model.layers.parameters():
            parameter.mul_(1.1)
    options = {"recompose": recompose, "layers": [1], "interface": "block"}
    result = transfer(
        source, target, source_base=base, objective="squared", output_loss="none",
        batch_size=24, learning_rate=1e-12, fit_examples=24, **options,
    )
    models = paired(base, result.model.unload(), [1])
    fit_on, _ = split_examples(24, 24, 0)
    matrix = build_maps(models, config(**options), fit_on).maps[1].matrix
    link = models.pairs[0]
    after, _ = layer_rows(source, link.source, link.weight, range(24))
    before, _ = layer_rows(base, link.source, link.weight, range(24))
    own, _ = layer_rows(models.target, (1,), 0.0, range(24))
    change = (after - before) @ matrix.T
    expected = (change.square().sum(-1) / (own + change).square().sum(-1)).mean()
    assert float(expected) > 1e-4
    assert result.history[0]["layer_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_source_base_can_be_a_path_and_its_store_is_reused(tmp_path):
    base, _ = pair()
    base.save_pretrained(tmp_path / "base")
    source, target = pair()
    with torch.no_grad():
        source.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    options = {
        "recompose": "dual", "interface": "block", "layers": [1, 3], "store": str(tmp_path / "s"),
    }
    first = transfer(source, target, source_base=tmp_path / "base", **options)
    assert "untuned target" in first.report["phases"]
    again = transfer(source, pair()[1], source_base=base, **options)
    assert "untuned target" not in again.report["phases"]
    memory = transfer(source, pair()[1], source_base=base, **{**options, "store": "memory"})
    for path, change in first.delta.changes.items():
        torch.testing.assert_close(again.delta.changes[path].matrix(), change.matrix())
        torch.testing.assert_close(memory.delta.changes[path].matrix(), change.matrix())
    other = transfer(source, pair()[1], source_base=source, **options)
    assert "untuned source" in other.report["phases"]
    assert "untuned target" not in other.report["phases"]


def test_source_base_refusals():
    source, target = pair()
    with pytest.raises(ModelError, match="source_base has 4 layers of width 32"):
        transfer(source, target, source_base=target)
    with pytest.raises(ConfigError, match="needs a linear map"):
        transfer(source, target, source_base=source, recompose="softmax")
    with pytest.raises(ConfigError, match="supervises layers"):
        transfer(source, target, source_base=source, objective="none")


def test_diagnose_says_what_the_report_will_say():
    options = {"layers": [0, 2], "recompose": "fitted", "fit_examples": 20}
    source, target = pair()
    before = {name: p.clone() for name, p in target.named_parameters()}
    alignments = diagnose(source, target, ROWS, tokenizer=TOKENIZER, **{**QUICK, **options})
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    result = transfer(source, target, **options)
    assert [a.as_dict() for a in alignments] == result.report["alignment"]
    assert summarize(alignments) == result.report["summary"]["alignment"]


def test_a_shown_transfer_prints_the_alignment_before_it_trains(monkeypatch):
    shown = []

    def said(phases, line):
        shown.append((line, list(phases.clock.seconds)))

    monkeypatch.setattr(Phases, "say", said)
    result = transfer(*pair(), recompose="dual", layers=[0, 2])
    ((line, phases),) = shown
    assert line == f"alignment: {result.report['summary']['alignment']}"
    assert phases[-1] == "judge map"
    assert "steer" not in phases


@pytest.mark.parametrize("visible", [True, False])
def test_a_line_is_said_where_bars_are(visible):
    out = io.StringIO()
    Phases(visible, console=Console(file=out, force_terminal=True, width=40)).say("R² [0.5] " * 9)
    assert out.getvalue() == ("R² [0.5] " * 9 + "\n" if visible else "")
    Phases(True, console=Console(file=out, force_terminal=False)).say("to a file")
    assert "to a file" not in out.getvalue()


def test_diagnose_refuses_objectives_that_align_nothing():
    with pytest.raises(ConfigError, match="objective='none' aligns nothing"):
        diagnose("nowhere", "nowhere", ROWS, method="kd")


def test_many_layers_are_summarised_by_their_range():
    alignments = diagnose(
        sized_model("llama", 1, 48, 6), sized_model("llama", 2, 32, 5), ROWS,
        tokenizer=TOKENIZER, recompose="dual", layers="all", progress=False,
    )
    assert summarize(alignments).startswith("5 layers: cosine ")


@pytest.mark.parametrize(
    "settings",
    [{"fit": "lasso"}, {"fit_ridge": 0.0}, {"fit_examples": 0}, {"recompose": "pinv"}],
    ids=str,
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        pkt_fast.TransferConfig(**settings)


def test_fitted_maps_need_no_linear_algebra_of_the_head():
    # A head of one repeated row spans nothing; a map fitted on activations does not look at it.
    source, target = pair()
    with torch.no_grad():
        target.lm_head.weight.copy_(target.lm_head.weight[:1].expand_as(target.lm_head.weight))
    built = build_maps(paired(source, target), config(recompose="fitted"), range(20))
    assert isinstance(built.maps[1], SemanticMap)
    assert built.maps[1].matrix.norm() > 0
