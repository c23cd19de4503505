"""Divergence of two output distributions from hidden states and heads, without the N×V logits.

    p = softmax(z_src/τ),  q = softmax(z_tgt/τ),  z = softcap(W·h + b)
    forward  KL(p‖q):               ∂/∂z_tgt = (q − p)/τ
    reverse  KL(q‖p):               ∂/∂z_tgt = q·(g − Σ q·g)/τ,  g = log q − log p
    jsd      ½KL(p‖m) + ½KL(q‖m):   ∂/∂z_tgt = q·(g − Σ q·g)/τ,  g = ½(log q − log m),  m = (p+q)/2

∂/∂h_tgt = Σ_v (∂/∂z_v)·softcap′(z_v)·w_v is taken in the same pass as the value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..errors import ConfigError, ShapeError
from ._blocks import (
    accumulation_dtype,
    check_devices,
    differentiable_by_row,
    empty_outputs,
    no_float64,
    row_blocks,
    times,
    times_transpose,
)
from ._registry import dispatch, implementation, triton_implementation

KINDS = ("forward", "reverse", "jsd")
TEMPORARIES = 4


def linear_kl(
    target_hidden: Tensor,
    target_head: Tensor,
    source_hidden: Tensor,
    source_head: Tensor,
    target_bias: Tensor | None = None,
    source_bias: Tensor | None = None,
    target_softcap: float = 0.0,
    source_softcap: float = 0.0,
    temperature: float = 1.0,
    kind: str = "forward",
) -> Tensor:
    """Divergence between source and target output distributions per row.

    target_hidden (N, D_t), target_head (V, D_t), source_hidden (N, D_s), source_head (V, D_s),
    biases (V,) or None -> (N,) in float32 (float64 for float64 ``target_hidden``).  ``kind``:
    "forward" KL(p‖q), "reverse" KL(q‖p) or "jsd", with source p and target q at ``temperature``;
    no τ² factor.  A softcap of 0 means none.  Differentiable in ``target_hidden`` only.  Row v of
    both heads must be the same label.  Memory is a bounded block of logits beside the inputs.

    Raises :class:`~pkt_fast.errors.ShapeError` for shapes that do not fit and
    :class:`~pkt_fast.errors.ConfigError` for an impossible setting.
    """
    check_devices(
        "linear_kl", target_hidden, target_head=target_head, source_hidden=source_hidden,
        source_head=source_head, target_bias=target_bias, source_bias=source_bias,
    )  # fmt: skip
    _check(target_hidden, target_head, target_bias, "target")
    _check(source_hidden, source_head, source_bias, "source")
    if len(target_hidden) != len(source_hidden) or len(target_head) != len(source_head):
        raise ShapeError(
            f"linear_kl: {len(target_hidden)} target and {len(source_hidden)} source rows, "
            f"{len(target_head)} and {len(source_head)} labels; both pairs must be equal "
            "(select the shared labels first)"
        )
    if kind not in KINDS:
        raise ConfigError(f"linear_kl: kind {kind!r}; choose one of {', '.join(KINDS)}")
    if not temperature > 0 or target_softcap < 0 or source_softcap < 0:
        raise ConfigError(
            f"linear_kl: temperature {temperature} must be positive, softcaps "
            f"{target_softcap} and {source_softcap} not negative"
        )
    want_gradient = torch.is_grad_enabled() and target_hidden.requires_grad
    return _linear_kl(
        target_hidden, target_head, source_hidden, source_head, target_bias, source_bias,
        target_softcap, source_softcap, temperature, kind, want_gradient,
    )[0]


def _check(hidden: Tensor, head: Tensor, bias: Tensor | None, side: str) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ShapeError(
            f"linear_kl: {side} hidden {tuple(hidden.shape)} and head {tuple(head.shape)} must be "
            "(N, D) and (V, D)"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ShapeError(
            f"linear_kl: {side} bias {tuple(bias.shape)} does not fit {head.shape[0]} labels"
        )


@torch.library.custom_op("pkt_fast::linear_kl", mutates_args=())
def _linear_kl(
    target_hidden: Tensor, target_head: Tensor, source_hidden: Tensor, source_head: Tensor,
    target_bias: Tensor | None, source_bias: Tensor | None, target_softcap: float,
    source_softcap: float, temperature: float, kind: str, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return dispatch(
        "linear_kl", target_hidden,
        target_hidden, target_head, source_hidden, source_head, target_bias, source_bias,
        target_softcap, source_softcap, temperature, kind, want_gradient,
    )


@_linear_kl.register_fake
def _(
    target_hidden: Tensor, target_head: Tensor, source_hidden: Tensor, source_head: Tensor,
    target_bias: Tensor | None, source_bias: Tensor | None, target_softcap: float,
    source_softcap: float, temperature: float, kind: str, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return empty_outputs(target_hidden, want_gradient)


differentiable_by_row(_linear_kl)


def _scaled_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float, temperature: float
) -> Tensor:
    """softcap(W·h + b)/τ, (n, D) -> (n, V)."""
    logits = times_transpose(hidden, head)
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap:
        return logits.div_(softcap).tanh_().mul_(softcap / temperature)
    return logits.div_(temperature) if temperature != 1 else logits


def _divergence(log_p: Tensor, log_q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Per row of (n, V): the divergence (n,) and its gradient (n, V) with respect to z_tgt/τ.

    ``log_p`` is overwritten.
    """
    q = log_q.exp()
    if kind == "forward":
        p = log_p.exp()
        return torch.linalg.vecdot(p, log_p.sub_(log_q)), q.sub_(p)
    if kind == "reverse":
        g = log_p.sub_(log_q).neg_()
        value = torch.linalg.vecdot(q, g)
        return value, g.sub_(value[:, None]).mul_(q)
    p = log_p.exp()
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    of_p = torch.linalg.vecdot(p, log_p.sub_(log_m))
    g = torch.sub(log_q, log_m, out=log_m)
    of_q = torch.linalg.vecdot(q, g)
    return (of_p + of_q) / 2, g.sub_(of_q[:, None]).mul_(q).mul_(0.5)


@implementation("linear_kl", "reference")
def _linear_kl_reference(
    target_hidden: Tensor, target_head: Tensor, source_hidden: Tensor, source_head: Tensor,
    target_bias: Tensor | None, source_bias: Tensor | None, target_softcap: float,
    source_softcap: float, temperature: float, kind: str, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """All logits at once; the gradient is written beside its equation."""
    dtype = accumulation_dtype(target_hidden.dtype)
    h, w, h_s, w_s = (
        x.to(dtype) for x in (target_hidden, target_head, source_hidden, source_head)
    )
    b, b_s = (None if x is None else x.to(dtype) for x in (target_bias, source_bias))
    values = reference.linear_kl(
        h, w, h_s, w_s, target_bias=b, source_bias=b_s, target_softcap=target_softcap,
        source_softcap=source_softcap, temperature=temperature, kind=kind,
    )
    gradient = target_hidden.new_empty(0, target_hidden.shape[1])
    if want_gradient:
        logits = reference.head_logits(h, w, b, target_softcap)
        log_q = torch.log_softmax(logits / temperature, dim=-1)
        source_logits = reference.head_logits(h_s, w_s, b_s, source_softcap)
        log_p = torch.log_softmax(source_logits / temperature, dim=-1)
        q = log_q.exp()
        if kind == "forward":
            slope = q - log_p.exp()
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            g = log_q - log_p if kind == "reverse" else (log_q - log_m) / 2
            slope = q * (g - (q * g).sum(-1, keepdim=True))
        if target_softcap:
            slope = slope * (1 - (logits / target_softcap) ** 2)
        gradient = (slope @ w / temperature).to(target_hidden.dtype)
    return values, gradient


@implementation("linear_kl", "native")
def _linear_kl_blocks(
    target_hidden: Tensor, target_head: Tensor, source_hidden: Tensor, source_head: Tensor,
    target_bias: Tensor | None, source_bias: Tensor | None, target_softcap: float,
    source_softcap: float, temperature: float, kind: str, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Blocks of rows: two products for the logits, one for the gradient, nothing computed twice."""
    values, gradient = empty_outputs(target_hidden, want_gradient)
    row_bytes = TEMPORARIES * target_head.shape[0] * values.element_size()
    for rows in row_blocks(len(values), row_bytes):
        log_p = torch.log_softmax(
            _scaled_logits(
                source_hidden[rows].to(values.dtype), source_head, source_bias, source_softcap,
                temperature,
            ),
            dim=-1,
        )
        logits = _scaled_logits(
            target_hidden[rows].to(values.dtype), target_head, target_bias, target_softcap,
            temperature,
        )
        values[rows], slope = _divergence(log_p, torch.log_softmax(logits, dim=-1), kind)
        if not want_gradient:
            continue
        if target_softcap:
            tanh = logits.mul_(temperature / target_softcap)
            slope *= tanh.square_().neg_().add_(1)
        product = times(slope, target_head)
        gradient[rows] = product.div_(temperature).to(gradient.dtype)
    return values, gradient


triton_implementation("linear_kl", "linear_kl", supports=no_float64)
