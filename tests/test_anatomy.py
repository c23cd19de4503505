"""The anatomy of tiny random models of every family: what is found must add up numerically."""

from __future__ import annotations

import contextlib
import gc
import inspect
import weakref
from collections.abc import Iterator

import pytest
import torch
from models import FAMILIES, STATE_SPACE_FAMILIES, randomize, tiny_model, token_batch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from pkt_fast.anatomy import Anatomy, Tap
from pkt_fast.errors import ConfigError, ModelError

SCALED = {"granite"}
POST_NORM = {"gemma2", "gemma3_text", "olmo2"}
EXPERTS = {"mixtral", "qwen3_moe"}
# Families that take no position_ids: ALiBi reads positions off the mask.
NO_POSITIONS = {"bloom", "mpt"}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: tiny_model(family) for family in FAMILIES}


def batch_for(family: str, padding: str | None, **kwargs: int) -> dict[str, Tensor]:
    batch = token_batch(padding=padding, **kwargs)
    if family in NO_POSITIONS:
        del batch["position_ids"]
    return batch


def forward_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def patched(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "forward" in m.__dict__]


@contextlib.contextmanager
def reading(tap: Tap, into: list[Tensor]) -> Iterator[None]:
    def hook(module, args, kwargs, output):
        into.append(tap.read(args, kwargs, output).tensor())

    handle = tap.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def record(model: nn.Module, anatomy: Anatomy, layer: int, batch: dict[str, Tensor], *interfaces):
    """Block input, the tapped activations and the logits of one forward."""
    inputs: list[Tensor] = []
    taps: list[list[Tensor]] = [[] for _ in interfaces]

    def keep(module, args, kwargs):
        inputs.append(anatomy.block_input(args, kwargs))

    with contextlib.ExitStack() as stack, torch.no_grad():
        handle = anatomy.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
        stack.callback(handle.remove)
        for interface, values in zip(interfaces, taps, strict=True):
            stack.enter_context(reading(anatomy.tap(layer, interface), values))
        logits = model(**batch, use_cache=False).logits
    assert all(len(values) == 1 for values in (inputs, *taps))
    return inputs[0], [values[0] for values in taps], logits


# ------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("family", FAMILIES)
def test_basic_facts(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    config = model.config
    assert anatomy.model is model
    assert anatomy.num_layers == config.num_hidden_layers == len(anatomy.layers)
    assert anatomy.hidden_size == config.hidden_size
    assert anatomy.vocab_size == config.vocab_size
    assert anatomy.head is model.get_output_embeddings()
    assert tuple(model.get_submodule(anatomy.layers_path)) == anatomy.layers
    assert anatomy.final_norm is not None
    assert "norm" in type(anatomy.final_norm).__name__.lower()


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_input_plus_sublayers_is_output(models, family, padding):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, padding, seed=3)
    for layer in range(anatomy.num_layers):
        stream, (mlp, attention, block, contribution), _ = record(
            model, anatomy, layer, batch, "mlp", "attention", "block", "contribution"
        )
        assert mlp.shape == attention.shape == block.shape == (*batch["input_ids"].shape, 48)
        torch.testing.assert_close(contribution, block - stream, rtol=0, atol=0)
        torch.testing.assert_close(stream + mlp + attention, block, rtol=1e-5, atol=2e-5)
        assert mlp.norm() > 1e-3 * block.norm()
        assert attention.norm() > 1e-3 * block.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mixes_positions_and_mlp_does_not(models, family):
    """Feed one block two inputs that differ at position 0; an MLP in parallel must not notice."""
    model = models[family]
    anatomy = Anatomy.of(model)
    layer = anatomy.num_layers - 1
    batch = batch_for(family, None, rows=1)
    stream, _, _ = record(model, anatomy, layer, batch)
    other = stream.clone()
    other[:, 0] = torch.randn(48, generator=torch.Generator().manual_seed(1))
    seen: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for interface, values in seen.items():
            stack.enter_context(reading(anatomy.tap(layer, interface), values))
        for hidden in (stream, other):
            with anatomy.resume_at(layer, hidden):
                model(**batch, use_cache=False)
    first, second = seen["attention"]
    assert not torch.allclose(first[:, 1:], second[:, 1:], rtol=1e-3)
    if family in {"gptj", "phi", "falcon", "cohere", "gpt_neox"}:
        first, second = seen["mlp"]
        torch.testing.assert_close(first[:, 1:], second[:, 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_output_projection(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    for interface in ("mlp", "attention"):
        found = anatomy.output_projection(1, interface)
        if family in SCALED | POST_NORM or (family in EXPERTS and interface == "mlp"):
            assert found is None
            continue
        assert found is not None
        path, module = found
        assert model.get_submodule(path) is module
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, a, out, o=outputs: o.append(out + 0))
        _, (tapped,), _ = record(model, anatomy, 1, batch_for(family, None), interface)
        handle.remove()
        torch.testing.assert_close(outputs[0].view_as(tapped), tapped)
    assert anatomy.output_projection(1, "block") is None
    assert anatomy.output_projection(1, "contribution") is None


# ------------------------------------------------------------------------- running a part of it


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_resume_equals_full_forward(models, family, padding):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, padding, seed=5)
    for layer in range(anatomy.num_layers):
        stream, _, logits = record(model, anatomy, layer, batch)
        with anatomy.resume_at(layer, stream), torch.no_grad():
            resumed = model(**batch, use_cache=False).logits
        torch.testing.assert_close(resumed, logits, rtol=0, atol=1e-6)
    assert not patched(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_uses_the_given_hidden(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, None)
    stream, _, logits = record(model, anatomy, 1, batch)
    with torch.no_grad(), anatomy.resume_at(1, stream.flip(-1)):
        changed = model(**batch, use_cache=False).logits
    assert not torch.allclose(changed, logits, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_only_above(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, "right")
    stream, _, _ = record(model, anatomy, 2, batch)
    hidden = stream.clone().requires_grad_()
    model.zero_grad()
    with anatomy.resume_at(2, hidden):
        model(**batch, use_cache=False).logits.square().mean().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    for layer, block in enumerate(anatomy.layers):
        has = [p.grad is not None for p in block.parameters()]
        assert any(has) if layer >= 2 else not any(has)
    model.zero_grad()


def test_contribution_of_a_resumed_layer_uses_the_new_input(models):
    model = models["llama"]
    anatomy = Anatomy.of(model)
    batch = token_batch()
    stream, (contribution,), _ = record(model, anatomy, 2, batch, "contribution")
    again: list[Tensor] = []
    with reading(anatomy.tap(2, "contribution"), again), anatomy.resume_at(2, stream):
        model(**batch)
    torch.testing.assert_close(again[0], contribution, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_after(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, None)
    for layer in range(anatomy.num_layers):
        ran: list[nn.Module] = []
        outputs: list[Tensor] = []
        before = forward_hooks(model)
        # The tap is registered later than the stop, and still served.
        with anatomy.stop_after(layer), contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(reading(anatomy.tap(layer, "block"), outputs))
            for module in (*anatomy.layers, anatomy.final_norm, anatomy.head):
                handle = module.register_forward_hook(lambda m, a, o, ran=ran: ran.append(m))
                stack.callback(handle.remove)
            model(**batch, use_cache=False)
            pytest.fail("the forward was not stopped")
        assert ran == list(anatomy.layers[: layer + 1])
        _, (block,), _ = record(model, anatomy, layer, batch, "block")
        torch.testing.assert_close(outputs[0], block, rtol=0, atol=0)
        assert forward_hooks(model) == before


def test_run_until(models):
    model = models["llama"]
    anatomy = Anatomy.of(model)
    seen: list[Tensor] = []
    with reading(anatomy.tap(1, "mlp"), seen):
        anatomy.run_until(1, **token_batch())
    _, (mlp,), _ = record(model, anatomy, 1, token_batch(), "mlp")
    torch.testing.assert_close(seen[0], mlp)


@pytest.mark.parametrize("family", FAMILIES)
def test_bypassed_head_and_transform_give_the_logits(models, family):
    model = models[family]
    anatomy = Anatomy.of(model)
    batch = batch_for(family, None)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        with anatomy.bypass_head() as head_input:
            empty = model(**batch, use_cache=False).logits
        transform = anatomy.head_transform()
        assert transform.exact
        assert transform.bias is (getattr(anatomy.head, "bias", None) is not None)
        rebuilt = transform(anatomy.head(head_input.hidden))
    assert empty.shape[-1] == 0
    torch.testing.assert_close(rebuilt, logits, rtol=1e-5, atol=1e-6)
    assert not patched(model)


def test_head_transforms_that_must_be_found():
    assert Anatomy.of(tiny_model("gemma2")).head_transform().softcap == 30.0
    assert Anatomy.of(tiny_model("cohere")).head_transform().scale == 0.25
    assert Anatomy.of(tiny_model("granite")).head_transform().scale == 0.25
    assert Anatomy.of(tiny_model("phi")).head_transform().bias


def test_head_transform_that_nothing_explains():
    model = tiny_model("llama")
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    shifted.__signature__ = inspect.signature(forward)
    model.forward = shifted
    assert not Anatomy.of(model).head_transform().exact


def test_bypass_head_before_any_call(models):
    with (
        Anatomy.of(models["llama"]).bypass_head() as head_input,
        pytest.raises(ModelError, match="call the model first"),
    ):
        _ = head_input.hidden


def test_contexts_nest(models):
    model = models["qwen3"]
    anatomy = Anatomy.of(model)
    batch = token_batch(padding="left")
    stream, (block,), logits = record(model, anatomy, 2, batch, "block")
    with torch.no_grad(), anatomy.resume_at(2, stream), anatomy.bypass_head() as head_input:
        model(**batch)
    torch.testing.assert_close(anatomy.head(head_input.hidden), logits)
    seen: list[Tensor] = []
    with anatomy.resume_at(2, stream), reading(anatomy.tap(2, "block"), seen):
        anatomy.run_until(2, **batch)
    torch.testing.assert_close(seen[0], block, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_everything_is_restored_after_an_exception(family):
    model = tiny_model(family)
    anatomy = Anatomy.of(model)
    batch = batch_for(family, None)
    stream, _, _ = record(model, anatomy, 2, batch)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    before = forward_hooks(model)
    for context in (
        lambda: anatomy.resume_at(2, stream),
        anatomy.bypass_head,
        lambda: anatomy.stop_after(1),
    ):
        with pytest.raises(RuntimeError, match="boom"), context():
            raise RuntimeError("boom")
        assert forward_hooks(model) == before
        assert not patched(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, logits, rtol=0, atol=0)


def test_a_foreign_patch_survives(models):
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    batch = token_batch()
    stream, _, _ = record(model, anatomy, 2, batch)
    original = anatomy.layers[0].forward
    anatomy.layers[0].forward = original
    with anatomy.resume_at(2, stream):
        model(**batch)
    assert anatomy.layers[0].__dict__["forward"] is original


# ---------------------------------------------------------------------------- the probe itself


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_leaves_no_trace(family):
    model = tiny_model(family)
    model.train()
    next(model.children()).eval()
    flags = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    Anatomy.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert forward_hooks(model) == 0
    assert not patched(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in FAMILIES]
    + [
        (family, dtype)
        for family in ("llama", "gemma2", "cohere", "bloom", "opt", "granite")
        for dtype in (torch.float16, torch.float64)
    ],
)
def test_same_findings_in_every_dtype(models, family, dtype):
    expected = Anatomy.of(models[family])
    anatomy = Anatomy.of(tiny_model(family).to(dtype))
    assert anatomy.head_transform() == expected.head_transform()
    for layer in range(expected.num_layers):
        for interface in ("mlp", "attention"):
            names = [
                next(n for n, m in a.layers[layer].named_modules() if m is tap.module)
                for a in (anatomy, expected)
                for tap in [a.tap(layer, interface)]
            ]
            assert names[0] == names[1]
            found = [a.output_projection(layer, interface) for a in (anatomy, expected)]
            assert [f and f[0] for f in found] == [found[1] and found[1][0]] * 2


def test_small_initial_weights_are_resolved():
    """Fresh models of std 0.002 add contributions thousands of times below the stream."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3)
    anatomy = Anatomy.of(model)
    assert anatomy.tap(3, "mlp").module is model.model.layers[3].mlp
    assert anatomy.tap(3, "attention").module is model.model.layers[3].self_attn


def test_a_layer_without_mlp_effect_is_resolved_with_its_siblings():
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    anatomy = Anatomy.of(model)
    assert anatomy.tap(2, "mlp").module is model.model.layers[2].mlp
    assert anatomy.tap(2, "attention").module is model.model.layers[2].self_attn


def test_sequential_neox_and_post_norm_opt():
    anatomy = Anatomy.of(tiny_model("gpt_neox", use_parallel_residual=False))
    assert anatomy.output_projection(0, "mlp")[0].endswith("mlp.dense_4h_to_h")
    post = Anatomy.of(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(ModelError, match=r"layer 1 .*interface='contribution'"):
        post.tap(1, "mlp")
    model = post.model
    stream, (block, contribution), _ = record(
        model, post, 1, token_batch(), "block", "contribution"
    )
    torch.testing.assert_close(block, stream + contribution)


def test_cache_follows_the_model():
    model = tiny_model("gpt2")
    anatomy = Anatomy.of(model)
    assert Anatomy.of(model)._structure is anatomy._structure
    model.transformer.h = nn.ModuleList(list(model.transformer.h)[:2])
    assert Anatomy.of(model).num_layers == 2
    gone = weakref.ref(model)
    del model, anatomy
    gc.collect()
    assert gone() is None


def test_a_block_output_overwritten_later_is_copied():
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda m, a: (a[0] + 0,))
    first: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda m, a, o: first.append(o))

    def overwrite(module, args, output):
        first.pop().zero_()

    model.model.layers[2].register_forward_hook(overwrite)
    anatomy = Anatomy.of(model)
    stream, (block, contribution), _ = record(
        model, anatomy, 0, token_batch(), "block", "contribution"
    )
    assert block.norm() > 0
    torch.testing.assert_close(stream + contribution, block)


def test_a_block_that_overwrites_its_input_is_refused():
    model = tiny_model("llama")
    forward = model.model.layers[2].forward

    def overwriting(hidden_states, *args, **kwargs):
        return hidden_states.copy_(forward(hidden_states, *args, **kwargs))

    model.model.layers[2].forward = overwriting
    with pytest.raises(ModelError, match=r"overwrites the input of block model\.layers\.2"):
        Anatomy.of(model)


def test_flat_tap_drops_its_shape_hook():
    model = tiny_model("opt")
    tap = Anatomy.of(model).tap(1, "mlp")
    assert forward_hooks(model) == 1
    del tap
    gc.collect()
    assert forward_hooks(model) == 0


def test_stopping_after_the_last_block_when_its_norm_also_serves_before_the_first():
    model = tiny_model("nanochat")
    anatomy = Anatomy.of(model)
    last = anatomy.num_layers - 1
    seen = []
    with anatomy.layers[last].register_forward_hook(lambda *call: seen.append(call)):
        anatomy.run_until(last, **token_batch())
    assert len(seen) == 1


# ------------------------------------------------------------------------------------ adapters


def test_lora_targets():
    def targets(family: str, modules: list[str] | None = None) -> set[str]:
        anatomy = Anatomy.of(tiny_model(family))
        found = anatomy.lora_targets(1, modules)
        prefix = f"{anatomy.layers_path}.1."
        assert all(path.startswith(prefix) for path in found)
        return {path.removeprefix(prefix) for path in found}

    paper = {"self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}
    for family in ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "granite"):
        assert targets(family) == paper
    assert targets("gpt2") == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert targets("opt") == {"self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}
    assert targets("phi") == {"self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"}
    assert targets("gpt_neox") == {
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    }
    assert targets("phi3") == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    assert targets("mixtral") == {"self_attn.v_proj", "self_attn.o_proj"}
    assert targets("llama", ["q_proj", "down_proj"]) == {"self_attn.q_proj", "mlp.down_proj"}
    for family in STATE_SPACE_FAMILIES:  # fused kernels read the other weights past an adapter
        assert targets(family) == {"mixer.in_proj"}
    with pytest.raises(ConfigError, match=r"up_proj.*layer 1.*c_attn.*c_fc.*c_proj"):
        targets("gpt2", ["up_proj"])


def test_routers_are_no_linear_modules():
    anatomy = Anatomy.of(tiny_model("phimoe"))
    last = {path.rpartition(".")[2] for path in anatomy.lora_targets(1)}
    assert last == {"v_proj", "o_proj"}
    with pytest.raises(ConfigError, match="match no linear module"):
        anatomy.lora_targets(1, ["router"])


def test_modules_that_peft_would_take_for_stacked_experts():
    peft = pytest.importorskip("peft")
    model = tiny_model("deepseek_v3")
    anatomy = Anatomy.of(model)
    targets = [path for layer in (0, 1) for path in anatomy.lora_targets(layer)]
    assert len(targets) == 4
    with pytest.raises(ConfigError, match=r"names of experts.*leave them out"):
        anatomy.lora_targets(0, ["down_proj"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    adapted = {n for n, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(targets)
    assert Anatomy.of(wrapped).lora_targets(1) == targets[2:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("probe", ["before", "after"])
def test_peft_models(family, probe):
    peft = pytest.importorskip("peft")
    base = tiny_model(family)
    anatomy = Anatomy.of(base)
    projection = anatomy.output_projection(1, "mlp")[0]
    targets = anatomy.lora_targets(1)
    if probe == "after":
        base = tiny_model(family)
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    wrapped = peft.get_peft_model(base, config).eval()
    randomize(wrapped)  # LoRA starts with B = 0
    anatomy = Anatomy.of(wrapped)
    assert anatomy.model is base
    assert sorted(anatomy.lora_targets(1)) == sorted(targets)
    path, module = anatomy.output_projection(1, "mlp")
    assert path == projection
    assert hasattr(module, "lora_A")
    for layer in range(anatomy.num_layers):
        batch = token_batch(padding="left")
        if family in NO_POSITIONS:
            del batch["position_ids"]
        stream, (mlp, attention, block), logits = record(
            wrapped, anatomy, layer, batch, "mlp", "attention", "block"
        )
        torch.testing.assert_close(stream + mlp + attention, block, rtol=1e-5, atol=2e-5)
        with anatomy.resume_at(layer, stream), torch.no_grad():
            torch.testing.assert_close(wrapped(**batch).logits, logits, rtol=0, atol=1e-6)


def test_gradient_checkpointing_does_not_change_a_resumed_pass(models):
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    batch = token_batch()
    stream, _, _ = record(model, anatomy, 2, batch)

    def gradient() -> Tensor:
        model.zero_grad()
        with anatomy.resume_at(2, stream):
            model(**batch, use_cache=False).logits.square().mean().backward()
        return model.model.layers[2].mlp.down_proj.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(gradient(), plain)


# ------------------------------------------------------------------------------------ refusals


def test_bad_arguments(models):
    model = models["llama"]
    anatomy = Anatomy.of(model)
    batch = token_batch()
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        anatomy.tap(4, "mlp")
    with pytest.raises(ConfigError, match="out of range"):
        anatomy.tap(-1, "mlp")
    with pytest.raises(ConfigError, match="'ffn' is unknown"):
        anatomy.tap(0, "ffn")
    with pytest.raises(ConfigError, match="expected"), anatomy.resume_at(1, torch.randn(3, 9, 40)):
        pass
    with (
        pytest.raises(ConfigError, match="the batch needs"),
        anatomy.resume_at(1, torch.randn(2, 9, 48)),
    ):
        model(**batch)
    assert not patched(model)


def test_encoders_and_headless_models_are_refused():
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    bert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **small))
    randomize(bert)
    with pytest.raises(ModelError, match="not causal"):
        Anatomy.of(bert)
    t5 = AutoConfig.for_model(
        "t5", vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        Anatomy.of(AutoModelForSeq2SeqLM.from_config(t5))
    headless = AutoModel.from_config(tiny_model("llama").config)
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        Anatomy.of(headless)
    with pytest.raises(ModelError, match="no language-model head"):
        Anatomy.of(nn.Linear(2, 2))


def test_meta_models_are_refused():
    with pytest.raises(ModelError, match="meta device"):
        Anatomy.of(tiny_model("llama").to("meta"))


def test_blocks_run_twice_are_refused():
    model = tiny_model("llama")
    stack = model.model.layers
    model.model.config.num_hidden_layers = 8
    model.config.layer_types = None
    model.model.layers = nn.ModuleList(stack)
    inner = model.model.forward

    def twice(*args, **kwargs):
        inner(*args, **kwargs)
        return inner(*args, **kwargs)

    model.model.forward = twice
    with pytest.raises(ModelError, match="several times"):
        Anatomy.of(model)


def test_blocks_of_another_shape_are_refused():
    model = tiny_model("llama")
    for block in model.model.layers:
        forward = block.forward

        def widened(hidden_states, *args, forward=forward, **kwargs):
            folded = forward(hidden_states.mean(2), *args, **kwargs)
            return folded[:, :, None].expand(-1, -1, 2, -1)

        block.forward = widened
    model.model.embed_tokens.register_forward_hook(lambda m, a, o: o[:, :, None].repeat(1, 1, 2, 1))
    model.model.norm.register_forward_pre_hook(lambda m, a: a[0].mean(2))
    with pytest.raises(ModelError, match=r"\(B, T, D\)"):
        Anatomy.of(model)


def test_models_whose_upper_layers_read_lower_ones_cannot_resume():
    model = tiny_model("llama")
    kept: list[Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(
        lambda m, a, o: (kept.clear(), kept.append(o))[-1]
    )
    model.model.layers[3].mlp.register_forward_hook(lambda m, a, o: o + (kept.pop() if kept else 0))
    anatomy = Anatomy.of(model)
    with pytest.raises(ModelError, match="cannot resume"), anatomy.resume_at(1, torch.randn(1)):
        pass
