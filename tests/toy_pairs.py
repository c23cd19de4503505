"""The tiny pairs that tests transfer between: one tokenizer, rows of sums, models of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import toy_tokenizers
from models import tiny_model
from transformers import PreTrainedModel

from pkt_fast import LayerDelta, TransferConfig, reference
from pkt_fast.data import collate, encode
from pkt_fast.pairing import LayerPair
from pkt_fast.steering import adapter_parameters, attach_lora, plan_steps

TOKENIZER = toy_tokenizers.byte_level(bos=False)


def sums(left: int, right: int) -> list[dict[str, str]]:
    """``left`` × ``right`` rows whose prompts and completions have different lengths."""
    return [
        {"prompt": f"{a}+{b}=" * (1 + a % 3), "completion": f"{a + b} ok" * (1 + b % 2)}
        for a in range(left)
        for b in range(right)
    ]


def sized_model(family: str, seed: int, width: int, layers: int, **options: Any) -> PreTrainedModel:
    """A tiny model of ``family`` for :data:`TOKENIZER`, of a width and a depth."""
    sizes = {"gpt2": ("n_embd", "n_layer")}.get(family, ("hidden_size", "num_hidden_layers"))
    sized = dict(zip(sizes, (width, layers), strict=True))
    return tiny_model(family, seed=seed, **{"vocab_size": len(TOKENIZER), **sized, **options})


def relative_error(ours: LayerDelta, theirs: LayerDelta) -> float:
    """The largest relative error of a change of ``theirs``."""
    return max(
        float((ours.changes[name].matrix() - change.matrix()).norm() / change.matrix().norm())
        for name, change in theirs.changes.items()
    )


def one_phase(
    source: PreTrainedModel,
    target: PreTrainedModel,
    rows: list[dict[str, str]],
    pairs: Sequence[LayerPair],
    config: TransferConfig,
    *,
    padding_side: Literal["right", "left"] = "right",
    shares: Sequence[int] | None = None,
) -> tuple[list[dict[str, float]], LayerDelta]:
    """The materialised one-phase loop from the same adapter, on the same batches.

    With ``shares``, numbers of steps, the pairs train one after the other, each for its share.
    """
    examples = encode(rows, TOKENIZER)
    adapted = attach_lora(target, [pair.target for pair in pairs], config)
    steps = [
        [
            collate(examples, micro, pad_token_id=0, padding_side=padding_side)
            for micro in step.micro
        ]
        for step in plan_steps(examples.lengths, config)
    ]
    stages = (
        [(pairs, len(steps))]
        if shares is None
        else [([pair], share) for pair, share in zip(pairs, shares, strict=True)]
    )
    history: list[dict[str, float]] = []
    for together, share in stages:
        adapted.zero_grad()
        trained = adapter_parameters(adapted, [pair.target for pair in together])
        now = steps[len(history) : len(history) + share]
        history += reference.semalign(source, adapted, together, now, trained, config)
    return history, LayerDelta.from_peft(adapted)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
