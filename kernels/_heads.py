"""Pieces of the kernels that stream a vocabulary: logit tiles, softcaps, row scales, workspaces.

Several kernels need logits twice: once for the normaliser of a row, once for what is done with
them.  They compute the tile again rather than keep N×V numbers; a gradient with respect to the
logits is written for a bounded run of labels and multiplied by the head's rows with a library
product, which is deterministic and needs no accumulator of N×D registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    INTERPRETED,
    Tile,
    autotune,
    dot_precision,
    persistent_programs,
    power_of_two_scale,
    size_class,
)

WORKSPACE_BYTES = 64 << 20
SMALLEST_CHUNK = 1024


def logit_tile(
    rows: int, labels: int, channels: int, warps: int, stages: int, *never_on: str
) -> Tile:
    """An entry of the tuning list of a kernel around :func:`product_tile`."""
    blocks = {"BLOCK_N": rows, "BLOCK_V": labels, "BLOCK_K": channels}
    return Tile(blocks, warps, stages, never_on)


def tuned(kernel: Any, tiles: Mapping[bool, Sequence[Tile]], key: list[str]) -> dict[bool, Any]:
    """The kernel tuned over each list; lists by whether operands are multiplied as float32."""
    return {wide: autotune(entries, key=key)(kernel) for wide, entries in tiles.items()}


def label_chunks(rows: int, labels: int, element_size: int) -> Iterator[slice]:
    """Runs of labels whose (rows, run) workspace stays within the budget, at least 1,024 long.

    A run's length is a key of the tuner: it changes with the size class of the rows alone.
    """
    fit = WORKSPACE_BYTES // (size_class(rows) * element_size) // SMALLEST_CHUNK * SMALLEST_CHUNK
    step = max(SMALLEST_CHUNK, fit)
    for start in range(0, labels, step):
        yield slice(start, min(start + step, labels))


def workspace_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """bfloat16 where both are; float32 otherwise: float16 has no room for small probabilities."""
    same = hidden.dtype == head.dtype == torch.bfloat16
    return torch.bfloat16 if same else torch.float32


def widened(x: torch.dtype, y: torch.dtype) -> bool:
    """Whether operands of these dtypes are multiplied as float32."""
    return x != y or x == torch.float32


def operands(x: torch.dtype, y: torch.dtype) -> dict[str, object]:
    """Constants of a tile product: whether to widen the operands first, and how to multiply."""
    wide = widened(x, y)
    return {"WIDE": wide or INTERPRETED, "PRECISION": dot_precision() if wide else "ieee"}


def label_splits(like: Tensor, rows: int, labels: int) -> int:
    """Into how many runs of labels a stream is split, so that few rows fill the GPU too."""
    programs = persistent_programs(like, triton.cdiv(labels, 128), 2)
    return max(1, programs // triton.cdiv(rows, 128))


def copy_saturated(out: Tensor, values: Tensor) -> Tensor:
    """``values`` written to ``out``, at most its largest; ``values`` are used up."""
    limit = torch.finfo(out.dtype).max
    return out.copy_(values.clamp_(-limit, limit))


@triton.jit
def share_of_labels(labels, BLOCK_V: tl.constexpr):
    """Where this program's run of labels starts and ends; axis 1 of the grid splits them."""
    share = tl.cdiv(tl.cdiv(labels, BLOCK_V), tl.num_programs(1)) * BLOCK_V
    start = tl.program_id(1) * share
    return start, tl.minimum(start + share, labels)


@triton.jit
def product_tile(
    X,
    W,
    Bias,
    scale,
    first_x,
    first_w,
    rows,
    labels,
    width,
    stride_x,
    stride_w,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scale·(X·Wᵀ + Bias) for BLOCK_N rows of X and BLOCK_V rows of W.

    ``Bias`` has one number for each row of W, ``scale`` is a power of two for each row of X; either
    may be None.

    Addresses are a 64-bit origin and 32-bit offsets within the tile.  Rows past the end re-read the
    last one, which costs no mask; the caller drops them.
    """
    col = tl.arange(0, BLOCK_K)
    row_x = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_x)
    row_w = tl.minimum(tl.arange(0, BLOCK_V), labels - 1 - first_w)
    at_x = row_x[:, None] * stride_x + col[None, :]
    at_w = row_w[:, None] * stride_w + col[None, :]
    X += tl.cast(first_x, tl.int64) * stride_x
    W += tl.cast(first_w, tl.int64) * stride_w
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(X + k + at_x)
            w = tl.load(W + k + at_w)
        else:
            keep = (k + col < width)[None, :]
            x = tl.load(X + k + at_x, mask=keep, other=0.0)
            w = tl.load(W + k + at_w, mask=keep, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if scale is not None:
            x = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
        product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    if Bias is not None:
        label = first_w + tl.arange(0, BLOCK_V)
        bias = tl.load(Bias + label, mask=label < labels, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            bias = bias * scale[:, None]
        product += bias
    return product


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32's relative precision.

    Near zero, where 1 − e⁻²ˣ cancels, its series.
    """
    size = tl.abs(x)
    small = tl.minimum(tl.maximum(x, -0.1), 0.1)
    square = small * small
    tail = square * (0.1333333333 - square * 0.053968254)
    series = small * (1.0 + square * (tail - 0.3333333333))
    decay = tl.exp(-2.0 * size)
    ratio = (1.0 - decay) / (1.0 + decay)
    # The sign as a bit: a comparison would hold a mask of the tile in registers.
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    signed = (ratio.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(size < 0.1, series, signed)


@triton.jit
def row_scale(X, row, keep, width, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The power of two that brings the largest element of each row near 1."""
    col = tl.arange(0, BLOCK_D)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, width, BLOCK_D):
        mask = keep[:, None] & (d + col < width)[None, :]
        x = tl.load(X + row[:, None] * stride + (d + col)[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
    return power_of_two_scale(largest)
