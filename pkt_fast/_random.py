"""Random draws from a seed that leave the caller's random state alone, on every device."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch draws from ``seed`` on the CPU and, if that is a GPU, on ``device``.

    Afterwards the random state of torch and of Python is as it was.  ``torch.manual_seed`` would
    seed every GPU of the process, and nothing would bring their states back.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
