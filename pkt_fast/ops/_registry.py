"""Which implementation of an op runs where.

Every op of :mod:`pkt_fast.ops` has one schema (``torch.library``, namespace ``pkt_fast``) and up to
four implementations with the same signature:

``reference``  plain PyTorch, built from :mod:`pkt_fast.reference`; any device, any dtype
``native``     CPU: the C++ extension, or a composition around a single library GEMM
``triton``     GPU: a kernel of :mod:`pkt_fast.kernels` (CPU tensors under ``TRITON_INTERPRET=1``)
``cuda``       NVIDIA GPU: the CUDA part of the extension, for what Triton says badly

``auto`` takes native for CPU tensors, cuda and then Triton for GPU tensors, and the reference where
none of them can.  For GPU tensors the preference "native" means cuda.  A fallback to the reference
is logged once per op.  An extension that was built from other sources than those beside the package
(after a ``git pull``, say) is never called: where it is wanted, an error says how to rebuild it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._sources import digest
from ..errors import BackendError

BACKENDS = ("auto", "reference", "native", "triton")
ENVIRONMENT_VARIABLE = "PKT_FAST_BACKEND"

logger = logging.getLogger("pkt_fast")

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


Calls = Counter[tuple[str, str]]
"""How often an implementation of an op ran: (op, implementation) -> calls."""


@dataclass
class _Op:
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    supports: dict[str, Callable[..., bool]] = field(default_factory=dict)


_ops: dict[str, _Op] = {}
_reported: set[tuple[str, str]] = set()
_counters: list[Calls] = []


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendError(
            f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}"
        )
    return name


_preference = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


class BackendSetting(str):
    """The name of the backend in force; as a context manager it restores the previous one."""

    previous: str

    def __new__(cls, name: str, previous: str) -> BackendSetting:
        setting = super().__new__(cls, name)
        setting.previous = previous
        return setting

    def __enter__(self) -> BackendSetting:
        return self

    def __exit__(self, *exc: object) -> None:
        global _preference
        _preference = self.previous


def backend(name: str | None = None) -> BackendSetting:
    """Return the backend preference, after setting it to ``name`` when one is given.

    ``name`` is "auto", "reference", "native" or "triton".  Used in a ``with`` statement, the
    previous preference comes back at its end.  The environment variable ``PKT_FAST_BACKEND`` sets
    the initial preference.  Raises :class:`~pkt_fast.errors.BackendError` for any other name, and
    for "native" when the extension is out of date.
    """
    global _preference
    previous = _preference
    if name is not None:
        _checked(name, "backend()")
        if name == "native":
            _refuse_stale()
        _preference = name
    return BackendSetting(_preference, previous)


def implementation(
    op: str, name: str, *, supports: Callable[..., bool] | None = None
) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as implementation ``name`` of ``op``.

    ``supports``, called with the op's own arguments, says whether this implementation can take them
    (an unsupported dtype, say); under ``auto`` the next one is tried.
    """

    def register(function: Implementation) -> Implementation:
        entry = _ops.setdefault(op, _Op())
        entry.implementations[name] = function
        if supports is not None:
            entry.supports[name] = supports
        return function

    return register


def triton_implementation(
    op: str, module: str, *, supports: Callable[..., bool] | None = None
) -> None:
    """Register ``pkt_fast.kernels.<module>.<op>`` as the Triton implementation of ``op``.

    The kernel module is imported at its first launch, so that importing pkt_fast stays cheap and
    works without Triton.
    """
    if not triton_available():
        return

    def launch(*args: Any) -> Any:
        kernels = importlib.import_module(f"pkt_fast.kernels.{module}")
        return getattr(kernels, op)(*args)

    implementation(op, "triton", supports=supports)(launch)


@functools.cache
def _built_module() -> Any | None:
    """The compiled extension, whatever it was built from; None when it was not built."""
    try:
        from .. import _native
    except ImportError:
        return None
    return _native


@functools.cache
def stale_extension() -> str | None:
    """One line on an extension built from other sources than those here; None when it fits.

    Only a source tree has sources to compare with: a wheel holds what was built together.
    """
    root = Path(__file__).resolve().parents[2]
    built = _built_module()
    if built is None or not ((root / "csrc").is_dir() and (root / "setup.py").is_file()):
        return None
    if built.build_info().get("sources") == digest(root / "csrc"):
        return None
    return (
        f"{built.__file__} was not built from the sources in {root / 'csrc'} as they are now; "
        f"rebuild it: pip install -e {root}"
    )


def native_module() -> Any | None:
    """The compiled extension; None when it was not built or is out of date (``pkt-fast info``)."""
    return None if stale_extension() else _built_module()


@functools.cache
def cuda_problem(device: torch.device) -> str | None:
    """Why the extension's CUDA kernels cannot run on a GPU; None when they can.

    The driver may be older than the CUDA runtime that nvcc linked, or the GPU older than the
    architectures that it compiled for.  Triton's kernels run in either case.
    """
    ask = getattr(native_module(), "cuda_problem", None)
    if ask is None:
        return "no CUDA kernels were built"
    with torch.cuda.device(device):
        problem: str | None = ask()
    if problem is not None:
        logger.warning("the extension's CUDA kernels do not run on %s: %s", device, problem)
    return problem


def refuse_stale() -> None:
    """Raise BackendError where the preference in force would use an extension out of date.

    A silent fallback would be right but many times slower.
    """
    if _preference in ("auto", "native"):
        _refuse_stale()


def _refuse_stale() -> None:
    if (reason := stale_extension()) is not None:
        raise BackendError(f"{reason} (or use backend('reference'))")


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _candidates(device: torch.device) -> tuple[str, ...]:
    """What the preference in force allows on ``device``, best first."""
    if _preference == "auto":
        return ("native",) if device.type == "cpu" else ("cuda", "triton")
    if _preference == "native" and device.type != "cpu":
        return ("cuda",)
    return (_preference,)


def _serves(entry: _Op, name: str, device: torch.device) -> bool:
    """Whether the op has implementation ``name`` on ``device``, for some arguments at least."""
    if name not in entry.implementations:
        return False
    if name == "triton" and device.type == "cpu" and not triton_interpreted():
        return False
    return name not in ("native", "cuda") or (name == "native") == (device.type == "cpu")


def _usable(entry: _Op, name: str, device: torch.device, args: tuple[Any, ...]) -> bool:
    supports = entry.supports.get(name)
    return _serves(entry, name, device) and (supports is None or supports(*args))


def select(op: str, device: torch.device, args: tuple[Any, ...] = ()) -> str:
    """The name of the implementation that serves ``op`` for ``args`` on ``device``."""
    refuse_stale()
    entry = _ops[op]
    candidates = _candidates(device)
    for name in candidates:
        if _usable(entry, name, device, args):
            return name
    if _preference not in ("auto", "reference"):
        have = ", ".join(sorted(entry.implementations))
        raise BackendError(
            f"backend {_preference!r} cannot run {op} on {device} with these arguments "
            f"(implementations: {have}); use backend('auto')"
        )
    if (op, device.type) not in _reported:
        _reported.add((op, device.type))
        logger.info("%s on %s: no %s implementation for this input, using reference",
                    op, device.type, " or ".join(candidates))
    return "reference"


def dispatch(op: str, like: Tensor, *args: Any) -> Any:
    """Run ``op`` on ``args`` with the implementation chosen for the device of ``like``."""
    name = select(op, like.device, args)
    for calls in _counters:
        calls[op, name] += 1
    return _ops[op].implementations[name](*args)


@contextlib.contextmanager
def counted_calls() -> Iterator[Calls]:
    """Count which implementations run inside, in every thread of the process."""
    calls: Calls = Counter()
    _counters.append(calls)
    try:
        yield calls
    finally:
        _counters[:] = [counter for counter in _counters if counter is not calls]


def served_by() -> dict[str, dict[str, str]]:
    """For every op, the implementation that the preference in force takes on "cpu" and on "cuda".

    "none" where it has none, so that a call would be refused; some arguments fall back.
    """
    return {
        op: {kind: _first_choice(entry, torch.device(kind)) for kind in ("cpu", "cuda")}
        for op, entry in sorted(_ops.items())
    }


def _first_choice(entry: _Op, device: torch.device) -> str:
    idle = torch.cuda.is_available() and cuda_problem(torch.device("cuda")) is not None
    for name in _candidates(device):
        if _serves(entry, name, device) and not (name == "cuda" and idle):
            return name
    return "reference" if _preference in ("auto", "reference") else "none"
