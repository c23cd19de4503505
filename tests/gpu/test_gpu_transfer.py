"""Whole transfers and the stores of their rows on real hardware."""

from __future__ import annotations

import pytest
import torch
from toy_pairs import TOKENIZER, sized_model, sums

import pkt_fast
from pkt_fast.ops import synchronize_captures
from pkt_fast.stores import memory_store


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with pkt_fast.backend("auto"):
        yield


def run(device, **options):
    return pkt_fast.transfer(
        sized_model("llama", 1, 64, 6),
        sized_model("llama", 2, 48, 4),
        sums(8, 5),
        tokenizer=TOKENIZER,
        device=str(device),
        progress=False,
        **{"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-3, **options},
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"layers": [2], "objective": "relation", "output_loss": "kl", "interface": "contribution"},
        {"layers": "all", "method": "hidden_kd"},
        {"layers": [1, 3], "solver": "ridge", "objective": "squared", "recompose": "fitted"},
        {"preset": "best", "min_rows": 0},
    ],
    ids=str,
)
def test_a_transfer_equals_that_of_the_cpu(device, options):
    """To the rounding of TF32 products, if the user allows them; parameters are float32."""
    theirs, ours = run("cpu", **options), run(device, **options)
    assert ours.pairs == theirs.pairs
    for got, expected in zip(ours.history, theirs.history, strict=True):
        for name in expected:
            assert got[name] == pytest.approx(expected[name], rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_transfer_in_half_precision_learns(device, dtype):
    source, target = sized_model("llama", 1, 64, 6), sized_model("llama", 2, 48, 4)
    kind = getattr(torch, dtype)
    result = pkt_fast.transfer(
        source.to(kind), target.to(kind), sums(8, 5), tokenizer=TOKENIZER, device=str(device),
        epochs=6, batch_size=16, learning_rate=1e-3, progress=False,
    )  # fmt: skip
    assert result.history[-1]["layer_loss"] < result.history[0]["layer_loss"]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_reach_pinned_memory_beside_other_work(device, kind):
    value = torch.randn(4, 64, 256, device=device, dtype=kind)
    store = memory_store([100, 60], [0, 1], {"a": (256, kind)}, pinned=True)
    index = torch.randperm(256)[:100]
    store.capture("a", value, index)
    rows = torch.randn(60, 256, device=device, dtype=kind)
    store.append({"a": rows})
    kept = value.clone(), rows.clone()
    del value, rows
    torch.full((1 << 22,), float("nan"), device=device)  # takes freed memory, if it were free
    synchronize_captures()
    assert torch.equal(store.rows("a", [0]), kept[0].cpu().reshape(-1, 256)[index])
    assert torch.equal(store.rows("a", [1]), kept[1].cpu())
