"""Centred token relations of packed sequences, a tile of each T×T Gram matrix at a time.

    _mean_kernel      mean and largest element per sequence and channel block
    _relation_kernel  for one block of tokens against every block of its sequence: the tiles of K_x
                      and K_y, their three products summed, and K_y·Xc and K_x·Xc added to the
                      block's own gradient rows
    _reduce_kernel    sums over the blocks of a sequence

A program is the only one that writes its gradient rows, so adding to them in memory needs no
atomics and the result does not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkt_fast.ops.relation import sequences, zero_outputs

from ._common import (
    STORAGE,
    KernelSpec,
    Target,
    Tile,
    autotune,
    device_of,
    dot_precision,
    near_rows,
    power_of_two_scale,
)

_BLOCK_T = 32  # tokens of a tile; fixed, because the launch counts tiles per sequence
_TILES = [
    Tile({"BLOCK_K": k}, warps, stages) for k, warps, stages in ((64, 8, 1), (32, 8, 2), (32, 4, 1))
]
_CHANNELS = 256


@triton.jit
def _tokens(X, first, tokens, col, width, stride, BLOCK_T: tl.constexpr):
    """A tile of a sequence's tokens and channels in float32, 0 outside, and where it is inside.

    Addresses are a 64-bit origin and 32-bit offsets within the tile.
    """
    token = tl.arange(0, BLOCK_T)
    mask = (first + token < tokens)[:, None] & (col < width)[None, :]
    X += tl.cast(first, tl.int64) * stride
    x = tl.load(X + token[:, None] * stride + col[None, :], mask=mask, other=0.0)
    return x.to(tl.float32), mask


@triton.jit
def _mean_kernel(
    X, Starts, Mean, Largest, width, stride, blocks, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Mean over the tokens of one sequence, and max |x|, for one block of channels."""
    sequence = tl.cast(tl.program_id(0), tl.int64)
    block = tl.program_id(1)
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(Starts + sequence)
    tokens = (tl.load(Starts + sequence + 1) - start).to(tl.int32)
    X += start * stride
    share = 1.0 / tl.maximum(tokens, 1).to(tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(0, tokens, BLOCK_T):
        x, _ = _tokens(X, t, tokens, col, width, stride, BLOCK_T)
        mean += tl.sum(x * share, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    tl.store(Mean + sequence * width + col, mean, mask=col < width)
    tl.store(Largest + sequence * blocks + block, tl.max(largest, 0))


@triton.jit
def _centred(X, Mean, first, tokens, scale, col, width, stride, BLOCK_T: tl.constexpr):
    """s·(x − mean) of a tile of a sequence's tokens and channels; 0 outside."""
    x, mask = _tokens(X, first, tokens, col, width, stride, BLOCK_T)
    mean = tl.load(Mean + col, mask=col < width, other=0.0)
    return tl.where(mask, (x - mean[None, :]) * scale, 0.0)


@triton.jit
def _gram_tile(
    X,
    Mean,
    row,
    column,
    tokens,
    scale,
    width,
    stride,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of Xc·Xcᵀ."""
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for k in range(0, width, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        a = _centred(X, Mean, row, tokens, scale, col, width, stride, BLOCK_T)
        b = _centred(X, Mean, column, tokens, scale, col, width, stride, BLOCK_T)
        gram = tl.dot(a, tl.trans(b), gram, input_precision=PRECISION)
    return gram


@triton.jit
def _add_product(
    Out,
    gram,
    X,
    Mean,
    first,
    row,
    column,
    tokens,
    scale,
    width,
    stride,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out[row block] += gram·Xc[column block]; the first column block overwrites."""
    token = row + tl.arange(0, BLOCK_T)
    # What the previous column block wrote is read again below.
    tl.debug_barrier()
    for d in range(0, width, BLOCK_K):
        col = d + tl.arange(0, BLOCK_K)
        x = _centred(X, Mean, column, tokens, scale, col, width, stride, BLOCK_T)
        at = (first + token)[:, None] * width + col[None, :]
        mask = (token < tokens)[:, None] & (col < width)[None, :]
        again = tl.full((BLOCK_K,), 0, tl.int32) + column > 0
        total = tl.load(Out + at, mask=mask & again[None, :], other=0.0)
        total = tl.dot(gram, x, total, input_precision=PRECISION)
        tl.store(Out + at, total, mask=mask)


@autotune(_TILES, key=["width_x", "width_y"])
@triton.jit
def _relation_kernel(
    X,
    Y,
    MeanX,
    MeanY,
    ScaleX,
    ScaleY,
    Starts,
    FirstTile,
    SequenceOfTile,
    Partial,
    OfInner,
    OfNorm,
    sequences,
    width_x,
    width_y,
    stride_x,
    stride_y,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ K_x∘K_y, Σ K_x², Σ K_y² of one block of tokens, and K_y·Xc, K_x·Xc where wanted."""
    tile = tl.cast(tl.program_id(0), tl.int64)
    sequence = tl.load(SequenceOfTile + tile)
    if sequence >= sequences:
        return
    start = tl.load(Starts + sequence)
    tokens = (tl.load(Starts + sequence + 1) - start).to(tl.int32)
    row = (tile - tl.load(FirstTile + sequence)).to(tl.int32) * BLOCK_T
    X += start * stride_x
    Y += start * stride_y
    scale_x = tl.load(ScaleX + sequence)
    scale_y = tl.load(ScaleY + sequence)
    MeanX += sequence * width_x
    MeanY += sequence * width_y
    cross = tl.zeros((BLOCK_T,), tl.float32)
    of_x = tl.zeros((BLOCK_T,), tl.float32)
    of_y = tl.zeros((BLOCK_T,), tl.float32)
    for column in range(0, tokens, BLOCK_T):
        # One Gram tile after the other: as operands of a product both at once fill the registers.
        ky = _gram_tile(
            Y, MeanY, row, column, tokens, scale_y, width_y, stride_y, PRECISION, BLOCK_T, BLOCK_K
        )
        of_y += tl.sum(ky * ky, 1)
        if OfInner is not None:
            _add_product(
                OfInner, ky, X, MeanX, start, row, column, tokens, scale_x, width_x, stride_x,
                PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        kx = _gram_tile(
            X, MeanX, row, column, tokens, scale_x, width_x, stride_x, PRECISION, BLOCK_T, BLOCK_K
        )
        of_x += tl.sum(kx * kx, 1)
        cross += tl.sum(kx * ky, 1)
        if OfNorm is not None:
            _add_product(
                OfNorm, kx, X, MeanX, start, row, column, tokens, scale_x, width_x, stride_x,
                PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    plane = tl.cast(tl.num_programs(0), tl.int64)
    tl.store(Partial + tile, tl.sum(cross, 0))
    tl.store(Partial + plane + tile, tl.sum(of_x, 0))
    tl.store(Partial + 2 * plane + tile, tl.sum(of_y, 0))


@triton.jit
def _reduce_kernel(Partial, FirstTile, Sums, tiles, sequences, BLOCK: tl.constexpr):
    """Sums over the tiles of one sequence."""
    sequence = tl.cast(tl.program_id(0), tl.int64)
    which = tl.program_id(1)
    start = tl.load(FirstTile + sequence)
    end = tl.load(FirstTile + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(start, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        total += tl.load(Partial + tl.cast(which, tl.int64) * tiles + at, mask=at < end, other=0.0)
    tl.store(Sums + tl.cast(which, tl.int64) * sequences + sequence, tl.sum(total, 0))


def relation(
    x: Tensor, y: Tensor, starts: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """⟨K_x,K_y⟩, ‖K_x‖, ‖K_y‖ (S,), and the gradients of the first two, (R, D_x) or (0, D_x).

    ``starts`` stays on the device: tiles are counted there, and the launch has room for the most
    there can be.
    """
    if not x.is_cuda:
        sequences(starts, len(x))
    outputs = inner, norm_x, norm_y, of_inner, of_norm = zero_outputs(x, starts, want_gradient)
    count, rows = starts.shape[0] - 1, x.shape[0]
    if count == 0 or rows == 0 or x.shape[1] == 0 or y.shape[1] == 0:
        return outputs
    x, y, starts = near_rows(x, _BLOCK_T), near_rows(y, _BLOCK_T), starts.contiguous()
    lengths = starts.diff()
    first_tile = torch.zeros_like(starts)
    torch.cumsum((lengths + _BLOCK_T - 1) // _BLOCK_T, 0, out=first_tile[1:])
    tiles = rows // _BLOCK_T + count
    of_tile = torch.searchsorted(
        first_tile[1:], torch.arange(tiles, device=x.device), right=True
    )
    with device_of(x):
        (mean_x, scale_x), (mean_y, scale_y) = (_means(part, starts) for part in (x, y))
        partial = inner.new_empty(3, tiles)
        _relation_kernel[(tiles,)](
            x, y, mean_x, mean_y, scale_x, scale_y, starts, first_tile, of_tile, partial,
            of_inner if want_gradient else None, of_norm if want_gradient else None,
            count, x.shape[1], y.shape[1], x.stride(0), y.stride(0),
            PRECISION=dot_precision(), BLOCK_T=_BLOCK_T,
        )  # fmt: skip
        sums = inner.new_empty(3, count)
        _reduce_kernel[(count, 3)](partial, first_tile, sums, tiles, count, BLOCK=64)
    limit = torch.finfo(torch.float32).max
    norms = sums[1:].sqrt()
    size_x, size_y = 1 / scale_x, 1 / scale_y
    inner.copy_((sums[0] * size_x * size_x * size_y * size_y).clamp_max(limit))
    norm_x.copy_((norms[0] * size_x * size_x).clamp_max(limit))
    norm_y.copy_((norms[1] * size_y * size_y).clamp_max(limit))
    if want_gradient:
        factor = (2 * size_x * size_y * size_y).clamp_max(limit)
        of_inner *= factor.repeat_interleave(lengths, output_size=rows)[:, None]
        divisor = torch.where(norms[0] > 0, norms[0], 1.0)
        of_norm *= (2 * size_x / divisor).repeat_interleave(lengths, output_size=rows)[:, None]
    return outputs


def _means(x: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (S, D) and power-of-two scale (S,) of every sequence."""
    count, width = starts.shape[0] - 1, x.shape[1]
    blocks = triton.cdiv(width, _CHANNELS)
    mean = x.new_empty(count, width, dtype=torch.float32)
    largest = mean.new_empty(count, blocks)
    _mean_kernel[(count, blocks)](
        x, starts, mean, largest, width, x.stride(0), blocks, BLOCK_T=_BLOCK_T, BLOCK_D=_CHANNELS
    )
    scale = mean.new_empty(count)
    _scale_kernel[(count,)](largest, scale, blocks, BLOCK=triton.next_power_of_2(blocks))
    return mean, scale


@triton.jit
def _scale_kernel(Largest, Scale, blocks, BLOCK: tl.constexpr):
    """The power of two that brings a sequence's largest element near 1."""
    sequence = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    largest = tl.load(Largest + sequence * blocks + col, mask=col < blocks, other=0.0)
    tl.store(Scale + sequence, power_of_two_scale(tl.max(largest, 0)))


def aot_specs(target: Target) -> list[KernelSpec]:
    """16 sequences of 512 tokens, 4,096 channels in x and y, with and without gradients."""
    count, tokens, width = 16, 512, 4096

    def spec(dtype: torch.dtype, gradient: bool) -> KernelSpec:
        name = STORAGE[dtype]
        products = 2 + 2 * gradient
        return KernelSpec(
            name=f"relation/{'gradient' if gradient else 'terms'}/{name}",
            kernel=_relation_kernel,
            args={
                "X": f"*{name}:16",
                "Y": f"*{name}:16",
                **{p: "*fp32:16" for p in ("MeanX", "MeanY", "ScaleX", "ScaleY")},
                **{p: "*i64:16" for p in ("Starts", "FirstTile", "SequenceOfTile")},
                "Partial": "*fp32:16",
                **({"OfInner": "*fp32:16", "OfNorm": "*fp32:16"} if gradient else {}),
                **{i: "i32:16" for i in ("sequences", "width_x", "width_y")},
                **{i: "i32:16" for i in ("stride_x", "stride_y")},
            },
            constexprs={
                **({} if gradient else {"OfInner": None, "OfNorm": None}),
                "PRECISION": target.dot_precision,
                "BLOCK_T": _BLOCK_T,
            },
            tiles=_TILES,
            kind="gemm",
            bytes=count * tokens * width * (2 * dtype.itemsize + 8 * gradient),
            flops=products * 2 * count * tokens * tokens * width,
            compute="tf32x3" if target.backend == "cuda" else "fp32",
        )

    return [
        *(spec(d, g) for d in (torch.bfloat16, torch.float32) for g in (False, True)),
        KernelSpec(
            name="relation/mean/bf16",
            kernel=_mean_kernel,
            args={
                "X": "*bf16:16",
                "Starts": "*i64:16",
                "Mean": "*fp32:16",
                "Largest": "*fp32:16",
                **{i: "i32:16" for i in ("width", "stride", "blocks")},
            },
            constexprs={"BLOCK_T": _BLOCK_T, "BLOCK_D": _CHANNELS},
            kind="bytes",
            bytes=count * tokens * width * 2,
            flops=2 * count * tokens * width,
        ),
    ]
