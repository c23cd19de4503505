"""Step 1 of a probe: the list of blocks, and whether the model is one we can work with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .modules import name_of
from .streams import first_tensor
from .trial import ROWS, TOKENS, exact, logits_of, watched


@dataclass(frozen=True)
class Survey:
    """Where the blocks are, the width D of the residual stream, and the (B, T, V) logits."""

    layers_path: str
    width: int
    logits: Tensor


@dataclass(frozen=True)
class _Trace:
    """The calls of one forward: module paths in order of return, shapes taken and returned."""

    order: list[str]
    shapes: dict[str, tuple[torch.Size | None, torch.Size | None]]
    logits: Tensor


def survey(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> Survey:
    """One forward that finds the list of blocks.

    Raises:
        ModelError: the model is not causal, or does not run blocks that map (B, T, D) to
            (B, T, D) and then its head, each once and in order.
    """
    trace = _traced(model, inputs)
    _check_causal(model, trace.logits)
    calls = Counter(trace.order)
    path, names = _largest_list(model, calls)
    if not all(calls[name] for name in names):
        raise ModelError(f"{name_of(model)} leaves out blocks of {path}: not supported")
    width = _width(trace, names)
    if width is None:
        given, made = (None if shape is None else tuple(shape) for shape in trace.shapes[names[0]])
        raise ModelError(
            f"the blocks of {name_of(model)} ({path}) do not map (B, T, D) to (B, T, D): "
            f"{given} became {made} for B={ROWS}, T={TOKENS}"
        )
    if any(calls[name] > 1 for name in names):
        raise ModelError(
            f"{name_of(model)} calls the blocks of {path} several times a forward: not supported"
        )
    if [name for name in trace.order if name in set(names)] != names:
        raise ModelError(f"{name_of(model)} does not run the blocks of {path} in order")
    if calls[next(name for name, module in model.named_modules() if module is head)] != 1:
        raise ModelError(f"{name_of(model)} does not call its head once a forward")
    return Survey(path, width, exact(trace.logits))


def _traced(model: nn.Module, inputs: Mapping[str, Any]) -> _Trace:
    order: list[str] = []
    shapes: dict[str, tuple[torch.Size | None, torch.Size | None]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        order.append(name)
        given = next((t for t in (*args, *kwargs.values()) if _on_grid(t)), None)
        made = first_tensor(output)
        shapes[name] = (
            None if given is None else given.shape,
            None if made is None else made.shape,
        )

    with watched(model.named_modules(), note):
        return _Trace(order, shapes, logits_of(model, inputs))


def _largest_list(model: nn.Module, calls: Mapping[str, int]) -> tuple[str, list[str]]:
    """Path and members of the ``ModuleList`` with the most parameters that takes part at all.

    Lists inside a block (experts, heads) are smaller than the list of blocks around them.
    """
    best, size = None, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            names = [f"{path}.{name}" for name, _ in module.named_children()]
            count = sum(parameter.numel() for parameter in module.parameters())
            if count > size and any(calls[name] for name in names):
                best, size = (path, names), count
    if best is None:
        raise ModelError(f"{name_of(model)} has no list of blocks")
    return best


def _on_grid(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 3
        and ROWS in value.shape
    )


def _width(trace: _Trace, names: Sequence[str]) -> int | None:
    """The D for which every named module maps (B, T, D) to (B, T, D), if there is one."""
    seen = {shape for name in names for shape in trace.shapes[name]}
    if len(seen) != 1:
        return None
    shape = seen.pop()
    if shape is None or len(shape) != 3 or tuple(shape[:2]) != (ROWS, TOKENS):
        return None
    return int(shape[2])


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """The rows differ in their last token only, so their earlier logits must agree."""
    first, second = exact(logits[:, : TOKENS - 1])
    epsilon = torch.finfo(logits.dtype).eps
    if (first - second).norm() > math.sqrt(epsilon) * first.norm():
        raise ModelError(
            f"{name_of(model)} is not causal (a later token changes earlier logits): "
            "encoders cannot be used, pkt_fast needs a decoder-only model"
        )
