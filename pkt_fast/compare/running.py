"""Running a comparison: the pair and the rows that all methods share, their trials and runs."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from .._files import check_output_dir
from ..anatomy import Anatomy
from ..config import STEADY, TransferConfig
from ..data.reading import read_rows
from ..demo import bundled_rows
from ..errors import ConfigError
from ..evaluation import agreement, evaluate
from ..loading import load_model, load_tokenizers, resolve_device, resolve_dtype
from ..progress import Phases
from ..report import machine, peak_memory, versions
from ..stages import check_budget
from ..transfer import TransferResult, transfer
from ..writing import answer_rows, question_of, write_rows
from .recipes import Recipe, recipes, trials
from .results import Comparison, MethodResult, Scores

LABELS = ("given", "none", "source")


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
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={list(seeds)}: give each once, or one run counts as several")
    if examples is not None and examples < 1:
        raise ConfigError(f"examples={examples}: give at least 1 row")
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
    depth = Anatomy.of(arena.target).num_layers
    for recipe in chosen:
        config = recipe.config(**arena.settings)
        check_budget(config, steps, config.num_steered(depth))
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
        tried, runs = [], []
        with self.phases.phase(recipe.name, len(points) + len(seeds)) as update:
            for point in points:
                loss = self._validation_loss(recipe, point, seeds[0], examples)
                tried.append({**point, "validation_loss": loss})
                update(1, f"validation {loss:.4f}")
            best = min(range(len(points)), key=lambda i: tried[i]["validation_loss"])
            for seed in seeds:
                scores = self._tested(recipe, points[best], seed, examples)
                gap = target.next_token_loss - source.next_token_loss
                closed = (target.next_token_loss - scores.next_token_loss) / gap
                runs.append(replace(scores, gap_closed=closed))
                update(1, f"test {scores.next_token_loss:.4f}")
        return MethodResult(recipe.name, tried, points[best], tried[best]["validation_loss"], runs)

    def _validation_loss(
        self, recipe: Recipe, point: Mapping[str, Any], seed: int, examples: int | None
    ) -> float:
        result, _ = self._transfer(recipe, point, seed, examples)
        found = evaluate(result.model, self.validation_rows, self.tokenizers[1], generate=False)
        self._restore(result)
        return found.next_token_loss

    def _tested(
        self, recipe: Recipe, point: Mapping[str, Any], seed: int, examples: int | None
    ) -> Scores:
        with peak_resident() as peak:
            result, seconds = self._transfer(recipe, point, seed, examples)
        scores = self.score(result.model)
        self._restore(result)
        return replace(
            scores,
            seconds=seconds,
            peak_bytes=peak[0],
            parameters=result.delta.num_parameters,
        )

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
