"""The models' own linear layers by our matrix kernel, where it is faster than the library's.

A Transformers model multiplies with torch, and so at half of what some processors can do (see
:mod:`pkt_fast.ops._gemm`).  Inside :func:`own_products` its float32 and float64 linear layers are
our kernel's, forward and backward:

    y = x·Wᵀ + b:    ∂x = g·W,    ∂W = gᵀ·x,    ∂b = Σ g
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ._gemm import choice, product, serves
from ._registry import backend

_owning: ContextVar[bool] = ContextVar("own_products", default=False)


@contextlib.contextmanager
def own_products(wanted: bool = True) -> Iterator[None]:
    """Inside, linear layers of any model multiply with our kernel where it serves.

    That is ``F.linear`` and the ``torch.addmm`` of Transformers' Conv1D, on CPU tensors of one
    dtype, float32 or float64, for 64 rows or more; everything else runs as before.  Does nothing
    without ``wanted``, with backend "reference", and on a machine whose library is as fast.
    """
    if not wanted or backend() not in ("auto", "native") or not choice().own:
        yield
        return
    token = _owning.set(True)
    try:
        with _OwnProducts():
            yield
    finally:
        _owning.reset(token)


def owns_products() -> bool:
    """Whether linear layers multiply with our kernel here."""
    return _owning.get()


class _OwnProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not types and not kwargs:
            if func is F.linear and len(args) in (2, 3):
                x, weight, *rest = args
                bias = rest[0] if rest else None
                if _serves(x, weight, bias):
                    return _linear(x, weight, bias)
            elif func is torch.addmm and len(args) == 3:
                bias, x, weight = args
                if _addmm_is_linear(bias, x, weight) and _serves(x, weight.T, bias):
                    return _linear(x, weight.T, bias)
        return func(*args, **kwargs)


def _addmm_is_linear(bias: Any, x: Any, weight: Any) -> bool:
    """Whether addmm adds one row, as long as the product's, to every row of a product."""
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in (bias, x, weight))
        and x.dim() == weight.dim() == 2
        and bias.shape == weight.shape[1:]
    )


def _serves(x: Any, weight: Any, bias: Any) -> bool:
    """Whether x·weightᵀ + bias for x (..., K), weight (M, K) and bias (M,) is our kernel's."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype == x.dtype and tensor.layout == torch.strided for tensor in tensors)
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() >= 2
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and serves(x.flatten(0, -2), weight.T)
        and not torch.is_autocast_enabled("cpu")
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    ):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return _forward(x, weight, bias)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Its final shape from the start: a view made here could not be changed in place by the model.
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = out.view(-1, weight.shape[0])
    if bias is not None:
        rows.copy_(bias.expand_as(rows))
    product(x.flatten(0, -2), weight.T, out=rows, accumulate=bias is not None)
    return out


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    return product(left, right) if serves(left, right) else left @ right


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        ctx.shape = x.shape
        return _forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = upstream[0].flatten(0, -2)
        of_x = None if weight is None else _multiplied(gradient, weight).view(ctx.shape)
        of_weight = None if x is None else _multiplied(gradient.T, x.flatten(0, -2))
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias
