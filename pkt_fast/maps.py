"""The map of every layer pair from the source's latent space to the target's, and how good it is.

"frame", "dual" and "logit" are one :class:`~pkt_fast.SemanticMap` for all layers.  "softmax",
"top_k" and "threshold" bend its coefficients (:class:`CoefficientMap`).  "fitted" and "lens" are
fitted on data, one affine map a layer pair, from second moments of the two untuned models'
activations at the supervised positions.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .capture import Wanted
from .config import ALIGNED_OBJECTIVES, TransferConfig
from .errors import ConfigError, VocabularyError
from .fitting import Affine, PairedMoments, fit_procrustes, fit_ridge
from .lending import lent, usual_defaults
from .ops import align_rows, decompose
from .pairing import LayerPair
from .phases import HEAD, AlignedPositions, layer_column, longest_first, run_source
from .semantics import LINEAR_RECOMPOSITIONS, SemanticBasis, SemanticMap
from .stores import ActivationStore
from .vocabulary import SharedVocabulary

if TYPE_CHECKING:
    from .inputs import TransferInputs

COEFFICIENT_RECOMPOSITIONS: tuple[str, ...] = ("softmax", "top_k", "threshold")
FITTED_RECOMPOSITIONS: tuple[str, ...] = ("lens", "fitted")
HELD_OUT = 10
"""One example in so many judges the map and is kept out of its fit."""

_LISTED = 4


@dataclass(frozen=True, eq=False)
class CoefficientMap:
    """h̃ = S_tgtᵀ·f(S_src·h/‖h‖) with coefficients f that are not linear; V is streamed.

    Attributes:
        source_basis, target_basis: the shared vocabulary's unit vectors, (V, D_src) and (V, D_tgt).
        recompose: "softmax", "top_k" or "threshold".
        temperature: of softmax.
        k: coefficients kept by top_k.
        threshold: smallest |coefficient| kept by threshold.
    """

    source_basis: Tensor
    target_basis: Tensor
    recompose: str
    temperature: float = 0.1
    k: int = 256
    threshold: float = 0.05

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        src: nn.Module | SemanticBasis,
        tgt: nn.Module | SemanticBasis,
        recompose: str,
        vocabulary: SharedVocabulary,
        *,
        temperature: float = 0.1,
        k: int = 256,
        threshold: float = 0.05,
    ) -> CoefficientMap:
        """Take the basis vectors of the shared ``vocabulary`` from both models.

        Raises :class:`ConfigError` for another ``recompose`` or more coefficients than tokens, and
        :class:`VocabularyError` when no token is shared.
        """
        if recompose not in COEFFICIENT_RECOMPOSITIONS:
            raise ConfigError(
                f"recompose={recompose!r}: choose one of {', '.join(COEFFICIENT_RECOMPOSITIONS)}"
            )
        if len(vocabulary) == 0:
            raise VocabularyError("source and target share no vocabulary")
        if recompose == "top_k" and k > len(vocabulary):
            raise ConfigError(
                f"top_k={k}: source and target share {len(vocabulary)} tokens; keep fewer"
            )
        vectors = [
            _basis(model).vectors[rows]
            for model, rows in ((src, vocabulary.source), (tgt, vocabulary.target))
        ]
        return cls(vectors[0], vectors[1], recompose, temperature, k, threshold)

    def __call__(self, hidden: Tensor) -> Tensor:
        """h̃ for every row: (..., D_src) -> (..., D_tgt)."""
        rows = decompose(
            hidden.reshape(-1, hidden.shape[-1]),
            self.source_basis,
            self.target_basis,
            self.recompose,
            self.temperature,
            self.k,
            self.threshold,
        )
        return rows.reshape(*hidden.shape[:-1], rows.shape[-1])

    def to(self, device: torch.device | str) -> CoefficientMap:
        """The same map with its bases on ``device``."""
        return CoefficientMap(
            self.source_basis.to(device),
            self.target_basis.to(device),
            self.recompose,
            self.temperature,
            self.k,
            self.threshold,
        )


LatentMap = SemanticMap | CoefficientMap


def _basis(model: nn.Module | SemanticBasis) -> SemanticBasis:
    return model if isinstance(model, SemanticBasis) else SemanticBasis.from_model(model)


@dataclass(frozen=True, eq=False)
class UntunedRows:
    """What the source's change starts from, and what it is added to, row beside row.

    Attributes:
        base: h_source,base: rows of the source before its fine-tuning.
        own: h_target,0: rows of the untuned target.
    """

    base: ActivationStore
    own: ActivationStore

    def moved(self, mapping: LatentMap, column: str, rows: Tensor, at: int) -> Tensor:
        """h_target,0 + M·(rows − h_source,base) for source rows (n, D_src) from row ``at`` on.

        The difference is not normalised, whatever the map does; an affine map's offset cancels.
        """
        assert isinstance(mapping, SemanticMap)
        base, own = (
            store.columns[column].read(at, at + len(rows)).to(rows.device)
            for store in (self.base, self.own)
        )
        work = mapping.matrix.dtype
        return own.to(work) + align_rows(rows.to(work) - base.to(work), mapping.matrix, False)


def check_change(config: TransferConfig) -> None:
    """Raise :class:`ConfigError` when ``config`` has no use for the change of a source."""
    if config.objective not in ALIGNED_OBJECTIVES:
        raise ConfigError(
            f"source_base supervises layers, objective={config.objective!r} does not: choose "
            f"one of {', '.join(ALIGNED_OBJECTIVES)}"
        )
    if config.recompose in COEFFICIENT_RECOMPOSITIONS:
        raise ConfigError(
            f"source_base needs a linear map, recompose={config.recompose!r} is none: choose "
            f"one of {', '.join(LINEAR_RECOMPOSITIONS + FITTED_RECOMPOSITIONS)}"
        )


def map_digest(maps: Mapping[int, LatentMap]) -> dict[str, str]:
    """Identifies maps in a store's fingerprint: kind, settings and sums of the numbers."""

    def digest(mapping: LatentMap) -> str:
        if isinstance(mapping, SemanticMap):
            settings = f"{mapping.recompose}"
            tensors = [mapping.matrix] + ([] if mapping.offset is None else [mapping.offset])
        else:
            settings = f"{mapping.recompose}:{mapping.temperature}:{mapping.k}:{mapping.threshold}"
            tensors = [mapping.source_basis, mapping.target_basis]
        sums = [
            f"{float(t.sum(dtype=torch.float64)):.12e}:{float(t.norm(dtype=torch.float64)):.12e}"
            for t in tensors
        ]
        return ":".join([settings, *sums])

    return {str(layer): digest(mapping) for layer, mapping in sorted(maps.items())}


# --------------------------------------------------------------------------- paired rows


@dataclass(frozen=True, eq=False)
class PairedModels:
    """The two untuned models, and how to see the same tokens in both.

    Attributes:
        source, target: on one device.
        source_examples, target_examples: the supervised positions of each model's own tokens.
        pairs: the layer pairs.
        interface: where layers are read.
        batch_size: examples a forward pass.
        pad_token_ids: source's and target's.
        vocabulary: head rows both models share.
    """

    source: nn.Module
    target: nn.Module
    source_examples: AlignedPositions
    target_examples: AlignedPositions
    pairs: Sequence[LayerPair]
    interface: str
    batch_size: int
    pad_token_ids: tuple[int, int]
    vocabulary: SharedVocabulary

    @property
    def device(self) -> torch.device:
        """Where the models and what is fitted on them live."""
        return Anatomy.of(self.target).head.weight.device

    def num_tokens(self, examples: Sequence[int]) -> int:
        """Tokens both models see when they run over ``examples``."""
        return sum(
            side.examples.lengths[i]
            for side in (self.source_examples, self.target_examples)
            for i in examples
        )

    def rows(
        self, examples: Sequence[int], with_head: bool, advance: Callable[[int], None]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Source and target rows of the same tokens, batch by batch, by column name."""
        lengths = self.target_examples.examples.lengths
        order = [examples[i] for i in longest_first([lengths[i] for i in examples])]
        wanted = (
            [Wanted.of_pair(pair) for pair in self.pairs],
            [Wanted(pair.target, (pair.target,)) for pair in self.pairs],
        )
        models = (self.source, self.target)
        sides = (self.source_examples, self.target_examples)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            # Exhausted one after the other, so that hooks and inference mode of the first are gone.
            (source,), (target,) = (
                list(
                    run_source(
                        models[i],
                        sides[i],
                        wanted[i],
                        self.interface,
                        batch_size=len(chunk),
                        pad_token_id=self.pad_token_ids[i],
                        with_head=with_head,
                        advance=advance,
                        order=chunk,
                    )
                )
                for i in range(2)
            )
            yield source, target


def split_examples(count: int, limit: int, seed: int) -> tuple[list[int], list[int]]:
    """(examples to fit on, examples held out): up to ``limit`` of ``count``, one in ten held out.

    Drawn by ``seed``.  A single example is fitted on, and nothing is held out.
    """
    chosen = random.Random(seed).sample(range(count), min(count, limit))
    held_out = 0 if len(chosen) < 2 else max(1, len(chosen) // HELD_OUT)
    return sorted(chosen[held_out:]), sorted(chosen[:held_out])


# --------------------------------------------------------------------------- building


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """A map for every pair, and the same recomposition from the target into itself.

    Attributes:
        maps: target layer → map of source rows.
        round_trips: target layer → map of target rows; without one where there is no such thing.
    """

    maps: dict[int, LatentMap]
    round_trips: dict[int, LatentMap] = field(default_factory=dict)


@torch.no_grad()
def build_maps(
    models: PairedModels,
    config: TransferConfig,
    fit_on: Sequence[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> LayerMaps:
    """The maps that ``config.recompose`` names; fitted ones see the examples ``fit_on``.

    ``advance`` is called with the tokens that were passed.  Raises
    :class:`~pkt_fast.errors.NumericsError` when rows are not finite or a fit has no solution.
    """
    if config.recompose == "fitted":
        return _fitted(models, config, fit_on, advance)
    if config.recompose == "lens":
        return _lenses(models, config, fit_on, advance)
    source, target = _basis(models.source), _basis(models.target)
    mapping: LatentMap
    round_trip: LatentMap
    if config.recompose in LINEAR_RECOMPOSITIONS:
        mapping, round_trip = SemanticMap.with_round_trip(
            source, target, config.recompose, models.vocabulary
        )
    else:
        own = models.vocabulary.target
        mapping = _coefficient_map(source, target, models.vocabulary, config)
        round_trip = _coefficient_map(target, target, SharedVocabulary(own, own), config)
    layers = [pair.target for pair in models.pairs]
    return LayerMaps(
        dict.fromkeys(layers, mapping.to(models.device)),
        dict.fromkeys(layers, round_trip.to(models.device)),
    )


def _coefficient_map(
    source: SemanticBasis, target: SemanticBasis, shared: SharedVocabulary, config: TransferConfig
) -> CoefficientMap:
    return CoefficientMap.between(
        source,
        target,
        config.recompose,
        shared,
        temperature=config.coefficient_temperature,
        k=config.top_k,
        threshold=config.threshold,
    )


def _fitted(
    models: PairedModels,
    config: TransferConfig,
    fit_on: Sequence[int],
    advance: Callable[[int], None],
) -> LayerMaps:
    """h̃ = M·h + c, fitted between the activations of the same tokens."""
    widths = Anatomy.of(models.source).hidden_size, Anatomy.of(models.target).hidden_size
    moments = {pair.target: PairedMoments(*widths, models.device) for pair in models.pairs}
    for source, target in models.rows(fit_on, False, advance):
        for layer, seen in moments.items():
            seen.add(source[layer_column(layer)], target[layer_column(layer)])

    def fit(seen: PairedMoments) -> Affine:
        if config.fit == "procrustes":
            return fit_procrustes(seen)
        return fit_ridge(seen, config.fit_ridge)

    return LayerMaps(
        {layer: _semantic(models, fit(seen), "fitted") for layer, seen in moments.items()}
    )


def _lenses(
    models: PairedModels,
    config: TransferConfig,
    fit_on: Sequence[int],
    advance: Callable[[int], None],
) -> LayerMaps:
    """h̃ = lens_tgt⁺(M_dual·lens_src(h)): across at the head's input, where the basis belongs.

    A lens predicts its model's head input from a layer's activation.
    """
    widths = Anatomy.of(models.source).hidden_size, Anatomy.of(models.target).hidden_size
    layers = [pair.target for pair in models.pairs]
    moments = [
        {layer: PairedMoments(width, width, models.device) for layer in layers} for width in widths
    ]
    for sides in models.rows(fit_on, True, advance):
        for rows, of_model in zip(sides, moments, strict=True):
            for layer, seen in of_model.items():
                seen.add(rows[layer_column(layer)], rows[HEAD])
    dual = SemanticMap.between(
        models.source, models.target, "dual", vocabulary=models.vocabulary
    ).matrix.double()
    across = Affine(dual.to(models.device), torch.zeros_like(moments[1][layers[0]].mean_y))
    maps, round_trips = {}, {}
    for layer in layers:
        source_lens = fit_ridge(moments[0][layer], config.fit_ridge)
        target_lens = fit_ridge(moments[1][layer], config.fit_ridge)
        back = target_lens.inverse(config.fit_ridge, moments[1][layer].mean_x)
        maps[layer] = _semantic(models, back.after(across.after(source_lens)), "lens")
        round_trips[layer] = _semantic(models, back.after(target_lens), "lens")
    return LayerMaps(maps, round_trips)


def _semantic(models: PairedModels, affine: Affine, recompose: str) -> LatentMap:
    weight = Anatomy.of(models.target).head.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return SemanticMap(
        affine.matrix.to(dtype),
        recompose,
        len(models.vocabulary),
        offset=affine.offset.to(dtype),
    )


# --------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Alignment:
    """How well one layer pair's map predicts the target's own activations on held-out tokens.

    Attributes:
        target: target layer.
        source: the source layers it is paired with.
        rows: held-out token rows; 0 when no example could be held out, and then no figures.
        cosine: mean cosine between h̃ and the target's own activation.
        chance: the same against the activation of an unrelated token: what a map reaches that
            knows no more than the layer's mean direction.
        r2: share of the target's variance that h̃ explains, at most 1; None for maps whose output
            has no scale ("frame" and the nonlinear ones).
        round_trip: mean cosine between the target's activation and its own recomposition, target
            into target; None for a fitted map, which has no such inverse.
    """

    target: int
    source: tuple[int, ...]
    rows: int
    cosine: float | None = None
    chance: float | None = None
    r2: float | None = None
    round_trip: float | None = None

    def __str__(self) -> str:
        if self.cosine is None or self.chance is None:
            return f"layer {self.target}: nothing held out"
        parts = [f"cosine {self.cosine:.3f} (chance {self.chance:.3f})"]
        parts += [] if self.r2 is None else [f"R² {self.r2:.3f}"]
        parts += [] if self.round_trip is None else [f"round trip {self.round_trip:.3f}"]
        return f"layer {self.target}: {', '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """With JSON types."""
        return {**asdict(self), "source": list(self.source)}


def summarize(alignments: Sequence[Alignment]) -> str:
    """One line for a table: every layer when they are few, the range when they are many."""
    judged = [alignment.cosine for alignment in alignments if alignment.cosine is not None]
    if len(alignments) <= _LISTED or not judged:
        return "; ".join(map(str, alignments))
    explained = [alignment.r2 for alignment in alignments if alignment.r2 is not None]
    line = f"{len(judged)} layers: cosine {min(judged):.3f} to {max(judged):.3f}"
    return line + (f", R² {min(explained):.3f} to {max(explained):.3f}" if explained else "")


class _Score:
    """Running sums of one layer's held-out figures."""

    def __init__(self) -> None:
        self.rows = 0
        self.cosine = self.chance = self.round_trip = self.error = 0.0
        self.spread: PairedMoments | None = None

    def add(self, predicted: Tensor, own: Tensor, round_trip: Tensor | None) -> None:
        predicted, own = predicted.double(), own.double()
        self.rows += len(own)
        self.cosine += _cosines(predicted, own)
        self.chance += _cosines(predicted, own.roll(len(own) // 2, 0))
        self.error += float((predicted - own).square().sum())
        if self.spread is None:
            self.spread = PairedMoments(1, own.shape[1], own.device)
        self.spread.add(own[:, :1], own)
        if round_trip is not None:
            self.round_trip += _cosines(round_trip.double(), own)

    def alignment(self, pair: LayerPair, scaled: bool, round_trip: bool) -> Alignment:
        if self.spread is None:
            return Alignment(pair.target, pair.source, 0)
        variance = float(self.spread.yy)
        return Alignment(
            pair.target,
            pair.source,
            self.rows,
            cosine=self.cosine / self.rows,
            chance=self.chance / self.rows,
            r2=1 - self.error / variance if scaled and variance > 0 else None,
            round_trip=self.round_trip / self.rows if round_trip else None,
        )


def _cosines(x: Tensor, y: Tensor) -> float:
    return float(nn.functional.cosine_similarity(x, y, dim=-1).sum())


@torch.no_grad()
def judge_maps(
    models: PairedModels,
    built: LayerMaps,
    held_out: Sequence[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Alignment]:
    """Compare every map's prediction with the target's own activations on ``held_out`` examples.

    One :class:`Alignment` a pair, in the order of ``models.pairs``.
    """
    scores = {pair.target: _Score() for pair in models.pairs}
    for source, target in models.rows(held_out, False, advance):
        for layer, score in scores.items():
            own = target[layer_column(layer)]
            back = built.round_trips.get(layer)
            predicted = built.maps[layer](source[layer_column(layer)])
            score.add(predicted, own, None if back is None else back(own))
    scaled = {
        layer: isinstance(mapping, SemanticMap) and not mapping.normalize
        for layer, mapping in built.maps.items()
    }
    return [
        scores[pair.target].alignment(pair, scaled[pair.target], pair.target in built.round_trips)
        for pair in models.pairs
    ]


# --------------------------------------------------------------------------- of a transfer


def map_layers(
    inputs: TransferInputs, pairs: Sequence[LayerPair]
) -> tuple[dict[int, LatentMap], list[Alignment]]:
    """A map for every target layer of ``pairs``, and how well each predicts the target.

    Paper, "semantic basis" and "decompose and recompose".  Where progress is shown, so is one line
    of the latter, before any training.  Both are empty for objectives that align nothing.
    """
    config, phases = inputs.config, inputs.phases
    if config.objective not in ALIGNED_OBJECTIVES:
        return {}, []
    fit_on, held_out = split_examples(len(inputs.examples), config.fit_examples, config.seed)
    if config.recompose not in FITTED_RECOMPOSITIONS:
        fit_on = []
    with inputs.visiting(inputs.untuned_source, inputs.target):
        models = PairedModels(
            inputs.untuned_source,
            inputs.target,
            inputs.aligned,
            AlignedPositions.same(inputs.examples),
            pairs,
            config.interface,
            config.micro_batch_size,
            inputs.pad_token_ids,
            inputs.vocabulary,
        )
        with phases.phase("semantic map", models.num_tokens(fit_on)) as update:
            built = build_maps(models, config, fit_on, update)
        with phases.phase("judge map", models.num_tokens(held_out)) as update:
            alignment = judge_maps(models, built, held_out, update)
    phases.say(f"alignment: {summarize(alignment)}")
    return built.maps, alignment


@usual_defaults()
def diagnose(
    src: nn.Module | str | os.PathLike[str],
    tgt: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    tokenizer: Any = None,
    source_base: nn.Module | str | os.PathLike[str] | None = None,
    config: TransferConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    preset: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Alignment]:
    """Whether alignment is meaningful for a pair, before paying for training.

    Arguments are those of :func:`pkt_fast.transfer`.  Attributes and pairs layers, builds the maps,
    and returns one :class:`Alignment` a paired target layer.  No weight changes.

    Raises:
        ConfigError: the objective aligns nothing.
        PktFastError: every refusal of a transfer before its training.
    """
    from .critical import attributed_pairs  # they build on this module
    from .inputs import TransferInputs
    from .transfer import computing_as

    settings = TransferConfig.make(config, preset, **overrides)
    if settings.objective not in ALIGNED_OBJECTIVES:
        raise ConfigError(
            f"objective={settings.objective!r} aligns nothing that could be judged: choose one of "
            + ", ".join(ALIGNED_OBJECTIVES)
        )
    with computing_as(settings), lent(src, tgt, source_base, kept=None):
        inputs = TransferInputs.load(
            src, tgt, data, tokenizer, settings, progress=progress, source_base=source_base
        )
        inputs.source.to(inputs.device)
        _, pairs = attributed_pairs(inputs)
        return map_layers(inputs, pairs)[1]
