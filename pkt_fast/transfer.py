"""SemAlign from end to end, in the order of the paper's method section.

Each step is one call in :func:`_transfer`, and each equation has one home::

    attribute  Σ g⊙a, gradient × activation of a layer          attribution.attribute
               the layers with the highest scores               critical.attributed_pairs
    pair       ℓ(k) = max(1, ⌊L_src·k/L_tgt⌋), k†, λ            pairing
    map        S: the rows of (W⁺)ᵀ, scaled to unit length      semantics.SemanticBasis
               h̃ = S_tgtᵀ·S_src·h/‖h‖                           semantics.SemanticMap
               other maps, and how well they predict            maps
    capture    h = (1−λ)·h_a + λ·h_b, mapped and stored         supervision.source_rows
    steer      L_layer = 1 − mean cos(h_k, h̃)                   objectives.cosine_term
               L_out = 1 − mean cos(z, onehot(y))               objectives.label_cosine_term
               their sum, and the other objectives              objectives.training_terms
               LoRA on the paired layers alone                  stages.steer, steering.train
    delta      ΔW = (α/r)·B·A                                   delta.LayerDelta
    report     what happened                                    report.transfer_report
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import atomic_directory, check_output_dir, local, write_json
from .anatomy import Anatomy
from .config import TransferConfig
from .critical import SeenRows, attributed_pairs
from .delta import LayerDelta
from .errors import NumericsError, OutputError
from .inputs import TransferInputs
from .lending import differentiable, lent
from .loading import resolve_device
from .maps import map_layers
from .objectives import FrozenHead, needs_source_head
from .ops import backend
from .ops._registry import Calls, counted_calls
from .ops.linear import own_products
from .page import write_html
from .pairing import LayerPair
from .report import transfer_report
from .stages import check_adaptable, make_delta_maker, steer
from .steering import Record
from .supervision import source_rows


@dataclass
class TransferResult:
    """What a transfer made.

    Attributes:
        model: the target with the adapter attached (a PEFT model), ready to generate.
        tokenizer: the target's tokenizer.
        delta: the adapter as a :class:`~pkt_fast.LayerDelta`.
        pairs: the layer pairs, 0-based.
        attribution: (L_src,) scores, or None when layers were given.
        history: one record a step: step, epoch, learning_rate and every loss.
        report: settings, data, timings by phase, memory, versions, and which implementation of
            every op ran (``ops``) and how often (``op_calls``).
    """

    model: nn.Module
    tokenizer: Any
    delta: LayerDelta
    pairs: list[LayerPair]
    attribution: Tensor | None
    history: list[Record]
    report: dict[str, Any]

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the PEFT adapter, report.json and report.html; all of it appears or nothing
        does.
        """
        with atomic_directory(directory, overwrite=overwrite) as temporary:
            self.delta.write_into(temporary)
            write_json(temporary / "report.json", {**self.report, "history": self.history})
            write_html(temporary / "report.html", self.report, self.history)
        return local(directory)


def transfer(
    src: nn.Module | str | os.PathLike[str],
    tgt: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    tokenizer: Any = None,
    source_base: nn.Module | str | os.PathLike[str] | None = None,
    config: TransferConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    preset: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> TransferResult:
    """Move knowledge from ``src`` into ``tgt``: SemAlign (arXiv 2510.24208), by default as
    published.

    Args:
        src: source model, a hub id or a path.
        tgt: target model, a hub id or a path.  A model given as an object is wrapped in place: its
            LoRA sits in ``result.model``, on the device that trained it; its own weights do not
            change, and after an error it is as it was.  It must not carry an adapter already.
        data: JSONL path, list of rows, or datasets.Dataset; rows are {"messages"}, {"prompt",
            "completion"} or {"text"}.  None takes a small bundled set.
        tokenizer: one for both models, or a pair (source, target); None loads them from the models'
            paths.
        source_base: the source before its fine-tuning, a model, a hub id or a path.  With it the
            target's layers are supervised by their own activation plus the mapped *change* that
            fine-tuning made in the source.
        config: settings as a :class:`TransferConfig`, a mapping or a JSON file.
        preset: named settings to start from ("paper" is the default).
        output_dir: where to write the PEFT adapter, report.json and report.html.
        progress: show progress bars when stderr is a terminal.
        **overrides: single fields of :class:`TransferConfig`.

    Transfers may run in threads, each on models of its own; the random state and
    :func:`pkt_fast.backend` are the process's, so only transfers that run alone repeat themselves.

    Raises:
        PktFastError: every refusal, with one line that says what is wrong and what to do.
    """
    settings = TransferConfig.make(config, preset, **overrides)
    if output_dir is not None:
        _check_apart(settings.store, check_output_dir(output_dir, settings.overwrite))
    with (
        computing_as(settings),
        lent(src, source_base, kept=tgt),
        differentiable(),
        counted_calls() as calls,
    ):
        inputs = TransferInputs.load(
            src, tgt, data, tokenizer, settings, progress=progress, source_base=source_base
        )
        result = _transfer(inputs, calls)
    if output_dir is not None:
        result.save(output_dir, overwrite=settings.overwrite)
    return result


def _check_apart(store: str, output: Path) -> None:
    """Refuse a store inside the output directory, which has to be empty, or pkt_fast's results
    alone, when these are written.
    """
    if store != "memory" and local(store).resolve().is_relative_to(output.resolve()):
        raise OutputError(
            f"store {store} lies in the output directory {output}: choose a place outside it"
        )


@contextlib.contextmanager
def computing_as(config: TransferConfig) -> Iterator[None]:
    """Inside, ops run on the backend that ``config`` names, and models multiply with what is
    fastest.

    Compiled blocks multiply as torch.compile has it.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    with backend(config.backend), own_products(on_cpu and not config.compile):
        yield


def _check_finite(delta: LayerDelta) -> None:
    """Refuse what the last update spoilt: losses are checked before an update, not after."""
    for path, change in delta.changes.items():
        if not (torch.isfinite(change.down).all() and torch.isfinite(change.up).all()):
            raise NumericsError(
                f"training left NaN or inf in the adapter of {path}: lower learning_rate, set "
                "max_grad_norm, or use dtype='float32'"
            )


def _transfer(inputs: TransferInputs, calls: Calls) -> TransferResult:
    """The steps of the method, one after the other."""
    inputs.source.to(inputs.device)
    seen = SeenRows.wanted_by(inputs)
    scores, pairs = attributed_pairs(inputs, seen)
    check_adaptable(inputs, pairs)
    maps, alignment = map_layers(inputs, pairs)
    supervision = source_rows(inputs, pairs, maps, seen)
    source_head = _source_head(inputs)
    maker = make_delta_maker(inputs, pairs)
    inputs.release_source()
    inputs.target.to(inputs.device)
    model, history = steer(inputs, maker, supervision, source_head)
    delta = LayerDelta.from_peft(model)
    _check_finite(delta)
    return TransferResult(
        model=model,
        tokenizer=inputs.tokenizers[1],
        delta=delta,
        pairs=pairs,
        attribution=scores,
        history=history,
        report=transfer_report(
            inputs.config,
            inputs.device,
            inputs.phases.clock,
            pairs=pairs,
            scores=scores,
            examples=inputs.examples,
            alignment=alignment,
            shared_tokens=len(inputs.vocabulary),
            history=history,
            trained_parameters=delta.num_parameters,
            store_bytes=0 if supervision is None else supervision.num_bytes,
            delta=maker.report(),
            calls=calls,
        ),
    )


def _source_head(inputs: TransferInputs) -> FrozenHead | None:
    """The source's head, kept where the output loss compares with its logits."""
    if not needs_source_head(inputs.config):
        return None
    anatomy = Anatomy.of(inputs.source)
    return FrozenHead.of(anatomy.head, anatomy.head_transform())
