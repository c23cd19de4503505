"""The analysis as pictures, through the optional extra ``[plots]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

Curves = Mapping[str, Mapping[str, Sequence[float]]]

# Told apart without colour too; earlier curves are thicker, so that equal ones all stay visible.
_STYLES = (
    {"color": "#0b5fff", "marker": "o", "linestyle": "-", "linewidth": 4.0, "alpha": 0.55},
    {"color": "#d9480f", "marker": "s", "linestyle": "-", "linewidth": 2.4},
    {"color": "#111111", "marker": "^", "linestyle": "--", "linewidth": 1.2},
)
_LABELLED = 12  # the most rows or columns of a heatmap whose values are written into it


def draw_curves(path: Path, panels: Curves, label: str) -> None:
    """One panel for each entry of ``panels``, one line over layers for each of its curves.

    All panels share the vertical axis and one legend.  Raises
    :class:`~pkt_fast.errors.MissingExtraError` without matplotlib.
    """
    figure, axes = _axes(len(panels), 4.2)
    low = min(0.0, *(v for curves in panels.values() for c in curves.values() for v in c))
    lines: dict[str, Any] = {}
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for i, (curve, values) in enumerate(curves.items()):
            style = _STYLES[i % len(_STYLES)]
            (line,) = axis.plot(range(len(values)), values, markersize=5, label=curve, **style)
            lines.setdefault(curve, line)
        axis.set(title=name, xlabel="layer", ylim=(low - 0.03, 1.04))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False
    )
    _write(figure, path)


def draw_heatmaps(path: Path, matrices: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """One heatmap with values from 0 to 1 for each matrix; "a × b" names rows and columns.

    Raises :class:`~pkt_fast.errors.MissingExtraError` without matplotlib.
    """
    figure, axes = _axes(len(matrices), 3.8, integer_rows=True)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        rows, _, columns = name.partition(" × ")
        shown = axis.imshow(matrix, vmin=0, vmax=1, origin="lower", cmap="magma", aspect="auto")
        axis.set(title=name, xlabel=f"layer of {columns}", ylabel=f"layer of {rows}")
        if max(len(matrix), len(matrix[0])) <= _LABELLED:
            _label_cells(axis, matrix)
    figure.colorbar(shown, ax=axes, label="linear CKA")
    _write(figure, path)


def _label_cells(axis: Any, matrix: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            color = "black" if value > 0.6 else "white"
            text = f"{value:.2f}".removeprefix("0")
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)


def _axes(count: int, width: float, *, integer_rows: bool = False) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, MultipleLocator
    except ImportError as error:
        raise MissingExtraError("drawing figures", "matplotlib", "plots") from error
    figure = Figure(figsize=(width * count, 3.8), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        rows = MaxNLocator(integer=True) if integer_rows else MultipleLocator(0.2)
        axis.yaxis.set_major_locator(rows)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
