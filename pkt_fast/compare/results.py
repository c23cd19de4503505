"""What a comparison found: scores of every run, their intervals, and the table that shows them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from .._files import atomic_directory, local, write_json
from ..errors import ConfigError


@dataclass(frozen=True)
class Scores:
    """What is measured of one model on held-out rows.

    Attributes:
        next_token_loss, token_accuracy, exact_match: on the test rows.
        source_kl, source_top1: agreement with the source there.
        other_loss: next-token loss on other text; it rises by what was forgotten.
        gap_closed: (loss before − loss) / (loss before − source's loss); 1: as good as the source.
        seconds: wall time of the transfer.
        peak_bytes: highest resident memory of the process during it.
        parameters: numbers in the adapter.
    """

    next_token_loss: float
    token_accuracy: float
    exact_match: float | None
    source_kl: float
    source_top1: float
    other_loss: float | None
    gap_closed: float | None = None
    seconds: float | None = None
    peak_bytes: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class MethodResult:
    """One method: the trials, what was chosen, and the scores from every seed."""

    name: str
    trials: list[dict[str, Any]]
    chosen: dict[str, Any]
    validation_loss: float
    runs: list[Scores]

    def mean(self, measure: str) -> tuple[float, float] | None:
        """Mean and half-width of the 95 % confidence interval over seeds (0 for a single one)."""
        return mean_interval([getattr(run, measure) for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    """All methods on one pair, and the two models they lie between."""

    settings: dict[str, Any]
    source: Scores
    target: Scores
    methods: list[MethodResult]
    environment: dict[str, Any] = field(default_factory=dict)

    def header(self) -> list[str]:
        """Column titles of the table."""
        return ["method", "chosen on validation", *(column.title for column in _COLUMNS)]

    def rows(self) -> list[list[str]]:
        """The table: source, target before, then the methods by test loss."""
        rows = [
            [name, "", *(_cell(mean_interval([getattr(scores, c.field)]), c) for c in _COLUMNS)]
            for name, scores in (("source", self.source), ("target before", self.target))
        ]
        for result in sorted(self.methods, key=lambda m: m.mean("next_token_loss") or (math.inf,)):
            chosen = ", ".join(f"{_SHORT.get(k, k)} {v:g}" for k, v in result.chosen.items())
            cells = [_cell(result.mean(column.field), column) for column in _COLUMNS]
            rows.append([result.name, chosen, *cells])
        return rows

    def table(self) -> Table:
        """The table for a terminal."""
        notes = escape("\n".join(self.notes()))
        table = Table(*self.header(), title=self.title(), caption=notes, caption_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table

    def title(self) -> str:
        """One line on what was held equal."""
        s = self.settings
        return (
            f"{s['examples']} rows, labels {s['labels']}, {s['steps']} steps of "
            f"{s['batch_size']}, {s['budget']} trials a method, {len(s['seeds'])} seeds, "
            f"{s['test_rows']} test rows; mean ± 95 % interval"
        )

    def notes(self) -> list[str]:
        """One line for every way in which methods spend the steps otherwise than the rest."""
        recipes = self.settings.get("recipes", {})
        lines = []
        for field_name, value, note in _NOTES:
            names = [name for name, recipe in recipes.items() if recipe.get(field_name) == value]
            lines += [f"{', '.join(names)}: {note}"] if names else []
        return lines

    def markdown(self) -> str:
        """The table as Markdown, with its notes."""
        lines = [self.header(), ["---"] * len(self.header()), *self.rows()]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{self.title()}\n\n{table}" + "".join(f"\n{note}\n" for note in self.notes())

    def as_dict(self) -> dict[str, Any]:
        """Everything with JSON types."""
        return asdict(self)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write comparison.json and comparison.md; both appear or none."""
        with atomic_directory(directory, overwrite=overwrite) as temporary:
            write_json(temporary / "comparison.json", self.as_dict())
            (temporary / "comparison.md").write_text(self.markdown(), encoding="utf-8")
        return local(directory)


@dataclass(frozen=True)
class _Column:
    """How a field of :class:`Scores` is shown."""

    title: str
    field: str
    digits: int
    factor: float = 1.0


_COLUMNS = (
    _Column("loss", "next_token_loss", 4),
    _Column("token acc. %", "token_accuracy", 2, 100),
    _Column("exact %", "exact_match", 1, 100),
    _Column("gap closed %", "gap_closed", 1, 100),
    _Column("KL to source", "source_kl", 3),
    _Column("top-1 as source %", "source_top1", 1, 100),
    _Column("other text loss", "other_loss", 3),
    _Column("seconds", "seconds", 1),
    _Column("peak MiB", "peak_bytes", 0, 2**-20),
    _Column("parameters", "parameters", 0),
)
_NOTES = (
    ("solver", "ridge", "solved from one pass over the rows, without steps"),
    ("warm_start", True, "solved from one pass over the rows, then trained for all steps"),
    ("schedule", "frontier", "the layers train one after the other and share the steps"),
)
_SHORT = {
    "learning_rate": "lr",
    "layer_weight": "layer",
    "label_weight": "label",
    "temperature": "temp.",
}


def _cell(value: tuple[float, float] | None, column: _Column) -> str:
    if value is None:
        return "-"
    mean, half = (part * column.factor for part in value)
    return f"{mean:,.{column.digits}f}" + (f" ± {half:.{column.digits}f}" if half else "")


# Student's t at 97.5 % by degrees of freedom; beyond the list the normal quantile is close enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def mean_interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half-width of its 95 % confidence interval (Student's t); None without numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return mean, 0.0
    t = _T[len(known) - 2] if len(known) - 2 < len(_T) else 1.96
    return mean, t * statistics.stdev(known) / math.sqrt(len(known))


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Read a comparison.json.  Raises :class:`ConfigError` when it is none."""
    try:
        value = json.loads(local(path).read_text(encoding="utf-8"))
        return Comparison(
            value["settings"],
            Scores(**value["source"]),
            Scores(**value["target"]),
            [
                MethodResult(**{**method, "runs": [Scores(**run) for run in method["runs"]]})
                for method in value["methods"]
            ],
            value["environment"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a comparison: {error}") from error
