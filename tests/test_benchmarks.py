"""The benchmark suite runs on tiny shapes, judges targets and notices regressions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import pkt_fast  # noqa: E402
from benchmarks import (  # noqa: E402
    compare_results,
    end_to_end,
    harness,
    methods,
    micro,
    record,
    run,
    scaling,
)
from pkt_fast import cli, losses  # noqa: E402
from pkt_fast.data.encoding import encode  # noqa: E402
from pkt_fast.errors import ConfigError, DataError  # noqa: E402


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


def test_statistics_of_the_head_are_not_in_the_time_of_label_cosine(monkeypatch):
    case = micro.build("label cosine", micro.SMALL)
    monkeypatch.setattr(losses, "head_statistics", None)
    assert case.ours().isfinite().all()


def test_liger_has_the_same_label_cosine():
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    case = micro.label_cosine(micro.SMALL, torch.device("cpu"))
    ours, liger = case.ours(), case.peers["Liger chunked cosine"]()
    assert micro.relative(ours, liger) < 1e-5


def test_both_transfers_have_the_same_losses(monkeypatch):
    monkeypatch.setattr(end_to_end, "GSM8K", Path("no such file"))
    row = end_to_end.measure_transfer(end_to_end.SMALL, 0, name="tiny", at_least=0.0, peer_runs=2)
    assert row["error"] < 1e-4
    assert row["targets"][0]["met"]
    assert row["ours"]["samples"] == end_to_end.OUR_RUNS
    assert row["peers"][end_to_end.PEER]["samples"] == 2


def test_rows_of_gsm8k_are_left_out_where_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(end_to_end, "GSM8K", tmp_path / "nothing")
    without = [name for name, _ in end_to_end.rows(end_to_end.FULL, "cpu")]
    (tmp_path / "nothing").touch()
    names = [name for name, _ in end_to_end.rows(end_to_end.FULL, "cpu")]
    assert set(names) - set(without) == {"whole transfer, 128 rows of GSM8K"}


@pytest.mark.skipif(not end_to_end.GSM8K.is_file(), reason="GSM8K is not here")
@pytest.mark.parametrize("count", [128, 256])
def test_padding_of_few_rows_of_gsm8k(count):
    rows, origin = end_to_end.rows_of(count)
    assert origin == "GSM8K"
    examples = encode(rows, end_to_end.byte_pair_tokenizer(rows, 2000))
    for seed in range(3):
        config = pkt_fast.TransferConfig(batch_size=16, micro_batch_size=16, seed=seed)
        assert 0 < end_to_end.padding(examples, config) <= 0.10


def test_a_compiled_step_is_compared_with_the_same_step(monkeypatch):
    times = {False: [0.5, 0.2, 0.4, 0.2, 0.4], True: [9.5, 0.1, 0.3, 0.1, 0.3]}
    monkeypatch.setattr(end_to_end, "_step_seconds", lambda *_, compile: times[compile])
    row = end_to_end.measure_compilation(end_to_end.SMALL, 1, name="step", device="cpu")
    assert "saves 100 ms" in row["note"]
    assert "compilation takes 9.1 s and pays from 91 steps on" in row["note"]
    assert row["speedups"]["eager"] == pytest.approx(0.4 / 0.3)
    times[True] = times[False]
    row = end_to_end.measure_compilation(end_to_end.SMALL, 1, name="step", device="cpu")
    assert "pays never" in row["note"]


def test_every_step_is_timed():
    rows, _ = end_to_end.rows_of(6)
    setup = end_to_end.SMALL
    seconds = end_to_end._step_seconds(setup, 1, rows, "cpu", compile=False)
    assert len(seconds) == 2 * setup.epochs
    assert min(seconds) > 0


def fake_case() -> harness.Case:
    x = torch.randn(64, 64)
    return harness.Case(
        "product", "64×64", lambda: x @ x,
        {"torch": lambda: x @ x, "other": harness.Missing("needs a GPU")},
        {"copy": x.clone}, lambda: 0.0,
        harness.Targets({"torch": 0.0, "other": 2.0}, {"copy": 1e9}), seconds=0.01,
    )


def test_a_row_has_ratios_memory_and_targets():
    row = harness.measure(fake_case())
    assert [target["met"] for target in row["targets"]] == [True, None, True]
    assert row["peers"]["other"] == {"skipped": "needs a GPU"}
    assert row["ours"]["quartiles_s"][0] <= row["ours"]["median_s"] <= row["ours"]["quartiles_s"][1]
    assert "not run: needs a GPU" in harness.markdown([row])


def test_a_failing_peer_or_limit_leaves_the_row():
    def fails():
        raise TypeError("no such\nargument")

    case = fake_case()
    case.peers, case.limits = {"torch": fails, "other": case.ours}, {"copy": fails}
    case.error = fails
    case.targets = harness.Targets({"torch": 1.0}, {"copy": 1e9})
    row = harness.measure(case)
    assert row["peers"]["torch"] == {"failed": "TypeError: no such argument"}
    assert row["limits"]["copy"] == {"failed": "TypeError: no such argument"}
    assert row["error"] is None
    assert row["speedups"].keys() == {"other"}
    assert [target["met"] for target in row["targets"]] == [None, None]
    assert "failed: TypeError: no such argument" in harness.markdown([row])


def test_our_own_failure_is_raised():
    case = fake_case()
    case.error = None
    case.ours = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        harness.measure(case)


def test_a_comparison_that_fails_alone_is_raised():
    case = fake_case()
    case.error = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        harness.measure(case)


def test_peak_memory_sees_a_temporary(monkeypatch):
    """Of the device that is measured, which is the CPU beside a GPU as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    size = 64 << 20
    found = harness.peak_bytes(lambda: torch.ones(size // 8, dtype=torch.float64).sum())
    if found is None:
        pytest.skip("peak memory cannot be read here")
    assert 0.9 * size < found < 1.5 * size


def test_a_gpu_is_waited_for_and_its_own_memory_read(monkeypatch):
    done = []
    results = {"synchronize": None, "memory_allocated": 5, "max_memory_allocated": 9}
    for name, result in results.items():
        monkeypatch.setattr(torch.cuda, name, lambda n=name, r=result: done.append(n) or r)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    harness.use_device("cuda")
    try:
        assert harness.peak_bytes(lambda: done.append("call")) == 4
    finally:
        harness.use_device("cpu")
    assert done == [
        "synchronize", "memory_allocated", "call", "synchronize", "max_memory_allocated",
    ]  # fmt: skip


def test_the_cpu_clock_is_refused_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--clock cpu"):
        run.main(["--device", "cuda", "--clock", "cpu"])


def test_a_missed_target_is_said():
    row = {
        "ours": {"median_s": 2.0, "peak_bytes": 8}, "error": 1e-3,
        "peers": {"torch": {"median_s": 3.0, "peak_bytes": 4}},
        "limits": {"copy": {"median_s": 1.0}, "products": {"median_s": 2.0}},
    }
    targets = harness.Targets(
        {"torch": 2}, {"copy": 1.5, "products": 1.5}, (1e-5, "float64"), {"no temporary": 7},
        ("torch", "absent"),
    )
    judged = harness.judged(row, targets)
    assert judged["speedups"] == {"torch": 1.5}
    assert {target["what"]: target["met"] for target in judged["targets"]} == {
        "≥ 2x torch": False,
        "≤ 1.5x copy": False,
        "≤ 1.5x products": True,
        "error ≤ 1e-05 of float64": False,
        "no temporary": False,
        "less memory than torch": False,
        "less memory than absent": None,
    }
    row["ours"]["peak_bytes"], row["error"] = 3, 1e-6
    met = [target["met"] for target in harness.judged(row, targets)["targets"]]
    assert met == [False, False, True, True, True, True, None]
    row["ours"]["peak_bytes"] = None
    assert harness.judged(row, targets)["targets"][4]["met"] is None


def test_the_slowest_of_limits_that_hold_together_comes_first():
    row = {
        "ours": {"median_s": 3.0}, "peers": {},
        "limits": {"copy": {"median_s": 1.0}, "arithmetic": {"median_s": 2.0}},
    }
    together = harness.judged(row, harness.Targets(), together=True)
    assert list(together["of_limit"].items()) == [("arithmetic", 1.5), ("copy", 3.0)]
    assert list(harness.judged(row, harness.Targets())["of_limit"]) == ["copy", "arithmetic"]


def test_every_number_is_a_median_of_several_samples(monkeypatch):
    """Calls take their turns: ours and the limits five times at least, a slow peer once."""
    order = []
    calls = {name: (lambda: None) for name in ("ours", "peer a", "peer slow", "limit copy")}
    by_call = {call: name for name, call in calls.items()}
    first = {"ours": 0.01, "peer a": 2.0, "peer slow": 7.0, "limit copy": 0.01}

    def seconds_of(call, repeats):
        order.append(by_call[call])
        return first[order[-1]]

    monkeypatch.setattr(harness, "seconds_of", seconds_of)
    samples = harness.samples_in_turn(calls, first, seconds=4)
    counts = {name: len(values) for name, values in samples.items()}
    assert counts == {"ours": 6, "peer a": 3, "peer slow": 1, "limit copy": 6}
    assert order == 3 * ["ours", "peer a", "limit copy", "ours", "limit copy"]
    first["peer a"] = 0.5
    assert len(harness.samples_in_turn(calls, first, seconds=4)["peer a"]) == 7
    first["ours"] = 11.0
    assert harness.samples_in_turn(calls, first, seconds=4)["ours"] == [11.0]
    first["peer a"] = first["ours"] = 0.01
    assert len(harness.samples_in_turn(calls, first, seconds=4)["ours"]) == harness.MOST_ROUNDS


def test_samples_are_told():
    row = harness.measure(fake_case())
    assert row["ours"]["samples"] >= harness.LEAST_SAMPLES
    assert f"ours {row['ours']['samples']}, torch" in harness.samples_text(row)
    assert "other" not in harness.samples_text(row)


def test_targets_are_those_of_the_design():
    """As they were given, also where they cannot be reached; what is known of why beside them."""
    def targets(name):
        return micro.build(name, micro.SMALL).targets

    basis = targets("basis")
    assert basis.error == (1e-5, "float64 pinv")
    head = 4 * micro.SMALL.vocabulary * micro.SMALL.source
    assert basis.memory == {"memory ≤ 1.3x the head": 1.3 * head}
    inject = targets("inject")
    assert next(iter(inject.at_most)) == "copy of the weight"
    assert inject.at_most["copy of the weight"] == 1.2
    assert "no temporary of the weight's size" in inject.memory
    assert targets("attribute a model").less_memory_than == ("Captum",)


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
        "versions": {"torch": "2"}, "clock": "wall", "scaling": [], "failures": [],
        "device": "cpu",
        "rows": [harness.measure(fake_case()) | {"date": "2026-01-01 00:00", "load": 0.1}],
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
    assert "Measured on 2 cores of c (AVX2)" in text


def test_pages_name_the_gpu_that_was_measured():
    machine = {"cpu": "c", "cores": 2, "cpu_capability": "AVX2", "torch_threads": 2}
    result = {
        "machine": machine | {"gpus": ["NVIDIA H100", "another"]}, "versions": {"torch": "2"},
        "clock": "wall", "scaling": [], "failures": [], "rows": [], "device": "cuda",
    }  # fmt: skip
    result["rows"] = [harness.measure(fake_case()) | {"date": "2026-01-01 00:00", "load": 0.1}]
    assert "device cuda (NVIDIA H100)" in run.document(result)
    assert "Measured on one NVIDIA H100, torch 2" in run.readme_table(result)


def rows_named(*names: str, fail: str = ""):
    """A stand-in for the entries of a part."""

    def entries(device, small, seconds):
        for name in names:

            def row(name=name):
                if name == fail:
                    raise MemoryError("too large")
                return harness.measure(fake_case()) | {"name": name}

            yield "micro", name, row

    return entries


@pytest.fixture
def parts(monkeypatch):
    """The parts of the suite, with one quick row each."""
    monkeypatch.setattr(
        run, "PARTS", {"micro": rows_named("a", "b"), "transfer": rows_named("whole")}
    )
    return run.PARTS


def test_the_command_line_writes_its_files(tmp_path, parts):
    path = tmp_path / "new" / "cpu.json"
    assert run.main(["micro", "--small", "--only", "a", "--json", str(path)]) == 0
    written = record.read(path)
    assert [row["name"] for row in written["rows"]] == ["a"]
    assert "# Measured" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert run.main(["compare", str(path), str(path)]) == 0


def test_a_later_run_adds_to_the_file(tmp_path, parts):
    path = tmp_path / "cpu.json"
    for part in ("micro", "transfer", "micro"):
        assert run.main([part, "--json", str(path)]) == 0
    assert [row["name"] for row in record.read(path)["rows"]] == ["a", "b", "whole"]
    written = path.read_bytes()
    with pytest.raises(ConfigError, match=r"measured with another small.*delete it"):
        run.main(["micro", "--small", "--json", str(path)])
    assert path.read_bytes() == written
    path.write_text('{"format": 1}')
    with pytest.raises(DataError, match="format 1"):
        run.main(["micro", "--json", str(path)])


def test_a_failing_row_ends_nothing(tmp_path, parts, capsys):
    path = tmp_path / "cpu.json"
    parts["micro"] = rows_named("a", "b", fail="a")
    assert run.main(["--json", str(path)]) == 1
    found = record.read(path)
    assert [row["name"] for row in found["rows"]] == ["b", "whole"]
    assert [(f["name"], f["why"]) for f in found["failures"]] == [("a", "MemoryError: too large")]
    assert "micro, a: MemoryError: too large" in capsys.readouterr().err
    assert "too large" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert run.main(["compare", str(path), str(path)]) == 1
    assert "FAILED a" in capsys.readouterr().out
    parts["micro"] = rows_named("a", "b")
    assert run.main(["--json", str(path)]) == 0
    assert not record.read(path)["failures"]


def test_an_interrupted_run_keeps_what_it_had(tmp_path, parts):
    path = tmp_path / "cpu.json"

    def interrupted(device, small, seconds):
        yield from rows_named("a")(device, small, seconds)

        def stop():
            raise KeyboardInterrupt

        yield "micro", "b", stop

    parts["micro"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.main(["--json", str(path)])
    assert [row["name"] for row in record.read(path)["rows"]] == ["a"]
    assert "**a**" in path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["neither"], "invalid choice"),
        (["micro", "--only", "nothing of the sort"], "is in no name"),
        (["--json", "{file}/below.json"], "cannot write"),
        (["--update-readme", "missing.json"], "cannot read missing.json"),
        (["compare", "one.json"], "required: after"),
        (["compare", "one.json", "two.json", "--nope"], "--nope"),
    ],
)
def test_bad_usage_is_one_line(arguments, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    assert cli.main(["bench", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told


def test_scaling_runs_and_plots(tmp_path):
    """One point of every kind; the others differ in their sizes alone."""
    pytest.importorskip("matplotlib")
    chosen = {}
    for name, point in scaling.points("cpu", small=True):
        chosen.setdefault((name.split()[0], name.partition(": ")[2]), point)
    assert {curve for curve, _ in chosen} == {
        "tokens", "vocabulary", "width", "threads", "epochs", "examples"
    }
    measured = [point() for (curve, _), point in chosen.items() if curve != "examples"]
    scaling.plot(measured, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert scaling.scaling_markdown(measured).count("\n") == 2 + len(measured)


def test_memory_of_a_directory_store_is_measured(tmp_path):
    seconds, grown = end_to_end.store_run(tmp_path / "store", 4)
    assert seconds > 0
    assert grown >= 0
    assert (tmp_path / "store").is_dir()


def test_a_transfer_may_give_freed_blocks_back(monkeypatch):
    found = {}

    def run(command, **options):
        found.update(options["env"])
        return subprocess.CompletedProcess(command, 0, "measured 1.5 4096\n", "")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    point = scaling._examples(8, scaling.GIVEN_BACK)
    assert (point["ours_s"], point["ours_bytes"]) == (1.5, 4096)
    assert point["name"] == "transfer, directory store, freed blocks given back"
    assert found["MALLOC_MMAP_THRESHOLD_"] == "65536"
    found.clear()
    assert scaling._examples(8)["name"] == "transfer, directory store"
    assert "MALLOC_MMAP_THRESHOLD_" not in found


def test_the_page_of_methods_holds_every_result(tmp_path):
    for name in ("independent-32", "problems-32"):
        file = f"methods_{name}.json"
        (tmp_path / file).write_bytes((methods.RESULTS / file).read_bytes())
    page = methods.write_page(tmp_path)
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == page
    assert page.count("\n## ") == 2
    found = json.loads((tmp_path / "methods_problems-32.json").read_text(encoding="utf-8"))
    table = page.partition("## problems-32")[2]
    assert all(f"| {method['name']} |" in table for method in found["methods"])


def test_the_kept_page_of_methods_is_up_to_date(tmp_path):
    for path in methods.RESULTS.glob("methods_*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = (methods.RESULTS / "methods.md").read_text(encoding="utf-8")
    assert methods.write_page(tmp_path) == kept, "run python benchmarks/methods.py --summary"
