"""Models given as objects come back as they were; what cannot be used is refused in one line."""

import contextlib
import threading

import pytest
import torch
import toy_tokenizers
from models import tiny_model, token_batch
from peft import LoraConfig, get_peft_model

import pkt_fast
from pkt_fast import SemanticBasis, SemanticMap, attribute, lending
from pkt_fast.anatomy import Anatomy
from pkt_fast.data import collate, encode
from pkt_fast.errors import ConfigError, ModelError, NumericsError
from pkt_fast.evaluation import evaluate
from pkt_fast.lending import lent
from pkt_fast.loading import load_model
from pkt_fast.maps import diagnose

TOKENIZER = toy_tokenizers.byte_level()
ROWS = [{"prompt": f"{a}+1=", "completion": f"{a + 1} ok"} for a in range(6)]
DIVERGING = {"learning_rate": 1e30, "epochs": 5}


def model(seed, **options):
    return tiny_model("llama", seed=seed, vocab_size=len(TOKENIZER), **options)


def transfer(source, target, rows=ROWS, **options):
    options = {"epochs": 1, "batch_size": 3, "rank": 4, "layers": [1], **options}
    return pkt_fast.transfer(source, target, rows, tokenizer=TOKENIZER, progress=False, **options)


def state(model):
    """Everything about a model that a transfer might leave changed."""
    return {
        "modules": [(n, type(m), m.training) for n, m in model.named_modules()],
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        ],
        "flags": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "bits": {n: v.clone() for n, v in model.state_dict().items()},
        "others": (model.config.use_cache, model.is_gradient_checkpointing),
        "adapted": "peft_config" in model.__dict__,
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name in before.keys() - {"bits"}:
        assert before[name] == after[name], name
    assert before["bits"].keys() == after["bits"].keys()
    assert all(torch.equal(v, after["bits"][n]) for n, v in before["bits"].items())


def with_a_past(seed):
    """A model with every flag somewhere else than where a transfer needs it."""
    used = model(seed).train()
    used.model.layers[0].eval()
    used.model.norm.weight.requires_grad_(False)
    used.model.layers[1].register_forward_hook(lambda module, args, output: None)
    return used


def test_the_source_comes_back_as_it_was():
    source = with_a_past(1)
    before = state(source)
    transfer(source, model(2))
    assert_same(before, state(source))


@pytest.mark.parametrize("method", ["semalign", "seeking", "laten"])
def test_after_an_error_both_models_are_as_they_were(method):
    source, target = with_a_past(1), with_a_past(2)
    before = state(source), state(target)
    with pytest.raises(NumericsError):
        transfer(
            source, target, method=method, gradient_checkpointing=method == "semalign", **DIVERGING
        )
    assert_same(before[0], state(source))
    assert_same(before[1], state(target))
    transfer(source, target)


def test_diagnose_changes_neither_model():
    source, target = with_a_past(1), with_a_past(2)
    before = state(source), state(target)
    diagnose(source, target, ROWS, tokenizer=TOKENIZER, layers=[1], progress=False)
    assert_same(before[0], state(source))
    assert_same(before[1], state(target))


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_stays_as_the_caller_had_it(on):
    target = model(2)
    if on:
        target.gradient_checkpointing_enable()
    transfer(model(1), target, gradient_checkpointing=True)
    assert target.is_gradient_checkpointing == on


@contextlib.contextmanager
def torch_defaults(device=None, dtype=torch.float32):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [{"device": "meta"}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("method", ["semalign", "laten"])
def test_the_callers_default_device_and_dtype_do_not_matter(default, method):
    batch = collate(encode(ROWS[:2], TOKENIZER), range(2), pad_token_id=0)

    def everything(source, target):
        delta = transfer(source, target, method=method).delta
        basis = SemanticBasis.from_model(source)
        scores = attribute(source, [batch])
        found = evaluate(source, ROWS[:2], TOKENIZER, max_new_tokens=2)
        return delta, SemanticMap.between(basis, basis).matrix, scores, found

    delta, matrix, scores, found = everything(model(1), model(2))
    models = model(1), model(2)
    with torch_defaults(**default):
        again = everything(*models)
    for path, change in delta.changes.items():
        assert torch.equal(change.matrix(), again[0].changes[path].matrix())
    assert torch.equal(matrix, again[1])
    assert torch.equal(scores, again[2])
    assert found == again[3]


def test_an_adapted_target_is_refused():
    source, target = model(1), model(2)
    result = transfer(source, target)
    for adapted in (target, result.model):
        with pytest.raises(ModelError, match="carries a PEFT adapter"):
            transfer(source, adapted)
    transfer(source, result.model.merge_and_unload())


def test_an_adapted_source_is_used_with_its_adapter():
    plain = model(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model(1), config).eval()
    losses = [transfer(source, model(2)).history[0]["layer_loss"] for source in (plain, adapted)]
    merged = transfer(adapted.merge_and_unload(), model(2)).history[0]["layer_loss"]
    assert losses[1] == pytest.approx(merged, rel=1e-4)
    assert losses[0] != pytest.approx(merged, rel=1e-4)


@pytest.mark.parametrize("how", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_compiled_models_run_eagerly(how):
    plain = transfer(model(1), model(2))
    compiled = how(model(1)), how(model(2))
    result = transfer(*compiled)
    assert result.history == plain.history
    assert getattr(compiled[0], "_orig_mod", None) or compiled[0]._compiled_call_impl is not None


def test_capture_sees_a_compiled_model():
    plain = model(1)
    batch = token_batch()
    with pkt_fast.capture(plain, [1, 3]) as expected:
        plain(**batch)
    compiled = model(1)
    compiled.compile()
    with pkt_fast.capture(compiled, [1, 3]) as acts:
        compiled(**batch)
    for layer in (1, 3):
        torch.testing.assert_close(acts[layer], expected[layer])
    assert Anatomy.of(torch.compile(plain)).model is plain


def test_a_token_without_an_embedding_is_refused():
    larger = toy_tokenizers.byte_level()
    larger.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"token id \d+, the source has \d+ tokens"):
        pkt_fast.transfer(
            model(1), model(2), [{"text": "a <new> b"}], tokenizer=larger, progress=False
        )


@pytest.mark.parametrize("given", [None, "", 3])
def test_what_is_neither_a_model_nor_a_name(given):
    with pytest.raises(ModelError, match="give a model, the path of one, or a hub id"):
        load_model(given)


def test_a_hub_id_without_a_connection_is_refused_at_once(tmp_path, monkeypatch):
    def unreachable(url):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda name, **_: pytest.fail(f"loads {name}")
    )
    with pytest.raises(ModelError, match=r"the hub cannot be reached \(no route\)"):
        load_model("org/name")
    (tmp_path / "models--org--cached" / "snapshots").mkdir(parents=True)
    with pytest.raises(pytest.fail.Exception, match="loads org/cached"):
        load_model("org/cached")


def test_a_path_may_start_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model(1).save_pretrained(tmp_path / "mine")
    assert load_model("~/mine").config.vocab_size == len(TOKENIZER)


def test_bad_data_is_found_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("pkt_fast.inputs.load_model", lambda *_, **options: pytest.fail("loaded"))
    with pytest.raises(pkt_fast.errors.DataError, match="no such file"):
        transfer("source", "target", tmp_path / "missing.jsonl")


def test_what_is_not_a_model_is_passed_over():
    with lent("path", None, kept=None):
        pass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transfer_differentiates_wherever_it_is_called(mode):
    expected = transfer(model(1), model(2)).history
    source, target = model(1), model(2)
    with mode():
        assert transfer(source, target).history == expected


def test_models_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        made = model(2)
    with pytest.raises(ModelError, match=r"the target was made under torch\.inference_mode"):
        transfer(model(1), made)


def test_another_thread_cannot_use_a_lent_model():
    shared, refusals = model(1), []

    def use():
        try:
            transfer(shared, model(3))
        except ModelError as error:
            refusals.append(str(error))

    with lent(shared, kept=None):
        with lent(shared, kept=None):  # the same thread may
            pass
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len(refusals) == 1
    assert "another thread" in refusals[0]
    use()
    assert len(refusals) == 1


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="tokenizer=3 of the source"):
        pkt_fast.transfer(model(1), model(2), ROWS, tokenizer=3, progress=False)


@pytest.mark.parametrize("fails", [False, True])
def test_models_come_back_to_the_device_they_were_on(fails, monkeypatch):
    """The target of a transfer stays where it was trained, unless that failed."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    source, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    where = {source: gpu, target: cpu}
    monkeypatch.setattr(lending, "device_of", where.get)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: where.update({self: device}))
    with contextlib.suppress(KeyError), lent(source, kept=target):
        where.update({source: cpu, target: gpu})
        if fails:
            raise KeyError
    assert where == {source: gpu, target: cpu if fails else gpu}


def test_device_of_a_model_in_one_place():
    assert lending.device_of(torch.nn.Linear(2, 2)) == torch.device("cpu")
    spread = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert lending.device_of(spread) is None
    assert lending.device_of(torch.nn.ReLU()) is None
