"""Times calls beside their peers and their limits: same process, same inputs, in turn.

A :class:`Case` is one row: our call, the calls of others that give the same result, and the least
work the machine could do (a bare GEMM, a copy).  All of them are run in turn, so that a busy moment
of the machine meets all alike.  Medians and the middle half of the samples are kept; ours and the
limits, which are cheap, run several times in a round of slow peers.

Peak memory is what one call adds to the process: on the CPU the kernel's resident high-water mark,
reset before the call (after memory the allocator holds back was returned to the system), on CUDA
the allocator's peak.  Where neither can be read it is None.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

SHORTEST_SAMPLE = 2e-3
MOST_ROUNDS = 15
LEAST_SAMPLES = 5
"""Of our call and of every limit that is not :data:`SLOW`."""

LEAST_ROUNDS = 3
"""The samples of every peer."""

SLOW = 3.5
"""Seconds beyond which a call runs once."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]
_on_gpu = False


def use_clock(name: str) -> None:
    """Time with the "wall" clock, or with "cpu": seconds this process computes, on one thread.

    CPU seconds of one thread do not grow when other programs take the machine's time, as wall time
    does, and as the CPU seconds of threads that wait for each other do.
    """
    global _clock
    _clock = CLOCKS[name]
    if name == "cpu":
        torch.set_num_threads(1)


def use_device(name: str) -> None:
    """Measure on the "cpu" (at first) or on "cuda": whom to wait for, whose memory to read."""
    global _on_gpu
    _on_gpu = name == "cuda"


def clock_name() -> str:
    """The clock in use."""
    return next(name for name, clock in CLOCKS.items() if clock is _clock)


def now() -> float:
    """Seconds on the clock in use."""
    return _clock()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Missing(str):
    """Why a peer cannot run here, in place of its call."""


@dataclass(frozen=True)
class Targets:
    """What a row is meant to reach.

    Attributes:
        at_least: peer → how many times faster than it.
        at_most: limit → how many times as slow as it at most.
        error: the largest error, and what it is taken to.
        memory: the target in words → the most bytes our call may add to the process.
        less_memory_than: peers.
    """

    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    error: tuple[float, str] | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    less_memory_than: Sequence[str] = ()


@dataclass
class Case:
    """One row of the table.

    Attributes:
        name, shape: what is measured, on what.
        ours: our call.
        peers: calls of others (or :class:`Missing`) by name; the first is the one targets speak of.
        limits: the least work, by name; the first is the one a reader looks at.
        together: our call has to do the work of all the limits, so the slowest is the limit.
        error: largest difference of our result from the first peer's, relative; run once.
        targets: what we mean to reach.
        seconds: time to spend on the row, warm-up not counted.
        note: what a reader has to know.
    """

    name: str
    shape: str
    ours: Call
    peers: Mapping[str, Call | Missing]
    limits: Mapping[str, Call] = field(default_factory=dict)
    error: Callable[[], float] | None = None
    targets: Targets = Targets()
    together: bool = False
    seconds: float = 4.0
    note: str = ""


def synchronize() -> None:
    """Wait for the GPU where one is measured."""
    if _on_gpu:
        torch.cuda.synchronize()


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Seconds of one call, averaged over ``repeats`` in a row."""
    synchronize()
    start = now()
    for _ in range(repeats):
        call()
    synchronize()
    return max(now() - start, 1e-9) / repeats


def peak_bytes(call: Call) -> int | None:
    """Bytes that one call adds to the process at its peak; None where they cannot be read."""
    gc.collect()
    if _on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def peak_anonymous_bytes(call: Call) -> int:
    """Growth of anonymous memory during ``call``, sampled; mapped files are not counted."""
    before = peak = _status("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def samples_in_turn(
    calls: Mapping[str, Call], first: Mapping[str, float], seconds: float, rounds: int = MOST_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every call, in turn, until ``seconds`` or ``rounds`` are spent.

    ``first`` is what each call took before.  One that took longer than :data:`SLOW` is not
    repeated: no warm-up matters to it.  The others have :data:`LEAST_ROUNDS` rounds at least, and
    in every round each call that is no peer has its turn as often as gives it
    :data:`LEAST_SAMPLES`.
    """
    samples = {name: [once] if once > SLOW else [] for name, once in first.items()}
    again = {name: call for name, call in calls.items() if not samples[name]}
    a_round = sum(first[name] for name in again)
    rounds = max(LEAST_ROUNDS, min(rounds, int(seconds / a_round))) if again else 0
    repeats = {name: max(1, math.ceil(SHORTEST_SAMPLE / first[name])) for name in again}
    for _ in range(rounds):
        for turn in range(-(-LEAST_SAMPLES // rounds)):
            for name, call in again.items():
                if not (turn and name.startswith("peer")):
                    samples[name].append(seconds_of(call, repeats[name]))
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, fastest and number of samples."""
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {
        "median_s": statistics.median(ordered),
        "quartiles_s": [low, high],
        "fastest_s": ordered[0],
        "samples": len(ordered),
    }


def measure(case: Case) -> dict[str, Any]:
    """Run one row: {name, shape, ours, peers, limits, ratios, targets, error, note}.

    A peer or a limit that raises is left out; its entry says why.
    """
    gc.collect()
    gc.freeze()  # so that collecting before every call looks at new objects alone
    try:
        return _measure(case)
    finally:
        gc.unfreeze()


def _measure(case: Case) -> dict[str, Any]:
    calls: dict[str, Call] = {"ours": case.ours}
    calls |= {
        f"peer {name}": call for name, call in case.peers.items() if not isinstance(call, Missing)
    }
    calls |= {f"limit {name}": call for name, call in case.limits.items()}
    problem: Exception | None = None
    error: float | None = None
    try:
        error = None if case.error is None else case.error()
    except Exception as raised:  # by our call or by the first peer: seen below
        problem = raised
    memory: dict[str, int | None] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):

        def timed(name: str = name, call: Call = call) -> None:
            first[name] = seconds_of(call)

        try:
            memory[name] = peak_bytes(timed)
            if first[name] < 1:  # else long enough for first-time costs not to show
                memory[name] = peak_bytes(timed)
        except Exception as raised:
            if name == "ours":
                raise
            failed[name] = reason(raised)
            del calls[name]
            first.pop(name, None)
        if name.startswith("limit"):
            memory.pop(name, None)
    if problem and not failed:
        raise problem
    found = samples_in_turn(calls, first, case.seconds)

    def entry(name: str) -> dict[str, Any]:
        if name in failed:
            return {"failed": failed[name]}
        return summary(found[name]) | ({"peak_bytes": memory[name]} if name in memory else {})

    row: dict[str, Any] = {
        "name": case.name,
        "shape": case.shape,
        "ours": entry("ours"),
        "peers": {
            name: {"skipped": str(call)} if isinstance(call, Missing) else entry(f"peer {name}")
            for name, call in case.peers.items()
        },
        "limits": {name: entry(f"limit {name}") for name in case.limits},
        "error": error,
        "note": case.note,
    }
    return row | judged(row, case.targets, case.together)


def judged(
    row: Mapping[str, Any], targets: Targets, together: bool = False
) -> dict[str, Any]:
    """Ratios of a row, that to the limit which counts first, and which targets they meet."""
    ours = row["ours"]["median_s"]
    speedups = {
        name: peer["median_s"] / ours for name, peer in row["peers"].items() if "median_s" in peer
    }
    of_limit = {
        name: ours / limit["median_s"]
        for name, limit in row["limits"].items()
        if "median_s" in limit
    }
    if together:
        of_limit = dict(sorted(of_limit.items(), key=lambda item: item[1]))
    found = [
        _judgement(f"≥ {wanted:g}x {name}", speedups.get(name), least=wanted)
        for name, wanted in targets.at_least.items()
    ]
    found += [
        _judgement(f"≤ {wanted:.3g}x {name}", of_limit.get(name), most=wanted)
        for name, wanted in targets.at_most.items()
    ]
    if targets.error:
        most, of = targets.error
        found.append(_judgement(f"error ≤ {most:g} of {of}", row["error"], most=most))
    memory = row["ours"].get("peak_bytes")
    found += [
        _judgement(what, memory, most=most) for what, most in targets.memory.items()
    ]
    for name in targets.less_memory_than:
        theirs = row["peers"].get(name, {}).get("peak_bytes")
        share = None if memory is None or not theirs else memory / theirs
        found.append(_judgement(f"less memory than {name}", share, most=1))
    return {"speedups": speedups, "of_limit": of_limit, "targets": found}


def _judgement(
    what: str, measured: float | None, *, least: float = -math.inf, most: float = math.inf
) -> dict[str, Any]:
    met = None if measured is None else least <= measured <= most
    return {"what": what, "measured": measured, "met": met}


def samples_text(row: Mapping[str, Any]) -> str:
    """How many samples each time of a row is the median of."""
    entries = {"ours": row["ours"], **row["peers"], **row["limits"]}
    return "samples: " + ", ".join(
        f"{name} {entry['samples']}" for name, entry in entries.items() if "samples" in entry
    )


# --------------------------------------------------------------------------- tables


def seconds_text(seconds: float) -> str:
    """Three digits, with the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(size: float | None) -> str:
    """MiB, or a dash."""
    return "–" if size is None else f"{size / 2**20:,.0f} MiB"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of all rows: one line a peer."""
    lines = [
        "| what | ours (middle half) | peer | peer's time | faster | limit | ours / limit "
        "| memory ours / peer | targets |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["ours"]
        spread = " to ".join(seconds_text(x) for x in ours["quartiles_s"])
        limits = "; ".join(f"{name} {entry_text(limit)}" for name, limit in row["limits"].items())
        ratios = "; ".join(
            f"{row['of_limit'][name]:.2f}" if name in row["of_limit"] else "–"
            for name in row["limits"]
        )
        verdicts = {None: "not measured", True: "met", False: "missed"}
        targets = "; ".join(f"{t['what']}: {verdicts[t['met']]}" for t in row["targets"])
        for number, (name, peer) in enumerate(row["peers"].items()):
            first = number == 0
            what = f"**{row['name']}**, {row['shape']}" if first else ""
            mine = f"{seconds_text(ours['median_s'])} ({spread})" if first else ""
            times = f"{row['speedups'][name]:.1f}x" if name in row["speedups"] else "–"
            theirs = [name, entry_text(peer), times]
            memory = f"{bytes_text(ours.get('peak_bytes'))} / {bytes_text(peer.get('peak_bytes'))}"
            cells = [what, mine, *theirs, limits if first else "", ratios if first else ""]
            cells += [memory, targets if first else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def entry_text(entry: Mapping[str, Any]) -> str:
    """The time of a peer or a limit, or why there is none."""
    if "median_s" in entry:
        return seconds_text(entry["median_s"])
    return f"not run: {entry['skipped']}" if "skipped" in entry else f"failed: {entry['failed']}"
