"""Step 4 of a probe: what a model does to its head's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .findings import HeadTransform
from .modules import weight_of
from .rerouting import patched_forward
from .trial import exact, logits_of, short


def head_transform(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> HeadTransform:
    """Feed known values out of the head and fit scale and softcap to what the model returns."""
    fed, got = _known_values(model, head, inputs)
    bias = getattr(head, "bias", None) is not None
    z = exact(fed)
    if got.shape == z.shape and bool(torch.isfinite(got).all()):
        epsilon = float(torch.finfo(fed.dtype).eps)
        for scale, softcap in _fits(z, got):
            expected = softcap * torch.tanh(scale * z / softcap) if softcap else scale * z
            if torch.allclose(got, expected, rtol=8 * epsilon, atol=8 * epsilon * softcap):
                return HeadTransform(scale, softcap, bias, exact=True)
    return HeadTransform(1.0, 0.0, bias, exact=False)


def _known_values(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Values of both signs over six decades put out by the head, and the float64 logits."""
    rows = weight_of(head).shape[0]
    grid = torch.logspace(-2, 4, rows, dtype=torch.float64)
    grid[1::2] *= -1
    fed: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        values = grid.to(hidden).expand(*hidden.shape[:-1], rows)
        fed[:] = [values]
        return values.clone()

    with patched_forward(head, forward):
        got = exact(logits_of(model, inputs))
    return fed[0], got


def _fits(z: Tensor, got: Tensor) -> Iterator[tuple[float, float]]:
    """Scales and softcaps to try: nothing, a factor, a tanh whose bound the largest values show."""
    yield 1.0, 0.0
    yield short(float((got / z).median())), 0.0
    bound = float(got.abs().max())
    bent = (got.abs() > 0.05 * bound) & (got.abs() < 0.95 * bound)
    if bound > 0 and bool(bent.any()):
        softcap = short(bound)
        yield 1.0, softcap  # before the measured one, which is rough in 16 bits
        scale = (softcap * torch.atanh(got[bent] / softcap) / z[bent]).median()
        yield short(float(scale)), softcap
