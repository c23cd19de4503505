"""The benchmark suite runs on tiny shapes, judges targets and notices regressions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    compare_results,
    end_to_end,
    harness,
    micro,
    run,
    scaling,
)


@pytest.mark.parametrize("name", micro.BUILDERS)
def test_rows_agree_with_their_peers(name):
    """Ours and every peer that is installed give the same result."""
    torch.manual_seed(0)
    case = micro.BUILDERS[name](micro.SMALL, torch.device("cpu"))
    if case.error is None:
        pytest.skip(f"no peer of {name} is installed")
    assert case.error() < 1e-3
    for call in (*case.peers.values(), *case.limits.values()):
        if not isinstance(call, harness.Missing):
            call()


def test_liger_has_the_same_label_cosine():
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    case = micro.label_cosine(micro.SMALL, torch.device("cpu"))
    ours, liger = case.ours(), case.peers["Liger chunked cosine"]()
    assert micro.relative(ours, liger) < 1e-5


def test_both_transfers_have_the_same_losses(monkeypatch):
    monkeypatch.setattr(end_to_end, "GSM8K", Path("no such file"))
    row = end_to_end.measure_transfer(end_to_end.SMALL, 0, what="tiny", at_least=0.0)
    assert row["error"] < 1e-4
    assert row["targets"][0]["met"]


def fake_case() -> harness.Case:
    x = torch.randn(64, 64)
    return harness.Case(
        "product", "64×64", lambda: x @ x,
        {"torch": lambda: x @ x, "other": harness.Missing("needs a GPU")},
        {"copy": x.clone}, lambda: 0.0, {"torch": 0.0, "other": 2.0}, 1e9, 0.01,
    )


def test_a_row_has_ratios_memory_and_targets():
    row = harness.measure(fake_case())
    assert [target["met"] for target in row["targets"]] == [True, None, True]
    assert row["peers"]["other"] == {"skipped": "needs a GPU"}
    assert row["ours"]["quartiles_s"][0] <= row["ours"]["median_s"] <= row["ours"]["quartiles_s"][1]
    assert "not run: needs a GPU" in harness.markdown([row])


def test_peak_memory_sees_a_temporary():
    size = 64 << 20
    found = harness.peak_bytes(lambda: torch.ones(size // 8, dtype=torch.float64).sum())
    if found is None:
        pytest.skip("peak memory cannot be read here")
    assert 0.9 * size < found < 1.5 * size


def test_a_missed_target_is_said():
    row = {
        "ours": {"median_s": 2.0}, "peers": {"torch": {"median_s": 3.0}},
        "limits": {"copy": {"median_s": 1.0}},
    }
    judged = harness.judged(row, {"torch": 2}, 1.5)
    assert judged["speedups"] == {"torch": 1.5}
    assert [target["met"] for target in judged["targets"]] == [False, False]


def result_file(path: Path, medians: dict[str, float], cores: int = 2) -> Path:
    rows = [
        {"name": name, "shape": "s", "ours": {"median_s": t, "quartiles_s": [0.95 * t, 1.05 * t]}}
        for name, t in medians.items()
    ]
    path.write_text(json.dumps({"rows": rows, "machine": {"cpu": "c", "cores": cores}}))
    return path


def test_regressions_are_reported(tmp_path, capsys):
    before = result_file(tmp_path / "a.json", {"align": 1.0, "inject": 1.0, "gone": 1.0})
    after = result_file(tmp_path / "b.json", {"align": 2.0, "inject": 1.1, "new": 9.0})
    assert compare_results.main([str(before), str(after)]) == 1
    assert "SLOWER align" in (out := capsys.readouterr().out)
    assert "inject" in out
    assert "new" not in out
    assert compare_results.main([str(after), str(before)]) == 0


def test_files_that_cannot_be_compared(tmp_path, capsys):
    one = result_file(tmp_path / "a.json", {"align": 1.0})
    other = result_file(tmp_path / "b.json", {"align": 1.0}, cores=64)
    assert compare_results.main([str(one), str(other)]) == 2
    assert compare_results.main([str(one), str(other), "--any-machine"]) == 0
    assert compare_results.main([str(one), str(tmp_path / "missing.json")]) == 2
    assert compare_results.main([str(one), str(result_file(tmp_path / "c.json", {"x": 1.0}))]) == 2


def test_readme_is_filled_between_its_markers(tmp_path):
    result = {
        "machine": {"cpu": "c", "cores": 2, "cpu_capability": "AVX2", "torch_threads": 2},
        "versions": {"torch": "2"}, "date": "2026-01-01 00:00", "load_before": [0.1, 0, 0],
        "clock": "wall",
        "rows": [harness.measure(fake_case())],
    }
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n", encoding="utf-8")
    run.update_readme(result, readme)
    run.update_readme(result, readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("product") == 1
    assert "old" not in text


def test_the_command_line_writes_its_files(tmp_path):
    path = tmp_path / "cpu.json"
    assert run.main(["micro", "--small", "--only", "align", "--json", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["align"]
    assert "# Measured" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert run.main(["compare", str(path), str(path)]) == 0


def test_scaling_runs_and_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "_examples", lambda counts: [])
    points = scaling.curves("cpu", small=True)
    assert {point["curve"] for point in points} == {"tokens", "vocabulary", "width", "threads"}
    scaling.plot(points, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_memory_of_a_directory_store_is_measured(tmp_path):
    assert end_to_end.store_memory(tmp_path / "store", 4) >= 0
    assert (tmp_path / "store").is_dir()
