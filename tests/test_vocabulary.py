"""Matching two vocabularies by token, across spellings and lengths."""

import pytest
import toy_tokenizers

from pkt_fast.errors import VocabularyError
from pkt_fast.vocabulary import match_vocabularies, same_tokenization


class FakeTokenizer:
    def __init__(self, vocabulary, special=()):
        self.vocabulary, self.all_special_tokens = vocabulary, list(special)

    def get_vocab(self):
        return dict(self.vocabulary)


def test_equal_tokenizers_share_every_row():
    tokenizer = toy_tokenizers.byte_level()
    shared = match_vocabularies(len(tokenizer), len(tokenizer), tokenizer, tokenizer)
    assert shared.covers(len(tokenizer), len(tokenizer))


def test_a_tokenizer_shares_every_token_with_itself():
    """Also two tokens of one spelling, and none beyond the head."""
    tokenizer = FakeTokenizer({"▁a": 0, " a": 1, "b": 2, "c": 9})
    shared = match_vocabularies(4, 4, tokenizer, tokenizer)
    assert shared.source.tolist() == shared.target.tolist() == [0, 1, 2]


def test_padding_rows_are_left_out():
    tokenizer = toy_tokenizers.byte_level()
    shared = match_vocabularies(len(tokenizer) + 7, len(tokenizer) + 64, tokenizer, tokenizer)
    assert len(shared) == len(tokenizer)
    assert not shared.covers(len(tokenizer) + 7, len(tokenizer) + 64)


def test_one_token_more_shifts_nothing():
    small = {f"t{i}": i for i in range(300)}
    large = {"<new>": 0, **{f"t{i}": i + 1 for i in range(300)}}
    shared = match_vocabularies(300, 301, FakeTokenizer(small), FakeTokenizer(large))
    assert shared.source.tolist() == list(range(300))
    assert shared.target.tolist() == list(range(1, 301))


def test_byte_level_and_sentencepiece_spellings_meet():
    words = [f"w{i}" for i in range(300)]
    byte_level = {f"Ġ{w}": i for i, w in enumerate(words)} | {"Ċ": 300, "Ã©": 301}
    pieces = {f"▁{w}": i + 5 for i, w in enumerate(words)} | {"<0x0A>": 400, "é": 401}
    shared = match_vocabularies(302, 402, FakeTokenizer(byte_level), FakeTokenizer(pieces))
    pairs = dict(zip(shared.source.tolist(), shared.target.tolist(), strict=True))
    assert pairs == {**{i: i + 5 for i in range(300)}, 300: 400, 301: 401}


def test_too_little_in_common_is_refused():
    a = FakeTokenizer({f"a{i}": i for i in range(1000)})
    b = FakeTokenizer({f"b{i}": i for i in range(990)} | {f"a{i}": 990 + i for i in range(10)})
    with pytest.raises(VocabularyError, match="share 10 tokens"):
        match_vocabularies(1000, 1000, a, b)


@pytest.mark.parametrize(
    ("tokens", "needed"), [(1000, 256), (6000, 300), (100, 50), (1, 1)], ids=str
)
def test_the_least_that_has_to_be_shared(tokens, needed):
    """256 tokens, 5 % of the smaller vocabulary where that is more, half of one that is small."""
    one = FakeTokenizer({f"a{i}": i for i in range(tokens)})

    def sharing(shared):
        others = {f"b{i}": i for i in range(2 * tokens)}
        return FakeTokenizer(others | {f"a{i}": 2 * tokens + i for i in range(shared)})

    assert len(match_vocabularies(tokens, 3 * tokens, one, sharing(needed))) == needed
    with pytest.raises(VocabularyError, match=f"share {needed - 1} tokens .* at least {needed}:"):
        match_vocabularies(tokens, 3 * tokens, one, sharing(needed - 1))


def test_without_tokenizers_the_heads_must_be_alike():
    assert len(match_vocabularies(50, 50)) == 50
    with pytest.raises(VocabularyError, match="50 and 51"):
        match_vocabularies(50, 51)


def test_same_tokenization():
    a, b = toy_tokenizers.byte_level(), toy_tokenizers.byte_level()
    assert same_tokenization(a, b)
    assert not same_tokenization(a, toy_tokenizers.metaspace())
