"""What the native implementations share: dtype codes, thread counts, checks of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registry import native_module

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""``pkt::DType`` of csrc/kernels.h."""

BYTES_PER_THREAD = 1 << 17


def native_kernel(name: str) -> Any:
    """A function of the extension; None without one, or where it was built without this one."""
    return getattr(native_module(), name, None)


def threads_for(bytes_moved: int) -> int:
    """Torch's thread count, or fewer where a thread would cost more than it brings."""
    return max(1, min(torch.get_num_threads(), bytes_moved // BYTES_PER_THREAD))


def has_contiguous_rows(x: Tensor) -> bool:
    """Whether the elements of a row of ``x`` follow one another."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def rows_contiguous(x: Tensor) -> Tensor:
    """``x`` itself when its last dimension is contiguous, else a contiguous copy."""
    return x if has_contiguous_rows(x) else x.contiguous()


def bytes_spanned(x: Tensor) -> tuple[int, int]:
    """First address of ``x`` and the address after its last element."""
    start = x.data_ptr()
    if x.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def may_overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors lie in one storage and the ranges they span there intersect."""
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    (x_start, x_end), (y_start, y_end) = bytes_spanned(x), bytes_spanned(y)
    return x_start < y_end and y_start < x_end


def accumulator(*operands: Tensor) -> torch.dtype:
    """The dtype of reductions over ``operands``: float64 when one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32


def cuda_kernel(name: str) -> Any:
    """A CUDA function of the extension; None where torch does not drive NVIDIA GPUs."""
    return native_kernel(name) if torch.version.cuda else None


def up_to_32_bits(*operands: Any) -> bool:
    """Whether no operand is float64, which the Triton kernels leave to the reference."""
    return all(not isinstance(x, Tensor) or x.dtype != torch.float64 for x in operands)
