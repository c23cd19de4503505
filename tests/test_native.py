"""The compiled extension: what it says of itself, and its kernels on every instruction set."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

native = pytest.importorskip("pkt_fast._native")

# Runs the ops of the extension on fixed inputs and saves what they give.
TESTS = [os.path.join(os.path.dirname(__file__), name)
         for name in ("test_ops_memory.py", "test_gemm.py")]  # fmt: skip
ARITHMETIC = (
    "not reference and not opcheck and not compile and not gradcheck and not refuses "
    "and not caches and not average"
)


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


def test_cuda_functions_say_when_there_is_no_gpu():
    """They take what the ops hand to their CPU twins, and fail in CUDA's own words."""
    import torch

    if not native.build_info()["cuda_archs"] or torch.cuda.is_available():
        pytest.skip("built without nvcc, or a GPU is here")
    row, absent = torch.zeros(1, 16), (0, 0, 0)
    index = torch.zeros(1, dtype=torch.int64)
    operands = (0, 1, 16, (row.data_ptr(), 16, 16), absent, absent, absent)
    with pytest.raises(RuntimeError, match="CUDA"):
        native.capture_rows_pinned(
            (row.data_ptr(), 0, 16), (index.data_ptr(), 1), operands, (0.0, 1.0, False), 1, 0
        )
    factor = (row.data_ptr(), 0, 1, 1)
    matrix = ((row.data_ptr(), 0, 4, 4, 4), factor, factor, 1, (0, 0), 1.0)
    with pytest.raises(RuntimeError, match="CUDA"):
        native.inject_cuda([matrix], index.data_ptr(), None, 0)


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


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_kernels_of_lesser_processors(isa):
    """What the op tests ask of the best instruction set holds on the others too."""
    if not native.isa_available(isa) or native.build_info()["isa"] == isa:
        pytest.skip(f"no other {isa} kernels in this build or on this machine")
    pytest_of = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = run(pytest_of, "-q", *TESTS, "-k", ARITHMETIC, "-p", "no:xdist", PKT_FAST_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 200
