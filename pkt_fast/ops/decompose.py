"""Recomposition from coefficients that are not linear in the activation, without the N×V tensor.

a = S_src·h/‖h‖, h̃ = S_tgtᵀ·f(a), where f is one of

softmax    softmax(a/τ)
top_k      keep the k coefficients of largest magnitude, ties at the k-th all kept
threshold  keep the coefficients with |a| >= threshold
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..errors import ConfigError, ShapeError
from ._blocks import (
    accumulation_dtype,
    check_devices,
    floor_norm,
    no_float64,
    row_blocks,
    times,
    times_transpose,
)
from ._registry import dispatch, implementation, triton_implementation

KINDS = ("softmax", "top_k", "threshold")
TEMPORARIES = 3
SPARSE_SHARE = 16
"""top_k gathers basis vectors instead of multiplying by all of them below V/16 coefficients."""


def decompose(
    hidden: Tensor,
    source_basis: Tensor,
    target_basis: Tensor,
    kind: str,
    temperature: float = 1.0,
    k: int = 1,
    threshold: float = 0.0,
) -> Tensor:
    """h̃ = S_tgtᵀ·f(S_src·h/‖h‖) with f "softmax", "top_k" or "threshold"; forward only.

    hidden (N, D_src), source_basis (V, D_src), target_basis (V, D_tgt) -> (N, D_tgt) in the dtype
    of ``hidden``.  ``temperature`` belongs to softmax, ``k`` to top_k, ``threshold`` to threshold.
    A zero row has all coefficients 0.  Memory is a bounded block of coefficients beside the output.

    Raises :class:`~pkt_fast.errors.ShapeError` for shapes that do not fit and
    :class:`~pkt_fast.errors.ConfigError` for an impossible setting.
    """
    check_devices("decompose", hidden, source_basis=source_basis, target_basis=target_basis)
    if (
        not hidden.dim() == source_basis.dim() == target_basis.dim() == 2
        or hidden.shape[1] != source_basis.shape[1]
        or source_basis.shape[0] != target_basis.shape[0]
    ):
        raise ShapeError(
            f"decompose: hidden {tuple(hidden.shape)}, source basis {tuple(source_basis.shape)}, "
            f"target basis {tuple(target_basis.shape)} must be (N, D_src), (V, D_src), (V, D_tgt)"
        )
    if kind not in KINDS:
        raise ConfigError(f"decompose: kind {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "softmax" and not temperature > 0:
        raise ConfigError(f"decompose: temperature {temperature} must be positive")
    if kind == "top_k" and not 1 <= k <= source_basis.shape[0]:
        raise ConfigError(f"decompose: k = {k} is not between 1 and {source_basis.shape[0]} labels")
    if kind == "threshold" and not threshold >= 0:
        raise ConfigError(f"decompose: threshold {threshold} is negative")
    return _decompose(
        hidden.detach(), source_basis, target_basis, kind, temperature, k, threshold
    )


@torch.library.custom_op("pkt_fast::decompose", mutates_args=())
def _decompose(
    hidden: Tensor, source_basis: Tensor, target_basis: Tensor, kind: str, temperature: float,
    k: int, threshold: float,
) -> Tensor:
    return dispatch(
        "decompose", hidden, hidden, source_basis, target_basis, kind, temperature, k, threshold
    )


@_decompose.register_fake
def _(
    hidden: Tensor, source_basis: Tensor, target_basis: Tensor, kind: str, temperature: float,
    k: int, threshold: float,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], target_basis.shape[1])


@implementation("decompose", "reference")
def _decompose_reference(
    hidden: Tensor, source_basis: Tensor, target_basis: Tensor, kind: str, temperature: float,
    k: int, threshold: float,
) -> Tensor:
    dtype = accumulation_dtype(hidden.dtype)
    return reference.decompose_nonlinear(
        hidden.to(dtype), source_basis.to(dtype), target_basis.to(dtype), kind=kind,
        temperature=temperature, k=k, threshold=threshold,
    ).to(hidden.dtype)


def _unit(hidden: Tensor) -> Tensor:
    """Rows of unit length; scaled by their largest entry first, so that no norm is out of range."""
    hidden = hidden / floor_norm(hidden.abs().amax(-1, keepdim=True))
    return hidden / floor_norm(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True))


@implementation("decompose", "native")
def _decompose_blocks(
    hidden: Tensor, source_basis: Tensor, target_basis: Tensor, kind: str, temperature: float,
    k: int, threshold: float,
) -> Tensor:
    """Blocks of rows against the whole vocabulary: each coefficient is computed once."""
    out = hidden.new_empty(hidden.shape[0], target_basis.shape[1])
    if not hidden.shape[1]:
        return out.zero_()
    dtype = accumulation_dtype(hidden.dtype)
    labels = source_basis.shape[0]
    for rows in row_blocks(len(hidden), TEMPORARIES * labels * dtype.itemsize):
        coefs = times_transpose(_unit(hidden[rows].to(dtype)), source_basis)
        if kind == "top_k":
            out[rows] = _recompose_largest(coefs, target_basis, k).to(out.dtype)
            continue
        if kind == "softmax":
            coefs = torch.softmax(coefs.div_(temperature), dim=-1)
        else:
            coefs.masked_fill_(coefs.abs() < threshold, 0)
        out[rows] = times(coefs, target_basis).to(out.dtype)
    return out


def _recompose_largest(coefs: Tensor, basis: Tensor, k: int) -> Tensor:
    """Σ over the k largest |coefs| of a row, ties included: (n, V), (V, D) -> (n, D)."""
    magnitude = coefs.abs()
    largest, index = magnitude.topk(k, dim=-1, sorted=False)
    keep = magnitude >= largest.amin(-1, keepdim=True)
    if k * SPARSE_SHARE > coefs.shape[1] or basis.dtype != coefs.dtype:
        return times(coefs.mul_(keep), basis)
    out = F.embedding_bag(index, basis, per_sample_weights=coefs.gather(1, index), mode="sum")
    tied = keep.sum(-1) > k
    if bool(tied.any()):
        out[tied] = times(coefs[tied] * keep[tied], basis)
    return out


triton_implementation("decompose", "decompose", supports=no_float64)
