"""Timing ours, a peer and a limit on the same inputs, in the same process.

A row is measured in rounds: ours, then each peer, then the limit, again and again, so that a slow
moment of the machine falls on all of them.  The table shows medians; spread is the interquartile
range over the median.  On a GPU every call is timed with events around it and synchronised at its
end.

Memory is the peak of the resident set above what was resident before the call (Linux resets that
peak on request); on a GPU it is the allocator's peak.  It is taken in one extra call of its own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Call = Callable[[], object]


@dataclass
class Row:
    """One comparison.

    Attributes:
        name: what is measured, with its shape.
        ours: our call.
        peers: peer calls by name, best-known first.
        limit: the call that the hardware cannot beat (a bare GEMM, a copy of the bytes moved).
        limit_name: what that call is.
        target: required speed-up over a peer by peer name (DESIGN targets).
        target_limit: largest allowed ratio of our time to the limit's.
        error: relative error of ours against a float64 computation.
        skipped: peers that cannot run here, with the reason.
        slow_peer_rounds: rounds for peers that take seconds.
    """

    name: str
    ours: Call
    peers: Mapping[str, Call]
    limit: Call
    limit_name: str
    target: Mapping[str, float] = field(default_factory=dict)
    target_limit: float | None = None
    error: float | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    slow_peer_rounds: int | None = None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak memory of one call above what was in use before it; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = status_bytes("VmRSS")
    result = call()
    peak = status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure(row: Row, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    """Run a row for ``rounds`` rounds, or fewer once ``budget`` seconds are spent (at least 3)."""
    calls = {"ours": row.ours, **row.peers, "limit": row.limit}
    for call in calls.values():
        call()  # warm up: caches, autotuning, allocator
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(rounds):
        spent = time.perf_counter() - start
        if number >= 3 and spent > budget:
            break
        for name, call in calls.items():
            slow = name in row.peers and row.slow_peer_rounds is not None
            if slow and number >= (row.slow_peer_rounds or 0):
                continue
            samples[name].append(timed(call, device))
    memory = {name: peak_bytes(call, device) for name, call in calls.items() if name != "limit"}
    return _result(row, samples, memory)


def _result(
    row: Row, samples: Mapping[str, Sequence[float]], memory: Mapping[str, int | None]
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ours = medians["ours"]
    return {
        "name": row.name,
        "ours_seconds": ours,
        "spread": _spread(samples["ours"]),
        "rounds": len(samples["ours"]),
        "ours_bytes": memory["ours"],
        "limit": row.limit_name,
        "limit_seconds": medians["limit"],
        "over_limit": ours / medians["limit"],
        "target_limit": row.target_limit,
        "error": row.error,
        "peers": {
            name: {
                "seconds": medians[name],
                "spread": _spread(samples[name]),
                "bytes": memory[name],
                "speedup": medians[name] / ours,
                "target": row.target.get(name),
            }
            for name in row.peers
        },
        "skipped": dict(row.skipped),
    }


def _spread(values: Sequence[float]) -> float:
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


# --------------------------------------------------------------------------- limits


def copier(bytes_moved: float, device: torch.device) -> Call:
    """A copy that reads and writes ``bytes_moved`` bytes in all, with all threads."""
    half = max(1, int(bytes_moved) // 8)
    source = torch.ones(half, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


# --------------------------------------------------------------------------- showing


def show(results: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print a table of results."""
    table = Table(title=title)
    for column in (
        "what",
        "ours",
        "peer",
        "peer's time",
        "faster",
        "limit",
        "over limit",
        "memory",
        "peer's memory",
        "target",
    ):
        table.add_column(column)
    for cells in _cells(results):
        table.add_row(*cells)
    Console(width=200).print(table)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown."""
    head = [
        "what",
        "ours",
        "peer",
        "peer's time",
        "faster",
        "limit",
        "over limit",
        "memory",
        "peer's memory",
        "target",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(results)]
    return "\n".join(lines) + "\n"


def _cells(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for result in results:
        limit = f"{result['limit']}: {seconds(result['limit_seconds'])}"
        first = [result["name"], f"{seconds(result['ours_seconds'])} ±{result['spread']:.0%}"]
        for number, (name, peer) in enumerate(result["peers"].items()):
            rows.append(
                [
                    *(first if number == 0 else ["", ""]),
                    name,
                    seconds(peer["seconds"]),
                    f"{peer['speedup']:.1f}×",
                    limit if number == 0 else "",
                    f"{result['over_limit']:.2f}×" if number == 0 else "",
                    size(result["ours_bytes"]) if number == 0 else "",
                    size(peer["bytes"]),
                    _verdict(result, peer, number == 0),
                ]
            )
        for name, reason in result["skipped"].items():
            rows.append(["", "", name, f"not run: {reason}", "", "", "", "", "", ""])
    return rows


def _verdict(result: Mapping[str, Any], peer: Mapping[str, Any], first: bool) -> str:
    parts = []
    if peer["target"] is not None:
        met = "met" if peer["speedup"] >= peer["target"] else "missed"
        parts.append(f"≥ {peer['target']:g}× {met}")
    if first and result["target_limit"] is not None:
        met = "met" if result["over_limit"] <= result["target_limit"] else "missed"
        parts.append(f"≤ {result['target_limit']:.3g}× limit {met}")
    return ", ".join(parts)


def seconds(value: float) -> str:
    """A time with a readable unit."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def size(value: int | None) -> str:
    """A number of bytes with a readable unit."""
    return "-" if value is None else f"{value / 2**20:.0f} MiB"
