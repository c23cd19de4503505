"""One call for a pair of models: the papers' figures as numbers, tables and pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import atomic_directory, local, write_json
from ..anatomy import Anatomy
from ..data.encoding import encode
from ..delta import LayerDelta
from ..evaluation.evaluate import injected
from ..lending import evaluating, usual_defaults
from ..loading import pad_token_id
from ..pairing import source_for
from ..phases import AlignedPositions, processing_batches
from ..progress import Phases
from ..semantics import LINEAR_RECOMPOSITIONS, SemanticMap
from ..vocabulary import match_vocabularies
from .figures import draw_curves, draw_heatmaps
from .recomposition import predicted, recomposition_cosines, round_trip
from .similarity import cka_matrix, layer_activations

Curves = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Analysis:
    """How well source and target can be aligned, measured on the same tokens.

    Attributes:
        interface: where layers were read.
        positions: tokens measured on.
        recomposition: model → basis ("output", "input", "random") → mean cos(h, BᵀB·h) by layer.
        round_trip: model → recomposition → mean cos(h, M·h) by layer, M its map onto itself.
        prediction: recomposition → mean cosine between the target's own activation and the mapped
            one of its paired source layer, by target layer.
        cka: "rows × columns" → matrix of linear CKA between their layers.
    """

    interface: str
    positions: int
    recomposition: Mapping[str, Curves]
    round_trip: Mapping[str, Curves]
    prediction: Curves
    cka: Mapping[str, Sequence[Sequence[float]]]

    def as_dict(self) -> dict[str, Any]:
        """The fields with JSON types."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, str]:
        """Means over layers, by name."""
        rows = {"positions": f"{self.positions:,} ({self.interface})"}
        for title, models in (
            ("recomposition", self.recomposition),
            ("round trip", self.round_trip),
        ):
            for model, curves in models.items():
                rows[f"{title}, {model}"] = _means(curves)
        rows["target predicted by source"] = _means(self.prediction)
        return rows

    def markdown(self) -> str:
        """All curves and matrices as tables."""
        parts = [
            "# Alignment analysis\n",
            f"{self.positions:,} supervised positions, read at the interface `{self.interface}`.\n",
        ]
        for model, curves in self.recomposition.items():
            parts.append(_curve_table(f"Recomposition cosine, {model}", curves))
        for model, curves in self.round_trip.items():
            parts.append(_curve_table(f"Round trip, {model}", curves))
        parts.append(_curve_table("Target predicted by its paired source layer", self.prediction))
        parts += [_matrix_table(f"CKA, {name}", matrix) for name, matrix in self.cka.items()]
        return "\n".join(parts)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write analysis.json, analysis.md and, with matplotlib, three pictures; returns the paths.

        All of it appears or nothing does.  Raises :class:`~pkt_fast.errors.OutputError`.
        """
        with atomic_directory(directory, overwrite=overwrite) as temporary:
            write_json(temporary / "analysis.json", self.as_dict())
            (temporary / "analysis.md").write_text(self.markdown(), encoding="utf-8")
            if importlib.util.find_spec("matplotlib") is not None:
                self._draw(temporary)
            names = sorted(path.name for path in temporary.iterdir())
        return [local(directory) / name for name in names]

    def _draw(self, directory: Path) -> None:
        draw_curves(directory / "recomposition.png", self.recomposition, "cos(h, recomposed h)")
        trips = {f"{model} onto itself": curves for model, curves in self.round_trip.items()}
        draw_curves(
            directory / "round_trip.png", {**trips, "source to target": self.prediction}, "cosine"
        )
        draw_heatmaps(directory / "cka.png", self.cka)


@usual_defaults()
def analyze(
    source: nn.Module,
    target: nn.Module,
    data: Any,
    tokenizer: Any,
    *,
    delta: LayerDelta | None = None,
    interface: str = "mlp",
    batch_size: int = 16,
    max_length: int = 1024,
    max_positions: int = 4096,
    limit: int | None = None,
    seed: int = 0,
    phases: Phases | None = None,
) -> Analysis:
    """Measure a pair on ``data`` (anything :func:`pkt_fast.transfer` takes).

    ``tokenizer`` serves both models or is a pair (source's, target's); where the two cut text
    differently, the source is read at the last position that has read no more of the text.  With a
    ``delta`` of the target, CKA is measured after it as well.  ``max_positions`` bounds memory:
    positions · layers · width · 4 bytes for each model.

    Raises:
        PktFastError: models or data cannot be used.
    """
    own = tokenizer if isinstance(tokenizer, tuple | list) else (tokenizer, tokenizer)
    phases = phases or Phases(False)
    examples = encode(data, own[1], max_length=max_length, limit=limit)
    aligned = AlignedPositions.between(examples, *own)
    of_target_text = AlignedPositions.same(examples)

    def layers_of(model: nn.Module, name: str) -> list[Tensor]:
        read, pad = (aligned, own[0]) if model is source else (of_target_text, own[1])
        order = range(len(examples))
        with phases.phase(name, len(examples)) as update, evaluating(model):
            return layer_activations(
                model,
                processing_batches(read.examples, order, batch_size, pad_token_id(pad)),
                read.positions,
                interface=interface,
                max_rows=max_positions,
                advance=update,
            )

    of_source, of_target = layers_of(source, "source"), layers_of(target, "target")
    cka = {
        "source × target": cka_matrix(of_source, of_target),
        "target × target": cka_matrix(of_target, of_target),
    }
    if delta is not None:
        with injected(target, delta):
            after = layers_of(target, "target after")
        cka["source × target after"] = cka_matrix(of_source, after)
        cka["target × target after"] = cka_matrix(of_target, after)
    models = {"source": (source, of_source), "target": (target, of_target)}
    return Analysis(
        interface=interface,
        positions=len(of_source[0]),
        recomposition={
            name: recomposition_cosines(model, acts, seed=seed)
            for name, (model, acts) in models.items()
        },
        round_trip={name: round_trip(model, acts) for name, (model, acts) in models.items()},
        prediction=_prediction(source, target, own, of_source, of_target),
        cka=cka,
    )


def _prediction(
    source: nn.Module,
    target: nn.Module,
    tokenizers: Sequence[Any],
    of_source: Sequence[Tensor],
    of_target: Sequence[Tensor],
) -> dict[str, list[float]]:
    """Every target layer against the mapped, interpolated source layer it is paired with."""
    pairs = [source_for(len(of_source), len(of_target), layer) for layer in range(len(of_target))]
    paired = []
    for pair in pairs:
        first, second = of_source[pair.source[0]], of_source[pair.source[-1]]
        paired.append((1 - pair.weight) * first + pair.weight * second)
    sizes = Anatomy.of(source).vocab_size, Anatomy.of(target).vocab_size
    vocabulary = match_vocabularies(*sizes, *tokenizers)
    return {
        kind: predicted(
            SemanticMap.between(source, target, kind, vocabulary=vocabulary), paired, of_target
        )
        for kind in LINEAR_RECOMPOSITIONS
    }


def _means(curves: Curves) -> str:
    return ", ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in curves.items())


def _curve_table(title: str, curves: Curves) -> str:
    count = max(map(len, curves.values()))
    head = ["layer", *curves]
    rows = [[str(i), *(f"{values[i]:.4f}" for values in curves.values())] for i in range(count)]
    return f"## {title}\n\n{_table(head, rows)}"


def _matrix_table(title: str, matrix: Sequence[Sequence[float]]) -> str:
    head = ["layer", *map(str, range(len(matrix[0])))]
    rows = [[str(i), *(f"{value:.3f}" for value in row)] for i, row in enumerate(matrix)]
    return f"## {title}\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
