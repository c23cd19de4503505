"""Step 3 of a probe: which term is attention, which the MLP, and what the linear modules do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .findings import LayerPlan, Linear, Source
from .linears import fused
from .residual import same
from .streams import first_tensor, with_block_input
from .sublayers import BlockRecord
from .trial import ROWS, TOKENS, exact, logits_of, watched


def mixing_modules(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    records: Sequence[BlockRecord],
    inputs: Mapping[str, Any],
) -> list[dict[str, bool]]:
    """Per block: module path -> whether it reacts at later positions to a change at position 0.

    One forward in which every block gets two rows that differ at position 0 only.
    """
    mixes: list[dict[str, bool]] = [{} for _ in blocks]

    def feed(index: int) -> Callable[..., Any]:
        row = records[index].stream[:1]
        other = row.clone()
        other[:, 0] = -row[:, 0].flip(-1)
        pair = torch.cat([row, other])
        return lambda module, args, kwargs: with_block_input(args, kwargs, pair)

    def watch(index: int) -> Callable[..., None]:
        def note(path: str, args: Any, kwargs: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None and value.numel() % (ROWS * TOKENS) == 0:
                mixes[index][path] = _reacts(value)

        return note

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(
                block.register_forward_pre_hook(feed(index), with_kwargs=True, prepend=True)
            )
            inner = [entry for entry in block.named_modules() if entry[0]]
            stack.enter_context(watched(inner, watch(index)))
        logits_of(model, inputs)
    return mixes


def _reacts(value: Tensor) -> bool:
    first, second = exact(value).reshape(ROWS, TOKENS, -1)[:, 1:]
    return bool((first - second).norm() > 0.01 * first.norm())


def plan(
    block: nn.Module,
    record: BlockRecord,
    terms: Sequence[Source] | None,
    mixes: Mapping[str, bool],
) -> LayerPlan:
    """All findings about one block; ``terms`` add up to its contribution (None: unexplained)."""
    taps = {} if terms is None else _roles(terms, mixes)
    uncalled = fused(block, [path for path, _, _ in record.linears])
    linears = tuple(
        Linear(path, given, made, mixes.get(path, False), path in uncalled)
        for path, given, made in record.linears
    )
    projections = {
        interface: path
        for interface, source in taps.items()
        if (path := _projection(record, source)) is not None
    }
    return LayerPlan(taps, projections, linears, record.output, record.copy)


def _roles(terms: Sequence[Source], mixes: Mapping[str, bool]) -> dict[str, Source]:
    """Attention is the first contribution that mixes positions; the other one is the MLP."""
    attention = next((s for s in terms if mixes.get(s.path, False)), None)
    if attention is None:
        return {"mlp": terms[0]} if len(terms) == 1 else {}
    rest = [source for source in terms if source is not attention]
    return {"attention": attention, **({"mlp": rest[0]} if rest else {})}


def _projection(record: BlockRecord, tap: Source) -> str | None:
    """The linear module with the tap's values: nothing comes between it and the residual sum."""
    if tap.scale != 1.0:
        return None
    [wanted] = record.index([tap.bare()])
    for path, _, _ in record.linears:
        own = next((s for s in record.sources if s.path == path and s.minus is None), None)
        if own is not None and same(record.gram, wanted, *record.index([own])):
            return path
    return None
