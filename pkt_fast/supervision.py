"""What steers the target: one pass of the source, mapped into the target's space and stored.

For every pair the source activation h is captured at the supervised positions, interpolated
between two layers where the pairing says so, and stored as h̃ = M·h (D_tgt wide).  With
``source_base`` the stored row is h_target,0 + M·(h_source − h_source,base), the target's own
activation moved by what fine-tuning changed in the source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .anatomy import Anatomy
from .capture import Wanted
from .critical import SeenRows
from .inputs import TransferInputs
from .maps import LatentMap, UntunedRows, map_digest
from .objectives import needs_source_head
from .pairing import LayerPair
from .phases import HEAD, AlignedPositions, layer_column, longest_first, run_source
from .stores import ActivationStore, ColumnSpec, model_fingerprint


def source_rows(
    inputs: TransferInputs,
    pairs: Sequence[LayerPair],
    maps: Mapping[int, LatentMap],
    seen: SeenRows | None = None,
) -> ActivationStore | None:
    """Run the source once; keep aligned activations, and its head input if a loss needs it.

    Args:
        inputs: models and data.
        pairs: the layer pairs to capture.
        maps: target layer -> map; without one the source's own activations are kept.
        seen: rows that attribution captured; the source runs on the other examples alone.

    Returns:
        Columns ``layer<k>`` and ``head``, a row for every supervised position of the target; None
        when neither the objective nor the output loss looks at the source.
    """
    config = inputs.config
    wanted = [Wanted.of_pair(pair) for pair in pairs] if config.objective != "none" else []
    with_head = needs_source_head(config)
    if not wanted and not with_head:
        return None
    by_column = {layer_column(layer): mapping for layer, mapping in maps.items()}
    seen = seen or SeenRows()
    rest = _unseen(longest_first(inputs.aligned.examples.lengths), seen.order)
    order = [*seen.order, *rest]

    def fill(store: ActivationStore) -> None:
        changing = bool(maps) and inputs.source_base is not None
        untuned = _untuned(inputs, wanted) if changing else None
        tokens = sum(inputs.aligned.examples.lengths[i] for i in rest)
        with inputs.phases.counted("source pass", tokens) as advance:
            computed = run_source(
                inputs.source,
                inputs.aligned,
                wanted,
                config.interface,
                batch_size=config.micro_batch_size,
                pad_token_id=inputs.pad_token_ids[0],
                with_head=with_head,
                advance=advance,
                order=rest,
            )
            for rows in itertools.chain(seen.rows(wanted), computed):
                store.append(_mapped(rows, by_column, untuned, store))

    columns = _columns(inputs, wanted, mapped=bool(maps), with_head=with_head)
    store = inputs.store_place.filled(
        "source",
        inputs.aligned.positions.counts,
        order,
        columns,
        _fingerprint(inputs, pairs if wanted else [], maps, columns),
        fill,
    )
    seen.batches.clear()  # a store that was there already took none of them
    return store


def _unseen(order: Sequence[int], seen: Sequence[int]) -> list[int]:
    """``order`` without the examples of ``seen``."""
    known = set(seen)
    return [example for example in order if example not in known]


def _mapped(
    rows: Mapping[str, Tensor],
    maps: Mapping[str, LatentMap],
    untuned: UntunedRows | None,
    store: ActivationStore,
) -> dict[str, Tensor]:
    """Source rows in the target's space; columns without a map (the head's input) stay."""
    aligned = dict(rows)
    for name in rows.keys() & maps.keys():
        if untuned is None:
            aligned[name] = maps[name](rows[name])
        else:
            at = store.columns[name].filled
            aligned[name] = untuned.moved(maps[name], name, rows[name], at)
    return aligned


def _columns(
    inputs: TransferInputs, wanted: Sequence[Wanted], *, mapped: bool, with_head: bool
) -> dict[str, ColumnSpec]:
    """Width and dtype of what is stored."""
    source, target = Anatomy.of(inputs.source), Anatomy.of(inputs.target)
    width = target.hidden_size if mapped else source.hidden_size
    columns = {layer_column(want.key): (width, target.head.weight.dtype) for want in wanted}
    if with_head:
        columns[HEAD] = (source.head.weight.shape[1], source.head.weight.dtype)
    return columns


def _fingerprint(
    inputs: TransferInputs,
    pairs: Sequence[LayerPair],
    maps: Mapping[int, LatentMap],
    columns: Mapping[str, ColumnSpec],
) -> dict[str, Any]:
    """All that the stored rows depend on."""
    fingerprint = {
        "source": model_fingerprint(inputs.source),
        "data": inputs.examples.fingerprint(),
        "pairs": [[pair.target, *pair.source, pair.weight] for pair in pairs],
        "interface": inputs.config.interface,
        "map": map_digest(maps),
        "columns": sorted(columns),
    }
    if inputs.source_base is not None:
        fingerprint["source_base"] = model_fingerprint(inputs.source_base)
        fingerprint["target"] = model_fingerprint(inputs.target)
    return fingerprint


# --------------------------------------------------------------------------- the source's change


def _untuned(inputs: TransferInputs, wanted: Sequence[Wanted]) -> UntunedRows:
    """What the source's change starts from and what it is added to."""
    assert inputs.source_base is not None
    own = [Wanted(want.key, (want.key,)) for want in wanted]
    same = AlignedPositions.same(inputs.examples)
    pads = inputs.pad_token_ids
    return UntunedRows(
        _untuned_rows(inputs, "source", inputs.source_base, inputs.aligned, wanted, pads[0]),
        _untuned_rows(inputs, "target", inputs.target, same, own, pads[1]),
    )


def _untuned_rows(
    inputs: TransferInputs,
    kind: str,
    model: nn.Module,
    aligned: AlignedPositions,
    wanted: Sequence[Wanted],
    pad_token_id: int,
) -> ActivationStore:
    """Rows of an untuned model, in the order in which the source pass has them."""
    anatomy = Anatomy.of(model)
    order = longest_first(inputs.aligned.examples.lengths)
    tokens = sum(aligned.examples.lengths)

    def fill(store: ActivationStore) -> None:
        with (
            inputs.visiting(model),
            inputs.phases.counted(f"untuned {kind}", tokens) as advance,
        ):
            for rows in run_source(
                model,
                aligned,
                wanted,
                inputs.config.interface,
                batch_size=inputs.config.micro_batch_size,
                pad_token_id=pad_token_id,
                with_head=False,
                advance=advance,
                order=order,
            ):
                store.append(rows)

    column = (anatomy.hidden_size, anatomy.head.weight.dtype)
    return inputs.store_place.filled(
        f"untuned-{kind}",
        inputs.aligned.positions.counts,
        order,
        {layer_column(want.key): column for want in wanted},
        {
            "model": model_fingerprint(model),
            "data": inputs.examples.fingerprint(),
            "layers": [[want.key, *want.layers, want.weight] for want in wanted],
            "interface": inputs.config.interface,
        },
        fill,
    )
