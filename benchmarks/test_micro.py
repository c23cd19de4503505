"""The building blocks under pytest-benchmark: ``pytest benchmarks/``.

Small shapes by default; ``PKT_FAST_BENCH_FULL=1`` takes those of the design's targets.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.micro import QUICK, ROWS, Shapes

SHAPES = Shapes() if os.environ.get("PKT_FAST_BENCH_FULL") == "1" else QUICK
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("build", ROWS, ids=lambda build: build.__name__)
def test_row(build, benchmark):
    row = build(SHAPES, DEVICE)
    benchmark.extra_info["limit"] = row.limit_name
    benchmark(row.ours)
    if row.error is not None:
        assert row.error < 1e-2
