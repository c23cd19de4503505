"""Seeking (Zhong et al., ICLR 2024, arXiv 2310.11451): inject sensitive weights, then train.

Sensitivity of a source parameter is |θ·∂L/∂θ| summed over seed examples.  The most sensitive
source layers, rows and columns make target-shaped sub-matrices W_extract; their rank-r SVD
initialises LoRA, B₀ = U_r·Σ_r and A₀ = V_rᵀ, and B₀A₀ is taken out of the target's weights,
W ← W − s·B₀A₀ + s·BA, so that ordinary fine-tuning starts at the target and in the directions of
the source's knowledge.  The shipped change of the untouched target is s·(BA − B₀A₀), of rank at
most 2r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, is_transposed
from ..data.batches import Batch
from ..delta import LayerDelta, LowRank, inject
from ..errors import ConfigError, NumericsError
from ..lending import frozen
from ..steering import adapter_parameters, attach_lora
from .delta_maker import (
    DeltaMaker,
    MethodInputs,
    low_rank,
    oriented,
    relative_paths,
    set_lora,
)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Sums of |θ·∂L/∂θ| over the seed examples.

    Attributes:
        layers: (L_src,) summed over all parameters of a block.
        rows: (out,) by layer and module path inside the block.
        columns: (in,) likewise.
    """

    layers: Tensor
    rows: Mapping[tuple[int, str], Tensor]
    columns: Mapping[tuple[int, str], Tensor]

    def best_layers(self, count: int) -> list[int]:
        """The ``count`` most sensitive layers, in the source's order."""
        order = sorted(range(len(self.layers)), key=lambda i: (-float(self.layers[i]), i))
        return sorted(order[:count])


def sensitivity(model: nn.Module, batches: Iterable[Batch], paths: Sequence[str]) -> Sensitivity:
    """Measure the sensitivity of ``model``'s blocks and of the matrices at ``paths`` inside them.

    Each batch counts as one seed example with its mean next-token loss, so give batches of one row.
    Raises :class:`NumericsError` when a sensitivity is not finite.
    """
    anatomy = Anatomy.of(model)
    names = [dict(block.named_parameters()) for block in anatomy.layers]
    modules = [{path: block.get_submodule(path) for path in paths} for block in anatomy.layers]
    layers = torch.zeros(anatomy.num_layers, dtype=torch.float64)
    rows: dict[tuple[int, str], Tensor] = {}
    columns: dict[tuple[int, str], Tensor] = {}
    with frozen(model):
        for module in anatomy.layers:
            module.requires_grad_(True)
        for batch in batches:
            batch = batch.to(anatomy.head.weight.device)
            loss = model(**batch.model_inputs(), labels=batch.labels, use_cache=False).loss
            flat = [p for block in names for p in block.values()]
            found = torch.autograd.grad(loss, flat, allow_unused=True)
            gradients = dict(zip(map(id, flat), found, strict=True))
            for layer, block in enumerate(names):
                for parameter in block.values():
                    gradient = gradients[id(parameter)]
                    if gradient is not None:
                        layers[layer] += float((parameter.detach() * gradient).abs().double().sum())
                for path, module in modules[layer].items():
                    weight: Any = module.weight
                    gradient = gradients[id(weight)]
                    assert gradient is not None
                    score = (weight.detach() * gradient).abs()
                    score = score.T if is_transposed(module) else score
                    _add(rows, (layer, path), score.sum(1))
                    _add(columns, (layer, path), score.sum(0))
    if not bool(torch.isfinite(layers).all()):
        layer = int((~torch.isfinite(layers)).nonzero()[0])
        raise NumericsError(
            f"method='seeking': the sensitivity of source layer {layer} is not finite; "
            "try dtype='float32'"
        )
    return Sensitivity(layers, rows, columns)


def _add(sums: dict[tuple[int, str], Tensor], key: tuple[int, str], value: Tensor) -> None:
    sums[key] = sums[key] + value.double() if key in sums else value.double()


def most_sensitive(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, in order of index; ties go to the lower one."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def extract(
    weight: Tensor, row_scores: Tensor, column_scores: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The most sensitive rows and columns of ``weight`` (out, in), as a matrix of ``shape``."""
    rows = most_sensitive(row_scores, shape[0])
    columns = most_sensitive(column_scores, shape[1])
    return weight[rows][:, columns]


class SeekingMaker(DeltaMaker):
    """LoRA initialised from extracted source weights, which are taken out of the target's."""

    def __init__(self, inputs: MethodInputs) -> None:
        super().__init__(inputs)
        config = self.config
        source, target = Anatomy.of(inputs.source), Anatomy.of(inputs.target)
        if source.num_layers < target.num_layers:
            raise ConfigError(
                f"method='seeking' keeps the best {target.num_layers} source layers, the source "
                f"has {source.num_layers}: swap the models or choose another method"
            )
        wanted = {k: relative_paths(target, k, config.target_modules) for k in self.layers}
        _check_fit(source, wanted)
        measured = sensitivity(
            inputs.source,
            inputs.source_batches(config.attribution_examples, 1),
            sorted({path for paths in wanted.values() for path in paths}),
        )
        self.kept = measured.best_layers(target.num_layers)
        self.scale = config.alpha / config.rank
        self.start: dict[str, tuple[Tensor, Tensor]] = {}
        captured, total = 0.0, 0.0
        for layer, paths in wanted.items():
            chosen = self.kept[layer]
            for path, module in paths.items():
                key = (chosen, path)
                part = extract(
                    oriented(source.layers[chosen].get_submodule(path)),
                    measured.rows[key],
                    measured.columns[key],
                    tuple(oriented(module).shape),  # type: ignore[arg-type]
                )
                up, down = low_rank(part, config.rank)
                self.start[f"{target.layers_path}.{layer}.{path}"] = (up.cpu(), down.cpu())
                captured += float(up.square().sum())
                total += float(part.double().square().sum())
        self.captured = captured / total
        self.originals: list[tuple[Tensor, Tensor]] = []

    def attach(self, target: nn.Module) -> nn.Module:
        model = attach_lora(target, self.layers, self.config)
        # Paper: B₀ = U_r·Σ_r, A₀ = V_rᵀ as they are; the scale s multiplies both B₀A₀ and BA.
        set_lora(model, self.start, 1.0)
        self.initial = LayerDelta.from_peft(model)
        base = Anatomy.of(model).model
        modules: list[Any] = [base.get_submodule(path) for path in self.start]
        weights: list[Tensor] = [module.base_layer.weight for module in modules]
        self.originals = [(weight, weight.detach().clone()) for weight in weights]
        inject(model, self.initial, -1.0, keep_backup=False)
        return model

    def parameters(self, model: nn.Module, layers: Sequence[int]) -> list[nn.Parameter]:
        return adapter_parameters(model, layers)

    def finish(self, model: nn.Module) -> nn.Module:
        """Put the target's own bits back and attach s·(BA − B₀A₀) as one adapter of rank 2r."""
        trained = LayerDelta.from_peft(model)
        self.abandon()
        base: nn.Module = model.unload()  # type: ignore[operator]
        config = self.config.replace(rank=2 * self.config.rank, alpha=2 * self.config.alpha)
        folded = attach_lora(base, self.layers, config)
        set_lora(folded, _difference(trained.changes, self.initial.changes), 1.0)
        return folded.eval()

    @torch.no_grad()
    def abandon(self) -> None:
        """Put the target's own bits back."""
        for weight, original in self.originals:
            weight.copy_(original)

    def report(self) -> dict[str, Any]:
        return {
            "source_layers": self.kept,
            "extracted_energy_kept": self.captured,
            "adapter_rank": 2 * self.config.rank,
        }


def _difference(
    trained: Mapping[str, LowRank], initial: Mapping[str, LowRank]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) stacked so that their product is BA − B₀A₀."""
    return {
        path: (
            torch.cat([change.up, -initial[path].up], 1),
            torch.cat([change.down, initial[path].down]),
        )
        for path, change in trained.items()
    }


def _check_fit(source: Anatomy, wanted: Mapping[int, Mapping[str, nn.Module]]) -> None:
    """Refuse a source without like-named, larger matrices."""
    for layer, paths in wanted.items():
        for path, module in paths.items():
            for block in source.layers:
                try:
                    found = tuple(oriented(block.get_submodule(path)).shape)
                except AttributeError as error:
                    raise ConfigError(
                        "method='seeking' needs models of one architecture: the source's blocks "
                        f"have no {path}"
                    ) from error
                shape = tuple(oriented(module).shape)
                if found[0] < shape[0] or found[1] < shape[1]:
                    raise ConfigError(
                        f"method='seeking': {path} is {found[0]}x{found[1]} in the source, too "
                        f"small for the target's {shape[0]}x{shape[1]} (layer {layer})"
                    )
