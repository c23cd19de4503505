"""Single operations under pytest-benchmark: ``pytest benchmarks/`` runs ours and every peer.

Small shapes by default; ``PKT_FAST_BENCH=full pytest benchmarks/`` takes the design's shapes.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import harness, micro
from benchmarks.harness import Missing

SIZES = micro.FULL if os.environ.get("PKT_FAST_BENCH") == "full" else micro.SMALL
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
harness.use_device(DEVICE.type)


def finished(call: harness.Call) -> harness.Call:
    """``call``, and what it started on a GPU."""

    def run() -> None:
        call()
        harness.synchronize()

    return run


@pytest.mark.parametrize("name", micro.BUILDERS)
def test_ours(benchmark, name):
    torch.manual_seed(0)
    case = micro.BUILDERS[name](SIZES, DEVICE)
    benchmark.group = name
    if case.error is not None:
        assert case.error() < 1e-2
    benchmark.pedantic(finished(case.ours), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", micro.BUILDERS)
def test_peers(benchmark, name):
    torch.manual_seed(0)
    case = micro.BUILDERS[name](SIZES, DEVICE)
    benchmark.group = name
    calls = [call for call in case.peers.values() if not isinstance(call, Missing)]
    if not calls:
        pytest.skip("; ".join(map(str, case.peers.values())))
    benchmark.pedantic(finished(calls[0]), rounds=3, warmup_rounds=1)
