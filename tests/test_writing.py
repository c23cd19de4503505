"""Replies and rows that the source writes: what they begin like, where they end, which are kept."""

import pytest
import torch
import toy_tokenizers
from models import tiny_model

import pkt_fast
from pkt_fast import demo, writing
from pkt_fast.data import render_prompt
from pkt_fast.errors import ConfigError, DataError, ModelError
from pkt_fast.evaluation import generate_replies
from pkt_fast.writing import answer_rows, question_of, with_reply, write_rows

ASKED = {"role": "user", "content": "How many apples does Anna have now?"}
SAID = {"role": "assistant", "content": "The answer is 42."}
SYSTEM = {"role": "system", "content": "Answer the following question."}
CHATML = toy_tokenizers.byte_level("chatml")
ROWS = demo.bundled_rows("specialty")[:8]


@pytest.fixture(scope="module")
def source():
    return demo.load_pair()[0].eval()


@pytest.fixture(scope="module")
def tokenizer():
    return demo.load_pair()[2]


def model(tokenizer, seed=0):
    return tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).eval()


# --------------------------------------------------------------------------- parts of rows


def test_replies_are_set_in_every_shape_of_row():
    chat = {"messages": [ASKED, SAID], "id": 7}
    wanted = {"role": "assistant", "content": "b"}
    assert with_reply(chat, "b") == {"id": 7, "messages": [ASKED, wanted]}
    assert chat["messages"][-1] == SAID
    assert with_reply({"messages": [ASKED]}, "b")["messages"] == [ASKED, wanted]
    earlier = [SYSTEM, ASKED, SAID, ASKED]
    assert with_reply({"messages": [*earlier, SAID]}, "b")["messages"] == [*earlier, wanted]
    turns = {"prompt": [ASKED], "completion": [SAID]}
    assert with_reply(turns, "b") == {"messages": [ASKED, wanted]}
    assert with_reply({"prompt": "q", "completion": "a"}, "b") == {"prompt": "q", "completion": "b"}
    assert with_reply({"prompt": "q"}, "b")["completion"] == "b"
    for row in ({"text": "q"}, {"messages": [SYSTEM]}, {"messages": []}):
        with pytest.raises(DataError, match="row 3: it holds no question"):
            with_reply(row, "b", 3)


def test_question_of_every_shape_of_row():
    assert question_of({"messages": [ASKED, SAID]}) == ASKED["content"]
    assert question_of({"prompt": [ASKED], "completion": [SAID]}) == ASKED["content"]
    assert question_of({"prompt": "q", "completion": "a"}) == "q"
    assert question_of({"text": "t"}) == "t"
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    with pytest.raises(DataError, match="plain text"):
        question_of({"messages": [parts]})


# --------------------------------------------------------------------------- replies


def test_replies_are_the_greedy_ones():
    net = model(CHATML)
    rows = [{"messages": [ASKED]}, {"prompt": "1 + 1?"}, {"messages": [SYSTEM, ASKED, SAID]}]
    replies = generate_replies(
        net,
        [{"messages": [ASKED]}, {"messages": [{**ASKED, "content": "1 + 1?"}]},
         {"messages": [SYSTEM, ASKED]}],
        CHATML, max_new_tokens=5,
    )  # fmt: skip
    done = answer_rows(net, rows, CHATML, max_new_tokens=5, batch_size=2)
    assert [done[0]["messages"][-1]["content"], done[1]["completion"]] == replies[:2]
    assert done[2]["messages"] == [SYSTEM, ASKED, {"role": "assistant", "content": replies[2]}]


# --------------------------------------------------------------------------- where questions end


@pytest.mark.parametrize("name", toy_tokenizers.TEMPLATES)
def test_a_question_stands_between_its_beginning_and_its_end(name):
    tokenizer = toy_tokenizers.byte_level(name)
    row = {"messages": [ASKED, SAID, {**ASKED, "content": "Is it a cup?"}, SAID]}
    opening = writing._Opening.of(row, tokenizer, 0)
    text = render_prompt(row, tokenizer)
    before, after = text.split("Is it a cup?")
    assert tokenizer.decode([*opening.before, *opening.question]) == before + "Is it a cup?"
    assert opening.closing
    assert after.strip().startswith(opening.closing)
    assert tokenizer.decode(opening.before) == before


def test_a_completion_without_a_template_shows_no_end():
    plain = toy_tokenizers.byte_level()
    with pytest.raises(DataError, match=r"row 0: to write rows like it .* question ends"):
        write_rows(model(plain), [{"prompt": "q", "completion": "a"}], plain, 1, max_new_tokens=4)


# --------------------------------------------------------------------------- new rows


def scripted(monkeypatch, *rounds):
    """Have the source go on with the given words, round by round."""
    said = iter(rounds)

    def complete(_model, prompts, tokenizer, **_):
        words = next(said)
        return [
            tokenizer(words[i % len(words)], add_special_tokens=False)["input_ids"]
            for i in range(len(prompts))
        ]

    monkeypatch.setattr(writing, "LARGEST_BEGINNING", 0.0)
    monkeypatch.setattr(writing, "complete", complete)
    monkeypatch.setattr(
        writing, "generate_replies", lambda _m, rows, _t, **_: [f"R{i}" for i in range(len(rows))]
    )


def test_questions_without_an_end_old_ones_and_special_tokens_are_dropped(monkeypatch):
    end = "<|im_end|>"
    scripted(
        monkeypatch,
        [f"Is it new?{end}", "no end", f"{ASKED['content']}{end}", f"a <|im_start|> b{end}", end],
        [f"Is it new?{end}", f"And this?{end} not this"],
    )
    monkeypatch.setattr(writing, "ROUNDS", 2)
    rows = [{"messages": [SYSTEM, ASKED, SAID]}]
    found = write_rows(model(CHATML), rows, CHATML, 4, max_new_tokens=4)
    assert [question_of(row) for row in found] == ["Is it new?", "And this?"]
    assert all(row["messages"][0] == SYSTEM for row in found)
    assert [row["messages"][-1]["content"] for row in found] == ["R0", "R0"]


def test_the_surest_rows_are_kept(monkeypatch):
    rows = [{"messages": [{**ASKED, "content": f"{i}?"}, SAID]} for i in range(5)]
    least = [0.3, 0.1, 5.0, 0.2, 4.0]

    def losses(_model, batch):
        counts = batch.supervised.sum(1).tolist()
        return torch.cat(
            [
                torch.linspace(0, least[row], count)
                for row, count in zip(batch.rows, counts, strict=True)
            ]
        )

    monkeypatch.setattr(writing, "token_losses", losses)
    kept = writing._surest(model(CHATML), rows, CHATML, 3, batch_size=2)
    assert kept == [rows[0], rows[1], rows[3]]


def test_a_source_that_writes_nothing_usable_is_refused(monkeypatch):
    scripted(monkeypatch, *[["no end"]] * writing.ROUNDS)
    with pytest.raises(ModelError, match="the source wrote none of the 3 rows"):
        write_rows(model(CHATML), [{"messages": [ASKED, SAID]}], CHATML, 3, max_new_tokens=4)


def test_the_bundled_source_writes_rows_of_the_task(source, tokenizer):
    state = torch.random.get_rng_state()
    found = [write_rows(source, ROWS, tokenizer, 6, max_new_tokens=48, seed=3) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(found[0]) == 6
    questions = {question_of(row) for row in found[0]}
    assert len(questions) == 6
    assert not questions & {question_of(row) for row in ROWS}
    right = [demo.final_answer(row["messages"][-1]["content"]) is not None for row in found[0]]
    assert sum(right) >= 4
    other = write_rows(source, ROWS, tokenizer, 6, max_new_tokens=48, seed=4)
    assert other != found[0]


def test_plain_texts_are_continued(source, tokenizer):
    texts = [{"text": question_of(row)} for row in ROWS]
    found = write_rows(source, texts, tokenizer, 3, max_new_tokens=8)
    assert [set(row) for row in found] == [{"text"}] * 3


# --------------------------------------------------------------------------- in a transfer


def test_a_transfer_trains_on_what_the_source_wrote():
    pair = (demo.source_path(), demo.target_path())
    options = {"progress": False, "layers": [3], "epochs": 1, "batch_size": 4, "method": "kd"}
    asked = [{"messages": row["messages"][:1]} for row in ROWS]
    result = pkt_fast.transfer(
        *pair, asked, labels="source", min_rows=12, max_new_tokens=48, **options
    )
    assert result.report["data"]["rows"] == 12
    assert len(result.history) == 3
    assert {"source replies", "source rows"} <= result.report["phases"].keys()
    again = pkt_fast.transfer(
        *pair, asked, labels="source", min_rows=12, max_new_tokens=48, **options
    )
    assert again.report["data"]["fingerprint"] == result.report["data"]["fingerprint"]


def test_nothing_is_written_where_no_row_is_missing():
    pair = (demo.source_path(), demo.target_path())
    options = {"progress": False, "layers": [3], "epochs": 1, "batch_size": 4, "method": "kd"}
    result = pkt_fast.transfer(*pair, ROWS, min_rows=len(ROWS), **options)
    assert result.report["data"]["rows"] == len(ROWS)
    assert "source rows" not in result.report["phases"]


def test_a_malformed_row_is_named_before_anything_is_written(tmp_path):
    pair = (demo.source_path(), demo.target_path())
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 2: messages\[0\] must be an object"):
        pkt_fast.transfer(*pair, path, min_rows=4, progress=False)
    for messages in ([{"role": "user"}], "abc", [3]):
        with pytest.raises(DataError, match=r"^row 0: turns"):
            pkt_fast.transfer(*pair, [{"messages": messages}], labels="source", progress=False)


def test_steps_replace_epochs():
    pair = (demo.source_path(), demo.target_path())
    options = {"progress": False, "layers": [3], "batch_size": 4, "method": "sft"}
    result = pkt_fast.transfer(*pair, ROWS, epochs=1, steps=5, **options)
    assert [record["epoch"] for record in result.history] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("setting", [{"labels": "none"}, {"min_rows": -1}, {"steps": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        pkt_fast.TransferConfig.make(setting)
