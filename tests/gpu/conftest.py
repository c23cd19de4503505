"""Real hardware: ``pytest -m gpu -s`` checks and times every kernel at realistic shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pkt_fast

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA or AMD GPU"))


@pytest.fixture(autouse=True)
def _triton():
    """Every op runs as its Triton kernel; one that cannot raises BackendError."""
    torch.manual_seed(0)
    with pkt_fast.backend("triton"):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
