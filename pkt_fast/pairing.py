"""Layer pairing: which target layer learns from which source layer (paper, section "layer
pairing").

The paper counts layers from 1; this module takes and returns 0-based indices and converts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import ConfigError

PAIRINGS = ("interpolated", "single")


@dataclass(frozen=True)
class LayerPair:
    """One target layer and the source layer, or two, it is steered by (all 0-based).

    With two source layers (a, b) the source activation is (1 − weight)·h[a] + weight·h[b].
    """

    target: int
    source: tuple[int, ...]
    weight: float = 0.0

    def __str__(self) -> str:
        if len(self.source) == 1:
            return f"source {self.source[0]} → target {self.target}"
        a, b = self.source
        return f"source {1 - self.weight:.2f}·{a} + {self.weight:.2f}·{b} → target {self.target}"


def _check_layer(name: str, layer: int, count: int) -> None:
    if not 0 <= layer < count:
        raise ConfigError(
            f"{name} layer {layer} is out of range: the model has layers 0 to {count - 1}"
        )


def _check_counts(num_source: int, num_target: int) -> None:
    if num_source < 1 or num_target < 1:
        raise ConfigError(
            f"need at least one layer on each side, got {num_source} and {num_target}"
        )


def _check_pairing(pairing: str) -> None:
    if pairing not in PAIRINGS:
        raise ConfigError(f"pairing={pairing!r}: choose one of {', '.join(PAIRINGS)}")


def source_for(
    num_source: int, num_target: int, target: int, pairing: str = "interpolated"
) -> LayerPair:
    """The source layer, or two, paired with 0-based ``target`` layer k − 1.

    "interpolated" is the first version's rule: with u = L_src·k / L_tgt, a = max(1, min(⌊u⌋,
    L_src − 1)), b = a + 1, λ = clip(u − a, 0, 1).  "single", the second version's "exactly one
    source layer", takes ℓ(k) = max(1, ⌊u⌋) alone.

    Raises :class:`ConfigError` when ``target`` is out of range or ``pairing`` is unknown.
    """
    _check_counts(num_source, num_target)
    _check_layer("target", target, num_target)
    _check_pairing(pairing)
    if pairing == "single":
        return LayerPair(target, (_depth(num_source, num_target, target + 1) - 1,))
    u = Fraction(num_source * (target + 1), num_target)
    a = max(1, min(math.floor(u), num_source - 1))
    lam = min(max(u - a, Fraction(0)), Fraction(1))
    if lam == 0:
        return LayerPair(target, (a - 1,))
    if lam == 1:
        return LayerPair(target, (a,))
    return LayerPair(target, (a - 1, a), float(lam))


def _depth(num_source: int, num_target: int, k: int) -> int:
    """ℓ(k) = max(1, ⌊L_src·k / L_tgt⌋), both 1-based."""
    return max(1, num_source * k // num_target)


def target_for(num_source: int, num_target: int, critical: int) -> int:
    """k† = min{k : ℓ(k) ≥ ℓ*}, or the last target layer, with ℓ(k) = max(1, ⌊L_src·k / L_tgt⌋).

    ``critical`` and the result are 0-based.  Raises :class:`ConfigError` when it is out of range.
    """
    _check_counts(num_source, num_target)
    _check_layer("source", critical, num_source)
    for k in range(1, num_target + 1):
        if _depth(num_source, num_target, k) >= critical + 1:
            return k - 1
    return num_target - 1


def pair_layers(
    num_source: int,
    num_target: int,
    critical: int | Iterable[int],
    pairing: str = "interpolated",
) -> list[LayerPair]:
    """Pair every critical source layer with its target layer; the paper's rule, 0-based.

    ``critical`` is one source layer or several; target layers they share appear once.  Returns
    pairs in ascending order of target layer.  Raises :class:`ConfigError` for a layer out of range
    or an unknown ``pairing``.
    """
    layers = [critical] if isinstance(critical, int) else list(critical)
    targets = sorted({target_for(num_source, num_target, layer) for layer in layers})
    return [source_for(num_source, num_target, target, pairing) for target in targets]


def pair_by_score(
    num_source: int,
    num_target: int,
    scores: Sequence[float],
    count: int,
    pairing: str = "interpolated",
) -> list[LayerPair]:
    """Pair the ``count`` target layers reached first when source layers are taken by falling score.

    Several critical source layers can share a target layer, so more than ``count`` source layers
    may be looked at.  Ties go to the shallower layer.  Returns pairs in ascending order of target
    layer.  Raises :class:`ConfigError` for a wrong number of scores, a count out of range or an
    unknown ``pairing``.
    """
    if len(scores) != num_source:
        raise ConfigError(f"got {len(scores)} layer scores for a source of {num_source} layers")
    if not 1 <= count <= num_target:
        raise ConfigError(f"num_layers={count} is out of range: the target has {num_target} layers")
    targets: list[int] = []
    for layer in sorted(range(num_source), key=lambda i: (-scores[i], i)):
        target = target_for(num_source, num_target, layer)
        if target not in targets:
            targets.append(target)
    # With L_src < L_tgt the rule does not reach every target layer; the rest follow, shallow first.
    targets += [k for k in range(num_target) if k not in targets]
    return [source_for(num_source, num_target, k, pairing) for k in sorted(targets[:count])]
