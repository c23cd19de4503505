"""The tiny pairs that tests transfer between: one tokenizer, rows of sums, models of any size."""

from __future__ import annotations

from typing import Any

import torch
import toy_tokenizers
from models import tiny_model
from transformers import PreTrainedModel

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


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
