"""Reading, rendering, supervision, truncation and batching of training rows."""

from __future__ import annotations

import itertools
import json
import random
import sys
import tracemalloc
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_tokenizers as toy

from pkt_fast.data import (
    IGNORE_INDEX,
    Batch,
    Example,
    batch_indices,
    batches,
    collate,
    encode,
    moved,
    padding_fraction,
    read_rows,
    render_prompt,
)
from pkt_fast.data.bucketing import _least_padding
from pkt_fast.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "The answer is 42."},
    {"role": "user", "content": "and a?"},
    {"role": "assistant", "content": "a"},
]


def turns(tokenizer, example: Example) -> list[str]:
    """Decode every run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def chat(*contents: str) -> dict:
    """Alternate user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


@pytest.fixture(scope="module")
def chatml():
    return toy.byte_level("chatml")


@pytest.fixture(scope="module")
def bare():
    return toy.byte_level()


# --- supervision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (None, " The answer is 42.</s>", " a</s>"),
        ("llama2", " The answer is 42. </s>", " a </s>"),
        ("llama3", "The answer is 42.<|eot_id|>", "a<|eot_id|>"),
        ("chatml", "The answer is 42.<|im_end|>", "a<|im_end|>"),
        ("mistral", " The answer is 42.</s>", " a</s>"),
        ("gemma", "The answer is 42.<end_of_turn>", "a<end_of_turn>"),
        ("phi3", "The answer is 42.<|end|>", "a<|end|>"),
        ("thinking", "The answer is 42.<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"),
        ("open_think", "The answer is 42.<|im_end|>", "a<|im_end|>"),
        ("plain", " The answer is 42.\n", " a\n"),
    ],
)
def test_only_the_assistant_is_supervised(template, first, second):
    tokenizer = toy.byte_level(template)
    (example,) = encode([{"messages": CHAT}], tokenizer)
    assert turns(tokenizer, example) == [first, second]
    assert "Be brief." in example.text


@pytest.mark.parametrize("template", [None, *toy.TEMPLATES])
def test_sentencepiece_turns(template):
    """Merges across the border may add the blank before a turn, never words of the question."""
    tokenizer = toy.metaspace(template)
    (example,) = encode([{"messages": CHAT}], tokenizer)
    one, two = turns(tokenizer, example)
    assert "The answer is 42." in one
    assert two.split("<")[0].strip() in ("a", "")
    assert all(word not in one + two for word in ("apples", "and", "Be", "brief"))
    end = {"</s>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "\n"}
    assert all(any(turn.endswith(e) for e in end) for turn in (one, two))


@pytest.mark.parametrize("template", [t for t in toy.TEMPLATES if t != "plain"])
@pytest.mark.parametrize("make", [toy.byte_level, toy.metaspace])
def test_words_of_the_template_do_not_mislead(template, make):
    """Answers that also occur in the question, the template or the markers."""
    tokenizer = make(template)
    system = {"role": "system", "content": "a end assistant"}
    for answer in ("a", "end", "assistant", "s", "m", "INST", "user"):
        row = {"messages": [system, *chat(f"{answer} or b?", answer, answer, answer)["messages"]]}
        (example,) = encode([row], tokenizer)
        found = turns(tokenizer, example)
        assert len(found) == 2
        for turn in found:
            words = turn.replace("<think>\n\n</think>", "")
            assert words.count(answer) - sum(
                words.endswith(m) * m.count(answer) for m in ("</s>", *toy.MARKERS)
            ) == 1  # fmt: skip


def test_generation_prompt_plus_supervised_text_is_the_whole(chatml):
    """What the model is asked to continue with at inference is what it was trained on."""
    (example,) = encode([chat("How many?", "12 apples")], chatml)
    prompt = render_prompt(chat("How many?", "12 apples"), chatml)
    assert example.text == prompt + "12 apples<|im_end|>\n"
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    assert chatml(prompt, add_special_tokens=False)["input_ids"] == list(example.input_ids[:first])


def test_render_prompt_of_every_shape(bare):
    assert render_prompt({"prompt": "2+2=", "completion": "4"}, bare) == "2+2="
    assert render_prompt("some text", bare) == "some text"
    assert render_prompt(chat("a", "b"), bare) == "User: a\nAssistant:"
    assert render_prompt(chat("a"), bare) == "User: a\nAssistant:"
    with pytest.raises(DataError, match="refuses"):
        render_prompt({"messages": CHAT[2:]}, toy.byte_level("gemma"))


def test_reasoning_removed_by_the_template():
    thinking = toy.byte_level("thinking")
    row = chat("q", "<think>\nlong\n</think>\n\nfirst", "q", "<think>\nhm\n</think>\n\nsecond")
    (example,) = encode([row], thinking)
    assert turns(thinking, example) == [
        "first<|im_end|>",
        "<think>\nhm\n</think>\n\nsecond<|im_end|>",
    ]


def test_answer_that_its_rewritten_reasoning_names_first():
    thinking = toy.byte_level("thinking")
    (example,) = encode([chat("q", "<think>maybe a?</think>a")], thinking)
    assert turns(thinking, example) == ["<think>\nmaybe a?\n</think>\n\na<|im_end|>"]


def test_answer_the_template_hides_is_dropped():
    tokenizer = toy.byte_level("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(DataError, match="does not show the assistant's words: 1"):
        encode([chat("q", "answer")], tokenizer)


def with_template(template: str, tokenizer=None):
    tokenizer = tokenizer or toy.byte_level("phi3")
    tokenizer.chat_template = template
    return tokenizer


# Three ways templates show a tool call: after the content, where there is none, instead of it with
# an ending of its own.
TOOL_TEMPLATES = {
    "qwen": (
        "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.content %}{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '<|tool|>' + c.function | tojson }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "deepseek": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if not m['content'] %}"
        "{{ '<|tool|>' + m['tool_calls'][0]['function'] | tojson }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if 'tool_calls' in m %}{{ m['tool_calls'][0]['function'] | tojson + '<|eom|>' }}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALLING = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
    {"role": "tool", "content": "3", "name": "add", "tool_calls": None},
    {"role": "assistant", "content": "It is 3.", "tool_calls": None},
]


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("qwen", "<|tool|>", "<|im_end|>"),
        ("deepseek", "<|tool|>", "<|im_end|>"),
        ("llama", "", "<|eom|>"),
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_tool_calls_are_what_the_assistant_says(template, before, after, count):
    tokenizer = with_template(TOOL_TEMPLATES[template])
    tokenizer.add_tokens(["<|tool|>", "<|eom|>"], special_tokens=True)
    examples = encode([{"messages": CALLING[:count]}], tokenizer)
    call = json.dumps(CALL["function"])
    expected = [f"{before}{call}{after}", "It is 3.<|im_end|>"][: count // 2]
    assert turns(tokenizer, examples[0]) == expected


def test_null_and_missing_content_of_a_call_reach_the_template_as_they_are():
    tokenizer = with_template(TOOL_TEMPLATES["qwen"])
    missing = {"role": "assistant", "tool_calls": [CALL]}
    both = encode([{"messages": [CALLING[0], m]} for m in (CALLING[1], missing)], tokenizer)
    assert both[0].input_ids == both[1].input_ids


def test_tools_of_a_row_reach_the_template():
    tokenizer = with_template(TOOL_TEMPLATES["qwen"])
    row = {"messages": CALLING, "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert encode([row], tokenizer)[0].text.startswith('<|im_start|>system\n[{"type": "function"')
    assert render_prompt(row, tokenizer).startswith("<|im_start|>system")
    assert "system" not in encode([{"messages": CALLING}], tokenizer)[0].text


def test_tool_calls_that_nothing_shows_are_dropped_and_named(bare, chatml):
    rows = [{"messages": CALLING}, {"text": "kept"}]
    for tokenizer, words in [
        (bare, "tools need a chat template"),
        (chatml, "refuses the conversation"),
        (with_template(toy.TEMPLATES["chatml"].replace("m['content']", "m['content']|string")),
         "does not show the assistant's tool calls"),
    ]:
        dropped = encode(rows, tokenizer).summary.dropped
        assert list(dropped.values()) == [(0,)]
        assert words in next(iter(dropped))


@pytest.mark.parametrize("make", [toy.byte_level, toy.metaspace])
def test_header_of_a_template_without_generation_prompt(make):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\nSo: ' + m['content'] + '<|end|>' }}"
    )
    tokenizer = with_template(template + "{% endfor %}", make("phi3"))
    (example,) = encode([chat("q", "The answer", "q", "12")], tokenizer)
    assert "".join(turns(tokenizer, example)).replace(" ", "") == "Theanswer<|end|>12<|end|>"


def test_next_header_is_not_the_end_of_a_turn():
    """Only the last turn is closed here; "<|" of "<|end|>" also begins the next "<|user|>"."""
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '<|end|>' }}"
    )
    (example,) = encode([chat("q", "one", "q", "two")], tokenizer)
    assert turns(tokenizer, example) == ["one", "two<|end|>"]


def test_moved_system_turn_without_any_marker():
    """Neither a stable prefix nor a closing token: the question before the answer tells."""
    tokenizer = with_template(
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages if m['role'] != 'system' %}"
        "{{ m['role'] + ': ' + (messages[0]['content'] if m == users[-1] else '')"
        " + m['content'] + '\n' }}{% endfor %}"
    )
    system = {"role": "system", "content": "Be brief. "}
    row = {"messages": [system, *chat("Is it C\nor a\nb?", "a", "and?", "b")["messages"]]}
    (example,) = encode([row], tokenizer)
    assert example.text.startswith("user: Is it C\nor a\nb?\nassistant: a\nuser: Be brief. and?")
    assert [turn.strip() for turn in turns(tokenizer, example)] == ["a", "b"]
    first = next(t for t, label in enumerate(example.labels) if label != IGNORE_INDEX)
    assert example.text[: example.offsets[first][0]].endswith("assistant:")


@pytest.mark.parametrize("make", [toy.byte_level, toy.WordTokenizer])
def test_token_across_the_end_of_a_turn_belongs_to_it(make):
    r"""The turn ends in "\n", which makes one token with the blank line behind it."""
    tokenizer = with_template(
        "{% for m in messages %}{{ '' if loop.first else '\n\n\n' }}"
        "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        make(),
    )
    (example,) = encode([chat("user", "The answer", "user", "C")], tokenizer)
    ids = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    if make is toy.WordTokenizer:
        assert example.input_ids[ids[3]] == tokenizer.unk_token_id  # "\n\n\n\n"
        assert len(ids) == 6
    else:
        assert "".join(turns(tokenizer, example)).split() == ["The", "answer", "C"]


def test_refused_system_turn_joins_the_first_question():
    gemma = toy.byte_level("gemma")
    (example,) = encode([{"messages": CHAT[:3]}], gemma)
    assert "user\nBe brief.\n\nHow many apples?<end_of_turn>" in example.text


def test_refused_conversations_are_dropped_and_named():
    gemma = toy.byte_level("gemma")
    odd = {"messages": [*CHAT[1:3], *CHAT[2:3]]}
    found = encode([chat("a", "b"), odd], gemma)
    (reason,) = found.summary.dropped
    assert "must alternate" in reason
    assert found.summary.dropped[reason] == (1,)


def test_messages_after_the_last_answer_are_left_out(chatml):
    (long,) = encode([chat("q", "answer", "next question")], chatml)
    (short,) = encode([chat("q", "answer")], chatml)
    assert long.input_ids == short.input_ids


@pytest.mark.parametrize("template", ["llama2", "llama3", "mistral", "gemma", None])
@pytest.mark.parametrize("make", [toy.byte_level, toy.metaspace])
def test_one_bos(template, make):
    tokenizer = make(template)
    for example in encode([chat("q", "a b"), {"text": "some text"}], tokenizer):
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.labels[0] == IGNORE_INDEX


def test_tokenizer_without_bos_gets_none():
    tokenizer = toy.byte_level(bos=False)
    (example,) = encode(["apples"], tokenizer)
    assert tokenizer.decode(example.input_ids) == "apples</s>"


def test_plain_text_is_supervised_throughout(bare):
    (example,) = encode([{"text": "She has 12 apples"}], bare)
    assert bare.decode(example.input_ids) == "<s>She has 12 apples</s>"
    assert example.labels == (IGNORE_INDEX, *example.input_ids[1:])
    assert example.num_supervised == len(example) - 1


def test_text_that_brings_its_own_special_tokens(bare):
    (own,) = encode(["<s>She has 12 apples</s>"], bare)
    (plain,) = encode(["She has 12 apples"], bare)
    assert own.input_ids == plain.input_ids
    assert own.labels == plain.labels


def test_no_eos_no_bos_single_token_row_is_dropped():
    tokenizer = toy.byte_level(bos=False, eos=False)
    found = encode(["a", "many apples"], tokenizer)
    assert found.summary.dropped == {"no supervised token": (0,)}
    assert [example.row for example in found] == [1]


def test_completion_without_template_is_concatenated(bare):
    (example,) = encode([{"prompt": "Q: 1+1=\nA:", "completion": " 2"}], bare)
    assert example.text == "Q: 1+1=\nA: 2</s>"
    assert turns(bare, example) == [" 2</s>"]


def test_completion_with_template_is_a_chat(chatml):
    rows = [
        {"prompt": "q?", "completion": "yes"},
        {"prompt": [{"role": "user", "content": "q?"}], "completion": "yes"},
        {"prompt": "q?", "completion": [{"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q?"}], "name": "x"},
                      {"role": "assistant", "content": "yes"}], "id": 7, "text": None},
    ]  # fmt: skip
    found = encode(rows, chatml)
    assert {example.input_ids for example in found} == {found[0].input_ids}
    assert {example.labels for example in found} == {found[0].labels}
    assert found.summary.formats == {"prompt/completion": 3, "messages": 1}


def test_supervise_all(chatml):
    llama3 = toy.byte_level("llama3")
    (example,) = encode([{"messages": CHAT}], llama3, supervise="all")
    assert example.labels == (IGNORE_INDEX, *example.input_ids[1:])
    (example,) = encode([chat("q", "a")], chatml, supervise="all")
    assert example.labels == example.input_ids


def test_labels_equal_ids_where_supervised():
    for template in toy.TEMPLATES:
        for make in (toy.byte_level, toy.metaspace):
            (example,) = encode([{"messages": CHAT}], make(template))
            pairs = zip(example.input_ids, example.labels, strict=True)
            assert all(label in (IGNORE_INDEX, token) for token, label in pairs)


@pytest.mark.parametrize("make", [toy.byte_level, toy.metaspace])
def test_offsets_cover_the_text(make):
    """No gaps, so that two tokenizers can be aligned on the same text."""
    row = {"text": "She  has 12\n\n apples   – 你好 🙂 naïve\t\tcafé "}
    tokenizer = make()
    (example,) = encode([row], tokenizer)
    assert example.offsets is not None
    assert len(example.offsets) == len(example)
    assert example.offsets[0] == (0, 0)
    reached = 0
    for start, end in example.offsets[1:]:
        assert start <= reached
        reached = max(reached, end)
    assert reached == len(example.text)
    long = encode([row], tokenizer, max_length=9)[0]
    assert long.offsets == example.offsets[:9]


def test_blanks_inside_an_answer_are_supervised(bare):
    """Byte-level tokenizers give runs of blanks an empty span."""
    answer = "def f():\n        return  1\n\n\n    # end"
    for tokenizer in (toy.byte_level("chatml"), toy.metaspace("chatml")):
        (example,) = encode([chat("q", answer)], tokenizer)
        assert turns(tokenizer, example)[0].strip() == answer + "<|im_end|>"


# --- slow tokenizers ----------------------------------------------------------------------------


def test_slow_tokenizer_supervises_the_same_text():
    tokenizer = toy.WordTokenizer()
    assert not tokenizer.is_fast
    (example,) = encode([chat("hello there", "The answer is 42", "user", "C")], tokenizer)
    assert example.offsets is None
    pieces = [
        tokenizer.convert_ids_to_tokens(label) for label in example.labels if label != IGNORE_INDEX
    ]
    assert "".join(pieces) == " The answer is 42</s> C</s>"
    (text,) = encode(["The answer is C"], tokenizer)
    assert tokenizer.decode(text.input_ids) == "The answer is C</s>"
    assert text.labels == text.input_ids


def test_slow_tokenizer_keeps_a_token_across_the_border():
    """ "there" + "fore" is one word here: it belongs to the answer it reaches into."""
    tokenizer = toy.WordTokenizer()
    row = {"prompt": "hello user: The", "completion": "re answer"}
    (example,) = encode([row], tokenizer)
    kept = [t for t, label in zip(example.input_ids, example.labels, strict=True) if label >= 0]
    assert kept[0] == tokenizer.unk_token_id
    assert tokenizer.decode(kept[1:]) == " answer</s>"


# --- truncation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "llama3", "chatml", "mistral"])
def test_truncation_keeps_supervised_tokens(template):
    tokenizer = toy.byte_level(template)
    generator = random.Random(5)
    words = ["Answer", "the", "question", "How many", "apples", "does", "Anna", "have now"]
    for _ in range(60):
        parts = [
            " ".join(generator.choices(words, k=generator.randint(1, 25)))
            for _ in range(2 * generator.randint(1, 3))
        ]
        (whole,) = encode([chat(*parts)], tokenizer, max_length=10_000)
        limit = generator.randint(2, len(whole) + 4)
        (cut,) = encode([chat(*parts)], tokenizer, max_length=limit)
        assert len(cut) == min(limit, len(whole))
        assert cut.num_supervised > 0
        first = next(i for i, label in enumerate(whole.labels) if label >= 0)
        last = max(i for i, label in enumerate(whole.labels) if label >= 0)
        has_bos = whole.input_ids[0] == tokenizer.bos_token_id
        if has_bos:
            assert cut.input_ids[0] == tokenizer.bos_token_id
        # Everything from the first supervised token on fits: nothing supervised is lost.
        if last - first + 2 <= limit:
            assert cut.num_supervised == whole.num_supervised
        else:
            body = cut.labels[1:]
            assert body == whole.labels[first : first + len(body)]


def test_truncation_drops_the_front_of_the_prompt():
    llama3 = toy.byte_level("llama3")
    row = chat("Answer the following question. How many apples does Anna have now?", "She has 12")
    (whole,) = encode([row], llama3)
    found = encode([row], llama3, max_length=len(whole) - 7)
    (cut,) = found
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[8:]
    assert found.summary.truncated == 1
    assert f"truncated 1 rows to {len(whole) - 7} tokens" in str(found.summary)


def test_text_is_cut_at_its_end(bare):
    (cut,) = encode(["She has 12 apples and buys 30 more"], bare, max_length=4)
    (whole,) = encode(["She has 12 apples and buys 30 more"], bare)
    assert cut.input_ids == whole.input_ids[:4]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"supervise": "user"}, "supervise must be 'assistant' or 'all', not 'user'"),
    ],
)
def test_bad_settings(bare, kwargs, words):
    with pytest.raises(DataError, match=words):
        encode(["text"], bare, **kwargs)


# --- what is dropped ----------------------------------------------------------------------------


def test_dropped_rows_are_named(chatml):
    rows = [chat("q"), chat("q", "  "), {"text": " \n"}, chat("q", "fine"),
            {"prompt": "p", "completion": ""}]  # fmt: skip
    found = encode(rows, chatml)
    assert found.summary.dropped == {
        "no supervised token (no assistant message)": (0,),
        "no supervised token (empty assistant messages)": (1, 4),
        "empty text": (2,),
    }
    assert found.summary.num_dropped == 4
    text = str(found.summary)
    assert "read 5 rows from list (3 messages, 1 prompt/completion, 1 text)" in text
    assert "dropped 2 rows: no supervised token (empty assistant messages) (rows 1, 4)" in text
    assert json.loads(json.dumps(found.summary.as_dict()))["dropped"]["empty text"] == [2]


def test_long_lists_of_dropped_rows_are_cut(bare):
    found = encode([*[" "] * 12, "text"], bare)
    assert "(rows 0, 1, 2, 3, 4, 5, 6, 7, and 4 more)" in str(found.summary)
    assert found.summary.dropped["empty text"] == tuple(range(12))


def test_nothing_left(bare):
    with pytest.raises(DataError, match=r"none of its 2 rows .*no assistant message\): 1; empty t"):
        encode([chat("q"), " "], bare)
    with pytest.raises(DataError, match=r"\(empty completion\): 1"):
        encode([{"prompt": "p", "completion": " "}], bare)


# --- files --------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_source_gives_the_same_rows(tmp_path, bare):
    rows = [chat("q", "a b"), {"prompt": "p", "completion": " c"}, {"text": "t"}, {"text": "u"}]
    lines = [json.dumps(row) for row in rows[:3]] + ['"u"']
    jsonl = write(tmp_path / "a.jsonl", "\r\n".join(lines) + "\r\n\n")
    listed = write(tmp_path / "a.json", "\ufeff" + json.dumps(rows, indent=1))
    want = encode(rows, bare).fingerprint()
    for source in (jsonl, str(jsonl), listed, rows, tuple(rows), iter(rows)):
        assert encode(source, bare).fingerprint() == want
    assert encode(rows[::-1], bare).fingerprint() != want
    assert encode(rows, bare, max_length=4).fingerprint() != want


def test_text_file_is_one_row_a_line(tmp_path):
    rows, origin = read_rows(write(tmp_path / "a.TXT", "one\n\n two\u2028still two\r\nthree"))
    assert rows == [{"text": "one"}, {"text": " two\u2028still two"}, {"text": "three"}]
    assert origin.where(1).endswith("a.TXT line 3")


def test_only_newlines_separate_json_lines(tmp_path, bare):
    words = "a\u2028b\u2029c\u0085d"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": words}, ensure_ascii=False) + "\n")
    assert path.read_text(encoding="utf-8").count("\u2028") == 1
    rows, _ = read_rows(path)
    assert rows == [{"text": words}]


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\nnot json\n')
    assert [row["text"] for row in read_rows(path, limit=2)[0]] == ["a", "b"]
    with pytest.raises(DataError, match="line 4"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.json", " \n", "the file is empty"),
        ("a.json", "[]", "no rows in it"),
        ("a.json", '{"text": "a"}', "must hold a list of rows, this one holds an object"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', r"a\.json line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl line 3: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl line 2: a row must be an object or a str"),
        ("a.jsonl", '{"text": "a"}\n3\n', "not a number"),
        ("a.jsonl", "null\n", "not null"),
        ("a.jsonl", '\n{"q": "a", "r": 1}\n', r"a\.jsonl line 2: no known shape \(its keys: 'q'"),
        ("a.jsonl", "{}\n", "its keys: none"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        ("a.jsonl", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.jsonl", '"a"\n' + "9" * 5000, r"a\.jsonl line 2: Exceeds the limit"),
        ("a.csv", "a,b", r"unknown file type '\.csv'"),
        ("noextension", "a", "unknown file type ''"),
    ],
)
def test_bad_files(tmp_path, bare, name, content, words):
    with pytest.raises(DataError, match=words) as caught:
        encode(write(tmp_path / name, content), bare)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "row 1: messages: the list is empty"),
        ({"messages": "hi"}, "messages must be a list of messages, not a string"),
        ({"messages": [3]}, r"messages\[0\] must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be an object with"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr' is not one of system"),
        ({"messages": [{"role": None, "content": "a"}]}, "role None is not one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "is not one of"),
        ({"messages": [{"role": "user", "content": 5}]}, r"content must be a string, not a numb"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a string, not null"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": []}]}, "tool_calls must be"),
        ({"messages": [{"role": "user", "tool_calls": ["add"]}]}, "tool_calls must be a list"),
        ({"messages": CHAT, "tools": "add"}, "tools must be a list, not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] must be"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, r"content\[0\] must be"),
        ({"text": 7}, "row 1: text must be a string, not a number"),
        ({"text": ["a"]}, "not a list"),
        ({"prompt": "a"}, r"no known shape \(its keys: 'prompt'\)"),
        ({"prompt": "a", "completion": 3}, "completion must be a list of messages, not a number"),
        ({"prompt": "a", "completion": True}, "not a boolean"),
    ],
)
def test_bad_rows(bare, row, words):
    with pytest.raises(DataError, match=words) as caught:
        encode([{"text": "fine"}, row], bare)
    assert "\n" not in str(caught.value)
    assert "row 1" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "data of type int is not understood"),
        ([], "list: no rows in it"),
        ({"text": "a"}, r"data is a dict, not a sequence of rows; wrap it in \[\]"),
        ([3], "list row 0: a row must be an object or a string, not a number"),
    ],
)
def test_bad_objects(value, words):
    with pytest.raises(DataError, match=words):
        read_rows(value)


def test_datasets_dataset(bare):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": chat("q", "a b")["messages"], "text": None},
            {"messages": None, "text": "some text"}]  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    found = encode(table, bare)
    assert found.fingerprint() == encode([chat("q", "a b"), "some text"], bare).fingerprint()
    assert found.summary.source == "datasets.Dataset"
    with pytest.raises(DataError, match="choose a split: train"):
        read_rows(datasets.DatasetDict({"train": table}))


def test_a_table_is_not_read_as_its_column_names(bare):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"give data.to_dict\('records'\)"):
        read_rows(table)
    assert len(encode(table.to_dict("records"), bare)) == 1


def test_bundled_rows(monkeypatch, bare):
    module = types.ModuleType("pkt_fast.demo")
    module.bundled_rows = lambda: [chat("q", "a"), chat("q", "b")]
    monkeypatch.setitem(sys.modules, "pkt_fast.demo", module)
    found = encode(None, bare, limit=1)
    assert found.summary.source == "bundled data"
    assert len(found) == 1


# --- batches ------------------------------------------------------------------------------------


def made(lengths) -> list[Example]:
    return [
        Example(tuple(range(1, n + 1)), (IGNORE_INDEX, *range(2, n + 1)), row)
        for row, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate(side):
    batch = collate(made([3, 5, 1]), [2, 0, 1], pad_token_id=9, padding_side=side,
                    pad_to_multiple_of=4)  # fmt: skip
    assert batch.rows == (2, 0, 1)
    assert batch.input_ids.shape == (3, 8)
    assert len(batch) == 3
    assert batch.num_tokens == 9
    for row, n in enumerate((1, 3, 5)):
        real = batch.attention_mask[row].bool()
        assert real.tolist() == [(t < n) if side == "right" else (t >= 8 - n) for t in range(8)]
        assert batch.input_ids[row][real].tolist() == list(range(1, n + 1))
        assert batch.position_ids[row][real].tolist() == list(range(n))
        assert set(batch.input_ids[row][~real].tolist()) == {9}
        assert set(batch.labels[row][~real].tolist()) == {IGNORE_INDEX}
        assert set(batch.position_ids[row][~real].tolist()) == {0}
        # hidden state t predicts token t + 1
        assert batch.targets[row][real].tolist() == [*range(2, n + 1), IGNORE_INDEX]
        assert set(batch.targets[row][~real].tolist()) == {IGNORE_INDEX}
    assert batch.supervised.sum() == 6
    assert ("position_ids" in batch.model_inputs()) == (side == "left")
    assert all(tensor.dtype == torch.int64 for tensor in batch.model_inputs().values())


def test_left_padding_predicts_nothing_from_padding():
    """A supervised first token has no position that could predict it."""
    example = Example((5, 6), (5, 6), 0)
    batch = collate([example, *made([4])], [0, 1], pad_token_id=0, padding_side="left")
    assert batch.targets[0].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX]
    assert int(batch.supervised[0].sum()) == example.num_supervised == 1


def test_batch_moves_all_tensors():
    batch = collate(made([3, 2]), [0, 1], pad_token_id=0, padding_side="left")
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, Batch)
    assert {t.device.type for t in moved.model_inputs().values()} == {"meta"}
    assert moved.labels.device.type == "meta"
    assert moved.rows == batch.rows
    assert moved.padding_side == "left"


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(
    ("count", "size"), [(0, 4), (1, 4), (4, 4), (103, 4), (1000, 3), (500, 64)]
)
def test_every_index_once(count, size, seed, bucket):
    generator = random.Random(1)
    lengths = [int(generator.lognormvariate(4, 1)) + 2 for _ in range(count)]
    plan = batch_indices(lengths, size, seed=seed, epoch=2, bucket=bucket)
    assert sorted(i for batch in plan for i in batch) == list(range(count))
    assert all(1 <= len(batch) <= size for batch in plan)
    plain = -(-count // size)
    assert plain <= len(plan) <= plain + plain // 8
    assert plan == batch_indices(lengths, size, seed=seed, epoch=2, bucket=bucket)


def test_order_depends_on_seed_and_epoch():
    lengths = [10 + i % 37 for i in range(300)]
    plans = [
        batch_indices(lengths, 8, seed=seed, epoch=epoch, bucket=True)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    sets = [{frozenset(batch) for batch in plan} for plan in plans]
    for i in range(4):
        for j in range(i):
            assert plans[i] != plans[j]
            assert len(sets[i] & sets[j]) < 10  # batches are mixed anew, not only reordered
    assert batch_indices(lengths, 8, seed=None)[0] == list(range(8))


def test_order_is_pinned():
    """Runs must repeat across versions of Python and NumPy."""
    assert batch_indices([5, 9, 5, 7, 6, 8, 5], 2, seed=3, epoch=1) == [
        [2, 6],
        [3, 5],
        [0, 4],
        [1],
    ]


def test_least_padding_is_the_optimum():
    """The dynamic programme against all ways to cut."""
    generator = random.Random(3)
    for _ in range(20):
        lengths = [generator.randint(1, 40) for _ in range(9)]
        most, size = 4, 4
        want = min(
            sum((j - i) * max(lengths[i:j]) for i, j in itertools.pairwise([0, *cut, 9]))
            for cut in itertools.combinations(range(1, 9), most - 1)
            if all(j - i <= size for i, j in itertools.pairwise([0, *cut, 9]))
        )
        sizes = _least_padding(np.array(lengths), size, most, 0)
        stops = [0, *itertools.accumulate(sizes)]
        got = sum((j - i) * max(lengths[i:j]) for i, j in itertools.pairwise(stops))
        assert stops[-1] == 9
        assert len(sizes) == most
        assert got == want


def test_batches_follow_the_plan(bare):
    found = encode([f"{'apples ' * (i % 9)}{i}" for i in range(50)], bare)
    plan = batch_indices(found.lengths, 4, seed=1, epoch=3)
    got = list(batches(found, 4, pad_token_id=2, seed=1, epoch=3, padding_side="left"))
    assert [batch.rows for batch in got] == [tuple(indices) for indices in plan]
    for batch in got:
        for row, ids, mask in zip(batch.rows, batch.input_ids, batch.attention_mask, strict=True):
            assert tuple(ids[mask.bool()].tolist()) == found[row].input_ids
    assert padding_fraction(iter(got)) == pytest.approx(
        1 - sum(found.lengths) / sum(batch.input_ids.numel() for batch in got)
    )
    assert padding_fraction([]) == 0.0


def test_example_set_is_a_sequence(bare):
    found = encode(["a b", "c d", "e f"], bare)
    assert len(found) == 3
    assert [example.row for example in found[1:]] == [1, 2]
    assert found[-1] in found
    assert found.summary.tokens == sum(found.lengths)
    assert found.summary.supervised_tokens == sum(e.num_supervised for e in found)


# --- held compactly -----------------------------------------------------------------------------


def test_examples_are_what_their_arrays_say(bare):
    found = encode([chat("q", "a b"), "naïve 🙂", {"prompt": "p", "completion": " c"}], bare)
    assert list(found[::2]) == [found[0], found[2]]
    assert list(found[1:]) == [found[1], found[2]]
    assert len(found[5:]) == 0
    assert found[-1] == found[2]
    with pytest.raises(IndexError):
        found[3]
    assert found.num_supervised == tuple(example.num_supervised for example in found)
    assert found.largest_id == max(max(example.input_ids) for example in found)
    for i, example in enumerate(found):
        expected = [t for t, label in enumerate(example.labels[1:]) if label != IGNORE_INDEX]
        assert found.supervised_positions(i).tolist() == expected


def test_text_that_is_not_kept(bare):
    rows = [chat("q", "a b"), "some text"]
    found, bare_tokens = encode(rows, bare), encode(rows, bare, keep_text=False)
    assert found.fingerprint() == bare_tokens.fingerprint()
    found.drop_text()
    for example in (*found, *bare_tokens, *found[1:]):
        assert (example.text, example.offsets) == ("", None)
    assert [example.row for example in found] == [0, 1]


def test_rows_are_asked_for_as_they_are_needed(bare):
    """Rows that are not tokenised yet are few, however many there are."""
    alive = weakref.WeakSet()

    class Text(dict):
        __hash__ = object.__hash__

    most = 0

    def rows():
        nonlocal most
        for i in range(1000):
            row = Text(text=f"She has {i} apples")
            alive.add(row)
            most = max(most, len(alive))
            yield row

    assert len(encode(rows(), bare)) == 1000
    assert most < 100


def test_memory_of_examples(tmp_path, bare):
    """Tokens take five bytes each, an example some bytes more; nothing of a row's text stays."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(chat("a " * 50, "b " * 50)) for _ in range(500)))
    encode(path, bare, limit=1)  # what the tokenizer keeps
    tracemalloc.start()
    try:
        found = encode(path, bare, keep_text=False)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens = sum(found.lengths)
    assert tokens > 50_000
    assert kept < 5.5 * tokens + 200 * len(found) + 100_000
    assert peak < kept + 5_000_000


# --- the papers' splits -------------------------------------------------------------------------

needs_splits = pytest.mark.skipif(not SHARED.is_dir(), reason="the papers' splits are not here")


@needs_splits
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED.glob("*.jsonl")))
def test_real_split(name, chatml):
    path = SHARED / name
    found = encode(path, chatml, limit=200)
    lines = path.read_bytes().split(b"\n")[:200]
    want = [json.loads(line)["messages"] for line in lines if line.strip()]
    assert found.summary.rows == len(want)
    assert not found.summary.dropped
    for example, messages in zip(found, want, strict=True):
        (turn,) = turns(chatml, example)
        answer = messages[-1]["content"] + "<|im_end|>"
        assert turn == answer if len(example) < 1024 else answer.startswith(turn.strip("\ufffd"))


@needs_splits
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("template", ["chatml", "mistral", None])
def test_padding_on_gsm8k(size, template):
    found = encode(SHARED / "gsm_train.jsonl", toy.byte_level(template))
    for seed in range(3):
        assert padding_fraction(batches(found, size, pad_token_id=2, seed=seed)) <= 0.10
    assert padding_fraction(batches(found, size, pad_token_id=2, seed=0, bucket=False)) > 0.25


def test_copies_to_a_gpu_that_do_not_wait_go_through_pinned_memory(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: done.append(k) or self)
    moved(torch.ones(2), torch.device("cuda"), non_blocking=True)
    moved(torch.ones(2), "cuda")
    moved(torch.ones(2), "cpu", non_blocking=True)
    assert done == ["pin", {"non_blocking": True}, {"non_blocking": False}, {"non_blocking": True}]
