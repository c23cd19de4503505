"""X·Mᵀ with the row norms of X from the same tiles, for several layers in one launch.

A persistent grouped GEMM: every program walks the output tiles of all groups, found through a
table of addresses and row counts.  While the K loop multiplies tiles of X it adds up their
squares, and the epilogue divides each row by its norm, so that the un-normalised product never
exists in memory.

Squares of ordinary rows are summed as they are.  A tile with a row whose sum of squares leaves
[2⁻⁸⁰, 2¹⁰⁰] reads its rows once more and sums squares at two scales; one of them is safe for any
norm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    INTERPRETED,
    STORAGE,
    TRITON_DTYPE,
    KernelSpec,
    Target,
    Tile,
    autotune,
    device_of,
    dot_precision,
    near_rows,
    persistent_programs,
    reciprocal_norm,
    size_class,
    to_device,
)


def _tile(
    rows: int, outputs: int, channels: int, warps: int, stages: int, *never_on: str
) -> Tile:
    blocks = {"BLOCK_N": rows, "BLOCK_M": outputs, "BLOCK_K": channels}
    return Tile(blocks, warps, stages, never_on)


_HALF_TILES = [
    # The widest tile wants Hopper's asynchronous products or Blackwell's tensor memory.
    _tile(128, 256, 64, 8, 3, "sm_80", "gfx942"),
    _tile(128, 128, 64, 8, 3),
    _tile(64, 128, 64, 4, 4),
    _tile(64, 64, 64, 4, 4),
]
_FLOAT_TILES = [_tile(64, 128, 32, 8, 3), _tile(64, 64, 32, 4, 3)]

_TABLE_FIELDS = 5  # addresses of X, M and Out; rows; stride of X's rows
_FIELDS = tl.constexpr(_TABLE_FIELDS)

_SMALL = tl.constexpr(2.0**-80)
_LARGE = tl.constexpr(2.0**100)
_SCALE = tl.constexpr(2.0**90)


@triton.jit
def _rescaled_norms(X, offsets, col, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ(x·2⁹⁰)² and Σ(x·2⁻⁹⁰)² of a tile's rows."""
    small = tl.zeros((BLOCK_N,), tl.float32)
    large = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, width, BLOCK_K):
        x = tl.load(X + k + offsets, mask=(k + col < width)[None, :], other=0.0).to(tl.float32)
        up, down = x * _SCALE, x * (1.0 / _SCALE)
        small += tl.sum(up * up, 1)
        large += tl.sum(down * down, 1)
    return small, large


@triton.jit
def _align_tile(
    X,
    M,
    Out,
    rows,
    outputs,
    width,
    stride_x,
    stride_m,
    tile,
    NORMALIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXTREME: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    # Tiles are walked in bands of SWIZZLE row blocks: concurrent programs share M and X in L2.
    tiles_n = tl.cdiv(rows, BLOCK_N)
    tiles_m = tl.cdiv(outputs, BLOCK_M)
    band = tile // (SWIZZLE * tiles_m)
    height = tl.minimum(tiles_n - band * SWIZZLE, SWIZZLE)
    inside = tile - band * SWIZZLE * tiles_m
    first_n = (band * SWIZZLE + inside % height) * BLOCK_N
    first_m = (inside // height) * BLOCK_M

    # Addresses: a 64-bit origin per tile, 32-bit offsets within it.  Rows past the end re-read the
    # last one, which costs no mask, and are not stored.
    col = tl.arange(0, BLOCK_K)
    row_n = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_n)
    row_m = tl.minimum(tl.arange(0, BLOCK_M), outputs - 1 - first_m)
    X += first_n.to(tl.int64) * stride_x
    M += first_m.to(tl.int64) * stride_m
    offsets_x = row_n[:, None] * stride_x + col[None, :]
    offsets_m = row_m[:, None] * stride_m + col[None, :]

    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(X + k + offsets_x)
            m = tl.load(M + k + offsets_m)
        else:
            keep = (k + col < width)[None, :]
            x = tl.load(X + k + offsets_x, mask=keep, other=0.0)
            m = tl.load(M + k + offsets_m, mask=keep, other=0.0)
        if INTERPRETED:
            x, m = x.to(tl.float32), m.to(tl.float32)
        product = tl.dot(x, tl.trans(m), product, input_precision=PRECISION)
        if NORMALIZE:
            wide = x.to(tl.float32)
            squares += wide * wide

    if NORMALIZE:
        total = tl.sum(squares, 1)
        inverse = reciprocal_norm(total)
        if EXTREME:
            unsafe = (total < _SMALL) | (total > _LARGE)
            if tl.max(unsafe.to(tl.int32), 0) > 0:
                small, large = _rescaled_norms(X, offsets_x, col, width, BLOCK_N, BLOCK_K)
                inverse = tl.where(total < _SMALL, reciprocal_norm(small), inverse)
                inverse = tl.where(total > _LARGE, reciprocal_norm(large), inverse)
            rescale = tl.where(total < _SMALL, _SCALE, 1.0)
            rescale = tl.where(total > _LARGE, 1.0 / _SCALE, rescale)
            product *= rescale[:, None]
        product *= inverse[:, None]

    keep_n = first_n + tl.arange(0, BLOCK_N) < rows
    out_m = tl.arange(0, BLOCK_M)
    Out += first_n.to(tl.int64) * outputs + first_m
    tl.store(
        Out + tl.arange(0, BLOCK_N)[:, None] * outputs + out_m[None, :],
        product.to(Out.dtype.element_ty),
        mask=keep_n[:, None] & (first_m + out_m < outputs)[None, :],
    )


@triton.heuristics({"EVEN_K": lambda a: a["width"] % a["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["row_class"])
def _align_kernel(
    X,
    M,
    Out,
    Table,
    groups,
    rows,
    outputs,
    width,
    stride_x,
    row_class,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXTREME: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWIZZLE: tl.constexpr = 8,
):
    first = 0
    tile = tl.program_id(0)
    for group in range(groups):
        if Table is None:
            x, m, out, height, stride = X, M, Out, rows, stride_x
        else:
            entry = Table + group * _FIELDS
            x = tl.load(entry).to(tl.pointer_type(DTYPE))
            m = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
            out = tl.load(entry + 2).to(tl.pointer_type(DTYPE))
            height = tl.load(entry + 3).to(tl.int32)
            stride = tl.load(entry + 4).to(tl.int32)
            if ALIGNED:
                x, m, out = tl.multiple_of(x, 16), tl.multiple_of(m, 16), tl.multiple_of(out, 16)
                stride = tl.multiple_of(stride, 16)
        last = first + tl.cdiv(height, BLOCK_N) * tl.cdiv(outputs, BLOCK_M)
        while tile < last:
            _align_tile(
                x, m, out, height, outputs, width, stride, width, tile - first,
                NORMALIZE, EVEN_K, EXTREME, PRECISION, INTERPRETED,
                BLOCK_N, BLOCK_M, BLOCK_K, SWIZZLE,
            )  # fmt: skip
            tile += tl.num_programs(0)
        first = last


_KEY = ["width", "outputs", "row_class"]
_half_kernel = autotune(_HALF_TILES, key=_KEY)(_align_kernel)
_float_kernel = autotune(_FLOAT_TILES, key=_KEY)(_align_kernel)


def _launch(
    hidden: Sequence[Tensor], matrix: Sequence[Tensor], out: Sequence[Tensor], normalize: bool
) -> None:
    """One launch over groups of equal widths and dtype."""
    x, m = hidden[0], matrix[0]
    outputs, width = m.shape
    grouped = len(hidden) > 1
    table = None
    if grouped:
        entries = [
            (h.data_ptr(), a.data_ptr(), o.data_ptr(), h.shape[0], h.stride(0))
            for h, a, o in zip(hidden, matrix, out, strict=True)
        ]
        table = to_device(entries, torch.int64, x)
    aligned = width % 16 == 0 and all(
        h.data_ptr() % 16 == 0 and a.data_ptr() % 16 == 0 and h.stride(0) % 16 == 0
        for h, a in zip(hidden, matrix, strict=True)
    )
    rows = sum(h.shape[0] for h in hidden)
    kernel = _float_kernel if x.dtype == torch.float32 else _half_kernel

    def grid(meta: dict[str, int]) -> tuple[int]:
        across = triton.cdiv(outputs, meta["BLOCK_M"])
        tiles = sum(triton.cdiv(h.shape[0], meta["BLOCK_N"]) for h in hidden) * across
        return (persistent_programs(x, tiles),)

    with device_of(x):
        kernel[grid](
            x, m, out[0], table, len(hidden), rows, outputs, width, x.stride(0), size_class(rows),
            DTYPE=TRITON_DTYPE[x.dtype],
            ALIGNED=aligned,
            NORMALIZE=normalize,
            EXTREME=x.dtype != torch.float16,
            PRECISION=dot_precision() if x.dtype == torch.float32 else "ieee",
            INTERPRETED=INTERPRETED,
        )  # fmt: skip


def align_rows_grouped(
    hidden: Sequence[Tensor], matrix: Sequence[Tensor], normalize: bool
) -> list[Tensor]:
    """h·Mᵀ (÷‖h‖ when ``normalize``) of every pair (N_g, D_src), (D_tgt, D_src) -> (N_g, D_tgt).

    Groups of equal widths and dtype share one launch.  A zero row gives a zero row.

    While a CUDA graph is captured every group has a launch of its own: a replay would copy the
    table of addresses again, from host memory that is free by then.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    out = [h.new_empty(h.shape[0], m.shape[0]) for h, m in zip(hidden, matrix, strict=True)]
    launches: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for g, (h, m) in enumerate(zip(hidden, matrix, strict=True)):
        if h.shape[1] == 0:
            out[g].zero_()
        elif out[g].numel():
            launches[(*m.shape, h.dtype, g if capturing else None)].append(g)
    for groups in launches.values():
        _launch(
            [near_rows(hidden[g]) for g in groups],
            [matrix[g].contiguous() for g in groups],
            [out[g] for g in groups],
            normalize,
        )
    return out


def align_rows(hidden: Tensor, matrix: Tensor, normalize: bool) -> Tensor:
    """h·Mᵀ (÷‖h‖ when ``normalize``): (N, D_src), (D_tgt, D_src) -> (N, D_tgt)."""
    return align_rows_grouped([hidden], [matrix], normalize)[0]


def aot_specs(target: Target) -> list[KernelSpec]:
    """Llama-2 13B to 7B: 8,192 rows of 5,120 channels to 4,096, alone and for eight layers."""
    rows, width, outputs, layers = 8192, 5120, 4096, 8

    def spec(dtype: torch.dtype, grouped: bool, even: bool = True) -> KernelSpec:
        name = STORAGE[dtype]
        wide = dtype == torch.float32
        groups = layers if grouped else 1
        return KernelSpec(
            name=f"align_rows{'_grouped' if grouped else ''}/{name}{'' if even else '/masked'}",
            kernel=_align_kernel,
            args={
                "X": f"*{name}:16",
                "M": f"*{name}:16",
                "Out": f"*{name}:16",
                **({"Table": "*i64:16"} if grouped else {}),
                **({"groups": "i32"} if grouped else {}),
                "rows": "i32:16",
                "outputs": "i32:16",
                "width": "i32:16",
                "stride_x": "i32:16",
                "row_class": "i32",
            },
            constexprs={
                **({} if grouped else {"Table": None, "groups": 1}),
                "DTYPE": TRITON_DTYPE[dtype],
                "ALIGNED": True,
                "NORMALIZE": True,
                "EXTREME": dtype != torch.float16,
                "PRECISION": target.dot_precision if wide else "ieee",
                "INTERPRETED": False,
                "EVEN_K": even,
                "SWIZZLE": 8,
            },
            tiles=_FLOAT_TILES if wide else _HALF_TILES,
            kind="gemm",
            bytes=groups * (rows * (width + outputs) + width * outputs) * dtype.itemsize,
            flops=groups * 2 * rows * width * outputs,
            compute="tf32x3" if wide and target.backend == "cuda" else name,
        )

    return [
        spec(torch.bfloat16, False),
        spec(torch.bfloat16, True),
        spec(torch.float16, False),
        spec(torch.float32, False),
        spec(torch.bfloat16, False, even=False),
        spec(torch.float32, False, even=False),
    ]
