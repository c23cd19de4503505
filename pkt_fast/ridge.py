"""The closed-form solver: one pass over the data, no back-propagation.

A sublayer's output projection is linear in its input u, h = W·u + b.  The change ΔW that brings its
outputs closest to their supervision y solves

    min Σ‖(W + ΔW)·u + b − y‖² + λ‖ΔW‖²,   ΔW = (Σ e·uᵀ)(Σ u·uᵀ + λI)⁻¹,   e = y − h,

so that two streamed moments, accumulated in float64, are all that the data is reduced to.
y is h̃ at the layer's own length, h̃·‖h‖/‖h̃‖, where only h̃'s direction means something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .anatomy import Anatomy
from .config import TransferConfig
from .errors import ConfigError, ModelError, NumericsError
from .fitting import solve_ridge
from .methods import LoraMaker
from .phases import layer_column, longest_first
from .steering import Loader, MicroBatch, Record, attach_lora, pick_rows

# --------------------------------------------------------------------------- algebra


class OutputMoments:
    """Moments of a projection's inputs u (N, D_in) and of what its outputs lack, e (N, D_out).

    Attributes:
        rows: N.
        uu, ue: Σ u·uᵀ (D_in, D_in) and Σ u·eᵀ (D_in, D_out), float64.
        ee, yy: Σ‖e‖² and Σ‖y‖².
    """

    def __init__(self, width_in: int, width_out: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.uu, self.ue = zeros(width_in, width_in), zeros(width_in, width_out)
        self.ee, self.yy = zeros(), zeros()

    def add(self, inputs: Tensor, outputs: Tensor, supervision: Tensor, own_length: bool) -> None:
        """Take in u (n, D_in), h and h̃ (n, D_out); ``own_length`` gives h̃ the length of h."""
        u, h, y = (rows.to(self.uu) for rows in (inputs, outputs, supervision))
        if own_length:
            tiny = torch.finfo(y.dtype).tiny
            y = y * (h.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp_min(tiny))
        error = y - h
        self.rows += len(u)
        self.uu.addmm_(u.T, u)
        self.ue.addmm_(u.T, error)
        self.ee += error.square().sum()
        self.yy += y.square().sum()

    def relative_error(self, delta: Tensor | None = None) -> float:
        """Σ‖h + ΔW·u − y‖² / Σ‖y‖², from the moments alone; without ``delta``, of h as it is."""
        error = self.ee
        if delta is not None:
            error = error + (((delta @ self.uu) - 2 * self.ue.T) * delta).sum()
        return float(error.clamp_min(0) / self.yy.clamp_min(torch.finfo(self.yy.dtype).tiny))


def solve(moments: OutputMoments, strength: float) -> Tensor:
    """ΔW (D_out, D_in) with λ = ``strength``·tr(Σ u·uᵀ)/D_in."""
    return solve_ridge(moments.uu, moments.ue, strength).T


def truncate(delta: Tensor, uu: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors up (D_out, r), down (r, D_in), r ≤ ``rank``, whose outputs are nearest to ΔW's.

    Σ‖ΔW·u − up·down·u‖² = ‖(ΔW − up·down)·(Σ u·uᵀ)^½‖² is least at up·down = Q·Qᵀ·ΔW with Q the
    leading left singular vectors of ΔW·(Σ u·uᵀ)^½, which are eigenvectors of ΔW·(Σ u·uᵀ)·ΔWᵀ.
    Both factors get the same norms, as training on from them wants.
    """
    change = delta @ uu @ delta.T
    vectors = torch.linalg.eigh((change + change.T) / 2).eigenvectors.flip(1)
    rank = min(rank, *delta.shape)
    up = vectors[:, :rank]
    # An eigenvector's sign is arbitrary; fixing it keeps the adapter the same across libraries.
    up = up * up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    down = up.T @ delta
    length = down.norm(dim=1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    return up * length, down / length[:, None]


# --------------------------------------------------------------------------- the model's side


def output_projections(
    anatomy: Anatomy, layers: Sequence[int], interface: str, modules: Sequence[str] | None
) -> dict[int, str]:
    """Module path of every layer's output projection, which a LoRA on ``modules`` must reach.

    Raises :class:`ModelError` when the interface is not the output of one linear module that can be
    adapted, and :class:`ConfigError` when ``modules`` leaves that module out.
    """
    paths = {}
    for layer in layers:
        found = anatomy.output_projection(layer, interface)
        if found is None:
            raise ModelError(
                "the ridge solution needs an output that one linear module makes; target layer "
                f"{layer} has none at interface={interface!r}: use 'mlp' or 'attention' where it "
                "exists, or solver='adamw' with warm_start=False"
            )
        path = found[0]
        if path not in anatomy.lora_targets(layer, modules):
            name = path.rpartition(".")[2]
            if modules is None:
                raise ModelError(
                    f"the ridge solution goes into {name!r} of target layer {layer}, which no "
                    "adapter can change reliably: use solver='adamw' with warm_start=False"
                )
            raise ConfigError(
                f"target_modules={list(modules)} leaves out {name!r}, where the ridge solution goes"
            )
        paths[layer] = path
    return paths


class RidgeMaker(LoraMaker):
    """LoRA on the output projections alone: nothing else moves without training."""

    def attach(self, target: nn.Module) -> nn.Module:
        paths = output_projections(
            Anatomy.of(target), self.layers, self.config.interface, self.config.target_modules
        )
        return attach_lora(target, self.layers, self.config, list(paths.values()))


@dataclass(frozen=True, eq=False)
class _Reader:
    """Runs the target from block ``first`` up and reads the projections of ``layers``."""

    anatomy: Anatomy
    first: int
    projections: Mapping[int, nn.Module]

    @torch.no_grad()
    def read(self, micro: MicroBatch) -> dict[int, tuple[Tensor, Tensor]]:
        """(u, h) of every layer at the supervised positions."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for layer, module in self.projections.items():
                stack.enter_context(self._read_into(found, layer, module, micro.index))
            if micro.hidden is not None:
                stack.enter_context(self.anatomy.resume_at(self.first, micro.hidden))
            inputs = {**micro.batch.model_inputs(), "use_cache": False}
            self.anatomy.run_until(max(self.projections), **inputs)
        return found

    @staticmethod
    def _read_into(
        found: dict[int, tuple[Tensor, Tensor]], layer: int, module: nn.Module, index: Tensor
    ) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found[layer] = pick_rows(args[0], index), pick_rows(output, index)

        return module.register_forward_hook(hook)


def accumulate(
    anatomy: Anatomy,
    layers: Sequence[int],
    loader: Loader,
    config: TransferConfig,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[int, OutputMoments]:
    """The moments of every layer's output projection, from one pass over the examples.

    Raises :class:`NumericsError` when activations are not finite, and what
    :func:`output_projections` raises.
    """
    paths = output_projections(anatomy, layers, config.interface, config.target_modules)
    reader = _Reader(
        anatomy,
        layers[0],
        {layer: anatomy.model.get_submodule(path) for layer, path in paths.items()},
    )
    moments: dict[int, OutputMoments] = {}
    order = longest_first(loader.examples.lengths)
    size = config.micro_batch_size
    plan = [order[start : start + size] for start in range(0, len(order), size)]
    anatomy.model.eval()
    with contextlib.closing(loader.stream(plan)) as stream:  # type: ignore[type-var]
        for micro in stream:
            for layer, (inputs, outputs) in reader.read(micro).items():
                if layer not in moments:
                    widths = inputs.shape[1], outputs.shape[1]
                    moments[layer] = OutputMoments(*widths, device=inputs.device)
                supervision = micro.supervision[layer_column(layer)]
                moments[layer].add(inputs, outputs, supervision, config.objective != "squared")
            advance(micro.batch.num_tokens)
    for layer, seen in moments.items():
        if not (torch.isfinite(seen.uu).all() and torch.isfinite(seen.ue).all()):
            raise NumericsError(
                f"activations of target layer {layer} hold NaN or inf; try dtype='float32'"
            )
    return moments


@torch.no_grad()
def solve_layers(
    model: nn.Module,
    layers: Sequence[int],
    loader: Loader,
    config: TransferConfig,
    *,
    advance: Callable[[int], None] = lambda tokens: None,
    first_step: int = 0,
) -> list[Record]:
    """Write the solution of ``layers`` into the LoRA adapter attached to ``model``.

    All layers are solved from one pass, so a layer does not see the change of those below it.
    Returns two records, before and after; their ``layer_loss`` is the mean over layers of the
    squared error relative to the supervision.  Raises as :func:`accumulate`.
    """
    anatomy = Anatomy.of(model)
    moments = accumulate(anatomy, layers, loader, config, advance)
    before, after = 0.0, 0.0
    for layer, seen in moments.items():
        found = anatomy.output_projection(layer, config.interface)
        assert found is not None
        up, down = truncate(solve(seen, config.ridge), seen.uu, config.rank)
        _write(found[1], up, down)
        before += seen.relative_error() / len(moments)
        after += seen.relative_error(up @ down) / len(moments)
    rows = next(iter(moments.values())).rows
    return [
        {
            "step": first_step + i,
            "epoch": 0,
            "rows": rows,
            "learning_rate": 0.0,
            "layer_loss": loss,
        }
        for i, loss in enumerate((before, after))
    ]


def _write(module: Any, up: Tensor, down: Tensor) -> None:
    """Set a LoRA module's B·A·scale to up·down; ranks beyond theirs keep B = 0."""
    scale = module.scaling["default"]
    lora_a, lora_b = module.lora_A["default"].weight, module.lora_B["default"].weight
    lora_b.zero_()
    rank = len(down)
    lora_a[:rank].copy_(down / scale**0.5)
    lora_b[:, :rank].copy_(up / scale**0.5)
