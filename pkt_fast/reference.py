"""SemAlign in plain PyTorch, as the paper writes it: everything materialised, nothing clever.

This module is the yardstick.  Every fast path of the package is tested against it, so it may be
slow and it may need memory for N x V tensors, but each function must be readable beside the
equation it implements (arXiv 2510.24208; section numbers refer to that paper).  It works in
whatever dtype it is given; the tests run it in float64.

Shapes: N token rows, D hidden size, V vocabulary labels, T tokens of one sequence, r LoRA rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import Anatomy, Tap
from .config import TransferConfig
from .data.batches import Batch
from .pairing import LayerPair

IGNORE_INDEX = -100

# --------------------------------------------------------------------------- semantic basis


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to unit length; a zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))


def semantic_basis(weight: Tensor) -> Tensor:
    """S (V, D): the pseudoinverse of the LM head, one unit vector per vocabulary label.

    ``weight`` (V, D) is the LM head.  Row i of (W⁺)ᵀ is the latent vector whose logits best
    approximate the one-hot of label i.  A label whose row of W is zero (padding) has the zero
    vector; the SVD would leave rounding noise there, which normalising would blow up.
    """
    vectors = torch.linalg.pinv(weight).T
    return unit_rows(vectors * (weight != 0).any(1, keepdim=True))


def coefficients(hidden: Tensor, basis: Tensor) -> Tensor:
    """The paper's a = S·h / ‖h‖ (N, V): the cosine of every row of ``hidden`` (N, D) with every
    basis vector.
    """
    return unit_rows(hidden) @ basis.T


def recompose(coefs: Tensor, basis: Tensor) -> Tensor:
    """h̃ = S_tgtᵀ·a (N, D_tgt): the coefficients (N, V) spent on the target's basis vectors."""
    return coefs @ basis


def align_frame(hidden: Tensor, source_head: Tensor, target_head: Tensor) -> Tensor:
    """The paper's supervisory activation: decompose in the source, recompose in the target."""
    return recompose(coefficients(hidden, semantic_basis(source_head)), semantic_basis(target_head))


def align_dual(hidden: Tensor, source_head: Tensor, target_head: Tensor) -> Tensor:
    """The h̃ (N, D_tgt) that minimises ‖S_tgt·h̃ − S_src·h‖: recomposition with the dual frame.

    Unlike the frame itself, this is an exact round trip when source and target are one model.
    """
    coefs = hidden @ semantic_basis(source_head).T
    return coefs @ torch.linalg.pinv(semantic_basis(target_head)).T


def align_logit(hidden: Tensor, source_head: Tensor, target_head: Tensor) -> Tensor:
    """The h̃ (N, D_tgt) that minimises ‖W_tgt·h̃ − W_src·h‖: match the logits in least squares."""
    logits = hidden @ source_head.T
    return logits @ torch.linalg.pinv(target_head).T


def decompose_nonlinear(
    hidden: Tensor,
    source_basis: Tensor,
    target_basis: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    k: int = 0,
    threshold: float = 0.0,
) -> Tensor:
    """Recomposition from coefficients that are not linear in ``hidden`` (N, D_src) -> (N, D_tgt).

    With a = S_src·h/‖h‖ the coefficients become ``softmax``: softmax(a / temperature); ``top_k``:
    the k of largest magnitude kept (ties at the k-th magnitude all kept), others 0; ``threshold``:
    those with |a| >= threshold kept, others 0.
    """
    coefs = coefficients(hidden, source_basis)
    if kind == "softmax":
        coefs = torch.softmax(coefs / temperature, dim=-1)
    elif kind == "top_k":
        kth = coefs.abs().topk(k, dim=-1).values[:, -1:]
        coefs = coefs * (coefs.abs() >= kth)
    elif kind == "threshold":
        coefs = coefs * (coefs.abs() >= threshold)
    else:
        raise ValueError(f"unknown kind {kind!r}")
    return recompose(coefs, target_basis)


# --------------------------------------------------------------------------- attribution


def gradient_times_activation(gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g·a and Σ |g·a| over tokens and channels, per example: (B, T, D) twice -> (B,), (B,)."""
    product = (gradient * activation).flatten(1)
    return product.sum(1), product.abs().sum(1)


# --------------------------------------------------------------------------- capture


def gather_rows(
    value: Tensor,
    index: Tensor,
    *,
    minus: Tensor | None = None,
    other: Tensor | None = None,
    other_minus: Tensor | None = None,
    lam: float = 0.0,
    scale: float = 1.0,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows ``index`` (N,) of scale·((1−λ)(value−minus) + λ(other−other_minus)), each (R, D) -> (N,
    D).
    """

    def difference(x: Tensor, y: Tensor | None) -> Tensor:
        return x if y is None else x - y

    rows = difference(value, minus)
    if other is not None:
        rows = (1 - lam) * rows + lam * difference(other, other_minus)
    rows = scale * rows[index]
    if normalize:
        rows = unit_rows(rows)
    return rows.to(dtype or value.dtype)


# --------------------------------------------------------------------------- pairing


def pair(num_source: int, num_target: int, critical: int) -> tuple[int, int, int, float]:
    """(k†, a, b, λ), all 1-based as in the paper, for a critical source layer ℓ*."""
    depths = range(1, num_target + 1)
    reached = [k for k in depths if single_source(num_source, num_target, k) >= critical]
    k = min(reached) if reached else num_target
    u = num_source * k / num_target
    a = max(1, min(math.floor(u), num_source - 1))
    return k, a, a + 1, min(max(u - a, 0.0), 1.0)


def single_source(num_source: int, num_target: int, k: int) -> int:
    """ℓ(k), the one source layer of target layer k (v2), both 1-based."""
    return max(1, math.floor(num_source * k / num_target))


# --------------------------------------------------------------------------- losses


def row_cosine(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_n, y_n) for every row of (N, D); 0 where either row is zero."""
    return (unit_rows(x) * unit_rows(y)).sum(-1)


def layer_cosine(hidden: Tensor, target: Tensor) -> Tensor:
    """L_layer = 1 − mean over supervised rows of cos(h_k, h̃)."""
    return 1 - row_cosine(hidden, target).mean()


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """Logits z = W·h + b (N, V), softcapped to c·tanh(z/c) when ``softcap`` c > 0 (Gemma 2)."""
    logits = F.linear(hidden, weight, bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def label_cosine_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """cos(z, t) per row, t = (1−ε)·onehot(y) + ε/V; 0 for rows whose label is −100.

    hidden (N, D), weight (V, D), labels (N,) -> (N,).
    """
    logits = head_logits(hidden, weight, bias, softcap)
    return label_cosines(logits, labels.clamp_min(0), label_smoothing) * (labels != IGNORE_INDEX)


def label_cosines(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """cos(z, t) per row of (N, V), t = (1−ε)·onehot(y) + ε/V."""
    target = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[-1]
    return row_cosine(logits, target)


def label_cosine(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
    """L_out = 1 − mean over supervised rows of cos(z, onehot(y))."""
    cosines = label_cosine_rows(hidden, weight, labels, **options)  # type: ignore[arg-type]
    return 1 - cosines.sum() / (labels != IGNORE_INDEX).sum()


def logit_cosine_rows(
    target_hidden: Tensor, target_head: Tensor, source_hidden: Tensor, source_head: Tensor
) -> Tensor:
    """cos(z_tgt, z_src) per row, both logit vectors over the shared vocabulary."""
    return row_cosine(target_hidden @ target_head.T, source_hidden @ source_head.T)


def linear_kl(
    target_hidden: Tensor,
    target_head: Tensor,
    source_hidden: Tensor,
    source_head: Tensor,
    *,
    target_bias: Tensor | None = None,
    source_bias: Tensor | None = None,
    target_softcap: float = 0.0,
    source_softcap: float = 0.0,
    temperature: float = 1.0,
    kind: str = "forward",
) -> Tensor:
    """Divergence between the two output distributions per row: (N, D_t), (N, D_s) -> (N,).

    p = softmax(z_src/τ), q = softmax(z_tgt/τ), over the V rows both heads share.  ``forward``:
    KL(p‖q); ``reverse``: KL(q‖p); ``jsd``: ½KL(p‖m) + ½KL(q‖m), m = (p+q)/2.  No τ² factor.
    """
    ours = head_logits(target_hidden, target_head, target_bias, target_softcap)
    theirs = head_logits(source_hidden, source_head, source_bias, source_softcap)
    return divergence(theirs / temperature, ours / temperature, kind)


def divergence(source_logits: Tensor, target_logits: Tensor, kind: str) -> Tensor:
    """Divergence of p = softmax(z_src) and q = softmax(z_tgt) per row of (N, V), as in
    :func:`linear_kl`.
    """
    log_p, log_q = source_logits.log_softmax(-1), target_logits.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    raise ValueError(f"unknown kind {kind!r}")


def centred_gram(x: Tensor) -> Tensor:
    """K = (H X)(H X)ᵀ with H = I − 11ᵀ/T: the centred token-token relations of (T, D)."""
    centred = x - x.mean(0, keepdim=True)
    return centred @ centred.T


def relation_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨K_x, K_y⟩, ‖K_x‖, ‖K_y‖ (Frobenius) of two (T, D) sets of token vectors."""
    kx, ky = centred_gram(x), centred_gram(y)
    return (kx * ky).sum(), kx.norm(), ky.norm()


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA: ⟨K_x, K_y⟩ / (‖K_x‖·‖K_y‖)."""
    inner, norm_x, norm_y = relation_terms(x, y)
    return inner / (norm_x * norm_y)


def relation_losses(hidden: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    """1 − CKA of every sequence of ``counts`` rows of two (N, D) -> (S,); 0 where there is one row,
    which has no relations.
    """
    sequences = zip(hidden.split(list(counts)), target.split(list(counts)), strict=True)
    return torch.stack([1 - cka(x, y) if len(x) > 1 else 0 * x.sum() for x, y in sequences])


def squared_error(hidden: Tensor, target: Tensor) -> Tensor:
    """‖h_k − h̃‖² / ‖h̃‖² per row."""
    return (hidden - target).square().sum(-1) / target.square().sum(-1)


def fisher(hidden: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """½·dᵀ(diag(p) − ppᵀ)d per row, d = W(h_k − h̃), p = softmax(W·h̃)."""
    p = torch.softmax(target @ head.T, dim=-1)
    d = (hidden - target) @ head.T
    return ((p * d.square()).sum(-1) - (p * d).sum(-1).square()) / 2


# --------------------------------------------------------------------------- injection


def inject(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, *, transposed: bool = False
) -> Tensor:
    """W + s·B·A, accumulated in float32 (float64 for float64) and rounded once to W's dtype.

    weight (out, in), lora_a (r, in), lora_b (out, r); ``transposed``: weight is (in, out), as
    Conv1D stores it.
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = scale * (lora_b.to(work) @ lora_a.to(work))
    return (weight.to(work) + (delta.T if transposed else delta)).to(weight.dtype)


# --------------------------------------------------------------------------- the whole method


def interpolate(layers: Sequence[Tensor], lam: float) -> Tensor:
    """(1−λ)·h_a + λ·h_b for a pair of source layers; the layer itself when there is one."""
    return layers[0] if len(layers) == 1 else (1 - lam) * layers[0] + lam * layers[1]


def read_layers(
    model: nn.Module, taps: Mapping[int, Tap], inputs: Mapping[str, Tensor]
) -> tuple[dict[int, Tensor], Tensor]:
    """Run the whole model; return the tapped activations (B, T, D) and the logits (B, T, V)."""
    values: dict[int, Tensor] = {}
    stack = contextlib.ExitStack()
    for layer, tap in taps.items():

        def hook(_m: nn.Module, args: Any, kwargs: Any, output: Any, at: int = layer) -> None:
            values[at] = taps[at].read(args, kwargs, output).tensor()

        stack.enter_context(tap.module.register_forward_hook(hook, with_kwargs=True))
    with stack:
        logits = model(**inputs, use_cache=False).logits
    return values, logits


def semalign(
    source: nn.Module,
    target: nn.Module,
    pairs: Sequence[LayerPair],
    steps: Sequence[Sequence[Batch]],
    parameters: Sequence[nn.Parameter],
    config: TransferConfig,
) -> list[dict[str, float]]:
    """The whole method in one phase: every step runs both models in full on its batches.

    ``steps`` holds the batches of each optimiser step, ``parameters`` the target's LoRA parameters.
    Per step: capture both models' layers at the supervised positions, decompose and recompose over
    the vocabulary, L = L_layer + L_out (and the other losses that ``config`` names), AdamW.  Both
    tokenizers are one, and so are the rows of both heads.  Returns the losses of every step.
    """
    source_layers = sorted({layer for pair in pairs for layer in pair.source})
    taps = (
        layer_taps(source, source_layers, config.interface),
        layer_taps(target, [pair.target for pair in pairs], config.interface),
    )
    weights = {"output_loss": config.output_weight, "label_loss": config.label_weight}
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    history = []
    for batches in steps:
        rows = sum(int(batch.supervised.sum()) for batch in batches)
        sequences = sum(len(batch) for batch in batches)
        units = {"layer_loss": sequences if config.objective == "relation" else rows}
        record: dict[str, float] = {}
        for batch in batches:
            losses = summed_losses(source, target, taps, pairs, batch, config)
            for name, total in losses.items():
                mean = total / units.get(name, rows)
                (weights.get(name, 1.0) * mean).backward(retain_graph=True)
                record[name] = record.get(name, 0.0) + mean.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(record)
    return history


def layer_taps(model: nn.Module, layers: Sequence[int], interface: str) -> dict[int, Tap]:
    """Where ``layers`` of ``model`` are read."""
    anatomy = Anatomy.of(model)
    return {layer: anatomy.tap(layer, interface) for layer in layers}


def summed_losses(
    source: nn.Module,
    target: nn.Module,
    taps: tuple[Mapping[int, Tap], Mapping[int, Tap]],
    pairs: Sequence[LayerPair],
    batch: Batch,
    config: TransferConfig,
) -> dict[str, Tensor]:
    """Every loss of one batch, summed over its rows (or sequences); ``taps`` are the source's and
    the target's.
    """
    keep = batch.supervised
    with torch.no_grad():
        seen, source_logits = read_layers(source, taps[0], batch.model_inputs())
    ours, logits = read_layers(target, taps[1], batch.model_inputs())
    source_head, target_head = (Anatomy.of(m).head.weight.detach() for m in (source, target))
    labels = batch.targets[keep]
    losses: dict[str, Tensor] = {}
    if config.objective != "none":
        align = {"frame": align_frame, "dual": align_dual, "logit": align_logit}[config.recompose]
        distances = []
        for pair in pairs:
            hidden = interpolate([seen[layer][keep] for layer in pair.source], pair.weight)
            aligned = align(hidden, source_head, target_head)
            steered, counts = ours[pair.target][keep], keep.sum(1).tolist()
            distances.append(
                layer_losses(steered, aligned, config.objective, head=target_head, counts=counts)
            )
        share = config.layer_weight / len(pairs)
        losses["layer_loss"] = share * torch.cat(distances).sum()
    if config.output_loss != "none":
        losses["output_loss"] = output_losses(
            logits[keep], source_logits[keep], labels, config
        ).sum()
    if config.label_weight:
        losses["label_loss"] = F.cross_entropy(
            logits[keep], labels, reduction="sum", label_smoothing=config.label_smoothing
        )
    return losses


def layer_losses(
    hidden: Tensor,
    target: Tensor,
    objective: str,
    *,
    head: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """The distance of h_k from h̃, both (N, D_tgt): one a row, or for "relation" one a sequence of
    ``counts`` rows.
    """
    if objective == "cosine":
        return 1 - row_cosine(hidden, target)
    if objective == "squared":
        return squared_error(hidden, target)
    if objective == "fisher":
        return fisher(hidden, target, head)
    if objective == "relation":
        return relation_losses(hidden, target, counts)
    raise ValueError(f"unknown objective {objective!r}")


def output_losses(
    logits: Tensor, source_logits: Tensor, labels: Tensor, config: TransferConfig
) -> Tensor:
    """What ``config.output_loss`` says of logits (N, V) beside the source's and the labels (N,)."""
    if config.output_loss == "label_cosine":
        return 1 - label_cosines(logits, labels, config.label_smoothing)
    if config.output_loss == "cross_entropy":
        return F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=config.label_smoothing
        )
    if config.output_loss == "logit_cosine":
        return 1 - row_cosine(logits, source_logits)
    if config.output_loss == "kl":
        tau = config.temperature
        return tau**2 * divergence(source_logits / tau, logits / tau, config.kl_kind)
    raise ValueError(f"unknown output_loss {config.output_loss!r}")
