"""How time and memory grow: with tokens, vocabulary, width, threads, and examples in a directory
store.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pkt_fast import SemanticBasis, SemanticMap
from pkt_fast.phases import StorePlace

from .harness import peak_bytes, status_bytes, timed
from .micro import Shapes, frozen_head, label_cosine, randn, with_gradient

Point = dict[str, Any]


def median_time(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    call()
    return statistics.median(timed(call, device) for _ in range(rounds))


def by_tokens(device: torch.device, counts: Sequence[int]) -> list[Point]:
    """Label cosine, forward and backward, against materialised logits."""
    points = []
    for tokens in counts:
        row = label_cosine(Shapes(tokens=tokens), device)
        points.append(
            {
                "tokens": tokens,
                "ours_seconds": median_time(row.ours, device),
                "ours_bytes": peak_bytes(row.ours, device),
                "torch_seconds": median_time(row.peers["torch logits"], device, 1),
                "torch_bytes": peak_bytes(row.peers["torch logits"], device),
            }
        )
    return points


def by_vocabulary(device: torch.device, sizes: Sequence[int]) -> list[Point]:
    """Building the map once, and aligning 4,096 tokens with it."""
    points = []
    for vocabulary in sizes:
        source = SemanticBasis.from_weight(randn(vocabulary, 512, seed=0, device=device))
        target = SemanticBasis.from_weight(randn(vocabulary, 256, seed=1, device=device))
        hidden = randn(4096, 512, seed=2, device=device)

        def build(source: SemanticBasis = source, target: SemanticBasis = target) -> SemanticMap:
            return SemanticMap.between(source, target)

        mapping = build()
        points.append(
            {
                "vocabulary": vocabulary,
                "map_seconds": median_time(build, device, 1),
                "align_seconds": median_time(
                    lambda mapping=mapping, hidden=hidden: mapping(hidden), device
                ),
            }
        )
        gc.collect()
    return points


def by_width(device: torch.device, widths: Sequence[int]) -> list[Point]:
    """The label cosine for heads of growing width, V = 32,000."""
    points = []
    for width in widths:
        row = label_cosine(Shapes(narrow=width, tokens=1024), device)
        points.append({"width": width, "ours_seconds": median_time(row.ours, device, 3)})
        del row
        gc.collect()
    return points


def by_threads(device: torch.device) -> list[Point]:
    """Aligning 4,096 tokens and their label cosine with 1, 2, ... threads."""
    from pkt_fast import losses

    available = torch.get_num_threads()
    head = frozen_head(32_000, 512, 1, device)
    hidden = randn(4096, 512, seed=2, device=device)
    labels = torch.randint(0, 32_000, (4096,), device=device)
    call = with_gradient(lambda h: losses.label_cosine(h, head, labels), hidden)
    points = []
    for threads in range(1, available + 1):
        torch.set_num_threads(threads)
        points.append({"threads": threads, "label_cosine_seconds": median_time(call, device)})
    torch.set_num_threads(available)
    return points


def by_examples(counts: Sequence[int], width: int = 1024, tokens: int = 128) -> list[Point]:
    """Anonymous memory while a directory store is written and read back, example by example."""
    points = []
    for examples in counts:
        with tempfile.TemporaryDirectory() as directory:
            gc.collect()
            before = status_bytes("RssAnon")
            peak = before

            def fill(store: Any, examples: int = examples) -> None:
                nonlocal peak
                for _ in range(examples):
                    store.append({"rows": torch.randn(tokens, width)})
                    peak = max(peak, status_bytes("RssAnon"))

            store = StorePlace(Path(directory), 0).filled(
                "source",
                [tokens] * examples,
                range(examples),
                {"rows": (width, torch.float32)},
                {"examples": examples},
                fill,
            )
            for example in range(examples):
                store.rows("rows", [example])
                peak = max(peak, status_bytes("RssAnon"))
            points.append(
                {
                    "examples": examples,
                    "store_bytes": store.num_bytes,
                    "extra_anonymous_bytes": peak - before,
                }
            )
    return points


def run(device: torch.device, quick: bool) -> dict[str, list[Point]]:
    """All curves."""
    small = quick
    return {
        "tokens": by_tokens(device, [16, 32] if small else [512, 1024, 2048, 4096]),
        "vocabulary": by_vocabulary(
            device, [500, 1000] if small else [32_000, 64_000, 128_000, 256_000]
        ),
        "width": by_width(device, [32, 64] if small else [256, 512, 1024, 2048]),
        "threads": by_threads(device),
        "examples": by_examples([2, 4] if small else [250, 500, 1000, 2000], 64 if small else 1024),
    }


def plot(curves: dict[str, list[Point]], path: str) -> None:
    """One panel a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.2))
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        xs = [point[name] for point in points]
        for key in points[0]:
            if key == name or ("bytes" in key and name != "examples"):
                continue
            axis.plot(xs, [point[key] for point in points], marker="o", label=key)
        axis.set_xlabel(name)
        axis.set_ylabel("bytes" if name == "examples" else "seconds")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
