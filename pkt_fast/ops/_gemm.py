"""Matrix products on CPUs: by the library behind torch, or by the extension's own kernel.

MKL runs its AVX2 code on AVX-512 processors of other makers than Intel, at half their speed.  There
the kernel of csrc/cpu/gemm.cpp multiplies; everywhere else the library does.  The choice depends on
the machine and on shapes alone, never on a timing: one machine gives the same bits every time.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import BackendError, ShapeError
from ._native import DTYPE_CODES, may_overlap, native_kernel
from ._registry import native_module, refuse_stale, stale_extension

ENVIRONMENT_VARIABLE = "PKT_FAST_GEMM"
CHOICES = ("auto", "own", "library")

SMALLEST_ROWS = 64
"""Products of fewer rows are the library's: packing the right operand would not pay."""

FLOPS_PER_THREAD = 1 << 21

MIRROR_BLOCK = 128

Part = Literal["whole", "upper", "lower"]
_PARTS: dict[str, int] = {"whole": 0, "upper": 1, "lower": 2}


@dataclass(frozen=True)
class Choice:
    """Whether products are our own kernel's, and why."""

    own: bool
    reason: str


@functools.cache
def choice() -> Choice:
    """Who multiplies float32 and float64 matrices on this machine.

    ``PKT_FAST_GEMM`` ("auto", "own" or "library") overrules it.  Raises
    :class:`~pkt_fast.errors.BackendError` for another value, and for "own" without an extension
    that fits its sources.
    """
    wish = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if wish not in CHOICES:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={wish!r}: choose one of {', '.join(CHOICES)}")
    native = native_module()
    if native is None:
        if wish == "own":
            reason = stale_extension() or "the extension is not built"
            raise BackendError(f"{ENVIRONMENT_VARIABLE}=own: {reason}")
        state = "out of date" if stale_extension() else "not built"
        return Choice(False, f"the extension is {state}")
    if wish != "auto":
        return Choice(wish == "own", f"{ENVIRONMENT_VARIABLE}={wish}")
    if native.build_info()["isa"] != "avx512":
        return Choice(False, "no AVX-512 kernel in use")
    if not torch.backends.mkl.is_available():
        return Choice(False, "torch does not multiply with MKL")
    if native.vendor() == "intel":
        return Choice(False, "MKL has AVX-512 code for this Intel processor")
    return Choice(True, "MKL runs AVX2 code on this AVX-512 processor, which is not Intel's")


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether left·right of these operands, (N, K) and (K, M), is our kernel's to compute."""
    refuse_stale()
    return (
        left.device.type == "cpu"
        and right.device.type == "cpu"
        and len(left) >= SMALLEST_ROWS
        and left.dtype in DTYPE_CODES
        and right.dtype in DTYPE_CODES
        and choice().own
    )


def product(
    left: Tensor,
    right: Tensor,
    *,
    out: Tensor | None = None,
    part: Part = "whole",
    accumulate: bool = False,
    unit_rows: bool = False,
) -> Tensor:
    """Left (N, K)·right (K, M) -> (N, M) by the extension's kernel; operands of any strides.

    In the dtype of ``out``: float32, or float64 (by default where an operand is float64).  Operands
    of other dtypes are converted as they are packed, float64 ones never to float32.  ``part`` names
    the triangle outside of which a square ``right`` is zero, so that it is skipped.
    ``accumulate`` adds to ``out``; ``unit_rows`` divides every row of ``left`` by its norm (a zero
    row stays zero), whatever that norm is.  The bits do not depend on the number of threads.

    Raises :class:`~pkt_fast.errors.ShapeError` for operands or an ``out`` that do not fit.
    """
    if out is None:
        wide = torch.float64 in (left.dtype, right.dtype)
        dtype = torch.float64 if wide else torch.float32
        out = torch.empty(left.shape[0], right.shape[1], dtype=dtype)
    _check(left, right, out, part)
    if accumulate and unit_rows:
        raise ShapeError("product: unit_rows scales the whole of out, so it cannot accumulate")
    if not left.shape[1] and not accumulate:
        out.zero_()
    _multiply(left, right, out, part, False, accumulate, unit_rows)
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Out (N, M) += left (N, K)·right (K, M) in one dtype, by whoever multiplies here."""
    if serves(left, right):
        product(left, right, out=out, accumulate=True)
    else:
        out.addmm_(left, right)


def gram(rows: Tensor) -> Tensor:
    """rowsᵀ·rows (D, D) in float64 for rows (N, D) by the extension's kernel; symmetric to the bit.

    The half below the diagonal is copied, not computed.
    """
    out = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    _check(rows.T, rows, out, "whole")
    _multiply(rows.T, rows, out, "whole", True, False, False)
    return mirror_(out)


def mirror_(upper: Tensor) -> Tensor:
    """A square matrix made symmetric in place: what is below its diagonal becomes what is above.

    Block by block, so that there is no temporary of its size.
    """
    size = len(upper)
    for start in range(0, size, MIRROR_BLOCK):
        here, below = slice(start, start + MIRROR_BLOCK), slice(start + MIRROR_BLOCK, size)
        block = upper[here, here]
        block.copy_(torch.triu(block) + torch.triu(block, 1).T)
        upper[below, here] = upper[here, below].T
    return upper


def _check(left: Tensor, right: Tensor, out: Tensor, part: str) -> None:
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ShapeError(
            f"product: {tuple(left.shape)} and {tuple(right.shape)} must be (N, K) and (K, M)"
        )
    if part not in _PARTS or (part != "whole" and right.shape[0] != right.shape[1]):
        raise ShapeError(f"product: part {part!r} of a matrix {tuple(right.shape)}")
    tensors = (left, right, out)
    if any(x.device.type != "cpu" or x.dtype not in DTYPE_CODES for x in tensors):
        raise ShapeError(f"product: no kernel for {[f'{x.dtype} on {x.device}' for x in tensors]}")
    wide = torch.float64 in (left.dtype, right.dtype)
    if (
        out.shape != (left.shape[0], right.shape[1])
        or (out.stride(1) != 1 and out.shape[1] > 1)
        or (out.stride(0) < out.shape[1] and out.shape[0] > 1)
        or out.dtype not in ((torch.float64,) if wide else (torch.float64, torch.float32))
        or may_overlap(out, left)
        or may_overlap(out, right)
    ):
        raise ShapeError(
            f"product: out {out.dtype} {tuple(out.shape)}, strides {out.stride()}, must hold the "
            f"{left.shape[0]}×{right.shape[1]} result in contiguous rows apart from the operands"
        )


def _multiply(
    left: Tensor, right: Tensor, out: Tensor, part: str, upper: bool, accumulate: bool,
    unit_rows: bool,
) -> None:
    (rows, depth), columns = left.shape, right.shape[1]
    if not (rows and columns and depth):
        return
    threads = max(1, min(torch.get_num_threads(), 2 * rows * columns * depth // FLOPS_PER_THREAD))
    native_kernel("gemm")(
        out.data_ptr(), out.stride(0), out.dtype == torch.float64, rows, columns, depth,
        *((x.data_ptr(), DTYPE_CODES[x.dtype], *x.stride()) for x in (left, right)),
        _PARTS[part], upper, accumulate, unit_rows, threads,
    )
