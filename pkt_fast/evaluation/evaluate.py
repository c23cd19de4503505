"""Exact match, next-token loss and token accuracy of one model on held-out rows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..data.batches import Batch, batches
from ..data.encoding import encode
from ..data.examples import ExampleSet
from ..data.reading import read_rows
from ..delta import LayerDelta, eject, inject
from ..errors import ConfigError
from ..lending import evaluating, usual_defaults
from ..loading import load_model, load_tokenizer, pad_token_id, resolve_device
from .answers import matches, reference_reply
from .generation import generate_replies
from .rows import logit_chunks, supervised_hidden

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out rows.

    Attributes:
        exact_match: share of replies that give the reference's final answer; None when nothing was
            generated (asked for, or no row has a reply).
        next_token_loss: mean cross-entropy over supervised tokens, in nats.
        token_accuracy: share of supervised tokens that are the most likely one.
        examples: rows scored.
        tokens: supervised tokens scored.
        answered: rows a reply was generated for.
    """

    exact_match: float | None
    next_token_loss: float
    token_accuracy: float
    examples: int
    tokens: int
    answered: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields with JSON types."""
        return dataclasses.asdict(self)


@usual_defaults()
def evaluate(
    model: nn.Module | str | Path,
    rows: Any = None,
    tokenizer: Any = None,
    *,
    delta: LayerDelta | str | os.PathLike[str] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    max_length: int = 1024,
    limit: int | None = None,
    device: str | torch.device | None = None,
    generate: bool = True,
    advance: Advance = lambda done: None,
) -> Evaluation:
    """Score ``model`` (object, path or hub id) on ``rows``.

    Args:
        model: a decoder-only model.  One given as an object stays where it is unless ``device`` is
            given.
        rows: held-out data, anything :func:`pkt_fast.transfer` takes; None takes the bundled test
            problems.
        tokenizer: None loads the one that lies with the model.
        delta: an adapter to inject for the time of the evaluation, on top of what is injected.
        max_new_tokens: longest generated reply.
        batch_size: rows a forward pass.
        max_length: longest example, in tokens.
        limit: use the first so many rows.
        device: where to run.
        generate: whether to generate replies for the exact match, the slow part.
        advance: called with the number of rows that were done (each row counts once for the
            loss and once for its reply).

    Raises:
        PktFastError: the model or the rows cannot be used, or the model's logits are NaN.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value!r}: give an integer of at least 1")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
    raw = read_rows(_bundled() if rows is None else rows, limit=limit)[0]
    examples = encode(raw, tokenizer, max_length=max_length)
    net = load_model(model)
    if device is not None:
        net.to(torch.device(resolve_device(str(device))))
    replies = [(row, reply) for row in raw if (reply := reference_reply(row)) is not None]
    with evaluating(net), injected(net, delta):
        loss, hits, tokens = _score(net, examples, tokenizer, batch_size, advance)
        right = None
        if generate and replies:
            answers = generate_replies(
                net,
                [row for row, _ in replies],
                tokenizer,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                advance=advance,
            )
            right = sum(
                matches(answer, reference)
                for answer, (_, reference) in zip(answers, replies, strict=True)
            )
    return Evaluation(
        exact_match=None if right is None else right / len(replies),
        next_token_loss=loss / tokens,
        token_accuracy=hits / tokens,
        examples=len(examples),
        tokens=tokens,
        answered=0 if right is None else len(replies),
    )


@contextlib.contextmanager
def injected(model: nn.Module, delta: LayerDelta | str | os.PathLike[str] | None) -> Iterator[None]:
    """Inside, ``delta`` is in the weights of ``model``; afterwards their old bits are back."""
    if delta is None:
        yield
        return
    inject(model, delta if isinstance(delta, LayerDelta) else LayerDelta.load(delta))
    try:
        yield
    finally:
        eject(model, latest=True)


def scoring_batches(examples: ExampleSet, tokenizer: Any, batch_size: int) -> Iterator[Batch]:
    """All examples in padded batches, in their own order."""
    yield from batches(examples, batch_size, pad_token_id=pad_token_id(tokenizer))


def _score(
    model: nn.Module, examples: ExampleSet, tokenizer: Any, batch_size: int, advance: Advance
) -> tuple[float, int, int]:
    """Summed loss, tokens predicted right, and tokens, over the supervised positions."""
    loss, hits, tokens = 0.0, 0, 0
    for batch in scoring_batches(examples, tokenizer, batch_size):
        hidden = supervised_hidden(model, batch)
        targets = batch.targets[batch.supervised].to(hidden.device)
        for chunk, logits in logit_chunks(model, hidden):
            loss += float(F.cross_entropy(logits, targets[chunk], reduction="sum"))
            hits += int((logits.argmax(-1) == targets[chunk]).sum())
        tokens += len(targets)
        advance(len(batch))
    return loss, hits, tokens


def _bundled() -> list[dict[str, Any]]:
    from ..demo import bundled_rows

    return list(bundled_rows("test"))
