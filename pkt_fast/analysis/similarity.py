"""Activations of all layers on the same tokens, and their linear CKA (SemAlign, figures 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..capture import capture, check_finite
from ..data.batches import Batch
from ..losses import cka
from ..phases import position_mask


@torch.no_grad()
def layer_activations(
    model: nn.Module,
    batches: Iterable[Batch],
    positions: Sequence[Sequence[int]] | None = None,
    *,
    interface: str = "mlp",
    max_rows: int = 4096,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Activations of all layers at supervised positions: L tensors (N, D), float32, on the CPU.

    ``positions``: read there instead, those of example i at index i, in order.  Batches are taken
    until ``max_rows`` rows are there; two models see the same rows of the same batches.  Raises
    :class:`~pkt_fast.errors.NumericsError` when a layer gives NaN or inf.
    """
    anatomy = Anatomy.of(model)
    layers = range(anatomy.num_layers)
    device = anatomy.head.weight.device
    parts: list[list[Tensor]] = [[] for _ in layers]
    count = 0
    for batch in batches:
        placed = batch.to(device)
        mask, pick = placed.supervised, None
        if positions is not None:
            mask, pick = position_mask(batch, positions)
        with capture(model, layers, interface=interface, positions=mask.to(device)) as acts:
            anatomy.run_until(anatomy.num_layers - 1, **placed.model_inputs(), use_cache=False)
        for layer, rows in acts.items():
            rows = rows if pick is None else rows[pick.to(device)]
            parts[layer].append(rows[: max_rows - count].float().cpu())
        count += len(parts[0][-1])
        advance(len(batch))
        if count >= max_rows:
            break
    found = [torch.cat(rows) for rows in parts]
    for layer, rows in enumerate(found):
        check_finite(rows, f"analysis: layer {layer}")
    return found


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[list[float]]:
    """Linear CKA of every layer in ``xs`` with every layer in ``ys``: rows follow ``xs``."""
    return [[float(cka(x.double(), y.double())) for y in ys] for x in xs]
