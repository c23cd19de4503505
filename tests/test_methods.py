"""The other published methods: what each computes, and that all of them ship the same adapter."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from toy_pairs import TOKENIZER, sized_model, sums

import pkt_fast
from pkt_fast import TransferConfig, stages
from pkt_fast.anatomy import Anatomy
from pkt_fast.config import METHOD_SETTINGS, METHODS
from pkt_fast.data import collate, encode
from pkt_fast.errors import ConfigError, DataError, ModelError, NumericsError
from pkt_fast.methods import laten, maker_of, seeking
from pkt_fast.methods.delta_maker import low_rank
from pkt_fast.objectives import Rows, hidden_term, learned_projection
from pkt_fast.progress import Phases

ROWS = sums(4, 4)
QUICK = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 3e-3}
OTHERS = [method for method in METHODS if method != "semalign"]


def pair(family="llama"):
    narrow = {} if family == "gpt2" else {"intermediate_size": 60}
    return sized_model(family, 1, 48, 5), sized_model(family, 2, 32, 3, **narrow)


def transfer(source, target, data=ROWS, **options):
    return pkt_fast.transfer(
        source, target, data, tokenizer=TOKENIZER, progress=False, **{**QUICK, **options}
    )


def batch_of(rows, count=4):
    examples = encode(rows, TOKENIZER)
    return collate(examples, range(count), pad_token_id=0)


# --------------------------------------------------------------------------- every method


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", OTHERS)
def test_adapter_reproduces_the_model_on_the_untouched_target(method, family, tmp_path):
    source, target = pair(family)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    out = tmp_path / "out"
    result = transfer(source, target, method=method, alpha=24.0, rank=8, output_dir=out)
    inputs = batch_of(ROWS).model_inputs()
    with torch.no_grad():
        trained = result.model(**inputs).logits
        loaded = PeftModel.from_pretrained(pair(family)[1], out).eval()
        torch.testing.assert_close(loaded(**inputs).logits, trained, rtol=0, atol=1e-6)
        assert (trained - pair(family)[1](**inputs).logits).abs().max() > 1e-4
    restored = result.model.unload().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in restored.items())


@pytest.mark.parametrize("method", OTHERS)
def test_loss_falls(method):
    history = transfer(*pair(), method=method, epochs=6).history
    names = [name for name in history[0] if name.endswith("_loss")]
    steps = len(history) // 6
    for name in names:
        first, last = (
            sum(record[name] for record in part) for part in (history[:steps], history[-steps:])
        )
        assert last < first, name


@pytest.mark.parametrize("method", ["hidden_kd", "seeking", "laten"])
def test_same_seed_same_adapter(method):
    runs = [transfer(*pair(), method=method).delta.changes for _ in range(2)]
    other = transfer(*pair(), method=method, seed=1).delta.changes
    for path, change in runs[0].items():
        assert torch.equal(change.up, runs[1][path].up)
        assert torch.equal(change.down, runs[1][path].down)
    assert any(not torch.equal(change.up, other[path].up) for path, change in runs[0].items())


def test_caller_random_state_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(4)
    for method in ("hidden_kd", "seeking", "laten"):
        torch.manual_seed(3)
        transfer(*pair(), method=method, epochs=1)
        assert torch.equal(torch.rand(4), expected), method


@pytest.mark.parametrize("method", OTHERS)
def test_given_layers_alone_change(method):
    result = transfer(*pair(), method=method, layers=[1], epochs=1)
    assert [pair.target for pair in result.pairs] == [1]
    assert all(".layers.1." in path for path in result.delta.changes)


# --------------------------------------------------------------------------- settings


def test_method_sets_only_what_the_user_left_alone():
    config = TransferConfig.make(method="sft", layers=[2])
    assert (config.objective, config.output_loss, config.layers) == ("none", "cross_entropy", (2,))
    assert TransferConfig.make(method="laten").learning_rate == 3e-5
    assert TransferConfig.make(method="laten", learning_rate=1e-3).learning_rate == 1e-3
    assert TransferConfig.make({"method": "kd", "temperature": 2}).output_loss == "kl"
    assert TransferConfig.make().as_dict() == TransferConfig().as_dict()


@pytest.mark.parametrize("method", METHODS)
def test_settings_survive_a_round_trip(method):
    config = TransferConfig.make(method=method, rank=3)
    assert TransferConfig.make(config) == config
    assert TransferConfig.make(config.as_dict()) == config
    assert all(getattr(config, k) == v for k, v in METHOD_SETTINGS[method].items())


def test_presets():
    assert TransferConfig.make(preset="paper") == TransferConfig()
    second = TransferConfig.make(preset="paper-v2")
    assert (second.schedule, second.pairing, second.layers) == ("frontier", "single", "all")
    assert (second.objective, second.interface) == ("relation", "contribution")
    best = TransferConfig.make(preset="best", layer_weight=1.0)
    assert (best.output_loss, best.recompose, best.layer_weight) == ("kl", "fitted", 1.0)
    with pytest.raises(DataError, match="set min_rows=0"):  # rows without a chat template
        transfer(*pair(), preset="best", epochs=1)
    given = {"preset": "best", "min_rows": 0}
    history = transfer(*pair(), **given, epochs=3, layers=[1]).history
    assert {"layer_loss", "output_loss", "label_loss"} <= set(history[0])
    assert history[-1]["label_loss"] < history[0]["label_loss"]
    source, target = pair()
    changed = transfer(source, target, **given, epochs=1, source_base=pair()[0])
    assert changed.history[0]["layer_loss"] < 1e-12  # an unchanged source asks for nothing


def test_sft_and_kd_mix():
    result = transfer(*pair(), method="kd", label_weight=0.5, temperature=2.0, kl_kind="jsd")
    assert {"output_loss", "label_loss"} <= set(result.history[0])
    assert "layer_loss" not in result.history[0]


@pytest.mark.parametrize(
    "options", [{"solver": "ridge", "objective": "cosine"}, {"warm_start": True}]
)
@pytest.mark.parametrize("method", ["seeking", "laten"])
def test_methods_with_their_own_delta_refuse_the_ridge_solver(method, options):
    with pytest.raises(ConfigError, match="finds its delta itself"):
        TransferConfig.make(method=method, **options)


def test_laten_refuses_the_frontier():
    with pytest.raises(ConfigError, match="joint"):
        TransferConfig.make(method="laten", schedule="frontier")


# --------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine"])
def test_hidden_term(kind):
    generator = torch.Generator().manual_seed(0)
    hidden, wanted = (
        torch.randn(7, size, generator=generator, dtype=torch.float64) for size in (5, 9)
    )
    projection = learned_projection(5, 9, hidden, seed=4)
    rows = Rows({2: hidden}, None, torch.zeros(7), torch.tensor([0, 7]), {"layer2": wanted})
    got = hidden_term(2, projection, kind)(rows)
    projected = hidden @ projection.weight.T
    if kind == "hidden_mse":
        expected = ((projected - wanted) ** 2).mean(1)
    else:
        expected = 1 - (F.normalize(projected, dim=1) * F.normalize(wanted, dim=1)).sum(1)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_projection_is_learned():
    """With the LoRA all but still, only a moving projection can bring the loss down."""
    common = {"method": "hidden_kd", "output_loss": "none", "alpha": 1e-6, "epochs": 8}
    losses = [record["layer_loss"] for record in transfer(*pair(), **common).history]
    assert losses[-1] < 0.9 * losses[0]


def test_hidden_kd_stores_rows_of_the_sources_width():
    report = transfer(*pair(), method="hidden_kd", output_loss="none", epochs=1).report
    supervised = report["data"]["supervised_tokens"]
    assert report["store_bytes"] == supervised * 48 * 4 * 3


# --------------------------------------------------------------------------- Seeking


def test_sensitivity_is_weight_times_gradient_example_by_example():
    source = pair()[0]
    examples = encode(ROWS, TOKENIZER)
    batches = [collate(examples, [i], pad_token_id=0) for i in range(3)]
    path = "mlp.up_proj"
    found = seeking.sensitivity(source, batches, [path])
    expected = torch.zeros(5, dtype=torch.float64)
    matrix = torch.zeros_like(source.model.layers[2].mlp.up_proj.weight)
    for batch in batches:
        source.zero_grad()
        logits = source(**batch.model_inputs()).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
        for layer, block in enumerate(source.model.layers):
            expected[layer] += sum(
                float((p.detach() * p.grad).abs().sum()) for p in block.parameters()
            )
        weight = source.model.layers[2].mlp.up_proj.weight
        matrix += (weight * weight.grad).abs().detach()
    torch.testing.assert_close(found.layers, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.rows[2, path].float(), matrix.sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.columns[2, path].float(), matrix.sum(0), rtol=1e-4, atol=1e-7)
    best = found.best_layers(2)
    assert best == sorted(best)
    assert set(best) == set(expected.topk(2).indices.tolist())


def test_sensitivity_leaves_the_models_flags_alone():
    source = pair()[0].train()
    flags = {}
    for i, (name, parameter) in enumerate(source.named_parameters()):
        parameter.requires_grad_(i % 2 == 0)
        flags[name] = i % 2 == 0
    seeking.sensitivity(source, [batch_of(ROWS, 1)], ["mlp.up_proj"])
    assert {n: p.requires_grad for n, p in source.named_parameters()} == flags
    assert source.training
    assert all(p.grad is None for p in source.parameters())


def test_extraction_keeps_order():
    weight = torch.arange(20.0).reshape(4, 5)
    rows, columns = torch.tensor([1.0, 9, 2, 8]), torch.tensor([5.0, 5, 1, 7, 0])
    assert seeking.extract(weight, rows, columns, (2, 3)).tolist() == [[5, 6, 8], [15, 16, 18]]


@pytest.mark.parametrize(("shape", "rank"), [((7, 5), 3), ((4, 9), 4), ((3, 6), 8)])
def test_low_rank_is_the_best_approximation(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = low_rank(matrix, rank)
    assert up.shape == (shape[0], rank)
    assert down.shape == (rank, shape[1])
    left_out = torch.linalg.svdvals(matrix)[rank:].square().sum()
    torch.testing.assert_close((matrix - up @ down).square().sum(), left_out, atol=1e-20, rtol=1e-9)
    kept = min(rank, *shape)
    torch.testing.assert_close(down[:kept] @ down[:kept].T, torch.eye(kept, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_seeking_starts_at_the_target(family):
    """W − s·B₀A₀ + s·BA is W before the first step, and the shipped rank is 2r."""
    source, target = pair(family)
    plain = transfer(*pair(family), method="sft")
    result = transfer(source, target, method="seeking", rank=4, alpha=6.0)
    first = result.history[0]["output_loss"]
    assert first == pytest.approx(plain.history[0]["output_loss"], rel=1e-5)
    assert {change.rank for change in result.delta.changes.values()} == {8}
    assert {change.scale for change in result.delta.changes.values()} == {1.5}
    assert result.report["delta"]["adapter_rank"] == 8
    assert 0 < result.report["delta"]["extracted_energy_kept"] <= 1


def test_seeking_takes_its_directions_from_the_source():
    """The folded adapter holds −B₀A₀, the rank-r part of the extracted source matrix."""
    source, target = pair()
    result = transfer(source, target, method="seeking", rank=4, alpha=4.0, epochs=1)
    examples = encode(ROWS, TOKENIZER)
    batches = [collate(examples, [i], pad_token_id=0) for i in range(len(examples))]
    found = seeking.sensitivity(source, batches, ["mlp.down_proj"])
    kept = found.best_layers(3)
    key = (kept[1], "mlp.down_proj")
    part = seeking.extract(
        source.model.layers[kept[1]].mlp.down_proj.weight.detach(),
        found.rows[key], found.columns[key], (32, 60),
    )  # fmt: skip
    change = result.delta.changes["model.layers.1.mlp.down_proj"]
    folded = -(change.up[:, 4:] @ change.down[4:])
    up, down = low_rank(part, 4)
    torch.testing.assert_close(folded.double(), up @ down, rtol=1e-4, atol=1e-5)


def test_seeking_refuses_a_source_that_does_not_fit():
    with pytest.raises(ConfigError, match="keeps the best 3 source layers"):
        transfer(sized_model("llama", 1, 48, 2), pair()[1], method="seeking")
    with pytest.raises(ConfigError, match="too small"):
        transfer(sized_model("llama", 1, 48, 4, intermediate_size=40), pair()[1], method="seeking")
    with pytest.raises(ConfigError, match="one architecture"):
        transfer(pair("gpt2")[0], pair("llama")[1], method="seeking")


def test_seeking_names_the_layer_that_is_not_finite():
    source = pair()[0]
    Anatomy.of(source)  # as it would be refused before
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="source layer"):
        seeking.sensitivity(source, [batch_of(ROWS, 1)], ["mlp.up_proj"])


# --------------------------------------------------------------------------- LaTen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neuron_scores_are_the_slope_of_the_log_probability(family):
    """Adding ε of what a neuron writes to the stream moves log p(y) by ε times its score."""
    net = pair(family)[1].double()
    batch = batch_of(ROWS, 3)
    scores = laten.neuron_scores(net, [batch])
    anatomy = Anatomy.of(net)
    norm, head = anatomy.final_norm, anatomy.head
    layer, neuron, step = 1, 5, 1e-2  # Llama's norm computes in float32
    targets, where = batch.targets[batch.supervised], batch.supervised
    for sublayer in laten.SUBLAYERS:
        projection = anatomy.output_projection(layer, sublayer)[1]
        seen = {}

        def at_projection(_m, args, output, seen=seen):
            seen.update(u=args[0], out=output)

        def at_block(_m, args, kwargs, output, seen=seen):
            seen.update(start=anatomy.block_input(args, kwargs), end=output)

        handles = [
            projection.register_forward_hook(at_projection),
            anatomy.layers[layer].register_forward_hook(at_block, with_kwargs=True),
        ]
        with torch.no_grad():
            net(**batch.model_inputs())
        for handle in handles:
            handle.remove()
        stream = seen["start"]
        if sublayer == "mlp":
            stream = anatomy.block_output(seen["end"]) - seen["out"].reshape_as(stream)
        column = projection.weight[neuron] if family == "gpt2" else projection.weight[:, neuron]
        written = seen["u"].reshape(*where.shape, -1)[where][:, neuron, None] * column

        def log_p(shift, stream=stream, written=written):
            logits = head(norm(stream[where] + shift * written))
            return -F.cross_entropy(logits, targets, reduction="sum")

        with torch.no_grad():
            slope = (log_p(step) - log_p(-step)) / (2 * step) / len(targets)
        torch.testing.assert_close(
            scores[sublayer][layer, neuron], slope, rtol=2e-3, atol=1e-7
        )


def test_laten_finds_the_matrices_that_hold_neurons():
    llama, gpt2 = (Anatomy.of(pair(family)[1]) for family in ("llama", "gpt2"))
    found = {side.path: (side.sublayer, side.columns) for side in laten.sides(llama, 0, None)}
    assert found == {
        "self_attn.o_proj": ("attention", True),
        "self_attn.v_proj": ("attention", False),
        "mlp.down_proj": ("mlp", True),
        "mlp.up_proj": ("mlp", False),
    }
    fused = {side.path for side in laten.sides(gpt2, 0, None)}
    assert fused == {"attn.c_proj", "mlp.c_proj", "mlp.c_fc"}


def test_grouped_heads_share_their_value_rows():
    scores = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])  # 4 heads of size 2, in 2 groups
    assert laten.best_neurons(scores, 4, 2, head_size=2).tolist() == [3, 2]
    assert laten.best_neurons(scores, 8, 2, head_size=2).tolist() == [7, 6]


def test_laten_changes_the_best_neurons_alone():
    source, target = pair()
    result = transfer(source, target, method="laten", learning_rate=3e-3, rank=16)
    examples = encode(ROWS, TOKENIZER)
    batch = collate(examples, range(len(examples)), pad_token_id=0)
    scores = laten.neuron_scores(pair()[1], [batch])["mlp"][2]
    count = math.ceil(0.1 * min(60, 80))
    best = set(scores.topk(count).indices.tolist())
    delta = result.delta.changes["model.layers.2.mlp.up_proj"].matrix()
    moved = set((delta.abs().sum(1) > 1e-7).nonzero().flatten().tolist())
    assert moved == best
    delta = result.delta.changes["model.layers.2.mlp.down_proj"].matrix()
    assert set((delta.abs().sum(0) > 1e-7).nonzero().flatten().tolist()) == best
    assert result.report["delta"]["relative_residual_of_truncation"] < 1e-6


def test_laten_reports_what_truncation_left_out():
    full = transfer(*pair(), method="laten", learning_rate=3e-3, rank=16)
    cut = transfer(*pair(), method="laten", learning_rate=3e-3, rank=1)
    lost = total = 0.0
    for path, change in full.delta.changes.items():
        whole = change.matrix().double()
        lost += float((whole - cut.delta.changes[path].matrix()).square().sum())
        total += float(whole.square().sum())
    reported = cut.report["delta"]["relative_residual_of_truncation"]
    assert reported == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert 0 < reported < 1


def test_laten_refuses_what_it_cannot_read():
    with pytest.raises(ModelError, match="no single linear module"):
        transfer(sized_model("gemma2", 1, 48, 3), sized_model("gemma2", 2, 48, 2), method="laten")
    with pytest.raises(ConfigError, match="one architecture"):
        transfer(pair("gpt2")[0], pair("llama")[1], method="laten")
    with pytest.raises(ConfigError, match="holds neurons"):
        transfer(*pair("gpt2"), method="laten", target_modules="c_attn")
    with pytest.raises(ConfigError, match="holds neurons"):
        transfer(*pair(), method="laten", target_modules="q_proj")


@pytest.mark.parametrize(
    ("method", "placed"), [("laten", ["source", "target"]), ("seeking", ["source"])]
)
def test_models_a_method_runs_are_on_the_device_meanwhile(method, placed, monkeypatch):
    here = []

    @contextlib.contextmanager
    def visiting(*models):
        here[:] = models
        yield
        here.clear()

    def made(given):
        assert here == placed
        return "maker"

    monkeypatch.setattr(stages, "maker_of", lambda name: mark(maker_of(name), made))
    inputs = SimpleNamespace(
        config=TransferConfig(method=method), source="source", target="target",
        aligned=SimpleNamespace(examples=[]), examples=[], pad_token_ids=(0, 0),
        phases=Phases(False), visiting=visiting,
    )  # fmt: skip
    assert stages.make_delta_maker(inputs, []) == "maker"


def mark(maker, call):
    """``call`` with the class attributes of ``maker``."""
    call.runs_target = maker.runs_target
    return call
