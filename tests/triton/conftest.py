"""Triton kernels against the float64 reference: in the interpreter, or on a GPU (``-m gpu``).

    TRITON_INTERPRET=1 pytest tests/triton

The interpreter must be chosen before Triton is imported, hence a pytest run of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if INTERPRETED:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            reason = "no GPU; TRITON_INTERPRET=1 runs the kernels in the interpreter"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """Where kernels take their tensors."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _seeded(nan_in_fresh_memory: None) -> None:
    torch.manual_seed(0)
