"""The package as built and installed, and the name ``kernels``, which belongs to another one."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_TREE = (ROOT / "setup.py").exists() and (ROOT / "kernels").is_dir()

pytestmark = pytest.mark.skipif(not SOURCE_TREE, reason="needs the source tree")


def python(*arguments, cwd, path=(), **environment):
    """Run Python in ``cwd`` with ``path`` ahead on sys.path; returns what it printed."""
    env = os.environ | environment
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def importable_elsewhere(name):
    """Whether ``name`` can be imported outside the source tree (the real package is installed)."""
    program = f"import importlib.util as u, sys; sys.path.remove(''); print(u.find_spec({name!r}))"
    return python("-c", program, cwd=ROOT / "docs").strip() != "None"


@pytest.fixture
def stub(tmp_path):
    """A folder with a distribution ``kernels`` 9.9.9, as pip would install it."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9.9.9'\nMARK = 'the other one'\n")
    info = tmp_path / "site" / "kernels-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9.9\n")
    return package.parent


# --------------------------------------------------------------------------- the name "kernels"


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_our_kernels_have_one_importable_name():
    program = (
        "import pkt_fast.kernels, importlib, sys, pathlib;"
        "folder = pathlib.Path(pkt_fast.kernels.__path__[0]);"
        "print(len(pkt_fast.kernels.__path__), (folder / 'capture_rows.py').exists(),"
        " 'kernels' in sys.modules)"
    )
    for cwd in (ROOT, ROOT / "docs"):
        assert python("-c", program, cwd=cwd, path=[ROOT]).split() == ["1", "True", "False"]


@pytest.mark.skipif(importable_elsewhere("kernels"), reason="the real package is installed")
def test_transformers_is_not_fooled_in_the_source_tree():
    """Run from the repository root, where a folder ``kernels`` lies on sys.path."""
    program = (
        "from transformers.utils.import_utils import is_kernels_available;"
        "import pkt_fast.kernels; print(is_kernels_available())"
    )
    assert python("-c", program, cwd=ROOT).strip() == "False"


def test_the_other_kernels_is_found_beside_ours(stub):
    program = (
        "import pkt_fast.kernels, kernels;"
        "from transformers.utils import import_utils;"
        "print(kernels.MARK);"
        "print(import_utils._is_package_available('kernels', return_version=True)[1]);"
        "print(hasattr(pkt_fast.kernels, 'MARK'), pkt_fast.kernels.__path__ == kernels.__path__)"
    )
    for cwd in (ROOT, ROOT / "docs"):
        lines = python("-c", program, cwd=cwd, path=[stub, ROOT]).splitlines()
        assert lines == ["the other one", "9.9.9", "False False"]
        # Also when the source tree comes first: a regular package wins over a plain folder.
        assert python("-c", program, cwd=cwd, path=[ROOT, stub]).splitlines() == lines


# --------------------------------------------------------------------------- distributions


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a clone would hold, so that building leaves no trace in the source tree."""
    for tool in ("setuptools", "pybind11", "ninja", "wheel"):
        pytest.importorskip(tool)
    copy = tmp_path_factory.mktemp("checkout") / "pkt_fast"
    ignored = shutil.ignore_patterns(
        "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*", "results"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "README.md").touch()
    return copy


def test_nvcc_is_probed_as_it_builds(tmp_path, monkeypatch):
    """With the host compiler that $CXX names, for the architectures that this nvcc knows."""
    calls = tmp_path / "calls"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$1" in\n'
        "--list-gpu-code) echo sm_80 sm_86 sm_90 ;;\n--version) echo release 12.4, V12.4 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("PKT_FAST_CUDA", raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    module = runpy.run_path(str(ROOT / "setup.py"))
    cuda = module["find_cuda"](["ccache", "g++-12", "-m64"])
    assert (cuda.version, cuda.archs) == ("12.4", ["80", "90"])
    assert cuda.command == [str(nvcc), "-ccbin", "g++-12"]
    probe = calls.read_text().splitlines()[-1]
    assert probe.startswith("-ccbin g++-12 ")
    assert "arch=compute_90,code=compute_90" in probe
    assert "100" not in probe


def build(checkout, kind):
    """Build an sdist or a wheel without isolation; returns the names in the archive."""
    program = (
        "import setuptools.build_meta as backend, sys;"
        "print(getattr(backend, 'build_' + sys.argv[1])('dist'))"
    )
    output = python("-c", program, kind, cwd=checkout, PKT_FAST_CUDA="0")
    archive = checkout / "dist" / output.splitlines()[-1]
    if kind == "sdist":
        with tarfile.open(archive) as tar:
            return archive, {name.split("/", 1)[-1] for name in tar.getnames()}
    with zipfile.ZipFile(archive) as wheel:
        return archive, set(wheel.namelist())


def tree(root, folder, pattern):
    """Files below ``root / folder``, relative to ``root``."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob(pattern)
        if "__pycache__" not in path.parts and path.is_file()
    }


def test_sdist_holds_everything_a_build_needs(checkout):
    _, names = build(checkout, "sdist")
    wanted = tree(checkout, "csrc", "*.*") | tree(checkout, "kernels", "*.py")
    wanted |= tree(checkout, "pkt_fast", "*.py") | tree(checkout, "pkt_fast/demo", "*")
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "pkt_fast/py.typed"}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_is_complete_and_works_on_its_own(checkout, tmp_path):
    """It holds kernels, demo data, marker and extension, and runs from a folder of its own."""
    archive, names = build(checkout, "wheel")
    kernels = {f"pkt_fast/{name}" for name in tree(checkout, "kernels", "*.py")}
    wanted = kernels | tree(checkout, "pkt_fast", "*.py") | tree(checkout, "pkt_fast/demo", "*")
    assert wanted | {"pkt_fast/py.typed"} <= names, sorted(wanted - names)
    assert [name for name in names if name.startswith("pkt_fast/_native.")]
    tops = {name.split("/")[0] for name in names}
    assert not [top for top in tops if not top.startswith("pkt_fast")], tops
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "import pkt_fast, pkt_fast._native, pkt_fast.kernels;"
        "from pkt_fast import ops; import torch;"
        "print(pkt_fast.__file__); print(*pkt_fast.kernels.__path__);"
        "out = torch.empty(1, 4);"
        "ops.capture_rows(out, 0, torch.tensor([1]), torch.ones(2, 4), normalize=True);"
        "print(out.sum().item())"
    )
    site = tmp_path / "site"
    # -S -I would hide torch: put the wheel first instead.
    module, folder, total = python("-c", program, cwd=tmp_path, path=[site]).splitlines()
    assert Path(module).parent == site / "pkt_fast"
    assert Path(folder) == site / "pkt_fast" / "kernels"
    assert float(total) == 2.0


# --------------------------------------------------------------------------- the CUDA part


@pytest.mark.parametrize(("demand", "status"), [("", 0), ("0", 0), ("1", 1)])
def test_a_build_without_nvcc_fails_the_check_where_cuda_is_demanded(demand, status, monkeypatch):
    native = pytest.importorskip("pkt_fast._native")
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": ""})
    monkeypatch.setenv("PKT_FAST_CUDA", demand)
    script = runpy.run_path(str(ROOT / "scripts" / "check_cuda_build.py"))
    assert script["main"]() == status
