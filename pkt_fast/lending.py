"""Models a caller lends: what is changed while they are used is put back."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ModelError

_MISSING = object()
_claims = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_FLAGS = ("training", "_compiled_call_impl")
_DICTS = (
    "_modules",  # PEFT replaces entries in place
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True, eq=False)
class _State:
    """Everything about a model but its weights: flags, hooks, submodules, compiled calls, and
    where it is.
    """

    model: nn.Module
    device: torch.device | None
    modules: list[tuple[nn.Module, dict[str, Any]]]
    requires_grad: list[tuple[nn.Parameter, bool]]
    peft_config: Any

    @classmethod
    def of(cls, model: nn.Module) -> _State:
        return cls(
            model,
            device_of(model),
            [
                (
                    module,
                    {name: getattr(module, name) for name in _FLAGS}
                    | {name: dict(getattr(module, name)) for name in _DICTS},
                )
                for module in model.modules()
            ],
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            model.__dict__.get("peft_config", _MISSING),
        )

    def restore(self) -> None:
        for module, values in self.modules:
            for name in _FLAGS:
                setattr(module, name, values[name])
            for name in _DICTS:
                entries = getattr(module, name)
                entries.clear()
                entries.update(values[name])
        for parameter, flag in self.requires_grad:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        if self.peft_config is _MISSING:
            self.model.__dict__.pop("peft_config", None)
        if self.device is not None and self.device != device_of(self.model):
            self.model.to(self.device)


def device_of(model: nn.Module) -> torch.device | None:
    """Where the weights of ``model`` are; None for one without weights, or on several devices."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


@contextlib.contextmanager
def lent(*models: Any, kept: Any) -> Iterator[None]:
    """Use ``models`` and ``kept`` eagerly inside; put every model among them back afterwards, on
    the device it was on.

    ``kept`` keeps what was done to it, unless the block ends in an error.  Anything that is not a
    module (a path, None) is passed over.  A model that ``torch.compile`` wraps runs as it was
    before: compiled calls skip hooks that came later.

    Raises :class:`~pkt_fast.errors.ModelError` for a model that another thread has lent, whose
    hooks would mix with ours.
    """
    modules = [m for m in map(eager, (*models, kept)) if isinstance(m, nn.Module)]
    with claimed(modules), _restored(modules, kept):
        yield


@contextlib.contextmanager
def _restored(models: Sequence[nn.Module], kept: Any) -> Iterator[None]:
    states = {id(model): _State.of(model) for model in models}
    for state in states.values():
        for module, _ in state.modules:
            module._compiled_call_impl = None
    try:
        yield
    except BaseException:
        for state in states.values():
            state.restore()
        raise
    kept_state = states.pop(id(eager(kept)), None)
    for state in states.values():
        state.restore()
    if kept_state is not None:
        for module, values in kept_state.modules:
            module._compiled_call_impl = values["_compiled_call_impl"]


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Inside, new tensors are float32 and on the CPU, whatever the caller has for a default."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Inside, autograd records, wherever the caller stands (no_grad, inference_mode), and tensors
    are made as :func:`usual_defaults` has it.
    """
    with torch.inference_mode(False), torch.enable_grad(), usual_defaults():
        yield


@contextlib.contextmanager
def claimed(models: Sequence[nn.Module]) -> Iterator[None]:
    """Keep other threads from lending ``models``; the thread that has them may lend them again."""
    thread = threading.get_ident()
    with _claims:
        new = {model for model in models if _users.get(model, thread) == thread}
        if len(new) < len(set(models)):
            raise ModelError(
                "another thread uses one of the models right now: give every thread its own"
            )
        new = {model for model in new if model not in _users}
        _users.update(dict.fromkeys(new, thread))
    try:
        yield
    finally:
        with _claims:
            for model in new:
                _users.pop(model, None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode; each module gets its own training flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` requires a gradient, and it is in evaluation mode."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def eager(model: Any) -> Any:
    """The module inside what ``torch.compile(model)`` returned; anything else as it is."""
    return getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
