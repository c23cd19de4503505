"""The shipped change: low-rank layer deltas, stored as a standard PEFT LoRA adapter.

``inject`` adds s·B·A to the weights in place, with float32 accumulation and one rounding; ``eject``
brings back the exact bits.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._files import atomic_directory, local, read_object, write_json
from .anatomy import base_model, is_transposed
from .errors import DeltaError
from .ops import inject_

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BEYOND_LOW_RANK = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "use_bdlora", "use_qalora", "arrow_config",
    "kasa_config", "monteclora_config", "layer_replication",
)  # fmt: skip
_STARTS_THAT_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class LowRank:
    """One matrix's change: ΔW = scale · up · down, up (out, r), down (r, in)."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of ``up``: the r of the adapter."""
        return self.down.shape[0]

    def matrix(self) -> Tensor:
        """ΔW (out, in), materialised."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """Low-rank changes by module path, with the PEFT configuration they were made under.

    Attributes:
        changes: module path in the base model → :class:`LowRank`.
        config: the contents of PEFT's ``adapter_config.json``.
    """

    changes: Mapping[str, LowRank]
    config: Mapping[str, Any]

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the delta."""
        return sum(c.down.numel() + c.up.numel() for c in self.changes.values())

    @classmethod
    def from_peft(cls, model: nn.Module, adapter: str = "default") -> LayerDelta:
        """Read the LoRA adapter attached to a PEFT model; tensors are detached copies on the CPU.

        Raises :class:`DeltaError` for an adapter that a plain low-rank delta cannot express.
        """
        from peft import get_peft_model_state_dict

        config = model.peft_config[adapter].to_dict()  # type: ignore[index,union-attr]
        _check_expressible(config, "the attached adapter")
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        tensors = {name: value.detach().cpu().clone() for name, value in state.items()}
        return cls(_changes(tensors, config, "the attached adapter"), _plain(config))

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``; PEFT reads them.

        The directory appears complete or not at all.  Raises :class:`~pkt_fast.errors.OutputError`.
        """
        with atomic_directory(directory, overwrite=overwrite) as temporary:
            self.write_into(temporary)

    def write_into(self, directory: Path) -> None:
        """Write the two adapter files into an existing directory."""
        tensors = {}
        for path, change in self.changes.items():
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = change.down.contiguous()
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = change.up.contiguous()
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(directory / CONFIG_FILE, dict(self.config))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LayerDelta:
        """Read a PEFT LoRA adapter.  Raises :class:`DeltaError` when it is none or is damaged."""
        if not isinstance(directory, str | os.PathLike):
            raise DeltaError(f"the adapter is {directory!r}; give the path of its directory")
        directory = local(directory)
        config = _read_config(directory / CONFIG_FILE)
        weights = directory / WEIGHTS_FILE
        if not weights.is_file():
            raise DeltaError(f"{directory} holds no {WEIGHTS_FILE}")
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise DeltaError(f"{weights} is damaged: {error}") from error
        return cls(_changes(tensors, config, str(weights)), config)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DeltaError(f"{path.parent} is not an adapter directory: no {path.name}")
    config = read_object(path, "", DeltaError)
    if config.get("peft_type") != "LORA":
        raise DeltaError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise DeltaError(f"{path}: lora_alpha is {config.get('lora_alpha')!r}, not a number")
    _check_expressible(config, str(path))
    return config


def _check_expressible(config: Mapping[str, Any], where: str) -> None:
    """Refuse options under which an adapter does more than add B·A to the weights it was made
    for.
    """
    for option in _BEYOND_LOW_RANK:
        if config.get(option):
            raise DeltaError(f"{where}: {option} is set; a plain low-rank delta cannot express it")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_STARTS_THAT_CHANGE_WEIGHTS):
        raise DeltaError(
            f"{where}: init_lora_weights={start!r} also changed the weights below the adapter; "
            "save it with path_initial_model_for_weight_conversion to make a plain one of it"
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration with JSON types only, in an order that does not depend on hashing."""

    def plain(value: Any) -> Any:
        if isinstance(value, set):
            return sorted(value)
        return getattr(value, "value", value)

    return {key: plain(value) for key, value in config.items()}


def _changes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> dict[str, LowRank]:
    """Pair lora_A with lora_B by module path and attach the scale PEFT would use."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        path, dot, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not dot or half not in ("A", "B") or tensor.ndim != 2:
            raise DeltaError(
                f"{where}: {name} is not a LoRA matrix; only linear layers are supported"
            )
        halves.setdefault(path, {})[half] = tensor
    if not halves:
        raise DeltaError(f"{where} holds no LoRA matrix")
    changes = {}
    for path, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise DeltaError(f"{where}: {path} has lora_{next(iter(pair))} without its other half")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise DeltaError(
                f"{where}: ranks of {path} differ: lora_A {tuple(pair['A'].shape)}, "
                f"lora_B {tuple(pair['B'].shape)}"
            )
        changes[path] = LowRank(pair["A"], pair["B"], _scale(config, path, pair["A"].shape[0]))
    return changes


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Alpha / r, or alpha / √r for rank-stabilised LoRA, with PEFT's per-module overrides."""
    alpha = _override(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _override(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that, as PEFT has it, matches the end of ``path``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


# --------------------------------------------------------------------------- inject and eject


@dataclass(frozen=True)
class Injection:
    """What :func:`inject` did: matrices changed and the share of elements rounding left as they
    were.
    """

    matrices: int
    elements: int
    unchanged: int

    @property
    def unchanged_fraction(self) -> float:
        """Share of weight elements whose stored value did not change."""
        return self.unchanged / max(self.elements, 1)


# Of every model, one list of (weight, its old bits) for each injection.
_backups: weakref.WeakKeyDictionary[nn.Module, list[list[tuple[Tensor, Tensor]]]] = (
    weakref.WeakKeyDictionary()
)


@torch.no_grad()
def inject(
    model: nn.Module,
    delta: LayerDelta,
    scale: float = 1.0,
    *,
    keep_backup: bool = True,
    stochastic_seed: int | None = None,
) -> Injection:
    """Add ``scale`` · ΔW to the model's weights in place, in one pass over all matrices.

    Accumulated in float32 and rounded once to the weight's dtype; with ``stochastic_seed`` the
    rounding is stochastic, so that changes below half a unit in the last place survive on average.
    ``keep_backup`` keeps the original bits for :func:`eject` (as much memory as the changed
    matrices); without it the change is permanent.

    Raises :class:`DeltaError`, before anything is changed, when the delta does not fit the model.
    """
    _check_arguments(delta, scale, stochastic_seed)
    base = base_model(model)
    plans = [_plan(base, path, change) for path, change in delta.changes.items()]
    weights = [weight for weight, _, _ in plans]
    _check_distinct(weights, list(delta.changes))
    backups = [torch.empty_like(weight) for weight in weights] if keep_backup else []
    unchanged = inject_(
        weights,
        [change.down.to(weight.device) for weight, _, change in plans],
        [change.up.to(weight.device) for weight, _, change in plans],
        [change.scale * scale for _, _, change in plans],
        [transposed for _, transposed, _ in plans],
        backups,
        stochastic_seed,
    )
    if keep_backup:
        _backups.setdefault(base, []).append(list(zip(weights, backups, strict=True)))
    return Injection(len(weights), sum(weight.numel() for weight in weights), int(unchanged.sum()))


@torch.no_grad()
def eject(model: nn.Module, *, latest: bool = False) -> int:
    """Undo every :func:`inject` since the last eject, bit for bit; returns the matrices restored.

    With ``latest``, only the latest one.  Returns 0 when there is nothing to undo.
    """
    base = base_model(model)
    injections = _backups.get(base, [])
    count = min(1, len(injections)) if latest else len(injections)
    undone = [injections.pop() for _ in range(count)]
    if not injections:
        _backups.pop(base, None)
    for weight, backup in itertools.chain.from_iterable(undone):
        weight.copy_(backup)
    return sum(map(len, undone))


def _check_arguments(delta: Any, scale: Any, stochastic_seed: Any) -> None:
    if not isinstance(delta, LayerDelta):
        raise DeltaError(f"the delta is {delta!r}; give a LayerDelta, such as LayerDelta.load(dir)")
    try:
        finite = math.isfinite(scale)
    except TypeError:
        finite = False
    if not finite:
        raise DeltaError(f"scale={scale!r}: give a finite number")
    if stochastic_seed is not None and not (
        isinstance(stochastic_seed, int) and 0 <= stochastic_seed < 2**63
    ):
        raise DeltaError(
            f"stochastic_seed={stochastic_seed!r}: give an integer from 0 to 2**63 - 1"
        )


def _check_distinct(weights: Sequence[Tensor], paths: Sequence[str]) -> None:
    first: dict[int, str] = {}
    for weight, path in zip(weights, paths, strict=True):
        other = first.setdefault(id(weight), path)
        if other != path:
            raise DeltaError(
                f"the delta changes {other} and {path}, which share one weight in this model"
            )


def _plan(base: nn.Module, path: str, change: LowRank) -> tuple[Tensor, bool, LowRank]:
    """The weight that ``change`` goes into, and whether it is stored transposed (Conv1D)."""
    try:
        module = base.get_submodule(path)
    except AttributeError as error:
        raise DeltaError(
            f"the delta changes {path}, which {type(base).__name__} has not"
        ) from error
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise DeltaError(f"{path} has no floating-point weight matrix to inject into")
    if "weight" not in module._parameters and "weight" not in module._buffers:
        raise DeltaError(
            f"the weight of {path} is computed from others (a parametrization), so a change to it "
            "would be lost: remove that first"
        )
    if weight.is_meta:
        raise DeltaError(f"the weight of {path} is on the meta device: load the model first")
    if not (torch.isfinite(change.down).all() and torch.isfinite(change.up).all()):
        raise DeltaError(f"the delta of {path} holds NaN or inf")
    transposed = is_transposed(module)
    shape = (change.up.shape[0], change.down.shape[1])
    if tuple(weight.shape) != (shape[::-1] if transposed else shape):
        raise DeltaError(
            f"{path}: the delta is for a {shape[0]}x{shape[1]} matrix, the model's weight is "
            f"{weight.shape[0]}x{weight.shape[1]}{' (transposed)' if transposed else ''}"
        )
    return weight, transposed, change
