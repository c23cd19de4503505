"""Divergence of two output distributions, both vocabularies streamed in step.

A program holds a block of rows and walks its share of the labels, computing a tile of source and a
tile of target logits at a time and keeping running maxima, normalisers and one weighted sum.  The
gradient is a second stream: with the normalisers known, ∂/∂z_tgt of a bounded run of labels goes to
a workspace and is multiplied by those rows of the head.  ``jsd`` needs both normalisers for its own
sums and takes one stream more.
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
    packed,
    size_class,
)
from ._heads import (
    copy_saturated,
    label_chunks,
    label_splits,
    logit_tile,
    operands,
    product_tile,
    share_of_labels,
    tanh,
    tuned,
    widened,
    workspace_dtype,
)

_TILES = {  # by whether operands of either model are multiplied as float32
    False: [
        logit_tile(64, 128, 64, 8, 2),
        logit_tile(128, 64, 64, 8, 3),
        logit_tile(64, 64, 64, 8, 3, "sm_80", "sm_100"),
        logit_tile(64, 64, 32, 4, 3, "sm_100"),
    ],
    True: [logit_tile(64, 64, 32, 8, 3), logit_tile(32, 64, 32, 4, 3)],
}
_KEY = ["width_t", "width_s", "labels", "row_class"]
_LN2 = tl.constexpr(0.6931471805599453)


_even = triton.heuristics(
    {
        "EVEN_T": lambda a: a["width_t"] % a["BLOCK_K"] == 0,
        "EVEN_S": lambda a: a["width_s"] % a["BLOCK_K"] == 0,
    }
)


@triton.jit
def _scaled_logits(
    H,
    W,
    Bias,
    first_row,
    first_label,
    rows,
    labels,
    width,
    stride_h,
    stride_w,
    softcap,
    inverse_temperature,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """softcap(W·h + b)/τ of one tile."""
    z = product_tile(
        H, W, Bias, None, first_row, first_label, rows, labels, width, stride_h, stride_w,
        WIDE, PRECISION, EVEN_K, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return z * inverse_temperature


@_even
@triton.jit(do_not_specialize=["row_class"])
def _stats_kernel(
    HT,
    WT,
    BiasT,
    HS,
    WS,
    BiasS,
    Partial,
    rows,
    labels,
    width_t,
    width_s,
    stride_ht,
    stride_wt,
    stride_hs,
    stride_ws,
    softcap_t,
    softcap_s,
    inverse_temperature,
    row_class,
    KIND: tl.constexpr,
    CAPPED_T: tl.constexpr,
    CAPPED_S: tl.constexpr,
    WIDE_T: tl.constexpr,
    WIDE_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PRECISION_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_S: tl.constexpr,
):
    """Per split of the labels: max and Σexp of both logit rows, and the weighted sum of KIND."""
    first_row = tl.program_id(0) * BLOCK_N
    start, end = share_of_labels(labels, BLOCK_V)
    top_s = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_t = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for first_label in range(start, end, BLOCK_V):
        a = _scaled_logits(
            HS, WS, BiasS, first_row, first_label, rows, labels, width_s, stride_hs, stride_ws,
            softcap_s, inverse_temperature, CAPPED_S, WIDE_S, PRECISION_S, EVEN_S,
            BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        b = _scaled_logits(
            HT, WT, BiasT, first_row, first_label, rows, labels, width_t, stride_ht, stride_wt,
            softcap_t, inverse_temperature, CAPPED_T, WIDE_T, PRECISION_T, EVEN_T,
            BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        keep = (first_label + tl.arange(0, BLOCK_V) < labels)[None, :]
        difference = tl.where(keep, a - b, 0.0)
        a = tl.where(keep, a, float("-inf"))
        b = tl.where(keep, b, float("-inf"))
        new_s = tl.maximum(top_s, tl.max(a, 1))
        new_t = tl.maximum(top_t, tl.max(b, 1))
        decay_s = tl.exp(top_s - new_s)
        decay_t = tl.exp(top_t - new_t)
        e_s = tl.exp(a - new_s[:, None])
        e_t = tl.exp(b - new_t[:, None])
        sum_s = sum_s * decay_s + tl.sum(e_s, 1)
        sum_t = sum_t * decay_t + tl.sum(e_t, 1)
        if KIND == "forward":
            weighted = weighted * decay_s + tl.sum(e_s * difference, 1)
        if KIND == "reverse":
            weighted = weighted * decay_t - tl.sum(e_t * difference, 1)
        top_s = new_s
        top_t = new_t
    row = first_row + tl.arange(0, BLOCK_N)
    plane = tl.cast(rows, tl.int64) * tl.num_programs(1)
    at = Partial + tl.cast(tl.program_id(1), tl.int64) * rows + row
    tl.store(at, top_s, mask=row < rows)
    tl.store(at + plane, sum_s, mask=row < rows)
    tl.store(at + 2 * plane, top_t, mask=row < rows)
    tl.store(at + 3 * plane, sum_t, mask=row < rows)
    tl.store(at + 4 * plane, weighted, mask=row < rows)


@triton.jit
def _merge_kernel(
    Partial, Value, LseS, LseT, rows, splits, KIND: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Merge the splits: log-normalisers, and the value where one stream is enough for it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < rows
    plane = tl.cast(rows, tl.int64) * splits
    top_s = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for split in range(splits):
        at = Partial + tl.cast(split, tl.int64) * rows + row
        top_s = tl.maximum(top_s, tl.load(at, mask=keep, other=0.0))
        top_t = tl.maximum(top_t, tl.load(at + 2 * plane, mask=keep, other=0.0))
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_t = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        at = Partial + tl.cast(split, tl.int64) * rows + row
        decay_s = tl.exp(tl.load(at, mask=keep, other=0.0) - top_s)
        decay_t = tl.exp(tl.load(at + 2 * plane, mask=keep, other=0.0) - top_t)
        sum_s += decay_s * tl.load(at + plane, mask=keep, other=1.0)
        sum_t += decay_t * tl.load(at + 3 * plane, mask=keep, other=1.0)
        decay = decay_s if KIND == "forward" else decay_t
        weighted += decay * tl.load(at + 4 * plane, mask=keep, other=0.0)
    lse_s = top_s + tl.log(sum_s)
    lse_t = top_t + tl.log(sum_t)
    tl.store(LseS + row, lse_s, mask=keep)
    tl.store(LseT + row, lse_t, mask=keep)
    if KIND == "forward":
        tl.store(Value + row, weighted / sum_s - (lse_s - lse_t), mask=keep)
    if KIND == "reverse":
        tl.store(Value + row, weighted / sum_t + (lse_s - lse_t), mask=keep)


@triton.jit
def _log_mean(p, q):
    """The log of ½(p + q), floored where both vanish: it only ever meets factors p and q."""
    return tl.log(tl.maximum(p + q, 1e-37)) - _LN2


@_even
@triton.jit(do_not_specialize=["row_class"])
def _slope_kernel(
    HT,
    WT,
    BiasT,
    HS,
    WS,
    BiasS,
    LseS,
    LseT,
    Mean,
    Slope,
    Partial,
    rows,
    labels,
    width_t,
    width_s,
    stride_ht,
    stride_wt,
    stride_hs,
    stride_ws,
    softcap_t,
    softcap_s,
    inverse_temperature,
    row_class,
    KIND: tl.constexpr,
    CAPPED_T: tl.constexpr,
    CAPPED_S: tl.constexpr,
    WIDE_T: tl.constexpr,
    WIDE_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PRECISION_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_S: tl.constexpr,
):
    """∂/∂z_tgt of a run of labels into ``Slope``; for KIND "jsd sums", Σp·log(p/m) and Σq·log(q/m).

    ``Mean`` holds Σ q·g of each row (unused by "forward").
    """
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    lse_s = tl.load(LseS + row, mask=row < rows, other=0.0)
    lse_t = tl.load(LseT + row, mask=row < rows, other=0.0)
    start, end = share_of_labels(labels, BLOCK_V)
    of_p = tl.zeros((BLOCK_N,), tl.float32)
    of_q = tl.zeros((BLOCK_N,), tl.float32)
    for first_label in range(start, end, BLOCK_V):
        a = _scaled_logits(
            HS, WS, BiasS, first_row, first_label, rows, labels, width_s, stride_hs, stride_ws,
            softcap_s, inverse_temperature, CAPPED_S, WIDE_S, PRECISION_S, EVEN_S,
            BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        b = _scaled_logits(
            HT, WT, BiasT, first_row, first_label, rows, labels, width_t, stride_ht, stride_wt,
            softcap_t, inverse_temperature, CAPPED_T, WIDE_T, PRECISION_T, EVEN_T,
            BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        label = first_label + tl.arange(0, BLOCK_V)
        log_p = a - lse_s[:, None]
        log_q = b - lse_t[:, None]
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        if KIND == "jsd sums":
            log_m = _log_mean(p, q)
            keep = (label < labels)[None, :]
            of_p += tl.sum(tl.where(keep, p * (log_p - log_m), 0.0), 1)
            of_q += tl.sum(tl.where(keep, q * (log_q - log_m), 0.0), 1)
        else:
            if KIND == "forward":
                slope = q - p
            else:
                mean = tl.load(Mean + row, mask=row < rows, other=0.0)[:, None]
                if KIND == "reverse":
                    slope = q * (log_q - log_p - mean)
                else:
                    slope = 0.5 * q * (log_q - _log_mean(p, q) - mean)
            if CAPPED_T:
                t = b / (softcap_t * inverse_temperature)
                slope *= 1.0 - t * t
            slope *= inverse_temperature
            tl.store(
                Slope + tl.cast(row, tl.int64)[:, None] * labels + label[None, :],
                slope.to(Slope.dtype.element_ty),
                mask=(row < rows)[:, None] & (label < labels)[None, :],
            )
    if KIND == "jsd sums":
        at = Partial + tl.cast(tl.program_id(1), tl.int64) * rows + row
        plane = tl.cast(rows, tl.int64) * tl.num_programs(1)
        tl.store(at, of_p, mask=row < rows)
        tl.store(at + plane, of_q, mask=row < rows)


_stats = tuned(_stats_kernel, _TILES, _KEY)
_slope = tuned(_slope_kernel, _TILES, _KEY)


def linear_kl(
    target_hidden: Tensor,
    target_head: Tensor,
    source_hidden: Tensor,
    source_head: Tensor,
    target_bias: Tensor | None,
    source_bias: Tensor | None,
    target_softcap: float,
    source_softcap: float,
    temperature: float,
    kind: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Divergences (N,) in float32, and their gradients (N, D_t) if wanted."""
    rows, width = target_hidden.shape
    values = target_hidden.new_empty(rows, dtype=torch.float32)
    gradient = target_hidden.new_empty(rows if want_gradient else 0, width)
    if rows == 0 or target_head.shape[0] == 0:
        return values.zero_(), gradient.zero_()
    ht, wt, hs, ws = map(near_rows, (target_hidden, target_head, source_hidden, source_head))
    biases = packed(target_bias), packed(source_bias)
    wide = widened(ht.dtype, wt.dtype) or widened(hs.dtype, ws.dtype)
    options = {
        "CAPPED_T": target_softcap > 0,
        "CAPPED_S": source_softcap > 0,
        **{f"{name}_T": value for name, value in operands(ht.dtype, wt.dtype).items()},
        **{f"{name}_S": value for name, value in operands(hs.dtype, ws.dtype).items()},
    }

    def row_blocks(meta: dict[str, int]) -> int:
        return triton.cdiv(rows, meta["BLOCK_N"])

    def sizes(labels: int) -> tuple[float, ...]:
        return (
            rows, labels, width, hs.shape[1], ht.stride(0), wt.stride(0), hs.stride(0),
            ws.stride(0), target_softcap, source_softcap, 1.0 / temperature,
            size_class(rows),
        )  # fmt: skip

    def heads(labels: slice) -> tuple[Tensor | None, ...]:
        bias_t, bias_s = (None if b is None else b[labels] for b in biases)
        return ht, wt[labels], bias_t, hs, ws[labels], bias_s

    labels = wt.shape[0]
    everything = slice(0, labels)
    splits = label_splits(ht, rows, labels)
    partial = values.new_empty(5, splits, rows)
    lse_s, lse_t = torch.empty_like(values), torch.empty_like(values)
    with device_of(ht):
        _stats[wide][lambda meta: (row_blocks(meta), splits)](
            *heads(everything), partial, *sizes(labels), KIND=kind, **options
        )
        _merge_kernel[(triton.cdiv(rows, 128),)](
            partial, values, lse_s, lse_t, rows, splits, KIND=kind, BLOCK_N=128
        )
        mean = values
        if kind == "jsd":
            _slope[wide][lambda meta: (row_blocks(meta), splits)](
                *heads(everything), lse_s, lse_t, None, None, partial, *sizes(labels),
                KIND="jsd sums", **options,
            )  # fmt: skip
            of_p, mean = partial.flatten()[: 2 * splits * rows].view(2, splits, rows).sum(1)
            values = (of_p + mean) / 2
        if not want_gradient:
            return values, gradient
        total = values.new_zeros(rows, width)
        dtype = workspace_dtype(ht, wt)
        for chunk in label_chunks(rows, labels, dtype.itemsize):
            run = chunk.stop - chunk.start
            slope = torch.empty(rows, run, dtype=dtype, device=ht.device)
            _slope[wide][
                lambda meta, run=run: (row_blocks(meta), triton.cdiv(run, meta["BLOCK_V"]))
            ](
                *heads(chunk), lse_s, lse_t, mean, slope, None, *sizes(run), KIND=kind, **options
            )
            total += slope @ wt[chunk].to(dtype)
    return values, copy_saturated(gradient, total)


def aot_specs(target: Target) -> list[KernelSpec]:
    """4,096 rows of a 5,120-wide source and a 4,096-wide target over 32,000 labels."""
    rows, labels, width_t, width_s = 4096, 32000, 4096, 5120

    def spec(dtype: torch.dtype, kernel: str, kind: str, variant: str = "") -> KernelSpec:
        """``variant``: "biased" heads on widths that no tile divides, or softcapped ones."""
        name = STORAGE[dtype]
        biased, capped = variant == "biased", variant == "capped"
        wide = dtype == torch.float32
        precision = target.dot_precision if wide else "ieee"
        heads = {
            "HT": f"*{name}:16",
            "WT": f"*{name}:16",
            **({"BiasT": f"*{name}:16", "BiasS": f"*{name}:16"} if biased else {}),
            "HS": f"*{name}:16",
            "WS": f"*{name}:16",
        }
        integers = ("labels", "width_t", "width_s", "stride_ht", "stride_wt", "stride_hs")
        args = {
            **heads,
            **({"LseS": "*fp32:16", "LseT": "*fp32:16"} if kernel == "slope" else {}),
            **({"Mean": "*fp32:16", "Slope": f"*{name}:16"} if kernel == "slope" else {}),
            **({"Partial": "*fp32:16"} if kernel == "stats" else {}),
            "rows": "i32:16",
            **{i: "i32:16" for i in (*integers, "stride_ws")},
            "softcap_t": "fp32",
            "softcap_s": "fp32",
            "inverse_temperature": "fp32",
            "row_class": "i32",
        }
        return KernelSpec(
            name="/".join(filter(None, ("linear_kl", kernel, kind, name, variant))),
            kernel=_stats_kernel if kernel == "stats" else _slope_kernel,
            args=args,
            constexprs={
                **({} if biased else {"BiasT": None, "BiasS": None}),
                **({"Partial": None} if kernel == "slope" else {}),
                "KIND": kind,
                "CAPPED_T": capped,
                "CAPPED_S": capped,
                "WIDE_T": wide,
                "WIDE_S": wide,
                "PRECISION_T": precision,
                "PRECISION_S": precision,
                "EVEN_T": not biased,
                "EVEN_S": not biased,
            },
            tiles=_TILES[wide],
            kind="gemm",
            bytes=(rows + labels) * (width_t + width_s) * dtype.itemsize
            + (rows * labels * dtype.itemsize if kernel == "slope" else 0),
            flops=2 * rows * labels * (width_t + width_s),
            compute="tf32x3" if wide and target.backend == "cuda" else name,  # type: ignore[arg-type]
        )

    return [
        spec(torch.bfloat16, "stats", "forward"),
        spec(torch.bfloat16, "slope", "forward"),
        spec(torch.bfloat16, "slope", "reverse"),
        spec(torch.bfloat16, "slope", "jsd"),
        spec(torch.float32, "stats", "forward"),
        spec(torch.float32, "slope", "jsd"),
        *(
            spec(dtype, kernel, kind, variant)
            for dtype, kernel, kind in (
                (torch.bfloat16, "stats", "forward"),
                (torch.bfloat16, "slope", "jsd"),
                (torch.float32, "slope", "jsd"),
            )
            for variant in ("biased", "capped")
        ),
    ]
