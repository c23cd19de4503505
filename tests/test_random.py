"""Seeded draws: the same every time, and the caller's random state as it was, GPUs included."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from toy_pairs import TOKENIZER, sized_model, sums

import pkt_fast
from pkt_fast._random import seeded


def states():
    return torch.get_rng_state().tolist(), random.getstate()


def test_state_comes_back_even_after_an_error():
    before = states()
    draws = []
    for _ in range(2):
        with contextlib.suppress(KeyError), seeded(3, torch.device("cpu")):
            draws.append((torch.rand(2).tolist(), random.random()))
            raise KeyError
    assert draws[0][0] == draws[1][0]
    assert states() == before


def test_only_the_gpu_in_use_is_seeded(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: calls.append(("get", gpu)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _, gpu: calls.append(("set", gpu)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(("seed", seed)))
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: contextlib.nullcontext(calls.append(gpu)))
    monkeypatch.setattr(torch.random, "fork_rng", _forked)
    gpu = torch.device("cuda", 1)
    with seeded(7, gpu):
        calls.append("inside")
    assert calls == [("get", gpu), gpu, ("seed", 7), "inside", ("set", gpu)]


@contextlib.contextmanager
def _forked(devices):
    """``fork_rng`` of a machine with GPUs."""
    states = [torch.cuda.get_rng_state(device) for device in devices]
    yield
    for device, state in zip(devices, states, strict=True):
        torch.cuda.set_rng_state(state, device)


@pytest.mark.parametrize(
    "options", [{}, {"objective": "hidden_mse"}, {"method": "laten"}, {"dropout": 0.2}]
)
def test_a_transfer_on_the_cpu_touches_no_gpu(options, monkeypatch):
    def refused(seed):
        raise AssertionError("a GPU was seeded")

    models = sized_model("llama", 1, 32, 3), sized_model("llama", 2, 32, 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    monkeypatch.setattr(torch.cuda, "manual_seed", refused)
    before = states()
    pkt_fast.transfer(
        *models, sums(2, 3), tokenizer=TOKENIZER, device="cpu", steps=1, batch_size=4, rank=2,
        progress=False, **options,
    )  # fmt: skip
    assert states()[0] == before[0]
