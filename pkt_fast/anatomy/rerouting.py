"""A model's own forward on another way: from a block on, up to a block, or without the head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, ModelError
from .findings import LayerPlan
from .streams import block_input, is_stream, with_block_input

Contexts = Callable[
    [], tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]
]


class _Stop(BaseException):
    """Ends a forward early.  Not an Exception, so that no handler inside a model swallows it."""


class HeadInput:
    """Holds the head's input of the latest call inside :meth:`Anatomy.bypass_head`."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, T, D), part of the autograd graph when there is one.

        Raises:
            ModelError: the model has not been called.
        """
        if self._hidden is None:
            raise ModelError("the head was not reached inside bypass_head(): call the model first")
        return self._hidden


@contextlib.contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` on this instance; nesting and foreign patches are restored."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def resumed(
    blocks: Sequence[nn.Module],
    plans: Sequence[LayerPlan],
    layer: int,
    hidden: Tensor,
    width: int,
) -> Iterator[None]:
    """Inside, blocks below ``layer`` do nothing and block ``layer`` is fed ``hidden`` (B, T, D)."""
    if not is_stream(hidden, width):
        raise ConfigError(f"hidden has shape {tuple(hidden.shape)}, expected (B, T, {width})")

    # A hook, not a patched forward: the block's own forward hooks then see the new input too.
    def feed(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return with_block_input(args, kwargs, hidden)

    with contextlib.ExitStack() as stack:
        for block, plan in zip(blocks[:layer], plans, strict=False):
            stack.enter_context(patched_forward(block, _pass_through(plan, width)))
        stack.enter_context(
            blocks[layer].register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        )
        yield


def _pass_through(plan: LayerPlan, width: int) -> Callable[..., Any]:
    """A forward that returns the block's input in the container that the block returns."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = block_input(args, kwargs, width)[1].detach()
        if plan.output is None:
            return stream
        container, length = plan.output
        return container([stream] + [None] * (length - 1))

    return forward


@contextlib.contextmanager
def recomputed(blocks: Iterable[nn.Module], contexts: Contexts) -> Iterator[None]:
    """Inside, backward passes run ``blocks`` anew, of which the forward keeps only the input.

    ``contexts`` gives what the first run of a block is in, and what its second.
    """
    with contextlib.ExitStack() as stack:
        for block in blocks:
            again = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=contexts
            )
            stack.enter_context(patched_forward(block, again))
        yield


@contextlib.contextmanager
def stopped_after(block: nn.Module, following: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a forward that enters one of ``following`` after ``block`` ends the ``with`` body."""
    entered = False

    def note(module: nn.Module, args: Any) -> None:
        nonlocal entered
        entered = True

    def stop(module: nn.Module, args: Any) -> None:
        if entered:  # a final norm may also serve before the first block
            raise _Stop

    with contextlib.ExitStack() as stack, contextlib.suppress(_Stop):
        stack.enter_context(block.register_forward_pre_hook(note))
        for module in following:
            stack.enter_context(module.register_forward_pre_hook(stop, prepend=True))
        yield


@contextlib.contextmanager
def bypassed(head: nn.Module) -> Iterator[HeadInput]:
    """Inside, ``head`` keeps its input (B, T, D) and returns (B, T, 0)."""
    caught = HeadInput()

    def keep(hidden: Tensor) -> Tensor:
        caught._hidden = hidden
        return hidden.new_zeros((*hidden.shape[:-1], 0))

    with patched_forward(head, keep):
        yield caught
