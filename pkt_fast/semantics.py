"""Semantic basis of a model, and the map between two models' latent spaces (paper, "semantic
basis" and "decompose and recompose").

The paper decomposes a source activation over V basis vectors and recomposes it over V others.  Both
steps are linear, so their product M = S_tgtᵀ·S_src (D_tgt, D_src) is built once by streaming the
vocabulary, and aligning N tokens is one matrix product.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._files import atomic_file, local
from .anatomy import Anatomy
from .errors import ConfigError, DataError, NumericsError, VocabularyError
from .heads import better_conditioned, gram_root, row_blocks, streamed_gram
from .lending import usual_defaults
from .ops import align_rows
from .ops._gemm import add_product, product, serves
from .vocabulary import SharedVocabulary, match_vocabularies

Recompose = Literal["frame", "dual", "logit"]
_VECTOR_ROWS = 1024
"""Rows of vectors worked out in float64 at a time."""

_INVERSE_ROWS = 128
"""Rows of G⁻¹ scaled in float64 at a time."""

_FLOAT32_CONDITION = 2.0**-12
"""λ_min/λ_max of G above which float32 products W·G⁻¹ are right to 1e-5: cond(W) below 64."""

_SMALLEST_NORM = 1e-12
"""Rows this much shorter than the average one are worked out in float64: their squares vanish."""

LINEAR_RECOMPOSITIONS: tuple[str, ...] = ("frame", "dual", "logit")


def unit_rows_(x: Tensor) -> Tensor:
    """Scale the rows of x to unit length in place; a zero row stays zero."""
    return x.div_(x.norm(dim=-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny))


@dataclass(frozen=True, eq=False)
class SemanticBasis:
    """The unit rows of (W⁺)ᵀ for an LM head W, held as W and the D×D matrices that turn it into
    them.

    Attributes:
        weight: W (V, D), the head itself (not copied).
        gram: G = WᵀW (D, D), float64.
        factor: R (D, D), float64, with RᵀR = G.
        inverse: G⁺ (D, D), float64.
        rank: numerical rank of W; below D for a singular head.
    """

    weight: Tensor
    gram: Tensor
    factor: Tensor
    inverse: Tensor
    rank: int

    @classmethod
    def from_model(cls, model: nn.Module) -> SemanticBasis:
        """The basis of ``model``'s LM head; a head bias does not enter (the paper's basis is
        W⁺).
        """
        return cls.from_weight(Anatomy.of(model).head.weight)

    @classmethod
    @usual_defaults()
    @torch.no_grad()
    def from_weight(cls, weight: Tensor) -> SemanticBasis:
        """The basis of an LM head weight (V, D).  Raises :class:`NumericsError` if it is not
        finite.
        """
        weight = weight.detach()
        gram = streamed_gram(weight)
        if not torch.isfinite(gram.diagonal()).all():  # a column with NaN or inf shows there
            raise NumericsError("the LM head holds NaN or inf: check the checkpoint")
        root = gram_root(gram)
        return cls(weight, gram, root.factor, root.inverse, root.rank)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of results: float64 for a float64 head, float32 otherwise."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @cached_property
    def vectors(self) -> Tensor:
        """S (V, D): one unit vector per vocabulary label; the only attribute of the head's size."""
        vectors = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        if not self._float32_suffices:
            for rows in row_blocks(len(vectors), _VECTOR_ROWS):
                vectors[rows] = self.unit_vectors(self.weight[rows])
            return vectors
        # Unit rows do not depend on the scale of G⁻¹: chosen so that an average row is near 1.
        length = self.gram.diagonal().sum().div(len(vectors)).sqrt()
        scale = self.inverse.diagonal().mean() * length
        inverse = torch.empty_like(self.inverse, dtype=self.dtype)
        for rows in row_blocks(len(inverse), _INVERSE_ROWS):  # no float64 temporary of its size
            inverse[rows] = self.inverse[rows] / scale
        for rows in row_blocks(len(vectors)):
            head_rows, block = self.weight[rows], vectors[rows]
            if serves(head_rows, inverse):
                product(head_rows, inverse, out=block)
            else:
                torch.mm(head_rows.to(self.dtype), inverse, out=block)
            norms = block.norm(dim=1, keepdim=True)
            short = (norms < _SMALLEST_NORM)[:, 0]
            block.div_(norms)
            if short.any():
                block[short] = self.unit_vectors(head_rows[short]).to(self.dtype)
        return vectors

    @property
    def _float32_suffices(self) -> bool:
        return (
            self.dtype == torch.float32
            and self.rank == len(self.gram)
            and better_conditioned(self.gram, self.inverse, _FLOAT32_CONDITION)
        )

    def unit_vectors(self, head_rows: Tensor) -> Tensor:
        """Rows of S, in float64, for rows (v, D) of the head."""
        if serves(head_rows, self.inverse):
            return unit_rows_(product(head_rows, self.inverse))
        return unit_rows_(head_rows.to(torch.float64) @ self.inverse)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis, its vectors included, to one safetensors file."""
        tensors = {
            "weight": self.weight,
            "gram": self.gram,
            "factor": self.factor,
            "inverse": self.inverse,
            "vectors": self.vectors,
        }
        with atomic_file(path) as temporary:
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                temporary,
                metadata={"format": "pt", "pkt_fast": "semantic_basis", "rank": str(self.rank)},
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SemanticBasis:
        """Read a basis written by :meth:`save`.  Raises :class:`DataError` for any other file."""
        file = local(path)
        if not file.is_file():
            raise DataError(f"no semantic basis at {path}: the file does not exist")
        try:
            tensors = load_file(file)
            basis = cls(
                weight=tensors["weight"],
                gram=tensors["gram"],
                factor=tensors["factor"],
                inverse=tensors["inverse"],
                rank=int(torch.linalg.matrix_rank(tensors["factor"])),
            )
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{path} is not a semantic basis: {error}") from error
        basis.__dict__["vectors"] = tensors["vectors"]
        return basis


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """A linear map M from the source's latent space to the target's; called, it maps rows.

    Attributes:
        matrix: M (D_tgt, D_src).
        recompose: how the target's activation is put together (see :meth:`between`).
        shared: how many vocabulary rows the two heads share.
        normalize: whether h is divided by its norm first, as the paper's coefficients are cosines.
        offset: constant added to M·h (D_tgt,), for maps fitted on data; None for the linear three.
    """

    matrix: Tensor
    recompose: str
    shared: int = 0
    normalize: bool = False
    offset: Tensor | None = None

    @classmethod
    @usual_defaults()
    @torch.no_grad()
    def between(
        cls,
        src: nn.Module | SemanticBasis,
        tgt: nn.Module | SemanticBasis,
        recompose: Recompose | str = "frame",
        *,
        vocabulary: SharedVocabulary | None = None,
        source_tokenizer: Any | None = None,
        target_tokenizer: Any | None = None,
    ) -> SemanticMap:
        """Build M by streaming the shared vocabulary once.

        ``frame``: M = S_tgtᵀ·S_src, the paper's recomposition; h is normalised.
        ``dual``: M = (S_tgtᵀS_tgt)⁺·S_tgtᵀ·S_src, least squares on the coefficients; the identity
        when source and target are one model.
        ``logit``: M = (W_tgtᵀW_tgt)⁺·W_tgtᵀ·W_src, least squares on the logits.

        Heads of different length need ``vocabulary`` or both tokenizers.  Raises
        :class:`ConfigError` for another ``recompose`` and :class:`VocabularyError` when too little
        is shared.
        """
        source = src if isinstance(src, SemanticBasis) else SemanticBasis.from_model(src)
        target = tgt if isinstance(tgt, SemanticBasis) else SemanticBasis.from_model(tgt)
        vocabulary = vocabulary or match_vocabularies(
            len(source.weight), len(target.weight), source_tokenizer, target_tokenizer
        )
        return _moments(source, target, vocabulary, recompose, own=recompose != "frame").map()

    @classmethod
    @torch.no_grad()
    def with_round_trip(
        cls,
        source: SemanticBasis,
        target: SemanticBasis,
        recompose: Recompose | str,
        vocabulary: SharedVocabulary,
    ) -> tuple[SemanticMap, SemanticMap]:
        """The map :meth:`between` two bases, and the target's onto itself over the same tokens.

        Both come from one pass over the vocabulary.
        """
        moments = _moments(source, target, vocabulary, recompose, own=True)
        return moments.map(), moments.round_trip()

    def __call__(self, hidden: Tensor) -> Tensor:
        """h̃ for every row: (..., D_src) -> (..., D_tgt); accumulated in float32 at least."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        aligned = align_rows(rows, self.matrix, self.normalize)
        if self.offset is not None:
            aligned = aligned + self.offset
        return aligned.reshape(*hidden.shape[:-1], self.matrix.shape[0])

    def to(self, device: torch.device | str) -> SemanticMap:
        """The same map with its matrix on ``device``."""
        offset = None if self.offset is None else self.offset.to(device)
        return SemanticMap(
            self.matrix.to(device), self.recompose, self.shared, self.normalize, offset
        )


@dataclass(frozen=True, eq=False)
class _Moments:
    """Σ_v t_v·s_vᵀ (D_tgt, D_src) and Σ_v t_v·t_vᵀ (D_tgt, D_tgt) over the shared rows, float64.

    The rows are basis vectors, or the heads' own for "logit".  ``own`` may be left out for "frame".
    """

    recompose: str
    shared: int
    dtype: torch.dtype
    cross: Tensor
    own: Tensor | None

    def map(self) -> SemanticMap:
        return self._map(self.cross)

    def round_trip(self) -> SemanticMap:
        assert self.own is not None
        return self._map(self.own)

    def _map(self, cross: Tensor) -> SemanticMap:
        frame = self.recompose == "frame"
        matrix = cross if frame else self._inverse @ cross
        return SemanticMap(matrix.to(self.dtype), self.recompose, self.shared, normalize=frame)

    @cached_property
    def _inverse(self) -> Tensor:
        assert self.own is not None
        return gram_root(self.own).inverse


def _moments(
    source: SemanticBasis,
    target: SemanticBasis,
    vocabulary: SharedVocabulary,
    recompose: str,
    own: bool,
) -> _Moments:
    """Stream the shared vocabulary once.  Raises as :meth:`SemanticMap.between`."""
    if recompose not in LINEAR_RECOMPOSITIONS:
        raise ConfigError(
            f"recompose={recompose!r}: choose one of {', '.join(LINEAR_RECOMPOSITIONS)}"
        )
    if len(vocabulary) == 0:
        raise VocabularyError("source and target share no vocabulary")
    device = target.weight.device
    cross = torch.zeros(
        target.weight.shape[1], source.weight.shape[1], dtype=torch.float64, device=device
    )
    second = torch.zeros_like(target.gram) if own else None
    for target_rows, source_rows in _shared_rows(source, target, vocabulary):
        if recompose == "logit":
            t, s = target_rows.to(torch.float64), source_rows.to(torch.float64)
        else:
            t, s = target.unit_vectors(target_rows), source.unit_vectors(source_rows)
        add_product(cross, t.T, s.to(device))
        if second is not None and recompose != "logit":
            add_product(second, t.T, t)
    if own and recompose == "logit":
        full = len(vocabulary) == len(target.weight)
        second = target.gram if full else streamed_gram(target.weight[vocabulary.target.to(device)])
    return _Moments(recompose, len(vocabulary), target.dtype, cross, second)


def _shared_rows(
    source: SemanticBasis, target: SemanticBasis, vocabulary: SharedVocabulary
) -> Iterator[tuple[Tensor, Tensor]]:
    whole = vocabulary.covers(len(source.weight), len(target.weight))
    for rows in row_blocks(len(vocabulary)):
        if whole:
            yield target.weight[rows], source.weight[rows]
        else:
            yield (
                target.weight[vocabulary.target[rows].to(target.weight.device)],
                source.weight[vocabulary.source[rows].to(source.weight.device)],
            )
