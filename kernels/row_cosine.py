"""cos(x_n, y_n) per row, alone or with weighted gradients, from one pass over both operands.

c = x·y / (‖x‖‖y‖),  ∂c/∂x = (y/‖y‖ − c·x/‖x‖) / ‖x‖ and likewise for y, times the row's weight.  A
program holds its rows in registers, so each operand is read once and each wanted gradient written
once.  Rows are scaled by a power of two near their largest element before anything is squared: no
norm is too large or too small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    KernelSpec,
    Target,
    Tile,
    autotune,
    device_of,
    power_of_two_scale,
    reciprocal_norm,
    row_major,
)

# Sixteen waves of 64 leave a thread 8 bytes of a bf16 row.
_TILES = [Tile({}, 8), Tile({}, 16, never_on=("gfx942",)), Tile({}, 4)]


@triton.jit
def _gradient(unit_other, cosine, unit, weight, inverse_norm, scale, LIMIT: tl.constexpr):
    """w·(ŷ − c·x̂)/‖x‖, saturated at the largest value of the dtype it is stored in."""
    gradient = (unit_other - cosine[:, None] * unit) * weight[:, None]
    gradient = gradient * inverse_norm[:, None] * scale[:, None]
    return tl.clamp(gradient, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@autotune(_TILES, key=["width"])
@triton.heuristics({"EVEN": lambda a: a["width"] == a["BLOCK_D"] and a["rows"] % a["BLOCK_N"] == 0})
@triton.jit
def _row_cosine_kernel(
    X,
    Y,
    Weight,
    Cosine,
    GradX,
    GradY,
    rows,
    width,
    stride_x,
    stride_y,
    stride_weight,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    LIMIT_X: tl.constexpr,
    LIMIT_Y: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    if EVEN:
        keep = None
        other = None
    else:
        keep = (row < rows)[:, None] & (col < width)[None, :]
        other = 0.0
    x = tl.load(X + row[:, None] * stride_x + col[None, :], mask=keep, other=other).to(tl.float32)
    y = tl.load(Y + row[:, None] * stride_y + col[None, :], mask=keep, other=other).to(tl.float32)

    scale_x = power_of_two_scale(tl.max(tl.abs(x), 1))
    scale_y = power_of_two_scale(tl.max(tl.abs(y), 1))
    x *= scale_x[:, None]
    y *= scale_y[:, None]
    inverse_x = reciprocal_norm(tl.sum(x * x, 1))
    inverse_y = reciprocal_norm(tl.sum(y * y, 1))
    x *= inverse_x[:, None]
    y *= inverse_y[:, None]
    cosine = tl.sum(x * y, 1)
    tl.store(Cosine + row, cosine, mask=row < rows)

    at = row[:, None] * width + col[None, :]
    if GRAD_X or GRAD_Y:
        weight = tl.load(Weight + row * stride_weight, mask=row < rows, other=0.0)
    if GRAD_X:
        gradient = _gradient(y, cosine, x, weight, inverse_x, scale_x, LIMIT_X)
        tl.store(GradX + at, gradient.to(GradX.dtype.element_ty), mask=keep)
    if GRAD_Y:
        gradient = _gradient(x, cosine, y, weight, inverse_y, scale_y, LIMIT_Y)
        tl.store(GradY + at, gradient.to(GradY.dtype.element_ty), mask=keep)


def _tile(width: int) -> tuple[int, int]:
    """Rows and channels of a tile: whole rows, and several of them where they are narrow."""
    block_d = max(16, triton.next_power_of_2(width))
    return max(1, 2048 // block_d), block_d


def row_cosine_gradient(
    x: Tensor, y: Tensor, weight: Tensor, grad_x: bool, grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines c (N,) in float32 of the rows of x and y (N, D), and gradients of Σ weight_n·c_n.

    ``weight`` (N,) is float32.  ``grad_x`` and ``grad_y`` say which gradients to write (N, D, in
    the operand's dtype); the others come back empty.  A zero row has cosine 0 and no gradient.
    """
    rows, width = x.shape
    cosines = x.new_zeros(rows, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if grad_x else x.new_empty(0)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format) if grad_y else y.new_empty(0)
    if rows == 0 or width == 0:
        return cosines, dx, dy
    x, y = row_major(x), row_major(y)
    block_n, block_d = _tile(width)
    with device_of(x):
        _row_cosine_kernel[(triton.cdiv(rows, block_n),)](
            x, y, weight, cosines, dx, dy, rows, width, x.stride(0), y.stride(0), weight.stride(0),
            GRAD_X=grad_x,
            GRAD_Y=grad_y,
            LIMIT_X=torch.finfo(x.dtype).max,
            LIMIT_Y=torch.finfo(y.dtype).max,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )  # fmt: skip
    return cosines, dx, dy


def row_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines (N,) of the rows of x and y (N, D), without gradients."""
    return row_cosine_gradient(x, y, x.new_empty(0, dtype=torch.float32), False, False)[0]


def aot_specs(target: Target) -> list[KernelSpec]:
    """8,192 rows of 4,096 channels (an even tile) and of 3,584 (a masked one)."""
    rows = 8192
    return [
        KernelSpec(
            name=f"row_cosine/{name}/{width}",
            kernel=_row_cosine_kernel,
            args={
                "X": f"*{name}:16",
                "Y": f"*{name}:16",
                "Weight": "*fp32:16",
                "Cosine": "*fp32:16",
                "GradX": f"*{name}:16",
                "GradY": f"*{name}:16",
                "rows": "i32:16",
                "width": "i32:16",
                "stride_x": "i32:16",
                "stride_y": "i32:16",
                "stride_weight": "i32",
            },
            constexprs={
                "GRAD_X": True,
                "GRAD_Y": False,
                "LIMIT_X": torch.finfo(dtype).max,
                "LIMIT_Y": torch.finfo(dtype).max,
                "BLOCK_N": _tile(width)[0],
                "BLOCK_D": _tile(width)[1],
                "EVEN": width == _tile(width)[1],
            },
            tiles=_TILES,
            kind="bytes",
            bulk_store=True,
            bytes=3 * rows * width * dtype.itemsize,
            flops=10 * rows * width,
        )
        for dtype, name, width in (
            (torch.float32, "fp32", 4096),
            (torch.bfloat16, "bf16", 4096),
            (torch.bfloat16, "bf16", 3584),
        )
    ]
