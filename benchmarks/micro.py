"""The rows of single operations: what is measured, beside what, on which shapes.

``build(name, sizes, device)`` makes one at a time, so that inputs of one row are gone before the
next.  :data:`FULL` are the shapes of the design's table, :data:`SMALL` run in seconds anywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkt_fast
from benchmarks.harness import Call, Case, Missing, Targets
from pkt_fast import ops, reference
from pkt_fast.anatomy import HeadTransform
from pkt_fast.attribution import attribute
from pkt_fast.capture import capture
from pkt_fast.data import Batch
from pkt_fast.objectives import FrozenHead, Rows, logit_cosine_term
from pkt_fast.ops._gemm import choice, gram, product
from pkt_fast.phases import HEAD


@dataclass(frozen=True)
class Sizes:
    """Shapes of all rows; ``seconds`` is the time to spend on each."""

    vocabulary: int
    source: int
    target: int
    tokens: int
    wide_rows: int
    width: int
    inject: tuple[int, int]
    model_width: int
    model_layers: int
    model_batch: tuple[int, int]
    seconds: float


FULL = Sizes(32000, 1024, 512, 4096, 8192, 4096, (4096, 11008), 512, 12, (8, 256), 4.0)
SMALL = Sizes(1536, 64, 48, 128, 128, 128, (96, 160), 32, 3, (2, 24), 0.02)


def build(name: str, sizes: Sizes, device: str = "cpu") -> Case:
    """The row ``name``, with inputs of its own."""
    torch.manual_seed(0)
    case = BUILDERS[name](sizes, torch.device(device))
    case.seconds = sizes.seconds
    return case


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def _heads(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.randn(sizes.vocabulary, sizes.source, device=device)
    return source, torch.randn(sizes.vocabulary, sizes.target, device=device)


def _gemm(
    n: int, k: int, m: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Call:
    x = torch.randn(n, k, device=device, dtype=dtype)
    w = torch.randn(k, m, device=device, dtype=dtype)
    out = torch.empty(n, m, device=device, dtype=dtype)
    return lambda: torch.mm(x, w, out=out)


def _own_gemms(
    name: str, device: torch.device, *shapes: tuple[int, int, int]
) -> dict[str, Call]:
    """A limit of bare products by our own kernel; none where the library multiplies."""
    if device.type != "cpu" or not choice().own:
        return {}
    operands = [(torch.randn(n, k), torch.randn(k, m), torch.empty(n, m)) for n, k, m in shapes]
    return {f"{name}, own kernel": lambda: [product(x, w, out=o) for x, w, o in operands]}


def _copy(size: int, device: torch.device) -> Call:
    x = torch.ones(size // 8, dtype=torch.int64, device=device)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


# --------------------------------------------------------------------------- vocabulary


def _own_basis_products(weight: Tensor) -> dict[str, Call]:
    """The two products of a basis by our own kernel; none where the library multiplies."""
    if weight.device.type != "cpu" or not choice().own:
        return {}
    inverse = torch.randn(weight.shape[1], weight.shape[1])
    out = torch.empty_like(weight)
    return {
        "float64 Gram triangle and W·G⁻¹, own kernel": lambda: (
            gram(weight),
            product(weight, inverse, out=out),
        )
    }


def basis(sizes: Sizes, device: torch.device) -> Case:
    weight, _ = _heads(sizes, device)

    def peer() -> Tensor:
        return reference.unit_rows(torch.linalg.pinv(weight).T)

    def error() -> float:
        rows = slice(0, 2048)
        inverse = torch.linalg.inv(weight.double().T @ weight.double())
        exact = reference.unit_rows(weight[rows].double() @ inverse)
        return relative(pkt_fast.SemanticBasis.from_weight(weight).vectors[rows], exact)

    rows, width = weight.shape
    return Case(
        "basis",
        f"{rows:,}×{width} float32",
        lambda: pkt_fast.SemanticBasis.from_weight(weight).vectors,
        {"torch.linalg.pinv": peer},
        _own_basis_products(weight)
        | {"float64 Gram GEMM": _gemm(width, rows, width, device, torch.float64)},
        error,
        Targets(
            {"torch.linalg.pinv": 5},
            error=(1e-5, "float64 pinv"),
            memory={"memory ≤ 1.3x the head": 1.3 * weight.nbytes},
        ),
        note=f"the head itself takes {rows * width * 4 / 2**20:.0f} MiB, the basis as much again",
    )


def align(sizes: Sizes, device: torch.device) -> Case:
    source, target = _heads(sizes, device)
    s, t = F.normalize(source, dim=1), F.normalize(target, dim=1)
    matrix = t.T @ s
    hidden = torch.randn(sizes.tokens, sizes.source, device=device)

    def peer() -> Tensor:
        return (F.normalize(hidden, dim=1) @ s.T) @ t

    def ours() -> Tensor:
        return ops.align_rows(hidden, matrix)

    return Case(
        "align",
        f"{sizes.tokens:,} tokens {sizes.source}→{sizes.target}, V={sizes.vocabulary:,} float32",
        ours,
        {"the paper's two steps": peer},
        {"bare GEMM": _gemm(sizes.tokens, sizes.source, sizes.target, device)}
        | _own_gemms("bare GEMM", device, (sizes.tokens, sizes.source, sizes.target)),
        lambda: relative(ours(), peer()),
        Targets({"the paper's two steps": 80}, {"bare GEMM": 1 / 0.9}),
    )


def _with_gradient(value: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[], Tensor]:
    """A call that gives ∂value/∂hidden."""

    def run() -> Tensor:
        x = hidden.detach().requires_grad_()
        value(x).backward()
        assert x.grad is not None
        return x.grad

    return run


def _liger() -> Any | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    import liger_kernel.chunked_loss as chunked_loss

    return chunked_loss


NO_LIGER = Missing("pip install liger-kernel")


def _liger_label_cosine(
    weight: Tensor, labels: Tensor, dummy: Tensor
) -> Callable[[Tensor], Tensor]:
    """Liger's chunked cosine with the labels' one-hots where it would have the teacher's logits."""
    from liger_kernel.chunked_loss.cosine_similarity_loss import (
        LigerFusedLinearCosineSimilarityFunction as Function,
    )

    class LabelCosine(Function):  # type: ignore[misc,valid-type]
        @staticmethod
        def distillation_loss_fn(student, teacher, target=None, ignore_index=None, beta=1.0):
            teacher = F.one_hot(target, student.shape[-1]).to(student.dtype)
            return Function.distillation_loss_fn(student, teacher, target, ignore_index, beta)

    def value(hidden: Tensor) -> Tensor:
        teacher, head = dummy[: len(hidden)], dummy[: len(weight)]
        return LabelCosine.apply(
            hidden, weight, teacher, head, labels, None, None, 0.0, 1.0, 1.0, -100, 1.0, False
        )

    return value


def label_cosine(sizes: Sizes, device: torch.device) -> Case:
    _, weight = _heads(sizes, device)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)
    hidden = torch.randn(sizes.tokens, sizes.target, device=device)
    head = nn.Linear(sizes.target, sizes.vocabulary, bias=False, device=device)
    head.weight = nn.Parameter(weight, requires_grad=False)
    ours = _with_gradient(lambda x: pkt_fast.losses.label_cosine(x, head, labels), hidden)
    pkt_fast.losses.label_cosine(hidden[:1], head, labels[:1])  # the head's statistics

    def logits(x: Tensor) -> Tensor:
        z = x @ weight.T
        return 1 - (z.gather(1, labels[:, None])[:, 0] / z.norm(dim=1)).mean()

    peer = _with_gradient(logits, hidden)
    liger: Any = NO_LIGER
    if _liger() is not None:
        dummy = torch.zeros(max(sizes.vocabulary, sizes.tokens), 1, device=device)
        liger = _with_gradient(_liger_label_cosine(weight, labels, dummy), hidden)
    gemm = _gemm(sizes.tokens, sizes.target, sizes.target, device)
    return Case(
        "label cosine",
        f"forward + backward, {sizes.tokens:,}×{sizes.target}, V={sizes.vocabulary:,} float32",
        ours,
        {"torch logits": peer, "Liger chunked cosine": liger},
        {"two D×D GEMMs": lambda: (gemm(), gemm())}
        | _own_gemms("two D×D GEMMs", device, *[(sizes.tokens, sizes.target, sizes.target)] * 2),
        lambda: relative(ours(), peer()),
        Targets({"torch logits": 60, "Liger chunked cosine": 60}),
        note="Liger has no cosine to labels: its function runs with one-hots in the place of the "
        "teacher's logits and a teacher of width 1; it also takes the head's gradient, which "
        "cannot be turned off. The head's statistics are computed once a head and not in our time",
    )


def logit_cosine(sizes: Sizes, device: torch.device) -> Case:
    source, target = _heads(sizes, device)
    hidden_t = torch.randn(sizes.tokens, sizes.target, device=device)
    hidden_s = torch.randn(sizes.tokens, sizes.source, device=device)
    labels = torch.zeros(sizes.tokens, dtype=torch.int64, device=device)
    starts = torch.tensor([0, sizes.tokens], device=device)
    plain = HeadTransform(1.0, 0.0, False, True)
    term = logit_cosine_term(FrozenHead(target, None, plain), FrozenHead(source, None, plain))
    ours = _with_gradient(
        lambda x: term(Rows({}, x, labels, starts, {HEAD: hidden_s})).mean(), hidden_t
    )
    teacher = hidden_s @ source.T

    def logits(x: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x @ target.T, teacher, dim=1).mean()

    peer = _with_gradient(logits, hidden_t)
    chunked, liger = _liger(), NO_LIGER
    if chunked is not None:
        loss = chunked.LigerFusedLinearCosineSimilarityLoss(0.0, 1.0, 1.0, compiled=False)
        liger = _with_gradient(lambda x: loss(x, target, hidden_s, source, labels), hidden_t)
    gemms = [
        _gemm(sizes.tokens, sizes.source, width, device) for width in (sizes.source, sizes.target)
    ] + 2 * [_gemm(sizes.tokens, sizes.target, sizes.target, device)]
    return Case(
        "logit cosine",
        f"forward + backward, {sizes.tokens:,} tokens {sizes.source}→{sizes.target}, "
        f"V={sizes.vocabulary:,} float32",
        ours,
        {"torch logits": peer, "Liger chunked cosine": liger},
        {"four GEMMs": lambda: [call() for call in gemms]},
        lambda: relative(ours(), peer()),
        note="torch logits has the source's logits given; ours and Liger compute them",
    )


def linear_kl(sizes: Sizes, device: torch.device) -> Case:
    source, target = _heads(sizes, device)
    source, target = source / sizes.source**0.5, target / sizes.target**0.5
    tokens = max(16, sizes.tokens // 4)
    hidden_t = torch.randn(tokens, sizes.target, device=device)
    hidden_s = torch.randn(tokens, sizes.source, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    ours = _with_gradient(
        lambda x: ops.linear_kl(x, target, hidden_s, source).mean(), hidden_t
    )

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            p = F.log_softmax(hidden_s @ source.T, dim=1)
        q = F.log_softmax(x @ target.T, dim=1)
        return F.kl_div(q, p, reduction="batchmean", log_target=True)

    peer = _with_gradient(logits, hidden_t)
    chunked, liger = _liger(), NO_LIGER
    if chunked is not None:
        loss = chunked.LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)
        liger = _with_gradient(lambda x: loss(x, target, hidden_s, source, labels), hidden_t)
    gemms = [
        _gemm(tokens, sizes.source, sizes.vocabulary, device),
        _gemm(tokens, sizes.target, sizes.vocabulary, device),
        _gemm(tokens, sizes.vocabulary, sizes.target, device),
    ]
    return Case(
        "linear KL",
        f"forward + backward, {tokens:,} tokens {sizes.source}→{sizes.target}, "
        f"V={sizes.vocabulary:,} float32",
        ours,
        {"torch logits": peer, "Liger chunked JSD (β=0)": liger},
        {"three N×V GEMMs": lambda: [call() for call in gemms]},
        lambda: relative(ours(), peer()),
        note="a divergence needs every logit: the limit, not the vocabulary, is what remains. "
        "Liger also takes the head's gradient, which cannot be turned off",
    )


def relation(sizes: Sizes, device: torch.device) -> Case:
    length = max(2, min(128, sizes.wide_rows // 4))
    count, width = sizes.wide_rows // length, sizes.target
    x = torch.randn(count * length, width, device=device)
    y = torch.randn_like(x)
    starts = torch.arange(count + 1, device=device) * length

    def agreement(inner: Tensor, norm_x: Tensor, norm_y: Tensor) -> Tensor:
        return (inner / (norm_x * norm_y)).sum()

    def expression(x: Tensor) -> Tensor:
        terms = map(reference.relation_terms, x.split(length), y.split(length))
        return agreement(*map(torch.stack, zip(*terms, strict=True)))

    def products(multiply: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run() -> None:
            for a, b in zip(x.split(length), y.split(length), strict=True):
                gram_x, gram_y = multiply(a, a.T), multiply(b, b.T)
                multiply(gram_x, a)
                multiply(gram_y, a)

        return run

    ours = _with_gradient(lambda x: agreement(*ops.relation(x, y, starts)), x)
    peer = _with_gradient(expression, x)
    limits = {"four products a sequence": products(torch.mm)}
    if device.type == "cpu" and choice().own:
        limits["four products a sequence, own kernel"] = products(product)
    return Case(
        "relation",
        f"forward + backward, {count} sequences of {length}×{width} float32",
        ours,
        {"torch expression": peer},
        limits,
        lambda: relative(ours(), peer()),
        note="the C++ kernel computes half of each symmetric product, the limits all of it"
        if device.type == "cpu"
        else "",
    )


# --------------------------------------------------------------------------- bytes


def capture_rows(sizes: Sizes, device: torch.device) -> Case:
    value = torch.randn(sizes.wide_rows, sizes.width, device=device).bfloat16()
    index = torch.randperm(sizes.wide_rows, device=device)[: sizes.wide_rows // 2].sort().values
    out = torch.empty(len(index), sizes.width, dtype=torch.bfloat16, device=device)

    def ours() -> Tensor:
        ops.capture_rows(out, 0, index, value, normalize=True)
        return out

    def peer() -> Tensor:
        return F.normalize(value[index].float(), dim=-1).to(torch.bfloat16)

    return Case(
        "capture",
        f"half the rows of {sizes.wide_rows:,}×{sizes.width} bfloat16, normalised",
        ours,
        {"torch expression": peer},
        {"copy of the bytes moved": _copy(2 * len(index) * sizes.width, device)},
        lambda: relative(ours(), peer()),
        Targets({"torch expression": 20}, {"copy of the bytes moved": 1.5}),
    )


def gradient_activation(sizes: Sizes, device: torch.device) -> Case:
    shape = (8, sizes.wide_rows // 8, sizes.width)
    gradient = torch.randn(shape, device=device).bfloat16()
    activation = torch.randn(shape, device=device).bfloat16()

    def peer() -> tuple[Tensor, Tensor]:
        return reference.gradient_times_activation(gradient.float(), activation.float())

    def ours() -> tuple[Tensor, Tensor]:
        return ops.grad_x_act(gradient, activation)

    words = [x.view(torch.float32).view(-1) for x in (gradient, activation)]
    return Case(
        "gradient × activation",
        f"{sizes.wide_rows:,}×{sizes.width} bfloat16, signed and absolute sums",
        ours,
        {"torch expression": peer},
        {"reading both once": lambda: [x.sum() for x in words]},
        lambda: relative(ours()[1], peer()[1]),
        Targets({"torch expression": 15}, {"reading both once": 1.5}),
        note="the limit is torch's float32 sum over the same bytes",
    )


RANK = 16


def _injection(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and the factors of its change."""
    rows, columns = sizes.inject
    weight = (0.02 * torch.randn(rows, columns, device=device)).bfloat16()
    down = torch.randn(RANK, columns, device=device) / 64
    return weight, down, torch.randn(rows, RANK, device=device) / 4096


def _injection_limits(weight: Tensor) -> dict[str, Call]:
    """Its bytes, and its float32 operations at the rate of a square matrix product."""
    side = max(1, round((RANK * weight.numel()) ** (1 / 3)))
    shape, name = (side, side, side), "GEMM of as many operations"
    operations = _own_gemms(name, weight.device, shape) or {name: _gemm(*shape, weight.device)}
    return {"copy of the weight": _copy(2 * weight.numel(), weight.device)} | operations


def inject(sizes: Sizes, device: torch.device) -> Case:
    weight, down, up = _injection(sizes, device)
    peer: Any = Missing("pip install peft")
    error = None
    if importlib.util.find_spec("peft"):
        layer = _peft_layer(weight, down, up)

        def peer() -> Tensor:
            layer.merge()
            layer.merged_adapters.clear()  # merge again the next time
            return layer.base_layer.weight

        def error() -> float:
            ours = weight.clone()
            ops.inject_([ours], [down], [up], [1.0], [False])
            layer.base_layer.weight.data.copy_(weight)
            return relative(ours, peer())

    own = weight.clone()
    limits = _injection_limits(weight)
    return Case(
        "inject",
        _injection_shape(weight),
        lambda: ops.inject_([own], [down], [up], [1.0], [False]),
        {"PEFT merge": peer},
        limits,
        error,
        Targets(
            {"PEFT merge": 15},
            dict.fromkeys(limits, 1.2),
            memory={"no temporary of the weight's size": weight.nbytes / 2},
        ),
        together=True,
        note=f"{2 * RANK * weight.numel() / 1e9:.1f} GFLOP of float32 arithmetic and the bytes",
    )


def inject_stochastic(sizes: Sizes, device: torch.device) -> Case:
    weight, down, up = _injection(sizes, device)

    def peer() -> Tensor:
        exact = weight + up @ down
        noise = torch.randint(1 << 16, weight.shape, dtype=torch.int32, device=device)
        return ((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()

    own = weight.clone()
    return Case(
        "inject, stochastic rounding",
        _injection_shape(weight),
        lambda: ops.inject_([own], [down], [up], [1.0], [False], [], 0),
        {"torch expression": peer},
        _injection_limits(weight),
        together=True,
        note="the limits do not count the random words, ten rounds of Philox for four of them; no "
        "error, as the two draw other numbers",
    )


def _injection_shape(weight: Tensor) -> str:
    return f"r={RANK} into {weight.shape[0]:,}×{weight.shape[1]:,} bfloat16"


def _peft_layer(weight: Tensor, down: Tensor, up: Tensor) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base = base.to(weight.device)
    base.weight.data.copy_(weight)
    layer = Linear(base, "default", LoraConfig(), r=RANK, lora_alpha=RANK)
    layer.lora_A["default"].weight.data = down.clone()
    layer.lora_B["default"].weight.data = up.clone()
    return layer


def row_cosine(sizes: Sizes, device: torch.device) -> Case:
    x = torch.randn(sizes.wide_rows // 2, sizes.width, device=device)
    y = torch.randn_like(x)
    ours = _with_gradient(lambda h: 1 - ops.row_cosine(h, y).mean(), x)
    peer = _with_gradient(lambda h: 1 - F.cosine_similarity(h, y, dim=1).mean(), x)
    return Case(
        "row cosine",
        f"forward + backward, {len(x):,}×{sizes.width} float32",
        ours,
        {"torch cosine_similarity": peer},
        {"copy of the bytes moved": _copy(6 * x.numel(), device)},
        lambda: relative(ours(), peer()),
        note="the least traffic: both operands read, the gradient written",
    )


# --------------------------------------------------------------------------- whole models


def random_llama(
    width: int, layers: int, vocabulary: int, device: torch.device | str = "cpu"
) -> Any:
    """A Llama-architecture model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width + layers)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(device).eval()


def _batch(sizes: Sizes, device: torch.device) -> Batch:
    count, length = sizes.model_batch
    ids = torch.randint(sizes.vocabulary, (count, length), device=device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    positions = torch.arange(length, device=device).expand(count, -1)
    return Batch(ids, torch.ones_like(ids), labels, positions, tuple(range(count)))


def model_capture(sizes: Sizes, device: torch.device) -> Case:
    model = random_llama(sizes.model_width, sizes.model_layers, sizes.vocabulary, device)
    batch = _batch(sizes, device)
    layers = range(sizes.model_layers - 1)
    mask = batch.supervised

    def ours() -> list[Tensor]:
        with (
            torch.inference_mode(),
            capture(model, list(layers), interface="block", positions=mask) as acts,
        ):
            model.model(**batch.model_inputs(), use_cache=False)
        return [acts[layer] for layer in layers]

    def peer(part: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.inference_mode():
                states = part(
                    **batch.model_inputs(), use_cache=False, output_hidden_states=True
                ).hidden_states
            return [states[layer + 1][mask] for layer in layers]

        return run

    whole, headless = peer(model), peer(model.model)
    return Case(
        "capture a model",
        f"{sizes.model_layers} layers × {sizes.model_width}, {mask.numel():,} tokens, half kept, "
        "float32",
        ours,
        {
            "output_hidden_states=True": whole,
            "the same without the head": headless,
            "nnsight": _nnsight_capture(model, batch, layers),
        },
        {"forward without capture": lambda: _plain_forward(model.model, batch)},
        lambda: relative(torch.stack(ours()), torch.stack(whole())),
    )


def _nnsight_capture(model: Any, batch: Batch, layers: range) -> Call | Missing:
    """The supervised rows of every layer's output, by an nnsight trace."""
    if importlib.util.find_spec("nnsight") is None:
        return Missing("pip install nnsight")
    from nnsight import NNsight

    traced, mask, inputs = NNsight(model), batch.supervised, batch.model_inputs()

    @torch.no_grad()
    def run() -> list[Tensor]:
        with traced.model.trace(**inputs, use_cache=False):
            kept = []
            for layer in layers:
                kept.append(traced.model.layers[layer].output[mask])
            kept.save()
        return kept

    return run


def _plain_forward(part: Any, batch: Batch) -> None:
    with torch.inference_mode():
        part(**batch.model_inputs(), use_cache=False)


def model_attribution(sizes: Sizes, device: torch.device) -> Case:
    model = random_llama(sizes.model_width, sizes.model_layers, sizes.vocabulary, device)
    batch = _batch(sizes, device)

    def ours() -> Tensor:
        return attribute(model, [batch], interface="mlp")

    def least() -> Tensor:
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(batch.input_ids).requires_grad_()
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        keep = batch.supervised
        loss = F.cross_entropy(model.lm_head(hidden[keep]), batch.targets[keep])
        (gradient,) = torch.autograd.grad(loss, embedded)
        model.requires_grad_(True)
        return gradient

    peer: Any = Missing("pip install captum")
    if importlib.util.find_spec("captum"):
        from captum.attr import LayerGradientXActivation

        def losses(embedded: Tensor) -> Tensor:
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            each = F.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
            ).view_as(batch.targets)
            return each.sum(1) / batch.supervised.sum(1)

        captum = LayerGradientXActivation(losses, [layer.mlp for layer in model.model.layers])

        def peer() -> Tensor:
            embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
            products = captum.attribute(embedded)
            return torch.stack([
                (p[0] if isinstance(p, tuple) else p).flatten(1).abs().sum(1).mean().double()
                for p in products
            ])

    return Case(
        "attribute a model",
        f"{sizes.model_layers} layers × {sizes.model_width}, {batch.input_ids.numel():,} tokens, "
        "float32",
        ours,
        {"Captum": peer},
        {"one forward, one input gradient": least},
        None if isinstance(peer, Missing) else lambda: relative(ours().cpu(), peer().cpu()),
        Targets(less_memory_than=("Captum",)),
        note="the limit is the loss of the supervised rows and its gradient at the embeddings, "
        "parameters frozen",
    )


BUILDERS: dict[str, Callable[[Sizes, torch.device], Case]] = {
    "basis": basis,
    "align": align,
    "label cosine": label_cosine,
    "logit cosine": logit_cosine,
    "linear KL": linear_kl,
    "relation": relation,
    "capture": capture_rows,
    "gradient × activation": gradient_activation,
    "inject": inject,
    "inject, stochastic rounding": inject_stochastic,
    "row cosine": row_cosine,
    "capture a model": model_capture,
    "attribute a model": model_attribution,
}
