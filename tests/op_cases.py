"""Inputs for the tests of the memory-bound ops, the same for every backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
WIDTHS = (1, 3, 16, 63, 64, 257, 1024)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def accumulator_eps(dtype: torch.dtype) -> float:
    """Epsilon of the dtype the ops accumulate ``dtype`` in."""
    return eps(torch.float64 if dtype == torch.float64 else torch.float32)


def poison(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """An output in which every element that is not written shows."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def far_apart(count: int, width: int, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """float16 rows that span more than 2³¹ elements; the pages between them are never touched."""
    assert (count - 1) * stride > 2**31
    with unfilled():
        memory = torch.empty((count - 1) * stride + width, dtype=torch.float16, device=device)
    spread = memory.as_strided((count, width), (stride, 1))
    spread.copy_(torch.randn(count, width))
    return spread


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Fresh memory keeps what it holds, also where a test has it filled with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_extremes(rows: Tensor) -> Tensor:
    """``rows`` with a zero row, a tiny one and a huge one, as far as the dtype reaches."""
    rows = rows.clone()
    tiny, huge = (1e-6, 1e3) if rows.dtype == torch.float16 else (1e-30, 1e30)
    flat = rows.view(-1, rows.shape[-1])
    flat[0] = 0
    flat[1] *= tiny
    flat[2] *= huge
    return rows


@dataclass
class Capture:
    """Arguments of capture_rows after ``out`` and ``offset``."""

    index: Tensor
    value: Tensor
    minus: Tensor | None = None
    other: Tensor | None = None
    other_minus: Tensor | None = None
    lam: float = 0.0
    scale: float = 1.0
    normalize: bool = False

    def arguments(self, device: str = "cpu") -> tuple[object, ...]:
        fields = (self.index, self.value, self.minus, self.other, self.other_minus)
        tensors = (None if x is None else x.to(device) for x in fields)
        return (*tensors, self.lam, self.scale, self.normalize)


def capture(dtype: torch.dtype, width: int, operands: int, normalize: bool) -> Capture:
    """Seven of fifteen rows of a (3, 5, width) activation, 1 to 4 operands, rows repeated."""
    generator = torch.Generator().manual_seed(width)
    tensors = [normal(generator, 3, 5, width, dtype=dtype) for _ in range(operands)]
    # The extremes go where a row of one tensor meets ordinary rows of the others.
    tensors[0] = with_extremes(tensors[0])
    absent = [None] * (4 - operands)
    lam, scale = (0.25, 1.5) if operands > 2 else (0.0, 1.0)
    index = torch.tensor([0, 1, 2, 14, 3, 3, 9])
    return Capture(index, *tensors, *absent, lam, scale, normalize)


def pair(
    x_dtype: torch.dtype, y_dtype: torch.dtype, rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Two (rows, width) operands with zero, tiny and huge rows in both."""
    generator = torch.Generator().manual_seed(rows * 1009 + width)
    x = normal(generator, max(rows, 3), width, dtype=x_dtype)
    y = normal(generator, max(rows, 3), width, dtype=y_dtype)
    return with_extremes(x)[:rows], with_extremes(y).flip(0)[:rows]


@dataclass
class Injection:
    """Arguments of inject_, and where the weights were before."""

    weights: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    transposed: list[bool]
    before: list[Tensor] = field(default_factory=list)

    def factors(self) -> tuple[object, ...]:
        return self.lora_a, self.lora_b, self.scales, self.transposed


MATRICES = ((1, 1, 1), (70, 133, 3), (64, 128, 8), (3, 1000, 17), (129, 7, 70), (257, 65, 16))


def injection(dtype: torch.dtype, factors: torch.dtype, device: str = "cpu") -> Injection:
    """Matrices (rows, columns, rank) of many shapes, every second one stored transposed."""
    generator = torch.Generator().manual_seed(7)
    case = Injection([], [], [], [0.5, -1.0, 2.0, 1e-4, 0.0, 0.25], [])
    for g, (rows, columns, rank) in enumerate(MATRICES):
        out, inside = (columns, rows) if g % 2 else (rows, columns)
        case.transposed.append(g % 2 == 1)
        case.weights.append(normal(generator, rows, columns, dtype=dtype).to(device))
        case.lora_a.append(normal(generator, rank, inside, dtype=factors).to(device))
        case.lora_b.append(
            (normal(generator, out, rank) / math.sqrt(rank)).to(factors).to(device)
        )
    case.before = [weight.clone() for weight in case.weights]
    return case
