"""Row cosine: cos(x_n, y_n) for every row, its gradients weighted as they are formed.

    c = x·y / (‖x‖‖y‖),    ∂c/∂x = (y/‖y‖ − c·x/‖x‖) / ‖x‖,    0 for both where a row is zero

The forward pass reads both operands once and writes N numbers.  The backward pass reads them once
more, forms the row's cosine again while the row is at hand, and writes each gradient once, already
multiplied by the row's incoming gradient.  Keeping ∂c/∂x from the forward pass would move as many
bytes (the scaling reads and writes it) and hold an N×D array for the whole backward pass.  Where
the row weights of the loss are known beforehand, :func:`row_cosine_gradient` is the one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ._native import (
    DTYPE_CODES,
    accumulator,
    native_kernel,
    rows_contiguous,
    threads_for,
    up_to_32_bits,
)
from ._registry import dispatch, implementation, triton_implementation

_library = torch.library.Library("pkt_fast", "FRAGMENT")
_library.define("row_cosine(Tensor x, Tensor y) -> Tensor")
_library.define(
    "row_cosine_gradient(Tensor x, Tensor y, Tensor weight, bool grad_x, bool grad_y) "
    "-> (Tensor, Tensor, Tensor)"
)
_row_cosine: Callable[..., Tensor] = torch.ops.pkt_fast.row_cosine.default
_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.pkt_fast.row_cosine_gradient.default
)


def row_cosine(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_n, y_n) for every row of x and y (N, D) -> (N,); differentiable once in both.

    In float32 (float64 when either input is); the inputs' dtypes may differ.  A row whose x or y is
    zero has cosine 0 and no gradient.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes or devices differ.
    """
    return _row_cosine(x, y)


def row_cosine_gradient(
    x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines c (N,) and the gradients of Σ weight_n·c_n in x and y, from one pass over both.

    weight (N,) in the dtype of the cosines; gradients (N, D) in the operands' dtypes, saturated at
    their largest values, and (0,) where not wanted.  Not differentiable.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes, dtypes or devices do not fit.
    """
    return _gradient(x, y, weight, grad_x, grad_y)


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or x.shape != y.shape:
        raise ShapeError(
            f"row_cosine: x {tuple(x.shape)} and y {tuple(y.shape)} must both be (N, D)"
        )
    if x.device != y.device:
        raise ShapeError(f"row_cosine: x is on {x.device}, y on {y.device}")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ShapeError(f"row_cosine: {x.dtype} and {y.dtype} must both be float dtypes")


def _run(x: Tensor, y: Tensor) -> Tensor:
    _check(x, y)
    return dispatch("row_cosine", x, x, y)


def _run_gradient(
    x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, y)
    wanted = (x.shape[:1], accumulator(x, y), x.device)
    if (weight.shape, weight.dtype, weight.device) != wanted:
        raise ShapeError(
            f"row_cosine_gradient: weight is {weight.dtype} {tuple(weight.shape)} on "
            f"{weight.device}; expected {wanted[1]} ({len(x)},) on {x.device}"
        )
    return dispatch("row_cosine_gradient", x, x, y, weight, grad_x, grad_y)


def _output(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, y))


def _outputs(
    x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _output(x, y),
        x.new_empty(x.shape if grad_x else (0,)),
        y.new_empty(y.shape if grad_y else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_y = ctx.needs_input_grad
    _, dx, dy = _gradient(*ctx.saved_tensors, grad, grad_x, grad_y)
    return dx if grad_x else None, dy if grad_y else None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("row_cosine has no second derivative")


_library.impl("row_cosine", _run, "CompositeExplicitAutograd")
_library.impl("row_cosine_gradient", _run_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::row_cosine", _output, lib=_library)
torch.library.register_fake("pkt_fast::row_cosine_gradient", _outputs, lib=_library)
torch.library.register_autograd(
    "pkt_fast::row_cosine", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "pkt_fast::row_cosine_gradient", _no_second_derivative, lib=_library
)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 (zero rows stay zero) and their inverse lengths, in float64."""
    norm = rows.double().norm(dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return rows.double() * inverse, inverse


@implementation("row_cosine", "reference")
def _row_cosine_reference(x: Tensor, y: Tensor) -> Tensor:
    return (_unit_rows(x)[0] * _unit_rows(y)[0]).sum(-1).to(accumulator(x, y))


@implementation("row_cosine_gradient", "reference")
def _gradient_reference(
    x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (unit_x, inverse_x), (unit_y, inverse_y) = _unit_rows(x), _unit_rows(y)
    cosines = (unit_x * unit_y).sum(-1)

    def gradient(unit: Tensor, other: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        exact = weight.double()[:, None] * ((other - cosines[:, None] * unit) * inverse)
        limit = torch.finfo(dtype).max
        zero_other = (other == 0).all(-1, keepdim=True)
        return exact.clamp(-limit, limit).masked_fill(zero_other, 0).to(dtype)

    return (
        cosines.to(weight.dtype),
        gradient(unit_x, unit_y, inverse_x, x.dtype) if grad_x else x.new_empty(0),
        gradient(unit_y, unit_x, inverse_y, y.dtype) if grad_y else y.new_empty(0),
    )


def _native_takes(x: Tensor, y: Tensor, *rest: Any) -> bool:
    """float32, bfloat16 and float16 in any mixture, or float64 twice."""
    return (
        x.dtype in DTYPE_CODES
        and y.dtype in DTYPE_CODES
        and (x.dtype == torch.float64) == (y.dtype == torch.float64)
    )


def _described(x: Tensor) -> tuple[int, int, int]:
    """``pkt::Rows``."""
    return x.data_ptr(), DTYPE_CODES[x.dtype], x.stride(0)


if (_native_row_cosine := native_kernel("row_cosine")) is not None:

    @implementation("row_cosine", "native", supports=_native_takes)
    def _row_cosine_native(x: Tensor, y: Tensor) -> Tensor:
        cosines = _output(x, y)
        x, y = rows_contiguous(x), rows_contiguous(y)
        _native_row_cosine(
            *x.shape, _described(x), _described(y), cosines.data_ptr(), 0, 0, 0, 0,
            threads_for(x.nbytes + y.nbytes),
        )
        return cosines

    @implementation("row_cosine_gradient", "native", supports=_native_takes)
    def _gradient_native(
        x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        cosines, dx, dy = _outputs(x, y, weight, grad_x, grad_y)
        x, y = rows_contiguous(x), rows_contiguous(y)
        _native_row_cosine(
            *x.shape, _described(x), _described(y), cosines.data_ptr(),
            weight.data_ptr(), weight.stride(0),
            dx.data_ptr() if grad_x else 0, dy.data_ptr() if grad_y else 0,
            threads_for(x.nbytes + y.nbytes + dx.nbytes + dy.nbytes),
        )
        return cosines, dx, dy


triton_implementation("row_cosine", "row_cosine", supports=up_to_32_bits)
triton_implementation("row_cosine_gradient", "row_cosine", supports=up_to_32_bits)
