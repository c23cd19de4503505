"""What happened: phase timings, speeds, memory, versions, and a transfer's whole report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TransferConfig
from .data.examples import ExampleSet
from .maps import Alignment, summarize
from .ops import served_by
from .ops._gemm import choice
from .ops._registry import Calls
from .pairing import LayerPair

PACKAGES = ("pkt-fast", "torch", "transformers", "peft", "triton", "safetensors", "numpy")


@dataclass
class Clock:
    """Seconds and tokens by phase.

    Attributes:
        device: a GPU to wait for at the end of a phase, so that its work is not counted in the
            next.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, name: str, tokens: int) -> None:
        """Add ``tokens`` to a phase."""
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def as_dict(self) -> dict[str, Any]:
        """Seconds by phase; tokens and tokens a second of phases that saw any."""
        return {
            name: {"seconds": round(seconds, 4)}
            | (
                {
                    "tokens": self.tokens[name],
                    "tokens_per_second": round(self.tokens[name] / seconds, 1),
                }
                if self.tokens.get(name) and seconds > 0
                else {}
            )
            for name, seconds in self.seconds.items()
        }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["torch"] = str(torch.__version__)  # names the build (+cpu, +cu130); metadata may not
    return found


def machine() -> dict[str, Any]:
    """The machine a measurement comes from."""
    described: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_products": matrix_products(),
    }
    if torch.cuda.is_available():
        described["gpus"] = [
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ]
    return described


def matrix_products() -> str:
    """Who multiplies float32 and float64 matrices on the CPU, and why."""
    made = choice()
    return f"{'own kernel' if made.own else 'library'}: {made.reason}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far: resident memory, and each GPU's allocator."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            peaks[f"cuda:{i}_bytes"] = torch.cuda.max_memory_allocated(i)
    return peaks


def op_backends(device: torch.device, calls: Calls) -> dict[str, str]:
    """The implementations of every op that ran, or would under the backend in force on ``device``
    where ``calls`` has none.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    ran = {op: ", ".join(names) for op, names in op_calls(calls).items()}
    return {op: ran.get(op, served[kind]) for op, served in served_by().items()}


def op_calls(calls: Calls) -> dict[str, dict[str, int]]:
    """How often every implementation ran, by op."""
    found: dict[str, dict[str, int]] = {}
    for (op, name), count in sorted(calls.items()):
        found.setdefault(op, {})[name] = count
    return found


# --------------------------------------------------------------------------- a transfer


def loss_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the losses in a history, in order of appearance."""
    return list(dict.fromkeys(k for record in history for k in record if k.endswith("_loss")))


def transfer_report(
    config: TransferConfig,
    device: torch.device,
    clock: Clock,
    *,
    pairs: Sequence[LayerPair],
    scores: Tensor | None,
    examples: ExampleSet,
    alignment: Sequence[Alignment],
    shared_tokens: int,
    history: Sequence[Mapping[str, Any]],
    trained_parameters: int,
    store_bytes: int,
    delta: Mapping[str, Any],
    calls: Calls,
) -> dict[str, Any]:
    """What report.json holds beside the history, with JSON types; ``summary`` is for a person."""
    phases, peaks = clock.as_dict(), peak_memory()
    losses = {
        name: f"{history[0][name]:.4f} → {history[-1][name]:.4f}"
        for name in loss_names(history)
        if name in history[0]
    }
    summary = {
        "pairs": "; ".join(map(str, pairs)),
        **losses,
        "steps": len(history),
        "trained parameters": trained_parameters,
        **({"alignment": summarize(alignment)} if alignment else {}),
        "shared vocabulary": shared_tokens,
        "training tokens/s": _training_speed(phases),
        "total seconds": round(sum(clock.seconds.values()), 2),
        "peak memory": ", ".join(
            f"{name.removesuffix('_bytes')} {size / 2**20:,.0f} MiB" for name, size in peaks.items()
        ),
    }
    return {
        "summary": summary,
        "config": config.as_dict(),
        "pairs": [
            {"target": pair.target, "source": list(pair.source), "weight": pair.weight}
            for pair in pairs
        ],
        "attribution": None if scores is None else scores.tolist(),
        "data": {**examples.summary.as_dict(), "fingerprint": examples.fingerprint()},
        "alignment": [judged.as_dict() for judged in alignment],
        "store_bytes": store_bytes,
        "phases": phases,
        "peak_memory": peaks,
        "device": str(device),
        "seed": config.seed,
        "ops": op_backends(device, calls),
        "op_calls": op_calls(calls),
        "versions": versions(),
        "machine": machine(),
        "delta": dict(delta),
    }


def _training_speed(phases: Mapping[str, Mapping[str, Any]]) -> str:
    steering = [phase for name, phase in phases.items() if name.startswith("steer")]
    seconds = sum(phase["seconds"] for phase in steering)
    tokens = sum(phase.get("tokens", 0) for phase in steering)
    return f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
