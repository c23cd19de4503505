"""Gather, subtract, interpolate, normalise and cast activation rows: one read, one write.

``out[offset + n] = cast(unit?(s·((1−λ)(value − minus) + λ(other − other_minus))[index[n]]))``.  A
program holds its rows in registers between the read and the write, so the norm costs no second
read. With ``normalize`` the rows are scaled by powers of two before squaring; a positive ``s``
then cancels.
"""

from __future__ import annotations

import math

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
def _read(Base, batch, token, stride_b, stride_t, col, keep, PRESCALE: tl.constexpr):
    at = batch * stride_b + token * stride_t
    rows = tl.load(Base + at[:, None] + col[None, :], mask=keep, other=0.0)
    return rows.to(tl.float32) * PRESCALE


@autotune(_TILES, key=["width"])
@triton.jit
def _capture_rows_kernel(
    Out,
    Index,
    Value,
    Minus,
    Other,
    OtherMinus,
    rows,
    available,
    width,
    tokens,
    stride_out,
    value_b,
    value_t,
    minus_b,
    minus_t,
    other_b,
    other_t,
    other_minus_b,
    other_minus_t,
    lam,
    scale,
    NORMALIZE: tl.constexpr,
    PRESCALE: tl.constexpr,
    BATCHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    batch = tl.load(Index + row, mask=row < rows, other=0)
    known = ((batch >= 0) & (batch < available))[:, None]
    keep = inside & known
    token = tl.zeros_like(batch)
    if BATCHED:
        token = batch % tokens
        batch = batch // tokens

    x = _read(Value, batch, token, value_b, value_t, col, keep, PRESCALE)
    if Minus is not None:
        x -= _read(Minus, batch, token, minus_b, minus_t, col, keep, PRESCALE)
    if Other is not None:
        y = _read(Other, batch, token, other_b, other_t, col, keep, PRESCALE)
        if OtherMinus is not None:
            y -= _read(OtherMinus, batch, token, other_minus_b, other_minus_t, col, keep, PRESCALE)
        x = (1.0 - lam) * x + lam * y
    x *= scale
    if NORMALIZE:
        x *= power_of_two_scale(tl.max(tl.abs(x), 1))[:, None]
        x *= reciprocal_norm(tl.sum(x * x, 1))[:, None]
    x = tl.where(known, x, float("nan"))
    tl.store(
        Out + row[:, None] * stride_out + col[None, :], x.to(Out.dtype.element_ty), mask=inside
    )


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Strides between sequences and between tokens; (R, D) is R sequences of one token."""
    if x is None:
        return 0, 0
    return (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), 0)


def _tile(width: int) -> tuple[int, int]:
    """Rows and channels of a tile: whole rows, and several of them where they are narrow."""
    block_d = max(16, triton.next_power_of_2(width))
    return max(1, 2048 // block_d), block_d


def capture_rows(
    out: Tensor,
    offset: int,
    index: Tensor,
    value: Tensor,
    minus: Tensor | None,
    other: Tensor | None,
    other_minus: Tensor | None,
    lam: float,
    scale: float,
    normalize: bool,
) -> None:
    """Write rows ``index`` (N,) of the combined activations to ``out[offset : offset + N]``.

    value and its companions are (R, D) or (B, T, D), of any float dtype up to 32 bits; ``index``
    counts rows of the flattened (B·T, D), and one that does not exist gives NaN.  out is (M, D).
    """
    rows, width = index.shape[0], value.shape[-1]
    if rows == 0 or width == 0:
        return
    value, minus, other, other_minus = (
        None if x is None else row_major(x) for x in (value, minus, other, other_minus)
    )
    target = out[offset : offset + rows]
    index = index.to(value.device, non_blocking=True).contiguous()
    prescale = 1.0
    if normalize:
        # A quarter keeps differences of the largest floats finite.  Of the scale the sign is left.
        prescale = 1.0 if minus is None and other is None else 0.25
        scale = math.copysign(1.0, scale) if scale else 0.0
    block_n, block_d = _tile(width)
    with device_of(value):
        _capture_rows_kernel[(triton.cdiv(rows, block_n),)](
            target, index, value, minus, other, other_minus, rows,
            value.shape[:-1].numel(), width, value.shape[1] if value.dim() == 3 else 1,
            target.stride(0),
            *_strides(value), *_strides(minus), *_strides(other), *_strides(other_minus),
            float(lam), float(scale),
            NORMALIZE=normalize,
            PRESCALE=prescale,
            BATCHED=value.dim() == 3,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )  # fmt: skip


def aot_specs(target: Target) -> list[KernelSpec]:
    """4,096 of 8,192 rows of 4,096 channels, plain and as an interpolated contribution."""
    rows, width = 4096, 4096
    block_n, block_d = _tile(width)

    def spec(label: str, name: str, itemsize: int, operands: int) -> KernelSpec:
        pointers = ("Value", "Minus", "Other", "OtherMinus")
        types = {p: f"*{name}:16" for p in pointers[:operands]}
        absent = {p: None for p in pointers[operands:]}
        strides = ("value", "minus", "other", "other_minus")
        return KernelSpec(
            name=f"capture_rows/{name}/{label}",
            kernel=_capture_rows_kernel,
            args={
                "Out": f"*{name}:16",
                "Index": "*i64:16",
                **types,
                "rows": "i32:16",
                "available": "i32:16",
                "width": "i32:16",
                "tokens": "i32:16",
                "stride_out": "i32:16",
                **{f"{s}_{axis}": "i32:16" for s in strides for axis in "bt"},
                "lam": "fp32",
                "scale": "fp32",
            },
            constexprs={
                **absent,
                "NORMALIZE": True,
                "PRESCALE": 1.0 if operands == 1 else 0.25,
                "BATCHED": True,
                "BLOCK_N": block_n,
                "BLOCK_D": block_d,
            },
            tiles=_TILES,
            kind="bytes",
            bulk_store=True,
            bytes=(operands + 1) * rows * width * itemsize,
            flops=(3 * operands + 3) * rows * width,
        )

    return [
        spec("one", "bf16", 2, 1),
        spec("one", "fp32", 4, 1),
        spec("interpolated", "bf16", 2, 4),
    ]
