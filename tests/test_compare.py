"""Comparing methods: what is held equal, what is chosen where, and the numbers in the table."""

import json
import math
from random import Random

import pytest
import torch
import toy_tokenizers
from models import tiny_model

import pkt_fast
from pkt_fast import writing
from pkt_fast.compare import (
    RECIPES,
    Comparison,
    MethodResult,
    Recipe,
    Scores,
    compare,
    load_comparison,
    mean_interval,
    recipes,
    trials,
)
from pkt_fast.compare import running as module
from pkt_fast.config import STEADY
from pkt_fast.errors import ConfigError, OutputError
from pkt_fast.evaluation import evaluate

TOKENIZER = toy_tokenizers.byte_level(bos=False)
ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b} ok"} for a in range(4) for b in range(5)]
TRAIN, VALIDATION, TEST = ROWS[:12], ROWS[12:16], ROWS[16:]


def pair():
    size = {"vocab_size": len(TOKENIZER)}
    return (
        tiny_model("llama", seed=1, hidden_size=48, num_hidden_layers=4, **size),
        tiny_model("llama", seed=2, hidden_size=32, num_hidden_layers=2, **size),
    )


def run(methods, data=TRAIN, models=None, **options):
    shared = {"epochs": 1, "batch_size": 6, "layers": [1], "rank": 2}
    held_out = {"validation": VALIDATION, "test": TEST, "other": [{"text": "She has 12 apples"}]}
    return compare(
        *(models or pair()), data, methods, tokenizer=TOKENIZER, progress=False,
        **{**held_out, **shared, "tune_budget": 2, "seeds": [0, 1], "max_new_tokens": 3, **options},
    )  # fmt: skip


ADDED = (
    "paper-v2", "paper-acl", "logit_cosine", "kd+softmax", "kd+top_k", "kd+fisher", "kd+lens",
    "ridge", "kd+ridge",
)  # fmt: skip


# --------------------------------------------------------------------------- trials and recipes


@pytest.mark.parametrize("name", RECIPES)
def test_trials_are_distinct_points_of_the_grid(name):
    recipe = RECIPES[name]
    everything = trials(recipe, 10**6)
    size = math.prod(map(len, recipe.tuned.values()))
    assert len(everything) == size
    assert len({tuple(sorted(point.items())) for point in everything}) == size
    assert trials(recipe, 3) == everything[:3]
    for point in everything[:4]:
        recipe.config(**point)


def test_every_field_varies_early():
    recipe = Recipe("r", {}, {"learning_rate": (1.0, 2.0, 3.0), "layer_weight": (0.1, 0.2)})
    first = trials(recipe, 4)
    assert {point["learning_rate"] for point in first} == {1.0, 2.0, 3.0}
    assert {point["layer_weight"] for point in first} == {0.1, 0.2}


def test_three_fields_cover_the_whole_grid():
    tuned = {"learning_rate": (1.0, 2.0), "layer_weight": (1.0, 2.0), "label_weight": (1.0, 2.0)}
    assert len(trials(Recipe("r", {}, tuned), 99)) == 8


def test_recipes_know_whether_they_use_labels():
    labelled = {name for name, recipe in RECIPES.items() if recipe.uses_labels}
    assert {"sft", "sft+kd", "paper", "seeking", "laten", "sft+kd+delta"} <= labelled
    unlabelled = set(RECIPES) - labelled
    assert {"kd", "hidden_kd", "kd+dual", "kd+fitted", "kd+delta", *ADDED} <= unlabelled


def test_unknown_and_repeated_methods_are_refused():
    with pytest.raises(ConfigError, match="'sftt' is unknown"):
        recipes(["sftt"])
    with pytest.raises(ConfigError, match="each once"):
        recipes(["sft", "sft"])
    with pytest.raises(ConfigError, match="at least one"):
        recipes([])


# --------------------------------------------------------------------------- a comparison


def test_chooses_on_validation_rows_and_tests_on_test_rows(monkeypatch):
    seen = []

    def spy(model, rows, tokenizer, **options):
        seen.append([row.get("prompt") for row in rows])
        return evaluate(model, rows, tokenizer, **options)

    monkeypatch.setattr(module, "evaluate", spy)
    models = pair()
    found = run(["sft", "kd"], models=models)
    validated, tested = ([row["prompt"] for row in rows] for rows in (VALIDATION, TEST))
    assert seen.count(validated) == 2 * 2
    assert seen.count(tested) == 2 + 2 * 2
    for result in found.methods:
        losses = [trial["validation_loss"] for trial in result.trials]
        assert len(losses) == 2
        assert result.validation_loss == min(losses)
        best = result.trials[losses.index(min(losses))]
        assert best == {**result.chosen, "validation_loss": min(losses)}
        assert len(result.runs) == 2
    untouched = pair()[1].state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in models[1].state_dict().items())


def test_scores_are_those_of_a_transfer_by_hand():
    found = run(["sft"], seeds=[5], examples=7, tune_budget=1)
    source, target = pair()
    rows = Random(5).sample(module._split(TRAIN, VALIDATION, TEST, None)["train"], 7)
    result = pkt_fast.transfer(
        source, target, rows, tokenizer=TOKENIZER, progress=False, method="sft",
        epochs=1, batch_size=6, layers=[1], rank=2, seed=5, learning_rate=1e-3, **STEADY,
    )  # fmt: skip
    expected = evaluate(result.model, TEST, TOKENIZER, max_new_tokens=3)
    got = found.methods[0].runs[0]
    assert got.next_token_loss == pytest.approx(expected.next_token_loss, rel=1e-6)
    assert got.token_accuracy == expected.token_accuracy
    assert got.parameters == result.delta.num_parameters
    before, top = found.target.next_token_loss, found.source.next_token_loss
    assert got.gap_closed == pytest.approx((before - got.next_token_loss) / (before - top))
    assert found.source.source_kl == pytest.approx(0, abs=1e-6)
    assert found.source.source_top1 == 1
    assert got.seconds > 0
    assert got.peak_bytes > 1e7


def test_a_seed_draws_the_same_rows_for_every_method(monkeypatch):
    drawn = []
    real = module.transfer

    def spy(source, target, rows, **options):
        drawn.append((options["config"]["seed"], tuple(row["prompt"] for row in rows)))
        return real(source, target, rows, **options)

    monkeypatch.setattr(module, "transfer", spy)
    run(["sft", "kd"], examples=5, tune_budget=1)
    assert len(set(drawn)) == 2
    assert {len(rows) for _, rows in drawn} == {5}


def test_rows_not_given_are_set_apart():
    before = list(ROWS)
    parts = module._split(ROWS, None, None, None)
    assert [len(parts[role]) for role in ("train", "validation", "test", "other")] == [12, 4, 4, 0]
    assert before == ROWS
    together = [row["prompt"] for role in ("train", "validation", "test") for row in parts[role]]
    assert sorted(together) == sorted(row["prompt"] for row in ROWS)
    bundled = module._split(None, None, None, None)
    assert [len(bundled[role]) for role in ("train", "validation", "test")] == [1000, 200, 200]


def test_without_labels_only_methods_that_need_none():
    run(["kd"], labels="none", seeds=[0], tune_budget=1)
    with pytest.raises(ConfigError, match="'sft' trains on labels"):
        run(["kd", "sft"], labels="none")


def test_source_writes_the_labels(monkeypatch):
    seen = []
    real = module.transfer

    def spy(source, target, rows, **options):
        seen.append(rows)
        return real(source, target, rows, **options)

    monkeypatch.setattr(module, "transfer", spy)
    monkeypatch.setattr(writing, "generate_replies", lambda _m, rows, _t, **_: ["42"] * len(rows))
    run(["sft"], labels="source", seeds=[0], tune_budget=1)
    assert all(row["completion"] == "42" for rows in seen for row in rows)
    assert {row["prompt"] for row in seen[0]} == {row["prompt"] for row in TRAIN}


def test_all_recipes_train_for_the_same_steps_and_share_what_the_source_writes(monkeypatch):
    seen, asked = [], []
    real = module.transfer

    def spy(source, target, rows, config, **options):
        seen.append((rows, config))
        return real(source, target, rows, config=config, **options)

    def write(source, rows, tokenizer, count, seed, **options):
        asked.append((count, seed))
        return [{"prompt": f"{seed}/{i}", "completion": "0"} for i in range(count - 1)] + [TEST[0]]

    monkeypatch.setattr(module, "transfer", spy)
    monkeypatch.setattr(module, "write_rows", write)
    wider = [
        Recipe(name, {"method": name, "min_rows": 16}, {"learning_rate": (1e-3,)})
        for name in ("kd", "sft")
    ]
    found = run([*wider, "paper"], tune_budget=1, epochs=2, examples=7)
    assert asked == [(9, 0), (9, 1)]
    assert {config["steps"] for _, config in seen} == {4}
    assert [len(rows) for rows, _ in seen] == [15] * 6 + [7] * 3
    assert not any("min_rows" in config for _, config in seen)
    assert all(TEST[0] not in rows for rows, _ in seen)
    assert found.settings["steps"] == 4


def test_every_way_to_transfer_makes_the_same_number_of_updates(monkeypatch):
    updates, real = [], module.transfer

    def spy(*models_and_rows, **options):
        result = real(*models_and_rows, **options)
        updates.append(sum(record["learning_rate"] > 0 for record in result.history))
        return result

    monkeypatch.setattr(module, "transfer", spy)
    shared = {"seeds": [0], "tune_budget": 1, "epochs": 2, "generate": False}
    found = run(ADDED, learning_rate_schedule="constant", **shared)
    assert found.settings["steps"] == 4
    solved = ADDED.index("ridge")
    assert updates[2 * solved : 2 * solved + 2] == [0, 0]
    assert updates[: 2 * solved] + updates[2 * solved + 2 :] == [4] * (2 * len(ADDED) - 2)
    assert found.notes() == [
        "ridge: solved from one pass over the rows, without steps",
        "kd+ridge: solved from one pass over the rows, then trained for all steps",
        "paper-v2, paper-acl: the layers train one after the other and share the steps",
    ]
    assert all(found.markdown().count(f"\n{note}\n") == 1 for note in found.notes())
    assert found.table().caption == "\n".join(found.notes())


def test_a_frontier_without_a_step_for_every_layer_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(module, "transfer", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"steps of a transfer \(1\) among its layers \(2\)"):
        run(["sft", "paper-v2"], steps=1)


def test_given_learning_rates_replace_those_of_the_recipes():
    own = Recipe("own", {}, {"learning_rate": (0.5,)})
    found = recipes(["sft", "sft+kd", "laten", own, "ridge"], [1e-2, 3e-2])
    tried = {r.name: r.tuned.get("learning_rate", r.tuned) for r in found}
    assert tried["sft"] == tried["sft+kd"] == (1e-2, 3e-2)
    assert tried["laten"] == RECIPES["laten"].tuned["learning_rate"]
    assert tried["own"] == (0.5,)
    assert tried["ridge"] == RECIPES["ridge"].tuned
    assert found[1].tuned["label_weight"] == RECIPES["sft+kd"].tuned["label_weight"]


def test_every_recipe_trains_with_the_comparison_s_settings(monkeypatch):
    seen, real = [], module.transfer

    def spy(*models_and_rows, config, **options):
        seen.append(config)
        return real(*models_and_rows, config=config, **options)

    monkeypatch.setattr(module, "transfer", spy)
    run(["sft"], tune_budget=1, seeds=[0], max_grad_norm=2.0)
    assert seen[0]["learning_rate_schedule"] == "cosine"
    assert seen[0]["max_grad_norm"] == 2.0


def test_change_needs_the_source_before_its_fine_tuning():
    with pytest.raises(ConfigError, match="source_base"):
        run(["kd+delta"])
    found = run(["kd+delta"], source_base=pair()[0], seeds=[0], tune_budget=1)
    assert found.methods[0].runs[0].next_token_loss > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "some"}, "labels='some'"),
        ({"tune_budget": 0}, "at least one trial"),
        ({"seeds": (1, 1)}, r"seeds=\[1, 1\]: give each once"),
        ({"examples": 0}, "examples=0: give at least 1"),
        ({"seeds": []}, "one seed"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"learning_rates": [1e-3, -1.0]}, "learning_rate=-1.0"),
        ({"epoch": 1}, "unknown setting 'epoch'"),
        ({"data": ROWS[:1], "validation": None, "test": None}, "too few rows"),
    ],
)
def test_bad_input_is_refused_before_training(options, message, monkeypatch):
    monkeypatch.setattr(module, "transfer", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=message):
        run(["sft"], **options)


# --------------------------------------------------------------------------- the table


def test_interval_is_students():
    assert mean_interval([2.0]) == (2.0, 0.0)
    assert mean_interval([None]) is None
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)


def comparison():
    def scores(loss, **more):
        return Scores(loss, 0.5, None, 0.1, 0.9, None, **more)

    settings = {"examples": 3, "labels": "given", "steps": 1, "batch_size": 2, "budget": 1,
                "seeds": [0, 1], "test_rows": 4}
    worse = MethodResult("worse", [], {"learning_rate": 1e-3}, 3.0, [scores(2.5), scores(2.7)])
    better = MethodResult("better", [], {"layer_weight": 0.3}, 2.0, [scores(1.5, gap_closed=0.5)])
    return Comparison(settings, scores(1.0), scores(3.0), [worse, better])


def test_table_is_sorted_by_loss_with_source_and_target_first():
    found = comparison()
    assert [row[0] for row in found.rows()] == ["source", "target before", "better", "worse"]
    lines = found.markdown().splitlines()
    assert "| better | layer 0.3 | 1.5000 |" in lines[-2]
    assert "2.6000 ± 1.2706" in lines[-1]
    assert lines[-2].count("|") == len(found.header()) + 1
    assert found.table().row_count == 4


def test_saves_and_loads(tmp_path):
    found = run(["sft"], seeds=[0], tune_budget=1, output_dir=tmp_path / "out")
    assert load_comparison(tmp_path / "out" / "comparison.json").as_dict() == found.as_dict()
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == found.markdown()
    json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(OutputError, match="not empty"):
        run(["sft"], output_dir=tmp_path / "out")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a comparison"):
        load_comparison(tmp_path / "bad.json")
