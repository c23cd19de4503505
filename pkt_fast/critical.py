"""The critical source layers of a transfer, and what the passes that find them capture already.

Paper, "layer attribution" and "layer pairing".  Attribution runs the whole source on the first
examples; the source pass wants some layers' rows of the same examples.  Which layers is known only
afterwards, so :class:`SeenRows` keeps the rows of all of them until the pairing is made, and the
source pass runs over the other examples alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .anatomy import Anatomy
from .attribution import attribute
from .capture import Activations, Wanted, interpolated, record
from .data.batches import Batch
from .inputs import TransferInputs
from .objectives import needs_source_head
from .pairing import LayerPair, pair_by_score, source_for
from .phases import layer_column, longest_first, position_mask, processing_batches
from .stores import model_fingerprint

# Of the free memory of a GPU: what attribution itself needs there comes on top.
_SHARE_OF_GPU = 8


def attributed_pairs(
    inputs: TransferInputs, seen: SeenRows | None = None
) -> tuple[Tensor | None, list[LayerPair]]:
    """The layer pairs, of the layers that ``config`` names or of those with the highest scores.

    The scores, (L_src,), come first; None when layers were named.  ``seen`` is given what the
    passes over the source capture on the way.
    """
    source_layers = Anatomy.of(inputs.source).num_layers
    target_layers = Anatomy.of(inputs.target).num_layers
    chosen = inputs.config.layers
    if chosen == "all":
        chosen = tuple(range(target_layers))
    pairing = inputs.config.pairing
    if chosen is not None:
        return None, [source_for(source_layers, target_layers, int(k), pairing) for k in chosen]
    scores = _remembered_scores(inputs, seen)
    return scores, pair_by_score(
        source_layers, target_layers, scores.tolist(), inputs.config.num_layers, pairing
    )


def _remembered_scores(inputs: TransferInputs, seen: SeenRows | None) -> Tensor:
    """The scores, or those that an earlier transfer left in the directory of the stores."""
    config = inputs.config
    scores = inputs.store_place.remembered(
        "attribution",
        lambda: {
            "source": model_fingerprint(inputs.source),
            "data": inputs.examples.fingerprint(),
            "interface": config.interface,
            "reduction": config.reduction,
            "attribution_examples": config.attribution_examples,
        },
        lambda: _scores(inputs, seen).tolist(),
    )
    return torch.tensor(scores, dtype=torch.float64)


def _scores(inputs: TransferInputs, seen: SeenRows | None) -> Tensor:
    """Every source layer's score on the first examples, (L_src,)."""
    config = inputs.config
    examples = inputs.aligned.examples[: config.attribution_examples]
    order = longest_first(examples.lengths)
    batches = processing_batches(examples, order, config.micro_batch_size, inputs.pad_token_ids[0])
    with (
        inputs.phases.counted("attribute", sum(examples.lengths)) as advance,
        contextlib.nullcontext(batches) if seen is None else seen.of(batches, inputs) as watched,
    ):

        def counted() -> Iterator[Batch]:
            for batch in watched:
                yield batch
                advance(batch.num_tokens)

        return attribute(
            inputs.source, counted(), interface=config.interface, reduction=config.reduction
        )


@dataclass
class SeenRows:
    """Rows of every source layer for the examples that attribution ran on.

    Attributes:
        order: the examples, in the order of their rows.
        batches: layer -> rows (N, D_src) at the positions that answer the target's, by batch.
    """

    order: list[int] = field(default_factory=list)
    batches: list[dict[int, Tensor]] = field(default_factory=list)

    @classmethod
    def wanted_by(cls, inputs: TransferInputs) -> SeenRows | None:
        """An empty one where the source pass can use it, else None.

        It cannot where nothing is attributed, where the objective captures nothing, where the
        head's input is wanted beside the layers, for the change of a fine-tuned source (three
        passes share one order of rows), and where rows of all layers take more than the budget.
        """
        config = inputs.config
        if config.layers is not None or config.objective == "none":
            return None
        if needs_source_head(config) or inputs.source_base is not None:
            return None
        return cls() if _bytes_of_all_layers(inputs) <= _room(inputs) else None

    @contextlib.contextmanager
    def of(self, batches: Iterator[Batch], inputs: TransferInputs) -> Iterator[Iterator[Batch]]:
        """``batches`` to run the source on inside; each one's rows are kept when the next is
        asked for.
        """
        layers = range(Anatomy.of(inputs.source).num_layers)
        wanted = [Wanted(layer, (layer,)) for layer in layers]
        with record(inputs.source, wanted, inputs.config.interface) as acts:
            yield self._kept(batches, acts, inputs.aligned.positions)

    def _kept(
        self, batches: Iterator[Batch], acts: Activations, positions: Sequence[Sequence[int]]
    ) -> Iterator[Batch]:
        for batch in batches:
            acts.positions, pick = position_mask(batch, positions)
            count = int(acts.positions.sum())
            yield batch
            # A float16 model may run more than once: the last pass counts.
            rows = {layer: values[-count:] for layer, values in acts.take().items()}
            if pick is not None:
                rows = {layer: values[pick.to(values.device)] for layer, values in rows.items()}
            self.order += batch.rows
            self.batches.append(rows)

    def rows(self, wanted: Sequence[Wanted]) -> Iterator[dict[str, Tensor]]:
        """What the source pass would yield for these examples, batch by batch; each is let go.

        They are finite: a score of theirs was.
        """
        while self.batches:
            layers = self.batches.pop(0)
            yield {
                layer_column(want.key): interpolated([layers[i] for i in want.layers], want.weight)
                for want in wanted
            }


def _bytes_of_all_layers(inputs: TransferInputs) -> int:
    anatomy = Anatomy.of(inputs.source)
    counts = inputs.aligned.positions.counts[: inputs.config.attribution_examples]
    width = anatomy.hidden_size * anatomy.head.weight.dtype.itemsize
    return sum(counts) * anatomy.num_layers * width


def _room(inputs: TransferInputs) -> float:
    """Bytes that the rows may take where the source computes."""
    budget = inputs.store_place.budget_bytes
    if inputs.device.type != "cuda":
        return budget
    return min(budget, torch.cuda.mem_get_info(inputs.device)[0] / _SHARE_OF_GPU)
