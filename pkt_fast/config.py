"""Every setting of a transfer, with the paper's value as default.

An unknown or impossible value is refused with a message naming the field, the value and what is
allowed, before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._files import local, read_object
from .errors import ConfigError
from .pairing import PAIRINGS

METHODS = ("semalign", "sft", "kd", "hidden_kd", "seeking", "laten")
INTERFACES = ("mlp", "attention", "block", "contribution")
OBJECTIVES = ("cosine", "relation", "fisher", "squared", "hidden_mse", "hidden_cosine", "none")
OUTPUT_LOSSES = ("label_cosine", "cross_entropy", "kl", "logit_cosine", "none")
RECOMPOSITIONS = ("frame", "dual", "logit", "softmax", "top_k", "threshold", "lens", "fitted")
FITS = ("ridge", "procrustes")
KL_KINDS = ("forward", "reverse", "jsd")
LABELS = ("given", "source")
SCHEDULES = ("joint", "frontier")
SOLVERS = ("adamw", "ridge")
RIDGE_OBJECTIVES = ("cosine", "squared")
ALIGNED_OBJECTIVES = ("cosine", "relation", "fisher", "squared")
REDUCTIONS = ("absolute", "signed", "net")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "native", "triton")

# A rate that rises and falls, and clipped gradients: with a constant rate, the one that is best for
# one seed can ruin another.
STEADY: dict[str, Any] = {
    "learning_rate_schedule": "cosine",
    "warmup_fraction": 0.05,
    "max_grad_norm": 1.0,
}

# The second version trains every layer on one source layer alone, from shallow to deep.
_SECOND = {"layers": "all", "pairing": "single", "schedule": "frontier", "output_loss": "kl"}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-v2": {**_SECOND, "objective": "relation", "interface": "contribution"},
    # The ACL text compares logits, so the map is the one that keeps them.
    "paper-acl": {**_SECOND, "objective": "fisher", "interface": "block", "recompose": "logit"},
    # What won with few rows (docs/methods.md, "What was measured").
    "best": {
        "objective": "squared",
        "interface": "block",
        "recompose": "fitted",
        "output_loss": "kl",
        "layers": "all",
        "layer_weight": 0.3,
        "label_weight": 1.0,
        "min_rows": 512,
        **STEADY,
    },
}

_LABELS = {"objective": "none", "output_loss": "cross_entropy", "layers": "all"}

# What each method sets where the user does not (docs/methods.md says from which paper).
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "semalign": {},
    "sft": _LABELS,
    "kd": {"objective": "none", "output_loss": "kl", "layers": "all"},
    "hidden_kd": {
        "objective": "hidden_mse",
        "interface": "block",
        "output_loss": "kl",
        "layers": "all",
    },
    "seeking": _LABELS,
    "laten": {
        **_LABELS,
        "limit": 128,
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 3e-5,
        "weight_decay": 0.05,
    },
}


def _setting(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class TransferConfig:
    """Settings of :func:`pkt_fast.transfer`; defaults are SemAlign's (PAPER v1) where it states
    one.
    """

    # what is matched
    method: str = _setting("semalign", "which method trains the target: " + ", ".join(METHODS))
    interface: str = _setting("mlp", "where a layer is read: " + ", ".join(INTERFACES))
    objective: str = _setting("cosine", "layer objective: " + ", ".join(OBJECTIVES))
    output_loss: str = _setting("label_cosine", "loss on the output: " + ", ".join(OUTPUT_LOSSES))
    recompose: str = _setting(
        "frame", "how source activations reach the target's space: " + ", ".join(RECOMPOSITIONS)
    )
    layer_weight: float = _setting(1.0, "weight of the layer objective")
    output_weight: float = _setting(1.0, "weight of the output loss")
    label_weight: float = _setting(
        0.0, "weight of a cross-entropy on the labels beside output_loss"
    )
    label_smoothing: float = _setting(0.0, "label smoothing of label losses")
    temperature: float = _setting(1.0, "softmax temperature of kl")
    kl_kind: str = _setting("forward", "divergence used by kl: " + ", ".join(KL_KINDS))
    coefficient_temperature: float = _setting(0.1, "temperature of recompose='softmax'")
    top_k: int = _setting(256, "coefficients kept by recompose='top_k'")
    threshold: float = _setting(0.05, "smallest coefficient kept by recompose='threshold'")
    fit: str = _setting("ridge", "how recompose='fitted' is fitted: " + ", ".join(FITS))
    fit_examples: int = _setting(
        64, "examples that recompose='lens' or 'fitted' is fitted, and any map judged on (a tenth)"
    )
    fit_ridge: float = _setting(
        1e-2, "ridge strength of recompose='lens' and 'fitted', relative to the mean moment"
    )
    # which layers
    num_layers: int = _setting(1, "critical layers to transfer")
    layers: tuple[int, ...] | str | None = _setting(
        None, "target layers to steer (0-based) instead of attributing, or 'all'"
    )
    pairing: str = _setting(
        "interpolated",
        "source layers of a target layer: two where the depths ask for it, or one: "
        + ", ".join(PAIRINGS),
    )
    reduction: str = _setting("absolute", "attribution score: " + ", ".join(REDUCTIONS))
    attribution_examples: int = _setting(32, "examples the attribution is measured on")
    schedule: str = _setting(
        "joint", "all layers at once, or shallow to deep: " + ", ".join(SCHEDULES)
    )
    # training
    solver: str = _setting("adamw", "how the delta is found: " + ", ".join(SOLVERS))
    ridge: float = _setting(1e-2, "ridge strength of solver='ridge', relative to the mean moment")
    warm_start: bool = _setting(False, "start adamw from the ridge solution")
    epochs: int = _setting(5, "passes over the data; the frontier's stages share them")
    steps: int | None = _setting(
        None, "optimiser steps in place of whole epochs; the frontier's stages share them"
    )
    batch_size: int = _setting(64, "examples a step")
    micro_batch_size: int = _setting(16, "examples a forward pass (gradients accumulate to a step)")
    learning_rate: float = _setting(3e-4, "AdamW learning rate")
    weight_decay: float = _setting(0.0, "AdamW weight decay")
    warmup_fraction: float = _setting(0.0, "share of steps with linearly rising learning rate")
    learning_rate_schedule: str = _setting("constant", "constant, linear or cosine decay")
    max_grad_norm: float = _setting(0.0, "gradient norm clip; 0 = none")
    rank: int = _setting(16, "LoRA rank")
    alpha: float = _setting(16.0, "LoRA alpha; the delta is alpha/rank·B·A")
    dropout: float = _setting(0.0, "LoRA dropout")
    target_modules: tuple[str, ...] | None = _setting(
        None, "names of the linear modules that move; None = up, down, value and output projections"
    )
    gradient_checkpointing: bool = _setting(False, "recompute the tail's activations in backward")
    compile: bool = _setting(False, "torch.compile the tail")
    # data
    max_length: int = _setting(1024, "tokens an example at most")
    limit: int | None = _setting(None, "use the first so many rows")
    labels: str = _setting("given", "whose replies are learnt from: " + ", ".join(LABELS))
    min_rows: int = _setting(
        0, "train on at least so many rows: the source writes what is missing, like the given ones"
    )
    bucket: bool = _setting(True, "batch examples of like length")
    max_new_tokens: int = _setting(256, "longest question or reply that the source writes")
    # running
    dtype: str = _setting(
        "auto", "dtype to load models in (objects keep theirs): " + ", ".join(DTYPES)
    )
    device: str = _setting("auto", "'auto', 'cpu', 'cuda', 'cuda:0', ...")
    seed: int = _setting(0, "seed of adapter initialisation and batch order")
    backend: str = _setting("auto", "implementation of the ops: " + ", ".join(BACKENDS))
    store: str = _setting("memory", "'memory', or a directory for the activation stores")
    store_budget_gb: float = _setting(
        8.0, "GB up to which 'memory' holds a store; a larger one is in a temporary directory"
    )
    log_every: int | None = _setting(
        None, "read losses from the device every so many steps; None = each on a CPU, 10 on a GPU"
    )
    overwrite: bool = _setting(
        False, "replace what pkt_fast wrote into the output directory before"
    )
    trust_remote_code: bool = _setting(False, "run code that ships with a hub model")

    def __post_init__(self) -> None:
        # What torch and pathlib offer in the place of a string; a report holds strings.
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "device", str(self.device))
        object.__setattr__(self, "store", _store(self.store))
        for name, allowed in _CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        for name, (kind, test, wanted) in _RANGES.items():
            value = _plain(getattr(self, name))
            _within(name, value, kind, test, wanted)
            object.__setattr__(self, name, value)
        for name in ("limit", "steps", "log_every"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _plain(getattr(self, name)))
                _within(name, getattr(self, name), *_at_least(int, 1))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        object.__setattr__(self, "layers", _layers(self.layers))
        object.__setattr__(self, "target_modules", _names(self.target_modules))
        if self.solver == "adamw" and not self._losses():
            raise ConfigError(
                "nothing to train on: set objective, output_loss or label_weight, with a weight "
                f"above 0 (objective={self.objective!r}, layer_weight={self.layer_weight:g}, "
                f"output_loss={self.output_loss!r}, output_weight={self.output_weight:g})"
            )
        if self.method in ("seeking", "laten") and (self.solver != "adamw" or self.warm_start):
            raise ConfigError(
                f"method={self.method!r} finds its delta itself: use solver='adamw' and "
                "warm_start=False"
            )
        if self.solver == "ridge" and self.objective not in RIDGE_OBJECTIVES:
            raise ConfigError(
                f"solver='ridge' solves objective='cosine' or 'squared', not {self.objective!r}: "
                "use solver='adamw', with warm_start=True to start from the ridge solution"
            )
        if self.warm_start and (self.solver == "ridge" or self.objective not in ALIGNED_OBJECTIVES):
            raise ConfigError(
                "warm_start=True starts solver='adamw' from the ridge solution of a layer "
                f"objective ({', '.join(ALIGNED_OBJECTIVES)})"
            )
        if self.method == "laten" and self.schedule != "joint":
            raise ConfigError("method='laten' injects every layer at once: use schedule='joint'")

    def _losses(self) -> bool:
        """Whether any loss has a weight."""
        layer = self.objective != "none" and self.layer_weight > 0
        output = self.output_loss != "none" and self.output_weight > 0
        return layer or output or self.label_weight > 0

    @classmethod
    def fields(cls) -> dict[str, str]:
        """Every setting with its one-line description."""
        return {field.name: field.metadata["doc"] for field in dataclasses.fields(cls)}

    @classmethod
    def make(
        cls,
        config: TransferConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> TransferConfig:
        """Combine a preset, a config (object, mapping, or JSON file) and single fields, in that
        order.

        Fields that none of them sets take the method's settings (:data:`METHOD_SETTINGS`), then the
        defaults.  Of a config object the fields that differ from the defaults count as set.

        Raises :class:`ConfigError` for an unknown field or preset, or an impossible value.
        """
        settings: dict[str, Any] = {}
        if preset is not None:
            _one_of("preset", preset, tuple(PRESETS))
            settings.update(PRESETS[preset])
        settings.update(_mapping(config))
        settings.update(overrides)
        known = cls.fields()
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r}{hint}")
        method = settings.get("method", cls.method)
        _one_of("method", method, METHODS)
        return cls(**{**METHOD_SETTINGS[method], **settings})

    def num_steered(self, num_layers: int) -> int:
        """How many layers train of a target that has ``num_layers``."""
        if self.layers is None:
            return self.num_layers
        return num_layers if self.layers == "all" else len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """All settings with JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def replace(self, **changes: Any) -> TransferConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "interface": INTERFACES,
    "objective": OBJECTIVES,
    "output_loss": OUTPUT_LOSSES,
    "recompose": RECOMPOSITIONS,
    "fit": FITS,
    "kl_kind": KL_KINDS,
    "reduction": REDUCTIONS,
    "pairing": PAIRINGS,
    "labels": LABELS,
    "schedule": SCHEDULES,
    "solver": SOLVERS,
    "dtype": DTYPES,
    "backend": BACKENDS,
    "learning_rate_schedule": ("constant", "linear", "cosine"),
}

_Range = tuple[type, Callable[[Any], bool], str]


def _at_least(kind: type, low: float) -> _Range:
    return (kind, lambda value: value >= low, f"{_article(kind)} of at least {low:g}")


def _article(kind: type) -> str:
    return "an integer" if kind is int else "a number"


_SEED: _Range = (int, lambda value: 0 <= value < 2**63, "an integer from 0 up to 2**63 - 1")
_FRACTION: _Range = (float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")
_POSITIVE: _Range = (float, lambda value: value > 0, "a number above 0")

_RANGES: dict[str, _Range] = {
    "layer_weight": _at_least(float, 0),
    "output_weight": _at_least(float, 0),
    "label_weight": _at_least(float, 0),
    "label_smoothing": _FRACTION,
    "temperature": _POSITIVE,
    "coefficient_temperature": _POSITIVE,
    "top_k": _at_least(int, 1),
    "threshold": _FRACTION,
    "fit_examples": _at_least(int, 1),
    "fit_ridge": _POSITIVE,
    "num_layers": _at_least(int, 1),
    "attribution_examples": _at_least(int, 1),
    "ridge": _POSITIVE,
    "epochs": _at_least(int, 1),
    "batch_size": _at_least(int, 1),
    "micro_batch_size": _at_least(int, 1),
    "learning_rate": (float, lambda value: 0 < value <= 1e30, "a number above 0, at most 1e30"),
    "weight_decay": _at_least(float, 0),
    "warmup_fraction": _FRACTION,
    "max_grad_norm": _at_least(float, 0),
    "rank": _at_least(int, 1),
    "alpha": _POSITIVE,
    "dropout": _FRACTION,
    "max_length": _at_least(int, 2),
    "min_rows": _at_least(int, 0),
    "max_new_tokens": _at_least(int, 1),
    "seed": _SEED,
    "store_budget_gb": _POSITIVE,
}


_SWITCHES = (
    "warm_start", "gradient_checkpointing", "compile", "bucket", "overwrite", "trust_remote_code",
)  # fmt: skip


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's own; anything else as it is."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(allowed)}")


def _within(name: str, value: Any, kind: type, test: Callable[[Any], bool], wanted: str) -> None:
    numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(
        value, bool
    )
    if not numeric or value != value or value in (float("inf"), float("-inf")) or not test(value):
        raise ConfigError(f"{name}={value!r}: give {wanted}")


def _layers(value: Any) -> tuple[int, ...] | str | None:
    if value is None or (isinstance(value, str) and value == "all"):
        return value
    given, value = value, _plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = [_plain(layer) for layer in value]
    valid = isinstance(value, list) and len(value) > 0
    if not valid or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in value):
        raise ConfigError(f"layers={given!r}: give 0-based target layers such as [3, 5], or 'all'")
    return tuple(sorted(set(value)))


def _store(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"store={value!r}: give 'memory' or a directory")
    return os.fspath(value)


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not value or any(not isinstance(name, str) or not name for name in value):
        raise ConfigError(
            f"target_modules={value!r}: give module names such as ['up_proj', 'down_proj']"
        )
    return tuple(value)


def _mapping(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, TransferConfig):
        return {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != field.default
        }
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config={config!r}: give a TransferConfig, a mapping or a JSON file")
    path = local(config)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(f"config file {path} {what}")
    return read_object(path, "config file ", ConfigError)
