"""Label cosine: two triangular products with everything else in their prologue and epilogue.

    _label_kernel     power-of-two row scale, w_y·h + b_y and 1ᵀz from H and its rows w_y
    _project_kernel   Y = H·Rᵀ + c, and Σy² per tile of Y
    _finish_kernel    norms, cosines and the two row factors of the gradient
    _gradient_kernel  Y·R scaled, plus w_y (gathered again) and the smoothing term

R is upper triangular: a tile skips the half of R that is zero.  Softcapped heads stream the
vocabulary instead: _cap_stats_kernel sums over tiles of logits, _cap_slope_kernel writes ∂cos/∂z
for a bounded run of labels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkt_fast.ops.label_cosine import IGNORE_INDEX, check_labels, target_norm

from ._common import (
    STORAGE,
    KernelSpec,
    Target,
    Tile,
    device_of,
    dot_precision,
    is_hip,
    near_rows,
    packed,
    reciprocal_norm,
    row_major,
    size_class,
)
from ._heads import (
    copy_saturated,
    label_chunks,
    label_splits,
    logit_tile,
    operands,
    product_tile,
    row_scale,
    share_of_labels,
    tanh,
    tuned,
    widened,
    workspace_dtype,
)

_IGNORED = tl.constexpr(IGNORE_INDEX)
_BLOCK_M = 128  # channels of an output tile; fixed: every tuned tile writes the same partials


def _tile(rows: int, channels: int, warps: int, stages: int, *never_on: str) -> Tile:
    return Tile({"BLOCK_N": rows, "BLOCK_K": channels}, warps, stages, never_on)


# All by whether operands are multiplied as float32.
_TILES = {
    False: [_tile(128, 32, 8, 3), _tile(64, 32, 8, 3, "sm_100"), _tile(64, 32, 4, 2)],
    True: [_tile(128, 32, 8, 3, "sm_80"), _tile(64, 32, 8, 3)],
}
_CAP_TILES = {
    False: [logit_tile(128, 128, 64, 8, 3, "gfx942"), logit_tile(64, 64, 32, 4, 3)],
    True: [logit_tile(128, 64, 32, 8, 3), logit_tile(64, 64, 32, 4, 3)],
}
_ROWS, _CHANNELS = 4, 512


@triton.jit
def _label_kernel(
    H,
    Labels,
    W,
    Bias,
    LabelSum,
    Scale,
    Dot,
    rows,
    labels,
    width,
    stride_h,
    stride_w,
    bias_sum,
    keep_share,
    share,
    SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scale s of each row and s·(z·t); NaN for a label that does not exist."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < rows
    scale = row_scale(H, row, keep, width, stride_h, BLOCK_N, BLOCK_D)
    if Bias is not None:
        scale = tl.minimum(scale, 1.0)
    label = tl.load(Labels + row, mask=keep, other=_IGNORED).to(tl.int64)
    known = (label >= 0) & (label < labels)
    col = tl.arange(0, BLOCK_D)
    of_label = tl.zeros((BLOCK_N,), tl.float32)
    of_all = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, width, BLOCK_D):
        inside = (d + col < width)[None, :]
        at = row[:, None] * stride_h + (d + col)[None, :]
        h = tl.load(H + at, mask=keep[:, None] & inside, other=0.0).to(tl.float32) * scale[:, None]
        at = label[:, None] * stride_w + (d + col)[None, :]
        w = tl.load(W + at, mask=known[:, None] & inside, other=0.0).to(tl.float32)
        of_label += tl.sum(h * w, 1)
        if SMOOTHED:
            total = tl.load(LabelSum + d + col, mask=d + col < width, other=0.0)
            of_all += tl.sum(h * total[None, :], 1)
    if Bias is not None:
        of_label += scale * tl.load(Bias + label, mask=known, other=0.0).to(tl.float32)
    dot = keep_share * of_label
    if SMOOTHED:
        dot += share * (of_all + bias_sum * scale)
    dot = tl.where(known, dot, tl.where(label == _IGNORED, 0.0, float("nan")))
    tl.store(Scale + row, scale, mask=keep)
    tl.store(Dot + row, dot, mask=keep)


_even = triton.heuristics({"EVEN_K": lambda a: a["width"] % a["BLOCK_K"] == 0})


@_even
@triton.jit(do_not_specialize=["row_class"])
def _project_kernel(
    H,
    R,
    Shift,
    Scale,
    Y,
    Squares,
    rows,
    width,
    stride_h,
    tiles,
    row_class,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of Y = s·(H·Rᵀ + c); row m of R is zero left of its diagonal."""
    first_n = tl.program_id(1) * BLOCK_N
    tile = tl.program_id(0)
    row = first_n + tl.arange(0, BLOCK_N)
    out = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_K)
    at_h = tl.cast(tl.minimum(row, rows - 1), tl.int64)[:, None] * stride_h + col[None, :]
    at_r = tl.cast(tl.minimum(out, width - 1), tl.int64)[:, None] * width + col[None, :]
    scale = tl.load(Scale + row, mask=row < rows, other=0.0)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(tile * BLOCK_M, width, BLOCK_K):
        if EVEN_K:
            h = tl.load(H + k + at_h)
            r = tl.load(R + k + at_r)
        else:
            keep = (k + col < width)[None, :]
            h = tl.load(H + k + at_h, mask=keep, other=0.0)
            r = tl.load(R + k + at_r, mask=keep, other=0.0)
        h = h.to(tl.float32) * scale[:, None]
        y = tl.dot(h, tl.trans(r), y, input_precision=PRECISION)
    inside = out < width
    shift = tl.load(Shift + out, mask=inside, other=0.0)
    y = tl.where(inside[None, :], y + shift[None, :] * scale[:, None], 0.0)
    at = tl.cast(row, tl.int64)
    mask = (row < rows)[:, None] & inside[None, :]
    tl.store(Y + at[:, None] * width + out[None, :], y, mask=mask)
    tl.store(Squares + at * tiles + tile, tl.sum(y * y, 1), mask=row < rows)


@triton.jit
def _finish_kernel(
    Labels,
    Scale,
    Dot,
    Squares,
    Cosine,
    OfLogits,
    OfTarget,
    rows,
    tiles,
    rest,
    norm_t,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Cosines, and the factors −cos/‖z‖² of Y·R and 1/(‖z‖‖t‖) of Wᵀt, both scaled back to H."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < rows
    part = tl.arange(0, TILES)
    mask = keep[:, None] & (part < tiles)[None, :]
    squares = tl.load(Squares + row[:, None] * tiles + part[None, :], mask=mask, other=0.0)
    scale = tl.load(Scale + row, mask=keep, other=0.0)
    square = tl.sum(squares, 1) + rest * scale * scale
    live = tl.load(Labels + row, mask=keep, other=_IGNORED) != _IGNORED
    inverse = tl.where(live, reciprocal_norm(square), 0.0)
    cosine = tl.load(Dot + row, mask=keep, other=0.0) * inverse / norm_t
    tl.store(Cosine + row, cosine, mask=keep)
    if OfLogits is not None:
        tl.store(OfLogits + row, -cosine * inverse * inverse, mask=keep)
        tl.store(OfTarget + row, inverse / norm_t, mask=keep)


@_even
@triton.jit(do_not_specialize=["row_class"])
def _gradient_kernel(
    Y,
    R,
    Labels,
    W,
    LabelSum,
    Scale,
    OfLogits,
    OfTarget,
    Gradient,
    rows,
    labels,
    width,
    stride_w,
    keep_share,
    share,
    row_class,
    SMOOTHED: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of ∂cos/∂h; column m of R is zero below its diagonal."""
    first_n = tl.program_id(1) * BLOCK_N
    # The widest tiles, with the longest loops, start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = first_n + tl.arange(0, BLOCK_N)
    out = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_K)
    at_y = tl.cast(tl.minimum(row, rows - 1), tl.int64)[:, None] * width + col[None, :]
    inside = (out < width)[None, :]
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, tl.minimum(width, (tile + 1) * BLOCK_M), BLOCK_K):
        at_r = tl.cast(k + col, tl.int64)[:, None] * width + out[None, :]
        if EVEN_K:
            y = tl.load(Y + k + at_y)
            r = tl.load(R + at_r, mask=inside, other=0.0)
        else:
            keep = k + col < width
            y = tl.load(Y + k + at_y, mask=keep[None, :], other=0.0)
            r = tl.load(R + at_r, mask=keep[:, None] & inside, other=0.0)
        g = tl.dot(y, r, g, input_precision=PRECISION)
    live = row < rows
    scale = tl.load(Scale + row, mask=live, other=0.0)
    of_logits = tl.load(OfLogits + row, mask=live, other=0.0)
    of_target = tl.load(OfTarget + row, mask=live, other=0.0)
    label = tl.load(Labels + row, mask=live, other=_IGNORED).to(tl.int64)
    known = (label >= 0) & (label < labels)
    at_w = tl.where(known, label, 0)[:, None] * stride_w + out[None, :]
    w = tl.load(W + at_w, mask=known[:, None] & inside, other=0.0).to(tl.float32)
    g = of_logits[:, None] * g + (keep_share * of_target)[:, None] * w
    if SMOOTHED:
        total = tl.load(LabelSum + out, mask=out < width, other=0.0)
        g += (share * of_target)[:, None] * total[None, :]
    g = tl.clamp(g * scale[:, None], -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        Gradient + tl.cast(row, tl.int64)[:, None] * width + out[None, :],
        g.to(Gradient.dtype.element_ty),
        mask=live[:, None] & inside,
    )


_project = tuned(_project_kernel, _TILES, ["width", "row_class"])
_gradient = tuned(_gradient_kernel, _TILES, ["width", "row_class"])


def _precision(dtype: torch.dtype) -> str:
    """How H is multiplied by the float32 R: half-precision H is exact in one TF32 product."""
    return dot_precision() if dtype == torch.float32 or is_hip() else "tf32"


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
    smoothing: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Cosines (N,) in float32 and, if wanted, their gradients (N, D) in the dtype of ``hidden``."""
    rows, width = hidden.shape
    size = weight.shape[0]
    if not hidden.is_cuda:
        check_labels(labels, size)
    cosines = hidden.new_zeros(rows, dtype=torch.float32)
    gradient = hidden.new_empty(rows if want_gradient else 0, width)
    if rows == 0 or width == 0:
        return cosines, gradient
    hidden, weight, labels = row_major(hidden), row_major(weight), labels.contiguous()
    bias = packed(bias)
    factor, shift, label_sum = (x.float().contiguous() for x in (factor, shift, label_sum))
    keep_share, share, norm_t = 1.0 - smoothing, smoothing / size, target_norm(smoothing, size)
    tiles = triton.cdiv(width, _BLOCK_M)
    scale, dot, of_logits, of_target = cosines.new_empty(4, rows)
    y, squares = cosines.new_empty(rows, width), cosines.new_empty(rows, tiles)
    precision, wide = _precision(hidden.dtype), hidden.dtype == torch.float32

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return tiles, triton.cdiv(rows, meta["BLOCK_N"])

    with device_of(hidden):
        _label_kernel[(triton.cdiv(rows, _ROWS),)](
            hidden, labels, weight, bias, label_sum, scale, dot, rows, size, width,
            hidden.stride(0), weight.stride(0), bias_sum, keep_share, share,
            SMOOTHED=smoothing > 0, BLOCK_N=_ROWS, BLOCK_D=_CHANNELS,
        )  # fmt: skip
        _project[wide][grid](
            hidden, factor, shift, scale, y, squares, rows, width, hidden.stride(0), tiles,
            size_class(rows), PRECISION=precision, BLOCK_M=_BLOCK_M,
        )  # fmt: skip
        _finish_kernel[(triton.cdiv(rows, 32),)](
            labels, scale, dot, squares, cosines, *(
                (of_logits, of_target) if want_gradient else (None, None)
            ), rows, tiles, rest, norm_t, BLOCK_N=32, TILES=triton.next_power_of_2(tiles),
        )  # fmt: skip
        if want_gradient:
            _gradient[wide][grid](
                y, factor, labels, weight, label_sum, scale, of_logits, of_target, gradient,
                rows, size, width, weight.stride(0), keep_share, share,
                size_class(rows), SMOOTHED=smoothing > 0, LIMIT=torch.finfo(hidden.dtype).max,
                PRECISION=precision, BLOCK_M=_BLOCK_M,
            )  # fmt: skip
    return cosines, gradient


# --------------------------------------------------------------------------- softcapped heads


@triton.jit
def _row_scale_kernel(
    H, Scale, rows, width, stride_h, BIASED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The power-of-two scale of every row, at most 1 beside a bias."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = row_scale(H, row, row < rows, width, stride_h, BLOCK_N, BLOCK_D)
    if BIASED:
        scale = tl.minimum(scale, 1.0)
    tl.store(Scale + row, scale, mask=row < rows)


@triton.jit
def _capped(z, scale, softcap, CAPPED: tl.constexpr):
    """From s·(W·h + b): the logits scaled to a safe size, and softcap′ in that scale.

    Softcapped logits are bounded; they keep the row's scale only where it magnifies.
    """
    if CAPPED:
        magnified = tl.maximum(scale, 1.0)[:, None]
        t = tanh(z / (softcap * scale)[:, None])
        z = t * magnified * softcap  # in this order: a zero row has an infinite product otherwise
        derivative = (1.0 - t * t) * (magnified / scale[:, None])
    else:
        derivative = 1.0
    return z, derivative


@_even
@triton.jit(do_not_specialize=["row_class"])
def _cap_stats_kernel(
    H,
    W,
    Bias,
    Labels,
    Scale,
    Partial,
    rows,
    labels,
    width,
    stride_h,
    stride_w,
    softcap,
    row_class,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Σz², Σz and z_y over one split of the labels."""
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    keep = row < rows
    scale = tl.load(Scale + row, mask=keep, other=1.0)
    wanted = tl.load(Labels + row, mask=keep, other=_IGNORED)
    start, end = share_of_labels(labels, BLOCK_V)
    square = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    of_label = tl.zeros((BLOCK_N,), tl.float32)
    for first_label in range(start, end, BLOCK_V):
        z = product_tile(
            H, W, Bias, scale, first_row, first_label, rows, labels, width, stride_h, stride_w,
            WIDE, PRECISION, EVEN_K, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        label = first_label + tl.arange(0, BLOCK_V)
        z, _ = _capped(z, scale, softcap, CAPPED)
        z = tl.where((label < labels)[None, :], z, 0.0)
        square += tl.sum(z * z, 1)
        total += tl.sum(z, 1)
        of_label += tl.sum(tl.where(label[None, :] == wanted[:, None], z, 0.0), 1)
    at = Partial + tl.cast(tl.program_id(1), tl.int64) * rows + row
    plane = tl.cast(rows, tl.int64) * tl.num_programs(1)
    tl.store(at, square, mask=keep)
    tl.store(at + plane, total, mask=keep)
    tl.store(at + 2 * plane, of_label, mask=keep)


@triton.jit
def _cap_finish_kernel(
    Labels,
    Partial,
    Cosine,
    OfLogits,
    OfTarget,
    rows,
    labels,
    splits,
    keep_share,
    share,
    norm_t,
    BLOCK_N: tl.constexpr,
):
    """Cosines and the row factors of its gradient from the splits' sums."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < rows
    plane = tl.cast(rows, tl.int64) * splits
    square = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    of_label = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        at = Partial + tl.cast(split, tl.int64) * rows + row
        square += tl.load(at, mask=keep, other=0.0)
        total += tl.load(at + plane, mask=keep, other=0.0)
        of_label += tl.load(at + 2 * plane, mask=keep, other=0.0)
    label = tl.load(Labels + row, mask=keep, other=_IGNORED)
    ignored = label == _IGNORED
    inverse = tl.where(ignored, 0.0, reciprocal_norm(square))
    cosine = (keep_share * of_label + share * total) * inverse / norm_t
    known = ((label >= 0) & (label < labels)) | ignored
    cosine = tl.where(known, cosine, float("nan"))
    tl.store(Cosine + row, cosine, mask=keep)
    tl.store(OfLogits + row, -cosine * inverse * inverse, mask=keep)
    tl.store(OfTarget + row, inverse / norm_t, mask=keep)


@_even
@triton.jit(do_not_specialize=["row_class"])
def _cap_slope_kernel(
    H,
    W,
    Bias,
    Labels,
    Scale,
    OfLogits,
    OfTarget,
    Slope,
    rows,
    labels,
    first,
    width,
    stride_h,
    stride_w,
    softcap,
    keep_share,
    share,
    row_class,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """∂cos/∂(W·h + b)/s for the ``labels`` labels from ``first`` on; W and Bias start there."""
    first_row = tl.program_id(0) * BLOCK_N
    first_label = tl.program_id(1) * BLOCK_V
    row = first_row + tl.arange(0, BLOCK_N)
    keep = row < rows
    scale = tl.load(Scale + row, mask=keep, other=1.0)
    z = product_tile(
        H, W, Bias, scale, first_row, first_label, rows, labels, width, stride_h, stride_w,
        WIDE, PRECISION, EVEN_K, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    label = first_label + tl.arange(0, BLOCK_V)
    z, derivative = _capped(z, scale, softcap, CAPPED)
    of_logits = tl.load(OfLogits + row, mask=keep, other=0.0)[:, None]
    of_target = tl.load(OfTarget + row, mask=keep, other=0.0)[:, None]
    wanted = tl.load(Labels + row, mask=keep, other=_IGNORED)[:, None]
    target = share + tl.where((first + label)[None, :] == wanted, keep_share, 0.0)
    slope = (of_logits * z + of_target * target) * derivative
    tl.store(
        Slope + tl.cast(row, tl.int64)[:, None] * labels + label[None, :],
        slope.to(Slope.dtype.element_ty),
        mask=keep[:, None] & (label < labels)[None, :],
    )


_cap_stats = tuned(_cap_stats_kernel, _CAP_TILES, ["width", "labels", "row_class"])
_cap_slope = tuned(_cap_slope_kernel, _CAP_TILES, ["width", "labels", "row_class"])


def label_cosine_chunked(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    smoothing: float,
    softcap: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Cosines (N,) in float32 and, if wanted, their gradients (N, D) in the dtype of ``hidden``."""
    rows, width = hidden.shape
    size = weight.shape[0]
    if not hidden.is_cuda:
        check_labels(labels, size)
    cosines = hidden.new_zeros(rows, dtype=torch.float32)
    gradient = hidden.new_empty(rows if want_gradient else 0, width)
    if rows == 0 or width == 0:
        return cosines, gradient
    hidden, weight, labels = near_rows(hidden), near_rows(weight), labels.contiguous()
    bias = packed(bias)
    keep_share, share, norm_t = 1.0 - smoothing, smoothing / size, target_norm(smoothing, size)
    scale, of_logits, of_target = cosines.new_empty(3, rows)
    splits = label_splits(hidden, rows, size)
    partial = cosines.new_empty(3, splits, rows)
    options = {"CAPPED": softcap > 0, **operands(hidden.dtype, weight.dtype)}
    strides, wide = (hidden.stride(0), weight.stride(0)), widened(hidden.dtype, weight.dtype)
    with device_of(hidden):
        _row_scale_kernel[(triton.cdiv(rows, _ROWS),)](
            hidden, scale, rows, width, hidden.stride(0),
            BIASED=bias is not None, BLOCK_N=_ROWS, BLOCK_D=_CHANNELS,
        )  # fmt: skip
        _cap_stats[wide][lambda meta: (triton.cdiv(rows, meta["BLOCK_N"]), splits)](
            hidden, weight, bias, labels, scale, partial, rows, size, width, *strides, softcap,
            size_class(rows), **options,
        )
        _cap_finish_kernel[(triton.cdiv(rows, 128),)](
            labels, partial, cosines, of_logits, of_target, rows, size, splits, keep_share, share,
            norm_t, BLOCK_N=128,
        )  # fmt: skip
        if not want_gradient:
            return cosines, gradient
        total = cosines.new_zeros(rows, width)
        dtype = workspace_dtype(hidden, weight)
        for chunk in label_chunks(rows, size, dtype.itemsize):
            run = chunk.stop - chunk.start
            slope = torch.empty(rows, run, dtype=dtype, device=hidden.device)
            _cap_slope[wide][
                lambda meta, run=run: (
                    triton.cdiv(rows, meta["BLOCK_N"]), triton.cdiv(run, meta["BLOCK_V"])
                )
            ](
                hidden, weight[chunk], None if bias is None else bias[chunk], labels, scale,
                of_logits, of_target, slope, rows, run, chunk.start, width, *strides, softcap,
                keep_share, share, size_class(rows), **options,
            )  # fmt: skip
            total += slope @ weight[chunk].to(dtype)
    total *= scale[:, None]
    return cosines, copy_saturated(gradient, total)


def aot_specs(target: Target) -> list[KernelSpec]:
    """8,192 rows of 4,096 channels; 256,000 labels for the softcapped head."""
    rows, width = 8192, 4096

    def linear(dtype: torch.dtype, kernel: str, masked: bool = False) -> KernelSpec:
        """``masked``: a width that no tile divides, and smoothed labels."""
        name = STORAGE[dtype]
        wide = dtype == torch.float32
        hip = target.backend == "hip"
        precision = target.dot_precision if wide or hip else "tf32"
        constexprs = {
            "PRECISION": precision,
            "BLOCK_M": _BLOCK_M,
            "EVEN_K": not masked,
        }
        if kernel == "project":
            function = _project_kernel
            args = {
                "H": f"*{name}:16",
                **{p: "*fp32:16" for p in ("R", "Shift", "Scale", "Y", "Squares")},
                "rows": "i32:16",
                "width": "i32:16",
                "stride_h": "i32:16",
                "tiles": "i32:16",
                "row_class": "i32",
            }
        else:
            function = _gradient_kernel
            constexprs |= {"SMOOTHED": masked, "LIMIT": torch.finfo(dtype).max}
            args = {
                "Y": "*fp32:16",
                "R": "*fp32:16",
                "Labels": "*i64:16",
                "W": f"*{name}:16",
                **{p: "*fp32:16" for p in ("LabelSum", "Scale", "OfLogits", "OfTarget")},
                "Gradient": f"*{name}:16",
                **{i: "i32:16" for i in ("rows", "labels", "width", "stride_w")},
                "keep_share": "fp32",
                "share": "fp32",
                "row_class": "i32",
            }
        return KernelSpec(
            name=f"label_cosine/{kernel}/{name}{'/masked' if masked else ''}",
            kernel=function,
            args=args,
            constexprs=constexprs,
            tiles=_TILES[wide],
            kind="gemm",
            bytes=rows * width * (dtype.itemsize * (1 if kernel == "project" else 2) + 4)
            + 2 * width * width,
            flops=rows * width * width,
            compute="fp32" if hip else "tf32x3",
        )

    def capped(dtype: torch.dtype, kernel: str, biased: bool = False) -> KernelSpec:
        """``biased``: a bias, and a width that no tile divides."""
        name = STORAGE[dtype]
        wide = dtype == torch.float32
        labels = 256000
        slope = kernel == "slope"
        tensors = {"H": f"*{name}:16", "W": f"*{name}:16", "Labels": "*i64:16", "Scale": "*fp32:16"}
        if biased:
            tensors["Bias"] = f"*{name}:16"
        if slope:
            tensors |= {p: "*fp32:16" for p in ("OfLogits", "OfTarget")}
            tensors["Slope"] = f"*{name}:16"
        else:
            tensors["Partial"] = "*fp32:16"
        return KernelSpec(
            name=f"label_cosine_chunked/{kernel}/{name}{'/biased' if biased else ''}",
            kernel=_cap_slope_kernel if slope else _cap_stats_kernel,
            args={
                **tensors,
                **{i: "i32:16" for i in ("rows", "labels", "width", "stride_h", "stride_w")},
                **({"first": "i32:16", "keep_share": "fp32", "share": "fp32"} if slope else {}),
                "softcap": "fp32",
                "row_class": "i32",
            },
            constexprs={
                **({} if biased else {"Bias": None}),
                "CAPPED": True,
                "WIDE": wide,
                "PRECISION": target.dot_precision if wide else "ieee",
                "EVEN_K": not biased,
            },
            tiles=_CAP_TILES[wide],
            kind="gemm",
            bytes=(rows + labels) * width * dtype.itemsize
            + (rows * labels * dtype.itemsize if slope else 0),
            flops=2 * rows * labels * width,
            compute="tf32x3" if wide and target.backend == "cuda" else name,  # type: ignore[arg-type]
        )

    return [
        KernelSpec(
            name="label_cosine/label/bf16",
            kernel=_label_kernel,
            args={
                "H": "*bf16:16",
                "Labels": "*i64:16",
                "W": "*bf16:16",
                **{p: "*fp32:16" for p in ("LabelSum", "Scale", "Dot")},
                **{i: "i32:16" for i in ("rows", "labels", "width", "stride_h", "stride_w")},
                **{f: "fp32" for f in ("bias_sum", "keep_share", "share")},
            },
            constexprs={"Bias": None, "SMOOTHED": False, "BLOCK_N": _ROWS, "BLOCK_D": _CHANNELS},
            kind="bytes",
            bytes=2 * rows * width * 2,
            flops=4 * rows * width,
        ),
        *(
            spec(dtype, kernel, variant)
            for spec, kernels in ((linear, ("project", "gradient")), (capped, ("stats", "slope")))
            for dtype in (torch.bfloat16, torch.float32)
            for kernel in kernels
            for variant in (False, True)
        ),
    ]
