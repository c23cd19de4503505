"""Σ g·a and Σ |g·a| per example, in one pass over both tensors.

Gradient and activation are (B, T, D).  An example's T·D elements are contiguous, so the kernel
sees (B, T·D): program (b, s) walks slice s of example b, adds up in float32 registers and writes
one partial pair.  The (B, slices, 2) partials are summed afterwards; there are no atomics, so
results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    STORAGE,
    KernelSpec,
    Target,
    Tile,
    autotune,
    device_of,
    persistent_programs,
    size_class,
)

_TILES = [Tile({"BLOCK": block}, warps) for block, warps in ((8192, 8), (4096, 8), (2048, 4))]


@autotune(_TILES, key=["count_class"])
@triton.jit(do_not_specialize=["count_class"])
def _grad_x_act_kernel(
    Gradient,
    Activation,
    Partial,
    count,
    stride_gradient,
    stride_activation,
    count_class,
    BLOCK: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    Gradient += example * stride_gradient
    Activation += example * stride_activation
    signed = tl.zeros((BLOCK,), tl.float32)
    absolute = tl.zeros((BLOCK,), tl.float32)
    for start in range(part.to(tl.int64) * BLOCK, count, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        gradient = tl.load(Gradient + at, mask=at < count, other=0.0).to(tl.float32)
        activation = tl.load(Activation + at, mask=at < count, other=0.0).to(tl.float32)
        product = gradient * activation
        signed += product
        absolute += tl.abs(product)
    out = Partial + (example * parts + part) * 2
    tl.store(out, tl.sum(signed, 0))
    tl.store(out + 1, tl.sum(absolute, 0))


def _examples(x: Tensor) -> Tensor:
    """(B, T, D) as (B, T·D); only strides between examples may be odd without a copy."""
    if x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))
    return x.contiguous().flatten(1)


def grad_x_act(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g·a and Σ |g·a| per example: (B, T, D) twice -> (B,), (B,) in float32.

    Where products of both signs exceed float32's range the signed sum is undefined and comes back
    as 0; the absolute sum is then inf.
    """
    examples, count = gradient.shape[0], gradient.shape[1] * gradient.shape[2]
    if examples == 0 or count == 0:
        zero = gradient.new_zeros(examples, dtype=torch.float32)
        return zero, zero.clone()
    gradient, activation = _examples(gradient), _examples(activation)
    tiles = triton.cdiv(count, _TILES[0].blocks["BLOCK"])
    parts = persistent_programs(gradient, tiles, per_unit=triton.cdiv(8, examples))
    partial = gradient.new_empty((examples, parts, 2), dtype=torch.float32)
    with device_of(gradient):
        _grad_x_act_kernel[(examples, parts)](
            gradient, activation, partial, count, gradient.stride(0), activation.stride(0),
            size_class(count),
        )  # fmt: skip
    signed, absolute = partial.sum(1).unbind(1)
    return torch.where(signed.isnan() & ~absolute.isnan(), 0.0, signed), absolute.contiguous()


def aot_specs(target: Target) -> list[KernelSpec]:
    """Eight examples of 1,024 tokens, 4,096 channels."""
    examples, count = 8, 1024 * 4096
    return [
        KernelSpec(
            name=f"grad_x_act/{name}",
            kernel=_grad_x_act_kernel,
            args={
                "Gradient": f"*{name}:16",
                "Activation": f"*{name}:16",
                "Partial": "*fp32:16",
                "count": "i32:16",
                "stride_gradient": "i32:16",
                "stride_activation": "i32:16",
                "count_class": "i32",
            },
            constexprs={},
            tiles=_TILES,
            kind="bytes",
            bytes=2 * examples * count * dtype.itemsize,
            flops=3 * examples * count,
        )
        for dtype, name in STORAGE.items()
    ]
