"""Inject a low-rank change into a list of matrices in place: W += s·B·A, rounded once.

Accumulation is in float32 (float64 for float64 weights).  With a seed, 16-bit weights are rounded
stochastically, right on average and with the same random words on every backend.  Element (i, j)
of matrix g, as it is stored, draws output word ``j % 4`` of Philox-4x32-10 with key (seed low, seed
high) and counter (j // 4, i, g, 0).  With x = lo + f·(hi − lo) between neighbours of the weight's
dtype, |lo| <= |x| < |hi|, the element becomes hi where ``(word >> 8) / 2²⁴ < f``, else lo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import BackendError, ShapeError
from ._native import (
    DTYPE_CODES,
    accumulator,
    bytes_spanned,
    cuda_kernel,
    has_contiguous_rows,
    may_overlap,
    native_kernel,
    threads_for,
)
from ._registry import cuda_problem, dispatch, implementation, triton_implementation

_library = torch.library.Library("pkt_fast", "FRAGMENT")
_library.define(
    "inject_(Tensor(a!)[] weights, Tensor[] lora_a, Tensor[] lora_b, float[] scales, "
    "bool[] transposed, Tensor(b!)[] backups, int? seed) -> Tensor"
)
_inject: Callable[..., Tensor] = torch.ops.pkt_fast.inject_.default


def inject_(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor] = (),
    seed: int | None = None,
) -> Tensor:
    """Add s·B·A to every weight in place; returns how many elements of each kept their value.

    weight (out, in), or (in, out) where ``transposed``, as Conv1D stores it; lora_a (r, in); lora_b
    (out, r).  ``backups``, one per weight or none at all, receive the old bits in the same pass.
    ``seed`` (0 <= seed < 2⁶³) rounds bfloat16 and float16 weights stochastically.  Returns int64
    counts (len(weights),).  Not differentiable.

    Raises :class:`~pkt_fast.errors.ShapeError`, before any weight is changed, when the lists,
    shapes, dtypes or devices do not fit, or when a weight shares memory with anything else written
    or read, and :class:`~pkt_fast.errors.BackendError` while a CUDA graph is captured.
    """
    return _inject(
        list(weights), list(lora_a), list(lora_b), list(scales), list(transposed),
        list(backups), seed,
    )


def _check(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
    seed: int | None,
) -> None:
    count = len(weights)
    lengths = {len(x) for x in (lora_a, lora_b, scales, transposed)}
    if lengths != {count} or len(backups) not in (0, count):
        raise ShapeError(
            f"inject_: {count} weights, but {len(lora_a)} lora_a, {len(lora_b)} lora_b, "
            f"{len(scales)} scales, {len(transposed)} transposed, {len(backups)} backups (or none)"
        )
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ShapeError(f"inject_: seed {seed} is not in [0, 2**63)")
    for g, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        if not (weight.dim() == a.dim() == b.dim() == 2):
            raise ShapeError(f"inject_: matrix {g}: weight, lora_a and lora_b must be matrices")
        shape = weight.shape[::-1] if transposed[g] else weight.shape
        if shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"inject_: matrix {g}: weight {tuple(weight.shape)} (transposed: {transposed[g]}) "
                f"does not fit lora_b {tuple(b.shape)} times lora_a {tuple(a.shape)}"
            )
        if any(not x.is_floating_point() for x in (weight, a, b)):
            raise ShapeError(f"inject_: matrix {g}: weight, lora_a and lora_b must be floats")
        if a.device != weight.device or b.device != weight.device:
            raise ShapeError(
                f"inject_: matrix {g}: weight is on {weight.device}, lora_a on {a.device}, "
                f"lora_b on {b.device}"
            )
    for g, (weight, backup) in enumerate(zip(weights, backups, strict=False)):
        if (backup.shape, backup.dtype, backup.device) != (
            weight.shape, weight.dtype, weight.device,
        ):
            raise ShapeError(f"inject_: backup {g} has not its weight's shape, dtype and device")
    _check_disjoint([*weights, *backups], [*lora_a, *lora_b])


def _check_disjoint(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    by_storage: dict[int, list[Tensor]] = defaultdict(list)
    for x in written:
        by_storage[x.untyped_storage().data_ptr()].append(x)
    for together in by_storage.values():
        spans = sorted(map(bytes_spanned, together)) if len(together) > 1 else []
        if any(right[0] < left[1] for left, right in pairwise(spans)):
            raise ShapeError("inject_: weights and backups must not share memory")
    for y in read:
        if any(may_overlap(x, y) for x in by_storage.get(y.untyped_storage().data_ptr(), ())):
            raise ShapeError("inject_: a weight or backup shares memory with a factor")


def _run(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
    seed: int | None,
) -> Tensor:
    _check(weights, lora_a, lora_b, scales, transposed, backups, seed)
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "inject_ cannot be captured: a replay would add the change again, from a table of "
            "addresses that is gone by then; call it outside of the CUDA graph"
        )
    torch.autograd.graph.increment_version(
        [x for x in (*weights, *backups) if not x.is_inference()]
    )
    return dispatch(
        "inject_", weights[0], weights, lora_a, lora_b, scales, transposed, backups, seed
    )


def _fake(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
    seed: int | None,
) -> Tensor:
    device = weights[0].device if weights else torch.device("cpu")
    return torch.empty(len(weights), dtype=torch.int64, device=device)


_library.impl("inject_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::inject_", _fake, lib=_library)


# --------------------------------------------------------------------------- reference


def _mulhilo(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit products of 32-bit values, kept in int64."""
    low_part = (x & 0xFFFF) * factor
    high_part = (x >> 16) * factor + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox_words(seed: int, matrix: int, rows: int, columns: int) -> Tensor:
    """The random 32-bit word of every element of matrix ``matrix``: (rows, columns) int64."""
    quads = -(-columns // 4)
    c0 = torch.arange(quads).expand(rows, quads)
    c1 = torch.arange(rows)[:, None].expand(rows, quads)
    c2 = torch.full((rows, quads), matrix)
    c3 = torch.zeros_like(c2)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high0, low0 = _mulhilo(c0, 0xD2511F53)
        high1, low1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(rows, quads * 4)[:, :columns]


def round_stochastically(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` to one of its neighbours in ``dtype`` (bfloat16 or float16)."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    if dtype == torch.bfloat16:
        up = (words >> 8) < ((bits & 0xFFFF) << 8)
        rounded = ((bits >> 16) + up).to(torch.int32) << 16
        result = rounded.view(torch.float32)
    else:
        # Neighbours are 2^(e-10) apart, and 2^-24 where float16 is subnormal.
        exponent = (x.abs().double().frexp().exponent - 1).clamp(min=-14)
        steps = torch.ldexp(x.abs().double(), 10 - exponent)
        up = words >> 8 < ((steps - steps.floor()) * 2**24)
        result = torch.ldexp(steps.floor() + up, exponent - 10).copysign(x.double())
    return torch.where(x.isfinite(), result, x).to(dtype)


@implementation("inject_", "reference")
def _inject_reference(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
    seed: int | None,
) -> Tensor:
    unchanged = []
    for g, weight in enumerate(weights):
        old = weight.detach().clone()
        if backups:
            backups[g].copy_(old)
        stochastic = seed is not None and weight.dtype in (torch.bfloat16, torch.float16)
        new = reference.inject(
            old.to(accumulator(old)) if stochastic else old,
            lora_a[g], lora_b[g], scales[g], transposed=transposed[g],
        )
        if stochastic:
            assert seed is not None
            words = philox_words(seed, g, *weight.shape).to(weight.device)
            new = round_stochastically(new, words, weight.dtype)
        weight.detach().copy_(new)
        unchanged.append((new == old).sum().to(weights[0].device))
    return torch.stack(unchanged)


# --------------------------------------------------------------------------- native and CUDA


def _native_takes(weights: Sequence[Tensor], *rest: Any) -> bool:
    """Everything on the CPU, rows of weights and backups contiguous."""
    lora_a, lora_b, _, _, backups, _ = rest
    return all(
        x.dtype in DTYPE_CODES and x.device.type == "cpu" for x in (*weights, *lora_a, *lora_b)
    ) and all(map(has_contiguous_rows, (*weights, *backups)))


def _cuda_takes(weights: Sequence[Tensor], *rest: Any) -> bool:
    """Everything on one GPU, no float64 weights, rows of weights and backups contiguous."""
    lora_a, lora_b, _, _, backups, _ = rest
    return (
        cuda_problem(weights[0].device) is None
        and all(x.dtype in DTYPE_CODES for x in (*lora_a, *lora_b))
        and all(
            x.dtype in DTYPE_CODES and x.dtype != torch.float64 and x.device == weights[0].device
            for x in weights
        )
        and all(map(has_contiguous_rows, (*weights, *backups)))
    )


def _described(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool, backup: Tensor | None
) -> tuple[Any, ...]:
    """``pkt::Matrix``: W += s·left·right; for a transposed weight the factors trade places."""
    left, right = (a.T, b.T) if transposed else (b, a)
    return (
        (weight.data_ptr(), DTYPE_CODES[weight.dtype], *weight.shape, weight.stride(0)),
        (left.data_ptr(), DTYPE_CODES[left.dtype], *left.stride()),
        (right.data_ptr(), DTYPE_CODES[right.dtype], *right.stride()),
        left.shape[1],
        (0, 0) if backup is None else (backup.data_ptr(), backup.stride(0)),
        scale,
    )


def _matrices(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    transposed: Sequence[bool],
    backups: Sequence[Tensor],
) -> list[tuple[Any, ...]]:
    """Every ``pkt::Matrix`` of a call."""
    kept: Sequence[Tensor | None] = backups or [None] * len(weights)
    return list(map(_described, weights, lora_a, lora_b, scales, transposed, kept))


if (_native_inject := native_kernel("inject")) is not None:

    @implementation("inject_", "native", supports=_native_takes)
    def _inject_native(
        weights: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scales: Sequence[float],
        transposed: Sequence[bool],
        backups: Sequence[Tensor],
        seed: int | None,
    ) -> Tensor:
        unchanged = torch.zeros(len(weights), dtype=torch.int64)
        matrices = _matrices(weights, lora_a, lora_b, scales, transposed, backups)
        moved = 2 * sum(weight.nbytes for weight in weights)
        _native_inject(matrices, unchanged.data_ptr(), seed, threads_for(moved))
        return unchanged


if (_cuda_inject := cuda_kernel("inject_cuda")) is not None:

    @implementation("inject_", "cuda", supports=_cuda_takes)
    def _inject_cuda(
        weights: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scales: Sequence[float],
        transposed: Sequence[bool],
        backups: Sequence[Tensor],
        seed: int | None,
    ) -> Tensor:
        device = weights[0].device
        unchanged = torch.zeros(len(weights), dtype=torch.int64, device=device)
        size = native_kernel("inject_table_bytes")(len(weights))
        table = torch.empty(size, dtype=torch.uint8, device=device)
        matrices = _matrices(weights, lora_a, lora_b, scales, transposed, backups)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            try:
                _cuda_inject(matrices, unchanged.data_ptr(), seed, table.data_ptr(), stream)
            except RuntimeError as error:
                raise BackendError(f"inject_ on {device}: {error}") from error
        return unchanged


def _triton_takes(weights: Sequence[Tensor], *rest: Any) -> bool:
    """Up to 32 bits wide, rows of weights and backups contiguous; offsets inside a tile of 64 rows
    of a weight, and inside a factor, have 32 bits.
    """
    lora_a, lora_b, _, _, backups, _ = rest
    return (
        all(x.dtype != torch.float64 for x in (*weights, *lora_a, *lora_b))
        and all(map(has_contiguous_rows, (*weights, *backups)))
        and all(x.stride(0) < 2**25 for x in (*weights, *backups))
        and all(_span(x) < 2**31 for x in (*lora_a, *lora_b))
    )


def _span(x: Tensor) -> int:
    """Elements between the first and the last of ``x``."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


triton_implementation("inject_", "inject", supports=_triton_takes)
