"""Builds the native extension pkt_fast._native: pybind11 headers and ninja, no torch.

CPU kernels are compiled once per instruction set and chosen at run time.  csrc/cuda is compiled
when nvcc is found (PKT_FAST_CUDA=0 leaves it out, PKT_FAST_CUDA=1 makes its absence an error).  On
a machine without a C++ compiler the package installs without the extension and uses its reference
implementations; ``pkt-fast info`` says so.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES: str = runpy.run_path(str(ROOT / "pkt_fast" / "_sources.py"))["digest"](CSRC)
CUDA_ARCHS = ("80", "90", "100")
X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


class CompilerMissing(RuntimeError):
    """No C++ toolchain: the package is installed without its extension."""


def say(message: str) -> None:
    print(f"pkt_fast build: {message}", file=sys.stderr, flush=True)


def compiles(
    command: list[str], source: str = "int main() { return 0; }", suffix: str = ".cpp"
) -> bool:
    """Whether ``command`` (a compiler with its flags) turns ``source`` into an object file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source)
        done = subprocess.run(
            [*command, "-c", str(path), "-o", str(path.with_suffix(".o"))], capture_output=True
        )
        return done.returncode == 0


def host_compiler() -> list[str]:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompilerMissing("no C++ compiler found (set CXX, or install g++ or clang++)")


def ninja_command() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except (ImportError, AttributeError):
        found = shutil.which("ninja")
        if found is None:
            raise CompilerMissing("ninja not found (pip install ninja)") from None
        return found


class Cuda:
    """What nvcc offers: its command, the architectures it knows, where its libraries are.

    ``compiler`` is the host compiler's command; nvcc calls its program, without a launcher before
    it (ccache) or flags behind it.
    """

    def __init__(self, nvcc: str, compiler: list[str]) -> None:
        self.nvcc = nvcc
        program = [part for part in compiler if not part.startswith("-")][-1]
        self.command = [nvcc, "-ccbin", program]
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        known = set(re.findall(r"sm_(\d+)", listed.stdout))
        self.archs = [arch for arch in CUDA_ARCHS if arch in known]
        if not self.archs:
            raise RuntimeError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHS)}")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        self.version = (re.search(r"release ([\d.]+)", version) or ["", "unknown"])[1]

    @property
    def flags(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        newest = self.archs[-1]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes]

    def link_flags(self) -> list[str]:
        """The static CUDA runtime, so that the module loads on machines without a GPU."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.touch()
            dry = subprocess.run(
                [self.nvcc, "-dryrun", "-c", str(source), "-o", f"{source}.o"],
                capture_output=True, text=True,
            ).stderr
        folders = re.findall(r'-L([^"\s]+)', dry)
        return [*(f"-L{path}" for path in folders), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


def find_cuda(compiler: list[str]) -> Cuda | None:
    """Nvcc from CUDA_HOME, PATH or /usr/local/cuda, when it works with ``compiler`` and
    PKT_FAST_CUDA does not forbid it.
    """
    wish = os.environ.get("PKT_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise RuntimeError(f"PKT_FAST_CUDA={wish!r}: expected 0 or 1")
    if wish == "0":
        say("CUDA kernels left out (PKT_FAST_CUDA=0)")
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [home, "/usr/local/cuda"] if home else ["/usr/local/cuda"]
    candidates = [str(Path(folder) / "bin" / "nvcc") for folder in homes]
    candidates.insert(len(homes) - 1, "nvcc")
    nvcc = next((path for path in candidates if shutil.which(path)), None)
    reason = "nvcc not found in CUDA_HOME, on PATH or in /usr/local/cuda"
    if nvcc is not None:
        try:
            cuda = Cuda(nvcc, compiler)
            probe = "__global__ void probe() {} int main() { probe<<<1, 1>>>(); return 0; }"
            if compiles([*cuda.command, *cuda.flags], probe, ".cu"):
                return cuda
            reason = f"{nvcc} cannot compile a kernel with {' '.join(compiler)}"
        except (OSError, RuntimeError) as error:
            reason = str(error)
    if wish == "1":
        raise RuntimeError(f"PKT_FAST_CUDA=1, but {reason}")
    say(f"CPU kernels only: {reason}")
    return None


def quoted(parts: list[str]) -> str:
    """A command line for a ninja file."""
    return " ".join(shlex.quote(part) for part in parts).replace("$", "$$")


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The build graph: one object per source and instruction set, one shared library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.objects: list[Path] = []

    def rule(self, name: str, command: list[str], *, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {quoted(command)} $flags -o $out $in $libs"]
        if depfile:
            self.lines[-1] = f"  command = {quoted(command)} $flags -MD -MF $out.d -c $in -o $out"
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines += [f"  description = {name} $out", ""]

    def compile(self, rule: str, source: Path, flags: list[str], tag: str = "") -> None:
        name = "-".join(filter(None, [source.stem, tag])) + f"{source.suffix}.o"
        self.objects.append(Path(name))
        self.lines += [f"build {name}: {rule} {escaped(source)}", f"  flags = {quoted(flags)}", ""]

    def link(self, target: Path, flags: list[str], libraries: list[str]) -> None:
        inputs = " ".join(map(str, self.objects))
        self.lines += [
            f"build {escaped(target)}: link {inputs}",
            f"  flags = {quoted(flags)}",
            f"  libs = {quoted(libraries)}",
            "",
        ]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        subprocess.run([ninja_command(), "-C", str(self.folder)], check=True)


class NativeBuild(build_ext):
    """Compiles csrc/ with ninja; objects stay in build/native, so a rebuild is incremental."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            super().build_extension(ext)
            return
        try:
            built = self.build_native(target.name)
        except (OSError, CompilerMissing, subprocess.CalledProcessError) as error:
            say(f"no native extension: {error}")
            raise CompileError(str(error)) from error  # a warning: the extension is optional
        shutil.copyfile(built, target)
        say(f"built {target}")

    def build_native(self, filename: str) -> Path:
        import pybind11

        compiler = host_compiler()
        cuda = find_cuda(compiler)
        if not compiles(compiler):
            raise CompilerMissing(f"the C++ compiler {' '.join(compiler)} does not work")
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
        # GCC 12 warns about its own intrinsics headers, and about vectors never passed by call.
        common += ["-Wno-uninitialized", "-Wno-psabi"]
        openmp = ["-fopenmp"] if compiles([*compiler, "-fopenmp"], "#include <omp.h>\n") else []
        isas = self.instruction_sets(compiler)
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        archs = [f"sm_{arch}" for arch in cuda.archs] if cuda else []
        archs += [f"compute_{cuda.archs[-1]}"] if cuda else []
        facts = {
            "PKT_COMPILER": version.splitlines()[0],
            "PKT_ISAS": ",".join(isas),
            "PKT_CUDA_ARCHS": ",".join(archs),
            "PKT_CUDA_VERSION": cuda.version if cuda else "",
            "PKT_SOURCES": SOURCES,
        }
        say(
            f"compiler {facts['PKT_COMPILER']}; instruction sets {facts['PKT_ISAS']}; "
            f"OpenMP {'yes' if openmp else 'no'}; "
            + (f"CUDA {cuda.version} for {', '.join(archs)}" if cuda else "no CUDA")
        )

        platform_tag = f"{sys.platform}-{platform.machine()}-{sys.implementation.cache_tag}"
        graph = NinjaFile(ROOT / "build" / "native" / platform_tag)
        graph.rule("cxx", [*compiler, *common, *openmp, f"-I{CSRC}"])
        for isa, flags in isas.items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                if source.stem != "dispatch":
                    defines = [f"-DPKT_ISA={isa}", f"-DPKT_ISA_{isa}"]
                    graph.compile("cxx", source, [*flags, *defines], isa)
        have = [f"-DPKT_HAVE_{isa}" for isa in isas]
        graph.compile("cxx", CSRC / "cpu" / "dispatch.cpp", have)
        defines = [f'-D{name}="{value}"' for name, value in facts.items()]
        if cuda:
            defines.append("-DPKT_HAVE_CUDA")
            graph.rule("nvcc", [*cuda.command, *cuda.flags, f"-I{CSRC}"])
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                graph.compile("nvcc", source, [])
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        graph.compile("cxx", CSRC / "bindings.cpp", [*includes, *defines])
        bundle = ["-shared"]
        if sys.platform == "darwin":
            bundle = ["-bundle", "-undefined", "dynamic_lookup"]
        graph.rule("link", [*compiler], depfile=False)
        graph.link(Path(filename), [*bundle, *openmp], cuda.link_flags() if cuda else [])
        graph.run()
        return graph.folder / filename

    @staticmethod
    def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
        """Name -> flags, best first; "baseline" is whatever the compiler targets by itself."""
        wanted = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {}
        isas = {isa: flags for isa, flags in wanted.items() if compiles([*compiler, *flags])}
        return {**isas, "baseline": []}


def windows_extension_arguments() -> dict[str, list[object]]:
    """On Windows setuptools compiles the sources itself: baseline code, no CUDA."""
    if sys.platform != "win32":
        return {"sources": []}
    import pybind11

    sources = [*(CSRC / "cpu").glob("*.cpp"), CSRC / "bindings.cpp"]
    facts = {"PKT_COMPILER": "MSVC", "PKT_ISAS": "baseline"}
    facts |= {"PKT_CUDA_ARCHS": "", "PKT_CUDA_VERSION": "", "PKT_SOURCES": SOURCES}
    return {
        "sources": [str(path.relative_to(ROOT)) for path in sources],
        "include_dirs": [str(CSRC), pybind11.get_include()],
        "define_macros": [
            ("PKT_ISA", "baseline"), ("PKT_ISA_baseline", None), ("PKT_HAVE_baseline", None),
            *((name, f'"{value}"') for name, value in facts.items()),
        ],
        "extra_compile_args": ["/std:c++17", "/O2", "/openmp"],
    }


setup(
    packages=[*find_packages(include=["pkt_fast", "pkt_fast.*"]), "pkt_fast.kernels"],
    package_dir={"pkt_fast": "pkt_fast", "pkt_fast.kernels": "kernels"},
    ext_modules=[Extension("pkt_fast._native", optional=True, **windows_extension_arguments())],
    cmdclass={"build_ext": NativeBuild},
)
