"""The compiled extension: what it says of itself, and its kernels on every instruction set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pkt_fast._sources import digest

native = pytest.importorskip("pkt_fast._native")

ROOT = Path(native.__file__).parent.parent
in_source_tree = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="needs the source tree"
)

# Runs the ops of the extension on fixed inputs and saves what they give.
# fmt: off
TESTS = [os.path.join(os.path.dirname(__file__), name)
         for name in ("test_ops_memory.py", "test_gemm.py", "test_ops_big.py::test_relation")]
# fmt: on
ARITHMETIC = (
    "not reference and not opcheck and not compile and not gradcheck and not refuses "
    "and not caches and not average"
)


def run(program, *arguments, cwd=None, **environment):
    env = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__),
                                                      env.get("PYTHONPATH", "")]))  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, cwd=cwd, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_build_info():
    info = native.build_info()
    assert info["isa"] in info["isas"].split(",")
    assert "baseline" in info["isas"].split(",")
    assert info["compiler"]
    assert isinstance(info["openmp"], bool)
    assert bool(info["cuda_archs"]) == bool(info["cuda_version"])


def test_cuda_part_has_every_architecture():
    """Where nvcc built it, it holds code for all of them that this nvcc knows, and imports without
    a GPU."""
    info = native.build_info()
    if not info["cuda_archs"]:
        pytest.skip("built without nvcc")
    version = tuple(map(int, info["cuda_version"].split(".")))
    known = ["80", "90", "100"] if version >= (12, 8) else ["80", "90"]
    built = info["cuda_archs"].split(",")
    assert built == [*(f"sm_{arch}" for arch in known), f"compute_{known[-1]}"]
    assert callable(native.inject_cuda)
    assert callable(native.capture_rows_pinned)


def test_cuda_functions_say_when_there_is_no_gpu():
    """They take what the ops hand to their CPU twins, and fail in CUDA's own words."""
    import torch

    if not native.build_info()["cuda_archs"] or native.cuda_problem() is None:
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
        native.inject_cuda([matrix], index.data_ptr(), None, row.data_ptr(), 0)
    assert native.inject_table_bytes(3) == 3 * native.inject_table_bytes(1) > 0
    assert "CUDA" in native.cuda_problem()


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


# --------------------------------------------------------------------------- built from what


def test_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "cpu").mkdir()
    source = tmp_path / "cpu" / "a.cpp"
    source.write_text("int a;")
    first = digest(tmp_path)
    assert re.fullmatch("[0-9a-f]{16}", first)
    (tmp_path / "notes.txt").write_text("not compiled")
    assert digest(tmp_path) == first
    source.write_text("int b;")
    second = digest(tmp_path)
    source.rename(tmp_path / "cpu" / "b.cpp")
    assert len({first, second, digest(tmp_path)}) == 3
    assert digest(tmp_path / "absent") != first


@in_source_tree
def test_extension_was_built_from_the_sources_here():
    assert native.build_info()["sources"] == digest(ROOT / "csrc")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory):
    """A source tree whose csrc/ changed after its extension was built."""
    tree = tmp_path_factory.mktemp("pulled")
    ignored = shutil.ignore_patterns("__pycache__", "demo")
    for name in ("pkt_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", tree)
    with (tree / "csrc" / "kernels.h").open("a") as header:
        header.write("// changed\n")
    return tree


# What every use of the extension gives, or the one line it is refused with.
USES = """
import json, torch, pkt_fast
from pkt_fast import commands, ops
from pkt_fast.ops import _gemm

def inject():
    x = torch.ones(2, 2)
    ops.inject_([x], [torch.ones(1, 2)], [torch.ones(2, 1)], [1.0], [False])
    return x.sum().item()

def inject_by(name):
    with pkt_fast.backend(name):
        return inject()

def said(use, *arguments):
    try:
        return use(*arguments)
    except pkt_fast.errors.BackendError as error:
        return str(error)

x = torch.ones(64, 64)
print(json.dumps({
    "inject": said(inject),
    "backend": said(pkt_fast.backend, "native"),
    "products": said(_gemm.serves, x, x),
    "choice": said(_gemm.choice),
    "reference": said(inject_by, "reference"),
    "info": commands._build()["native extension"],
    "why": said(lambda: commands._served("inject_", ops.served_by()["inject_"])["cpu_why"]),
}, default=str))
"""


def uses(tree, **environment):
    done = run(USES, cwd=tree, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@in_source_tree
@pytest.mark.parametrize("preference", ["auto", "native"])
def test_stale_extension_is_refused_in_one_line(pulled, preference):
    given = uses(pulled, PKT_FAST_BACKEND=preference, PKT_FAST_GEMM="auto")
    for use in ("inject", "backend", "products"):
        assert str(pulled / "pkt_fast" / Path(native.__file__).name) in given[use]
        assert f"pip install -e {pulled}" in given[use]
        assert "\n" not in given[use]
    assert given["reference"] == 8.0
    assert f"pip install -e {pulled}" in given["info"]
    assert given["why"] == "extension out of date"


@in_source_tree
def test_stale_extension_does_not_concern_the_reference(pulled):
    given = uses(pulled, PKT_FAST_BACKEND="reference", PKT_FAST_GEMM="own")
    assert given["inject"] == 8.0
    assert "PKT_FAST_GEMM=own" in given["choice"]
    assert f"pip install -e {pulled}" in given["choice"]


@in_source_tree
def test_without_sources_beside_it_there_is_nothing_to_compare(pulled, tmp_path):
    """As in a wheel, whose parts were built together."""
    shutil.copytree(pulled / "pkt_fast", tmp_path / "pkt_fast")
    shutil.copytree(pulled / "kernels", tmp_path / "pkt_fast" / "kernels")
    given = uses(tmp_path, PKT_FAST_BACKEND="native", PKT_FAST_GEMM="library")
    assert given["inject"] == 8.0
    assert given["info"] == "built"
    assert given["why"] == "C++ kernel"


# --------------------------------------------------------------------------- instruction sets


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
