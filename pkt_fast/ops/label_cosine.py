"""Output loss: the cosine between a row's logits and its label, without the logits.

    cos(z, t) = z·t / (‖z‖ ‖t‖),    z = W·h + b,    t = (1−ε)·onehot(y) + ε/V
    z·t       = (1−ε)·(w_y·h + b_y) + ε/V·(1ᵀW·h + 1ᵀb)
    ‖z‖²      = ‖R·h + c‖² + rest               (R, c, rest: :func:`pkt_fast.heads.head_statistics`)
    ∂cos/∂h   = Wᵀt / (‖z‖ ‖t‖) − cos·Rᵀ(R·h + c) / ‖z‖²

R is upper triangular, so both D×D products cost half a GEMM.  Each row is scaled by its largest
entry before anything is squared: no finite row overflows or vanishes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..errors import ConfigError, DataError, ShapeError
from ._blocks import (
    accumulation_dtype,
    check_devices,
    differentiable_by_row,
    empty_outputs,
    floor_norm,
    no_float64,
    row_blocks,
    times,
    times_transpose,
    upper_times,
)
from ._registry import dispatch, implementation, triton_implementation

IGNORE_INDEX = reference.IGNORE_INDEX
LABEL_BLOCK_BYTES = 4 << 20


# --------------------------------------------------------------------------- linear heads


def label_cosine(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    shift: Tensor,
    rest: float,
    label_sum: Tensor,
    bias_sum: float,
    smoothing: float = 0.0,
) -> Tensor:
    """cos(W·h + b, (1−ε)·onehot(y) + ε/V) per row; differentiable in ``hidden``.

    hidden (N, D), labels (N,) integers, weight (V, D), bias (V,) or None, and the head's
    statistics: factor (D, D) upper triangular, shift (D,), rest, label_sum (D,), bias_sum ->
    cosines (N,) in float32 (float64 for float64 ``hidden``).  Rows whose label is −100, and rows
    whose logits are all zero, give 0 and no gradient.  Time O(N·D²), memory O(N·D); V never meets
    the rows.

    Raises :class:`~pkt_fast.errors.DataError` for any other label outside [0, V).  A GPU would have
    to be waited for to say so; there such a row gives NaN.
    """
    _check(hidden, labels, weight, bias, smoothing)
    check_devices("label_cosine", hidden, factor=factor, shift=shift, label_sum=label_sum)
    size = weight.shape[1]
    if factor.shape != (size, size) or shift.shape != (size,) or label_sum.shape != (size,):
        raise ShapeError(
            f"label_cosine: statistics of shapes {tuple(factor.shape)}, {tuple(shift.shape)}, "
            f"{tuple(label_sum.shape)} do not fit a head of width {size}; use head_statistics()"
        )
    want_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return _label_cosine(
        hidden, labels, weight, bias, factor, shift, rest, label_sum, bias_sum, smoothing,
        want_gradient,
    )[0]


def _check(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float
) -> None:
    check_devices("label_cosine", hidden, labels=labels, weight=weight, bias=bias)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"label_cosine: hidden {tuple(hidden.shape)} and head {tuple(weight.shape)} must be "
            "(N, D) and (V, D)"
        )
    if weight.shape[0] == 0:
        raise ShapeError(f"label_cosine: a head {tuple(weight.shape)} has no labels")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ShapeError(
            f"label_cosine: labels must be {hidden.shape[0]} integers, "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"label_cosine: bias {tuple(bias.shape)} does not fit {weight.shape[0]} labels"
        )
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"label_cosine: smoothing {smoothing} is not in [0, 1)")


def check_labels(labels: Tensor, size: int) -> None:
    """Raise DataError for a label that is neither −100 nor in [0, ``size``); CPU tensors only."""
    wrong = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= size)
    if bool(wrong.any()):
        raise DataError(
            f"label {labels[wrong][0].item()} is outside the head's {size} labels "
            f"(and is not {IGNORE_INDEX}); check that tokenizer and model fit"
        )


def target_norm(smoothing: float, size: int) -> float:
    """‖t‖ of t = (1−ε)·onehot + ε/V."""
    keep = 1.0 - smoothing
    return (keep**2 + (2 * keep * smoothing + smoothing**2) / size) ** 0.5


@torch.library.custom_op("pkt_fast::label_cosine", mutates_args=())
def _label_cosine(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    shift: Tensor,
    rest: float,
    label_sum: Tensor,
    bias_sum: float,
    smoothing: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return dispatch(
        "label_cosine", hidden,
        hidden, labels, weight, bias, factor, shift, rest, label_sum, bias_sum, smoothing,
        want_gradient,
    )


@_label_cosine.register_fake
def _(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor,
    shift: Tensor, rest: float, label_sum: Tensor, bias_sum: float, smoothing: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return empty_outputs(hidden, want_gradient)


differentiable_by_row(_label_cosine)


@implementation("label_cosine", "reference")
def _label_cosine_reference(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor,
    shift: Tensor, rest: float, label_sum: Tensor, bias_sum: float, smoothing: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The N×V logits, from ``weight`` and ``bias`` alone."""
    return _materialised(hidden, labels, weight, bias, smoothing, 0.0, want_gradient)


def _materialised(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float,
    softcap: float, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    if hidden.device.type == "cpu":
        check_labels(labels, weight.shape[0])
    dtype = accumulation_dtype(hidden.dtype)
    h, w = hidden.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    cosines = reference.label_cosine_rows(
        h, w, labels, bias=b, label_smoothing=smoothing, softcap=softcap
    )
    gradient = hidden.new_empty(0, hidden.shape[1])
    if want_gradient:
        logits = reference.head_logits(h, w, b, softcap)
        slope = _logit_gradient(logits, cosines, logits.norm(dim=-1), labels, smoothing)
        if softcap:
            slope *= 1 - (logits / softcap) ** 2
        gradient = (slope @ w).to(hidden.dtype)
    return cosines, gradient


def _logit_gradient(
    logits: Tensor, cosines: Tensor, norm: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """∂cos/∂z (n, V) = t/(‖z‖ ‖t‖) − cos·z/‖z‖²; zero for ignored rows and zero logits."""
    size = logits.shape[1]
    live = (labels != IGNORE_INDEX) & (norm > 0)
    norm = floor_norm(norm)
    of_target = live / (norm * target_norm(smoothing, size))
    slope = logits * (-cosines * live / norm / norm)[:, None]
    slope += (of_target * (smoothing / size))[:, None]
    index = labels.clamp_min(0)[:, None].long()
    return slope.scatter_add_(1, index, ((1 - smoothing) * of_target)[:, None])


@implementation("label_cosine", "native")
def _label_cosine_blocks(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor,
    shift: Tensor, rest: float, label_sum: Tensor, bias_sum: float, smoothing: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Two triangular products per block of rows, everything else while the block is in cache."""
    check_labels(labels, weight.shape[0])
    cosines, gradient = empty_outputs(hidden, want_gradient)
    dtype, (size, width) = cosines.dtype, weight.shape
    factor, shift, label_sum = factor.to(dtype), shift.to(dtype), label_sum.to(dtype)
    keep, share = 1.0 - smoothing, smoothing / size
    norm_t = target_norm(smoothing, size)
    for rows in row_blocks(len(hidden), width * cosines.element_size(), LABEL_BLOCK_BYTES):
        label = labels[rows]
        index = label.clamp_min(0)
        h = hidden[rows].to(dtype)
        scale = floor_norm(torch.linalg.vector_norm(h, math.inf, dim=-1))
        if bias is not None:
            scale = scale.clamp_min(1.0)
        inverse = 1 / scale
        h = h * inverse[:, None]
        y = upper_times(h, factor, transposed=True)
        w = weight[index].to(dtype)
        dot = torch.linalg.vecdot(w, h)
        if bias is not None:
            y.addcmul_(inverse[:, None], shift)
            dot += bias[index].to(dtype) * inverse
        dot *= keep
        if smoothing:
            dot += share * (h @ label_sum + bias_sum * inverse)
        square = torch.linalg.vecdot(y, y) + rest * inverse * inverse
        live = (label != IGNORE_INDEX) & (square > 0)
        inverse_norm = live / floor_norm(square).sqrt()
        cosine = torch.mul(dot / norm_t, inverse_norm, out=cosines[rows])
        if want_gradient:
            y *= (-cosine * inverse_norm * inverse_norm * inverse)[:, None]
            of_target = inverse_norm * inverse / norm_t
            slope = upper_times(y, factor, transposed=False)
            slope.addcmul_(w, (keep * of_target)[:, None])
            if smoothing:
                slope.addcmul_((share * of_target)[:, None], label_sum)
            gradient[rows] = slope.to(gradient.dtype)
    return cosines, gradient


triton_implementation("label_cosine", "label_cosine", supports=no_float64)


# --------------------------------------------------------------------------- softcapped heads


def label_cosine_chunked(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """cos(softcap(W·h + b), (1−ε)·onehot(y) + ε/V) per row, exact for softcapped heads.

    hidden (N, D), labels (N,), weight (V, D), bias (V,) or None -> cosines (N,).  softcap(z) =
    c·tanh(z/c), or z for c = 0.  Differentiable in ``hidden``, ``weight`` and ``bias``.  The logits
    exist for a bounded block of rows at a time; the gradient of ``hidden`` is taken in the same
    block, those of ``weight`` and ``bias`` compute the block again.

    Raises :class:`~pkt_fast.errors.DataError` for labels outside [0, V) other than −100.
    """
    _check(hidden, labels, weight, bias, smoothing)
    if softcap < 0:
        raise ConfigError(f"label_cosine_chunked: softcap {softcap} is negative; 0 means none")
    want_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return _label_cosine_chunked(
        hidden, labels, weight, bias, smoothing, softcap, want_gradient
    )[0]


@torch.library.custom_op("pkt_fast::label_cosine_chunked", mutates_args=())
def _label_cosine_chunked(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float,
    softcap: float, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return dispatch(
        "label_cosine_chunked", hidden,
        hidden, labels, weight, bias, smoothing, softcap, want_gradient,
    )


@_label_cosine_chunked.register_fake
def _(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float,
    softcap: float, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return empty_outputs(hidden, want_gradient)


@torch.library.custom_op("pkt_fast::label_cosine_head_gradient", mutates_args=())
def _head_gradient(
    grad_cosines: Tensor, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None,
    smoothing: float, softcap: float,
) -> tuple[Tensor, Tensor]:
    """Gradients (V, D) and (V,) of Σ grad_cosines·cosines with respect to weight and bias."""
    dtype = accumulation_dtype(hidden.dtype)
    of_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    of_bias = of_weight.new_zeros(weight.shape[0])
    for rows in row_blocks(len(hidden), 3 * weight.shape[0] * of_weight.element_size()):
        h, scale, _, slope = _chunk(
            hidden[rows].to(dtype), labels[rows], weight, bias, smoothing, softcap
        )
        slope *= (grad_cosines[rows] / scale)[:, None]
        of_bias += slope.sum(0)
        of_weight.addmm_(slope.T, h * scale[:, None])
    return of_weight.to(weight.dtype), of_bias.to(weight.dtype if bias is None else bias.dtype)


@_head_gradient.register_fake
def _(
    grad_cosines: Tensor, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None,
    smoothing: float, softcap: float,
) -> tuple[Tensor, Tensor]:
    like = weight if bias is None else bias
    return torch.empty_like(weight), like.new_empty(weight.shape[0])


def _keep_for_head(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, labels, weight, bias, smoothing, softcap, _ = inputs
    of_head = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(output[1], *((hidden, labels, weight, bias) if of_head else ()))
    ctx.settings = (smoothing, softcap)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _chunked_backward(ctx, grad_cosines, _):  # type: ignore[no-untyped-def]
    gradient, *rest = ctx.saved_tensors
    of_hidden = of_weight = of_bias = None
    if grad_cosines is not None:
        if ctx.needs_input_grad[0]:
            of_hidden = (grad_cosines[:, None] * gradient).to(gradient.dtype)
        if rest:
            of_weight, of_bias = _head_gradient(grad_cosines, *rest, *ctx.settings)
    return (
        of_hidden, None,
        of_weight if ctx.needs_input_grad[2] else None,
        of_bias if ctx.needs_input_grad[3] else None,
        None, None, None,
    )


_label_cosine_chunked.register_autograd(_chunked_backward, setup_context=_keep_for_head)


def _chunk(
    h: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of rows -> (h/s, s, cosines, s·∂cos/∂x) with x = W·h + b before the softcap.

    s (n,) is the row's largest entry.  Logits are computed from h/s, so that squaring them neither
    overflows nor vanishes; softcapped logits are bounded and keep s only where it is below one.
    """
    scale = floor_norm(h.abs().amax(-1))
    if bias is not None:
        scale = scale.clamp_min(1.0)
    h = h / scale[:, None]
    logits = times_transpose(h, weight)
    if bias is not None:
        logits.addcmul_(1 / scale[:, None], bias.to(h.dtype))
    ratio = torch.ones_like(scale)
    slope_of_cap = None
    if softcap:
        bounded = scale.clamp_max(1.0)
        logits *= (scale / softcap)[:, None]
        logits.tanh_()
        slope_of_cap = 1 - logits * logits
        logits *= (softcap / bounded)[:, None]
        ratio = scale / bounded
    norm = torch.linalg.vector_norm(logits, dim=-1)
    size = weight.shape[0]
    dot = logits.gather(1, labels.clamp_min(0)[:, None].long())[:, 0] * (1 - smoothing)
    if smoothing:
        dot += logits.sum(-1) * (smoothing / size)
    live = (labels != IGNORE_INDEX) & (norm > 0)
    cosines = dot * live / (floor_norm(norm) * target_norm(smoothing, size))
    slope = _logit_gradient(logits, cosines, norm, labels, smoothing)
    if slope_of_cap is not None:
        slope *= slope_of_cap
        slope *= ratio[:, None]
    return h, scale, cosines, slope


@implementation("label_cosine_chunked", "reference")
def _label_cosine_chunked_reference(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float,
    softcap: float, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return _materialised(hidden, labels, weight, bias, smoothing, softcap, want_gradient)


@implementation("label_cosine_chunked", "native")
def _label_cosine_chunked_blocks(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float,
    softcap: float, want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    check_labels(labels, weight.shape[0])
    cosines, gradient = empty_outputs(hidden, want_gradient)
    for rows in row_blocks(len(hidden), 3 * weight.shape[0] * cosines.element_size()):
        _, scale, cosines[rows], slope = _chunk(
            hidden[rows].to(cosines.dtype), labels[rows], weight, bias, smoothing, softcap
        )
        if want_gradient:
            gradient[rows] = (times(slope, weight) / scale[:, None]).to(gradient.dtype)
    return cosines, gradient


triton_implementation("label_cosine_chunked", "label_cosine", supports=no_float64)
