"""Answers, greedy replies and scores, against the plainest way to compute each."""

import importlib.util
import json
import sys

import pytest
import torch
import toy_tokenizers
from models import tiny_model
from torch.nn import functional as F

from pkt_fast.data import batches, encode
from pkt_fast.delta import LayerDelta, LowRank, eject, inject
from pkt_fast.errors import ConfigError, DataError, MissingExtraError, NumericsError
from pkt_fast.evaluation import agreement, evaluate, generate_replies, matches
from pkt_fast.evaluation.answers import answer_of, reference_reply
from pkt_fast.evaluation.generation import prompt_ids
from pkt_fast.evaluation.harness import evaluate_tasks
from pkt_fast.phases import AlignedPositions
from pkt_fast.vocabulary import match_vocabularies

TOKENIZER = toy_tokenizers.byte_level(bos=True)
ROWS = [
    {"prompt": f"{a} apples and {a * b}" * (1 + a % 3), "completion": f" so {a + b} in all"}
    for a in range(1, 5)
    for b in range(3)
]


def model(family="llama", seed=0, **options):
    return tiny_model(family, seed=seed, vocab_size=len(TOKENIZER), **options)


# --------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("First 3 + 4 = 7. So the answer is 7.", "7"),
        ("She has 12 left.\n#### 1,234", "1234"),
        ("It costs $1,234.50 in all", "1234.5"),
        ("The answer is -3.", "-3"),
        ("The answer is: 18 dollars, not 20", "18"),
        ("18.00", "18"),
        ("between 3 and 10", "10"),
        ("half is .5", "0.5"),
        ("1000000", "1000000"),
        ("the answer is unclear, perhaps 4", "4"),
    ],
)
def test_numbers(reply, value):
    assert answer_of(reply, "number").value == value


def test_no_number():
    assert answer_of("none at all", "number") is None
    assert not matches("none at all", "#### 4")


@pytest.mark.parametrize("reply", ["B", "(B)", "B.", "B) Paris", "The answer is (B).", "answer: B"])
def test_letters(reply):
    assert answer_of(reply).kind == "letter"
    assert matches(reply, "B")
    assert not matches(reply, "C")


def test_the_reference_decides_what_is_compared():
    assert answer_of("A lemon is yellow.").kind == "text"
    assert matches(" A lemon  is yellow.\n", "A lemon is yellow.")
    assert not matches("A lemon is green.", "A lemon is yellow.")
    assert matches("42", "The sum is 40 + 2 = 42.")
    assert not matches("B", "#### 42")


def test_reference_reply_of_every_row_shape():
    said = {"role": "assistant", "content": "4"}
    asked = {"role": "user", "content": "2+2"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "4"}]}
    assert reference_reply({"messages": [asked, said]}) == "4"
    assert reference_reply({"messages": [asked, parts]}) == "4"
    assert reference_reply({"messages": [asked]}) is None
    assert reference_reply({"prompt": "2+2", "completion": "4"}) == "4"
    assert reference_reply({"prompt": [asked], "completion": [said]}) == "4"
    assert reference_reply({"text": "2+2=4"}) is None
    assert reference_reply("2+2=4") is None


# --------------------------------------------------------------------------- replies


@torch.no_grad()
def greedy(net, ids, steps):
    """One row, no cache, no padding."""
    ids = list(ids)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(net(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_batched_replies_equal_single_ones(family):
    net = model(family)
    wanted = [greedy(net, prompt_ids(row, TOKENIZER), 6) for row in ROWS]
    assert generate_replies(net, ROWS, TOKENIZER, max_new_tokens=6, batch_size=5) == wanted
    assert len(set(wanted)) > 1


def test_shipped_sampling_settings_are_overruled():
    net = model()
    plain = generate_replies(net, ROWS[:3], TOKENIZER, max_new_tokens=6)
    net.generation_config.do_sample = True
    net.generation_config.temperature = 5.0
    net.generation_config.repetition_penalty = 3.0
    assert generate_replies(net, ROWS[:3], TOKENIZER, max_new_tokens=6) == plain


def test_prompts_are_what_training_saw():
    for template in (None, "chatml", "llama3"):
        tokenizer = toy_tokenizers.byte_level(template, bos=True)
        row = {"messages": [{"role": "user", "content": "How many apples?"},
                            {"role": "assistant", "content": " 12"}]}  # fmt: skip
        example = encode([row], tokenizer)[0]
        prompt = tuple(prompt_ids(row, tokenizer))
        assert example.input_ids[: len(prompt)] == prompt
        assert prompt.count(tokenizer.bos_token_id) == example.input_ids.count(
            tokenizer.bos_token_id
        )
        assert len(prompt) < len(example)


# --------------------------------------------------------------------------- scores


@torch.no_grad()
def plain_scores(net):
    """Loss and accuracy from whole logits, a row at a time, in float64."""
    losses, hits = [], []
    for batch in batches(encode(ROWS, TOKENIZER), 1, pad_token_id=2):
        logits = net(**batch.model_inputs()).logits[batch.supervised].double()
        targets = batch.targets[batch.supervised]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(-1) == targets)
    return float(torch.cat(losses).mean()), float(torch.cat(hits).double().mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_scores_equal_plain_logits(family, monkeypatch):
    """Also with a softcap, a logit scale and a head bias; a few rows of logits at a time."""
    from pkt_fast.evaluation import rows

    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 3 * len(TOKENIZER))
    net = model(family)
    found = evaluate(net, ROWS, TOKENIZER, batch_size=5, generate=False)
    loss, accuracy = plain_scores(net)
    assert found.next_token_loss == pytest.approx(loss, rel=1e-5)
    assert found.token_accuracy == pytest.approx(accuracy)
    assert (found.examples, found.answered, found.exact_match) == (len(ROWS), 0, None)
    assert found.tokens == sum(e.num_supervised for e in encode(ROWS, TOKENIZER))


def test_exact_match_counts_rows_whose_answer_is_right():
    net = model()
    said = generate_replies(net, ROWS, TOKENIZER, max_new_tokens=6)
    rows = [
        {"prompt": row["prompt"], "completion": reply if i % 3 == 0 else "zebra zebra"}
        for i, (row, reply) in enumerate(zip(ROWS, said, strict=True))
    ]
    rows[0]["completion"] = rows[0]["completion"] or "empty"
    found = evaluate(net, rows, TOKENIZER, max_new_tokens=6)
    expected = sum(matches(r, row["completion"]) for r, row in zip(said, rows, strict=True))
    assert 0 < expected < len(rows)
    assert found.exact_match == expected / len(rows)
    assert found.answered == len(rows)


def test_plain_text_has_no_reply_to_generate():
    found = evaluate(model(), [{"text": "user: hello there"}], TOKENIZER)
    assert found.exact_match is None
    assert found.tokens > 0


def test_a_delta_is_there_for_the_evaluation_only(tmp_path):
    net = model(seed=3)
    path = "model.layers.1.mlp.down_proj"
    out, inner = net.get_submodule(path).weight.shape
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=generator) for s in ((2, inner), (out, 2)))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    delta = LayerDelta({path: LowRank(down, up, 2.0)}, config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = evaluate(net, ROWS, TOKENIZER, generate=False)
    with_delta = evaluate(net, ROWS, TOKENIZER, delta=delta, generate=False)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with torch.no_grad():
        net.get_submodule(path).weight += delta.changes[path].matrix()
    merged = evaluate(net, ROWS, TOKENIZER, generate=False)
    assert with_delta.next_token_loss == pytest.approx(merged.next_token_loss, rel=1e-5)
    assert with_delta.next_token_loss != pytest.approx(plain.next_token_loss, rel=1e-4)


def test_evaluating_a_delta_keeps_what_was_injected_before():
    net = tiny_model("llama", vocab_size=len(TOKENIZER))
    path = "model.layers.1.mlp.up_proj"
    out, into = net.get_submodule(path).weight.shape
    change = LowRank(torch.randn(2, into), torch.randn(out, 2), 0.1)
    delta = LayerDelta({path: change}, {"peft_type": "LORA"})
    inject(net, delta)
    before = net.get_submodule(path).weight.clone()
    evaluate(net, ROWS, TOKENIZER, delta=delta, generate=False)
    assert torch.equal(net.get_submodule(path).weight, before)
    assert eject(net) == 1


def test_training_mode_is_restored():
    net = model().train()
    evaluate(net, ROWS[:2], TOKENIZER, generate=False)
    assert net.training


def test_nan_logits_are_refused():
    net = model()
    evaluate(net, ROWS[:2], TOKENIZER, generate=False)
    with torch.no_grad():
        net.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericsError, match="logits hold NaN"):
        evaluate(net, ROWS[:2], TOKENIZER, generate=False)


# --------------------------------------------------------------------------- agreement


def test_agreement_equals_plain_distributions(monkeypatch):
    from pkt_fast.evaluation import rows

    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 4 * len(TOKENIZER))
    small, large = model(seed=1), model("gpt2", seed=2)
    kl, same = [], []
    with torch.no_grad():
        for batch in batches(encode(ROWS, TOKENIZER), 1, pad_token_id=2):
            ours, theirs = (
                net(**batch.model_inputs()).logits[batch.supervised].double().log_softmax(-1)
                for net in (small, large)
            )
            kl.append((theirs.exp() * (theirs - ours)).sum(-1))
            same.append(ours.argmax(-1) == theirs.argmax(-1))
    found = agreement(small, large, ROWS, TOKENIZER, batch_size=5)
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()))
    itself = agreement(small, small, ROWS, TOKENIZER)
    assert itself.kl == pytest.approx(0, abs=1e-6)
    assert itself.top1 == 1


def test_agreement_is_over_shared_tokens_of_padded_heads():
    small = model(seed=1)
    padded = tiny_model("llama", seed=1, vocab_size=len(TOKENIZER) + 7)
    found = agreement(small, padded, ROWS, TOKENIZER)
    assert found.kl > 0
    assert found.tokens == sum(e.num_supervised for e in encode(ROWS, TOKENIZER))


def test_agreement_aligns_texts_that_are_cut_differently():
    cut_otherwise = toy_tokenizers.metaspace()
    mine, other = model(), tiny_model("llama", seed=5, vocab_size=len(cut_otherwise))
    found = agreement(mine, other, ROWS, (TOKENIZER, cut_otherwise), batch_size=5)
    examples = encode(ROWS, TOKENIZER)
    aligned = AlignedPositions.across(examples, cut_otherwise)
    shared = match_vocabularies(len(TOKENIZER), len(cut_otherwise), TOKENIZER, cut_otherwise)
    kl, same, tokens = 0.0, 0, 0
    for i, example in enumerate(examples):
        own = supervised_logits(mine, example, examples.supervised_positions(i))
        theirs = supervised_logits(other, aligned.examples[i], aligned.positions[i])
        own, theirs = own[:, shared.source], theirs[:, shared.target]
        kl += float(F.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="sum"))
        same += int((own.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(own)
    assert found.tokens == tokens
    assert found.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert found.top1 == same / tokens


@torch.no_grad()
def supervised_logits(net, example, positions):
    return net(torch.tensor([example.input_ids])).logits[0, list(positions)].double()


# --------------------------------------------------------------------------- lm-eval


def test_missing_lm_eval_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pkt-fast\[eval\]"):
        evaluate_tasks(model(), TOKENIZER, ["gsm8k"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval not installed")
def test_unknown_lm_eval_task():
    with pytest.raises(ConfigError, match="no such task"):
        evaluate_tasks(model(), TOKENIZER, ["no_such_task_at_all"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval not installed")
def test_an_lm_eval_task_of_ones_own(tmp_path):
    questions = [{"q": f"{a}+1=", "c": [str(a + 1), str(a + 2)]} for a in range(6)]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "sums.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(
        f"""
task: own_sums
dataset_path: json
dataset_kwargs:
  data_files: {tmp_path / "sums.jsonl"}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        encoding="utf-8",
    )
    found = evaluate_tasks(model(), TOKENIZER, ["own_sums"], limit=4, task_dir=tmp_path)
    assert found["own_sums"].keys() == {"acc", "acc_stderr"}
    assert found["own_sums"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(DataError, match="cannot load the data of own_sums"):
        evaluate_tasks(model(), TOKENIZER, ["own_sums"], task_dir=tmp_path)
