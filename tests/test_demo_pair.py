"""The bundled rows and pair: deterministic, disjoint, exact, small, and worth a transfer."""

import ast
import importlib
import importlib.util
import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pkt_fast import demo
from pkt_fast.demo import other, problems
from pkt_fast.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
ARITHMETIC = (*problems.ONE_STEP, *problems.TWO_STEP, *problems.SPECIALTY)

# written again here, so that a slip in the generator cannot hide
ANSWERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "compare": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "add_add": lambda a, b, c: a + b + c,
    "add_sub": lambda a, b, c: a + b - c,
    "sub_add": lambda a, b, c: a - b + c,
    "mul_add": lambda a, b, c: a * b + c,
    "mul_sub": lambda a, b, c: a * b - c,
    "add_div": lambda a, b, c: (a + b) / c,
    "div_sub": lambda a, b, c: a / b - c,
    "times_total": lambda a, b: a + a * b,
    "percent": lambda a, p: a * p / 100,
    "percent_left": lambda a, p: a - a * p / 100,
}


@pytest.fixture(scope="module")
def pair():
    return demo.load_pair()


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("tqdm")
    path = REPOSITORY / "scripts" / "train_demo_pair.py"
    spec = importlib.util.spec_from_file_location("train_demo_pair", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def reply_loss(model, tokenizer, rows):
    encoded = tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        return_tensors="pt",
    )
    labels = encoded["input_ids"].masked_fill(~encoded["assistant_masks"].bool(), -100)
    with torch.no_grad():
        return model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels
        ).loss.item()


@pytest.mark.parametrize("split", demo.SPLITS)
def test_rows_are_deterministic_distinct_and_chat_shaped(split):
    rows = demo.bundled_rows(split)
    assert rows == demo.bundled_rows(split)
    assert len(rows) == demo.SPLITS[split][2]
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_rows_stay_those_that_metrics_were_measured_on():
    text = json.dumps({split: demo.bundled_rows(split) for split in demo.SPLITS})
    assert zlib.crc32(text.encode()) == 2812053896


def test_splits_share_no_question():
    questions = Counter(e.question for split in demo.SPLITS for e in demo.bundled_examples(split))
    assert max(questions.values()) == 1


def test_no_bundled_question_is_in_the_training_stream():
    bundled = {e.question for split in demo.SPLITS for e in demo.bundled_examples(split)}
    stream = demo.examples((*ARITHMETIC, *other.OTHER), "pretrain", seed=5)
    assert bundled.isdisjoint({next(stream).question for _ in range(5000)})


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="'dev' does not exist"):
        demo.bundled_rows("dev")


@pytest.mark.parametrize("kind", ARITHMETIC, ids=lambda kind: kind.name)
def test_answers_follow_from_the_numbers_in_the_question(kind):
    rng = Random(kind.name)
    for _ in range(300):
        example = kind.example(rng)
        assert tuple(map(int, re.findall(r"\d+", example.question))) == example.numbers
        assert example.answer == ANSWERS[kind.name](*example.numbers)
        assert example.answer > 0
        assert example.reply.endswith(f"So the answer is {example.answer}.")
        assert problems.final_answer(example.reply) == example.answer


@pytest.mark.parametrize("kind", [*ARITHMETIC, other.Drill("+-*/")], ids=lambda kind: kind.name)
def test_every_equation_shown_is_true(kind):
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    rng = Random(kind.name)
    for _ in range(200):
        reply = kind.example(rng).reply
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", reply)
        assert equations or kind.name == "percent"
        for a, sign, b, result in equations:
            assert operations[sign](int(a), int(b)) == int(result)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 3 + 4 = 7. So the answer is 7.", 7),
        ("So the answer is 3. No: so the answer is -12.", -12),
        ("The answer is\n 40", 40),
        ("3 + 4 = 7.", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert problems.final_answer(text) == answer


def test_importing_the_demo_needs_no_torch():
    # heavy imports may stand inside functions and under TYPE_CHECKING only
    for path in Path(demo.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any(n.split(".")[0] in {"torch", "transformers"} for n in names), path


def test_models_are_small_and_of_different_shape(pair):
    source, target, tokenizer = pair
    directory = demo.source_path().parent
    assert sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) < 15e6
    assert source.config.model_type == target.config.model_type == "llama"
    assert source.config.hidden_size > target.config.hidden_size
    assert source.config.num_hidden_layers > target.config.num_hidden_layers
    for model in (source, target):
        assert model.dtype == torch.float32
        assert model.config.vocab_size == len(tokenizer) > model.config.hidden_size
        assert all(p.isfinite().all() for p in model.parameters())


def test_models_share_one_tokenizer():
    files = [path / "tokenizer.json" for path in (demo.source_path(), demo.target_path())]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_plain_from_pretrained_loads_float32():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.target_path(), dtype="auto")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("split", ["train", "specialty", "other"])
def test_chat_template_round_trips(pair, split):
    tokenizer = pair[2]
    for row in demo.bundled_rows(split)[:50]:
        question, reply = (message["content"] for message in row["messages"])
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        supervised = [i for i, m in zip(ids, mask, strict=True) if m]
        assert tokenizer.decode(ids) == f"<|user|>{question}<|end|><|assistant|>{reply}<|end|>"
        assert tokenizer.decode(supervised) == f"{reply}<|end|>"
        assert supervised[-1] == tokenizer.eos_token_id
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert ids[: len(prompt)] == prompt


def test_digits_are_tokens_of_their_own(pair):
    tokens = pair[2].tokenize("There are 47 + 350 = 397 shells.")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("47350397")


def test_source_knows_more_than_the_target(pair):
    source, target, tokenizer = pair
    rows = demo.bundled_rows("validation")[:64]
    assert reply_loss(source, tokenizer, rows) < 0.5 * reply_loss(target, tokenizer, rows)


def test_metrics_belong_to_the_models(pair):
    metrics = json.loads((demo.source_path().parent / "metrics.json").read_text())
    rows = demo.bundled_rows("validation")
    for name, model in zip(("source", "target"), pair[:2], strict=True):
        entry = metrics[name]
        assert entry["parameters"] == sum(p.numel() for p in model.parameters())
        assert reply_loss(model, pair[2], rows[:200]) == pytest.approx(
            entry["validation_loss"],
            rel=1e-2,
            abs=1e-4,  # four decimals are kept
        )
    exact = {name: entry["exact_match"] for name, entry in metrics.items()}
    for split in ("validation", "specialty_validation"):
        assert exact["source"][split] >= 0.9
        assert exact["target"][split] < 0.1
    assert exact["base"]["specialty_validation"] < 0.1


def test_training_script_is_deterministic(script, pair):
    tokenizer = pair[2]
    recipe = script.replace(script.RECIPES["target"], steps=2)
    weights = []
    for _ in range(2):
        model = script.new_model(tokenizer, 64, 2, 96, recipe.seed)
        script.train(model, tokenizer, recipe, "test")
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_training_script_rebuilds_the_tokenizer(script):
    built = script.train_tokenizer().backend_tokenizer.to_str()
    stored = json.loads((demo.source_path() / "tokenizer.json").read_text())
    assert json.loads(built)["model"] == stored["model"]


def test_slicing_keeps_every_second_layer(script, pair):
    source = pair[0]
    sliced = script.every_second_layer(source)
    assert sliced.config.num_hidden_layers == 3
    for new, old in enumerate((1, 3, 5)):
        kept = sliced.model.layers[new].mlp.up_proj.weight
        assert torch.equal(kept, source.model.layers[old].mlp.up_proj.weight)
    assert torch.equal(sliced.lm_head.weight, source.lm_head.weight)


def test_the_demo_scores_where_it_trains(monkeypatch):
    """Every model on the device of the settings: the source and the untrained target as well."""
    module = importlib.import_module("pkt_fast.demo.run")
    scored = []
    found = SimpleNamespace(exact_match=None, next_token_loss=0.0)
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: scored.append(k["device"]) or found)
    trained = SimpleNamespace(model=None, history=[])
    monkeypatch.setattr(module, "transfer", lambda *a, **k: trained)
    module.run_demo(Console(quiet=True), progress=False, device="cuda:1")
    assert scored == ["cuda:1"] * (2 + len(module.RUNS))
