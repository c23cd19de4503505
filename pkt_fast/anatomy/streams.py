"""The residual stream, (B, T, D), among what a block takes and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from ..errors import ConfigError, ModelError


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    """Every argument of a call with its position or name."""
    yield from enumerate(args)
    yield from kwargs.items()


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    """The argument of a call at a position or of a name."""
    return args[key] if isinstance(key, int) else kwargs[key]


def is_stream(value: Any, width: int | None = None) -> bool:
    """Whether ``value`` is a floating-point (B, T, D) tensor, with D = ``width`` when given."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and value.is_floating_point()
        and (width is None or value.shape[-1] == width)
    )


def block_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int
) -> tuple[int | str, Tensor]:
    """The first (B, T, width) argument of a block call, after where it was passed.

    Raises:
        ModelError: there is none.
    """
    for key, value in arguments(args, kwargs):
        if is_stream(value, width):
            return key, value
    raise ModelError(f"a block was called without a (B, T, {width}) argument")


def with_block_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block call with the residual stream replaced by ``hidden`` (B, T, D).

    Raises:
        ConfigError: ``hidden`` has another batch shape than the call.
    """
    key, old = block_input(args, kwargs, hidden.shape[-1])
    if old.shape != hidden.shape:
        raise ConfigError(
            f"hidden has shape {tuple(hidden.shape)}, the batch needs {tuple(old.shape)}"
        )
    hidden = hidden.to(old.device)
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}


def block_output(output: Any) -> Tensor:
    """The residual stream in what a block returned: the output itself or its first element."""
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that any module returned, alone or first in a tuple or list; None without one."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None
