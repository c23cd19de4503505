"""The tiny forward of a probe: its inputs, the state it leaves untouched, hooks to watch it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, PktFastError
from ..lending import evaluating
from .modules import name_of, weight_of

ROWS, TOKENS = 2, 6

_SEED = 20251
_HIGHEST_TOKEN = 4096


def trial_inputs(model: nn.Module, head: nn.Module) -> dict[str, Any]:
    """Two rows of random tokens that differ in the last one only, as arguments of the model.

    Raises:
        ModelError: the vocabulary is too small.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = int(min(weight_of(embeddings).shape[0], weight_of(head).shape[0]))
    special = _special_tokens(getattr(model, "config", None))
    allowed = [token for token in range(min(size, _HIGHEST_TOKEN)) if token not in special]
    if len(allowed) < TOKENS + 1:
        raise ModelError(f"{name_of(model)} has a vocabulary of {size} tokens: too few to probe")
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(allowed), generator=generator)[: TOKENS + 1].tolist()
    tokens = [allowed[i] for i in order]
    ids = torch.tensor([tokens[:TOKENS], [*tokens[: TOKENS - 1], tokens[-1]]])
    ids = ids.to(weight_of(embeddings).device)
    optional = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    return {"input_ids": ids, **{k: v for k, v in optional.items() if k in accepted}}


def _special_tokens(config: Any) -> set[int]:
    settings = {} if config is None else vars(config)
    return {
        value
        for name, value in settings.items()
        if name.endswith("token_id") and isinstance(value, int)
    }


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state come back afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    uncompiled = torch.compiler.set_stance("force_eager")  # compiled calls may skip new hooks
    with torch.random.fork_rng(devices=devices), torch.no_grad(), uncompiled, evaluating(model):
        yield


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The (B, T, V) logits of ``model`` for ``inputs``.

    Raises:
        ModelError: the model does not run on token ids alone, or returns no such logits.
    """
    try:
        output = model(**inputs)
    except PktFastError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name_of(model)} does not run on token ids alone: {type(error).__name__}: {error}"
        ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{name_of(model)} returns no (B, T, V) logits")
    return logits


def exact(value: Tensor) -> Tensor:
    """A float64 copy on the CPU, where the solving is done."""
    return value.detach().to("cpu", copy=True).double()


def short(value: float) -> float:
    """0.22 for 0.2200000123: configs hold short numbers, the probe measures long ones."""
    rounded = float(f"{value:.4g}")
    return rounded if abs(rounded - value) < 1e-5 * abs(value) else value


@contextlib.contextmanager
def watched(
    modules: Iterable[tuple[str, nn.Module]],
    hook: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None],
) -> Iterator[None]:
    """Inside, ``hook(name, args, kwargs, output)`` follows every call of the named modules."""
    with contextlib.ExitStack() as stack:
        for name, module in modules:

            def call(
                module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
            ) -> None:
                hook(name, args, kwargs, output)

            stack.enter_context(module.register_forward_hook(call, with_kwargs=True))
        yield
