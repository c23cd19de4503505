"""Examples to padded batches, ready for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from ..errors import DataError
from .bucketing import batch_indices
from .examples import IGNORE_INDEX, Example, ExampleSet


def moved(
    tensor: torch.Tensor, device: torch.device | str, non_blocking: bool = False
) -> torch.Tensor:
    """``tensor`` on ``device``.

    With ``non_blocking`` a copy from host memory to a GPU does not wait: it goes through pinned
    memory, because from any other the driver copies while the caller stands.
    """
    on_gpu = torch.device(device).type == "cuda"
    if non_blocking and on_gpu and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded examples, ready for a model.

    Attributes:
        input_ids, attention_mask, labels, position_ids: (B, T) int64.  Padding has mask 0, label
            -100 and position 0; real tokens count positions from 0 on either padding side.
        rows: indices of the examples in their ExampleSet.
        padding_side: "right" or "left".
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    rows: tuple[int, ...]
    padding_side: str = "right"

    @cached_property
    def targets(self) -> torch.Tensor:
        """(B, T): what each position has to predict, ``labels`` one to the left; last column -100.

        Left-padded rows start with padding whose target is the first real label, which no model
        can predict from padding: it is -100 there.
        """
        targets = torch.full_like(self.labels, IGNORE_INDEX)
        targets[:, :-1] = self.labels[:, 1:]
        return targets.masked_fill_(self.attention_mask == 0, IGNORE_INDEX)

    @cached_property
    def supervised(self) -> torch.Tensor:
        """(B, T) bool: positions whose next token carries loss."""
        return self.targets != IGNORE_INDEX

    @cached_property
    def starts(self) -> list[int]:
        """Column of every row's first real token: all 0 under right padding."""
        starts: list[int] = self.attention_mask.argmax(1).tolist()
        return starts

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward.

        ``position_ids`` is among them only under left padding: with right padding every model
        counts the same positions by itself, and some families refuse the argument.
        """
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.padding_side == "left":
            inputs["position_ids"] = self.position_ids
        return inputs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on ``device``; see :func:`moved` for non_blocking."""
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        tensors: dict[str, Any] = {
            name: moved(getattr(self, name), device, non_blocking) for name in names
        }
        return replace(self, **tensors)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def as_batch(value: Batch | Mapping[str, torch.Tensor]) -> Batch:
    """A batch from a mapping of ``input_ids`` and ``labels``, (B, T) int64, and, where rows are
    padded on either side, ``attention_mask``; a batch stays as it is.

    Labels stand at their own tokens, as Transformers has them.  Raises
    :class:`~pkt_fast.errors.DataError` for anything else.
    """
    if isinstance(value, Batch):
        return value
    if not isinstance(value, Mapping):
        raise DataError(
            f"a batch is a {type(value).__name__}: give pkt_fast.data.Batch objects, or mappings "
            "of input_ids, labels and attention_mask"
        )
    ids, labels = (_matrix(value, name) for name in ("input_ids", "labels"))
    mask = torch.ones_like(ids)
    if value.get("attention_mask") is not None:
        mask = _matrix(value, "attention_mask")
    if not ids.shape == labels.shape == mask.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (ids, labels, mask))
        raise DataError(
            f"a batch's input_ids, labels and attention_mask must have one shape, not {shapes}"
        )
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels.masked_fill(mask == 0, IGNORE_INDEX),
        position_ids=(mask.cumsum(1) - 1) * mask,
        rows=tuple(range(len(ids))),
        padding_side="right" if bool(mask[:, :1].all()) else "left",
    )


def _matrix(value: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    tensor = value.get(name)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise DataError(f"a batch needs {name}, a (B, T) tensor of integers; here it is {found}")
    return tensor.long()


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Pad ``examples[i] for i in indices`` to a common length T.

    Returns:
        A batch of (B, T) tensors, T the longest length rounded up to ``pad_to_multiple_of``.
    """
    chosen = [examples[i] for i in indices]
    longest = max(map(len, chosen))
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(chosen), width)
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(chosen):
        n = len(example)
        real = slice(0, n) if padding_side == "right" else slice(width - n, width)
        ids[row, real] = example.input_ids
        labels[row, real] = example.labels
        mask[row, real] = 1
        positions[row, real] = np.arange(n)
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        rows=tuple(indices),
        padding_side=padding_side,
    )


def batches(
    examples: ExampleSet,
    batch_size: int,
    *,
    pad_token_id: int,
    seed: int | None = None,
    epoch: int = 0,
    bucket: bool = True,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> Iterator[Batch]:
    """Yield all examples as padded batches in the order of :func:`batch_indices`."""
    for indices in batch_indices(
        examples.lengths, batch_size, seed=seed, epoch=epoch, bucket=bucket
    ):
        yield collate(
            examples,
            indices,
            pad_token_id=pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )


def padding_fraction(batches: Iterable[Batch]) -> float:
    """Share of all positions that are padding; 0.0 for no batches."""
    real = total = 0
    for batch in batches:
        real += batch.num_tokens
        total += batch.input_ids.numel()
    return 1.0 - real / total if total else 0.0
