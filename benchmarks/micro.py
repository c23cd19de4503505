"""The building blocks: ours beside the best peer and the limit, at the shapes of the design's
targets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkt_fast import SemanticBasis, SemanticMap, losses, reference
from pkt_fast.anatomy import HeadTransform
from pkt_fast.attribution import gradient_x_activation
from pkt_fast.capture import capture
from pkt_fast.data import Batch, Example, collate
from pkt_fast.objectives import FrozenHead, Rows, logit_cosine_term
from pkt_fast.ops import capture_rows, grad_x_act, inject_, linear_kl, row_cosine

from .harness import Row, copier


@dataclass(frozen=True)
class Shapes:
    """How large the inputs are."""

    vocabulary: int = 32_000
    wide: int = 1024
    narrow: int = 512
    tokens: int = 4096
    kl_tokens: int = 1024
    rows: int = 8192
    channels: int = 4096
    matrix: tuple[int, int] = (11008, 4096)
    model_layers: int = 8
    model_width: int = 512


QUICK = Shapes(500, 48, 24, 64, 32, 128, 64, (96, 64), 2, 48)


def randn(
    *shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --------------------------------------------------------------------------- semantics


def basis(shapes: Shapes, device: torch.device) -> Row:
    weight = randn(shapes.vocabulary, shapes.wide, seed=0, device=device)
    double = weight.double()
    inverse = torch.linalg.inv(double.T @ double)
    exact = reference.unit_rows(double @ inverse)
    del double

    def limit() -> None:
        block = weight[:4096].double()
        for _ in range(0, shapes.vocabulary, 4096):
            block.T @ block

    return Row(
        f"semantic basis, {shapes.vocabulary}×{shapes.wide} float32",
        lambda: SemanticBasis.from_weight(weight).vectors,
        {"torch.linalg.pinv": lambda: torch.linalg.pinv(weight)},
        limit,
        "float64 Gram GEMM",
        {"torch.linalg.pinv": 5},
        error=relative(SemanticBasis.from_weight(weight).vectors, exact),
        slow_peer_rounds=2,
    )


def align(shapes: Shapes, device: torch.device) -> Row:
    source = SemanticBasis.from_weight(randn(shapes.vocabulary, shapes.wide, seed=0, device=device))
    target = SemanticBasis.from_weight(
        randn(shapes.vocabulary, shapes.narrow, seed=1, device=device)
    )
    mapping = SemanticMap.between(source, target)
    hidden = randn(shapes.tokens, shapes.wide, seed=2, device=device)
    s, t = source.vectors, target.vectors

    def two_steps() -> Tensor:
        return reference.recompose(reference.coefficients(hidden, s), t)

    double = reference.recompose(reference.coefficients(hidden.double(), s.double()), t.double())
    return Row(
        f"align {shapes.tokens} tokens {shapes.wide}→{shapes.narrow}, V={shapes.vocabulary}",
        lambda: mapping(hidden),
        {"the paper's two steps": two_steps},
        lambda: hidden @ mapping.matrix.T,
        "bare GEMM",
        {"the paper's two steps": 80},
        target_limit=1 / 0.9,
        error=relative(mapping(hidden), double),
        slow_peer_rounds=3,
    )


# --------------------------------------------------------------------------- losses


def frozen_head(vocabulary: int, width: int, seed: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, vocabulary, bias=False, device=device).requires_grad_(False)
    head.weight.copy_(randn(vocabulary, width, seed=seed, device=device))
    return head


def with_gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of ``loss`` with respect to ``hidden``."""

    def call() -> Tensor:
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return call


def label_cosine(shapes: Shapes, device: torch.device) -> Row:
    head = frozen_head(shapes.vocabulary, shapes.narrow, 1, device)
    hidden = randn(shapes.tokens, shapes.narrow, seed=2, device=device)
    labels = torch.randint(0, shapes.vocabulary, (shapes.tokens,), device=device)
    factor = losses.statistics_of(head).factor

    def logits(leaf: Tensor) -> Tensor:
        z = head(leaf)
        return 1 - (z.gather(1, labels[:, None])[:, 0] / z.norm(dim=-1)).mean()

    def limit() -> Tensor:
        return (hidden @ factor.T) @ factor

    ours = with_gradient(lambda h: losses.label_cosine(h, head, labels), hidden)
    return Row(
        f"label cosine fwd+bwd, {shapes.tokens} tokens, {shapes.narrow}, V={shapes.vocabulary}",
        ours,
        {"torch logits": with_gradient(logits, hidden)},
        limit,
        "two D×D GEMMs",
        {"torch logits": 60},
        error=relative(ours(), with_gradient(logits, hidden)()),
        slow_peer_rounds=3,
    )


def logit_cosine(shapes: Shapes, device: torch.device) -> Row:
    ours_head = frozen_head(shapes.vocabulary, shapes.narrow, 1, device)
    theirs_head = frozen_head(shapes.vocabulary, shapes.wide, 0, device)
    hidden = randn(shapes.tokens, shapes.narrow, seed=2, device=device)
    source = randn(shapes.tokens, shapes.wide, seed=3, device=device)
    plain = HeadTransform(1.0, 0.0, bias=False, exact=True)
    term = logit_cosine_term(FrozenHead.of(ours_head, plain), FrozenHead.of(theirs_head, plain))
    empty = torch.zeros(0)

    def ours(leaf: Tensor) -> Tensor:
        return term(Rows({}, leaf, empty, empty, {"head": source})).mean()

    def logits(leaf: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(ours_head(leaf), theirs_head(source), dim=-1)).mean()

    peers = {"torch logits": with_gradient(logits, hidden)}
    skipped = {}
    if importlib.util.find_spec("liger_kernel") is None:
        skipped["Liger chunked cosine"] = "liger-kernel is not installed"
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

        chunked = LigerFusedLinearCosineSimilarityLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False
        )
        labels = torch.zeros(shapes.tokens, dtype=torch.int64, device=device)
        student = ours_head.weight.detach()

        def liger(leaf: Tensor) -> Tensor:
            return chunked(leaf, student, source, theirs_head.weight, labels)

        peers["Liger chunked cosine"] = with_gradient(liger, hidden)
    return Row(
        f"logit cosine fwd+bwd, {shapes.tokens} tokens, V={shapes.vocabulary}",
        with_gradient(ours, hidden),
        peers,
        lambda: source @ torch.empty(shapes.wide, shapes.narrow, device=device).zero_(),
        "one D×D GEMM",
        {"Liger chunked cosine": 60},
        error=relative(with_gradient(ours, hidden)(), with_gradient(logits, hidden)()),
        skipped=skipped,
        slow_peer_rounds=2,
    )


def kl(shapes: Shapes, device: torch.device) -> Row:
    ours_head = frozen_head(shapes.vocabulary, shapes.narrow, 1, device).weight * 0.05
    theirs_head = frozen_head(shapes.vocabulary, shapes.wide, 0, device).weight * 0.05
    hidden = randn(shapes.kl_tokens, shapes.narrow, seed=2, device=device)
    source = randn(shapes.kl_tokens, shapes.wide, seed=3, device=device)

    def ours(leaf: Tensor) -> Tensor:
        rows = linear_kl(leaf, ours_head, source, theirs_head, None, None, 0.0, 0.0, 1.0, "jsd")
        return rows.mean()

    def logits(leaf: Tensor) -> Tensor:
        return reference.linear_kl(leaf, ours_head, source, theirs_head, kind="jsd").mean()

    peers = {"torch logits": with_gradient(logits, hidden)}
    skipped = {}
    if importlib.util.find_spec("liger_kernel") is None:
        skipped["Liger chunked JSD"] = "liger-kernel is not installed"
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        chunked = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False
        )
        labels = torch.zeros(shapes.kl_tokens, dtype=torch.int64, device=device)
        peers["Liger chunked JSD"] = with_gradient(
            lambda leaf: chunked(leaf, ours_head, source, theirs_head, labels), hidden
        )
    return Row(
        f"output JSD fwd+bwd, {shapes.kl_tokens} tokens, V={shapes.vocabulary}",
        with_gradient(ours, hidden),
        peers,
        lambda: ((hidden @ ours_head.T) @ ours_head, source @ theirs_head.T),
        "the three V-wide GEMMs",
        error=relative(with_gradient(ours, hidden)(), with_gradient(logits, hidden)()),
        skipped=skipped,
        slow_peer_rounds=3,
    )


def cosine(shapes: Shapes, device: torch.device) -> Row:
    x = randn(shapes.tokens, shapes.channels, seed=0, device=device, dtype=torch.bfloat16)
    y = randn(shapes.tokens, shapes.channels, seed=1, device=device, dtype=torch.bfloat16)

    def torch_cosine(leaf: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(leaf.float(), y.float(), dim=-1)).mean()

    return Row(
        f"layer cosine fwd+bwd, {shapes.tokens}×{shapes.channels} bfloat16",
        with_gradient(lambda h: 1 - row_cosine(h, y).mean(), x),
        {"torch.cosine_similarity": with_gradient(torch_cosine, x)},
        copier(3 * x.numel() * 2, device),
        "copy of the bytes moved",
        error=relative(
            with_gradient(lambda h: 1 - row_cosine(h, y).mean(), x)(),
            with_gradient(torch_cosine, x)(),
        ),
    )


# --------------------------------------------------------------------------- capture, attribution


def gather(shapes: Shapes, device: torch.device) -> Row:
    value = randn(shapes.rows, shapes.channels, seed=0, device=device, dtype=torch.bfloat16)
    index = torch.randperm(shapes.rows)[: shapes.rows // 2].sort().values.to(device)
    out = torch.zeros(len(index), shapes.channels, dtype=torch.bfloat16, device=device)

    def expression() -> Tensor:
        return out.copy_(F.normalize(value.float(), dim=-1)[index])

    def gathered_first() -> Tensor:
        return out.copy_(F.normalize(value[index].float(), dim=-1))

    exact = reference.unit_rows(value[index].double())

    def ours() -> None:
        capture_rows(out, 0, index, value, None, None, None, 0.0, 1.0, True)

    ours()
    return Row(
        f"capture half of {shapes.rows}×{shapes.channels} bfloat16, normalise, cast",
        ours,
        {"torch, gather first": gathered_first, "torch expression": expression},
        copier(2 * out.numel() * 2, device),
        "copy of the bytes moved",
        {"torch expression": 20},
        target_limit=1.5,
        error=relative(out, exact),
    )


def product(shapes: Shapes, device: torch.device) -> Row:
    grid = (8, shapes.rows // 8, shapes.channels)
    gradient = randn(*grid, seed=0, device=device, dtype=torch.bfloat16)
    activation = randn(*grid, seed=1, device=device, dtype=torch.bfloat16)

    def expression() -> tuple[Tensor, Tensor]:
        values = (gradient.float() * activation.float()).flatten(1)
        return values.sum(1), values.abs().sum(1)

    views = gradient.view(torch.int64), activation.view(torch.int64)
    exact = reference.gradient_times_activation(gradient.double(), activation.double())
    return Row(
        f"gradient × activation, {shapes.rows}×{shapes.channels} bfloat16",
        lambda: grad_x_act(gradient, activation),
        {"torch expression": expression},
        lambda: (views[0].sum(), views[1].sum()),
        "reading both once (integer sums)",
        {"torch expression": 15},
        target_limit=1.5,
        error=relative(grad_x_act(gradient, activation)[1], exact[1]),
    )


def small_llama(shapes: Shapes, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=shapes.model_width,
        intermediate_size=shapes.model_width * 8 // 3,
        num_hidden_layers=shapes.model_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval().to(device)


def example_batch(device: torch.device, rows: int = 8, length: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2048, (rows, length), generator=generator).tolist()
    examples = [
        Example(tuple(row), tuple([-100] * (length // 2) + row[length // 2 :]), i)
        for i, row in enumerate(ids)
    ]
    return collate(examples, range(rows), pad_token_id=0).to(device)


def attribution(shapes: Shapes, device: torch.device) -> Row:
    model = small_llama(shapes, device)
    batch = example_batch(device)
    skipped, peers = {}, {}

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False).logits
        rows = F.cross_entropy(
            logits.transpose(1, 2), batch.targets, ignore_index=-100, reduction="none"
        )
        return rows.sum(1) / batch.supervised.sum(1)

    if importlib.util.find_spec("captum") is None:
        skipped["Captum"] = "captum is not installed"
    else:
        from captum.attr import LayerGradientXActivation

        layers = [block.mlp for block in model.model.layers]
        captum = LayerGradientXActivation(forward, layers)
        peers["Captum, all layers at once"] = lambda: [
            product.flatten(1).sum(1) for product in captum.attribute(batch.input_ids)
        ]

    def backward_alone() -> object:
        return forward(batch.input_ids).sum().backward()

    return Row(
        f"attribution of {shapes.model_layers} layers × {shapes.model_width}, 512 tokens",
        lambda: gradient_x_activation(model, batch),
        peers,
        backward_alone,
        "the model's own forward + backward",
        skipped=skipped,
    )


def model_capture(shapes: Shapes, device: torch.device) -> Row:
    model = small_llama(shapes, device)
    batch = example_batch(device)
    layer = shapes.model_layers // 2 - 1  # hidden_states holds the last block only normed

    def ours() -> Tensor:
        from pkt_fast.anatomy import Anatomy

        with (
            torch.no_grad(),
            capture(model, [layer], interface="block", positions=batch.supervised) as acts,
        ):
            Anatomy.of(model).run_until(layer, **batch.model_inputs(), use_cache=False)
        return acts[layer]

    def hidden_states() -> Tensor:
        with torch.no_grad():
            output = model(**batch.model_inputs(), use_cache=False, output_hidden_states=True)
        return output.hidden_states[layer + 1][batch.supervised]

    def blocks() -> None:
        with torch.no_grad():
            model.model.layers[0](hidden, position_embeddings=rotary)

    hidden = torch.randn(*batch.input_ids.shape, shapes.model_width, device=device)
    rotary = model.model.rotary_emb(hidden, batch.position_ids)
    return Row(
        f"capture block {layer} of {shapes.model_layers}, 512 tokens",
        ours,
        {"output_hidden_states=True": hidden_states},
        lambda: [blocks() for _ in range(layer + 1)],
        f"{layer + 1} bare blocks",
        error=relative(ours(), hidden_states()),
    )


# --------------------------------------------------------------------------- injection


def injection(shapes: Shapes, device: torch.device) -> Row:
    from peft import LoraConfig, inject_adapter_in_model

    out, inner = shapes.matrix
    holder = nn.Sequential(nn.Linear(inner, out, bias=False)).to(device, torch.bfloat16)
    weight = holder[0].weight.detach().clone()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0"])
    adapted = inject_adapter_in_model(config, holder)[0]
    down = randn(16, inner, seed=1, device=device) * 0.01
    up = randn(out, 16, seed=2, device=device) * 0.01
    adapted.lora_A["default"].weight.data.copy_(down)
    adapted.lora_B["default"].weight.data.copy_(up)

    def peft() -> None:
        adapted.merge()
        adapted.merged_adapters.clear()

    before = weight.double()
    once = weight.clone()
    inject_([once], [down], [up], [1.0], [False], [], None)
    exact = (before + up.double() @ down.double()).to(torch.bfloat16)
    return Row(
        f"inject r=16 into {inner}×{out} bfloat16",
        lambda: inject_([weight], [down], [up], [1.0], [False], [], None),
        {"PEFT merge": peft},
        copier(2 * weight.numel() * 2, device),
        "copy of the matrix",
        {"PEFT merge": 15},
        target_limit=1.2,
        error=relative(once, exact),
    )


ROWS: tuple[Callable[[Shapes, torch.device], Row], ...] = (
    basis,
    align,
    label_cosine,
    logit_cosine,
    kl,
    cosine,
    gather,
    product,
    attribution,
    model_capture,
    injection,
)


def rows(shapes: Shapes, device: torch.device, only: str | None = None) -> Iterator[Row]:
    """Build the rows one after another; each frees its inputs before the next."""
    for build in ROWS:
        if only is None or only in build.__name__:
            yield build(shapes, device)
