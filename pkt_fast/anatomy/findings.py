"""What a probe finds: module paths and numbers.  Nothing here refers to a model.

Modules are named by path, so adapters injected later (which replace modules in place) are seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A tensor a hook can read: part of a module's output, perhaps minus one of its inputs."""

    path: str  # relative to the block
    index: int | None  # element of a tuple output; None: the output itself
    minus: int | str | None  # argument to subtract, by position or name
    flat: bool  # (B*T, D) instead of (B, T, D)
    scale: float = 1.0
    copy: bool = False  # the block changes this tensor in place after the hook has seen it

    def bare(self) -> Source:
        """The tensor itself, as the probe records it."""
        return replace(self, scale=1.0, copy=False)


@dataclass(frozen=True)
class Linear:
    """A linear module of a block, its shape, and what is special about it."""

    path: str
    in_features: int
    out_features: int
    mixes: bool  # its output depends on earlier positions
    fused: bool  # a fused kernel may read its weight without calling it


@dataclass(frozen=True)
class LayerPlan:
    """What the probe learned about one block."""

    taps: Mapping[str, Source]  # "attention", "mlp": those that were found
    projections: Mapping[str, str]  # interface -> path of the linear whose output is the tap
    linears: tuple[Linear, ...]  # in execution order
    output: tuple[type, int] | None  # container type and length; None: a bare tensor
    copy: bool  # the model changes the block's output in place after its hooks have seen it


@dataclass(frozen=True)
class HeadTransform:
    """``logits = f(head(hidden))`` with f(z) = softcap * tanh(scale * z / softcap).

    Attributes:
        scale: multiplies the head's output.
        softcap: bound of the logits; 0.0 means none, then f(z) = scale * z.
        bias: whether the head adds a bias (before f).
        exact: False when no such f explains the model's logits.
    """

    scale: float
    softcap: float
    bias: bool
    exact: bool

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply f to the head's output (..., V)."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled


@dataclass(frozen=True)
class Structure:
    """All findings of a probe."""

    layers_path: str
    block_ids: tuple[int, ...]
    hidden_size: int
    plans: tuple[LayerPlan, ...]
    final_norm_path: str | None
    head_transform: HeadTransform
    resumable: bool
