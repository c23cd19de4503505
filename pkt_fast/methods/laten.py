"""LaTen (Tan et al., ACL 2025, arXiv 2505.14436): align a source delta, then inject it.

A neuron is an input of a sublayer's output projection: its column there, and its row in the
matrices that compute it.  Static attribution (arXiv 2312.12141) scores it by how much what it adds
to the residual stream raises the log-probability of the next token.  The weights of the source's
best tenth of neurons a layer are mapped by a two-layer ReLU hypernetwork, vector by vector, to the
target's width and added to the weights of the target's own best neurons.  The hypernetwork alone
trains, by the language model loss of the injected weights on a small alignment set; then the delta
is injected once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._random import seeded
from ..anatomy import Anatomy
from ..data.batches import Batch
from ..errors import ConfigError, ModelError
from ..pairing import LayerPair
from ..steering import attach_lora
from .delta_maker import DeltaMaker, MethodInputs, low_rank, oriented, set_lora

SUBLAYERS = ("attention", "mlp")
SHARE = 0.1


# --------------------------------------------------------------------------- attribution


def neuron_scores(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean log-probability gain of every neuron: sublayer → (L, neurons), float64, on the CPU.

    A neuron with activation u adds u·w (w its column of the output projection) to the stream h
    that enters the sublayer.  Its score is the first-order gain of log p(y | h), through the final
    norm and the head, for the true next token y: u·wᵀ∇_h log p(y | h), averaged over supervised
    positions.  No gradient passes a block.

    Raises :class:`ModelError` when a sublayer's output is not the output of one linear module.
    """
    anatomy = Anatomy.of(model)
    projections = [_projections(anatomy, layer) for layer in range(anatomy.num_layers)]
    sums: dict[str, list[Tensor]] = {}
    count = 0
    for batch in batches:
        batch = batch.to(anatomy.head.weight.device)
        with _recording(anatomy, projections, batch.supervised) as seen, torch.no_grad():
            anatomy.model(**batch.model_inputs(), use_cache=False)
        targets = batch.targets[batch.supervised]
        count += len(targets)
        for sublayer in SUBLAYERS:
            gains = [
                _gain(anatomy, oriented(modules[sublayer]), *seen[layer, sublayer], targets)
                for layer, modules in enumerate(projections)
            ]
            previous = sums.get(sublayer)
            sums[sublayer] = gains if previous is None else [
                a + b for a, b in zip(previous, gains, strict=True)
            ]
    return {sublayer: torch.stack(gains).cpu() / count for sublayer, gains in sums.items()}


def _projections(anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    found = {}
    for sublayer in SUBLAYERS:
        projection = anatomy.output_projection(layer, sublayer)
        if projection is None:
            raise ModelError(
                f"method='laten': layer {layer} of {type(anatomy.model).__name__} has no single "
                f"linear module that makes its {sublayer} output; choose another method"
            )
        found[sublayer] = projection[1]
    return found


@contextlib.contextmanager
def _recording(
    anatomy: Anatomy, projections: Sequence[dict[str, nn.Module]], positions: Tensor
) -> Iterator[dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """Collect (neuron activations (N, neurons), the stream before the sublayer (N, D)).

    The stream before the MLP is the block's output minus what the MLP added; before attention it is
    the block's input.
    """
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    streams: dict[int, Tensor] = {}
    inputs: dict[tuple[int, str], Tensor] = {}
    outputs: dict[int, Tensor] = {}
    stack = contextlib.ExitStack()
    for layer, block in enumerate(anatomy.layers):

        def before(_m: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            streams[layer] = anatomy.block_input(args, kwargs)[positions]

        def after(_m: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            ended = anatomy.block_output(output)[positions]
            seen[layer, "attention"] = (inputs[layer, "attention"], streams[layer])
            seen[layer, "mlp"] = (inputs[layer, "mlp"], ended - outputs[layer])

        stack.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
        stack.enter_context(block.register_forward_hook(after, with_kwargs=True))
        for sublayer, module in projections[layer].items():

            def keep(
                _m: nn.Module, args: Any, output: Any, layer: int = layer, sublayer: str = sublayer
            ) -> None:
                inputs[layer, sublayer] = args[0].reshape(*positions.shape, -1)[positions]
                if sublayer == "mlp":
                    outputs[layer] = output.reshape(*positions.shape, -1)[positions]

            stack.enter_context(module.register_forward_hook(keep))
    with stack:
        yield seen


def _gain(
    anatomy: Anatomy, projection: Tensor, activation: Tensor, stream: Tensor, targets: Tensor
) -> Tensor:
    """Σ over rows of u_i·(wᵢᵀ∇_h log p(y | h)) for every neuron i: (neurons,), float64."""
    with torch.enable_grad():
        stream = stream.detach().requires_grad_()
        normed = stream if anatomy.final_norm is None else anatomy.final_norm(stream)
        logits = anatomy.head_transform()(anatomy.head(normed))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = -F.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(chosen, stream)
    return (activation * (gradient @ projection)).double().sum(0)


# --------------------------------------------------------------------------- neurons' weights


@dataclass(frozen=True)
class Side:
    """One matrix that holds a sublayer's neurons as its rows or columns.

    Attributes:
        path: module path inside the block.
        sublayer: whose neurons these are.
        columns: neurons are columns (the output projection) rather than rows.
    """

    path: str
    sublayer: str
    columns: bool


def sides(anatomy: Anatomy, layer: int, names: Sequence[str] | None) -> list[Side]:
    """The LoRA targets of a block that hold neurons.

    A matrix that computes several things at once (fused attention or gate projections) has no row
    for each neuron and is left alone; value projections of grouped heads have one for a group of
    neurons.
    """
    prefix = f"{anatomy.layers_path}.{layer}."
    usual = set(anatomy.lora_targets(layer))  # queries and keys have no row for each neuron
    chosen = [
        path.removeprefix(prefix) for path in anatomy.lora_targets(layer, names) if path in usual
    ]
    found = []
    for sublayer in SUBLAYERS:
        projection = anatomy.output_projection(layer, sublayer)
        assert projection is not None
        output = projection[0].removeprefix(prefix)
        neurons = oriented(projection[1]).shape[1]
        for path in chosen:
            rows = oriented(anatomy.layers[layer].get_submodule(path)).shape[0]
            if path == output:
                found.append(Side(path, sublayer, columns=True))
            elif path.rpartition(".")[0] == output.rpartition(".")[0] and (
                rows == neurons or (sublayer == "attention" and neurons % rows == 0)
            ):
                found.append(Side(path, sublayer, columns=False))
    return found


def best_neurons(scores: Tensor, places: int, count: int, head_size: int) -> Tensor:
    """The ``count`` best of ``places`` rows or columns by falling score, (count,).

    With fewer places than neurons (grouped heads) the neurons that share a place are added up.
    """
    if places != len(scores):
        heads = scores.reshape(places // head_size, -1, head_size)  # (groups, heads a group, size)
        scores = heads.sum(1).flatten()
    return torch.sort(scores, descending=True, stable=True).indices[:count]


class Hypernetwork(nn.Module):
    """W₂·relu(W₁·x + b₁) + b₂, (n, D_src) → (n, D_tgt); zero before training."""

    def __init__(self, source_size: int, target_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(source_size, target_size)
        self.second = nn.Linear(target_size, target_size)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Source vectors (n, D_src) as target vectors (n, D_tgt)."""
        return self.second(F.relu(self.first(vectors)))


@dataclass(frozen=True, eq=False)
class _Change:
    """The delta of one target matrix: which of its rows or columns get which source vectors."""

    side: Side
    vectors: Tensor  # (n, D_src)
    places: Tensor  # (n,)
    shape: tuple[int, int]

    def matrix(self, mapped: Tensor) -> Tensor:
        """ΔW (out, in) with the mapped vectors (n, D_tgt) in their places."""
        delta = mapped.new_zeros(self.shape)
        if self.side.columns:
            return delta.index_copy(1, self.places, mapped.T)
        return delta.index_copy(0, self.places, mapped)

    def to(self, device: torch.device) -> _Change:
        """The same change with its tensors on ``device``."""
        return replace(self, vectors=self.vectors.to(device), places=self.places.to(device))


# --------------------------------------------------------------------------- the method


class LatenMaker(DeltaMaker):
    """A hypernetwork for each kind of matrix, trained through the weights it makes."""

    runs_target = True

    def __init__(self, inputs: MethodInputs) -> None:
        super().__init__(inputs)
        config = self.config
        source, target = Anatomy.of(inputs.source), Anatomy.of(inputs.target)
        size, count = config.micro_batch_size, config.attribution_examples
        scores = (
            neuron_scores(inputs.source, inputs.source_batches(count, size)),
            neuron_scores(inputs.target, inputs.target_batches(count, size)),
        )
        self.changes: dict[str, _Change] = {}
        for pair in inputs.pairs:
            for side in sides(target, pair.target, config.target_modules):
                path = f"{target.layers_path}.{pair.target}.{side.path}"
                self.changes[path] = _plan(source, target, pair, side, scores)
        if not self.changes:
            raise ConfigError(
                "method='laten': no target module holds neurons; leave target_modules unset"
            )
        kinds = {change.side.path: change for change in self.changes.values()}
        with seeded(config.seed):
            self.networks = {
                kind: Hypernetwork(change.vectors.shape[1], _width(change))
                for kind, change in kinds.items()
            }
        self.residual = math.nan

    def attach(self, target: nn.Module) -> nn.Module:
        target.requires_grad_(False)
        device = Anatomy.of(target).head.weight.device
        for network in self.networks.values():
            network.to(device)
        self.changes = {path: change.to(device) for path, change in self.changes.items()}
        self.handles = [
            target.get_submodule(path).register_forward_hook(self._injected(change))
            for path, change in self.changes.items()
        ]
        return target

    def _injected(self, change: _Change) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + F.linear(args[0], self._delta(change).to(args[0].dtype))

        return hook

    def _delta(self, change: _Change) -> Tensor:
        return change.matrix(self.networks[change.side.path](change.vectors))

    def parameters(self, model: nn.Module, layers: Sequence[int]) -> list[nn.Parameter]:
        return [p for network in self.networks.values() for p in network.parameters()]

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """Inject once: the deltas, cut to the LoRA rank, become the adapter."""
        for handle in self.handles:
            handle.remove()
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        lost, total = 0.0, 0.0
        for path, change in self.changes.items():
            delta = self._delta(change).double()
            up, down = low_rank(delta, self.config.rank)
            factors[path] = (up, down)
            lost += float((delta - up @ down).square().sum())
            total += float(delta.square().sum())
        self.residual = math.sqrt(lost / total) if total else 0.0
        names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in self.changes))
        config = self.config.replace(target_modules=names)
        adapted = attach_lora(model, self.layers, config)
        set_lora(adapted, factors, config.alpha / config.rank)
        return adapted.eval()

    def report(self) -> dict[str, Any]:
        return {
            "injected_matrices": list(self.changes),
            "neurons": sum(len(change.places) for change in self.changes.values()),
            "hypernetwork_parameters": sum(p.numel() for p in self.parameters(nn.Module(), [])),
            "relative_residual_of_truncation": self.residual,
        }


def _width(change: _Change) -> int:
    return change.shape[0] if change.side.columns else change.shape[1]


def _plan(
    source: Anatomy,
    target: Anatomy,
    pair: LayerPair,
    side: Side,
    scores: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> _Change:
    """Match the best neurons of the nearer paired source layer with the target layer's own best."""
    nearest = pair.source[-1] if pair.weight > 0.5 else pair.source[0]
    try:
        theirs = oriented(source.layers[nearest].get_submodule(side.path))
    except AttributeError as error:
        raise ConfigError(
            "method='laten' needs models of one architecture: the source's blocks have no "
            f"{side.path}"
        ) from error
    own = oriented(target.layers[pair.target].get_submodule(side.path))
    places = int(side.columns)
    count = min(math.ceil(SHARE * theirs.shape[places]), math.ceil(SHARE * own.shape[places]))
    best = [
        best_neurons(found[side.sublayer][layer], weight.shape[places], count, _head_size(anatomy))
        for anatomy, found, layer, weight in (
            (source, scores[0], nearest, theirs),
            (target, scores[1], pair.target, own),
        )
    ]
    vectors = theirs.T if side.columns else theirs
    picked = vectors[best[0].to(vectors.device)].float().cpu()
    return _Change(side, picked, best[1], (own.shape[0], own.shape[1]))


def _head_size(anatomy: Anatomy) -> int:
    config: Any = anatomy.model.config
    config = config.get_text_config()
    size = getattr(config, "head_dim", None)
    return int(size or anatomy.hidden_size // config.num_attention_heads)
