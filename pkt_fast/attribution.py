"""Layer attribution: gradient × activation of the supervised loss, one score a source layer.

The paper's score aggregates the product that Captum's LayerGradientXActivation computes.  Here one
backward pass serves all layers, and only two numbers per example and layer leave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from .anatomy import Anatomy, Tap
from .config import REDUCTIONS
from .data.batches import Batch, as_batch
from .data.examples import IGNORE_INDEX
from .errors import ConfigError, DataError, NumericsError
from .lending import claimed, differentiable, eager, frozen
from .ops import grad_x_act
from .ops.linear import own_products

# Factors of the loss whose gradients float16 can hold: powers of two, so that they divide out.
_FLOAT16_SCALES = (2.0**12, 2.0**4, 2.0**-4, 2.0**-12)


def attribute(
    model: nn.Module,
    batches: Iterable[Batch | Mapping[str, Tensor]],
    *,
    interface: str = "mlp",
    reduction: str = "absolute",
) -> Tensor:
    """Score every layer of ``model`` on ``batches``: (L,), float64, on the CPU.

    A batch is a :class:`pkt_fast.data.Batch`, or a mapping of ``input_ids``, ``labels`` (-100 where
    a token carries no loss) and ``attention_mask``, (B, T) each.

    The objective is each example's mean next-token loss over its supervised tokens; the activation
    is read at ``interface`` (as in :func:`pkt_fast.capture`).  With p = gradient · activation, an
    example contributes Σ|p| ("absolute"), Σp ("signed") or |Σp| ("net") over its tokens and
    channels, and the score is the mean over examples.

    Raises :class:`DataError` for another kind of batch and without a supervised token,
    :class:`NumericsError` when a score is not finite (naming the layer) and :class:`ConfigError`
    for an unknown reduction or interface.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction={reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    with claimed([eager(model)]):
        per_example = [
            _reduce(*gradient_x_activation(model, as_batch(batch), interface=interface), reduction)
            for batch in batches
        ]
    if not per_example:
        raise DataError(
            "attribution got no batch: give at least one example with supervised tokens"
        )
    scores = torch.cat(per_example, dim=1).mean(1)
    if not torch.isfinite(scores).all():
        layer = int((~torch.isfinite(scores)).nonzero()[0])
        raise NumericsError(
            f"attribution: the score of layer {layer} is not finite; try dtype='float32'"
        )
    return scores


def gradient_x_activation(
    model: nn.Module, batch: Batch, *, interface: str = "mlp"
) -> tuple[Tensor, Tensor]:
    """Σ g·a and Σ|g·a| over tokens and channels for every layer and example: (L, B) twice.

    Gradients in float16 are those of a scaled loss: unscaled, most of them would be subnormal.
    Raises :class:`NumericsError` when the loss is not finite.
    """
    batch = batch.to(Anatomy.of(model).head.weight.device)
    narrow = Anatomy.of(model).head.weight.dtype == torch.float16
    for scale in _FLOAT16_SCALES if narrow else (1.0,):
        signed, absolute = _scaled_products(model, batch, interface, scale)
        if torch.isfinite(absolute).all():
            break
    return signed / scale, absolute / scale


def _scaled_products(
    model: nn.Module, batch: Batch, interface: str, scale: float
) -> tuple[Tensor, Tensor]:
    """The sums for a loss times ``scale``: one forward and one backward pass."""
    anatomy = Anatomy.of(model)
    with own_products(), differentiable(), _inference_with_graph(model):
        with _tapped(anatomy, interface) as tapped, anatomy.bypass_head() as head_input:
            model(**batch.model_inputs(), use_cache=False)
        loss = _summed_mean_losses(anatomy, head_input.hidden, batch)
        if not torch.isfinite(loss):
            raise NumericsError(_culprit(loss, [activation for _, activation in tapped]))
        gradients = torch.autograd.grad(loss * scale, [edge for edge, _ in tapped])
    pairs = [
        grad_x_act(gradient.reshape(activation.shape), activation)
        for gradient, (_, activation) in zip(gradients, tapped, strict=True)
    ]
    signed = torch.stack([pair[0] for pair in pairs]).double().cpu()
    absolute = torch.stack([pair[1] for pair in pairs]).double().cpu()
    return signed, absolute


def _culprit(loss: Tensor, activations: list[Tensor]) -> str:
    """What went wrong in a forward pass whose loss is not finite."""
    for layer, activation in enumerate(activations):
        if not torch.isfinite(activation).all():
            return (
                f"attribution: layer {layer} gives NaN or inf in {activation.dtype}: check the "
                "checkpoint, or use dtype='float32'"
            )
    return f"attribution: the model's loss is {float(loss)}; try dtype='float32'"


def _reduce(signed: Tensor, absolute: Tensor, reduction: str) -> Tensor:
    return {"absolute": absolute, "signed": signed, "net": signed.abs()}[reduction]


def _summed_mean_losses(anatomy: Anatomy, hidden: Tensor, batch: Batch) -> Tensor:
    """Σ over examples of the example's mean next-token loss; only supervised rows meet the head."""
    supervised = batch.supervised
    if not bool(supervised.any()):
        raise DataError("attribution: a batch has no supervised token")
    counts = supervised.sum(1).clamp_min(1)
    weights = (1 / counts.double())[:, None].expand_as(supervised)[supervised]
    logits = anatomy.head_transform()(anatomy.head(hidden[supervised]))
    losses = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        batch.targets[supervised],
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return (losses * weights.to(losses.dtype)).sum()


@contextlib.contextmanager
def _tapped(anatomy: Anatomy, interface: str) -> Iterator[list[tuple[GradientEdge, Tensor]]]:
    """Collect every layer's activation (B, T, D) in the forward pass inside, and its place in the
    graph.

    An edge stays right where a block later adds to the tensor in place; a tensor would not.
    """
    tapped: list[tuple[GradientEdge, Tensor]] = []
    stack = contextlib.ExitStack()
    for layer in range(anatomy.num_layers):
        tap = anatomy.tap(layer, interface)

        def hook(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            tap: Tap = tap,
        ) -> None:
            value = tap.read(args, kwargs, output)
            # A tap's scale cancels: the gradient at the module has it, the activation has not.
            activation = value.value if value.minus is None else value.value - value.minus
            tapped.append((get_gradient_edge(tap.returned(output)), activation.detach()))

        stack.enter_context(tap.module.register_forward_hook(hook, with_kwargs=True))
    with stack:
        yield tapped


@contextlib.contextmanager
def _inference_with_graph(model: nn.Module) -> Iterator[None]:
    """Eval mode, parameters frozen, the embedding output the only leaf: gradients of activations
    alone.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    # A copy, because some models scale it in place, which a leaf does not allow.
    handle = embeddings.register_forward_hook(
        lambda _m, _a, output: output.requires_grad_().clone()
    )
    with frozen(model), handle:
        yield
