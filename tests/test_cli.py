"""The command line: what it accepts, what it refuses with one line, and what it leaves behind."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from models import tiny_config
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_pairs import TOKENIZER, sized_model, sums
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pkt_fast import TransferConfig, cli, commands
from pkt_fast.cli import main
from pkt_fast.delta import LayerDelta
from pkt_fast.ops import backend

ROWS = sums(6, 4)


def save(model, directory, tokenizer=TOKENIZER):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def llama(seed, width, layers, vocabulary=None):
    options = {} if vocabulary is None else {"vocab_size": vocabulary}
    return sized_model("llama", seed, width, layers, **options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of a source and a target, a data file, and an adapter of the target."""
    root = tmp_path_factory.mktemp("pair")
    paths = {
        "source": save(llama(1, 48, 6), root / "source"),
        "target": save(llama(2, 32, 4), root / "target"),
        "data": write(root / "train.jsonl", ROWS),
        "adapter": str(root / "adapter"),
    }
    code = main([*pair_arguments(paths), "--output", paths["adapter"], "--quiet", *QUICK])
    assert code == 0
    return paths


QUICK = ["--epochs", "2", "--batch-size", "8", "--layers", "1,2", "--learning-rate", "0.01"]


def pair_arguments(paths, **changed):
    paths = {**paths, **changed}
    names = ("source", "target", "data")
    return ["transfer", *(part for name in names for part in (f"--{name}", str(paths[name])))]


def refused(capsys, argv):
    """The one line a refused command prints; asserts that it is one, and exit code 2."""
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("pkt-fast: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# --------------------------------------------------------------------------- the parser


def test_help_needs_no_torch():
    program = (
        "import sys\nfrom pkt_fast.cli import build_parser\nbuild_parser().format_help()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_setting_is_an_option_of_transfer(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TransferConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "learning rate (default: 0.0003)" in text


def test_options_become_settings_of_the_right_type():
    argv = (
        "transfer --source a --target b --layers 3,5 --target-modules up_proj,down_proj "
        "--no-bucket --learning-rate 1e-3 --epochs 7 --limit 9 --store here --compile"
    )
    given = cli.settings_of(cli.build_parser().parse_args(argv.split()))
    assert given == {
        "layers": (3, 5),
        "target_modules": "up_proj,down_proj",
        "bucket": False,
        "learning_rate": 1e-3,
        "epochs": 7,
        "limit": 9,
        "store": "here",
        "compile": True,
    }
    assert TransferConfig.make(**given).target_modules == ("up_proj", "down_proj")


def test_layers_all_and_nonsense():
    assert cli.layer_list("all") == "all"
    assert cli.layer_list("4") == (4,)
    with pytest.raises(Exception, match="not a list such as 3,5"):
        cli.layer_list("first")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["transfer"], "--source, --target"),
        (["transplant"], "transplant"),
        (["transfer", "--source", "a", "--target", "b", "--epoch", "3"], "transfer --help"),
        (["transfer", "--source", "a", "--target", "b", "--epochs", "many"], "many"),
        (["transfer", "--source", "a", "--target", "b", "--layers", "top"], "top"),
    ],
)
def test_bad_usage_is_one_line(capsys, argv, said):
    assert said in refused(capsys, argv)


# --------------------------------------------------------------------------- the commands


def test_transfer_shows_a_table_and_writes_an_adapter_peft_loads(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*pair_arguments(made), "--output", str(out), *QUICK]) == 0
    shown = capsys.readouterr().out
    for said in (
        "layer loss",
        "tokens/s",
        "peak memory",
        "PeftModel.from_pretrained",
        "→ target 1",
    ):
        assert said in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "report.html", "report.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["layers"] == [1, 2]
    assert report["config"]["epochs"] == 2
    base = AutoModelForCausalLM.from_pretrained(made["target"])
    loaded = PeftModel.from_pretrained(base, str(out))
    assert {"1", "2"} == {
        name.split(".layers.")[1].split(".")[0]
        for name, _ in loaded.named_parameters()
        if "lora_" in name
    }
    # The same settings and seed give the same bytes.
    assert (out / "adapter_model.safetensors").read_bytes() == (
        tmp_path.parent / made["adapter"] / "adapter_model.safetensors"
    ).read_bytes()


def test_transfer_without_output_says_that_nothing_was_written(made, capsys):
    assert main([*pair_arguments(made), "--limit", "4", "--epochs", "1", "--layers", "3"]) == 0
    assert "Nothing was written" in capsys.readouterr().out


def test_quiet_prints_nothing(made, tmp_path, capsys):
    argv = [*pair_arguments(made), "--output", str(tmp_path / "o"), "--quiet", *QUICK]
    assert main(argv) == 0
    assert capsys.readouterr() == ("", "")


def test_settings_from_a_file_yield_to_options(made, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"epochs": 1, "rank": 3, "layers": [0]}))
    argv = [*pair_arguments(made), "--config", str(config), "--rank", "2", "--quiet"]
    assert main([*argv, "--output", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["config"]["rank"], report["config"]["epochs"]) == (2, 1)


def test_inject_writes_the_model_peft_would_merge(made, tmp_path, capsys):
    out = tmp_path / "merged"
    argv = ["inject", "--model", made["target"], "--delta", made["adapter"], "--output", str(out)]
    assert main(argv) == 0
    assert "left unchanged by rounding" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(made["target"])
    peft = PeftModel.from_pretrained(base, made["adapter"]).merge_and_unload()
    ours, theirs = merged.state_dict(), peft.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    changed = AutoModelForCausalLM.from_pretrained(made["target"]).state_dict()
    assert any(not torch.equal(changed[name], ours[name]) for name in ours)
    assert (out / "tokenizer.json").is_file()
    assert main([*argv, "--overwrite", "--quiet"]) == 0


def test_evaluate_with_an_adapter_equals_evaluating_the_merged_model(made, tmp_path, capsys):
    merged = tmp_path / "merged"
    delta = ["--delta", made["adapter"]]
    main(["inject", "--model", made["target"], *delta, "--output", str(merged), "--quiet"])
    rest = ["--data", made["data"], "--limit", "6", "--max-new-tokens", "3", "--json"]
    assert main(["evaluate", "--model", made["target"], *delta, *rest]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--model", str(merged), *rest]) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["next_token_loss"] == pytest.approx(second["next_token_loss"], rel=1e-5)
    assert main(["evaluate", "--model", made["target"], *rest, "--no-generate"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["exact_match"] is None
    assert plain["next_token_loss"] != pytest.approx(first["next_token_loss"], rel=1e-6)


def test_attribute_shows_every_layer_and_the_pairing(made, capsys):
    argv = ["attribute", "--source", made["source"], "--target", made["target"]]
    assert main([*argv, "--data", made["data"], "--num-layers", "2"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {layer} " in shown for layer in range(6))
    assert shown.count("critical pair: source") == 2


def test_analyze_writes_numbers_and_tables(made, tmp_path, capsys):
    out = tmp_path / "analysis"
    argv = ["analyze", "--source", made["source"], "--target", made["target"]]
    rest = ["--data", made["data"], "--delta", made["adapter"], "--output", str(out)]
    assert main([*argv, *rest]) == 0
    assert "round trip, target" in capsys.readouterr().out
    assert len(json.loads((out / "analysis.json").read_text())["cka"]) == 4
    assert "| layer |" in (out / "analysis.md").read_text()


def test_compare_trains_and_writes_a_table(made, tmp_path, capsys):
    pair = ["--source", made["source"], "--target", made["target"], "--data", made["data"]]
    quick = ["--steps", "1", "--seeds", "0", "--tune-budget", "1", "--no-generate"]
    out = tmp_path / "out"
    command = ["compare", *pair, *quick, "--methods", "sft, kd", "--labels", "given"]
    assert main([*command, "--max-new-tokens", "4", "--output", str(out)]) == 0
    assert "sft" in capsys.readouterr().out
    written = json.loads((out / "comparison.json").read_text())
    assert [method["name"] for method in written["methods"]] == ["sft", "kd"]
    assert "choose" in refused(capsys, ["compare", *pair, "--methods", "nonsense"])


def test_diagnose_prints_what_a_transfer_would_report(made, capsys):
    argv = ["diagnose", "--source", made["source"], "--target", made["target"]]
    settings = ["--data", made["data"], "--layers", "0,1", "--recompose", "dual"]
    assert main([*argv, *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["target"] for layer in found] == [0, 1]
    assert all(layer["round_trip"] == pytest.approx(1, abs=1e-5) for layer in found)
    assert main([*argv, *settings]) == 0
    shown = capsys.readouterr().out
    assert "round trip" in shown
    assert f"{found[0]['cosine']:.3f}" in shown
    assert main([*argv, "--data", made["data"], "--method", "sft"]) == 2
    assert "aligns nothing" in capsys.readouterr().err


def test_info_names_who_serves_every_op(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "machine", "build", "ops", "extras"} <= found.keys()
    assert "capture_rows" in found["ops"]
    for served in found["ops"].values():
        assert served.keys() == {"cpu", "cuda", "cpu_why", "cuda_why"}
    assert main(["info"]) == 0
    assert "capture_rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wish", "cpu", "why"),
    [("reference", "reference", "as asked for"), ("triton", "none", "no triton implementation")],
)
def test_info_follows_the_backend_in_force(wish, cpu, why):
    with backend(wish):
        served = commands.information()["ops"]
    assert {op["cpu"] for op in served.values()} == {cpu}
    assert all(op["cpu_why"].startswith(why) for op in served.values())


def test_demo_runs_on_the_bundled_pair(monkeypatch, tmp_path, capsys):
    from pkt_fast.demo import bundled_rows, run

    monkeypatch.setattr(run, "TRAINING_ROWS", 8)
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 2)
    monkeypatch.setitem(run.TRAINING, "steps", 2)
    monkeypatch.setitem(run.RUNS, 'preset="best"', {"preset": "best", "min_rows": 10})
    monkeypatch.setattr(run, "bundled_rows", lambda split: bundled_rows(split)[:8])
    assert main(["demo", "--output", str(tmp_path / "demo"), "--quiet"]) == 0
    shown = capsys.readouterr().out
    for name in ("source", "target before", *run.RUNS):
        assert name in shown
    assert "2 steps" in shown
    assert LayerDelta.load(tmp_path / "demo").changes


def test_demo_looks_at_its_settings_first(capsys, monkeypatch):
    from pkt_fast.demo import run

    monkeypatch.setattr(run, "load_pair", None)
    assert "seed=-1" in refused(capsys, ["demo", "--seed", "-1"])


def test_a_task_directory_needs_tasks(made, tmp_path, capsys):
    argv = ["evaluate", "--model", made["target"], "--task-dir", tmp_path]
    assert "--tasks" in refused(capsys, argv)


def test_bench_needs_the_source_tree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "pkt_fast" / "commands.py"))
    assert "source checkout" in refused(capsys, ["bench", "--quick"])


# --------------------------------------------------------------------------- bad input


def bad_data(tmp_path, name):
    path = tmp_path / "bad.jsonl"
    text = {
        "empty": "\n \n",
        "not json": '{"text": "fine"}\n{"text": \n',
        "no shape": '{"question": "1+1", "reply": "2"}\n',
        "nothing supervised": '{"prompt": "1+1", "completion": ""}\n',
        "not utf-8": None,
    }
    if name == "not utf-8":
        path.write_bytes(b'{"text": "\xff"}\n')
    elif name != "missing":
        path.write_text(text[name], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        ("not json", "line 2: not valid JSON"),
        ("no shape", "line 1: no known shape"),
        ("nothing supervised", "no supervised token"),
        ("not utf-8", "line 1: not UTF-8"),
    ],
)
def test_bad_data(made, tmp_path, capsys, name, said):
    data, out = bad_data(tmp_path, name), tmp_path / "out"
    assert said in refused(capsys, [*pair_arguments(made, data=data), "--output", out])
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs=0"),
        ({"objective": "magic"}, "objective='magic': choose one of cosine"),
        ({"layers": [-1]}, "layers=[-1]"),
        ("[1", "is not JSON"),
        ([1], "give an object"),
    ],
)
def test_bad_config_file(made, tmp_path, capsys, config, said):
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    assert said in refused(capsys, [*pair_arguments(made), "--config", path])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "nowhere.json"], "nowhere.json does not exist"),
        (["--preset", "worst"], "preset='worst'"),
        (["--learning-rate", "-1"], "learning_rate=-1.0"),
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--layers", "4"], "target layer 4 is out of range; the target has layers 0 to 3"),
        (["--num-layers", "5"], "num_layers=5"),
        (["--target-modules", "made_up"], "made_up"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--backend", "magic"], "magic"),
    ],
)
def test_impossible_settings(made, tmp_path, capsys, options, said):
    out = tmp_path / "out"
    assert said in refused(capsys, [*pair_arguments(made), *options, "--output", out])
    assert not out.exists()


def words(prefix, count=300):
    """A word-level tokenizer whose tokens all begin with ``prefix``."""
    vocabulary = {f"{prefix}{i}": i for i in range(count)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{prefix}0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=f"{prefix}0", eos_token=f"{prefix}1"
    )


def test_no_shared_vocabulary(made, tmp_path, capsys):
    source = save(llama(1, 48, 6, 300), tmp_path / "s", words("a"))
    target = save(llama(2, 32, 4, 300), tmp_path / "t", words("b"))
    changed = pair_arguments(made, source=source, target=target)
    assert "share 0 tokens" in refused(capsys, changed)


def test_encoder_models_are_refused(made, tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=len(TOKENIZER), intermediate_size=40, **sizes)
    encoder = save(BertLMHeadModel(bert), tmp_path / "encoder")
    assert "decoder-only" in refused(capsys, pair_arguments(made, target=encoder))
    t5 = T5Config(
        vocab_size=len(TOKENIZER), d_model=32, d_ff=40, num_layers=2, num_heads=2, d_kv=16
    )
    both = save(T5ForConditionalGeneration(t5), tmp_path / "both")
    assert "encoder-decoder" in refused(capsys, pair_arguments(made, source=both))


@pytest.mark.parametrize("role", ["source", "target"])
def test_missing_model(made, tmp_path, capsys, role):
    said = refused(capsys, pair_arguments(made, **{role: tmp_path / "nowhere"}))
    assert role in said
    assert "does not exist" in said


def test_model_without_weights(made, tmp_path, capsys):
    empty = tmp_path / "no weights"
    tiny_config("llama").save_pretrained(empty)
    TOKENIZER.save_pretrained(empty)
    assert f"cannot load the target {empty}" in refused(capsys, pair_arguments(made, target=empty))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["source", "target"])
def test_numbers_that_are_not_finite(made, tmp_path, capsys, role, value):
    broken = llama(1, 48, 6)
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[3, 5] = value
    path, out = save(broken, tmp_path / "broken"), tmp_path / "out"
    argv = [*pair_arguments(made, **{role: path}), "--layers", "2", "--output", out]
    said = refused(capsys, argv)
    assert "layer 2" in said
    assert "NaN or inf" in said
    assert not out.exists()


def test_diverging_training_says_at_which_step(made, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*pair_arguments(made), "--learning-rate", "1e25", "--layers", "2", "--output", out]
    said = refused(capsys, argv)
    assert "step" in said
    assert not out.exists()


def test_output_directory_is_not_empty(made, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    said = refused(capsys, [*pair_arguments(made), "--output", tmp_path])
    assert "not empty" in said
    assert "--overwrite" in said
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_output_cannot_be_written(made, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    below = [*pair_arguments(made), "--output", tmp_path / "file" / "out"]
    assert "not writable" in refused(capsys, below)
    assert "is a file" in refused(capsys, [*pair_arguments(made), "--output", tmp_path / "file"])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["inject", "evaluate"])
def test_adapter_does_not_fit(made, tmp_path, capsys, command):
    out = tmp_path / "out"
    argv = [command, "--model", made["source"], "--delta", made["adapter"]]
    rest = ["--output", out] if command == "inject" else ["--data", made["data"]]
    assert "the delta is for a" in refused(capsys, [*argv, *rest])
    assert not out.exists()


def test_not_an_adapter(made, tmp_path, capsys):
    argv = ["inject", "--model", made["target"], "--output", tmp_path / "out"]
    assert "not an adapter directory" in refused(capsys, [*argv, "--delta", made["target"]])


@pytest.mark.parametrize("options", [["--max-new-tokens", "0"], ["--batch-size", "0"]])
def test_evaluate_refuses_impossible_sizes(made, capsys, options):
    assert "at least 1" in refused(capsys, ["evaluate", "--model", made["target"], *options])


# --------------------------------------------------------------------------- exit codes


def test_exit_code_and_line_of_the_real_program(made, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pkt_fast", *pair_arguments(made, data=tmp_path / "no.jsonl")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"pkt-fast: error: {tmp_path / 'no.jsonl'}: no such file\n"


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_unexpected_exceptions_keep_their_traceback(monkeypatch):
    def broken(args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "run", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["info"])


def test_a_reader_that_leaves_early_is_no_error():
    program = f"set -o pipefail; {sys.executable} -m pkt_fast info | head -c 10"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_cannot_be_written_is_one_line():
    program = f"{sys.executable} -m pkt_fast info > /dev/full"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "pkt-fast: error: cannot write the output: No space left on device\n"
