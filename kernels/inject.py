"""W += s·B·A in place over a list of matrices, in one launch and with one rounding.

Programs walk the tiles of all matrices through a table of addresses, shapes and strides.  A tile
of W is read once, the product of its slices of B and A added in float32, and written once; the
bits it held go to the backup on the way.  For a transposed weight (Conv1D) the factors trade
places, which is only a matter of strides.

**Stochastic rounding.**  Element (i, j) of matrix g, as stored, draws output word ``j % 4`` of
Philox-4x32-10 with key (seed low, seed high) and counter (j // 4, i, g, 0).  With x = lo + f·(hi −
lo) between neighbours of the storage dtype, |lo| <= |x| < |hi|, the element becomes hi when
``(word >> 8) / 2²⁴ < f`` and lo otherwise: right on average, and the same bits on every device.

The launch is not autotuned: timing it would add the delta more than once.
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
    device_of,
    dot_precision,
    persistent_programs,
    to_device,
)

# Tile of W, warps, programs to a multiprocessor: each waits for its tile, multiplies and writes, so
# several small programs keep more loads in flight than one large one.
_BLOCK_I, _BLOCK_J, _WARPS, _PROGRAMS = 64, 64, 4, 4

# Of the rank at a time.  Longer float32 slices of the factors, times three TF32 products, spill.
_BLOCK_R = 16

# A matrix in the table: addresses of W, its backup and both factors; W's rows and columns, rank,
# position in the list; strides of W's rows, the backup's rows, (i, r) of the left factor and (r,
# j) of the right one.
_TABLE_FIELDS = 14
_FIELDS = tl.constexpr(_TABLE_FIELDS)


@triton.jit
def _words(seed, position, row, block, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Random words of a tile (BLOCK_I, BLOCK_J): every Philox call serves four neighbours."""
    quad = block * (BLOCK_J // 4) + tl.arange(0, BLOCK_J // 4)
    shape: tl.constexpr = (BLOCK_I, BLOCK_J // 4)
    c0 = tl.broadcast_to(quad[None, :], shape).to(tl.uint32)
    c1 = tl.broadcast_to(row[:, None], shape).to(tl.uint32)
    c2 = tl.zeros(shape, tl.uint32) + position.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros(shape, tl.uint32))
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_I, BLOCK_J)


@triton.jit
def _round_stochastically(x, words, dtype: tl.constexpr):
    """float32 ``x`` to one of its two neighbours in ``dtype`` (bf16 or f16), still in float32."""
    uniform = (words >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216)
    bits = x.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    if dtype == tl.bfloat16:
        fraction = (bits & 0xFFFF).to(tl.float32) * (1.0 / 65536)
        rounded = (bits & -65536) + tl.where(uniform < fraction, 65536, 0)
        rounded = rounded.to(tl.float32, bitcast=True)
    else:
        # Neighbours are 2^(e-10) apart, and 2^-24 where float16 is subnormal.
        spacing = tl.maximum(exponent - (10 << 23), (127 - 24) << 23)
        inverse = ((254 << 23) - spacing).to(tl.float32, bitcast=True)
        steps = tl.abs(x) * inverse
        low = tl.floor(steps)
        low += tl.where(uniform < steps - low, 1.0, 0.0)
        magnitude = low * spacing.to(tl.float32, bitcast=True)
        rounded = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(exponent == 0x7F800000, x, rounded)


@triton.jit(do_not_specialize=["seed"])
def _inject_kernel(
    Table,
    Scales,
    Unchanged,
    matrices,
    seed,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    first = 0
    for matrix in range(matrices):
        entry = Table + matrix * _FIELDS
        rows = tl.load(entry + 4).to(tl.int32)
        columns = tl.load(entry + 5).to(tl.int32)
        across = tl.cdiv(columns, BLOCK_J)
        last = first + tl.cdiv(rows, BLOCK_I) * across
        while tile < last:
            weight = tl.load(entry).to(tl.pointer_type(WEIGHT))
            backup = tl.load(entry + 1).to(tl.pointer_type(WEIGHT))
            left = tl.load(entry + 2).to(tl.pointer_type(FACTOR))
            right = tl.load(entry + 3).to(tl.pointer_type(FACTOR))
            rank = tl.load(entry + 6).to(tl.int32)
            position = tl.load(entry + 7).to(tl.int32)
            stride_w = tl.load(entry + 8).to(tl.int32)
            stride_k = tl.load(entry + 9).to(tl.int32)
            left_i, left_r = tl.load(entry + 10).to(tl.int32), tl.load(entry + 11).to(tl.int32)
            right_r, right_j = tl.load(entry + 12).to(tl.int32), tl.load(entry + 13).to(tl.int32)
            if ALIGNED:
                weight, backup = tl.multiple_of(weight, 16), tl.multiple_of(backup, 16)
                stride_w, stride_k = tl.multiple_of(stride_w, 16), tl.multiple_of(stride_k, 16)
                columns = tl.multiple_of(columns, 16)

            # Addresses: a 64-bit origin per tile, 32-bit offsets within it.
            block = (tile - first) % across
            first_i = (tile - first) // across * BLOCK_I
            first_j = block * BLOCK_J
            i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
            keep_i, keep_j = first_i + i < rows, first_j + j < columns
            keep = keep_i[:, None] & keep_j[None, :]
            weight += first_i.to(tl.int64) * stride_w + first_j
            left += first_i.to(tl.int64) * left_i
            right += first_j.to(tl.int64) * right_j
            at = weight + i[:, None] * stride_w + j[None, :]
            old = tl.load(at, mask=keep, other=0.0)
            if KEEP:
                backup += first_i.to(tl.int64) * stride_k + first_j
                tl.store(backup + i[:, None] * stride_k + j[None, :], old, mask=keep)

            delta = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
            for start in range(0, rank, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                b = tl.load(
                    left + i[:, None] * left_i + r[None, :] * left_r,
                    mask=keep_i[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                a = tl.load(
                    right + r[:, None] * right_r + j[None, :] * right_j,
                    mask=(r < rank)[:, None] & keep_j[None, :],
                    other=0.0,
                )
                if INTERPRETED:
                    b, a = b.to(tl.float32), a.to(tl.float32)
                delta = tl.dot(b, a, delta, input_precision=PRECISION)

            total = old.to(tl.float32) + tl.load(Scales + matrix) * delta
            if STOCHASTIC:
                words = _words(seed, position, first_i + i, block, BLOCK_I, BLOCK_J)
                total = _round_stochastically(total, words, WEIGHT)
            new = total.to(WEIGHT)
            tl.store(at, new, mask=keep)
            same = tl.sum(tl.sum(((new == old) & keep).to(tl.int32), 1), 0)
            tl.atomic_add(Unchanged + position, same.to(tl.int64), sem="relaxed")
            tile += tl.num_programs(0)
        first = last


def _launch(
    positions: Sequence[int],
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    scales: Sequence[float],
    backups: Sequence[Tensor],
    unchanged: Tensor,
    seed: int | None,
) -> None:
    """One launch over matrices of equal dtypes on one device; W += s·left·right."""
    like = weights[0]
    kept = backups or weights
    entries = [
        (
            w.data_ptr(), k.data_ptr(), p.data_ptr(), q.data_ptr(), *w.shape, p.shape[1], g,
            w.stride(0), k.stride(0), *p.stride(), *q.stride(),
        )
        for g, w, k, p, q in zip(positions, weights, kept, left, right, strict=True)
    ]  # fmt: skip
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0
        for x in (*weights, *kept)
    )
    tiles = sum(
        triton.cdiv(w.shape[0], _BLOCK_I) * triton.cdiv(w.shape[1], _BLOCK_J) for w in weights
    )
    factor = left[0].dtype
    with device_of(like):
        _inject_kernel[(persistent_programs(like, tiles, _PROGRAMS),)](
            to_device(entries, torch.int64, like),
            to_device(scales, torch.float32, like),
            unchanged,
            len(weights),
            seed or 0,
            WEIGHT=TRITON_DTYPE[like.dtype],
            FACTOR=TRITON_DTYPE[factor],
            ALIGNED=aligned,
            KEEP=bool(backups),
            STOCHASTIC=seed is not None and like.dtype != torch.float32,
            PRECISION=dot_precision() if factor == torch.float32 else "ieee",
            INTERPRETED=INTERPRETED,
            BLOCK_I=_BLOCK_I,
            BLOCK_J=_BLOCK_J,
            BLOCK_R=_BLOCK_R,
            num_warps=_WARPS,
        )  # fmt: skip


def inject_(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
    seed: int | None,
) -> Tensor:
    """Add s·B·A to every weight in place; returns how many elements of each kept their value.

    weight (out, in), or (in, out) where ``transposed``; lora_a (r, in), lora_b (out, r).
    ``backups`` (one per weight, or none at all) receive the old bits.  With ``seed`` 16-bit
    weights are rounded stochastically.
    """
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    launches: dict[tuple[object, ...], list[int]] = defaultdict(list)
    left: list[Tensor] = []
    right: list[Tensor] = []
    for g, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        left.append(a.T if transposed[g] else b)
        right.append(b.T if transposed[g] else a)
        if weight.numel():
            launches[(weight.device, weight.dtype, a.dtype)].append(g)
    unchanged = torch.zeros(len(weights), dtype=torch.int64, device=weights[0].device)
    for (device, *_), group in launches.items():
        counts = torch.zeros(len(weights), dtype=torch.int64, device=device)
        _launch(
            group,
            [weights[g] for g in group],
            [left[g] for g in group],
            [right[g] for g in group],
            [scales[g] for g in group],
            [backups[g] for g in group] if backups else [],
            counts,
            seed,
        )
        unchanged += counts.to(unchanged.device)
    return unchanged


def aot_specs(target: Target) -> list[KernelSpec]:
    """Eight layers' down projections of Llama-2 7B, (4096, 11008), at rank 16."""
    matrices, rows, columns, rank = 8, 4096, 11008, 16

    def spec(weight: torch.dtype, factor: torch.dtype, stochastic: bool) -> KernelSpec:
        label = "/stochastic" if stochastic else ""
        return KernelSpec(
            name=f"inject/{STORAGE[weight]}/factors {STORAGE[factor]}{label}",
            kernel=_inject_kernel,
            args={
                "Table": "*i64:16",
                "Scales": "*fp32:16",
                "Unchanged": "*i64:16",
                "matrices": "i32",
                "seed": "i64",
            },
            constexprs={
                "WEIGHT": TRITON_DTYPE[weight],
                "FACTOR": TRITON_DTYPE[factor],
                "ALIGNED": True,
                "KEEP": True,
                "STOCHASTIC": stochastic,
                "PRECISION": target.dot_precision if factor == torch.float32 else "ieee",
                "INTERPRETED": False,
                "BLOCK_I": _BLOCK_I,
                "BLOCK_J": _BLOCK_J,
                "BLOCK_R": _BLOCK_R,
            },
            num_warps=_WARPS,
            kind="bytes",
            bulk_store=True,
            bytes=matrices
            * (3 * rows * columns * weight.itemsize + rank * (rows + columns) * factor.itemsize),
            flops=matrices * 2 * rows * columns * rank,
            compute="tf32x3"
            if factor == torch.float32 and target.backend == "cuda"
            else STORAGE[factor],
        )

    return [
        spec(torch.bfloat16, torch.bfloat16, False),
        spec(torch.bfloat16, torch.float32, False),
        spec(torch.bfloat16, torch.bfloat16, True),
        spec(torch.float16, torch.float32, True),
        spec(torch.float32, torch.float32, False),
    ]
