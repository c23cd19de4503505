"""Compile every kernel for GPUs that are not here, and say what came out.

    python benchmarks/aot_report.py --arch sm_80,sm_90,sm_100,gfx942 --json report.json
    python benchmarks/aot_report.py --all-configs        # every tile that autotuning may take

Triton kernels are compiled ahead of time at the realistic shapes their files declare
(``aot_specs``, see kernels/_common.py); CUDA kernels are read out of the built extension.  For each
kernel and architecture the table shows registers, spilled bytes, shared memory, matrix
instructions, the widest global load and store, and the least time a data-sheet GPU would need for
the bytes and operations.  That time is a model, not a measurement: nothing runs.

Exit status 1 when a kernel does not compile, spills, does not fit shared memory, is
GEMM-shaped without matrix instructions, or moves bytes without 16-byte loads and stores.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from pkt_fast.kernels._common import KernelSpec, Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import pkt_fast.kernels

DEFAULT_ARCHS = "sm_80,sm_90,sm_100,gfx942"


@dataclass(frozen=True)
class Peak:
    """Data-sheet values of the part an architecture stands for.

    TB/s of memory and, one way, of the bus to the host; dense TFLOP/s by type; and KiB of shared
    memory one block may have.
    """

    part: str
    bandwidth: float
    bus: float
    half: float
    tf32: float
    fp32: float
    fp64: float
    shared: int

    def flops(self, compute: str) -> float:
        """Peak TFLOP/s of ``compute``; tf32x3 spends three TF32 products on one float32 product."""
        return {
            "fp16": self.half, "bf16": self.half, "tf32x3": self.tf32 / 3, "fp32": self.fp32,
            "fp64": self.fp64,
        }[compute]


PEAKS = {
    "sm_80": Peak("A100 SXM 80 GB", 2.039, 0.032, 312.0, 156.0, 19.5, 9.7, 163),
    "sm_90": Peak("H100 SXM", 3.35, 0.064, 989.0, 494.0, 67.0, 34.0, 227),
    "sm_100": Peak("B200", 8.0, 0.064, 2250.0, 1125.0, 75.0, 37.0, 227),
    "gfx942": Peak("MI300X", 5.3, 0.064, 1307.0, 653.0, 163.4, 81.7, 64),
}


@dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture."""

    kernel: str
    arch: str
    compiler: str
    kind: str = ""
    tile: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = ""
    matrix_count: int = 0
    widest_load: int = 0
    widest_store: int = 0
    bulk_store: bool = False
    bytes: int = 0
    bus_bytes: int = 0
    flops: int = 0
    compute: str = ""
    model_us: float = 0.0
    bound_by: str = ""
    compile_seconds: float = 0.0
    error: str = ""

    def faults(self) -> list[str]:
        """Why this row fails the report."""
        if self.error:
            return [f"does not compile: {self.error}"]
        faults = []
        if self.compiler == "nvcc" and not self.bytes:
            faults.append("has no bytes and operations: add it to cuda_work")
        if self.spilled_bytes:
            faults.append(f"spills {self.spilled_bytes} bytes of registers")
        peak = PEAKS.get(self.arch)
        if peak and self.shared_bytes > peak.shared * 1024:
            faults.append(f"wants {self.shared_bytes} bytes of shared memory of {peak.shared} KiB")
        if self.kind == "gemm" and not self.matrix_count:
            faults.append("is GEMM-shaped but has no matrix instruction")
        if self.kind == "bytes" and self.widest_load < 16:
            faults.append(f"loads at most {self.widest_load} bytes at a time")
        if self.bulk_store and self.widest_store < 16:
            faults.append(f"stores at most {self.widest_store} bytes at a time")
        return faults


# --------------------------------------------------------------------------- machine code


def nvidia_tool(name: str) -> str:
    """Path of cuobjdump: the one Triton ships, else the CUDA toolkit's."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(shipped) if shipped.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} not found beside Triton or on PATH")
    return found


def _cuobjdump(option: str, path: Path) -> str:
    command = [nvidia_tool("cuobjdump"), option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_SASS_MATRIX = re.compile(r"\b(HGMMA|HMMA|IMMA|DMMA|QMMA|OMMA|UTC[A-Z]*MMA)\b")
_SASS_LOAD = re.compile(r"\b(?:LDG|LD|LDGSTS|UTMALDG|UBLKCP)\b[.\w]*")
_SASS_STORE = re.compile(r"\b(?:STG|ST|UTMASTG)\b[.\w]*")
_AMD_MATRIX = re.compile(r"\b(v_mfma|v_wmma|v_smfmac)_\w+")
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_STORE = re.compile(r"\b(?:global|buffer|flat)_store_(\w+)")
_AMD_WIDTHS = {"x4": 16, "b128": 16, "x3": 12, "b96": 12, "x2": 8, "b64": 8, "dword": 4, "b32": 4}


def _sass_width(instruction: str) -> int:
    if instruction.startswith(("UTMA", "UBLKCP")) or ".128" in instruction:
        return 16
    if ".64" in instruction:
        return 8
    return 2 if "16" in instruction else 1 if ".U8" in instruction or ".S8" in instruction else 4


def _amd_width(suffix: str) -> int:
    return next((width for end, width in _AMD_WIDTHS.items() if suffix.endswith(end)), 2)


def _matrix(names: Iterable[str]) -> tuple[str, int]:
    counts = Counter(names)
    return "+".join(sorted(counts)), sum(counts.values())


def read_sass(sass: str) -> dict[str, object]:
    """Matrix instructions and widest global accesses of NVIDIA machine code."""
    matrix, count = _matrix(_SASS_MATRIX.findall(sass))
    return {
        "matrix": matrix,
        "matrix_count": count,
        "widest_load": max(map(_sass_width, _SASS_LOAD.findall(sass)), default=0),
        "widest_store": max(map(_sass_width, _SASS_STORE.findall(sass)), default=0),
    }


def read_usage(usage: str) -> dict[str, int]:
    """Registers and bytes of thread-local memory (spills and stack) from ``-res-usage``."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": int(found["SHARED"]),
    }


def read_amdgcn(assembly: str) -> dict[str, object]:
    """Registers, spills, matrix instructions and widest accesses of AMD assembly."""

    def note(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    # A scalar without a register moves to a lane of a vector register, which touches no memory.
    spilled = 4 * note("vgpr_spill_count")
    matrix, count = _matrix(match[1] for match in _AMD_MATRIX.finditer(assembly))
    return {
        "registers": note("vgpr_count"),
        "spilled_bytes": max(spilled, note("private_segment_fixed_size")),
        "matrix": matrix,
        "matrix_count": count,
        "widest_load": max(map(_amd_width, _AMD_LOAD.findall(assembly)), default=0),
        "widest_store": max(map(_amd_width, _AMD_STORE.findall(assembly)), default=0),
    }


# --------------------------------------------------------------------------- Triton


def bare(kernel: object) -> JITFunction:
    """The function inside ``autotune`` and ``heuristics`` wrappers."""
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn  # type: ignore[attr-defined]
    return kernel


def compile_spec(spec: KernelSpec, target: Target) -> triton.compiler.CompiledKernel:
    """Compile one kernel for ``target``; needs no GPU."""
    kernel = bare(spec.kernel)
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        if parameter.name in spec.constexprs:
            signature[parameter.name] = "constexpr"
            continue
        kind, _, aligned = spec.args[parameter.name].partition(":")
        signature[parameter.name] = kind
        if aligned:
            attributes[(position,)] = [["tt.divisibility", int(aligned)]]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=attributes
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=options,
        )


def measure(spec: KernelSpec, target: Target) -> Row:
    """Compile one kernel and read its machine code."""
    row = Row(
        spec.name, target.name, "triton", spec.kind, bytes=spec.bytes, flops=spec.flops,
        compute=spec.compute, bulk_store=spec.bulk_store, tile=spec.tile,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        compiled = compile_spec(spec, target)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [""]
        return replace(row, error=f"{type(error).__name__}: {lines[-1]}")
    if target.backend == "hip":
        facts = read_amdgcn(compiled.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            facts = read_usage(_cuobjdump("-res-usage", cubin))
            facts |= read_sass(_cuobjdump("-sass", cubin))
    facts["shared_bytes"] = compiled.metadata.shared
    facts["compile_seconds"] = round(time.perf_counter() - start, 2)
    return roofline(replace(row, **facts))


def roofline(row: Row) -> Row:
    """Add the least time for the row's bytes and operations on a data-sheet GPU."""
    peak = PEAKS.get(row.arch)
    if peak is None:
        return row
    times = {
        "memory": row.bytes / (peak.bandwidth * 1e6),
        "bus": row.bus_bytes / (peak.bus * 1e6),
        "compute": row.flops / (peak.flops(row.compute) * 1e6),
    }
    bound = max(times, key=lambda what: times[what])
    return replace(row, model_us=times[bound], bound_by=bound)


def _specs(module: str, arch: str, every_tile: bool) -> list[KernelSpec]:
    """The kernels of a module as compiled for ``arch``: with the first tile of each, or all."""
    target = Target.named(arch)
    tiled = [spec.tiled(target) for spec in importlib.import_module(module).aot_specs(target)]
    return [spec for specs in tiled for spec in specs[: None if every_tile else 1]]


Task = tuple[str, str, bool, int]  # the arguments of _specs, and a position in its list


def _measure(module: str, arch: str, every_tile: bool, position: int) -> Row:
    return measure(_specs(module, arch, every_tile)[position], Target.named(arch))


def _measured(tasks: Sequence[Task], jobs: int) -> list[Row | None]:
    """The rows of ``tasks`` from a pool of processes; None for those its breakdown left undone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = [pool.submit(_measure, *task) for task in tasks]
        wait(pending)
        return [None if future.exception() else future.result() for future in pending]


def kernel_modules() -> list[str]:
    """Every kernel file of pkt_fast.kernels."""
    files = (path for folder in pkt_fast.kernels.__path__ for path in Path(folder).glob("*.py"))
    return sorted(f"pkt_fast.kernels.{f.stem}" for f in files if not f.stem.startswith("_"))


def triton_rows(
    modules: Sequence[str], archs: Sequence[str], jobs: int, *, every_tile: bool = False
) -> list[Row]:
    """One row per kernel, architecture and tile, compiled in ``jobs`` processes, if several."""
    tasks = [
        ((module, arch, every_tile, position), spec)
        for module in modules
        for arch in archs
        for position, spec in enumerate(_specs(module, arch, every_tile))
    ]
    # The long compilations first, so that no process is left alone with one at the end.
    tasks.sort(key=lambda task: task[1].kind != "gemm")
    if jobs == 1:
        rows = [_measure(*task) for task, _ in tasks]
    else:
        rows = []
        while tasks:
            done = _measured([task for task, _ in tasks], jobs)
            rows += [row for row in done if row is not None]
            tasks = [task for task, row in zip(tasks, done, strict=True) if row is None]
            # A crash of the compiler ends every task in flight: try those one at a time.
            for task, spec in tasks[: jobs + 1]:
                row = _measured([task], 1)[0]
                crashed = Row(spec.name, task[1], "triton", error="the compiler crashed")
                rows.append(row or crashed)
            tasks = tasks[jobs + 1 :]
    return sorted(rows, key=lambda row: (row.kernel, archs.index(row.arch)))


# --------------------------------------------------------------------------- nvcc


def native_extension() -> Path | None:
    """The built extension, when there is one."""
    spec = importlib.util.find_spec("pkt_fast._native")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _by_function(dump: str) -> dict[tuple[str, str], str]:
    """cuobjdump output cut into one text per (architecture, function)."""
    parts: dict[tuple[str, str], str] = {}
    arch = name = ""
    for line in dump.splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            arch, name = found[1], ""
        elif found := re.match(r"\s*Function\s*:?\s*([^\s:]+)", line):
            name = found[1]
            parts[arch, name] = ""
        elif arch and name:
            parts[arch, name] += line + "\n"
    return parts


def _demangled(names: Sequence[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |\(anonymous namespace\)::|\(.*", "", n) for n in text.splitlines()]


def cuda_work(name: str) -> dict[str, Any]:
    """Bytes and operations of a CUDA kernel at a realistic shape; empty for an unknown one.

    Inject: eight layers' down projections of Llama-2 7B in bfloat16, at rank 16 with float32
    factors, the old weights kept.  Capture: 4,096 of 8,192 rows of 4,096 channels, normalised, to
    the host.
    """
    if name.endswith("inject_kernel"):
        matrices, rows, columns, rank = 8, 4096, 11008, 16
        return {
            "bytes": matrices * (3 * 2 * rows * columns + 4 * rank * (rows + columns)),
            "flops": matrices * 2 * rank * rows * columns,
            "compute": "fp32",
        }
    if found := re.search(r"capture_kernel<(\w+), (\w+)>", name):
        rows, width = 4096, 4096
        read, written = (4 if kind == "float" else 2 for kind in found.groups())
        return {
            "bytes": read * rows * width,
            "bus_bytes": written * rows * width,
            "flops": 6 * rows * width,
            "compute": "fp64",
        }
    return {}


def nvcc_rows(extension: Path, archs: Sequence[str]) -> list[Row]:
    """One row per CUDA kernel in the extension; empty when it was built without nvcc.

    All of them move bytes, from weights or activations to weights or across the bus to the host.
    """
    if b".nv_fatbin" not in extension.read_bytes():
        return []
    usage = _by_function(_cuobjdump("-res-usage", extension))
    sass = _by_function(_cuobjdump("-sass", extension))
    keys = sorted(
        (key for key in usage if key[0] in archs), key=lambda key: (key[1], archs.index(key[0]))
    )
    rows = [
        Row(
            name, key[0], "nvcc", kind="bytes", bulk_store=True, **cuda_work(name),
            **read_usage(usage[key]), **read_sass(sass[key]),
        )
        for key, name in zip(keys, _demangled([mangled for _, mangled in keys]), strict=True)
    ]
    return [roofline(row) if row.bytes else row for row in rows]


# --------------------------------------------------------------------------- report


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    header = (
        "kernel", "tile", "arch", "by", "regs", "spill B", "smem KiB", "matrix", "load B",
        "store B", "MB", "GFLOP", "model us", "bound by",
    )  # fmt: skip
    lines = [header] + [
        (
            row.kernel, row.tile or "-", row.arch, row.compiler, str(row.registers),
            str(row.spilled_bytes), f"{row.shared_bytes / 1024:.1f}",
            f"{row.matrix_count} {row.matrix}" if row.matrix else "-",
            str(row.widest_load), str(row.widest_store),
            f"{(row.bytes + row.bus_bytes) / 1e6:.1f}" if row.bytes else "-",
            f"{row.flops / 1e9:.2f}" if row.flops else "-",
            f"{row.model_us:.1f}" if row.model_us else "-",
            row.bound_by or "-",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def peak_table(archs: Sequence[str]) -> str:
    """The data-sheet values behind the model times."""
    return "\n".join(
        f"{arch}: {p.part}, {p.bandwidth} TB/s, {1e3 * p.bus:g} GB/s to the host; dense TFLOP/s: "
        f"fp16/bf16 {p.half:g}, tf32 {p.tf32:g} (tf32x3 a third), fp32 {p.fp32:g}, fp64 {p.fp64:g}"
        for arch in archs
        if (p := PEAKS.get(arch))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel without a GPU and check it")
    parser.add_argument("--arch", default=DEFAULT_ARCHS, help="comma-separated architectures")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--modules", default="", help="comma-separated kernel modules (all)")
    parser.add_argument(
        "--all-configs", action="store_true", help="every tile the tuner may take, not the first"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    archs = options.arch.split(",")
    try:
        for arch in archs:
            Target.named(arch)
    except ValueError as error:
        parser.error(str(error))

    rows = triton_rows(
        options.modules.split(",") if options.modules else kernel_modules(), archs, options.jobs,
        every_tile=options.all_configs,
    )  # fmt: skip
    extension = native_extension()
    if extension is not None and not options.modules:
        rows += nvcc_rows(extension, archs)

    print(table(rows))
    print(
        f"\nmodel us: the largest of bytes/bandwidth, bytes to the host/bus and operations/peak at "
        f"data-sheet values, not a measurement\n{peak_table(archs)}"
    )
    faults = [
        f"{row.kernel}{f' ({row.tile})' if row.tile else ''} on {row.arch} {fault}"
        for row in rows
        for fault in row.faults()
    ]
    for fault in faults:
        print(f"FAIL: {fault}")
    if options.json:
        report = {
            "triton": triton.__version__,
            "peaks": {arch: asdict(PEAKS[arch]) for arch in archs if arch in PEAKS},
            "kernels": [asdict(row) for row in rows],
            "faults": faults,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
