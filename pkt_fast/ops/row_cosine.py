"""Row cosine: cos(x_n, y_n) for every row, its gradients computed in the same pass.

    c = x·y / (‖x‖‖y‖),    ∂c/∂x = (y/‖y‖ − c·x/‖x‖) / ‖x‖,    0 for both where a row is zero

The op ``row_cosine_with_grad`` returns the cosines together with the unscaled gradients of the
operands that need one; its backward only multiplies them by the incoming gradient of each row.
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
_library.define(
    "row_cosine_with_grad(Tensor x, Tensor y, bool grad_x, bool grad_y) -> (Tensor, Tensor, Tensor)"
)
_with_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.pkt_fast.row_cosine_with_grad.default
)


def row_cosine(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_n, y_n) for every row of x and y (N, D) -> (N,); differentiable in both.

    In float32 (float64 when either input is); the inputs' dtypes may differ.  A row whose x or y is
    zero has cosine 0 and no gradient.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes or devices differ.
    """
    wanted = torch.is_grad_enabled()
    return _with_grad(x, y, wanted and x.requires_grad, wanted and y.requires_grad)[0]


def row_cosine_with_grad(
    x: Tensor, y: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (N,), ∂c/∂x and ∂c/∂y (N, D) in the operands' dtypes; (0,) where not wanted."""
    return _with_grad(x, y, grad_x, grad_y)


def _run(x: Tensor, y: Tensor, grad_x: bool, grad_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or x.shape != y.shape:
        raise ShapeError(
            f"row_cosine: x {tuple(x.shape)} and y {tuple(y.shape)} must both be (N, D)"
        )
    if x.device != y.device:
        raise ShapeError(f"row_cosine: x is on {x.device}, y on {y.device}")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ShapeError(f"row_cosine: {x.dtype} and {y.dtype} must both be float dtypes")
    return dispatch("row_cosine_with_grad", x, x, y, grad_x, grad_y)


def _outputs(x: Tensor, y: Tensor, grad_x: bool, grad_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=accumulator(x, y)),
        x.new_empty(x.shape if grad_x else (0,)),
        y.new_empty(y.shape if grad_y else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    scaled = [
        (grad[:, None] * saved).to(saved.dtype) if wanted else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    ]
    return *scaled, None, None


_library.impl("row_cosine_with_grad", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::row_cosine_with_grad", _outputs, lib=_library)
torch.library.register_autograd(
    "pkt_fast::row_cosine_with_grad", _backward, setup_context=_setup_context, lib=_library
)


@implementation("row_cosine_with_grad", "reference")
def _row_cosine_reference(
    x: Tensor, y: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def inverse_norm(rows: Tensor) -> Tensor:
        norm = rows.norm(dim=-1, keepdim=True)
        return torch.where(norm > 0, 1 / norm, 0.0)

    def gradient(unit: Tensor, other: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        exact = (other - cosines[:, None] * unit) * inverse
        if dtype != torch.float64:
            limit = torch.finfo(dtype).max
            exact = exact.clamp(-limit, limit)
        zero_other = (other == 0).all(-1, keepdim=True)
        return exact.masked_fill(zero_other, 0).to(dtype)

    inverse_x, inverse_y = inverse_norm(x.double()), inverse_norm(y.double())
    unit_x, unit_y = x.double() * inverse_x, y.double() * inverse_y
    cosines = (unit_x * unit_y).sum(-1)
    return (
        cosines.to(accumulator(x, y)),
        gradient(unit_x, unit_y, inverse_x, x.dtype) if grad_x else x.new_empty(0),
        gradient(unit_y, unit_x, inverse_y, y.dtype) if grad_y else y.new_empty(0),
    )


def _native_takes(x: Tensor, y: Tensor, grad_x: bool, grad_y: bool) -> bool:
    """float32, bfloat16 and float16 in any mixture, or float64 twice."""
    return (
        x.dtype in DTYPE_CODES
        and y.dtype in DTYPE_CODES
        and (x.dtype == torch.float64) == (y.dtype == torch.float64)
    )


if (_native_row_cosine := native_kernel("row_cosine")) is not None:

    @implementation("row_cosine_with_grad", "native", supports=_native_takes)
    def _row_cosine_native(
        x: Tensor, y: Tensor, grad_x: bool, grad_y: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        cosines, dx, dy = _outputs(x, y, grad_x, grad_y)
        x, y = rows_contiguous(x), rows_contiguous(y)
        rows, dim = x.shape
        item_bytes = x.element_size() * (1 + grad_x) + y.element_size() * (1 + grad_y)
        _native_row_cosine(
            cosines.data_ptr(), rows, dim,
            x.data_ptr(), DTYPE_CODES[x.dtype], x.stride(0),
            y.data_ptr(), DTYPE_CODES[y.dtype], y.stride(0),
            dx.data_ptr() if grad_x else 0, dy.data_ptr() if grad_y else 0,
            threads_for(rows * dim * item_bytes),
        )
        return cosines, dx, dy


triton_implementation("row_cosine_with_grad", "row_cosine", supports=up_to_32_bits)
