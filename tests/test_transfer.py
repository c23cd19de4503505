"""The whole transfer against the one-phase reference, and everything around it."""

import contextlib
import json
import threading

import pytest
import torch
import toy_tokenizers
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from toy_pairs import TOKENIZER, one_phase, relative_error, sized_model, sums
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pkt_fast
from pkt_fast import TransferConfig, steering
from pkt_fast.anatomy import Anatomy
from pkt_fast.data import encode
from pkt_fast.delta import LayerDelta
from pkt_fast.errors import (
    ConfigError,
    DataError,
    ModelError,
    NumericsError,
    OutputError,
    StoreError,
    VocabularyError,
)
from pkt_fast.ops import _registry
from pkt_fast.report import Clock
from pkt_fast.steering import (
    Loader,
    Tail,
    attach_lora,
    learning_rate_factor,
    plan_steps,
)

ROWS = sums(8, 5)
QUICK = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 3e-3}


def pair(family="llama", **options):
    return sized_model(family, 1, 48, 6, **options), sized_model(family, 2, 32, 4, **options)


def transfer(source, target, data=ROWS, **options):
    return pkt_fast.transfer(
        source, target, data, tokenizer=TOKENIZER, progress=False, **{**QUICK, **options}
    )


def test_one_source_layer_alone_can_be_attributed():
    attributed = transfer(*pair(), num_layers=4, pairing="single")
    assert [len(link.source) for link in attributed.pairs] == [1, 1, 1, 1]


def test_every_stage_of_the_frontier_has_its_own_rise_and_fall():
    options = {"learning_rate_schedule": "cosine", "warmup_fraction": 0.2, "learning_rate": 1.0}
    result = transfer(*pair(), layers=[0, 1], schedule="frontier", steps=10, **options)
    rates = [record["learning_rate"] for record in result.history]
    assert rates[:5] == rates[5:]
    assert rates[0] == max(rates[:5]) == 1.0
    assert rates[4] < 0.2


def test_a_frontier_with_fewer_steps_than_layers_is_refused():
    with pytest.raises(ConfigError, match=r"steps of a transfer \(3\) among its layers \(4\)"):
        transfer(*pair(), layers="all", schedule="frontier", steps=3)
    solved = transfer(
        *pair(), layers="all", schedule="frontier", steps=3, solver="ridge", output_loss="none"
    )
    assert len(solved.delta.changes) == 4


def test_reference_backend_gives_the_same_adapter():
    auto = transfer(*pair())
    plain = transfer(*pair(), backend="reference")
    assert relative_error(auto.delta, plain.delta) < 1e-4
    assert pkt_fast.backend() == "auto"


def test_the_report_says_which_implementations_ran(monkeypatch):
    quick = {"steps": 1, "layers": [1]}
    plain = transfer(*pair(), backend="reference", **quick).report
    assert set(plain["ops"].values()) == {"reference"}
    auto = transfer(*pair(), **quick).report
    assert auto["ops"]["align_rows"] == auto["ops"]["linear_kl"] == "native"
    calls = plain["op_calls"]["align_rows"]["reference"]
    assert auto["op_calls"]["align_rows"] == {"native": calls}
    assert "linear_kl" not in auto["op_calls"]
    monkeypatch.setitem(_registry._ops["align_rows"].supports, "native", lambda *args: False)
    fallen = transfer(*pair(), **quick).report
    assert fallen["ops"] == auto["ops"] | {"align_rows": "reference"}
    assert fallen["op_calls"]["align_rows"] == plain["op_calls"]["align_rows"]


def test_losses_fall_and_only_the_paired_layer_moves():
    source, target = pair()
    before = {name: p.clone() for name, p in target.named_parameters()}
    result = transfer(source, target, epochs=6)
    first, last = result.history[0], result.history[-1]
    assert last["layer_loss"] < first["layer_loss"]
    assert last["output_loss"] < first["output_loss"]
    layer = result.pairs[0].target
    assert all(path.startswith(f"model.layers.{layer}.") for path in result.delta.changes)
    names = {path.rpartition(".")[2] for path in result.delta.changes}
    assert names == {"up_proj", "down_proj", "v_proj", "o_proj"}
    plain = result.model.unload()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_frozen_prefix_builds_no_graph_and_does_not_run():
    _, target = pair()
    config = TransferConfig.make(layers=[2], **QUICK)
    adapted = attach_lora(target, [2], config)
    examples = encode(ROWS[:4], TOKENIZER)
    anatomy = Anatomy.of(adapted)
    loader = Loader(examples, None, None, torch.device("cpu"), 0, torch.float32)
    micro = loader.build([0, 1, 2, 3])
    hidden = torch.randn(*micro.batch.input_ids.shape, 32)
    micro = type(micro)(**{**micro.__dict__, "hidden": hidden})
    ran = []
    for i, block in enumerate(anatomy.layers):
        block.mlp.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    rows = Tail(adapted, 2, [2], "mlp", needs_head=True).rows(micro)
    assert ran == [2, 3]
    rows.head.sum().backward()
    moved = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert moved
    assert all(".layers.2." in name and "lora_" in name for name in moved)


def test_without_an_output_loss_nothing_above_the_layer_runs():
    source, target = pair()
    ran = []
    for i, block in enumerate(target.model.layers):
        block.mlp.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    Anatomy.of(target)
    ran.clear()
    transfer(source, target, layers=[1], output_loss="none")
    assert set(ran) == {0, 1}


def test_same_seed_same_bytes(tmp_path):
    for name in "ab":
        transfer(*pair(), output_dir=tmp_path / name, dropout=0.1)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in "ab"]
    assert configs[0] == configs[1]
    other = transfer(*pair(), seed=1)
    assert relative_error(other.delta, LayerDelta.load(tmp_path / "a")) > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_output_is_a_peft_adapter_with_reports(tmp_path, family):
    result = transfer(*pair(family), output_dir=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
        "report.html",
    }
    loaded = PeftModel.from_pretrained(pair(family)[1], tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        plain = pair(family)[1]
        assert not torch.allclose(plain(input_ids=ids).logits, expected)
        pkt_fast.inject(plain, LayerDelta.load(tmp_path / "out"))
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert {"attribute", "source pass", "steer"} <= set(report["phases"])
    assert len(report["history"]) == len(result.history)
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


OBJECTIVES = [
    {"objective": "relation", "output_loss": "kl", "schedule": "frontier", "layers": "all"},
    {"objective": "squared", "recompose": "dual", "output_loss": "cross_entropy"},
    {"objective": "fisher", "recompose": "logit", "output_loss": "kl", "kl_kind": "reverse"},
    {"objective": "none", "output_loss": "logit_cosine", "layers": [3]},
    {
        "objective": "none",
        "output_loss": "kl",
        "label_weight": 1.0,
        "layers": [1],
        "kl_kind": "jsd",
    },
    {"objective": "cosine", "output_loss": "none", "num_layers": 2, "recompose": "dual"},
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_every_objective_trains(options):
    result = transfer(*pair(), epochs=4, **options)
    first, last = result.history[0], result.history[-1]
    names = [name for name in first if name.endswith("_loss")]
    assert names
    total = [sum(record[name] for name in names) for record in (first, last)]
    assert total[1] < total[0]


def test_micro_batches_do_not_change_the_step():
    one = transfer(*pair(), micro_batch_size=16, objective="relation")
    many = transfer(*pair(), micro_batch_size=3, objective="relation")
    assert relative_error(one.delta, many.delta) < 1e-4


@pytest.mark.parametrize("interface", ["mlp", "contribution"])
@pytest.mark.parametrize("attribution_examples", [6, 40])
def test_the_source_pass_leaves_out_what_attribution_saw(attribution_examples, interface):
    """The same rows, in another order: the adapter of a pass over all examples."""
    config = TransferConfig.make(
        attribution_examples=attribution_examples, num_layers=2, interface=interface, **QUICK
    )
    shared = transfer(*pair(), config=config)
    assert any(len(pair.source) == 2 for pair in shared.pairs)
    passed = shared.report["phases"]["source pass"].get("tokens", 0)
    assert ("tokens_per_second" in shared.report["phases"]["source pass"]) == (passed > 0)
    lengths = encode(ROWS, TOKENIZER).lengths
    assert passed == sum(lengths[attribution_examples:])
    alone = transfer(*pair(), config=config, store_budget_gb=1e-9)
    assert alone.report["phases"]["source pass"]["tokens"] == sum(lengths)
    assert relative_error(shared.delta, alone.delta) < 1e-4
    history, delta = one_phase(*pair(), ROWS, shared.pairs, config)
    assert shared.history[-1]["layer_loss"] == pytest.approx(history[-1]["layer_loss"], abs=1e-5)
    assert relative_error(shared.delta, delta) < 1e-4


def test_attribution_shares_nothing_where_more_is_wanted():
    """The head's input, and the rows of a fine-tuned source's change, come from a whole pass."""
    lengths = encode(ROWS, TOKENIZER).lengths
    for options in (
        {"output_loss": "kl"},
        {"source_base": sized_model("llama", 3, 48, 6), "recompose": "dual"},
    ):
        result = transfer(*pair(), **options)
        assert result.report["phases"]["source pass"]["tokens"] == sum(lengths)


def test_a_store_remembers_the_attribution(tmp_path):
    first = transfer(*pair(), store=tmp_path)
    again = transfer(*pair(), store=tmp_path)
    assert "attribute" in first.report["phases"]
    assert "attribute" not in again.report["phases"]
    assert torch.equal(first.attribution, again.attribution)
    other = transfer(*pair(), store=tmp_path, reduction="signed")
    assert not torch.equal(other.attribution, first.attribution)
    for file in tmp_path.glob("attribution-*.json"):
        file.write_text(file.read_text().replace('"values": [', '"values": ["x", '))
    with pytest.raises(StoreError, match=r"attribution-\w+\.json is damaged"):
        transfer(*pair(), store=tmp_path)


class NothingReadBack(TorchDispatchMode):
    """Fails where a value on the device would be waited for: items, and masks as indices."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        masks = args[1] if name in ("aten.index.Tensor", "aten.index_put.default") else ()
        if any(word in name for word in self.WAITING) or any(
            index is not None and index.dtype == torch.bool for index in masks
        ):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "relation", "output_loss": "kl", "label_weight": 1.0},
        {"objective": "fisher", "output_loss": "kl", "kl_kind": "jsd", "recompose": "dual"},
        {"output_loss": "logit_cosine", "label_smoothing": 0.1},
        {"output_loss": "cross_entropy", "label_smoothing": 0.1},
        {"method": "hidden_kd"},
    ],
    ids=str,
)
def test_losses_and_gradients_of_a_step_wait_for_nothing(monkeypatch, options):
    backward = steering._backward
    calls = []

    def watched(*args):
        calls.append(args)
        with NothingReadBack():
            backward(*args)

    monkeypatch.setattr(steering, "_backward", watched)
    transfer(*pair(), epochs=1, **options)
    assert calls


def test_losses_are_read_in_groups(monkeypatch):
    """All steps are in the history, whenever they were read; a GPU is asked every ten."""
    reads = []
    read = steering._LossLog._read
    monkeypatch.setattr(
        steering._LossLog, "_read", lambda log: (reads.append(len(log.waiting)), read(log))
    )
    every = transfer(*pair())
    assert set(reads) == {0, 1}
    reads.clear()
    grouped = transfer(*pair(), log_every=4)
    assert reads == [4, 2]
    assert grouped.history == every.history


def test_a_directory_store_gives_the_same_adapter_and_is_reused(tmp_path):
    memory = transfer(*pair())
    for _ in range(2):
        on_disk = transfer(*pair(), store=str(tmp_path / "store"))
        assert relative_error(on_disk.delta, memory.delta) < 1e-6
    assert "source pass" not in on_disk.report["phases"]
    kinds = {path.name.split("-")[0] for path in (tmp_path / "store").iterdir()}
    assert kinds - {"target"} == {"attribution", "source"}
    assert ("target" in kinds) == (memory.pairs[0].target > 0)
    spilled = transfer(*pair(), store_budget_gb=1e-9)
    assert relative_error(spilled.delta, memory.delta) < 1e-6


def test_a_damaged_store_is_refused(tmp_path):
    transfer(*pair(), store=str(tmp_path), layers=[2])
    for shard in tmp_path.glob("source-*/layer2-*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-3] ^= 255
        shard.write_bytes(content)
    with pytest.raises(StoreError, match="checksum"):
        transfer(*pair(), store=str(tmp_path), layers=[2])


def test_padded_heads_of_different_length():
    source = sized_model("llama", 1, 48, 6)
    target = sized_model("llama", 2, 32, 4)
    target.resize_token_embeddings(len(TOKENIZER) + 3)
    result = transfer(source, target, output_loss="kl")
    assert result.report["summary"]["shared vocabulary"] == len(TOKENIZER)


def test_nothing_is_written_when_the_run_fails(tmp_path):
    source, target = pair()
    with torch.no_grad():
        source.model.layers[5].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match="layer 5 of LlamaForCausalLM"):
        transfer(source, target, output_dir=tmp_path / "out", layers=[3])
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_on_the_data_name_the_layer(tmp_path):
    source, target = pair()
    Anatomy.of(source)  # probed while it was sound
    with torch.no_grad():
        source.model.layers[5].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="layer3 in batch 0"):
        transfer(source, target, output_dir=tmp_path / "out", layers=[3])
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_the_last_update_spoilt_is_refused():
    source, target = pair()
    target.model.layers[2].register_full_backward_hook(
        lambda module, inner, outer: tuple(None if g is None else g * torch.nan for g in inner)
    )
    with pytest.raises(NumericsError, match=r"left NaN or inf in the adapter of model\.layers\.1"):
        transfer(source, target, layers=[1], interface="block", steps=1)


def test_fisher_on_a_float32_stream_before_a_bfloat16_head():
    source, target = sized_model("llama", 1, 48, 3), sized_model("mamba", 2, 32, 3)
    result = transfer(
        source.bfloat16(),
        target.bfloat16(),
        objective="fisher",
        interface="block",
        recompose="fitted",
        layers=[1],
        steps=1,
    )
    assert result.history


def test_a_diverging_run_names_the_step():
    with pytest.raises(NumericsError, match="at step"):
        transfer(
            *pair(),
            learning_rate=1e30,
            epochs=30,
            objective="none",
            output_loss="cross_entropy",
            layers=[1],
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": [9]}, ConfigError, "target layer 9 is out of range"),
        ({"num_layers": 9}, ConfigError, "the target has 4 layers"),
        ({"target_modules": ["nothing"]}, ConfigError, "nothing"),
        ({"device": "warp"}, ConfigError, "device='warp'"),
        ({"data": []}, DataError, "row"),
        ({"data": [{"question": "?"}]}, DataError, "question"),
    ],
)
def test_refusals(options, error, words):
    data = options.pop("data", ROWS)
    with pytest.raises(error, match=words) as caught:
        transfer(*pair(), data, **options)
    assert "\n" not in str(caught.value)


def test_output_directory_must_be_free(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        transfer(*pair(), output_dir=tmp_path / "out")
    with pytest.raises(OutputError, match=r"did not write \(mine.txt\)"):
        transfer(*pair(), output_dir=tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine.txt").rename(tmp_path / "mine.txt")
    for _ in range(2):
        transfer(*pair(), output_dir=tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").iterdir())) == 4
    with pytest.raises(OutputError, match="is a file"):
        transfer(*pair(), output_dir=tmp_path / "out" / "report.json")


@pytest.mark.parametrize("store", ["out", "out/store", "link/store"])
def test_a_store_in_the_output_directory_is_refused_at_once(tmp_path, store):
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(OutputError, match="lies in the output directory"):
        transfer("none", "none", output_dir=tmp_path / "out", store=tmp_path / store)
    assert not (tmp_path / "out").exists()


def test_models_without_a_common_vocabulary(tmp_path):
    other = toy_tokenizers.byte_level(bos=False)

    class Foreign:
        all_special_tokens = ()

        def get_vocab(self):
            return {f"zzz{i}": i for i in range(len(other))}

        def __call__(self, text, **options):
            return other(text, **options)

    with pytest.raises(VocabularyError, match="share 0 tokens"):
        pkt_fast.transfer(*pair(), ROWS, tokenizer=(Foreign(), TOKENIZER), **QUICK)


def test_paths_that_are_not_models(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        pkt_fast.transfer(tmp_path / "no" / "where", tmp_path / "x" / "y", ROWS)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    config = TransferConfig.make(learning_rate_schedule=schedule, warmup_fraction=0.2)
    factors = [learning_rate_factor(step, 10, config) for step in range(10)]
    assert factors[:2] == [0.5, 1.0]
    assert all(0 <= f <= 1 for f in factors)
    if schedule == "constant":
        assert set(factors[2:]) == {1.0}
    else:
        assert sorted(factors[1:], reverse=True) == factors[1:]
        assert factors[-1] < 0.2


@pytest.mark.parametrize(
    ("family", "interface"),
    [("llama", "mlp"), ("gpt2", "contribution"), ("phi", "mlp"), ("bloom", "attention")],
)
def test_gradient_checkpointing_runs_blocks_twice_to_the_same_adapter(family, interface):
    calls = []

    def run(**options):
        source, target = sized_model(family, 1, 48, 3), sized_model(family, 2, 32, 3)
        last = Anatomy.of(target).layers[-1]
        module = next(m for m in last.modules() if isinstance(m, torch.nn.LayerNorm | LlamaRMSNorm))
        calls.append(0)

        def count(module, args):
            calls[-1] += torch.is_grad_enabled()

        module.register_forward_pre_hook(count)
        return transfer(
            source, target, layers=[1, 2], interface=interface, dropout=0.1, **options
        ).delta

    plain, checkpointed = run(), run(gradient_checkpointing=True)
    assert relative_error(checkpointed, plain) < 1e-5
    assert calls[1] == 2 * calls[0] > 0


def test_clipping_changes_the_training():
    plain = transfer(*pair(), layers=[1])
    clipped = transfer(*pair(), layers=[1], max_grad_norm=1e-3)
    assert relative_error(clipped.delta, plain.delta) > 1e-6


def test_blocks_that_nothing_is_read_from_are_compiled(monkeypatch):
    compiled = []

    def compile(block, **options):
        compiled.append(block)
        block._compiled_call_impl = block._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    source, target = pair()
    transfer(source, target, layers=[1], compile=True, steps=1)
    assert compiled == list(target.model.layers[2:])
    assert all(block._compiled_call_impl is None for block in target.model.layers)


def test_micro_batches_are_built_ahead_in_another_thread(monkeypatch):
    threads = []

    def build(loader, examples):
        threads.append(threading.get_ident())
        return plain(loader, examples)

    plain = Loader.build
    monkeypatch.setattr(Loader, "build", build)
    transfer(*pair(), layers=[1], epochs=1)
    assert len(threads) == 5
    assert threading.get_ident() not in threads


def test_dropout_reaches_the_adapter_and_its_training():
    plain = transfer(*pair(), layers=[1], epochs=1)
    dropped = transfer(*pair(), layers=[1], epochs=1, dropout=0.5)
    assert dropped.model.peft_config["default"].lora_dropout == 0.5
    assert relative_error(dropped.delta, plain.delta) > 1e-3
    # The first loss is read at an adapter of zeros, whatever is dropped.
    assert dropped.history[0]["layer_loss"] == pytest.approx(plain.history[0]["layer_loss"])


def test_steps_are_planned_with_or_without_buckets():
    lengths = [3, 40, 4, 41, 5, 42, 6, 43]
    settings = {"batch_size": 2, "epochs": 1}
    spread = []
    for bucket in (True, False):
        plan = plan_steps(lengths, TransferConfig.make(bucket=bucket, **settings))
        assert sorted(i for step in plan for micro in step.micro for i in micro) == list(range(8))
        spread.append(max(lengths[m[0]] - lengths[m[-1]] for step in plan for m in step.micro))
    assert spread[0] <= 3
    assert spread[1] > 30


def test_a_head_of_another_width_than_the_layers():
    def projected():
        return sized_model("opt", 1, 48, 3, word_embed_proj_dim=24)

    def plain():
        return sized_model("llama", 2, 32, 3)

    for models in ((projected(), plain()), (plain(), projected())):
        with pytest.raises(ModelError, match="reads 24 numbers a token, its layers give 48"):
            transfer(*models)
    for options in (
        {"recompose": "fitted"},
        {"method": "kd"},
        {"method": "hidden_kd"},
        {"objective": "none", "output_loss": "logit_cosine"},
    ):
        for make_source, make_target in ((projected, plain), (plain, projected)):
            assert transfer(make_source(), make_target(), epochs=1, layers=[1], **options).history


@pytest.mark.slow
def test_a_compiled_tail_gives_the_same_adapter():
    plain = transfer(*pair(), layers=[1])
    source, target = pair()
    compiled = transfer(source, target, layers=[1], compile=True)
    assert relative_error(compiled.delta, plain.delta) < 1e-4
    assert all(block._compiled_call_impl is None for block in target.model.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_float16_target_trains_on_the_gradients_of_a_float32_one(family, monkeypatch):
    taken = []

    class Recording(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            taken.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    # A small layer weight stands for the many rows a mean is taken over in earnest.
    options = {"epochs": 1, "batch_size": len(ROWS), "layers": [2], "output_weight": 1e-3}
    options |= {"layer_weight": 1e-3, "rank": 4}
    for dtype in (torch.float32, torch.float16):
        source, target = (m.to(dtype) for m in pair(family))
        transfer(source, target, **options)
    exact, half = (torch.cat([g.flatten() for g in step]) for step in taken)
    assert (half - exact).norm() < 0.01 * exact.norm()


def test_nothing_to_adapt_is_found_before_the_data_is_passed(monkeypatch):
    monkeypatch.setattr("pkt_fast.supervision.run_source", None)
    with pytest.raises(ConfigError, match=r"target_modules \['nope'\]"):
        transfer(*pair(), layers=[1], target_modules=["nope"])


def test_a_dtype_that_an_object_has_not_is_refused():
    source, target = pair()
    with pytest.raises(ConfigError, match=r"the source was given as an object of torch.float32"):
        transfer(source, target, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"the target .* model.to\(torch.bfloat16\)"):
        transfer(source.bfloat16(), target, dtype="bfloat16")


def test_bfloat16_models_transfer_like_float32_ones():
    """Losses within bfloat16's precision, and falling."""
    options = {"epochs": 4, "layers": [2], "learning_rate": 1e-2}
    exact = transfer(*pair(), dtype="float32", **options).history
    half = transfer(*(m.bfloat16() for m in pair()), dtype="bfloat16", **options).history
    for name in ("layer_loss", "output_loss"):
        assert half[0][name] == pytest.approx(exact[0][name], rel=0.02)
    assert half[-1]["layer_loss"] < half[0]["layer_loss"]


def test_a_phase_counts_its_own_work_on_a_gpu(monkeypatch):
    """A GPU is waited for at the end of a phase, but not after an error: that is what counts."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = Clock(torch.device("cuda", 1))
    with clock.phase("one"):
        assert not waited
    with contextlib.suppress(KeyError), clock.phase("two"):
        raise KeyError
    with Clock().phase("on the CPU"):
        pass
    assert waited == [torch.device("cuda", 1)]
    assert list(clock.seconds) == ["one", "two"]
