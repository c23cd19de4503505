"""Every method on equal terms: same pair, rows, steps, seeds and tuning budget, one table.

A *recipe* names settings of :func:`pkt_fast.transfer` and the loss weights worth tuning.  Each
recipe gets the same number of trials; a trial trains once and is scored by the next-token loss on
validation rows.  The best settings then train from every seed, and only these models meet the test
rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ._files import atomic_directory, check_output_dir, local, write_json
from .config import PRESETS, STEADY, TransferConfig
from .data.reading import read_rows
from .demo import bundled_rows
from .errors import ConfigError
from .evaluation import agreement, evaluate
from .loading import load_model, load_tokenizers, resolve_device, resolve_dtype
from .progress import Phases
from .report import machine, peak_memory, versions
from .transfer import TransferResult, transfer
from .writing import answer_rows, question_of, write_rows

LABELS = ("given", "none", "source")
LEARNING_RATES = (1e-3, 3e-3, 3e-4, 1e-2)
_MIDDLE_RATES = (3e-3, 1e-3, 1e-2)  # with a weight to tune beside
_WEIGHTS = (1.0, 0.3, 3.0)
_ROWS = {"min_rows": PRESETS["best"]["min_rows"]}
_ALIGN = {"layers": "all", "output_loss": "kl", "interface": "block", "objective": "squared"}

# --------------------------------------------------------------------------- recipes


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
        _recipe("sft", {"method": "sft"}),
        _recipe("kd", {"method": "kd"}),
        _recipe("sft+kd", {"method": "kd"}, label_weight=_WEIGHTS),
        _recipe("hidden_kd", {"method": "hidden_kd"}, layer_weight=_WEIGHTS),
        _recipe("seeking", {"method": "seeking"}),
        Recipe("laten", {"method": "laten"}, {"learning_rate": (3e-5, 3e-4, 3e-3, 1e-3)}),
        _recipe(
            "kd+dual",
            {**_ALIGN, "objective": "cosine", "interface": "mlp", "recompose": "dual"},
            layer_weight=(0.3, 0.1, 1.0),
        ),
        _recipe(
            "kd+relation",
            {**_ALIGN, "objective": "relation", "interface": "contribution", "recompose": "dual"},
            layer_weight=(1.0, 0.3, 3.0),
        ),
        _recipe("kd+fitted", {**_ALIGN, "recompose": "fitted"}, layer_weight=(1.0, 0.3, 5.0)),
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
    if learning_rates is None or name in _OWN_RATES:
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


# --------------------------------------------------------------------------- results


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
        table = Table(*self.header(), title=self.title())
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

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.header(), ["---"] * len(self.header()), *self.rows()]
        return f"{self.title()}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

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


# --------------------------------------------------------------------------- the comparison


def compare(
    src: nn.Module | str | os.PathLike[str],
    tgt: nn.Module | str | os.PathLike[str],
    data: Any = None,
    methods: Sequence[str | Recipe] = ("sft", "kd", "sft+kd", "hidden_kd", "paper"),
    *,
    validation: Any = None,
    test: Any = None,
    other: Any = None,
    tokenizer: Any = None,
    source_base: nn.Module | str | os.PathLike[str] | None = None,
    examples: int | None = None,
    labels: str = "given",
    seeds: Sequence[int] = (0, 1, 2),
    tune_budget: int = 4,
    learning_rates: Sequence[float] | None = None,
    generate: bool = True,
    max_new_tokens: int = 64,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Run ``methods`` (names in :data:`RECIPES`, or recipes) on one pair, on equal terms.

    Args:
        src: the source: a model, a path or a hub id.
        tgt: the target likewise; its weights end as they were.
        data: rows to train on; None takes the bundled problems, also to validate and test on.
        methods: what to compare.
        validation: rows that choose rates and weights; None sets a fifth of ``data`` apart.
        test: rows that are only scored; None sets a fifth of ``data`` apart.
        other: other text, to see what is forgotten; bundled when ``data`` is None.
        tokenizer: for both models, or a pair; None loads them.
        source_base: the source before its fine-tuning, for recipes that transfer the change.
        examples: rows each seed draws from ``data``; None takes all.
        labels: "given", "none" (recipes whose losses need labels are refused) or "source" (replies
            written by the source replace those of the training rows).
        seeds: each sets the adapter's initialisation, the batch order and the rows drawn.
        tune_budget: trials for every recipe, on the first seed.
        learning_rates: rates to try, most likely first, in place of those of the named recipes
            (laten keeps its own): what is best depends on the size of the target.
        generate: whether test replies are generated, for the exact match.
        max_new_tokens: longest generated reply.
        output_dir: where to write comparison.json and comparison.md.
        overwrite: replace a non-empty output directory.
        progress: show progress bars when stderr is a terminal.
        **settings: fields of :class:`TransferConfig` shared by every recipe (epochs, ...), on top
            of :data:`~pkt_fast.config.STEADY`; a recipe's own settings and trials go first.  All
            train for as many steps as the epochs make of the given rows, also on more rows that
            the source wrote.

    Raises:
        PktFastError: every refusal, before anything is trained.
    """
    chosen = recipes(methods, learning_rates)
    settings = {**STEADY, **settings}
    if labels not in LABELS:
        raise ConfigError(f"labels={labels!r}: choose one of {', '.join(LABELS)}")
    if tune_budget < 1 or not seeds:
        raise ConfigError("compare needs at least one trial (tune_budget) and one seed")
    _check_recipes(chosen, labels, source_base, settings)
    if output_dir is not None:
        check_output_dir(output_dir, overwrite)
    arena = _Arena.start(
        src, tgt, tokenizer, source_base, settings,
        rows=_split(data, validation, test, other),
        generate=generate, max_new_tokens=max_new_tokens, progress=progress,
    )  # fmt: skip
    if labels == "source":
        arena.answer_by_source()
    rows = min(len(arena.train_rows), examples or len(arena.train_rows))
    shared = TransferConfig.make(settings)
    steps = shared.steps or shared.epochs * math.ceil(rows / shared.batch_size)
    arena.settings["steps"] = steps
    source, target = arena.score(arena.source), arena.score(arena.target)
    results = [
        arena.run(recipe, trials(recipe, tune_budget), seeds, examples, source, target)
        for recipe in chosen
    ]
    comparison = Comparison(
        settings={
            "examples": rows,
            "labels": labels,
            "seeds": list(seeds),
            "budget": tune_budget,
            "steps": steps,
            "batch_size": shared.batch_size,
            "validation_rows": len(arena.validation_rows),
            "test_rows": len(arena.test_rows),
            "recipes": {r.name: {**r.settings, "change": r.change} for r in chosen},
            "shared": {k: v for k, v in shared.as_dict().items() if k in settings},
        },
        source=source,
        target=target,
        methods=results,
        environment={"versions": versions(), "machine": machine()},
    )
    if output_dir is not None:
        comparison.save(output_dir, overwrite=overwrite)
    return comparison


def _check_recipes(
    chosen: Sequence[Recipe], labels: str, source_base: Any, settings: Mapping[str, Any]
) -> None:
    for recipe in chosen:
        recipe.config(**settings)
        if labels == "none" and recipe.uses_labels:
            raise ConfigError(
                f"method {recipe.name!r} trains on labels: leave it out, or use labels='source'"
            )
        if recipe.change and source_base is None:
            raise ConfigError(
                f"method {recipe.name!r} transfers what fine-tuning changed: give source_base"
            )


Rows = list[dict[str, Any]]


def _split(data: Any, validation: Any, test: Any, other: Any) -> dict[str, Rows]:
    """Rows by role; a role that was not given takes a fifth of ``data``, shuffled once."""
    if data is None:
        named = {"train": "train", "validation": "validation", "test": "test", "other": "other"}
        given = {"validation": validation, "test": test, "other": other}
        return {
            role: read_rows(given.get(role) or bundled_rows(split))[0]
            for role, split in named.items()
        }
    rows = list(read_rows(data)[0])
    Random(0).shuffle(rows)
    parts: dict[str, Rows] = {"other": [] if other is None else read_rows(other)[0]}
    fifth = max(1, len(rows) // 5)
    for role, given_rows in (("validation", validation), ("test", test)):
        if given_rows is not None:
            parts[role] = read_rows(given_rows)[0]
        else:
            parts[role], rows = rows[:fifth], rows[fifth:]
    if not rows:
        raise ConfigError("compare: too few rows to set validation and test rows apart; give them")
    return parts | {"train": rows}


@dataclass(eq=False)
class _Arena:
    """The pair, the rows and the settings that every method shares."""

    source: nn.Module
    target: nn.Module
    source_base: nn.Module | None
    tokenizers: tuple[Any, Any]
    settings: dict[str, Any]
    train_rows: Rows
    validation_rows: Rows
    test_rows: Rows
    other_rows: Rows
    generate: bool
    max_new_tokens: int
    phases: Phases
    written: dict[tuple[int, int], tuple[Rows, float]] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        src: Any,
        tgt: Any,
        tokenizer: Any,
        source_base: Any,
        settings: Mapping[str, Any],
        *,
        rows: Mapping[str, Rows],
        generate: bool,
        max_new_tokens: int,
        progress: bool,
    ) -> _Arena:
        config = TransferConfig.make(settings)
        device = resolve_device(config.device)
        options: dict[str, Any] = {
            "dtype": resolve_dtype(config.dtype, device),
            "trust_remote_code": config.trust_remote_code,
        }
        tokenizers = load_tokenizers(
            tokenizer, src, tgt, trust_remote_code=config.trust_remote_code
        )
        base = None
        if source_base is not None:
            base = load_model(source_base, role="source base", **options).eval()
        return cls(
            load_model(src, role="source", **options).to(device).eval(),
            load_model(tgt, role="target", **options).to(device).eval(),
            base,
            tokenizers,
            dict(settings),
            rows["train"],
            rows["validation"],
            rows["test"],
            rows["other"],
            generate,
            max_new_tokens,
            Phases(progress),
        )

    def answer_by_source(self) -> None:
        """Replace the replies of the training rows by the source's own, greedy ones."""
        with self.phases.phase("source replies", len(self.train_rows)) as update:
            self.train_rows = answer_rows(
                self.source, self.train_rows, self.tokenizers[0],
                max_new_tokens=self.max_new_tokens, advance=lambda done: update(done, ""),
            )  # fmt: skip

    def run(
        self,
        recipe: Recipe,
        points: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        examples: int | None,
        source: Scores,
        target: Scores,
    ) -> MethodResult:
        """Choose settings on the validation rows, then train and test from every seed."""
        tried = []
        with self.phases.phase(recipe.name, len(points) + len(seeds)) as update:
            for point in points:
                result, _ = self._transfer(recipe, point, seeds[0], examples)
                loss = evaluate(
                    result.model, self.validation_rows, self.tokenizers[1], generate=False
                ).next_token_loss
                self._restore(result)
                tried.append({**point, "validation_loss": loss})
                update(1, f"validation {loss:.4f}")
            best = min(range(len(points)), key=lambda i: tried[i]["validation_loss"])
            runs = []
            for seed in seeds:
                with peak_resident() as peak:
                    result, seconds = self._transfer(recipe, points[best], seed, examples)
                scores = self.score(result.model)
                parameters = result.delta.num_parameters
                self._restore(result)
                gap = target.next_token_loss - source.next_token_loss
                runs.append(
                    Scores(
                        **{
                            **asdict(scores),
                            "gap_closed": (target.next_token_loss - scores.next_token_loss) / gap,
                            "seconds": seconds,
                            "peak_bytes": peak[0],
                            "parameters": parameters,
                        }
                    )
                )
                update(1, f"test {scores.next_token_loss:.4f}")
        return MethodResult(recipe.name, tried, points[best], tried[best]["validation_loss"], runs)

    def _transfer(
        self, recipe: Recipe, point: Mapping[str, Any], seed: int, examples: int | None
    ) -> tuple[TransferResult, float]:
        """Train once; the seconds hold the writing of rows, whichever recipe came first."""
        rows = self.train_rows
        if examples is not None and examples < len(rows):
            rows = Random(seed).sample(rows, examples)
        config = {**self.settings, **recipe.settings, **point, "seed": seed}
        written, writing = self._written_by_source(rows, config.pop("min_rows", 0), seed)
        started = time.perf_counter()
        result = transfer(
            self.source,
            self.target,
            [*rows, *written],
            tokenizer=self.tokenizers,
            progress=False,
            config=config,
            source_base=self.source_base if recipe.change else None,
        )
        return result, writing + time.perf_counter() - started

    def _written_by_source(self, rows: Rows, wanted: int, seed: int) -> tuple[Rows, float]:
        """Rows that every recipe gets alike, none with a held-out question, and their seconds."""
        count = wanted - len(rows)
        if count <= 0:
            return [], 0.0
        if (seed, count) not in self.written:
            started = time.perf_counter()
            new = write_rows(
                self.source, rows, self.tokenizers[0], count,
                max_new_tokens=self.max_new_tokens, batch_size=64, seed=seed,
            )  # fmt: skip
            held_out = {question_of(row) for row in (*self.validation_rows, *self.test_rows)}
            new = [row for row in new if question_of(row) not in held_out]
            self.written[seed, count] = new, time.perf_counter() - started
        return self.written[seed, count]

    def _restore(self, result: TransferResult) -> None:
        """Take the adapter off; the target's own weights never changed."""
        self.target = result.model.unload()  # type: ignore[operator]

    def score(self, model: nn.Module) -> Scores:
        """Everything that is measured of a model; its speed and size come with its training."""
        own = self.tokenizers[0] if model is self.source else self.tokenizers[1]
        found = evaluate(
            model, self.test_rows, own,
            generate=self.generate, max_new_tokens=self.max_new_tokens, batch_size=50,
        )  # fmt: skip
        agrees = agreement(model, self.source, self.test_rows, (own, self.tokenizers[0]))
        forgot = None
        if self.other_rows:
            forgot = evaluate(model, self.other_rows, own, generate=False).next_token_loss
        return Scores(
            found.next_token_loss,
            found.token_accuracy,
            found.exact_match,
            agrees.kl,
            agrees.top1,
            forgot,
        )


@contextlib.contextmanager
def peak_resident() -> Iterator[list[float]]:
    """Yield a list whose one number becomes the highest resident memory inside, in bytes.

    Linux can set its high-water mark back; elsewhere this is the peak of the process so far.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    peak = [0.0]
    yield peak
    peak[0] = float(peak_memory()["host_bytes"])
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                peak[0] = float(line.split()[1]) * 1024


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
