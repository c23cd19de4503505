"""The closed-form solver against least squares on the materialised rows."""

import json

import pytest
import torch
from models import tiny_model
from peft import PeftModel
from toy_pairs import TOKENIZER, rows, sized_model, sums

import pkt_fast
from pkt_fast.anatomy import Anatomy
from pkt_fast.data import collate, encode
from pkt_fast.errors import ConfigError, ModelError, NumericsError
from pkt_fast.pairing import source_for
from pkt_fast.ridge import OutputMoments, output_projections, solve, truncate
from pkt_fast.semantics import SemanticMap

ROWS = sums(6, 4)
SOLVE = {"solver": "ridge", "micro_batch_size": 8, "progress": False}


def pair(family="llama"):
    return sized_model(family, 1, 48, 5), sized_model(family, 2, 32, 4)


def transfer(source, target, data=ROWS, **options):
    return pkt_fast.transfer(source, target, data, tokenizer=TOKENIZER, **{**SOLVE, **options})


def ridge_by_lstsq(u, e, penalty):
    """argmin Σ‖ΔW·u − e‖² + λ‖ΔW‖² as ordinary least squares on rows √λ·I with answer 0."""
    extra = penalty**0.5 * torch.eye(u.shape[1], dtype=u.dtype)
    left = torch.cat([u, extra])
    right = torch.cat([e, e.new_zeros(len(extra), e.shape[1])])
    return torch.linalg.lstsq(left, right).solution.T


def moments_of(u, h, y, *, own_length=False, batch=7):
    moments = OutputMoments(u.shape[1], h.shape[1])
    for start in range(0, len(u), batch):
        cut = slice(start, start + batch)
        moments.add(u[cut], h[cut], y[cut], own_length)
    return moments


# --------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("own_length", [False, True])
@pytest.mark.parametrize("shape", [(60, 9, 5), (8, 13, 4), (40, 3, 17)], ids=str)
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 3.0])
def test_solution_equals_least_squares_on_the_rows(shape, strength, own_length):
    count, wide, narrow = shape
    u, h = rows(count, wide, seed=1), rows(count, narrow, seed=2)
    y = 5 * rows(count, narrow, seed=3)
    moments = moments_of(u, h, y, own_length=own_length)
    if own_length:
        y = y / y.norm(dim=1, keepdim=True) * h.norm(dim=1, keepdim=True)
    expected = ridge_by_lstsq(u, y - h, strength * float((u * u).sum()) / wide)
    got = solve(moments, strength)
    assert (got - expected).norm() / expected.norm() < 1e-9
    error = (h + u @ got.T - y).square().sum() / y.square().sum()
    assert moments.relative_error(got) == pytest.approx(float(error), rel=1e-9)
    assert moments.relative_error() == pytest.approx(
        float((h - y).square().sum() / y.square().sum()), rel=1e-12
    )
    assert moments.rows == count


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_streamed_moments_equal_whole_ones(batch):
    u, h, y = rows(37, 6, seed=4), rows(37, 5, seed=5), rows(37, 5, seed=6)
    streamed, whole = moments_of(u, h, y, batch=batch), moments_of(u, h, y, batch=37)
    for name in ("uu", "ue", "ee", "yy"):
        torch.testing.assert_close(
            getattr(streamed, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("rank", [1, 3, 8, 40])
@pytest.mark.parametrize("shape", [(50, 12, 8), (50, 8, 12)], ids=str)
def test_truncation_is_the_best_of_its_rank_for_the_outputs(rank, shape):
    count, wide, narrow = shape
    u = rows(count, wide, seed=7) * torch.logspace(0, 2, wide, dtype=torch.float64)
    delta = rows(narrow, wide, seed=8)
    up, down = truncate(delta, u.T @ u, rank)
    kept = min(rank, wide, narrow)
    assert up.shape == (narrow, kept)
    assert down.shape == (kept, wide)
    outputs = u @ delta.T
    error = (outputs - u @ (up @ down).T).norm()
    best = torch.linalg.svdvals(outputs)[kept:].norm()
    assert error == pytest.approx(float(best), rel=1e-8, abs=1e-8 * float(outputs.norm()))
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    if kept < min(wide, narrow):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        plain = left[:, :kept] * values[:kept] @ right[:kept]
        assert error < 0.99 * (outputs - u @ plain.T).norm()


def test_zero_change_stays_zero():
    up, down = truncate(torch.zeros(4, 6, dtype=torch.float64), torch.eye(6).double(), 2)
    assert torch.isfinite(up).all()
    assert not (up @ down).any()


# --------------------------------------------------------------------------- whole transfers


def materialised(source, target, layer, interface, recompose, own_length):
    """(u, e, h) at the supervised positions, one unpadded example after the other."""
    anatomy = Anatomy.of(target)
    _, module = anatomy.output_projection(layer, interface)
    link = source_for(Anatomy.of(source).num_layers, anatomy.num_layers, layer)
    mapping = SemanticMap.between(source, target, recompose)
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    parts = []
    examples = encode(ROWS, TOKENIZER)
    try:
        for i in range(len(examples)):
            batch = collate(examples, [i], pad_token_id=0)
            keep = batch.supervised
            inputs = batch.model_inputs()
            with torch.no_grad():
                with pkt_fast.capture(source, link.source, interface=interface) as acts:
                    source(**inputs)
                target(**inputs)
            hidden = torch.stack([acts[k].reshape(*keep.shape, -1)[keep] for k in link.source])
            weights = torch.tensor([1 - link.weight, link.weight], dtype=hidden.dtype)
            hidden = (hidden * weights[: len(hidden), None, None]).sum(0)
            u, h = (value.reshape(*keep.shape, -1)[keep] for value in seen.pop())
            y = mapping(hidden)
            if own_length:
                y = y / y.norm(dim=1, keepdim=True) * h.norm(dim=1, keepdim=True)
            parts.append((u, y - h, y))
    finally:
        handle.remove()
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("objective", ["cosine", "squared"])
@pytest.mark.parametrize("interface", ["mlp", "attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_transfer_equals_the_materialised_solution(family, interface, objective):
    if family == "opt":
        source, target = (
            tiny_model("opt", seed=s, vocab_size=len(TOKENIZER), num_hidden_layers=n)
            for s, n in ((1, 5), (2, 4))
        )
    else:
        source, target = pair(family)
    source, target = source.double(), target.double()
    u, e, y = materialised(source, target, 0, interface, "dual", objective == "cosine")
    result = transfer(
        source, target, layers=[0], interface=interface, recompose="dual", objective=objective,
        rank=64, alpha=11.0, ridge=0.05,
    )
    expected = ridge_by_lstsq(u, e, 0.05 * float(u.square().sum()) / u.shape[1])
    (change,) = result.delta.changes.values()
    assert change.matrix().dtype == torch.float64
    assert (change.matrix() - expected).norm() / expected.norm() < 1e-7
    before, after = result.history
    assert before["layer_loss"] == pytest.approx(float(e.square().sum() / y.square().sum()))
    left = e - u @ expected.T
    assert after["layer_loss"] == pytest.approx(float(left.square().sum() / y.square().sum()))
    assert before["rows"] == len(u)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_batch_layout_gives_the_same_adapter(family):
    first = transfer(*pair(family), micro_batch_size=1, layers=[1, 2])
    padded = transfer(*pair(family), micro_batch_size=24, layers=[1, 2])
    for path, change in first.delta.changes.items():
        other = padded.delta.changes[path].matrix()
        assert (change.matrix() - other).norm() / other.norm() < 1e-4


def test_same_seed_same_bytes(tmp_path):
    for name in "ab":
        transfer(*pair(), layers="all").save(tmp_path / name)
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["phases"]["solve"]["tokens"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_saved_adapter_computes_the_solution(family, tmp_path):
    source, target = pair(family)
    result = transfer(source, target, layers=[1])
    result.save(tmp_path / "out")
    assert len(result.delta.changes) == 1
    batch = collate(encode(ROWS, TOKENIZER), [0, 1], pad_token_id=0).model_inputs()
    with torch.no_grad():
        ours = result.model(**batch).logits
        plain = pair(family)[1](**batch).logits
        theirs = PeftModel.from_pretrained(pair(family)[1], tmp_path / "out").eval()(**batch).logits
    torch.testing.assert_close(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3


def test_frontier_solves_on_top_of_the_layers_below():
    joint = transfer(*pair(), layers=[0, 2])
    frontier = transfer(*pair(), layers=[0, 2], schedule="frontier")
    assert [record["step"] for record in frontier.history] == [0, 1, 2, 3]
    first, second = sorted(joint.delta.changes)
    same = joint.delta.changes[first].matrix(), frontier.delta.changes[first].matrix()
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-6)
    moved = joint.delta.changes[second].matrix(), frontier.delta.changes[second].matrix()
    assert (moved[0] - moved[1]).norm() / moved[0].norm() > 1e-3


def test_warm_start_begins_where_ridge_ends():
    quick = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "layers": [1]}
    cold = transfer(*pair(), solver="adamw", **quick)
    warm = transfer(*pair(), solver="adamw", warm_start=True, **quick)
    assert warm.history[0]["layer_loss"] < 0.8 * cold.history[0]["layer_loss"]
    assert set(warm.delta.changes) == set(cold.delta.changes)
    assert warm.report["phases"]["solve"]["seconds"] > 0
    assert "solve" not in cold.report["phases"]


def test_ridge_strength_holds_the_change_back():
    def size(ridge):
        result = transfer(*pair(), layers=[0], ridge=ridge)
        return sum(float(change.matrix().norm()) for change in result.delta.changes.values())

    assert size(1e-3) > size(1.0) > size(1e3) > 0


def test_no_change_of_the_source_no_change_of_the_target():
    source, target = pair()
    result = transfer(source, target, source_base=source, objective="squared", recompose="dual")
    assert all(float(c.matrix().abs().max()) < 1e-5 for c in result.delta.changes.values())
    assert result.history[0]["layer_loss"] < 1e-9


def test_rank_beyond_the_matrix():
    result = transfer(*pair(), layers=[0], rank=100)
    (change,) = result.delta.changes.values()
    assert change.rank == 100
    assert not change.up[:, 32:].any()


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("solver", [{"solver": "ridge"}, {"solver": "adamw", "warm_start": True}])
@pytest.mark.parametrize("interface", ["block", "contribution"])
def test_interfaces_without_output_projection_are_refused(interface, solver):
    with pytest.raises(ModelError, match=f"layer 1 has none at interface='{interface}'"):
        transfer(*pair(), layers=[1], interface=interface, **solver)


def test_a_norm_after_the_projection_is_refused():
    source, target = sized_model("olmo2", 1, 48, 5), sized_model("olmo2", 2, 48, 4)
    with pytest.raises(ModelError, match="one linear module"):
        transfer(source, target, layers=[1])


def test_target_modules_must_reach_the_projection():
    with pytest.raises(ConfigError, match="down_proj"):
        transfer(*pair(), layers=[1], target_modules=["up_proj"])
    paths = output_projections(Anatomy.of(pair()[1]), [1], "mlp", ["down_proj"])
    assert paths == {1: "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ridge", "objective": "relation"},
        {"solver": "ridge", "objective": "none"},
        {"solver": "ridge", "warm_start": True},
        {"warm_start": True, "objective": "none"},
        {"ridge": 0.0},
        {"ridge": -1.0},
        {"solver": "sgd"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError):
        pkt_fast.TransferConfig(**settings)


def test_moments_that_are_not_finite():
    source, target = pair()
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="layer 1"):
        transfer(source, target, layers=[1])


def test_nonlinear_recompositions_are_solved_too():
    result = transfer(*pair(), layers=[1], recompose="softmax")
    before, after = result.history
    assert after["layer_loss"] < before["layer_loss"]
