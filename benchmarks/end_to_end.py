"""A whole transfer beside the same method written with Transformers and PEFT."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pkt_fast
from pkt_fast import TransferConfig
from pkt_fast.data import collate, encode
from pkt_fast.demo import bundled_rows, load_pair
from pkt_fast.pairing import source_for
from pkt_fast.steering import attach_lora, plan_steps

from . import peer_transfer

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm_train.jsonl"


@dataclass(frozen=True)
class Setting:
    """Sizes of the two random Llama-architecture models and of the data."""

    vocabulary: int = 32_000
    source: tuple[int, int] = (640, 16)  # width, layers
    target: tuple[int, int] = (448, 12)
    examples: int = 48
    epochs: int = 5


QUICK = Setting(1000, (64, 4), (48, 3), 8, 2)


def llama(vocabulary: int, width: int, layers: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if width < 64 else width // 64,
        num_key_value_heads=width // 16 if width < 64 else width // 64,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer_of(vocabulary: int) -> Any:
    """The bundled tokenizer with unused tokens up to ``vocabulary``, so that every head row has
    one.
    """
    tokenizer = load_pair()[2]
    tokenizer.add_tokens([f"<unused{i}>" for i in range(vocabulary - len(tokenizer))])
    return tokenizer


def data_rows() -> tuple[Any, str]:
    """Real GSM8K rows where they lie beside the checkout, else the bundled ones."""
    if GSM8K.is_file():
        return str(GSM8K), "GSM8K"
    return bundled_rows("train"), "bundled rows"


def compare(setting: Setting, layer: int, device: torch.device) -> dict[str, Any]:
    """Time both on the same batches from the same adapter; check that the losses agree."""
    tokenizer = tokenizer_of(setting.vocabulary)
    rows, origin = data_rows()
    config = TransferConfig.make(
        layers=[layer],
        epochs=setting.epochs,
        batch_size=16,
        micro_batch_size=8,
        max_length=320,
        limit=setting.examples,
        device=str(device),
    )
    source = llama(setting.vocabulary, *setting.source, seed=1).to(device)
    target = llama(setting.vocabulary, *setting.target, seed=2).to(device)

    start = time.perf_counter()
    ours = pkt_fast.transfer(
        source, target, rows, tokenizer=tokenizer, config=config, progress=False
    )
    our_seconds = time.perf_counter() - start

    target = llama(setting.vocabulary, *setting.target, seed=2).to(device)
    source.to(device)
    start = time.perf_counter()
    examples = encode(rows, tokenizer, max_length=config.max_length, limit=config.limit)
    adapted = attach_lora(target, [layer], config)
    steps = [
        [collate(examples, micro, pad_token_id=0).to(device) for micro in step.micro]
        for step in plan_steps(examples.lengths, config)
    ]
    pair = source_for(setting.source[1], setting.target[1], layer)
    history = peer_transfer.transfer(source, adapted, pair, steps, config.learning_rate)
    peer_seconds = time.perf_counter() - start

    difference = max(
        max(abs(a["layer_loss"] - b), abs(a["output_loss"] - c))
        for a, (b, c) in zip(ours.history, history, strict=True)
    )
    if difference > 1e-4:
        raise AssertionError(f"the two transfers differ: losses by {difference:.1e}")
    return {
        "name": f"whole transfer, {setting.epochs} epochs, target layer {layer + 1} of "
        f"{setting.target[1]}",
        "data": origin,
        "tokens": sum(examples.lengths),
        "ours_seconds": our_seconds,
        "peer_seconds": peer_seconds,
        "speedup": peer_seconds / our_seconds,
        "target": 2.5 if layer + 1 < setting.target[1] else 5.0,
        "largest_loss_difference": difference,
        "expected_speedup": expected_speedup(setting, layer),
        "phases": ours.report["phases"],
    }


def expected_speedup(setting: Setting, layer: int) -> float:
    """Ratio of the arithmetic that remains: forward 1, frozen backward 1 per layer pass.

    A layer costs its parameters; the vocabulary-wide head and alignment products are counted for
    the peer only, since ours never forms them.
    """
    wide, deep = setting.source
    narrow, shallow = setting.target
    source_layer, target_layer = 12 * wide**2, 12 * narrow**2
    pair = source_for(deep, shallow, layer)
    tail = shallow - layer
    supervised = 0.5  # share of tokens with a label, roughly
    heads = setting.vocabulary * (supervised * (wide + narrow) + wide + 2 * narrow)
    peer = setting.epochs * (deep * source_layer + (shallow + tail) * target_layer + heads)
    ours = (pair.source[-1] + 1) * source_layer + layer * target_layer
    ours += setting.epochs * 2 * tail * target_layer
    return peer / ours


def run(setting: Setting, device: torch.device) -> list[dict[str, Any]]:
    """The layer in the middle and the last one."""
    layers: Sequence[int] = (setting.target[1] // 2, setting.target[1] - 1)
    return [compare(setting, layer, device) for layer in layers]
