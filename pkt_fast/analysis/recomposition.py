"""How much of an activation survives decomposition over a vocabulary basis (SemAlign, figure 2).

With unit basis vectors B (V, D), an activation's coefficients are B·h and its recomposition is
BᵀB·h.  Only the moment BᵀB (D, D) is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..heads import row_blocks
from ..semantics import LINEAR_RECOMPOSITIONS, SemanticBasis, SemanticMap, unit_rows_

BASES = ("output", "input", "random")


@torch.no_grad()
def basis_moment(model: nn.Module, basis: str, *, seed: int = 0) -> Tensor | None:
    """BᵀB (D, D), float64, of one of :data:`BASES`.

    ``output``: the semantic basis of the LM head.  ``input``: unit rows of the input embedding;
    None when it is not as wide as the residual stream.  ``random``: as many random unit vectors.
    """
    anatomy = Anatomy.of(model)
    if basis == "output":
        own = SemanticBasis.from_model(model)
        return SemanticMap.between(own, own, "frame").matrix.double().cpu()
    if basis == "random":
        generator = torch.Generator().manual_seed(seed)
        return _moment(_random_blocks(anatomy.vocab_size, anatomy.hidden_size, generator))
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.shape[1] != anatomy.hidden_size:
        return None
    # clone: unit_rows_ works in place, and the weight of a float64 model is not converted.
    return _moment(weight[rows].double().cpu().clone() for rows in row_blocks(len(weight)))


def recomposition_cosines(
    model: nn.Module, activations: Sequence[Tensor], *, seed: int = 0
) -> dict[str, list[float]]:
    """Mean cos(h, BᵀB·h) of every layer by basis; ``activations[layer]`` is (N, D)."""
    found = {}
    for basis in BASES:
        moment = basis_moment(model, basis, seed=seed)
        if moment is not None:
            found[basis] = [_mean_cosine(h, h.double() @ moment) for h in activations]
    return found


def round_trip(model: nn.Module, activations: Sequence[Tensor]) -> dict[str, list[float]]:
    """Mean cos(h, M·h) of every layer by recomposition, M the map of a model onto itself.

    1 means that nothing is lost; "dual" and "logit" reach it when the head has full rank.
    """
    basis = SemanticBasis.from_model(model)
    return {
        kind: predicted(SemanticMap.between(basis, basis, kind), activations, activations)
        for kind in LINEAR_RECOMPOSITIONS
    }


def predicted(
    mapping: SemanticMap, source: Sequence[Tensor], target: Sequence[Tensor]
) -> list[float]:
    """Mean cosine between the mapped source activations and the target's own, layer by layer."""
    cpu = mapping.to("cpu")
    return [_mean_cosine(t, cpu(s)) for s, t in zip(source, target, strict=True)]


def _mean_cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def _random_blocks(rows: int, width: int, generator: torch.Generator) -> Iterator[Tensor]:
    for block in row_blocks(rows):
        size = (block.stop - block.start, width)
        yield torch.randn(size, generator=generator, dtype=torch.float64)


def _moment(blocks: Iterable[Tensor]) -> Tensor:
    """Σ b·bᵀ over the unit rows b of all blocks (v, D)."""
    moment = torch.zeros(0)
    for block in blocks:
        rows = unit_rows_(block)
        moment = rows.T @ rows if moment.numel() == 0 else moment.addmm_(rows.T, rows)
    return moment
