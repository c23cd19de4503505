"""Row losses that form logits for a few rows at a time, so that memory does not grow with N·V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGIT_BYTES = 64 * 2**20
"""Bytes of float32 logits alive at once."""

RowLoss = Callable[[Tensor, slice], Tensor]


def chunked_rows(hidden: Tensor, row_loss: RowLoss, vocabulary: int) -> Tensor:
    """``row_loss(hidden[rows], rows)`` for all rows of ``hidden`` (N, D) -> (N,), chunk by chunk.

    Differentiable in ``hidden`` alone.  The gradient of each chunk is taken while its logits are at
    hand, so nothing is computed twice and only an (N, D) gradient is kept for backward.
    """
    return _ChunkedRows.apply(hidden, row_loss, max(1, LOGIT_BYTES // (4 * vocabulary)))


class _ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row_loss: RowLoss, chunk: int) -> Tensor:
        losses, gradients = [], []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach()
            if ctx.needs_input_grad[0]:
                with torch.enable_grad():
                    loss = row_loss(part.requires_grad_(), rows)
                    gradients.append(torch.autograd.grad(loss.sum(), part)[0])
            else:
                loss = row_loss(part, rows)
            losses.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses) if losses else hidden.sum(-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None
