"""Capturing layer outputs: hooks that keep only the wanted layers and token positions.

The rows leave the forward pass as soon as the layer has run: one gather, optionally normalised and
cast, into a buffer of exactly the supervised rows.  Hooks are removed on every exit path and no
autograd graph is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, TapValue
from .config import INTERFACES
from .data.batches import moved
from .errors import ConfigError, NumericsError
from .lending import claimed, eager
from .ops import capture_rows
from .pairing import LayerPair


@dataclass(frozen=True)
class Wanted:
    """What to keep under ``key``: one layer's rows, or (1 − weight)·first + weight·second of two.

    ``layers`` are 0-based.
    """

    key: int
    layers: tuple[int, ...]
    weight: float = 0.0

    @classmethod
    def of_pair(cls, pair: LayerPair) -> Wanted:
        """The interpolated source activation of a layer pair, kept under its target layer."""
        return cls(pair.target, pair.source, pair.weight)


@dataclass
class Activations(Mapping[int, Tensor]):
    """Rows captured so far: ``acts[layer]`` is (N, D), all forward passes in order.

    Attributes:
        positions: boolean mask (B, T) of the token positions to keep in the next forward pass; None
            keeps all.  Set it before each pass when it changes.
    """

    positions: Tensor | None = None
    _rows: dict[int, list[Tensor]] = field(default_factory=dict)
    _known_index: tuple[Tensor, int, Tensor] | None = None  # of which mask, its version, index

    def __getitem__(self, key: int) -> Tensor:
        rows = self._rows[key]
        if not rows:
            raise KeyError(f"layer {key}: no forward pass has run inside capture() yet")
        if len(rows) > 1:
            rows[:] = [torch.cat(rows)]
        return rows[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self) -> dict[int, Tensor]:
        """Hand over all rows and start afresh (for loops over many batches)."""
        taken = {key: self[key] for key, rows in self._rows.items() if rows}
        for rows in self._rows.values():
            rows.clear()
        return taken

    def row_index(self, value: Tensor) -> Tensor:
        """Indices of the kept positions in ``value`` (B, T, D) flattened to rows.

        They are worked out once a mask, not once a layer: where the mask is on a GPU that means
        waiting for it, and from a mask in host memory nothing waits.
        """
        if self.positions is None:
            return torch.arange(value.shape[:-1].numel(), device=value.device)
        if self.positions.shape != value.shape[:-1]:
            raise ConfigError(
                f"positions has shape {tuple(self.positions.shape)}, the forward pass "
                f"{tuple(value.shape[:-1])}: give one boolean per token"
            )
        mask, known = self.positions, self._known_index
        version = -1 if mask.is_inference() else mask._version
        if known is None or known[0] is not mask or known[1] != version or version < 0:
            known = mask, version, mask.flatten().nonzero().squeeze(-1)
        index = moved(known[2], value.device, non_blocking=True)
        self._known_index = mask, version, index
        return index

    def keep(self, key: int, rows: Tensor) -> None:
        """Append rows under ``key``."""
        self._rows[key].append(rows)


class _Recorder:
    """Forward hooks for a set of :class:`Wanted`; second layers meet the first one's tensors
    here.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        wanted: Sequence[Wanted],
        interface: str,
        acts: Activations,
        normalize: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self.wanted = wanted
        self.acts = acts
        self.normalize = normalize
        self.dtype = dtype
        self.waiting: dict[int, TapValue] = {}
        layers = sorted({layer for want in wanted for layer in want.layers})
        self.taps = {layer: anatomy.tap(layer, interface) for layer in layers}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer, tap in self.taps.items():
                hook = self._hook(layer)
                stack.enter_context(tap.module.register_forward_hook(hook, with_kwargs=True))
            yield

    def _hook(self, layer: int) -> Any:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._layer_ran(layer, self.taps[layer].read(args, kwargs, output))

        return hook

    @torch.no_grad()
    def _layer_ran(self, layer: int, value: TapValue) -> None:
        for want in self.wanted:
            if want.layers == (layer,):
                self._record(want, value, None)
            elif len(want.layers) == 2 and layer == want.layers[0]:
                self.waiting[want.key] = value
            elif len(want.layers) == 2 and layer == want.layers[1]:
                self._record(want, self.waiting.pop(want.key), value)

    def _record(self, want: Wanted, first: TapValue, second: TapValue | None) -> None:
        index = self.acts.row_index(first.value)
        rows = torch.empty(
            len(index),
            first.value.shape[-1],
            dtype=self.dtype or first.value.dtype,
            device=first.value.device,
        )
        capture_rows(
            rows,
            0,
            index,
            first.value,
            first.minus,
            second.value if second else None,
            second.minus if second else None,
            want.weight,
            first.scale,
            self.normalize,
        )
        self.acts.keep(want.key, rows)


@contextlib.contextmanager
def record(
    model: nn.Module,
    wanted: Sequence[Wanted],
    interface: str,
    *,
    positions: Tensor | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[Activations]:
    """Like :func:`capture`, for activations interpolated between two layers as well."""
    if interface not in INTERFACES:
        raise ConfigError(f"interface={interface!r}: choose one of {', '.join(INTERFACES)}")
    acts = Activations(positions, {want.key: [] for want in wanted})
    with claimed([eager(model)]):
        recorder = _Recorder(Anatomy.of(model), wanted, interface, acts, normalize, dtype)
        uncompiled = torch.compiler.set_stance("force_eager")  # compiled calls may skip new hooks
        with recorder.attached(), uncompiled:
            yield acts


def capture(
    model: nn.Module,
    layers: Sequence[int],
    *,
    interface: str = "mlp",
    positions: Tensor | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> contextlib.AbstractContextManager[Activations]:
    """Keep the outputs of ``layers`` (0-based) at ``positions`` while the model runs in the block.

    ``interface`` is where a layer is read: "mlp" or "attention" (the sublayer's output as added to
    the residual stream), "block" (the block's output) or "contribution" (block output − block
    input). ``positions`` is a boolean mask (B, T), None for all.  ``normalize`` stores unit rows;
    ``dtype`` is what rows are stored in (the model's own by default).

    Yields :class:`Activations`; ``acts[layer]`` is (N, D).  Raises :class:`ConfigError` for an
    unknown interface, a layer out of range or a mask that does not fit, and
    :class:`~pkt_fast.errors.ModelError` while another thread captures from the model, whose rows
    would mix with these.
    """
    wanted = [Wanted(layer, (layer,)) for layer in dict.fromkeys(layers)]
    return record(model, wanted, interface, positions=positions, normalize=normalize, dtype=dtype)


def interpolated(layers: Sequence[Tensor], weight: float) -> Tensor:
    """Rows of one layer, or (1 − weight)·first + weight·second of two, as a capture has them.

    ``layers`` hold one or two (N, D).
    """
    if len(layers) == 1:
        return layers[0]
    first, second = layers
    rows = torch.empty_like(first)
    every = torch.arange(len(first), device=first.device)
    capture_rows(rows, 0, every, first, None, second, None, weight, 1.0, False)
    return rows


def check_finite(rows: Tensor, what: str) -> None:
    """Raise :class:`NumericsError` naming ``what`` unless every element of ``rows`` is finite."""
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(-1).sum())
        raise NumericsError(
            f"{what}: {bad} of {len(rows)} rows hold NaN or inf; try dtype='float32' or check the "
            "model"
        )
