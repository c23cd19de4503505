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
    keep = labels != IGNORE_INDEX
    target = F.one_hot(labels.clamp_min(0), weight.shape[0]).to(logits.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / weight.shape[0]
    return row_cosine(logits, target) * keep


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
    log_q = F.log_softmax(
        head_logits(target_hidden, target_head, target_bias, target_softcap) / temperature, dim=-1
    )
    log_p = F.log_softmax(
        head_logits(source_hidden, source_head, source_bias, source_softcap) / temperature, dim=-1
    )

    def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return divergence(log_p, log_q)
    if kind == "reverse":
        return divergence(log_q, log_p)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2
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
    *,
    interface: str = "mlp",
    learning_rate: float = 3e-4,
) -> list[dict[str, float]]:
    """The whole method in one phase: every step runs both models in full on its batches.

    ``steps`` holds the batches of each optimiser step, ``parameters`` the target's LoRA parameters.
    Per step: capture both models' layers at the supervised positions, decompose and recompose over
    the vocabulary, L = L_layer + L_out, AdamW.  Returns the two losses of every step.
    """
    source_anatomy, target_anatomy = Anatomy.of(source), Anatomy.of(target)
    source_head = source_anatomy.head.weight.detach()
    target_head = target_anatomy.head.weight.detach()
    source_basis, target_basis = semantic_basis(source_head), semantic_basis(target_head)
    needed = sorted({layer for pair in pairs for layer in pair.source})
    source_taps = {layer: source_anatomy.tap(layer, interface) for layer in needed}
    target_taps = {pair.target: target_anatomy.tap(pair.target, interface) for pair in pairs}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    history = []
    for batches in steps:
        rows = sum(int(batch.supervised.sum()) for batch in batches)
        layer_loss = output_loss = 0.0
        for batch in batches:
            keep = batch.supervised
            with torch.no_grad():
                seen, _ = read_layers(source, source_taps, batch.model_inputs())
            ours, logits = read_layers(target, target_taps, batch.model_inputs())
            onehot = F.one_hot(batch.targets[keep], logits.shape[-1]).to(logits.dtype)
            l_out = (1 - row_cosine(logits[keep], onehot)).sum() / rows
            l_layer = torch.zeros_like(l_out)
            for pair in pairs:
                hidden = interpolate([seen[layer][keep] for layer in pair.source], pair.weight)
                supervisory = recompose(coefficients(hidden, source_basis), target_basis)
                distance = 1 - row_cosine(ours[pair.target][keep], supervisory)
                l_layer = l_layer + distance.sum() / rows / len(pairs)
            (l_layer + l_out).backward()
            layer_loss, output_loss = layer_loss + l_layer.item(), output_loss + l_out.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append({"layer_loss": layer_loss, "output_loss": output_loss})
    return history
