"""Reading an activation of a layer with a forward hook."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from .findings import Source
from .streams import argument, block_input, block_output, is_stream


@dataclass(frozen=True)
class TapValue:
    """A layer activation as the tensors it is made of: a fused kernel can do the arithmetic.

    Attributes:
        value: (B, T, D).
        minus: (B, T, D) to subtract from ``value``, or None.
        scale: multiplies the difference (a model's residual multiplier); 1.0 otherwise.
    """

    value: Tensor
    minus: Tensor | None = None
    scale: float = 1.0

    def tensor(self) -> Tensor:
        """``scale * (value - minus)``, shape (B, T, D)."""
        result = self.value if self.minus is None else self.value - self.minus
        return result if self.scale == 1.0 else result * self.scale

    def copied(self) -> TapValue:
        """The same in memory of its own."""
        minus = None if self.minus is None else self.minus.clone()
        return TapValue(self.value.clone(), minus, self.scale)


@dataclass(frozen=True, eq=False)
class Tap:
    """One place where a layer's activation can be read with a forward hook on ``module``.

    Register the hook with ``with_kwargs=True`` and give what it receives to :meth:`read`.  Keep the
    tap alive as long as the hook: some families flatten their tokens inside the block, and the tap
    then watches the block to know the batch shape.
    """

    module: nn.Module
    _reader: Callable[[tuple[Any, ...], Mapping[str, Any], Any], TapValue] = field(repr=False)
    _index: int | None = None

    def returned(self, output: Any) -> Tensor:
        """The tensor that :meth:`read` takes its value from, as the module returned it.

        It stands in the autograd graph of what follows also where :meth:`read` copies or reshapes
        it.
        """
        if self._index is not None:
            return cast(Tensor, output[self._index])
        return block_output(output)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
        """The activation of this call; the live tensors unless the block overwrites them later."""
        return self._reader(args, kwargs, output)


def block_tap(block: nn.Module, width: int, *, minus_input: bool, copy: bool) -> Tap:
    """The tap of a block's output, or of its contribution (``minus_input``).

    ``copy`` is for blocks whose output the model changes in place later.
    """

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
        minus = block_input(args, kwargs, width)[1] if minus_input else None
        value = TapValue(block_output(output), minus)
        return value.copied() if copy else value

    return Tap(block, read)


def sublayer_tap(block: nn.Module, source: Source) -> Tap:
    """The tap of what a sublayer of ``block`` adds to the residual stream."""
    grid: list[tuple[int, int]] = []  # (B, T) of the latest call, for tokens in one row

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
        value = output if source.index is None else output[source.index]
        minus = None if source.minus is None else argument(args, kwargs, source.minus)
        if source.flat:
            value = value.view(*grid[-1], -1)
            minus = None if minus is None else minus.view(*grid[-1], -1)
        found = TapValue(value, minus, source.scale)
        return found.copied() if source.copy else found

    tap = Tap(block.get_submodule(source.path), read, source.index)
    if source.flat:

        def learn_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = next(t for t in (*args, *kwargs.values()) if is_stream(t))
            grid[:] = [(stream.shape[0], stream.shape[1])]

        handle = block.register_forward_pre_hook(learn_shape, with_kwargs=True)
        weakref.finalize(tap, handle.remove)
    return tap
