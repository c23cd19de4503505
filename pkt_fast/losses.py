"""The two losses of the method (paper, "training"), differentiable and without an N×V tensor.

L_layer = 1 − mean cos(h_k, h̃) steers the paired layer; L_out = 1 − mean cos(z, onehot(y)) keeps
the logits on the labels.  Both equal :mod:`pkt_fast.reference` in value and gradient.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .data.examples import IGNORE_INDEX
from .errors import ConfigError
from .heads import HeadStatistics, head_statistics
from .ops import label_cosine as label_cosine_op
from .ops import label_cosine_chunked, relation, row_cosine

_statistics: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], HeadStatistics]] = (
    weakref.WeakKeyDictionary()
)


def layer_cosine(hidden: Tensor, target: Tensor) -> Tensor:
    """L_layer = 1 − mean over rows of cos(hidden, target); (..., D) twice -> scalar.

    Differentiable in both.  A row that is zero counts with cosine 0.  Raises :class:`ConfigError`
    when the shapes differ.
    """
    if hidden.shape != target.shape:
        raise ConfigError(
            f"layer_cosine: hidden is {tuple(hidden.shape)}, target {tuple(target.shape)}"
        )
    width = hidden.shape[-1]
    return 1 - row_cosine(hidden.reshape(-1, width), target.reshape(-1, width)).mean()


def label_cosine(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """L_out = 1 − mean over supervised rows of cos(z, onehot(y)), z = head(hidden); scalar.

    ``hidden`` (..., D) predicts ``labels`` (...); −100 is ignored.  ``head`` is the LM-head module,
    with ``weight`` (V, D) and perhaps ``bias`` (V,).  A frozen head costs two D×D products per row
    through the statistics of :mod:`pkt_fast.heads` (computed once per head); a head that itself
    requires gradients, or ``softcap`` > 0, takes the exact path over blocks of rows.

    Raises :class:`~pkt_fast.errors.DataError` for a label outside [0, V) other than −100 and
    :class:`~pkt_fast.errors.NumericsError` for a head that is not finite.
    """
    rows = label_cosine_rows(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        labels.reshape(-1),
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    supervised = (labels != IGNORE_INDEX).sum().clamp_min(1)
    return 1 - rows.sum() / supervised


def label_cosine_rows(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """cos(z, onehot(y)) per row, 0 for ignored ones: (N, D), (N,) -> (N,).

    Arguments and errors are those of :func:`label_cosine`.
    """
    weight, bias = _weights(head)
    trains = torch.is_grad_enabled() and any(
        p.requires_grad for p in head.parameters(recurse=False)
    )
    if softcap or trains:
        return label_cosine_chunked(hidden, labels, weight, bias, label_smoothing, softcap)
    known = statistics_of(head)
    return label_cosine_op(
        hidden,
        labels,
        weight,
        bias,
        known.factor,
        known.shift,
        known.rest,
        known.label_sum,
        known.bias_sum,
        label_smoothing,
    )


def statistics_of(head: nn.Module) -> HeadStatistics:
    """The head's statistics, computed once and again when its weights were replaced or modified."""
    weight, bias = _weights(head)
    version = tuple(n for t in (weight, bias) if t is not None for n in (t.data_ptr(), t._version))
    known = _statistics.get(head)
    if known is None or known[0] != version:
        known = (version, head_statistics(weight, bias))
        _statistics[head] = known
    return known[1]


def _weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    return weight, bias


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two sets of activations of the same N inputs: (N, D_x), (N, D_y) -> scalar.

    ‖X_cᵀY_c‖² / (‖X_cᵀX_c‖·‖Y_cᵀY_c‖) with centred columns: D×D products, no N×N Gram matrix.
    Differentiable in ``x``.  Raises :class:`ConfigError` when the row counts differ.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ConfigError(
            f"cka: give two (N, D) tensors of the same N, not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    starts = torch.tensor([0, len(x)], device=x.device)
    inner, norm_x, norm_y = relation(x, y, starts)
    return (inner / (norm_x * norm_y)).squeeze(0)
