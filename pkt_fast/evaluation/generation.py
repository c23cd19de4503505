"""What a model writes behind a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.rendering import render_prompt
from ..loading import pad_token_id


@torch.no_grad()
def generate_replies(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What ``model`` answers to the prompt of every row, greedily; special tokens left out.

    Prompts are batched by length and padded on the left, with positions counted from the first real
    token.  Sampling settings that a checkpoint ships with are overruled.
    """
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    new = complete(
        model, prompts, tokenizer,
        max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance, **greedy,
    )  # fmt: skip
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> list[list[int]]:
    """New token ids behind every prompt, in the order of ``prompts``.

    ``options`` are those of Transformers' ``generate``.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completed: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        new = _generate(model, [prompts[i] for i in chosen], tokenizer, max_new_tokens, options)
        for i, ids in zip(chosen, new.tolist(), strict=True):
            completed[i] = ids
        advance(len(chosen))
    return completed


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of what the model sees before it has to answer; BOS exactly once."""
    return open_ids(render_prompt(row, tokenizer), tokenizer)


def open_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered text that a model is to go on with; BOS exactly once."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    ids: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text; a prompt has to stay open
    return ids


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """New token ids (B, T_new) after each prompt."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = pad_token_id(tokenizer)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=_stops(model, tokenizer),
        tokenizer=tokenizer if "stop_strings" in options else None,
        **options,
    )
    return out[:, width:]


def _stops(model: nn.Module, tokenizer: Any) -> list[int] | None:
    """Ids that end a reply: the checkpoint's generation settings and the tokenizer's EOS."""
    shipped = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(shipped if isinstance(shipped, list) else [shipped]) | {tokenizer.eos_token_id}
    return sorted(stop for stop in stops if stop is not None) or None
