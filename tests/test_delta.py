"""The delta is a standard PEFT adapter; inject equals PEFT's merge and eject restores every bit."""

import json

import pytest
import torch
from models import STATE_SPACE_FAMILIES, tiny_model, token_batch
from peft import LoraConfig, PeftModel, get_peft_model

from pkt_fast import LayerDelta, eject, inject
from pkt_fast.anatomy import Anatomy
from pkt_fast.errors import DeltaError, OutputError


def with_adapter(family="llama", dtype=torch.float32, targets=None, **options):
    """A PEFT model whose adapter is random in both halves."""
    targets = (
        targets
        or {
            "llama": ["layers.1.mlp.up_proj", "layers.1.self_attn.v_proj"],
            "gpt2": ["h.1.mlp.c_fc", "h.1.attn.c_proj"],
        }[family]
    )
    model = tiny_model(family, seed=3).to(dtype)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, fan_in_fan_out=family == "gpt2", **options
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits.float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"up_proj|c_fc": 3}},
        {"alpha_pattern": {r".*\.1\..*(v_proj|c_proj)": 3}, "rank_pattern": {".*_proj": 2}},
        {"alpha_pattern": {r"^(model\.layers|transformer\.h)\.1\..*": 3}},
    ],
)
def test_save_is_a_peft_adapter_and_load_reads_it(tmp_path, family, options):
    model = with_adapter(family, **options)
    delta = LayerDelta.from_peft(model)
    delta.save(tmp_path / "ours")
    ours = PeftModel.from_pretrained(tiny_model(family, seed=3), tmp_path / "ours").eval()
    assert torch.equal(logits(ours), logits(model))
    model.save_pretrained(tmp_path / "peft")
    again = LayerDelta.load(tmp_path / "peft")
    assert again.changes.keys() == delta.changes.keys()
    for path, change in delta.changes.items():
        assert torch.equal(change.down, again.changes[path].down)
        assert change.scale == again.changes[path].scale
    plain = tiny_model(family, seed=3)
    inject(plain, again)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inject_equals_the_adapter_and_eject_restores_the_bits(family, dtype):
    adapted = with_adapter(family, dtype)
    delta = LayerDelta.from_peft(adapted)
    plain = tiny_model(family, seed=3).to(dtype)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    report = inject(plain, delta)
    assert report.matrices == 2
    assert 0 <= report.unchanged < report.elements
    expected, got = logits(adapted), logits(plain)
    error = (got - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.02)
    for path, change in delta.changes.items():
        weight = before[f"{path}.weight"].double()
        change = change.matrix().double()
        exact = weight + (change.T if family == "gpt2" else change)
        stored = plain.get_submodule(path).weight.double()
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3) + 3e-6 * exact.abs().max()
        assert ((stored - exact).abs() <= ulp).all()
    assert eject(plain) == 2
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert eject(plain) == 0


@pytest.mark.parametrize("family", STATE_SPACE_FAMILIES)
def test_a_bfloat16_state_space_model_differs_from_its_adapter_by_rounding_alone(family):
    # bfloat16 itself moves the logits of such a model a lot, with or without a delta; so compare
    # with float64, and bit by bit with what PEFT merges.
    targets = Anatomy.of(tiny_model(family, seed=3)).lora_targets(1)
    adapted = with_adapter(family, torch.bfloat16, targets)
    delta = LayerDelta.from_peft(adapted)
    plain = tiny_model(family, seed=3).to(torch.bfloat16)
    exact = tiny_model(family, seed=3).double()
    for path, change in delta.changes.items():
        weight = plain.get_submodule(path).weight.double()
        exact.get_submodule(path).weight.data.copy_(weight + change.matrix().double())
    inject(plain, delta)
    got, expected, attached = logits(plain), logits(exact), logits(adapted)
    merged = logits(adapted.merge_and_unload())
    assert torch.equal(got, merged)
    assert (got - expected).norm() < 2 * (attached - expected).norm()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' also changed the weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' also changed the weights"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
    ],
)
def test_adapters_that_are_more_than_a_change_of_weights_are_refused(tmp_path, options, reason):
    config = LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model("llama", seed=3), config)
    with pytest.raises(DeltaError, match=reason):
        LayerDelta.from_peft(model)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(DeltaError, match=reason):
        LayerDelta.load(tmp_path / "peft")


def test_injections_stack_and_scale():
    delta = LayerDelta.from_peft(with_adapter())
    plain = tiny_model("llama", seed=3)
    original = plain.model.layers[1].mlp.up_proj.weight.clone()
    inject(plain, delta, 0.5)
    inject(plain, delta, 0.5)
    twice = plain.model.layers[1].mlp.up_proj.weight.clone()
    eject(plain)
    inject(plain, delta, keep_backup=False)
    torch.testing.assert_close(plain.model.layers[1].mlp.up_proj.weight, twice)
    assert eject(plain) == 0
    assert not torch.equal(plain.model.layers[1].mlp.up_proj.weight, original)


def test_the_latest_injection_can_be_undone_alone():
    model = with_adapter("llama")
    delta = LayerDelta.from_peft(model)
    model = tiny_model("llama", seed=3)
    plain = logits(model)
    assert eject(model, latest=True) == 0
    inject(model, delta)
    once = logits(model)
    inject(model, delta, 0.5)
    assert eject(model, latest=True) == len(delta.changes)
    assert torch.equal(logits(model), once)
    assert eject(model) == len(delta.changes)
    assert torch.equal(logits(model), plain)
    assert eject(model) == 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
def test_a_scale_that_is_not_finite_changes_nothing(scale):
    delta = LayerDelta.from_peft(with_adapter("llama"))
    model = tiny_model("llama", seed=3)
    plain = logits(model)
    with pytest.raises(DeltaError, match="finite"):
        inject(model, delta, scale)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5])
def test_a_seed_out_of_range_changes_nothing(seed):
    model = tiny_model("llama", seed=3)
    plain = logits(model)
    with pytest.raises(DeltaError, match="stochastic_seed"):
        inject(model, LayerDelta.from_peft(with_adapter()), stochastic_seed=seed)
    assert torch.equal(logits(model), plain)


def test_small_changes_vanish_in_bfloat16_unless_rounding_is_stochastic():
    delta = LayerDelta.from_peft(with_adapter(dtype=torch.bfloat16))
    plain = tiny_model("llama", seed=3).to(torch.bfloat16)
    path = "model.layers.1.mlp.up_proj"
    before = plain.get_submodule(path).weight.double().clone()
    nearest = inject(plain, delta, 1e-4)
    assert nearest.unchanged_fraction > 0.5
    eject(plain)
    total = torch.zeros_like(before)
    for seed in range(64):
        inject(plain, delta, 1e-4, stochastic_seed=seed)
        total += plain.get_submodule(path).weight.double() - before
        eject(plain)
    wanted = 1e-4 * delta.changes[path].matrix().double()
    mean = total / 64
    assert abs((mean * wanted).sum() / wanted.square().sum() - 1) < 0.1


def test_a_delta_that_does_not_fit_changes_nothing():
    delta = LayerDelta.from_peft(with_adapter())
    narrow = tiny_model("llama", seed=3, intermediate_size=64)
    before = [p.clone() for p in narrow.parameters()]
    with pytest.raises(DeltaError, match=r"80x48 matrix, the model's weight is 64x48"):
        inject(narrow, delta)
    assert all(torch.equal(a, b) for a, b in zip(before, narrow.parameters(), strict=True))
    with pytest.raises(DeltaError, match="GPT2LMHeadModel has not"):
        inject(tiny_model("gpt2"), delta)


def with_computed_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def with_shared_weight(model):
    up, gate = model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.gate_proj
    gate.weight = up.weight


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (with_computed_weight, "up_proj is computed from others"),
        (with_shared_weight, "gate_proj and .*up_proj, which share one weight"),
        (lambda model: model.to("meta"), "meta device"),
    ],
)
def test_weights_that_cannot_take_the_change_are_refused(prepare, reason):
    delta = LayerDelta.from_peft(
        with_adapter(targets=["layers.1.mlp.up_proj", "layers.1.mlp.gate_proj"])
    )
    model = tiny_model("llama", seed=3)
    prepare(model)
    with pytest.raises(DeltaError, match=reason):
        inject(model, delta)
    assert eject(model) == 0


def test_a_delta_that_is_none_or_not_finite_is_refused(tmp_path):
    delta = LayerDelta.from_peft(with_adapter())
    next(iter(delta.changes.values())).up[0, 0] = float("nan")
    with pytest.raises(DeltaError, match="holds NaN or inf"):
        inject(tiny_model("llama", seed=3), delta)
    with pytest.raises(DeltaError, match="give a LayerDelta"):
        inject(tiny_model("llama", seed=3), str(tmp_path))
    with pytest.raises(DeltaError, match="the adapter is None"):
        LayerDelta.load(None)


def test_bad_adapters_are_refused(tmp_path):
    with pytest.raises(DeltaError, match="not an adapter directory"):
        LayerDelta.load(tmp_path)
    delta = LayerDelta.from_peft(with_adapter())
    delta.save(tmp_path / "a")
    with pytest.raises(OutputError, match="not empty"):
        delta.save(tmp_path / "a")
    delta.save(tmp_path / "a", overwrite=True)
    config = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, words in [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ]:
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(DeltaError, match=words):
            LayerDelta.load(tmp_path / "a")
    config.write_text("{")
    with pytest.raises(DeltaError, match="not JSON"):
        LayerDelta.load(tmp_path / "a")
    config.write_text("[]")
    with pytest.raises(DeltaError, match="holds a list"):
        LayerDelta.load(tmp_path / "a")
    config.write_text(json.dumps(settings))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(DeltaError, match="damaged"):
        LayerDelta.load(tmp_path / "a")
