"""Gradient × activation: Σ g·a and Σ |g·a| per example, in one pass over both tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
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
_library.define("grad_x_act(Tensor gradient, Tensor activation) -> (Tensor, Tensor)")
_grad_x_act: Callable[..., tuple[Tensor, Tensor]] = torch.ops.pkt_fast.grad_x_act.default


def grad_x_act(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g·a and Σ |g·a| over tokens and channels, per example: (B, T, D) twice -> (B,), (B,).

    In float32 (float64 when either input is).  The CPU result does not depend on the number of
    threads.  Not differentiable.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes or devices differ.
    """
    return _grad_x_act(gradient, activation)


def _run(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    if gradient.dim() != 3 or gradient.shape != activation.shape:
        raise ShapeError(
            f"grad_x_act: gradient {tuple(gradient.shape)} and activation "
            f"{tuple(activation.shape)} must both be (B, T, D)"
        )
    if gradient.device != activation.device:
        raise ShapeError(
            f"grad_x_act: gradient is on {gradient.device}, activation on {activation.device}"
        )
    if not (gradient.is_floating_point() and activation.is_floating_point()):
        raise ShapeError(
            f"grad_x_act: {gradient.dtype} and {activation.dtype} must both be float dtypes"
        )
    return dispatch("grad_x_act", gradient, gradient, activation)


def _outputs(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulator(gradient, activation)
    return (
        gradient.new_empty(gradient.shape[0], dtype=dtype),
        gradient.new_empty(gradient.shape[0], dtype=dtype),
    )


_library.impl("grad_x_act", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::grad_x_act", _outputs, lib=_library)


@implementation("grad_x_act", "reference")
def _grad_x_act_reference(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    signed, absolute = reference.gradient_times_activation(
        gradient.detach().double(), activation.detach().double()
    )
    dtype = accumulator(gradient, activation)
    return signed.to(dtype), absolute.to(dtype)


def _native_takes(gradient: Tensor, activation: Tensor) -> bool:
    """float32, bfloat16 and float16 in any mixture, or float64 twice."""
    return (
        gradient.dtype in DTYPE_CODES
        and activation.dtype in DTYPE_CODES
        and (gradient.dtype == torch.float64) == (activation.dtype == torch.float64)
    )


def _strided(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


if (_native_grad_x_act := native_kernel("grad_x_act")) is not None:

    @implementation("grad_x_act", "native", supports=_native_takes)
    def _grad_x_act_native(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        gradient, activation = rows_contiguous(gradient), rows_contiguous(activation)
        batch, tokens, dim = gradient.shape
        signed, absolute = _outputs(gradient, activation)
        item_bytes = gradient.element_size() + activation.element_size()
        _native_grad_x_act(
            signed.data_ptr(), absolute.data_ptr(), batch, tokens, dim,
            DTYPE_CODES[gradient.dtype], _strided(gradient),
            DTYPE_CODES[activation.dtype], _strided(activation),
            threads_for(gradient.numel() * item_bytes),
        )
        return signed, absolute


triton_implementation("grad_x_act", "grad_x_act", supports=up_to_32_bits)
