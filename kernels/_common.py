"""What the Triton kernels share, and the convention by which benchmarks/aot_report.py finds them.

Every file ``kernels/<op>.py`` holds

* one or more ``@triton.jit`` kernels, wrapped in ``triton.autotune`` / ``triton.heuristics`` as
  needed,
* a host function with exactly the signature of the op in docs/design.md, taking CUDA or ROCm
  tensors
  (CPU tensors under ``TRITON_INTERPRET=1``),
* ``aot_specs(target: Target) -> list[KernelSpec]``: how each kernel is compiled at a realistic
  shape.

**The aot convention.**  ``KernelSpec.args`` maps every run-time argument of the kernel to its
type, in Triton's signature notation, with ``":16"`` appended where a launch would find the pointer
16-byte aligned or the integer a multiple of 16::

    def aot_specs(target: Target) -> list[KernelSpec]:
        return [
            KernelSpec(
                name="grad_x_act/bf16",
                kernel=_grad_x_act_kernel,
                args={"Gradient": "*bf16:16", "Partial": "*fp32:16", "count": "i64:16"},
                constexprs={"BLOCK": 8192},
                num_warps=8,
                kind="bytes",
                bytes=2 * 2 * 8192 * 4096,
                flops=4 * 8192 * 4096,
            )
        ]

``kind="gemm"`` demands matrix instructions, ``kind="bytes"`` demands 16-byte global loads (and
stores, with ``bulk_store``, where the kernel writes as it reads), and no kernel may spill.
A tuned kernel hands over its list of :class:`Tile`, so that what is checked is what may run: the
report compiles the first entry for every architecture, and all of them with ``--all-configs``.  An
entry that fails the report on an architecture names it in ``never_on`` and is not tried there.

**Keys of the tuner** are sizes that stay, and ``size_class`` for those that change from batch to
batch: a key that changes would time the whole list again.

**Conventions of the kernels.**  Reductions and dot products accumulate in float32.
Kernels that call ``tl.dot`` widen its operands where ``INTERPRETED``: the interpreter multiplies
bf16 operands as raw integers.  Float64 storage is left to the reference.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

STORAGE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Dtypes the kernels store, with their names in Triton's signatures."""

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class Target:
    """A GPU architecture the report compiles for."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int

    @classmethod
    def named(cls, name: str) -> Target:
        """The target called ``sm_90`` or ``gfx942``; ValueError for a name of neither form."""
        if name.startswith("sm_") and name[3:].isdigit():
            return cls(name, "cuda", int(name[3:]), 32)
        if name.startswith("gfx"):
            return cls(name, "hip", name, 64 if name.startswith("gfx9") else 32)
        raise ValueError(f"unknown architecture {name!r}; use sm_NN or gfxNNN")

    @classmethod
    def current(cls) -> Target:
        """The architecture of the GPU in use."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if is_hip():
            return cls.named(properties.gcnArchName.partition(":")[0])
        return cls.named(f"sm_{properties.major}{properties.minor}")

    @property
    def family(self) -> str | None:
        """The architecture of the report with the same matrix instructions; None for others."""
        if self.backend == "hip":
            return "gfx942" if self.name in ("gfx942", "gfx950") else None
        arch = int(self.arch)
        if arch == 90:
            return "sm_90"
        if 100 <= arch < 120:
            return "sm_100"
        return "sm_80" if arch >= 80 else None

    @property
    def dot_precision(self) -> str:
        """How float32 operands of ``tl.dot`` are multiplied; see :func:`dot_precision`."""
        return "ieee" if self.backend == "hip" else "tf32x3"


@dataclass(frozen=True)
class Tile:
    """One entry of a tuning list; ``never_on``: architectures where it fails the report."""

    blocks: Mapping[str, int]
    warps: int
    stages: int = 3
    never_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = "×".join(map(str, self.blocks.values()))
        return f"{sizes or 'whole rows'}, {self.warps} warps, {self.stages} stages"


def tiles_for(tiles: Sequence[Tile], target: Target) -> list[Tile]:
    """The entries that may run on ``target``; the last, smallest one where nothing was checked."""
    if target.family is None:
        return [tiles[-1]]
    return [tile for tile in tiles if target.family not in tile.never_on]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel at one realistic shape, as the ahead-of-time report compiles it."""

    name: str
    kernel: Any
    args: Mapping[str, str]
    constexprs: Mapping[str, Any]
    kind: Literal["gemm", "bytes"]
    bytes: int
    flops: int
    num_warps: int = 4
    num_stages: int = 3
    compute: Literal["fp32", "fp16", "bf16", "tf32x3"] = "fp32"
    bulk_store: bool = False
    tiles: Sequence[Tile] = ()
    tile: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def tiled(self, target: Target) -> list[KernelSpec]:
        """The kernel with each tile it may run with on ``target``; itself if it is not tuned."""
        return [
            replace(
                self,
                constexprs={**self.constexprs, **tile.blocks},
                num_warps=tile.warps,
                num_stages=tile.stages,
                tile=str(tile),
            )
            for tile in tiles_for(self.tiles, target)
        ] if self.tiles else [self]


def is_hip() -> bool:
    """Whether this torch drives AMD GPUs."""
    return torch.version.hip is not None


def dot_precision() -> str:
    """The exact way to multiply float32 tiles on this vendor's matrix units.

    NVIDIA: three TF32 products recover float32's precision.  AMD: the units take float32 as it is.
    """
    return "ieee" if is_hip() else "tf32x3"


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def persistent_programs(like: Tensor, work: int, per_unit: int = 1) -> int:
    """Programs of a persistent launch: ``per_unit`` for each multiprocessor, at most ``work``.

    Without a GPU a small number, so that the interpreter runs the outer loop several times.
    """
    units = _multiprocessors(like.device.index or 0) if like.is_cuda else 3
    return max(1, min(units * per_unit, work))


def device_of(like: Tensor) -> Any:
    """Context in which a launch goes to the device of ``like``."""
    return torch.cuda.device(like.device if like.is_cuda else -1)


def to_device(values: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A small table on the device of ``like``; the host does not wait for the copy."""
    with device_of(like):  # pinned memory would start a context on the current GPU
        table = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
        return table.to(like.device, non_blocking=True)


_TAKES_CACHE = "cache_results" in inspect.signature(triton.autotune).parameters


def size_class(size: int) -> int:
    """The power of two above ``size``: a key for sizes that change from batch to batch."""
    return max(16, triton.next_power_of_2(size))


def autotune(tiles: Sequence[Tile], key: list[str]) -> Any:
    """``triton.autotune`` whose choices are kept on disk where Triton can (3.4 and later).

    It times the entries that may run on this GPU.  Where there is nothing to time, the last of
    ``tiles`` is taken: list the smallest one last.
    """
    if INTERPRETED or not torch.cuda.is_available():
        tiles = tiles[-1:]
    else:
        tiles = tiles_for(tiles, Target.current())
    configs = [
        triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles
    ]
    options = {"cache_results": True} if _TAKES_CACHE else {}
    tuned = triton.autotune(configs=configs, key=key, **options)

    def decorate(kernel: Any) -> Any:
        tuner = tuned(kernel)
        tuner.run = _one_at_a_time(tuner.run)
        return tuner

    return decorate


def _one_at_a_time(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` for one thread at a time: a tuner keeps the arguments of the call it works on."""
    lock = threading.RLock()

    @functools.wraps(run)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return run(*args, **kwargs)

    return locked


def row_major(x: Tensor) -> Tensor:
    """``x`` with its channels contiguous; other strides are left alone."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def packed(x: Tensor | None) -> Tensor | None:
    """``x`` without gaps between its elements; None stays None."""
    return None if x is None else x.contiguous()


def near_rows(x: Tensor, count: int = 256) -> Tensor:
    """``x`` with its channels contiguous and ``count`` rows (those of a tile) in 32-bit reach."""
    return row_major(x) if x.stride(0) * count < 1 << 31 else x.contiguous()


@triton.jit
def power_of_two_scale(amax):
    """1/2^⌊log2 amax⌋ for float32 ``amax`` >= 0, within the normal range.

    Multiplying by it is exact and brings the largest element near 1, so that the squares of a row
    neither overflow nor vanish, whatever its norm.
    """
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_norm(sum_of_squares):
    """1/√s, and 0 where s is 0; the masked lane is clamped before the reciprocal."""
    safe = tl.where(sum_of_squares > 0, sum_of_squares, 1.0)
    return tl.where(sum_of_squares == 0, 0.0, 1.0 / tl.sqrt(safe) + 0.0 * sum_of_squares)
