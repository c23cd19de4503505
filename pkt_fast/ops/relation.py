"""Centred token-relation terms of packed sequences, without a Gram matrix of the whole batch.

Per sequence of T tokens, with Xc and Yc centred over its tokens and K = Xc·Xcᵀ:

    ⟨K_x, K_y⟩ = ‖Xcᵀ·Yc‖²_F        ∂/∂X = 2·K_y·Xc  = 2·Yc·(Ycᵀ·Xc)
    ‖K_x‖      = ‖Xcᵀ·Xc‖_F         ∂/∂X = 2·K_x·Xc/‖K_x‖

K is T×T and the other form D×D: the smaller one is used.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import reference
from ..errors import ShapeError
from ._blocks import accumulation_dtype, check_devices, floor_norm, no_float64
from ._native import DTYPE_CODES, native_kernel, rows_contiguous, threads_for
from ._registry import dispatch, implementation, triton_implementation


def relation(x: Tensor, y: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨K_x, K_y⟩, ‖K_x‖ and ‖K_y‖ of every sequence; differentiable in ``x``.

    x (R, D_x) and y (R, D_y) hold S sequences one after another; sequence s has rows starts[s] to
    starts[s+1]; starts (S+1,) int64 rises from 0 to R -> three (S,) in float32 (float64 for float64
    ``x``).  A sequence of fewer than two tokens gives zeros and no gradient.

    Raises :class:`~pkt_fast.errors.ShapeError` for shapes, devices or starts that do not fit.  On a
    GPU the values of ``starts`` are not checked, which would mean waiting for the device.
    """
    check_devices("relation", x, y=y, starts=starts)
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ShapeError(
            f"relation: x {tuple(x.shape)} and y {tuple(y.shape)} must be (R, D_x) and (R, D_y)"
        )
    if starts.dim() != 1 or len(starts) < 1 or starts.dtype != torch.int64:
        raise ShapeError(
            f"relation: starts must be int64 of shape (S+1,), not {starts.dtype} of "
            f"{tuple(starts.shape)}"
        )
    want_gradient = torch.is_grad_enabled() and x.requires_grad
    return _relation(x, y, starts, want_gradient)[:3]


@torch.library.custom_op("pkt_fast::relation", mutates_args=())
def _relation(
    x: Tensor, y: Tensor, starts: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch("relation", x, x, y, starts, want_gradient)


@_relation.register_fake
def _(
    x: Tensor, y: Tensor, starts: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return zero_outputs(x, starts, want_gradient)


def zero_outputs(
    x: Tensor, starts: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Zeros for inner, norm_x, norm_y (S,) and the gradients of inner and norm_x (R, D_x).

    Without ``want_gradient`` the last two have no rows.
    """
    dtype = accumulation_dtype(x.dtype)
    inner, norm_x, norm_y = (
        torch.zeros(starts.shape[0] - 1, dtype=dtype, device=x.device) for _ in range(3)
    )
    rows = x.shape[0] if want_gradient else 0
    of_inner, of_norm = (
        torch.zeros(rows, x.shape[1], dtype=dtype, device=x.device) for _ in range(2)
    )
    return inner, norm_x, norm_y, of_inner, of_norm


def _keep_row_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, starts, _ = inputs
    ctx.save_for_backward(starts, *output[3:])
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _scale_row_gradients(ctx, grad_inner, grad_norm, *_):  # type: ignore[no-untyped-def]
    starts, *gradients = ctx.saved_tensors
    total = None
    if ctx.needs_input_grad[0]:
        lengths = starts.diff()
        for grad, gradient in zip((grad_inner, grad_norm), gradients, strict=True):
            if grad is not None:
                per_row = grad.repeat_interleave(lengths, output_size=len(gradient))[:, None]
                # In place on the second: every new (R, D) array costs more than the arithmetic.
                total = gradient * per_row if total is None else total.addcmul_(gradient, per_row)
        total = None if total is None else total.to(ctx.dtype)
    return total, None, None, None


_relation.register_autograd(_scale_row_gradients, setup_context=_keep_row_gradients)


def sequences(starts: Tensor, rows: int) -> list[tuple[int, int]]:
    """The (start, end) of every sequence; ShapeError unless they rise from 0 to ``rows``."""
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ShapeError(f"relation: starts must rise from 0 to the {rows} rows, not {bounds[:8]}")
    return list(itertools.pairwise(bounds))


@implementation("relation", "reference")
def _relation_reference(
    x: Tensor, y: Tensor, starts: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = inner, norm_x, norm_y, of_inner, of_norm = zero_outputs(x, starts, want_gradient)
    for s, (start, end) in enumerate(sequences(starts, len(x))):
        if end - start < 2:
            continue
        part_x, part_y = x[start:end].to(inner.dtype), y[start:end].to(inner.dtype)
        inner[s], norm_x[s], norm_y[s] = reference.relation_terms(part_x, part_y)
        if want_gradient:
            centred = part_x - part_x.mean(0)
            of_inner[start:end] = 2 * reference.centred_gram(part_y) @ centred
            gram = reference.centred_gram(part_x)
            of_norm[start:end] = 2 * gram @ centred / floor_norm(norm_x[s])
    return outputs


def _native_takes(x: Tensor, y: Tensor, *rest: object) -> bool:
    """The dtypes of :data:`DTYPE_CODES`, in any mixture; rows of at least one element."""
    return x.dtype in DTYPE_CODES and y.dtype in DTYPE_CODES and x.shape[1] * y.shape[1] > 0


if (_native_relation := native_kernel("relation")) is not None:

    @implementation("relation", "native", supports=_native_takes)
    def _relation_native(
        x: Tensor, y: Tensor, starts: Tensor, want_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sequences(starts, len(x))
        outputs = zero_outputs(x, starts, want_gradient)
        x, y, starts = rows_contiguous(x), rows_contiguous(y), starts.contiguous()
        (x_rows, x_dim), (y_rows, y_dim) = (
            ((r.data_ptr(), DTYPE_CODES[r.dtype], r.stride(0)), r.shape[1]) for r in (x, y)
        )
        _native_relation(
            x_rows, x_dim, y_rows, y_dim, (starts.data_ptr(), len(starts)),
            outputs[0].dtype == torch.float64, *(o.data_ptr() if len(o) else 0 for o in outputs),
            threads_for(x.nbytes + y.nbytes),
        )
        return outputs


triton_implementation("relation", "relation", supports=no_float64)
