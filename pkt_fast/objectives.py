"""What the steered target is trained on: layer objectives and output losses, in terms of rows.

Every term returns one loss per *unit* (a token row, or a sequence for the relation objective), so
that a step cut into micro-batches sums to exactly the whole step's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._random import seeded
from .anatomy import HeadTransform
from .chunked import chunked_rows
from .config import TransferConfig
from .errors import ConfigError
from .heads import row_blocks
from .losses import label_cosine_rows, statistics_of
from .ops import align_rows, linear_kl, relation, row_cosine
from .ops._gemm import add_product
from .phases import HEAD, layer_column
from .semantics import SemanticBasis
from .vocabulary import SharedVocabulary


@dataclass(frozen=True, eq=False)
class Rows:
    """The supervised rows of one micro-batch.

    Attributes:
        layers: the target's activations (N, D_tgt) by steered layer, with graph.
        head: the target's head input (N, D_tgt), with graph; None when no output loss needs it.
        labels: (N,) the token each row predicts.
        starts: (S + 1,) offsets of the sequences among the rows.
        supervision: stored rows by column name (aligned activations, the source's head input).
    """

    layers: Mapping[int, Tensor]
    head: Tensor | None
    labels: Tensor
    starts: Tensor
    supervision: Mapping[str, Tensor]


Term = Callable[[Rows], Tensor]
"""One loss a unit: (N,) for terms per row, (S,) for terms per sequence; differentiable."""


@dataclass(frozen=True)
class WeightedTerm:
    """One addend of the training loss: mean over units of ``term``, times ``weight``.

    ``parameters`` belong to the term alone (a learned projection); they train and are then dropped.
    """

    name: str
    weight: float
    term: Term
    per_sequence: bool = False
    parameters: Sequence[nn.Parameter] = ()


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """An LM head with what its model does to the logits, detached from the model's other weights.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        transform: what turns the head's output into logits.
    """

    weight: Tensor
    bias: Tensor | None
    transform: HeadTransform

    @classmethod
    def of(cls, head: nn.Module, transform: HeadTransform) -> FrozenHead:
        """Detach the head of an anatomy.

        Raises:
            ConfigError: what the model does to its logits is neither a scale nor a softcap.
        """
        if not transform.exact:
            raise ConfigError(
                "the model changes its logits in a way that is neither a scale nor a softcap; "
                "use output_loss='none'"
            )
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor)
        return cls(weight.detach(), None if bias is None else bias.detach(), transform)

    def select(self, rows: Tensor) -> FrozenHead:
        """The head restricted to the vocabulary rows (v,), in their order."""
        rows = rows.to(self.weight.device)
        bias = None if self.bias is None else self.bias[rows]
        return FrozenHead(self.weight[rows], bias, self.transform)

    def scaled(self, hidden: Tensor) -> Tensor:
        """The head's input (N, D) with the logit scale folded in; the bias has its own."""
        return hidden if self.transform.scale == 1.0 else hidden * self.transform.scale

    @property
    def scaled_bias(self) -> Tensor | None:
        """The bias (V,) with the logit scale folded in."""
        return None if self.bias is None else self.bias * self.transform.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (N, V), in float32 at least."""
        logits = self.transform(F.linear(hidden, self.weight, self.bias))
        return logits.to(_work(logits))


# --------------------------------------------------------------------------- layer objectives


def cosine_term(layer: int) -> Term:
    """1 − cos(h_k, h̃) per row (paper, L_layer)."""

    def term(rows: Rows) -> Tensor:
        return 1 - row_cosine(rows.layers[layer], rows.supervision[layer_column(layer)])

    return term


def squared_term(layer: int) -> Term:
    """‖h_k − h̃‖² / ‖h̃‖² per row: relative squared error, for aligned rows with a true scale."""

    def term(rows: Rows) -> Tensor:
        hidden = rows.layers[layer]
        target = rows.supervision[layer_column(layer)].to(_work(hidden))
        error = (hidden - target).square().sum(-1)
        return error / target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)

    return term


def relation_term(layer: int) -> Term:
    """1 − ⟨K₁,K₂⟩/(‖K₁‖‖K₂‖) per sequence, K centred token Gram matrices (SemAlign v2)."""

    def term(rows: Rows) -> Tensor:
        inner, norm_x, norm_y = relation(
            rows.layers[layer], rows.supervision[layer_column(layer)], rows.starts
        )
        scale = norm_x * norm_y
        # One-token sequences have no relations: both norms are 0 and so is their loss.
        known = scale > 0
        return torch.where(known, 1 - inner / torch.where(known, scale, 1.0), 0.0)

    return term


def fisher_term(layer: int, head: FrozenHead) -> Term:
    """½·dᵀ(diag(p) − ppᵀ)d per row, d = W(h_k − h̃), p = softmax(W·h̃) (SemAlign, ACL text).

    The Fisher information of the output distribution at the aligned logits weighs the logit error,
    so only differences that would move likely tokens count.
    """

    def term(rows: Rows) -> Tensor:
        # Some models keep their residual stream in float32 before a bfloat16 head.
        hidden = rows.layers[layer].to(head.weight.dtype)
        target = rows.supervision[layer_column(layer)].to(hidden.dtype)

        def surrogate(part: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                probabilities = torch.softmax(head.logits(target[at]), -1)
            difference = F.linear(part - target[at], head.weight).to(probabilities.dtype)
            mean = (probabilities * difference).sum(-1, keepdim=True)
            return (probabilities * (difference - mean).square()).sum(-1) / 2

        return chunked_rows(hidden, surrogate, len(head.weight))

    return term


LEARNED_OBJECTIVES = ("hidden_mse", "hidden_cosine")


def hidden_term(layer: int, projection: nn.Linear, kind: str) -> Term:
    """Distance of P·h_k (N, D_src) from the source's own h (hidden-state distillation).

    "hidden_mse" is the mean squared difference over channels, "hidden_cosine" is 1 − cosine.
    """

    def term(rows: Rows) -> Tensor:
        projected = projection(rows.layers[layer].to(projection.weight.dtype))
        wanted = rows.supervision[layer_column(layer)].to(projected.dtype)
        if kind == "hidden_cosine":
            return 1 - F.cosine_similarity(projected, wanted, dim=-1)
        return (projected - wanted).square().mean(-1)

    return term


def learned_projection(target_size: int, source_size: int, like: Tensor, seed: int) -> nn.Linear:
    """P (D_src, D_tgt) without bias, initialised from ``seed`` alone, on the device of ``like``."""
    with seeded(seed):
        projection = nn.Linear(target_size, source_size, bias=False, dtype=_work(like))
    return projection.to(like.device)


# --------------------------------------------------------------------------- output losses


def _head_rows(rows: Rows) -> Tensor:
    assert rows.head is not None
    return rows.head


def label_cosine_term(head: nn.Module, transform: HeadTransform, smoothing: float) -> Term:
    """1 − cos(z, onehot(y)) per row (paper, L_out); a constant logit scale cancels."""

    def term(rows: Rows) -> Tensor:
        softcap = transform.softcap / transform.scale if transform.softcap else 0.0
        return 1 - label_cosine_rows(
            _head_rows(rows), head, rows.labels, label_smoothing=smoothing, softcap=softcap
        )

    return term


def cross_entropy_term(head: FrozenHead, smoothing: float) -> Term:
    """Cross-entropy of the labels per row, in nats; logits a few rows at a time."""

    def term(rows: Rows) -> Tensor:
        def cross_entropy(part: Tensor, at: slice) -> Tensor:
            return F.cross_entropy(
                head.logits(part), rows.labels[at], reduction="none", label_smoothing=smoothing
            )

        return chunked_rows(_head_rows(rows), cross_entropy, len(head.weight))

    return term


def kl_term(target: FrozenHead, source: FrozenHead, temperature: float, kind: str) -> Term:
    """τ²·divergence of the source's and the target's output distributions per row, in nats.

    ``kind``: "forward" KL(source ‖ target), "reverse" KL(target ‖ source) or "jsd".  Row v of both
    heads is the same token.
    """

    def term(rows: Rows) -> Tensor:
        divergence = linear_kl(
            target.scaled(_head_rows(rows)),
            target.weight,
            source.scaled(rows.supervision[HEAD]),
            source.weight,
            target.scaled_bias,
            source.scaled_bias,
            target.transform.softcap,
            source.transform.softcap,
            temperature,
            kind,
        )
        return temperature**2 * divergence

    return term


def logit_cosine_term(target: FrozenHead, source: FrozenHead) -> Term:
    """1 − cos(z_tgt, z_src) per row, as h_tᵀ(W_tᵀW_s)h_s / (‖R_t h_t‖·‖R_s h_s‖).

    Raises:
        ConfigError: a head has a bias or a softcap.
    """
    if (
        target.transform.softcap
        or source.transform.softcap
        or target.bias is not None
        or source.bias is not None
    ):
        raise ConfigError(
            "output_loss='logit_cosine' needs heads without bias and softcap; use 'kl'"
        )
    cross = _streamed_product(target.weight, source.weight).to(_work(target.weight))
    root_t = SemanticBasis.from_weight(target.weight).factor.to(cross.dtype)
    root_s = SemanticBasis.from_weight(source.weight).factor.to(cross.dtype)

    def term(rows: Rows) -> Tensor:
        hidden = _head_rows(rows).to(cross.dtype)
        wanted = rows.supervision[HEAD].to(cross.dtype)
        inner = (hidden * align_rows(wanted, cross, False)).sum(-1)
        length_t = align_rows(hidden, root_t, False).norm(dim=-1)
        norms = length_t * align_rows(wanted, root_s, False).norm(dim=-1)
        return 1 - inner / norms.clamp_min(torch.finfo(cross.dtype).tiny)

    return term


def _streamed_product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right (D_l, D_r) in float64 for heads (V, D_l) and (V, D_r), streamed over V."""
    total = torch.zeros(
        left.shape[1], right.shape[1], dtype=torch.float64, device=left.device
    )
    for rows in row_blocks(len(left)):
        add_product(total, left[rows].double().T, right[rows].double())
    return total


def _work(tensor: Tensor) -> torch.dtype:
    """Dtype that losses are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------- composition


def needs_source_head(config: TransferConfig) -> bool:
    """Whether the output loss compares with the source's output distribution."""
    compares = config.output_loss in ("kl", "logit_cosine") and config.output_weight > 0
    return compares and config.solver == "adamw"


def needs_target_head(config: TransferConfig) -> bool:
    """Whether any term looks at the target's output, so that the blocks above must run."""
    return (config.output_loss != "none" and config.output_weight > 0) or config.label_weight > 0


def training_terms(
    config: TransferConfig,
    layers: Sequence[int],
    target_head: nn.Module,
    target_transform: HeadTransform,
    source: FrozenHead | None,
    vocabulary: SharedVocabulary | None,
    sizes: tuple[int, int] | None = None,
) -> list[WeightedTerm]:
    """The addends of the training loss that ``config`` names, for the steered ``layers``.

    ``sizes`` are D_tgt and D_src, the widths that the learned objectives map between.  Raises
    :class:`ConfigError` when the output loss cannot serve the models' heads.
    """
    terms: list[WeightedTerm] = []
    if config.objective != "none" and config.layer_weight > 0:
        weight = config.layer_weight / len(layers)
        for layer in layers:
            if config.objective in LEARNED_OBJECTIVES:
                assert sizes is not None
                terms.append(_learned_term(config, layer, target_head, sizes, weight))
                continue
            terms.append(
                WeightedTerm(
                    "layer_loss",
                    weight,
                    _layer_term(config.objective, layer, target_head, target_transform),
                    per_sequence=config.objective == "relation",
                )
            )
    if config.output_loss != "none" and config.output_weight > 0:
        term = _output_term(config, target_head, target_transform, source, vocabulary)
        terms.append(WeightedTerm("output_loss", config.output_weight, term))
    if config.label_weight > 0:
        head = FrozenHead.of(target_head, target_transform)
        term = cross_entropy_term(head, config.label_smoothing)
        terms.append(WeightedTerm("label_loss", config.label_weight, term))
    return terms


def _learned_term(
    config: TransferConfig, layer: int, head: nn.Module, sizes: tuple[int, int], weight: float
) -> WeightedTerm:
    like = head.weight
    assert isinstance(like, Tensor)
    projection = learned_projection(*sizes, like, config.seed + layer)
    term = hidden_term(layer, projection, config.objective)
    return WeightedTerm("layer_loss", weight, term, parameters=list(projection.parameters()))


def _layer_term(objective: str, layer: int, head: nn.Module, transform: HeadTransform) -> Term:
    if objective == "fisher":
        return fisher_term(layer, FrozenHead.of(head, transform))
    plain = {"cosine": cosine_term, "squared": squared_term, "relation": relation_term}
    return plain[objective](layer)


def _output_term(
    config: TransferConfig,
    head: nn.Module,
    transform: HeadTransform,
    source: FrozenHead | None,
    vocabulary: SharedVocabulary | None,
) -> Term:
    if config.output_loss == "label_cosine":
        if not (transform.softcap or any(p.requires_grad for p in head.parameters())):
            statistics_of(head)  # before the first step, so that it does not count as training time
        return label_cosine_term(head, transform, config.label_smoothing)
    target = FrozenHead.of(head, transform)
    if config.output_loss == "cross_entropy":
        return cross_entropy_term(target, config.label_smoothing)
    assert source is not None
    assert vocabulary is not None
    if not vocabulary.covers(len(source.weight), len(target.weight)):
        source, target = source.select(vocabulary.source), target.select(vocabulary.target)
    if config.output_loss == "kl":
        return kl_term(target, source, config.temperature, config.kl_kind)
    return logit_cosine_term(target, source)
