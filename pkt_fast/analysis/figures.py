"""The analysis as pictures, through the optional extra ``[plots]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

Curves = Mapping[str, Mapping[str, Sequence[float]]]


def draw_curves(path: Path, panels: Curves, label: str) -> None:
    """One panel for each entry of ``panels``, one line over layers for each of its curves."""
    figure, axes = _axes(len(panels), 4.6)
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for curve, values in curves.items():
            axis.plot(range(len(values)), values, marker="o", markersize=3, label=curve)
        axis.set(title=name, xlabel="layer", ylabel=label, ylim=(min(0.0, *_all(curves)), 1.02))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    _write(figure, path)


def draw_heatmaps(path: Path, matrices: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """One heatmap with values from 0 to 1 for each matrix; "a × b" names rows and columns."""
    figure, axes = _axes(len(matrices), 3.8, integer_rows=True)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        rows, _, columns = name.partition(" × ")
        shown = axis.imshow(matrix, vmin=0, vmax=1, origin="lower", cmap="magma", aspect="auto")
        axis.set(title=name, xlabel=f"layer of {columns}", ylabel=f"layer of {rows}")
        figure.colorbar(shown, ax=axis, label="linear CKA")
    _write(figure, path)


def _all(curves: Mapping[str, Sequence[float]]) -> list[float]:
    return [value for values in curves.values() for value in values]


def _axes(count: int, width: float, *, integer_rows: bool = False) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingExtraError("drawing figures", "matplotlib", "plots") from error
    figure = Figure(figsize=(width * count, 3.6), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=integer_rows))
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
