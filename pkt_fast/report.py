"""What happened: phase timings, speeds, memory, versions, and the page a person opens."""

from __future__ import annotations

import contextlib
import html
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

from ._files import atomic_file
from .ops import served_by
from .ops._gemm import choice

PACKAGES = ("pkt-fast", "torch", "transformers", "peft", "triton", "safetensors", "numpy")


@dataclass
class Clock:
    """Seconds and tokens by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, name: str, tokens: int) -> None:
        """Add ``tokens`` to a phase."""
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def as_dict(self) -> dict[str, Any]:
        """Seconds, tokens and tokens a second by phase."""
        return {
            name: {"seconds": round(seconds, 4)}
            | (
                {
                    "tokens": self.tokens[name],
                    "tokens_per_second": round(self.tokens[name] / seconds, 1),
                }
                if name in self.tokens and seconds > 0
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


def op_backends(device: torch.device) -> dict[str, str]:
    """The implementation of every op that serves ``device``."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return {op: served[kind] for op, served in served_by().items()}


# --------------------------------------------------------------------------- the HTML page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0
1rem;color:#1b1f24}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
svg{background:#fafafa;border:1px solid #ddd}code{background:#f3f3f3;padding:0 .2rem}
"""


def write_html(path: Path, report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Write the report as one self-contained page: pairs, losses, timings, settings."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>pkt_fast transfer</title>",
        f"<style>{_STYLE}</style><h1>pkt_fast transfer</h1>",
        _table("Summary", report["summary"]),
        "<h2>Losses</h2>" + _curves(history),
        _table("Attribution (source layer → score)", dict(enumerate(report["attribution"] or []))),
        _table("Phases", {k: _phase_line(v) for k, v in report["phases"].items()}),
        _table("Settings", report["config"]),
        _table("Data", report["data"]),
        _table("Op implementations", report["ops"]),
        _table("Versions", report["versions"]),
        _table("Machine", report["machine"]),
        "</html>\n",
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


def _phase_line(phase: Mapping[str, Any]) -> str:
    line = f"{phase['seconds']:.2f} s"
    if "tokens_per_second" in phase:
        line += f", {phase['tokens']:,} tokens, {phase['tokens_per_second']:,.0f} tokens/s"
    return line


def _table(title: str, rows: Mapping[Any, Any]) -> str:
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<h2>{html.escape(title)}</h2><table>{body}</table>"


def loss_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the losses in a history, in order of appearance."""
    return list(dict.fromkeys(k for record in history for k in record if k.endswith("_loss")))


def _curves(history: Sequence[Mapping[str, Any]], width: int = 640, height: int = 160) -> str:
    drawings = []
    for name in loss_names(history):
        values = [float(record[name]) for record in history if name in record]
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        step = (width - 20) / max(1, len(values) - 1)
        points = " ".join(
            f"{10 + i * step:.1f},{height - 10 - (v - low) / span * (height - 20):.1f}"
            for i, v in enumerate(values)
        )
        drawings.append(
            f"<p>{html.escape(name)}: {values[0]:.4f} → {values[-1]:.4f}</p>"
            f"<svg width='{width}' height='{height}'><polyline points='{points}' fill='none' "
            "stroke='#2962ff' stroke-width='1.5'/></svg>"
        )
    return "".join(drawings)
