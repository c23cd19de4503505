"""How a method makes its delta: what is attached to the target, what trains, what is shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, is_transposed
from ..config import TransferConfig
from ..data.batches import Batch
from ..data.examples import Examples
from ..pairing import LayerPair
from ..phases import longest_first, processing_batches
from ..steering import adapter_parameters, attach_lora


@dataclass(frozen=True, eq=False)
class MethodInputs:
    """What a method may look at before training: both models, the pairs and the examples.

    Attributes:
        source_examples: the rows in the source's tokens, one for each of ``examples``.
        pad_token_ids: padding for the source's and the target's batches.
    """

    config: TransferConfig
    source: nn.Module
    target: nn.Module
    pairs: Sequence[LayerPair]
    source_examples: Examples
    examples: Examples
    pad_token_ids: tuple[int, int]

    def source_batches(self, count: int, size: int) -> Iterator[Batch]:
        """Batches of the first ``count`` examples in the source's tokens."""
        return _batches(self.source_examples[:count], size, self.pad_token_ids[0])

    def target_batches(self, count: int, size: int) -> Iterator[Batch]:
        """Batches of the first ``count`` examples in the target's tokens."""
        return _batches(self.examples[:count], size, self.pad_token_ids[1])


def _batches(examples: Examples, size: int, pad_token_id: int) -> Iterator[Batch]:
    return processing_batches(examples, longest_first(examples.lengths), size, pad_token_id)


class DeltaMaker:
    """Attach something trainable to the target, name its parameters, make it a LoRA adapter.

    Attributes:
        runs_target: whether making one runs the target, which then has to be on the device.
    """

    runs_target = False

    def __init__(self, inputs: MethodInputs) -> None:
        self.config = inputs.config
        self.layers = [pair.target for pair in inputs.pairs]

    def attach(self, target: nn.Module) -> nn.Module:
        """The model to train: ``target`` with what this method trains attached to it."""
        raise NotImplementedError

    def parameters(self, model: nn.Module, layers: Sequence[int]) -> list[nn.Parameter]:
        """What trains when ``layers`` are steered."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> nn.Module:
        """A PEFT model on the target's own, untouched weights that computes what was trained."""
        return model

    def abandon(self) -> None:
        """Put back what :meth:`attach` changed in the target's weights: training failed."""
        return

    def report(self) -> dict[str, Any]:
        """Facts about the delta for report.json."""
        return {}


class LoraMaker(DeltaMaker):
    """Plain LoRA on the steered layers: every method that is only a choice of losses."""

    def attach(self, target: nn.Module) -> nn.Module:
        return attach_lora(target, self.layers, self.config)

    def parameters(self, model: nn.Module, layers: Sequence[int]) -> list[nn.Parameter]:
        return adapter_parameters(model, layers)


# --------------------------------------------------------------------------- matrices


def oriented(module: nn.Module) -> Tensor:
    """A linear module's weight as (out, in), detached."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator,assignment]
    return weight.T if is_transposed(module) else weight


def relative_paths(
    anatomy: Anatomy, layer: int, names: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The LoRA targets of a block by their path inside the block."""
    prefix = f"{anatomy.layers_path}.{layer}."
    return {
        path.removeprefix(prefix): anatomy.model.get_submodule(path)
        for path in anatomy.lora_targets(layer, names)
    }


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of ``matrix`` (out, in): U_r·Σ_r (out, r) and V_rᵀ (r, in), float64.

    The sign of each singular pair is fixed (its largest entry of V is positive), so that the
    factors do not depend on the library's choice; missing directions are zero.
    """
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = min(rank, len(s))
    u, s, vt = u[:, :count], s[:count], vt[:count]
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    up = matrix.new_zeros(matrix.shape[0], rank, dtype=torch.float64)
    down = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.float64)
    up[:, :count], down[:count] = u * s * sign.T, vt * sign
    return up, down


@torch.no_grad()
def set_lora(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Set the attached adapter's (A, B) of each module path so that scale·B·A = up·down."""
    base = Anatomy.of(model).model
    for path, (up, down) in factors.items():
        module: Any = base.get_submodule(path)
        module.lora_A["default"].weight.copy_(down)
        module.lora_B["default"].weight.copy_(up / scale)
