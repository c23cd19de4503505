"""Capture: gather rows, subtract, interpolate, normalise, cast: one read and one write.

out[offset + n] = cast(unit?(s·((1−λ)(value − minus) + λ(other − other_minus))[index[n]]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import BackendError, ShapeError
from ._native import (
    DTYPE_CODES,
    cuda_kernel,
    has_contiguous_rows,
    may_overlap,
    native_kernel,
    rows_contiguous,
    threads_for,
    up_to_32_bits,
)
from ._registry import backend, cuda_problem, dispatch, implementation, triton_implementation

_library = torch.library.Library("pkt_fast", "FRAGMENT")
_library.define(
    "capture_rows(Tensor(a!) out, int offset, Tensor index, Tensor value, Tensor? minus, "
    "Tensor? other, Tensor? other_minus, float lam, float scale, bool normalize) -> ()"
)
_capture_rows: Callable[..., None] = torch.ops.pkt_fast.capture_rows.default


def capture_rows(
    out: Tensor,
    offset: int,
    index: Tensor,
    value: Tensor,
    minus: Tensor | None = None,
    other: Tensor | None = None,
    other_minus: Tensor | None = None,
    lam: float = 0.0,
    scale: float = 1.0,
    normalize: bool = False,
) -> None:
    """Write rows ``index`` of the combined activations to ``out[offset : offset + N]``.

    ``value`` and, where given, ``minus``, ``other``, ``other_minus`` are (R, D) or (B, T, D) of one
    shape; ``index`` (N,) int64 counts rows of the flattened (B·T, D); ``out`` is (M, D) in any
    float dtype.  With ``normalize`` every row gets unit length; a zero row stays zero.  Not
    differentiable.

    Raises :class:`~pkt_fast.errors.ShapeError` when shapes, dtypes or devices do not fit, when an
    index lies outside the rows, when ``out`` has no room, or when it shares memory with an input.
    To check the index on a GPU would mean waiting for the device: there a row whose index is out of
    range is NaN.  From a GPU into pinned host memory the rows travel on a side stream:
    :func:`synchronize_captures` waits for them.
    """
    _capture_rows(
        out, offset, index, value, minus, other, other_minus, lam, scale, normalize
    )


def _check(
    out: Tensor, offset: int, index: Tensor, value: Tensor, companions: tuple[Tensor | None, ...]
) -> None:
    if value.dim() not in (2, 3):
        raise ShapeError(
            f"capture_rows: value is {tuple(value.shape)}; expected (R, D) or (B, T, D)"
        )
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ShapeError(
            f"capture_rows: index is {index.dtype} of shape {tuple(index.shape)}; "
            "expected int64 (N,)"
        )
    if out.dim() != 2 or out.shape[1] != value.shape[-1]:
        raise ShapeError(
            f"capture_rows: out is {tuple(out.shape)}; expected (M, {value.shape[-1]}) to fit value"
        )
    if offset < 0 or offset + index.shape[0] > out.shape[0]:
        raise ShapeError(
            f"capture_rows: {index.shape[0]} rows at offset {offset} do not fit an out of "
            f"{out.shape[0]} rows"
        )
    if not (out.is_floating_point() and value.is_floating_point()):
        raise ShapeError(f"capture_rows: {value.dtype} to {out.dtype}: both must be float dtypes")
    _, other, other_minus = companions
    if other_minus is not None and other is None:
        raise ShapeError("capture_rows: other_minus is given without other")
    for x in companions:
        if x is not None and (x.shape != value.shape or x.device != value.device):
            raise ShapeError(
                f"capture_rows: value is {tuple(value.shape)} on {value.device}, but one of minus, "
                f"other, other_minus is {tuple(x.shape)} on {x.device}"
            )
    if any(x is not None and may_overlap(out, x) for x in (value, *companions)):
        raise ShapeError("capture_rows: out shares memory with an input")


def _run(
    out: Tensor,
    offset: int,
    index: Tensor,
    value: Tensor,
    minus: Tensor | None,
    other: Tensor | None,
    other_minus: Tensor | None,
    lam: float,
    scale: float,
    normalize: bool,
) -> None:
    _check(out, offset, index, value, (minus, other, other_minus))
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    dispatch(
        "capture_rows", value,
        out, offset, index, value, minus, other, other_minus, lam, scale, normalize,
    )


def _fake(
    out: Tensor,
    offset: int,
    index: Tensor,
    value: Tensor,
    minus: Tensor | None,
    other: Tensor | None,
    other_minus: Tensor | None,
    lam: float,
    scale: float,
    normalize: bool,
) -> None:
    return None


_library.impl("capture_rows", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pkt_fast::capture_rows", _fake, lib=_library)


def _out_of_range(position: int, index: Tensor, rows: int) -> ShapeError:
    return ShapeError(
        f"capture_rows: index[{position}] is {int(index[position])}, outside the {rows} rows "
        "of value"
    )


@implementation("capture_rows", "reference")
def _capture_rows_reference(
    out: Tensor,
    offset: int,
    index: Tensor,
    value: Tensor,
    minus: Tensor | None,
    other: Tensor | None,
    other_minus: Tensor | None,
    lam: float,
    scale: float,
    normalize: bool,
) -> None:
    rows = value.shape[:-1].numel()
    if value.device.type == "cpu":
        wrong = (index < 0) | (index >= rows)
        if bool(wrong.any()):
            raise _out_of_range(int(wrong.nonzero()[0]), index, rows)
    index = index.to(value.device)

    # Only the wanted rows, in double: no finite input overflows on the way.
    def wanted(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(rows, x.shape[-1])[index].double()

    gathered = wanted(value)
    assert gathered is not None
    out[offset : offset + index.shape[0]] = reference.gather_rows(
        gathered,
        torch.arange(index.shape[0], device=value.device),
        minus=wanted(minus),
        other=wanted(other),
        other_minus=wanted(other_minus),
        lam=lam,
        scale=scale,
        normalize=normalize,
        dtype=out.dtype,
    ).to(out.device)


def _native_takes(out: Tensor, offset: int, index: Tensor, value: Tensor, *rest: Any) -> bool:
    """One input dtype; float64 only to float64; everything on the CPU."""
    companions = rest[:3]
    return (
        value.dtype in DTYPE_CODES
        and out.dtype in DTYPE_CODES
        and (value.dtype == torch.float64) == (out.dtype == torch.float64)
        and all(x is None or x.dtype == value.dtype for x in companions)
        and out.device.type == "cpu"
        and has_contiguous_rows(out)
    )


def _activation(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides between batches and rows; (R, D) is one batch of R rows."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2)


def _operands(*activations: Tensor | None) -> list[Tensor | None]:
    """Activations with contiguous rows; keep them as long as their addresses are in use."""
    return [None if x is None else rows_contiguous(x) for x in activations]


def _described(
    out: Tensor, offset: int, index: Tensor, operands: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Out's rows from ``offset`` on, index and operands, as both kernels take them.

    ``index`` is contiguous and the operands are those of :func:`_operands`.
    """
    value = operands[0]
    assert value is not None
    return (
        (
            out.data_ptr() + offset * out.stride(0) * out.element_size(),
            DTYPE_CODES[out.dtype], out.stride(0),
        ),
        (index.data_ptr(), len(index)),
        (
            DTYPE_CODES[value.dtype], max(value.shape[-2], 1), value.shape[-1],
            *map(_activation, operands),
        ),
    )  # fmt: skip


if (_native_capture_rows := native_kernel("capture_rows")) is not None:

    @implementation("capture_rows", "native", supports=_native_takes)
    def _capture_rows_native(
        out: Tensor,
        offset: int,
        index: Tensor,
        value: Tensor,
        minus: Tensor | None,
        other: Tensor | None,
        other_minus: Tensor | None,
        lam: float,
        scale: float,
        normalize: bool,
    ) -> None:
        rows = value.shape[:-1].numel()
        index = index.to(value.device).contiguous()
        operands = _operands(value, minus, other, other_minus)
        row_bytes = value.shape[-1] * (value.element_size() + out.element_size())
        wrong = _native_capture_rows(
            *_described(out, offset, index, operands), (lam, scale, normalize), rows,
            threads_for(len(index) * row_bytes),
        )  # fmt: skip
        if wrong >= 0:
            raise _out_of_range(wrong, index, rows)


# --------------------------------------------------------------------------- CUDA, to pinned memory

_side_streams: dict[torch.device, torch.cuda.Stream] = {}

# What the side streams write to, by address: freed earlier, pinned memory would be lent again.
_in_flight: dict[int, torch.UntypedStorage] = {}


def synchronize_captures() -> None:
    """Wait for captures into pinned host memory; call it before reading the rows."""
    for stream in list(_side_streams.values()):
        stream.synchronize()
    _in_flight.clear()


def captures_to_host(device: torch.device) -> bool:
    """Whether a kernel carries rows from ``device`` into pinned host memory, beside other work.

    Without one the rows are made on the device and copied: pinned memory would bring nothing, and
    backend "triton" has no kernel that reaches it.
    """
    return (
        device.type == "cuda"
        and backend() in ("auto", "native")
        and _capture_rows_pinned is not None
        and cuda_problem(device) is None
    )


def _cuda_takes(out: Tensor, offset: int, index: Tensor, value: Tensor, *rest: Any) -> bool:
    """From a GPU into pinned host memory, up to 32 bits wide."""
    return (
        cuda_problem(value.device) is None
        and {out.dtype, value.dtype} <= DTYPE_CODES.keys() - {torch.float64}
        and all(x is None or x.dtype == value.dtype for x in rest[:3])
        and out.device.type == "cpu"
        and out.is_pinned()
        and has_contiguous_rows(out)
    )


if (_capture_rows_pinned := cuda_kernel("capture_rows_pinned")) is not None:

    @implementation("capture_rows", "cuda", supports=_cuda_takes)
    def _capture_rows_cuda(
        out: Tensor,
        offset: int,
        index: Tensor,
        value: Tensor,
        minus: Tensor | None,
        other: Tensor | None,
        other_minus: Tensor | None,
        lam: float,
        scale: float,
        normalize: bool,
    ) -> None:
        """On a side stream: the model's next layer runs while the rows cross the bus."""
        device = value.device
        index = index.to(device, non_blocking=True).contiguous()
        operands = _operands(value, minus, other, other_minus)
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)
        side = _side_streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            try:
                _capture_rows_pinned(
                    *_described(out, offset, index, operands), (lam, scale, normalize),
                    value.shape[:-1].numel(), side.cuda_stream,
                )  # fmt: skip
            except RuntimeError as error:
                raise BackendError(f"capture_rows on {device}: {error}") from error
        for x in (index, *operands):
            if x is not None:
                x.record_stream(side)
        storage = out.untyped_storage()
        _in_flight[storage.data_ptr()] = storage


def _triton_takes(out: Tensor, offset: int, index: Tensor, value: Tensor, *rest: Any) -> bool:
    """Rows that stay on the device of the activations, up to 32 bits wide, into contiguous ones."""
    return (
        out.device == value.device
        and has_contiguous_rows(out)
        and up_to_32_bits(out, value, *rest)
    )


triton_implementation("capture_rows", "capture_rows", supports=_triton_takes)
