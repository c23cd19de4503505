"""The report must pass good kernels and fail bad ones; no GPU is needed for either."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import aot_report
from pkt_fast.kernels._common import Target, Tile, tiles_for

from pkt_fast.kernels import _common

KERNELS = '''
import triton
import triton.language as tl
from pkt_fast.kernels._common import KernelSpec


@triton.jit
def copy(Source, Target, count, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Target + at, tl.load(Source + at * stride, mask=at < count), mask=at < count)


@triton.jit
def product(Source, Target, count, BLOCK: tl.constexpr, MATRIX: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(count):
        x = tl.load(Source + k * BLOCK * BLOCK + at)
        if MATRIX:
            total = tl.dot(x, x, total)
        else:
            total += x.to(tl.float32) * x.to(tl.float32)
    tl.store(Target + at, total)


def spec(name, kernel, kind, constexprs, **options):
    args = {"Source": "*fp16:16", "count": "i32:16", "stride": "i32"}
    args["Target"] = "*fp16:16" if kernel is copy else "*fp32:16"
    return KernelSpec(name, kernel, args, constexprs, kind, bytes=10**6, flops=10**9,
                      compute="fp16", **options)


def aot_specs(target):
    good = [
        spec("wide copy", copy, "bytes", {"BLOCK": 4096, "stride": 1}, bulk_store=True),
        spec("matrix product", product, "gemm", {"BLOCK": 64, "MATRIX": True}),
    ]
    bad = [
        spec("scalar load", copy, "bytes", {"BLOCK": 1024}),
        spec("narrow store", copy, "bytes", {"BLOCK": 128, "stride": 1}, bulk_store=True),
        spec("no matrix", product, "gemm", {"BLOCK": 64, "MATRIX": False}),
        spec("spills", product, "gemm", {"BLOCK": 64, "MATRIX": True}, options={"maxnreg": 32}),
        spec("no such argument", copy, "bytes", {"BLOCK": 1000, "stride": 1}),
    ]
    return BAD_OR_GOOD
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the kernels above as a module whose specs are all good or all bad."""

    def write(which: str) -> str:
        name = f"aot_{which}_kernels"
        (tmp_path / f"{name}.py").write_text(KERNELS.replace("BAD_OR_GOOD", which))
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return write


def report(module: str, arch: str, tmp_path: Path) -> tuple[int, dict]:
    path = tmp_path / "report.json"
    status = aot_report.main(
        ["--modules", module, "--arch", arch, "--json", str(path), "--jobs", "1"]
    )
    return status, json.loads(path.read_text())


def test_good_kernels_pass(module, tmp_path, capsys):
    status, result = report(module("good"), "sm_90,gfx942", tmp_path)
    assert status == 0
    assert result["faults"] == []
    rows = {(r["kernel"], r["arch"]): r for r in result["kernels"]}
    for arch in ("sm_90", "gfx942"):
        assert rows["wide copy", arch]["widest_load"] == 16
        assert rows["wide copy", arch]["widest_store"] == 16
    assert rows["matrix product", "sm_90"]["matrix"] == "HGMMA"
    assert rows["matrix product", "gfx942"]["matrix"] == "v_mfma"
    # 1 MB at 3.35 TB/s against 1 GFLOP at 989 TFLOP/s
    assert rows["wide copy", "sm_90"]["model_us"] == pytest.approx(max(1 / 3.35, 1e3 / 989))
    assert "not a measurement" in capsys.readouterr().out


def test_bad_kernels_fail(module, tmp_path, capsys):
    status, result = report(module("bad"), "sm_80", tmp_path)
    assert status == 1
    faults = "\n".join(result["faults"])
    assert "scalar load on sm_80 loads at most 2 bytes at a time" in faults
    assert "narrow store on sm_80 stores at most 2 bytes at a time" in faults
    assert "no matrix on sm_80 is GEMM-shaped but has no matrix instruction" in faults
    assert "spills on sm_80 spills" in faults
    assert "no such argument on sm_80 does not compile" in faults
    assert capsys.readouterr().out.count("FAIL: ") == len(result["faults"]) == 6


TUNED = KERNELS.replace("from pkt_fast.kernels._common import KernelSpec", """
from pkt_fast.kernels._common import KernelSpec, Tile

TILES = [
    Tile({"BLOCK": 64}, 4, never_on=("sm_90",)),
    Tile({"BLOCK": 32}, 4, 2),
    Tile({"BLOCK": 16}, 4, 1),
]
""").replace("BAD_OR_GOOD", '[spec("tuned", product, "gemm", {"MATRIX": True}, tiles=TILES)]')


def test_all_configs_are_those_the_tuner_may_take(tmp_path, monkeypatch):
    (tmp_path / "aot_tuned_kernels.py").write_text(TUNED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def tiles(*options: str) -> list[tuple[str, str]]:
        path = tmp_path / "report.json"
        arguments = ["--modules", "aot_tuned_kernels", "--arch", "sm_80,sm_90", "--jobs", "1"]
        assert aot_report.main([*arguments, "--json", str(path), *options]) == 0
        rows = json.loads(path.read_text())["kernels"]
        return [(row["arch"], row["tile"].partition(",")[0]) for row in rows]

    assert tiles() == [("sm_80", "64"), ("sm_90", "32")]
    assert sorted(tiles("--all-configs")) == [
        ("sm_80", "16"), ("sm_80", "32"), ("sm_80", "64"), ("sm_90", "16"), ("sm_90", "32"),
    ]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm_75", None), ("sm_86", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
        ("sm_120", "sm_80"), ("gfx942", "gfx942"), ("gfx1100", None),
    ],
)
def test_other_gpus_take_the_lists_of_their_family_or_the_smallest_tile(name, family):
    target = Target.named(name)
    tiles = [Tile({"BLOCK": 64}, 4, never_on=("sm_90",)), Tile({"BLOCK": 32}, 4)]
    assert target.family == family
    few = family in (None, "sm_90")
    assert tiles_for(tiles, target) == (tiles[1:] if few else tiles)


def test_too_much_shared_memory_fails():
    row = aot_report.Row("wide", "gfx942", "triton", shared_bytes=80 << 10)
    assert row.faults() == ["wants 81920 bytes of shared memory of 64 KiB"]
    assert not aot_report.replace(row, arch="sm_90").faults()


def test_unknown_architecture_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        aot_report.main(["--arch", "sm_90,volta"])
    assert exit_.value.code == 2
    assert "volta" in capsys.readouterr().err


def test_every_kernel_file_is_in_the_report():
    kernels = Path(__file__).parent.parent / "kernels"
    expected = sorted(p.stem for p in kernels.glob("*.py") if not p.stem.startswith("_"))
    assert [name.rpartition(".")[2] for name in aot_report.kernel_modules()] == expected


def test_amd_spills_and_widths_are_read():
    assembly = """
        global_load_dwordx2 v[0:1], v2, s[0:1]
        buffer_store_short v3, v4, s[4:7], 0 offen
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        .private_segment_fixed_size: 16
        .sgpr_spill_count: 5
        .vgpr_count:     128
        .vgpr_spill_count: 3
    """
    facts = aot_report.read_amdgcn(assembly)
    assert facts == {
        "registers": 128, "spilled_bytes": 16, "matrix": "v_mfma", "matrix_count": 1,
        "widest_load": 8, "widest_store": 2,
    }  # fmt: skip


def test_machine_code_is_cut_by_function_and_architecture():
    dump = """
Fatbin elf code:
arch = sm_80
 Function one:
  REG:14 STACK:8 SHARED:0 LOCAL:0
Fatbin elf code:
arch = sm_90
 Function one:
  REG:20 STACK:0 SHARED:32 LOCAL:0
"""
    parts = aot_report._by_function(dump)
    assert {key: aot_report.read_usage(text) for key, text in parts.items()} == {
        ("sm_80", "one"): {"registers": 14, "spilled_bytes": 8, "shared_bytes": 0},
        ("sm_90", "one"): {"registers": 20, "spilled_bytes": 0, "shared_bytes": 32},
    }


def test_cuda_kernels_have_bytes_operations_and_a_model_time():
    def row(name: str) -> aot_report.Row:
        work = aot_report.cuda_work(name)
        bare = aot_report.Row(name, "sm_90", "nvcc", widest_load=16, widest_store=16, **work)
        return aot_report.roofline(bare)

    inject = row("pkt::cuda::inject_kernel")
    assert inject.bound_by == "memory"
    assert inject.model_us == pytest.approx(inject.bytes / 3.35e6)
    capture = row("pkt::cuda::capture_kernel<__nv_bfloat16, float>")
    assert (capture.bytes, capture.bus_bytes) == (2 * 4096**2, 4 * 4096**2)
    assert capture.bound_by == "bus"
    assert capture.model_us == pytest.approx(4 * 4096**2 / 0.064e6)
    assert not inject.faults()
    unknown = aot_report.Row("new_kernel", "sm_90", "nvcc", **aot_report.cuda_work("new_kernel"))
    assert unknown.faults() == ["has no bytes and operations: add it to cuda_work"]


def test_every_cuda_kernel_of_the_extension_is_counted():
    extension = aot_report.native_extension()
    rows = aot_report.nvcc_rows(extension, ["sm_90"]) if extension else []
    if not rows:
        pytest.skip("no CUDA kernels in this build")
    assert all(row.model_us > 0 and row.bound_by for row in rows)


def test_a_tuned_kernel_serves_one_thread_at_a_time(monkeypatch):
    """Triton's tuner keeps the arguments of the call it works on, and would mix them up."""
    inside, most = [], []

    class Tuner:
        def run(self, number):
            inside.append(number)
            time.sleep(0.02)
            most.append(len(inside))
            return inside.pop()

    monkeypatch.setattr(_common.triton, "autotune", lambda **_: lambda kernel: Tuner())
    tuner = _common.autotune([Tile({}, 4)], key=[])("a kernel")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tuner.run, range(4))) == list(range(4))
    assert most == [1] * 4
