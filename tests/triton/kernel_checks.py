"""What the kernel tests share: dtypes, extreme rows, poisoned memory and the error bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bound(dtype: torch.dtype, length: int, factor: float = 4.0) -> float:
    """factor·(ε_storage/2 + ε_float32·√length): one rounding and a float32 sum of ``length`` terms.

    The interpreter truncates to bfloat16 instead of rounding, hence no factor below 2.
    """
    return factor * (
        torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * math.sqrt(max(length, 1))
    )


def rows(
    count: int, width: int, dtype: torch.dtype, device: torch.device, *, strided: bool = False
) -> Tensor:
    """Random rows; ``strided`` ones are a slice of a wider tensor."""
    wide = torch.randn(count, width + (5 if strided else 0), device=device).to(dtype)
    return wide[:, 3 : 3 + width] if strided else wide


def extreme_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that are zero, ordinary, and as small and large as float32 or ``dtype`` allow."""
    tiny, huge = (2e-7, 6e4) if dtype == torch.float16 else (1e-30, 1e30)
    norms = torch.tensor([0.0, 1.0, tiny, huge], device=device).repeat(math.ceil(count / 4))[:count]
    unit = torch.randn(count, width, device=device)
    unit /= unit.norm(dim=1, keepdim=True) if dtype != torch.float16 else unit.abs().amax()
    if dtype == torch.float16 and width > 1:
        unit[:, 0] = 1.0
    return (unit * norms[:, None]).to(dtype)


def poison(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that shows whatever is not written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_close(
    actual: Tensor, expected: Tensor, limit: float, scale: Tensor | float = 1.0
) -> None:
    """|actual − expected| <= limit·scale everywhere, and every element finite."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs() / scale
    assert error.max() <= limit, f"error {error.max():.3g} over the bound {limit:.3g}"
