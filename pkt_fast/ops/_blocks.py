"""Row blocks for ops whose logits never exist whole.

A block holds as many rows as fit one memory budget with all V columns.  Every logit is then
computed once: a stream over V with a running maximum would have to compute it twice, or to pay a
second gradient product, because the normaliser is only known at the end of the row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ..errors import ShapeError
from ._gemm import Part, product, serves

MEMORY_BUDGET = 64 << 20
SMALLEST_BLOCK = 16
CAST_ROWS = 2048
SMALLEST_PANEL, LARGEST_PANEL = 128, 512


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(hidden: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """Unset values (N,) and row gradients (N, D), or (0, D) when none are wanted."""
    rows, size = hidden.shape
    values = torch.empty(rows, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    return values, hidden.new_empty(rows if want_gradient else 0, size)


def differentiable_by_row(op: CustomOpDef) -> None:
    """Register the autograd of an op whose outputs are those of :func:`empty_outputs`.

    It is differentiable in its first argument: row n's value depends on row n alone, whose gradient
    the forward pass took while the logits were at hand.
    """
    op.register_autograd(_scale_row_gradient, setup_context=_keep_row_gradient)


def _keep_row_gradient(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.others = len(inputs) - 1
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _scale_row_gradient(ctx, grad_values, _):  # type: ignore[no-untyped-def]
    (gradient,) = ctx.saved_tensors
    grad_hidden = None
    if grad_values is not None and ctx.needs_input_grad[0]:
        grad_hidden = (grad_values[:, None] * gradient).to(gradient.dtype)
    return (grad_hidden, *([None] * ctx.others))


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


def times_transpose(x: Tensor, matrix: Tensor) -> Tensor:
    """x·matrixᵀ, (n, D) and (V, D) -> (n, V), in the dtype of ``x``; matrix is cast piecewise."""
    out = x.new_empty(x.shape[0], matrix.shape[0])
    if _ours(x, matrix.T):
        return product(x, matrix.T, out=out)
    if matrix.dtype == x.dtype:
        return torch.mm(x, matrix.T, out=out)
    for start in range(0, matrix.shape[0], CAST_ROWS):
        piece = matrix[start : start + CAST_ROWS].to(x.dtype)
        torch.mm(x, piece.T, out=out[:, start : start + CAST_ROWS])
    return out


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x·matrix, (n, V) and (V, D) -> (n, D), in the dtype of ``x``; matrix is cast piecewise."""
    if _ours(x, matrix):
        return product(x, matrix)
    if matrix.dtype == x.dtype:
        return x @ matrix
    out = x.new_zeros(x.shape[0], matrix.shape[1])
    for start in range(0, matrix.shape[0], CAST_ROWS):
        piece = matrix[start : start + CAST_ROWS].to(x.dtype)
        out.addmm_(x[:, start : start + CAST_ROWS], piece)
    return out


def _ours(x: Tensor, right: Tensor) -> bool:
    """Whether our kernel multiplies x·right and the result has the dtype of ``x``, as it must."""
    return x.dtype.itemsize >= right.dtype.itemsize and x.dtype.itemsize > 2 and serves(x, right)


def upper_times(x: Tensor, factor: Tensor, *, transposed: bool) -> Tensor:
    """x·factor, or x·factorᵀ when ``transposed``, skipping the zeros below the diagonal of factor.

    Our own kernel skips all of them.  Library products go by panels of a quarter of the columns,
    5/8 of the full product; narrower ones cost more in small products than they save.
    """
    right = factor.T if transposed else factor
    if _ours(x, right):
        part: Part = "lower" if transposed else "upper"
        return product(x, right, part=part)
    size = factor.shape[0]
    panel = min(max(size // 4, SMALLEST_PANEL), LARGEST_PANEL)
    if size <= 2 * panel:
        return x @ right
    out = torch.empty_like(x)
    for start in range(0, size, panel):
        end = min(start + panel, size)
        if transposed:
            torch.mm(x[:, start:], factor[start:end, start:].T, out=out[:, start:end])
        else:
            torch.mm(x[:, :end], factor[:end, start:end], out=out[:, start:end])
    return out


def check_devices(op: str, like: Tensor, **others: Tensor | None) -> None:
    """Raise ShapeError unless every tensor that is given is on the device of ``like``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ShapeError(
                f"{op}: {name} is on {tensor.device}, the rows are on {like.device}; move one"
            )


def floor_norm(norm: Tensor) -> Tensor:
    """``norm`` with zeros replaced by one: a divisor for rows whose numerator is zero as well."""
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def no_float64(*args: object) -> bool:
    """Whether no argument of an op is a float64 tensor: the Triton kernels have no such storage."""
    return not any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
