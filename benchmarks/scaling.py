"""Scaling curves: time and memory against tokens, vocabulary, width, threads, epochs, examples."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end
from benchmarks.harness import Missing, measure
from benchmarks.micro import BUILDERS, FULL, Sizes

ROOT = Path(__file__).resolve().parents[1]
BASE = replace(FULL, source=256, target=128, tokens=1024, vocabulary=32000, seconds=0.4)
EPOCHS = replace(end_to_end.FULL, source=(256, 8), target=(192, 4), vocabulary=8000, rows=16)
WIDEST_PEER = 2048
"""Of the basis: a pseudoinverse of a wider head takes minutes."""

GIVEN_BACK = "freed blocks given back"
ALLOCATORS = {
    "": {},
    GIVEN_BACK: {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
"""Settings of glibc's malloc.  As it comes it keeps what is freed, up to 32 MB a block."""

SMALL = replace(BASE, source=32, target=16, tokens=64, vocabulary=512, seconds=0.01)


Point = Callable[[], dict[str, Any]]


def points(device: str, *, small: bool = False) -> Iterator[tuple[str, Point]]:
    """Every point's name, and how to measure it: {"curve", "x", "name", "peer", "ours_s",
    "peer_s", "ours_bytes", "peer_bytes", "ours_samples", "peer_samples"}.
    """
    base = SMALL if small else BASE
    for curve, x, name, sizes in _grid(base, small):
        yield f"{curve} {x}: {name}", partial(_point, curve, x, name, sizes, device)
    if device == "cpu":
        for threads in sorted({1, torch.get_num_threads()}):
            for name in ("align", "label cosine"):
                yield f"threads {threads}: {name}", partial(_threads, threads, name, base)
    for count in (1, 2) if small else (1, 5, 20):
        yield f"epochs {count}", partial(_epochs, count, device, small)
    if device == "cpu":
        for count in (8, 16) if small else (64, 256, 1024, 4096):
            yield f"examples {count}", partial(_examples, count)
        for count in (8,) if small else (256, 1024):
            yield f"examples {count}, {GIVEN_BACK}", partial(_examples, count, GIVEN_BACK)


def _grid(base: Sizes, small: bool) -> Iterator[tuple[str, int, str, Sizes]]:
    for factor in (1, 2) if small else (1, 4, 16):
        yield "tokens", base.tokens * factor, "label cosine", replace(
            base, tokens=base.tokens * factor
        )
    for factor in (1, 2) if small else (1, 2, 4, 8):
        size = base.vocabulary if small else 32768
        for name in ("label cosine", "align"):
            yield "vocabulary", size * factor, name, replace(base, vocabulary=size * factor)
    widths = ((16, 8), (32, 16)) if small else ((1024, 512), (2048, 1024), (5120, 4096))
    for source, target in widths:
        tokens = base.tokens if small else 256
        for name in ("align", "label cosine"):
            yield "width", target, name, replace(
                base, source=source, target=target, tokens=tokens
            )
        yield "width", source, "basis", replace(base, source=source)
    for rows in (64, 128) if small else (1024, 2048, 4096):
        yield "width", rows, "inject", replace(base, inject=(rows, rows * 11 // 4))
    for width in (32, 64) if small else (1024, 2048, 4096, 5120):
        yield "width", width, "capture", replace(
            base, width=width, wide_rows=64 if small else 2048
        )


def _point(curve: str, x: int, name: str, sizes: Sizes, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    case = BUILDERS[name](sizes, torch.device(device))
    case.seconds, case.error = sizes.seconds, None
    first = next(iter(case.peers))
    case.peers, case.limits = {first: case.peers[first]}, {}
    if name == "basis" and sizes.source > WIDEST_PEER:
        case.peers = {first: Missing("takes minutes at this width")}
    return _of(measure(case), curve, x)


def _of(row: dict[str, Any], curve: str, x: int) -> dict[str, Any]:
    name, theirs = next(iter(row["peers"].items()))
    return {
        "curve": curve,
        "x": x,
        "name": row["name"],
        "peer": name,
        "ours_s": row["ours"]["median_s"],
        "peer_s": theirs.get("median_s"),
        "ours_bytes": row["ours"].get("peak_bytes"),
        "peer_bytes": theirs.get("peak_bytes"),
        "ours_samples": row["ours"]["samples"],
        "peer_samples": theirs.get("samples"),
    } | ({"peer_failed": theirs["failed"]} if "failed" in theirs else {})


def _epochs(count: int, device: str, small: bool) -> dict[str, Any]:
    """A whole transfer of so many epochs: what is done once counts less the more there are."""
    setup = replace(end_to_end.SMALL if small else EPOCHS, epochs=count)
    row = end_to_end.measure_transfer(
        setup, setup.target[1] - 1, name="whole transfer, last layer", device=device
    )
    return _of(row, "epochs", count)


def _threads(threads: int, name: str, base: Sizes) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _point("threads", threads, name, base, "cpu")
    finally:
        torch.set_num_threads(before)


def _examples(count: int, allocator: str = "") -> dict[str, Any]:
    """Time and peak memory of a transfer with a directory store, in a process of its own.

    With ``allocator`` :data:`GIVEN_BACK` that process returns freed blocks to the system at once.
    """
    with tempfile.TemporaryDirectory() as directory:
        code = (
            "from pathlib import Path; from benchmarks.end_to_end import store_run; "
            f"print('measured', *store_run(Path({directory!r}) / 'store', {count}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **ALLOCATORS[allocator]},
        )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    line = next(line for line in done.stdout.splitlines() if line.startswith("measured "))
    _, seconds, grown = line.split()
    name = ", ".join(filter(None, ("transfer, directory store", allocator)))
    return {
        "curve": "examples", "x": count, "name": name, "peer": None,
        "ours_s": float(seconds), "peer_s": None, "ours_bytes": int(grown), "peer_bytes": None,
        "ours_samples": 1, "peer_samples": None,
    }


_ACROSS = 5  # curves beside each other in the picture


def plot(measured: list[dict[str, Any]], path: Path) -> None:
    """One picture of all curves; nothing without points or matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    if not measured:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys((p["curve"], p["name"]) for p in measured))
    across = min(len(keys), _ACROSS)
    down = 2 * -(-len(keys) // _ACROSS)
    figure, axes = pyplot.subplots(down, across, figsize=(3.2 * across, 2.6 * down), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for number, (curve, name) in enumerate(keys):
        chosen = [p for p in measured if (p["curve"], p["name"]) == (curve, name)]
        top, column = 2 * (number // _ACROSS), number % _ACROSS
        _draw(axes[top][column], chosen, "s", f"{name}: seconds")
        _draw(axes[top + 1][column], chosen, "bytes", f"{name}: peak MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw(axis: Any, points: list[dict[str, Any]], unit: str, title: str) -> None:
    """One curve of ours and of its peer; an axis without values stays invisible."""
    scale = 2**20 if unit == "bytes" else 1
    for side, label in (("ours", "pkt_fast"), ("peer", points[0]["peer"])):
        values = [(p["x"], p[f"{side}_{unit}"] / scale) for p in points if p[f"{side}_{unit}"]]
        if values:
            axis.plot(*zip(*values, strict=True), marker="o", label=label)
            axis.set_visible(True)
    curve, at = points[0]["curve"], [p["x"] for p in points]
    if curve == "examples":  # memory is meant to be flat: a logarithm would hide that
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
        axis.set_xscale("linear" if curve in ("threads", "epochs") else "log")
    axis.set_xticks(at, [f"{x:,}" for x in at], rotation=20)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(curve)
    axis.set_title(title, fontsize=8)
    axis.tick_params(labelsize=6, which="both")
    if axis.lines:
        axis.legend(fontsize=6)


def scaling_markdown(measured: list[dict[str, Any]]) -> str:
    """The curves as a table."""
    from benchmarks.harness import bytes_text, seconds_text

    def seconds(value: float | None) -> str:
        return "–" if value is None else seconds_text(value)

    lines = [
        "| curve | at | what | ours | peer | faster | samples | memory ours | memory peer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in measured:
        faster = f"{p['peer_s'] / p['ours_s']:.1f}x" if p["peer_s"] else "–"
        samples = f"{p['ours_samples']} / {p['peer_samples'] or '–'}"
        cells = [p["curve"], f"{p['x']:,}", p["name"], seconds(p["ours_s"]), seconds(p["peer_s"])]
        cells += [faster, samples, bytes_text(p["ours_bytes"]), bytes_text(p["peer_bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
