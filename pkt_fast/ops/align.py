"""Alignment: rows of a source's latent space in the target's, h̃ = M·h (÷ ‖h‖).

    y = M·x/‖x‖:    ∂x = (g̃ − x̂·(x̂·g̃))/‖x‖  with  g̃ = Mᵀ·g,      ∂M = gᵀ·x̂

On the CPU this is one GEMM.  Our own kernel, where it serves (:mod:`pkt_fast.ops._gemm`), takes the
norms of a block of rows before it packs them and divides as it stores.  Otherwise the library's
result is divided in place.  16-bit operands are multiplied as such where the CPU can (then the rows
are scaled first, or small ones would lose digits in the 16-bit product) and in float32 elsewhere,
which is several times faster there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..errors import ShapeError
from ._gemm import product, serves
from ._registry import dispatch, implementation, triton_implementation

_library = torch.library.Library("pkt_fast", "FRAGMENT")
_library.define("align_rows(Tensor hidden, Tensor matrix, bool normalize) -> Tensor")
_library.define("align_rows_grouped(Tensor[] hidden, Tensor[] matrix, bool normalize) -> Tensor[]")
_align_rows: Callable[..., Tensor] = torch.ops.pkt_fast.align_rows.default
_align_rows_grouped: Callable[..., list[Tensor]] = torch.ops.pkt_fast.align_rows_grouped.default

# Sums of squares of float32 rows with norms in this range neither overflow nor lose digits.
_SAFE_NORMS = (1e-15, 1e18)


def align_rows(hidden: Tensor, matrix: Tensor, normalize: bool = True) -> Tensor:
    """Rows of ``hidden`` (N, D_src) through ``matrix`` (D_tgt, D_src) -> (N, D_tgt).

    With ``normalize`` each row is divided by its norm first (a zero row stays zero), whatever that
    norm is: 1e-30 and 1e30 are fine.  Accumulated in float32 (float64 for float64), returned in the
    common dtype of the operands.  Differentiable in both.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes or devices do not fit.
    """
    return _align_rows(*_common_dtype(hidden, matrix), normalize)


def align_rows_grouped(
    hidden: Sequence[Tensor], matrix: Sequence[Tensor], normalize: bool = True
) -> list[Tensor]:
    """:func:`align_rows` of several layers; one launch on a GPU when their widths are equal.

    ``hidden`` [(N_g, D_src)], ``matrix`` [(D_tgt, D_src)] -> [(N_g, D_tgt)].  Not differentiable.

    Raises :class:`~pkt_fast.errors.ShapeError` as :func:`align_rows` does, and for unequal lists.
    """
    if len(hidden) != len(matrix):
        raise ShapeError(f"align_rows_grouped: {len(hidden)} hidden, but {len(matrix)} matrices")
    pairs = [_common_dtype(h, m) for h, m in zip(hidden, matrix, strict=True)]
    return _align_rows_grouped([h for h, _ in pairs], [m for _, m in pairs], normalize)


def _common_dtype(hidden: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.dtype == matrix.dtype:
        return hidden, matrix
    dtype = torch.promote_types(hidden.dtype, matrix.dtype)
    return hidden.to(dtype), matrix.to(dtype)


def _check(hidden: Tensor, matrix: Tensor) -> None:
    if hidden.dim() != 2 or matrix.dim() != 2 or hidden.shape[1] != matrix.shape[1]:
        raise ShapeError(
            f"align_rows: hidden {tuple(hidden.shape)} and matrix {tuple(matrix.shape)} must be "
            "(N, D_src) and (D_tgt, D_src)"
        )
    if hidden.dtype != matrix.dtype or not hidden.is_floating_point():
        raise ShapeError(
            f"align_rows: hidden is {hidden.dtype}, matrix {matrix.dtype}; cast them to one float "
            "dtype"
        )
    if hidden.device != matrix.device:
        raise ShapeError(f"align_rows: hidden is on {hidden.device}, matrix on {matrix.device}")


def _run(hidden: Tensor, matrix: Tensor, normalize: bool) -> Tensor:
    _check(hidden, matrix)
    return dispatch("align_rows", hidden, hidden, matrix, normalize)


def _run_grouped(
    hidden: Sequence[Tensor], matrix: Sequence[Tensor], normalize: bool
) -> list[Tensor]:
    if len(hidden) != len(matrix):
        raise ShapeError(f"align_rows_grouped: {len(hidden)} hidden, but {len(matrix)} matrices")
    for h, m in zip(hidden, matrix, strict=True):
        _check(h, m)
        if h.device != hidden[0].device:
            raise ShapeError(
                f"align_rows_grouped: groups are on {hidden[0].device} and on {h.device}"
            )
    if not hidden:
        return []
    return dispatch("align_rows_grouped", hidden[0], hidden, matrix, normalize)


def _output(hidden: Tensor, matrix: Tensor, normalize: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], matrix.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    hidden, matrix, ctx.normalize = inputs
    ctx.save_for_backward(hidden, matrix)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    hidden, matrix = ctx.saved_tensors
    unit = hidden
    if ctx.normalize:
        norms = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=torch.float64)
        inverse = torch.where(norms == 0, 0.0, 1 / norms)
        unit = (hidden * inverse).to(hidden.dtype)
    grad_hidden = grad_matrix = None
    if ctx.needs_input_grad[0]:
        grad_hidden = grad @ matrix
        if ctx.normalize:
            along = (unit.double() * grad_hidden).sum(1, keepdim=True)
            grad_hidden = ((grad_hidden - along * unit) * inverse).to(hidden.dtype)
    if ctx.needs_input_grad[1]:
        grad_matrix = grad.T @ unit
    return grad_hidden, grad_matrix, None


for _name, _kernel in (("align_rows", _run), ("align_rows_grouped", _run_grouped)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::align_rows", _output, lib=_library)
torch.library.register_fake(
    "pkt_fast::align_rows_grouped",
    lambda hidden, matrix, normalize: [
        _output(h, m, normalize) for h, m in zip(hidden, matrix, strict=True)
    ],
    lib=_library,
)
torch.library.register_autograd(
    "pkt_fast::align_rows", _backward, setup_context=_setup_context, lib=_library
)


def _each(align: Callable[[Tensor, Tensor, bool], Tensor]) -> Callable[..., list[Tensor]]:
    """The grouped implementation that serves one group after the other."""

    def grouped(
        hidden: Sequence[Tensor], matrix: Sequence[Tensor], normalize: bool
    ) -> list[Tensor]:
        return [align(h, m, normalize) for h, m in zip(hidden, matrix, strict=True)]

    return grouped


# --------------------------------------------------------------------------- reference


@implementation("align_rows", "reference")
def _align_rows_reference(hidden: Tensor, matrix: Tensor, normalize: bool) -> Tensor:
    rows = hidden.detach().double()
    rows = reference.unit_rows(rows) if normalize else rows
    return (rows @ matrix.detach().double().T).to(hidden.dtype)


implementation("align_rows_grouped", "reference")(_each(_align_rows_reference))


# --------------------------------------------------------------------------- native


def _inverse_norms(hidden: Tensor) -> Tensor:
    """1/‖h‖ (N, 1) in float64, 0 for zero rows; rows with unsafe norms are summed in float64."""
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=wide).double()
    unsafe = ~((norms > _SAFE_NORMS[0]) & (norms < _SAFE_NORMS[1]))[:, 0]
    if unsafe.any():
        norms[unsafe] = hidden[unsafe].double().norm(dim=1, keepdim=True)
    return torch.where(norms == 0, 0.0, 1 / norms)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype``."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())


@implementation("align_rows", "native")
def _align_rows_native(hidden: Tensor, matrix: Tensor, normalize: bool) -> Tensor:
    hidden, matrix, dtype = hidden.detach(), matrix.detach(), hidden.dtype
    if (dtype.itemsize > 2 or not _multiplies(dtype)) and serves(hidden, matrix.T):
        return product(hidden, matrix.T, unit_rows=normalize).to(dtype)
    inverse = _inverse_norms(hidden) if normalize else None
    if dtype.itemsize == 2 and _multiplies(dtype):
        if inverse is not None:
            hidden = (hidden.double() * inverse).to(dtype)
        return F.linear(hidden, matrix)
    if dtype.itemsize == 2:
        hidden, matrix = hidden.float(), matrix.float()
    aligned = F.linear(hidden, matrix)
    if inverse is not None:
        aligned = _scaled(aligned, inverse)
    return aligned.to(dtype)


def _scaled(aligned: Tensor, inverse: Tensor) -> Tensor:
    """Rows times ``inverse`` in place; in two steps, as 1/‖h‖ alone can exceed float32."""
    largest = torch.finfo(aligned.dtype).max
    if inverse.numel() and inverse.max() > largest:
        aligned.mul_((inverse / largest).clamp(min=1).to(aligned.dtype))
    return aligned.mul_(inverse.clamp(max=largest).to(aligned.dtype))


implementation("align_rows_grouped", "native")(_each(_align_rows_native))


# --------------------------------------------------------------------------- Triton


def _triton_takes(hidden: Tensor, matrix: Tensor, normalize: bool) -> bool:
    return hidden.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _triton_takes_grouped(
    hidden: Sequence[Tensor], matrix: Sequence[Tensor], normalize: bool
) -> bool:
    return all(_triton_takes(h, m, normalize) for h, m in zip(hidden, matrix, strict=True))


triton_implementation("align_rows", "align", supports=_triton_takes)
triton_implementation("align_rows_grouped", "align", supports=_triton_takes_grouped)
