"""The two frozen passes of a transfer: each model sees the data once, and only rows are kept.

Source pass: run the source up to its deepest captured layer, keep the supervised positions, map
them into the target's space at once.  Target pass: run the frozen blocks below the first steered
layer and keep that layer's input for every real token.  Training then needs neither again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ._files import local
from .anatomy import Anatomy
from .capture import Wanted, check_finite, record
from .data.batches import Batch, collate
from .data.examples import Example, Examples
from .errors import OutputError
from .ops import captures_to_host, synchronize_captures
from .stores import (
    ActivationStore,
    ColumnSpec,
    memory_store,
    open_directory_store,
    remembered_values,
    store_bytes,
    writing_directory_store,
)
from .text_alignment import answering_positions, retokenized
from .vocabulary import same_tokenization

HEAD = "head"
INPUT = "input"

# Pinned pages are lost to the rest of the machine, and torch rounds up to a power of two.
_PINNED_BYTES = 2.0**30

Advance = Callable[[int], None]


def layer_column(target_layer: int) -> str:
    """Name of the column that steers ``target_layer``."""
    return f"layer{target_layer}"


# --------------------------------------------------------------------------- where stores live


@dataclass(frozen=True)
class StorePlace:
    """Where stores are made: in memory while they fit ``budget_bytes``, else in a directory.

    ``directory`` None spills to a temporary directory, deleted with the store.  Memory of up to
    ``pinned_bytes`` is pinned.
    """

    directory: Path | None
    budget_bytes: float
    pinned_bytes: float = 0.0

    @classmethod
    def of(cls, store: str, budget_gb: float, device: torch.device) -> StorePlace:
        """From the settings ``store`` and ``store_budget_gb``; ``device`` computes the rows."""
        directory = None if store == "memory" else local(store)
        return cls(directory, budget_gb * 1e9, _PINNED_BYTES if captures_to_host(device) else 0.0)

    def filled(
        self,
        kind: str,
        counts: Sequence[int],
        order: Sequence[int],
        columns: Mapping[str, ColumnSpec],
        fingerprint: Mapping[str, Any],
        fill: Callable[[ActivationStore], None],
    ) -> ActivationStore:
        """The store that ``fill`` writes, or one written under the same fingerprint before."""
        size = store_bytes(counts, columns)
        if self.directory is None and size <= self.budget_bytes:
            store = memory_store(counts, order, columns, pinned=0 < size <= self.pinned_bytes)
            try:
                fill(store)
            finally:
                synchronize_captures()  # after an error as well: the memory goes to somebody else
            store.check_complete()
            return store
        with self._directory() as directory:
            path = directory / _named(kind, fingerprint)
            known = open_directory_store(path, fingerprint)
            if known is None:
                with writing_directory_store(path, counts, order, columns, fingerprint) as known:
                    fill(known)
        if self.directory is None:
            weakref.finalize(known, shutil.rmtree, directory, ignore_errors=True)
        return known

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        """Where a store is made; a temporary place is removed after an error."""
        if self.directory is not None:
            yield self.directory
            return
        try:
            temporary = Path(tempfile.mkdtemp(prefix="pkt_fast_store_"))
        except OSError as error:
            raise OutputError(
                f"no temporary place for a store above store_budget_gb: {error.strerror}"
            ) from error
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def remembered(
        self,
        kind: str,
        fingerprint: Callable[[], Mapping[str, Any]],
        compute: Callable[[], list[float]],
    ) -> list[float]:
        """What ``compute`` returns, or what it returned under the same fingerprint before.

        Only a directory that the user named remembers; nothing else asks for the fingerprint.
        """
        if self.directory is None:
            return compute()
        known = fingerprint()
        return remembered_values(self.directory / _named(kind, known), known, compute)


def _named(kind: str, fingerprint: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    return f"{kind}-{digest}"


# --------------------------------------------------------------------------- source pass


class Positions(Sequence[Sequence[int]]):
    """Token positions of every example, all in one array."""

    def __init__(self, lists: Iterable[Iterable[int]]) -> None:
        self._values, self._stops = array("i"), array("q")
        for positions in lists:
            self._values.extend(positions)
            self._stops.append(len(self._values))

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return self._values[self._stops[index - 1] if index else 0 : self._stops[index]]

    @property
    def counts(self) -> list[int]:
        """How many positions each example has."""
        counts: list[int] = np.diff(np.asarray(self._stops), prepend=0).tolist()
        return counts


@dataclass(frozen=True)
class AlignedPositions:
    """Which source position answers each supervised target position, example by example.

    ``positions[i]`` lists source token positions, one per supervised position of target example i.
    """

    examples: Examples
    positions: Positions

    @classmethod
    def same(cls, examples: Examples) -> AlignedPositions:
        """Source and target tokenise alike: the supervised positions themselves."""
        numbers = range(len(examples))
        return cls(
            examples, Positions(examples.supervised_positions(i).tolist() for i in numbers)
        )

    @classmethod
    def between(
        cls, examples: Examples, source_tokenizer: Any, target_tokenizer: Any
    ) -> AlignedPositions:
        """Of ``examples`` in the target's tokens, whatever the source's tokenizer."""
        if same_tokenization(source_tokenizer, target_tokenizer):
            return cls.same(examples)
        return cls.across(examples, source_tokenizer)

    @classmethod
    def across(cls, examples: Examples, source_tokenizer: Any) -> AlignedPositions:
        """Source and target cut the same text differently: matched by characters read."""
        source = retokenized(examples, source_tokenizer)
        positions = Positions(map(answering_positions, examples, source))
        source.drop_text()
        return cls(source, positions)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Processing order: like lengths together, the largest batch (and any lack of memory) first."""
    order: list[int] = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return order


def processing_batches(
    examples: Sequence[Example], order: Sequence[int], batch_size: int, pad_token_id: int
) -> Iterator[Batch]:
    """Padded batches in processing order."""
    for start in range(0, len(order), batch_size):
        yield collate(examples, order[start : start + batch_size], pad_token_id=pad_token_id)


def run_source(
    model: nn.Module,
    aligned: AlignedPositions,
    wanted: Sequence[Wanted],
    interface: str,
    *,
    batch_size: int,
    pad_token_id: int,
    with_head: bool,
    advance: Advance = lambda tokens: None,
    order: Sequence[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Run ``model`` over all examples; yield the wanted rows batch by batch, in processing order.

    Columns are ``layer<k>`` for every wanted key k and, with ``with_head``, the head's input.
    Without it the model stops after its deepest wanted layer.  Raises
    :class:`~pkt_fast.errors.NumericsError` naming the layer whose rows are not finite.
    """
    anatomy = Anatomy.of(model)
    device = anatomy.head.weight.device
    deepest = max((layer for want in wanted for layer in want.layers), default=-1)
    order = longest_first(aligned.examples.lengths) if order is None else order
    with torch.inference_mode(), record(model, wanted, interface) as acts:
        for number, batch in enumerate(
            processing_batches(aligned.examples, order, batch_size, pad_token_id)
        ):
            mask, pick = position_mask(batch, aligned.positions)
            acts.positions = mask
            inputs = {**batch.to(device, non_blocking=True).model_inputs(), "use_cache": False}
            rows: dict[str, Tensor] = {}
            if with_head:
                with anatomy.bypass_head() as head_input:
                    anatomy.model(**inputs)
                hidden = head_input.hidden
                rows[HEAD] = hidden.flatten(0, -2)[acts.row_index(hidden)]
            else:
                anatomy.run_until(deepest, **inputs)
            rows |= {layer_column(key): value for key, value in acts.take().items()}
            if pick is not None:
                rows = {name: value[pick.to(device)] for name, value in rows.items()}
            for name, value in rows.items():
                check_finite(value, f"source activations for {name} in batch {number}")
            yield rows
            advance(batch.num_tokens)


def position_mask(
    batch: Batch, positions: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor | None]:
    """Mask (B, T) of the positions to keep, and how to repeat kept rows where one serves several;
    ``positions[i]`` are those of example i, counted from its first token, whatever the padding.
    """
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    picks: list[int] = []
    kept = 0
    for row, (example, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
        unique = sorted(set(positions[example]))
        mask[row, [start + position for position in unique]] = True
        place = {position: kept + i for i, position in enumerate(unique)}
        picks += [place[position] for position in positions[example]]
        kept += len(unique)
    identity = picks == list(range(kept))
    return mask, None if identity else torch.tensor(picks)


# --------------------------------------------------------------------------- target pass


def run_prefix(
    model: nn.Module,
    examples: Examples,
    first: int,
    store: ActivationStore,
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Advance = lambda tokens: None,
) -> None:
    """Run the blocks below ``first``; append the input of that block for all real tokens."""
    anatomy = Anatomy.of(model)
    device = anatomy.head.weight.device
    order = longest_first(examples.lengths)
    with torch.inference_mode():
        for batch in processing_batches(examples, order, batch_size, pad_token_id):
            real = batch.attention_mask.flatten().nonzero().squeeze(-1)
            stream = block_input(anatomy, first, batch.to(device, non_blocking=True))
            store.capture(INPUT, stream, real)
            advance(batch.num_tokens)


def block_input(anatomy: Anatomy, layer: int, batch: Batch) -> Tensor:
    """The input (B, T, D) of block ``layer`` (at least 1) for a batch; the block itself does not
    run.
    """
    caught: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(anatomy.block_input(args, kwargs))

    with anatomy.stop_after(layer - 1):
        # Registered after the hook that stops the pass and prepended, so it runs just before that.
        handle = anatomy.layers[layer].register_forward_pre_hook(
            hook, with_kwargs=True, prepend=True
        )
        try:
            anatomy.model(**batch.model_inputs(), use_cache=False)
        finally:
            handle.remove()
    return caught[0]
