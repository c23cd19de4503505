"""Row blocks for ops whose logits never exist whole.

A block holds as many rows as fit one memory budget with all V columns.  Every logit is then
computed once: a stream over V with a running maximum would have to compute it twice, or to pay a
second gradient product, because the normaliser is only known at the end of the row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MEMORY_BUDGET = 64 << 20
SMALLEST_BLOCK = 16
CAST_ROWS = 2048


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(rows: int, row_bytes: int, budget: int | None = None) -> Iterator[slice]:
    """Slices of ``rows`` whose temporaries, ``row_bytes`` each row, stay within ``budget`` (64 MB).

    A block has at least 16 rows, so that a large vocabulary is not read once per row.
    """
    budget = MEMORY_BUDGET if budget is None else budget
    step = max(SMALLEST_BLOCK, budget // max(row_bytes, 1))
    blocks = max(1, -(-rows // step))
    step = max(1, -(-rows // blocks))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def times_transpose(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """x·matrixᵀ, (n, D) and (V, D) -> (n, V), in the dtype of ``x``; matrix is cast piecewise."""
    if out is None:
        out = x.new_empty(x.shape[0], matrix.shape[0])
    if matrix.dtype == x.dtype:
        return torch.mm(x, matrix.T, out=out)
    for start in range(0, matrix.shape[0], CAST_ROWS):
        piece = matrix[start : start + CAST_ROWS].to(x.dtype)
        torch.mm(x, piece.T, out=out[:, start : start + CAST_ROWS])
    return out


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x·matrix, (n, V) and (V, D) -> (n, D), in the dtype of ``x``; matrix is cast piecewise."""
    if matrix.dtype == x.dtype:
        return x @ matrix
    out = x.new_zeros(x.shape[0], matrix.shape[1])
    for start in range(0, matrix.shape[0], CAST_ROWS):
        piece = matrix[start : start + CAST_ROWS].to(x.dtype)
        out.addmm_(x[:, start : start + CAST_ROWS], piece)
    return out


def floor_norm(norm: Tensor) -> Tensor:
    """``norm`` with zeros replaced by one: a divisor for rows whose numerator is zero as well."""
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def no_float64(*args: object) -> bool:
    """Whether no argument of an op is a float64 tensor: the Triton kernels have no such storage."""
    return not any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
