"""The bundled demo: two small language models with one tokenizer, and the rows to transfer on.

The *source* was trained longer and on every kind of problem, the *target* on a few kinds; both by
``scripts/train_demo_pair.py``, from different seeds.  The rows are generated, not stored: a
question belongs to exactly one split, chosen by a checksum of its own text, so that no question
the models were trained on, and no question of the transfer rows, is ever asked in an evaluation.

Importing this package needs neither torch nor transformers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol

from pkt_fast.demo.other import OTHER
from pkt_fast.demo.problems import ONE_STEP, SPECIALTY, TWO_STEP, Example, final_answer
from pkt_fast.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "SPLITS",
    "Example",
    "bundled_examples",
    "bundled_rows",
    "examples",
    "final_answer",
    "load_pair",
    "source_path",
    "target_path",
]

_MODELS = Path(__file__).parent / "models"


class ExampleKind(Protocol):
    """Anything that draws examples."""

    @property
    def name(self) -> str:
        """What its problems are counted under."""

    def example(self, rng: Random) -> Example:
        """Draw one example."""


PROBLEMS: tuple[ExampleKind, ...] = (*ONE_STEP, *TWO_STEP)

# share of all questions, in tenths, that belongs to each bucket; models are trained on "pretrain"
_BUCKETS = ("pretrain",) * 7 + ("train", "validation", "test")

# name of a bundled split: (kinds, bucket, number of rows)
SPLITS: dict[str, tuple[Sequence[ExampleKind], str, int]] = {
    "train": (PROBLEMS, "train", 1000),
    "validation": (PROBLEMS, "validation", 200),
    "test": (PROBLEMS, "test", 200),
    "specialty": (SPECIALTY, "train", 1000),
    "specialty_validation": (SPECIALTY, "validation", 200),
    "specialty_test": (SPECIALTY, "test", 200),
    "other": (OTHER, "test", 200),
}


def bucket(question: str) -> str:
    """Return which of pretrain, train, validation and test a question belongs to."""
    return _BUCKETS[zlib.crc32(question.encode()) % len(_BUCKETS)]


def examples(kinds: Sequence[ExampleKind], bucket_name: str, seed: int) -> Iterator[Example]:
    """Yield examples of one bucket without end, kinds in turn."""
    rng = Random(seed)
    while True:
        for kind in kinds:
            example = kind.example(rng)
            while bucket(example.question) != bucket_name:
                example = kind.example(rng)
            yield example


def bundled_examples(split: str = "train") -> list[Example]:
    """Return the examples of a split in :data:`SPLITS`, no question twice, always the same.

    Raises :class:`~pkt_fast.errors.ConfigError` for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"bundled split {split!r} does not exist: choose from {', '.join(SPLITS)}"
        )
    kinds, bucket_name, count = SPLITS[split]
    seen: set[str] = set()

    def unseen() -> Iterator[Example]:
        for example in examples(kinds, bucket_name, seed=zlib.crc32(split.encode())):
            if example.question not in seen:
                seen.add(example.question)
                yield example

    return list(islice(unseen(), count))


def bundled_rows(split: str = "train") -> list[dict[str, list[dict[str, str]]]]:
    """Return the chat rows ``{"messages": [user, assistant]}`` of a split in :data:`SPLITS`."""
    return [example.row() for example in bundled_examples(split)]


def source_path() -> Path:
    """Return the directory of the bundled source model."""
    return _MODELS / "source"


def target_path() -> Path:
    """Return the directory of the bundled target model."""
    return _MODELS / "target"


def load_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load source, target and their common tokenizer in float32, without any network access."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        for path in (source_path(), target_path())
    )
    tokenizer = AutoTokenizer.from_pretrained(target_path(), local_files_only=True)
    return source, target, tokenizer
