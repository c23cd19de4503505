"""The benchmark suite runs on tiny shapes, and its regression command can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as suite  # noqa: E402
from benchmarks import end_to_end, micro  # noqa: E402
from benchmarks.compare_results import compare  # noqa: E402


@pytest.mark.parametrize("build", micro.ROWS, ids=lambda build: build.__name__)
def test_every_row_computes_what_its_peers_do(build):
    row = build(micro.QUICK, torch.device("cpu"))
    bound = 1e-2 if "bfloat16" in row.name else 1e-4
    assert row.error is None or row.error < bound
    for call in (row.ours, *row.peers.values(), row.limit):
        call()


def test_the_obvious_transfer_has_the_same_losses():
    for result in end_to_end.run(end_to_end.QUICK, torch.device("cpu")):
        assert result["largest_loss_difference"] < 1e-4
        assert result["expected_speedup"] > 1


def test_the_command_writes_json_and_tables(tmp_path):
    path = tmp_path / "r.json"
    assert (
        suite.main(["micro", "--quick", "--only", "gather", "--rounds", "3", "--json", str(path)])
        == 0
    )
    results = json.loads(path.read_text())
    (row,) = results["micro"]
    assert row["ours_seconds"] > 0
    assert row["peers"]["torch expression"]["speedup"] > 0
    assert "copy of the bytes moved" in path.with_suffix(".md").read_text()


def test_scaling_runs_and_plots(tmp_path):
    path = tmp_path / "s.json"
    assert suite.main(["scaling", "--quick", "--json", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 1000
    curves = json.loads(path.read_text())["scaling"]
    assert [point["examples"] for point in curves["examples"]] == [2, 4]


def test_a_regression_is_found(tmp_path, capsys):
    for name, ratio in (("old", 1.0), ("same", 1.1), ("slow", 2.0)):
        row = {"name": "align", "over_limit": ratio}
        (tmp_path / f"{name}.json").write_text(json.dumps({"micro": [row]}))
    files = {name: str(tmp_path / f"{name}.json") for name in ("old", "same", "slow")}
    assert compare(files["old"], files["same"], 0.25) == 0
    assert compare(files["old"], files["slow"], 0.25) == 1
    assert "SLOWER  align" in capsys.readouterr().out


def test_the_readme_gets_the_table(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    suite.main(["micro", "--quick", "--only", "cosine", "--rounds", "3", "--json", str(path)])
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{suite.MARKERS[0]}\nold\n{suite.MARKERS[1]}\nend\n")
    monkeypatch.setattr(suite, "README", readme)
    suite.update_readme(path)
    text = readme.read_text()
    assert text.startswith("top\n")
    assert text.endswith("\nend\n")
    assert "old" not in text
    assert "layer cosine" in text
