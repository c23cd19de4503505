"""What is compared: named settings of a transfer, and the fields of each that are worth tuning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import PRESETS, TransferConfig
from ..errors import ConfigError

LEARNING_RATES = (1e-3, 3e-3, 3e-4, 1e-2)
_MIDDLE_RATES = (3e-3, 1e-3, 1e-2)  # with a weight to tune beside
_WEIGHTS = (1.0, 0.3, 3.0)
_ROWS = {"min_rows": PRESETS["best"]["min_rows"]}
_ALIGN = {"layers": "all", "output_loss": "kl", "interface": "block", "objective": "squared"}
# For maps whose images have no length, or one that comes from the vocabulary alone.
_DIRECTION = {**_ALIGN, "objective": "cosine", "interface": "mlp"}
_SOLVED = {**_ALIGN, "interface": "mlp", "recompose": "fitted", "output_loss": "none"}
_LIGHT = (0.3, 0.1, 1.0)
_STRENGTHS = (1.0, 0.1, 10.0)


@dataclass(frozen=True)
class Recipe:
    """Named settings to compare.

    Attributes:
        name: as asked for on the command line.
        settings: fields of :class:`TransferConfig`.
        tuned: field → values to choose from; the first is the starting point.
        change: transfer the change of a fine-tuned source (needs the source before it).
    """

    name: str
    settings: Mapping[str, Any]
    tuned: Mapping[str, Sequence[Any]]
    change: bool = False

    def config(self, **settings: Any) -> TransferConfig:
        """The recipe's configuration under the comparison's own ``settings``."""
        return TransferConfig.make({**settings, **self.settings})

    @property
    def uses_labels(self) -> bool:
        """Whether any loss looks at the labels of the rows."""
        config = self.config()
        labelled = config.output_loss in ("cross_entropy", "label_cosine")
        weighted = config.label_weight > 0 or "label_weight" in self.tuned
        return (labelled and config.output_weight > 0) or weighted


def _recipe(
    name: str, settings: Mapping[str, Any], *, change: bool = False, **tuned: Sequence[Any]
) -> Recipe:
    rates = _MIDDLE_RATES if tuned else LEARNING_RATES
    return Recipe(name, settings, {"learning_rate": rates, **tuned}, change)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("paper", {}, layer_weight=_WEIGHTS),
        _recipe("paper-v2", PRESETS["paper-v2"], layer_weight=_WEIGHTS),
        _recipe("paper-acl", PRESETS["paper-acl"], layer_weight=_WEIGHTS),
        _recipe("sft", {"method": "sft"}),
        _recipe("kd", {"method": "kd"}),
        _recipe("sft+kd", {"method": "kd"}, label_weight=_WEIGHTS),
        _recipe("hidden_kd", {"method": "hidden_kd"}, layer_weight=_WEIGHTS),
        _recipe("logit_cosine", {"method": "kd", "output_loss": "logit_cosine"}),
        _recipe("seeking", {"method": "seeking"}),
        Recipe("laten", {"method": "laten"}, {"learning_rate": (3e-5, 3e-4, 3e-3, 1e-3)}),
        _recipe("kd+dual", {**_DIRECTION, "recompose": "dual"}, layer_weight=_LIGHT),
        _recipe("kd+softmax", {**_DIRECTION, "recompose": "softmax"}, layer_weight=_LIGHT),
        _recipe("kd+top_k", {**_DIRECTION, "recompose": "top_k"}, layer_weight=_LIGHT),
        _recipe(
            "kd+relation",
            {**_ALIGN, "objective": "relation", "interface": "contribution", "recompose": "dual"},
            layer_weight=(1.0, 0.3, 3.0),
        ),
        _recipe(
            "kd+fisher", {**_ALIGN, "objective": "fisher", "recompose": "logit"},
            layer_weight=_WEIGHTS,
        ),
        _recipe("kd+lens", {**_ALIGN, "recompose": "lens"}, layer_weight=(1.0, 0.3, 5.0)),
        _recipe("kd+fitted", {**_ALIGN, "recompose": "fitted"}, layer_weight=(1.0, 0.3, 5.0)),
        Recipe("ridge", {**_SOLVED, "solver": "ridge"}, {"ridge": (*_STRENGTHS, 1e-2)}),
        _recipe(
            "kd+ridge", {**_SOLVED, "warm_start": True, "output_loss": "kl", "layer_weight": 0.3},
            ridge=_STRENGTHS,
        ),
        _recipe(
            "kd+delta", {**_ALIGN, "recompose": "fitted"}, change=True, layer_weight=(1.0, 0.3, 5.0)
        ),
        _recipe(
            "sft+kd+delta",
            {**_ALIGN, "recompose": "fitted", "label_weight": 1.0},
            change=True,
            layer_weight=(1.0, 0.3, 5.0),
        ),
        _recipe("sft+kd+fitted", {**PRESETS["best"], "min_rows": 0}),  # best without written rows
        _recipe("sft+rows", {"method": "sft", **_ROWS}),
        _recipe("kd+rows", {"method": "kd", **_ROWS}),
        _recipe("sft+kd+rows", {"method": "kd", "label_weight": 1.0, **_ROWS}),  # without alignment
        *(_recipe(f"preset:{name}", settings) for name, settings in PRESETS.items()),
    )
}

_OWN_RATES = ("laten",)  # what trains is a network, not the delta


def recipes(
    methods: Sequence[str | Recipe], learning_rates: Sequence[float] | None = None
) -> list[Recipe]:
    """Look up recipes by name, with other ``learning_rates`` to try where these are given.

    Raises :class:`ConfigError` for an unknown or repeated name, or a rate that is none.
    """
    found = []
    for method in methods:
        if isinstance(method, str) and method not in RECIPES:
            raise ConfigError(f"method {method!r} is unknown: choose from {', '.join(RECIPES)}")
        found.append(_named(method, learning_rates) if isinstance(method, str) else method)
    names = [recipe.name for recipe in found]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"methods={','.join(names)}: give at least one, each once")
    return found


def _named(name: str, learning_rates: Sequence[float] | None) -> Recipe:
    recipe = RECIPES[name]
    if learning_rates is None or name in _OWN_RATES or "learning_rate" not in recipe.tuned:
        return recipe
    if not learning_rates:
        raise ConfigError("learning_rates is empty: give at least one rate to try")
    for rate in learning_rates:
        recipe.config(learning_rate=rate)
    return replace(recipe, tuned={**recipe.tuned, "learning_rate": tuple(learning_rates)})


def trials(recipe: Recipe, budget: int) -> list[dict[str, Any]]:
    """The first ``budget`` points of the recipe's grid, in an order that changes every field early.

    A recipe with a smaller grid gets all of it.
    """
    fields = list(recipe.tuned)
    sizes = [len(recipe.tuned[name]) for name in fields]
    diagonals = (
        (i, *((i + turn * step) % size for step, size in enumerate(sizes[1:], 1)))
        for turn in range(max(sizes))
        for i in range(sizes[0])
    )
    points = dict.fromkeys((*diagonals, *itertools.product(*map(range, sizes))))
    return [
        {name: recipe.tuned[name][i] for name, i in zip(fields, point, strict=True)}
        for point in itertools.islice(points, budget)
    ]
