"""Positions of two tokenizers meet where they have read the same characters."""

import pytest
import torch
import toy_tokenizers
from models import tiny_model

import pkt_fast
from pkt_fast import reference
from pkt_fast.data import IGNORE_INDEX, encode
from pkt_fast.errors import DataError
from pkt_fast.text_alignment import answering_positions, retokenized
from pkt_fast.vocabulary import match_vocabularies

ROWS = [
    {"prompt": "Question: how many apples are 3 and 14? ", "completion": "There are 17 apples."},
    {"prompt": "é naïve: ", "completion": "ünïcödé text, and more of it"},
    {"prompt": "x" * 60, "completion": "a long prompt before a short answer"},
]


@pytest.mark.parametrize("max_length", [1024, 24])
@pytest.mark.parametrize("turned", [False, True])
def test_the_source_has_read_as_far_as_it_may_and_no_further(turned, max_length):
    tokenizers = [toy_tokenizers.byte_level(), toy_tokenizers.metaspace()]
    target_tokenizer, source_tokenizer = tokenizers[::-1] if turned else tokenizers
    examples = encode(ROWS, target_tokenizer, max_length=max_length)
    sources = retokenized(examples, source_tokenizer)
    assert len(sources) == len(examples)
    for target, source in zip(examples, sources, strict=True):
        read = 0
        target_read, covered = [], 0
        for start, end in target.offsets:
            read += max(0, end - max(start, covered))
            covered = max(covered, end)
            target_read.append(read)
        ends, furthest = [], 0
        for _, end in source.offsets:
            furthest = max(furthest, end)
            ends.append(furthest)
        positions = answering_positions(target, source)
        wanted = [t for t, label in enumerate(target.labels[1:]) if label != IGNORE_INDEX]
        assert len(positions) == len(wanted) == target.num_supervised
        for t, s in zip(wanted, positions, strict=True):
            assert ends[s] <= target_read[t] or s == 0
            if s + 1 < len(ends):
                assert ends[s + 1] > target_read[t]


def test_supervised_text_is_the_same():
    target_tokenizer, source_tokenizer = toy_tokenizers.byte_level(), toy_tokenizers.metaspace()
    examples = encode(ROWS[:2], target_tokenizer)
    for target, source in zip(examples, retokenized(examples, source_tokenizer), strict=True):

        def supervised(example):
            return "".join(
                example.text[a:b]
                for (a, b), label in zip(example.offsets, example.labels, strict=True)
                if label != IGNORE_INDEX
            )

        answer = ROWS[target.row]["completion"]
        assert answer.split()[-1] in supervised(target)
        assert answer.split()[-1] in supervised(source)
        assert ROWS[target.row]["prompt"].split()[1] not in supervised(source)


def test_the_same_tokenizer_answers_itself():
    tokenizer = toy_tokenizers.byte_level()
    examples = encode(ROWS[::2], tokenizer)  # one character, one token span
    for target, source in zip(examples, retokenized(examples, tokenizer), strict=True):
        wanted = [t for t, label in enumerate(target.labels[1:]) if label != IGNORE_INDEX]
        assert answering_positions(target, source) == wanted


def test_a_transfer_between_families():
    target_tokenizer, source_tokenizer = toy_tokenizers.byte_level(), toy_tokenizers.metaspace()
    source = tiny_model("gpt_neox", seed=1, vocab_size=len(source_tokenizer), hidden_size=48)
    target = tiny_model("llama", seed=2, vocab_size=len(target_tokenizer))
    result = pkt_fast.transfer(
        source,
        target,
        ROWS * 6,
        tokenizer=(source_tokenizer, target_tokenizer),
        epochs=4,
        batch_size=6,
        learning_rate=3e-3,
        progress=False,
    )
    shared = result.report["summary"]["shared vocabulary"]
    assert 0 < shared < min(len(source_tokenizer), len(target_tokenizer))
    assert result.history[-1]["layer_loss"] < result.history[0]["layer_loss"]
    assert all(torch.isfinite(c.up).all() for c in result.delta.changes.values())


def test_the_losses_between_families_are_those_written_out():
    """KL over the rows that both heads share, the dual map through the shared tokens' vectors, at
    positions that have read the same text.
    """
    tokenizers = toy_tokenizers.metaspace(), toy_tokenizers.byte_level()

    def models():
        source = tiny_model("gpt_neox", seed=1, vocab_size=len(tokenizers[0]), hidden_size=48)
        return source, tiny_model("llama", seed=2, vocab_size=len(tokenizers[1]))

    result = pkt_fast.transfer(
        *models(), ROWS, tokenizer=tokenizers, layers=[1], steps=1, batch_size=len(ROWS),
        output_loss="kl", recompose="dual", progress=False,
    )  # fmt: skip
    source, target = models()
    shared = match_vocabularies(*map(len, tokenizers), *tokenizers)
    source_basis, target_basis = (
        reference.semantic_basis(model.get_output_embeddings().weight.detach())[rows]
        for model, rows in ((source, shared.source), (target, shared.target))
    )
    dual = torch.linalg.pinv(target_basis) @ source_basis
    (pair,) = result.pairs
    taps = [
        reference.layer_taps(source, pair.source, "mlp"),
        reference.layer_taps(target, [pair.target], "mlp"),
    ]
    examples = encode(ROWS, tokenizers[1])
    layer, output = [], []
    for example, other in zip(examples, retokenized(examples, tokenizers[0]), strict=True):
        at = answering_positions(example, other)
        wanted = [t for t, label in enumerate(example.labels[1:]) if label != IGNORE_INDEX]
        with torch.no_grad():
            (seen, theirs), (own, ours) = (
                reference.read_layers(model, tap, {"input_ids": torch.tensor([ids])})
                for model, tap, ids in zip(
                    (source, target), taps, (other.input_ids, example.input_ids), strict=True
                )
            )
            hidden = reference.interpolate([seen[i][0, at] for i in pair.source], pair.weight)
            layer.append(1 - reference.row_cosine(own[pair.target][0, wanted], hidden @ dual.T))
            theirs, ours = theirs[0, at][:, shared.source], ours[0, wanted][:, shared.target]
            output.append(reference.divergence(theirs, ours, "forward"))
    assert len(shared) < min(map(len, tokenizers))
    losses = result.history[0]
    assert losses["layer_loss"] == pytest.approx(float(torch.cat(layer).mean()), abs=1e-5)
    assert losses["output_loss"] == pytest.approx(float(torch.cat(output).mean()), abs=1e-5)


def test_attributed_rows_answer_across_tokenizers():
    """Rows that attribution saw equal those of a pass of their own, where one answers several."""
    tokenizers = toy_tokenizers.metaspace(), toy_tokenizers.byte_level()

    def adapter(**options):
        source = tiny_model("gpt_neox", seed=1, vocab_size=len(tokenizers[0]), hidden_size=48)
        target = tiny_model("llama", seed=2, vocab_size=len(tokenizers[1]))
        return pkt_fast.transfer(
            source, target, ROWS * 3, tokenizer=tokenizers, attribution_examples=7, epochs=1,
            batch_size=6, learning_rate=3e-3, progress=False, **options,
        ).delta.changes  # fmt: skip

    alone = adapter(store_budget_gb=1e-9)
    for name, change in adapter().items():
        torch.testing.assert_close(change.matrix(), alone[name].matrix(), rtol=1e-4, atol=1e-7)


def test_slow_tokenizers_are_refused():
    fast = toy_tokenizers.byte_level()
    examples = encode(ROWS, fast)
    with pytest.raises(DataError, match="fast tokenizer"):
        retokenized(examples, toy_tokenizers.WordTokenizer())
    slow = encode(ROWS, toy_tokenizers.WordTokenizer())
    with pytest.raises(DataError, match="fast tokenizer"):
        retokenized(slow, fast)
