"""The final hidden states of supervised positions, and logits of a few of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import Anatomy
from ..data.batches import Batch
from ..errors import ModelError, NumericsError
from ..phases import position_mask

_CHUNK_ELEMENTS = 1 << 23


@torch.no_grad()
def supervised_hidden(
    model: nn.Module, batch: Batch, positions: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """The LM head's input (N, D) at the supervised positions of ``batch``.

    ``positions``: read there instead, those of example i at index i, in order.
    """
    anatomy = Anatomy.of(model)
    device = anatomy.head.weight.device
    with anatomy.bypass_head() as head_input:
        model(**batch.to(device).model_inputs(), use_cache=False)
    if positions is None:
        return head_input.hidden[batch.supervised.to(device)]
    mask, pick = position_mask(batch, positions)
    rows = head_input.hidden[mask.to(device)]
    return rows if pick is None else rows[pick.to(device)]


@torch.no_grad()
def logit_chunks(model: nn.Module, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits (n, V) of ``hidden`` (N, D), a few rows at a time: never N×V at once.

    Raises :class:`~pkt_fast.errors.NumericsError` when a logit is NaN, and
    :class:`~pkt_fast.errors.ModelError` for a model that treats its logits in an unknown way.
    """
    anatomy = Anatomy.of(model)
    if not anatomy.head_transform().exact:
        raise ModelError(
            f"{type(model).__name__} changes its logits by neither a scale nor a softcap"
        )
    weight, bias = anatomy.head.weight, getattr(anatomy.head, "bias", None)
    rows = max(1, _CHUNK_ELEMENTS // anatomy.vocab_size)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        logits = anatomy.head_transform()(F.linear(hidden[chunk], weight, bias)).float()
        if bool(torch.isnan(logits).any()):
            raise NumericsError(f"{type(model).__name__}: the logits hold NaN; try dtype='float32'")
        yield chunk, logits


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy (N,) in nats at the supervised positions of ``batch``, row by row."""
    hidden = supervised_hidden(model, batch)
    targets = batch.targets[batch.supervised].to(hidden.device)
    losses = [
        F.cross_entropy(logits, targets[chunk], reduction="none")
        for chunk, logits in logit_chunks(model, hidden)
    ]
    return torch.cat(losses)
