"""Nonlinear coefficients over a streamed vocabulary.

    _norm_kernel         1/‖h‖
    _coefficient_kernel  a = S_src·h/‖h‖ of a bounded run of labels; those below the cut become 0
    _softmax_kernel      the run's exp(a/τ − max), and by how much earlier runs must shrink

Runs are multiplied by the target's basis with a library product and added up, so softmax needs
one stream, as flash attention does, and the output may be of any width.  top_k streams twice: first
the k-th magnitude of every row, merged over the runs, then the coefficients that reach it.  Both
streams run the same kernel with the same tile, so a coefficient has the same bits in both.
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
    device_of,
    near_rows,
    reciprocal_norm,
)
from ._heads import label_chunks, logit_tile, operands, product_tile, row_scale, tuned, widened

_TILES = {  # by whether operands are multiplied as float32
    False: [
        logit_tile(128, 256, 64, 8, 3, "gfx942"),
        logit_tile(128, 128, 64, 8, 3, "gfx942"),
        logit_tile(64, 128, 64, 8, 3),
        logit_tile(64, 64, 32, 4, 3),
    ],
    True: [
        logit_tile(64, 128, 32, 8, 3),
        logit_tile(64, 64, 32, 8, 3),
        logit_tile(64, 64, 32, 4, 3),
    ],
}
_ROWS, _CHANNELS = 4, 512
_LABELS = 1024


@triton.jit
def _norm_kernel(
    H, Scale, Inverse, rows, width, stride_h, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Per row: the power-of-two scale s, and 1/‖s·h‖ or 0."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < rows
    scale = row_scale(H, row, keep, width, stride_h, BLOCK_N, BLOCK_D)
    col = tl.arange(0, BLOCK_D)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, width, BLOCK_D):
        at = row[:, None] * stride_h + (d + col)[None, :]
        mask = keep[:, None] & (d + col < width)[None, :]
        h = tl.load(H + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        square += tl.sum(h * h, 1)
    tl.store(Scale + row, scale, mask=keep)
    tl.store(Inverse + row, reciprocal_norm(square), mask=keep)


@triton.heuristics({"EVEN_K": lambda a: a["width"] % a["BLOCK_K"] == 0})
@triton.jit
def _coefficient_kernel(
    H,
    S,
    Scale,
    Inverse,
    Cut,
    Out,
    rows,
    labels,
    width,
    stride_h,
    stride_s,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of coefficients; with ``Cut`` (rows,), those with |a| < cut are written as 0."""
    first_row = tl.program_id(0) * BLOCK_N
    first_label = tl.program_id(1) * BLOCK_V
    row = first_row + tl.arange(0, BLOCK_N)
    label = first_label + tl.arange(0, BLOCK_V)
    keep = row < rows
    scale = tl.load(Scale + row, mask=keep, other=0.0)
    a = product_tile(
        H, S, None, scale, first_row, first_label, rows, labels, width, stride_h, stride_s,
        WIDE, PRECISION, EVEN_K, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    a *= tl.load(Inverse + row, mask=keep, other=0.0)[:, None]
    if Cut is not None:
        a = tl.where(tl.abs(a) < tl.load(Cut + row, mask=keep, other=0.0)[:, None], 0.0, a)
    tl.store(
        Out + tl.cast(row, tl.int64)[:, None] * labels + label[None, :],
        a.to(Out.dtype.element_ty),
        mask=keep[:, None] & (label < labels)[None, :],
    )


_coefficients = tuned(_coefficient_kernel, _TILES, ["width"])


@triton.jit
def _softmax_kernel(
    Coefficients,
    Weights,
    Top,
    Sum,
    Decay,
    labels,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    """One row: exp(a/τ − max so far) into ``Weights``; Top, Sum and Decay of the row follow."""
    row = tl.program_id(0)
    at = tl.cast(row, tl.int64) * labels + tl.arange(0, BLOCK_V)
    col = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for v in range(0, labels, BLOCK_V):
        a = tl.load(Coefficients + at + v, mask=v + col < labels, other=float("-inf"))
        largest = tl.maximum(largest, a)
    old = tl.load(Top + row)
    top = tl.maximum(old, tl.max(largest, 0) * inverse_temperature)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for v in range(0, labels, BLOCK_V):
        a = tl.load(Coefficients + at + v, mask=v + col < labels, other=float("-inf"))
        e = tl.exp(a * inverse_temperature - top)
        total += e
        tl.store(Weights + at + v, e.to(Weights.dtype.element_ty), mask=v + col < labels)
    decay = tl.exp(old - top)
    tl.store(Sum + row, tl.load(Sum + row) * decay + tl.sum(total, 0))
    tl.store(Decay + row, decay)
    tl.store(Top + row, top)


def decompose(
    hidden: Tensor,
    source_basis: Tensor,
    target_basis: Tensor,
    kind: str,
    temperature: float,
    k: int,
    threshold: float,
) -> Tensor:
    """S_tgtᵀ·f(S_src·h/‖h‖): (N, D_src), (V, D_src), (V, D_tgt) -> (N, D_tgt)."""
    rows, width = hidden.shape
    labels = source_basis.shape[0]
    total = hidden.new_zeros(rows, target_basis.shape[1], dtype=torch.float32)
    if rows == 0 or width == 0 or labels == 0:
        return total.to(hidden.dtype)
    hidden, source_basis = near_rows(hidden), near_rows(source_basis)
    scale, inverse = total.new_empty(2, rows)
    chunks = list(label_chunks(rows, labels, 4))
    half = hidden.dtype == target_basis.dtype == torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    options = operands(hidden.dtype, source_basis.dtype)
    kernel = _coefficients[widened(hidden.dtype, source_basis.dtype)]
    tile: dict[str, object] = {}

    def coefficients(chunk: slice, cut: Tensor | None, dtype: torch.dtype) -> Tensor:
        run = chunk.stop - chunk.start
        out = torch.empty(rows, run, dtype=dtype, device=hidden.device)
        kernel[
            lambda meta: (triton.cdiv(rows, meta["BLOCK_N"]), triton.cdiv(run, meta["BLOCK_V"]))
        ](
            hidden, source_basis[chunk], scale, inverse, cut, out, rows, run, width,
            hidden.stride(0), source_basis.stride(0), **options, **tile,
        )  # fmt: skip
        return out

    with device_of(hidden):
        _norm_kernel[(triton.cdiv(rows, _ROWS),)](
            hidden, scale, inverse, rows, width, hidden.stride(0), BLOCK_N=_ROWS, BLOCK_D=_CHANNELS
        )
        if kind == "softmax":
            top = total.new_full((rows,), float("-inf"))
            weight_sum, decay = total.new_zeros(rows), total.new_empty(rows)
            for chunk in chunks:
                coefs = coefficients(chunk, None, torch.float32)
                weights = coefs if dtype == torch.float32 else torch.empty_like(coefs, dtype=dtype)
                _softmax_kernel[(rows,)](
                    coefs, weights, top, weight_sum, decay, coefs.shape[1], 1.0 / temperature,
                    BLOCK_V=_LABELS,
                )  # fmt: skip
                total = total * decay[:, None] + weights @ target_basis[chunk].to(dtype)
            return (total / weight_sum[:, None]).to(hidden.dtype)
        if kind == "threshold":
            cut = total.new_full((rows,), threshold)
        else:
            best = total.new_empty(rows, 0)
            for chunk in chunks:
                best = torch.cat([best, coefficients(chunk, None, torch.float32).abs_()], dim=1)
                best = best.topk(min(k, best.shape[1]), dim=1, sorted=False).values
            cut = best.amin(1)
            # Tuned by itself, the launch with a cut could take a tile that adds in another order.
            kernel, tile = kernel.fn, kernel.best_config.all_kwargs()
        for chunk in chunks:
            total += coefficients(chunk, cut, dtype) @ target_basis[chunk].to(dtype)
    return total.to(hidden.dtype)


def aot_specs(target: Target) -> list[KernelSpec]:
    """4,096 rows of 5,120 channels; a run of 4,096 labels."""
    rows, labels, width = 4096, 4096, 5120

    def spec(dtype: torch.dtype, cut: bool, even: bool = True) -> KernelSpec:
        name = STORAGE[dtype]
        wide = dtype == torch.float32
        out = name if cut else "fp32"
        return KernelSpec(
            name=f"decompose/{'kept' if cut else 'all'}/{name}{'' if even else '/masked'}",
            kernel=_coefficient_kernel,
            args={
                "H": f"*{name}:16",
                "S": f"*{name}:16",
                "Scale": "*fp32:16",
                "Inverse": "*fp32:16",
                **({"Cut": "*fp32:16"} if cut else {}),
                "Out": f"*{out}:16",
                **{i: "i32:16" for i in ("rows", "labels", "width", "stride_h", "stride_s")},
            },
            constexprs={
                **({} if cut else {"Cut": None}),
                "WIDE": wide,
                "PRECISION": target.dot_precision if wide else "ieee",
                "EVEN_K": even,
            },
            tiles=_TILES[wide],
            kind="gemm",
            bytes=(rows + labels) * width * dtype.itemsize
            + rows * labels * (dtype.itemsize if cut else 4),
            flops=2 * rows * labels * width,
            compute="tf32x3" if wide and target.backend == "cuda" else name,  # type: ignore[arg-type]
        )

    return [
        spec(torch.bfloat16, False),
        spec(torch.bfloat16, True),
        spec(torch.float32, False),
        spec(torch.bfloat16, True, even=False),
        spec(torch.float32, True, even=False),
        KernelSpec(
            name="decompose/softmax/bf16",
            kernel=_softmax_kernel,
            args={
                "Coefficients": "*fp32:16",
                "Weights": "*bf16:16",
                **{p: "*fp32:16" for p in ("Top", "Sum", "Decay")},
                "labels": "i32:16",
                "inverse_temperature": "fp32",
            },
            constexprs={"BLOCK_V": _LABELS},
            kind="bytes",
            bytes=rows * labels * 10,
            flops=4 * rows * labels,
        ),
        KernelSpec(
            name="decompose/norm/bf16",
            kernel=_norm_kernel,
            args={
                "H": "*bf16:16",
                "Scale": "*fp32:16",
                "Inverse": "*fp32:16",
                **{i: "i32:16" for i in ("rows", "width", "stride_h")},
            },
            constexprs={"BLOCK_N": _ROWS, "BLOCK_D": _CHANNELS},
            kind="bytes",
            bytes=rows * width * 2,
            flops=2 * rows * width,
        ),
    ]
