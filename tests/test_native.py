"""The compiled extension: what it says of itself, and one result on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

native = pytest.importorskip("pkt_fast._native")

# Runs the ops of the extension on fixed inputs and saves what they give.
PROGRAM = """
import sys
import torch
from op_cases import DTYPES, capture, injection, pair, poison
from pkt_fast import _native, ops
from pkt_fast.ops._native import accumulator
from pkt_fast.ops.row_cosine import row_cosine_gradient

torch.set_num_threads(1)
results = {"isa": _native.build_info()["isa"]}
with ops.backend("native"):
    for dtype in DTYPES:
        for operands in (1, 4):
            case = capture(dtype, 257, operands, True)
            outs = DTYPES[:3] if dtype != torch.float64 else DTYPES[3:]
            for out_dtype in outs:
                out = poison(7, 257, dtype=out_dtype)
                ops.capture_rows(out, 0, *case.arguments())
                results[f"capture {dtype} {out_dtype} {operands}"] = out
        x, y = pair(dtype, dtype, 6, 257)
        names = ("cosine", "dx", "dy")
        weight = torch.linspace(-2, 1, 6, dtype=accumulator(x, y))
        results |= {f"{n} {dtype}": t
                    for n, t in zip(names, row_cosine_gradient(x, y, weight, True, True))}
        x, y = x[3:], y[:3]
        results |= {f"g·a {n} {dtype}": t
                    for n, t in enumerate(ops.grad_x_act(x[None], y[None]))}
        for seed in (None, 5):
            case = injection(dtype, torch.float32)
            results[f"unchanged {dtype} {seed}"] = ops.inject_(
                case.weights, *case.factors(), [], seed)
            results |= {f"inject {dtype} {seed} {g}": w for g, w in enumerate(case.weights)}
torch.save(results, sys.argv[1])
"""


def run(program, *arguments, **environment):
    env = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__),
                                                      env.get("PYTHONPATH", "")]))  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_build_info():
    info = native.build_info()
    assert info["isa"] in info["isas"].split(",")
    assert "baseline" in info["isas"].split(",")
    assert info["compiler"]
    assert isinstance(info["openmp"], bool)
    assert bool(info["cuda_archs"]) == bool(info["cuda_version"])


def test_cuda_part_has_every_architecture():
    """Where nvcc built it, it holds code for sm_80, sm_90 and sm_100, and imports without a GPU."""
    archs = native.build_info()["cuda_archs"]
    if not archs:
        pytest.skip("built without nvcc")
    assert {"sm_80", "sm_90", "sm_100", "compute_100"} <= set(archs.split(","))
    assert callable(native.inject_cuda)
    assert callable(native.capture_rows_pinned)


def test_best_instruction_set_is_used():
    info = native.build_info()
    wanted = os.environ.get("PKT_FAST_ISA")
    available = [isa for isa in info["isas"].split(",") if native.isa_available(isa)]
    assert info["isa"] == (wanted or available[0])
    assert not native.isa_available("sse9")


def test_unknown_instruction_set_is_refused():
    done = run("import pkt_fast._native", PKT_FAST_ISA="sse9")
    assert done.returncode != 0
    assert "PKT_FAST_ISA=sse9" in done.stderr


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory):
    """Results of the program on every instruction set of this machine."""
    import torch

    folder = tmp_path_factory.mktemp("isa")
    results = {}
    for isa in native.build_info()["isas"].split(","):
        if not native.isa_available(isa):
            continue
        done = run(PROGRAM, str(folder / isa), PKT_FAST_ISA=isa)
        assert done.returncode == 0, done.stderr
        results[isa] = torch.load(folder / isa)
        assert results[isa].pop("isa") == isa
    return results


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_instruction_sets_agree(by_isa, isa):
    """The same up to the order of sums, and one rounding where they straddle a tie."""
    import torch

    if isa not in by_isa:
        pytest.skip(f"this machine or build has no {isa}")
    for name, expected in by_isa["baseline"].items():
        got = by_isa[isa][name]
        assert got.dtype == expected.dtype
        if not got.is_floating_point():
            # Counts of unchanged elements: a rounding may differ here and there.
            assert (got - expected).abs().max() <= 20, name
            continue
        assert bool(got.isfinite().all()), name
        difference = (got.double() - expected.double()).abs()
        eps = torch.finfo(got.dtype).eps
        smallest = torch.finfo(got.dtype).smallest_normal * eps
        floor = eps if got.dtype == torch.float64 else 1e-6
        bound = 1.01 * eps * expected.double().abs() + smallest
        bound = bound + floor * expected.double().abs().amax(-1, keepdim=True)
        assert bool((difference <= 4 * bound).all()), name
        # Nearly every element is the same bit for bit once rounded to 16 bits.
        if got.dtype.itemsize == 2:
            assert (got != expected).double().mean() < 0.02, name
