"""The probe: a few short forwards of a model on random tokens, each watched for one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .blocks import Survey, survey
from .findings import LayerPlan, Structure
from .head import head_transform
from .modules import children_at, head_of
from .rerouting import resumed
from .residual import explain_blocks
from .roles import mixing_modules, plan
from .sublayers import record_blocks
from .trial import exact, logits_of, trial_inputs, undisturbed


def probe(model: nn.Module) -> Structure:
    """Take a base model apart.

    Raises:
        ModelError: it is not a decoder-only language model that this package can read.
        NumericsError: a block puts out NaN or inf.
    """
    head = head_of(model)
    inputs = trial_inputs(model, head)
    with undisturbed(model):
        found = survey(model, head, inputs)
        blocks = children_at(model, found.layers_path)
        record = record_blocks(model, head, found, blocks, inputs)
        mixes = mixing_modules(model, blocks, record.blocks, inputs)
        terms = explain_blocks(blocks, record.blocks)
        plans = [plan(*each) for each in zip(blocks, record.blocks, terms, mixes, strict=True)]
        streams = [block.stream for block in record.blocks]
        resumable = _resumable(model, blocks, plans, streams, found, inputs)
        transform = head_transform(model, head, inputs)
    return Structure(
        layers_path=found.layers_path,
        block_ids=tuple(map(id, blocks)),
        hidden_size=found.width,
        plans=tuple(plans),
        final_norm_path=record.final_norm_path,
        head_transform=transform,
        resumable=resumable,
    )


def _resumable(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    plans: Sequence[LayerPlan],
    streams: Sequence[Tensor],
    found: Survey,
    inputs: Mapping[str, Any],
) -> bool:
    """Whether the residual stream is all that upper blocks read of lower ones."""
    for layer in {len(blocks) // 2, len(blocks) - 1}:
        try:
            with resumed(blocks, plans, layer, streams[layer], found.width):
                logits = logits_of(model, inputs)
        except ModelError:
            return False
        error = (exact(logits) - found.logits).norm()
        if not error <= 100 * torch.finfo(logits.dtype).eps * found.logits.norm():
            return False
    return True
