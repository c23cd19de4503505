"""The examples run, on fewer rows than a person would use."""

import importlib.util
from pathlib import Path

from peft import PeftModel

from pkt_fast.demo import bundled_rows, load_pair, source_path, target_path

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transfer_local_models(tmp_path, capsys):
    output = str(tmp_path / "out")
    rows = bundled_rows("test")[:4]
    load("transfer_local_models").main(source_path(), target_path(), rows, rows, output, epochs=1)
    shown = capsys.readouterr().out
    assert "layers paired: source" in shown
    assert shown.count("exact match") == 2
    assert PeftModel.from_pretrained(load_pair()[1], output)


def test_building_blocks(capsys):
    losses = load("building_blocks").main(rows=8, steps=12)
    assert losses[-1] < losses[0]
    shown = capsys.readouterr().out
    assert "injected into 4 matrices" in shown
    assert "ejected from 4 matrices" in shown
