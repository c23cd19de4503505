"""What a transfer starts from: models, tokenizers and data, loaded and checked to fit together."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy
from .config import ALIGNED_OBJECTIVES, TransferConfig
from .data.encoding import encode
from .data.examples import ExampleSet
from .data.reading import read_rows
from .data.rows import check_rows
from .errors import ConfigError, ModelError
from .loading import (
    check_dtype,
    check_token_ids,
    load_model,
    load_tokenizers,
    pad_token_id,
    resolve_device,
    resolve_dtype,
)
from .maps import check_change
from .phases import AlignedPositions, StorePlace
from .progress import Phases
from .report import Clock
from .vocabulary import SharedVocabulary, match_vocabularies, same_tokenization
from .writing import answer_rows, write_rows


@dataclass(eq=False)
class TransferInputs:
    """Everything a transfer reads.

    Attributes:
        config: the settings it goes by.
        phases: times its phases and shows their progress.
        device: where it computes.
        source, target: the models, in evaluation mode.
        tokenizers: source's and target's.
        examples: the rows in the target's tokens.
        aligned: the rows in the source's tokens, and which position answers which of the target's.
        vocabulary: head rows that mean the same token in both models.
        owns_source: whether the source was loaded for this transfer, which may let go of it.
        source_base: the source before its fine-tuning, if that was given.
    """

    config: TransferConfig
    phases: Phases
    device: torch.device
    source: nn.Module
    target: nn.Module
    tokenizers: tuple[Any, Any]
    examples: ExampleSet
    aligned: AlignedPositions
    vocabulary: SharedVocabulary
    owns_source: bool
    source_base: nn.Module | None = None

    @classmethod
    def load(
        cls,
        src: Any,
        tgt: Any,
        data: Any,
        tokenizer: Any,
        config: TransferConfig,
        *,
        progress: bool,
        source_base: Any = None,
    ) -> TransferInputs:
        """Load everything and check that it fits together, before any work is done.

        Arguments are those of :func:`pkt_fast.transfer`, and so are the errors.
        """
        if source_base is not None:
            check_change(config)
        device = resolve_device(config.device)
        phases = Phases(progress, Clock(device))
        with phases.phase("read data", 1):
            tokenizers = load_tokenizers(
                tokenizer, src, tgt, trust_remote_code=config.trust_remote_code
            )
            given = _read(data, tokenizers, config)
        with phases.phase("load", 1):
            source, target, base = _load_models(src, tgt, source_base, config, device)
        vocabulary = match_vocabularies(
            Anatomy.of(source).vocab_size, Anatomy.of(target).vocab_size, *tokenizers
        )
        _check_layers(config, Anatomy.of(target))
        if isinstance(given, ExampleSet):
            examples = given
        else:
            rows = _with_written(given, source.to(device), tokenizers[0], config, phases)
            examples = _encoded(rows, tokenizers, config)
        aligned = AlignedPositions.between(examples, *tokenizers)
        examples.drop_text()  # only the alignment asks for it
        check_token_ids(source, aligned.examples, "source")
        check_token_ids(target, examples, "target")
        return cls(
            config,
            phases,
            device,
            source,
            target,
            tokenizers,
            examples,
            aligned,
            vocabulary,
            owns_source=not isinstance(src, nn.Module),
            source_base=base,
        )

    @property
    def untuned_source(self) -> nn.Module:
        """The source as maps are fitted to it: before its fine-tuning, where that is known."""
        return self.source if self.source_base is None else self.source_base

    @property
    def pad_token_ids(self) -> tuple[int, int]:
        """Padding for the source's and the target's batches."""
        return pad_token_id(self.tokenizers[0]), pad_token_id(self.tokenizers[1])

    @property
    def store_place(self) -> StorePlace:
        """Where the rows of the frozen passes are kept."""
        return StorePlace.of(self.config.store, self.config.store_budget_gb, self.device)

    @contextlib.contextmanager
    def visiting(self, *models: nn.Module) -> Iterator[None]:
        """Have ``models`` on the device for the block, then where they were before.

        The source makes room for them and comes back, unless it is one of them.
        """
        homes = [next(model.parameters()).device for model in models]
        away = not any(model is self.source for model in models)
        if away:
            self.source.to("cpu")
        for model in models:
            model.to(self.device)
        try:
            yield
        finally:
            for model, home in zip(models, homes, strict=True):
                model.to(home)
            if away:
                self.source.to(self.device)

    def release_source(self) -> None:
        """Let go of a source that was loaded here; move a borrowed one off the GPU."""
        self.source_base = None
        if self.owns_source:
            self.source = nn.Module()
            gc.collect()
        if self.device.type == "cuda":
            self.source.to("cpu")
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------- rows


def _encoded(
    data: Any, tokenizers: tuple[Any, Any], config: TransferConfig, limit: int | None = None
) -> ExampleSet:
    """``data`` in the target's tokens, with its text only where the source cuts that otherwise."""
    alike = same_tokenization(*tokenizers)
    return encode(
        data, tokenizers[1], max_length=config.max_length, limit=limit, keep_text=not alike
    )


def _read(
    data: Any, tokenizers: tuple[Any, Any], config: TransferConfig
) -> ExampleSet | list[dict[str, Any]]:
    """Tokenised examples, or, where the source is to write something, the rows it adds to.

    Bad data is found here, before a model is loaded.
    """
    if config.labels != "source" and config.min_rows == 0:
        return _encoded(data, tokenizers, config, limit=config.limit)
    rows, origin = read_rows(data, limit=config.limit)
    if config.labels == "given":
        check_rows(rows, origin)
    return rows


def _with_written(
    rows: Sequence[Mapping[str, Any]],
    source: nn.Module,
    tokenizer: Any,
    config: TransferConfig,
    phases: Phases,
) -> list[dict[str, Any]]:
    """The rows with the replies, and followed by the rows, that the source is to write."""
    known = [dict(row) for row in rows]
    at_once = 4 * config.micro_batch_size  # no graph is kept
    if config.labels == "source":
        with phases.phase("source replies", len(known)) as update:
            known = answer_rows(
                source, known, tokenizer,
                max_new_tokens=config.max_new_tokens, batch_size=at_once, advance=update,
            )  # fmt: skip
    missing = config.min_rows - len(known)
    if missing > 0:
        with phases.phase("source rows", missing) as update:
            known += write_rows(
                source, known, tokenizer, missing,
                max_new_tokens=config.max_new_tokens, batch_size=at_once,
                seed=config.seed, advance=update,
            )  # fmt: skip
    return known


# --------------------------------------------------------------------------- models


def _load_models(
    src: Any, tgt: Any, source_base: Any, config: TransferConfig, device: torch.device
) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Source, target and source_base, in evaluation mode."""
    given = {"source": src, "target": tgt}
    if source_base is not None:
        given["source_base"] = source_base
    dtype = resolve_dtype(config.dtype, device)
    models = {
        role: load_model(
            model, role=role, dtype=dtype, trust_remote_code=config.trust_remote_code
        ).eval()
        for role, model in given.items()
    }
    if source_base is not None:
        _check_base(Anatomy.of(models["source_base"]), Anatomy.of(models["source"]))
    for role, model in models.items():
        check_dtype(model, config.dtype, role)
    _check_unadapted(models["target"])
    _check_widths(config, {role: Anatomy.of(model) for role, model in models.items()})
    return models["source"], models["target"], models.get("source_base")


def _check_unadapted(target: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in target.modules()):
        raise ModelError(
            "the target carries a PEFT adapter, and the new one would stand on it: merge it "
            "(merge_and_unload), take it off (unload), or load the target anew"
        )


def _check_widths(config: TransferConfig, anatomies: Mapping[str, Anatomy]) -> None:
    """Refuse what gives layers the vocabulary's coordinates in a model whose head is of another
    width than they, behind a projection.
    """
    mapped = config.objective in ALIGNED_OBJECTIVES and config.recompose != "fitted"
    for role, anatomy in anatomies.items():
        width = anatomy.head.weight.shape[1]
        weighs = config.objective == "fisher" and role == "target"
        if (mapped or weighs) and width != anatomy.hidden_size:
            raise ModelError(
                f"the {role}'s head reads {width} numbers a token, its layers give "
                f"{anatomy.hidden_size}: the vocabulary has no coordinates in these layers; use "
                "recompose='fitted' with objective='cosine', or a method that aligns nothing"
            )


def _check_base(base: Anatomy, source: Anatomy) -> None:
    if (base.num_layers, base.hidden_size) != (source.num_layers, source.hidden_size):
        raise ModelError(
            f"source_base has {base.num_layers} layers of width {base.hidden_size}, the source has "
            f"{source.num_layers} of {source.hidden_size}: give the source before its fine-tuning"
        )


def _check_layers(config: TransferConfig, target: Anatomy) -> None:
    if isinstance(config.layers, tuple):
        wrong = [layer for layer in config.layers if layer >= target.num_layers]
        if wrong:
            raise ConfigError(
                f"layers={list(config.layers)}: target layer {wrong[0]} is out of range; the "
                f"target has layers 0 to {target.num_layers - 1}"
            )
    if config.num_layers > target.num_layers:
        raise ConfigError(
            f"num_layers={config.num_layers}: the target has {target.num_layers} layers"
        )
