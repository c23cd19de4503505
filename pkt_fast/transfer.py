"""The pipeline: attribute → pair → align → steer → save, in the order of the paper's method
section.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import atomic_directory, check_output_dir, local, write_json
from .anatomy import Anatomy
from .attribution import attribute
from .capture import Wanted
from .config import TransferConfig
from .data import ExampleSet, check_rows, encode, read_rows
from .delta import LayerDelta
from .errors import ConfigError, ModelError
from .lending import differentiable, lent
from .loading import (
    check_dtype,
    check_token_ids,
    load_model,
    load_tokenizers,
    pad_token_id,
    resolve_device,
    resolve_dtype,
)
from .maps import (
    FITTED_RECOMPOSITIONS,
    Alignment,
    LatentMap,
    PairedModels,
    UntunedRows,
    build_maps,
    check_change,
    judge_maps,
    map_digest,
    split_examples,
)
from .methods import DeltaMaker, MethodInputs, delta_maker
from .objectives import (
    LEARNED_OBJECTIVES,
    FrozenHead,
    needs_source_head,
    needs_target_head,
    training_terms,
)
from .ops import backend
from .ops.linear import own_products
from .page import write_html
from .pairing import LayerPair, pair_by_score, source_for
from .phases import (
    HEAD,
    INPUT,
    AlignedPositions,
    StorePlace,
    layer_column,
    longest_first,
    processing_batches,
    run_prefix,
    run_source,
)
from .progress import Phases
from .report import loss_names, transfer_report
from .ridge import RidgeMaker, output_projections, solve_layers
from .steering import (
    Loader,
    Record,
    Tail,
    plan_steps,
    train,
)
from .stores import ActivationStore, model_fingerprint
from .vocabulary import SharedVocabulary, match_vocabularies
from .writing import answer_rows, write_rows


@dataclass
class TransferResult:
    """What a transfer made.

    Attributes:
        model: the target with the adapter attached (a PEFT model), ready to generate.
        tokenizer: the target's tokenizer.
        delta: the adapter as a :class:`~pkt_fast.LayerDelta`.
        pairs: the layer pairs, 0-based.
        attribution: (L_src,) scores, or None when layers were given.
        history: one record a step: step, epoch, learning_rate and every loss.
        report: settings, data, timings by phase, memory, versions, op implementations.
    """

    model: nn.Module
    tokenizer: Any
    delta: LayerDelta
    pairs: list[LayerPair]
    attribution: Tensor | None
    history: list[Record]
    report: dict[str, Any]

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the PEFT adapter, report.json and report.html; all of it appears or nothing
        does.
        """
        with atomic_directory(directory, overwrite=overwrite) as temporary:
            self.delta.write_into(temporary)
            write_json(temporary / "report.json", {**self.report, "history": self.history})
            write_html(temporary / "report.html", self.report, self.history)
        return local(directory)


def transfer(
    src: nn.Module | str | os.PathLike[str],
    tgt: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    tokenizer: Any = None,
    source_base: nn.Module | str | os.PathLike[str] | None = None,
    config: TransferConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    preset: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> TransferResult:
    """Move knowledge from ``src`` into ``tgt``: SemAlign (arXiv 2510.24208), by default as
    published.

    Args:
        src: source model, a hub id or a path.
        tgt: target model, a hub id or a path.  A model given as an object is wrapped in place: its
            LoRA sits in ``result.model``, its own weights do not change, and after an error it is
            as it was.  It must not carry an adapter already.
        data: JSONL path, list of rows, or datasets.Dataset; rows are {"messages"}, {"prompt",
            "completion"} or {"text"}.  None takes a small bundled set.
        tokenizer: one for both models, or a pair (source, target); None loads them from the models'
            paths.
        source_base: the source before its fine-tuning, a model, a hub id or a path.  With it the
            target's layers are supervised by their own activation plus the mapped *change* that
            fine-tuning made in the source.
        config: settings as a :class:`TransferConfig`, a mapping or a JSON file.
        preset: named settings to start from ("paper" is the default).
        output_dir: where to write the PEFT adapter, report.json and report.html.
        progress: show progress bars when stderr is a terminal.
        **overrides: single fields of :class:`TransferConfig`.

    Transfers may run in threads, each on models of its own; the random state and
    :func:`pkt_fast.backend` are the process's, so only transfers that run alone repeat themselves.

    Raises:
        PktFastError: every refusal, with one line that says what is wrong and what to do.
    """
    settings = TransferConfig.make(config, preset, **overrides)
    if output_dir is not None:
        check_output_dir(output_dir, settings.overwrite)
    with computing_as(settings), lent(src, source_base, kept=tgt), differentiable():
        run = _Run.start(src, tgt, data, tokenizer, settings, progress, source_base)
        result = run.transfer()
    if output_dir is not None:
        result.save(output_dir, overwrite=settings.overwrite)
    return result


@contextlib.contextmanager
def computing_as(config: TransferConfig) -> Iterator[None]:
    """Inside, ops run on the backend that ``config`` names, and models multiply with what is
    fastest.

    Compiled blocks multiply as torch.compile has it.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    with backend(config.backend), own_products(on_cpu and not config.compile):
        yield


@dataclass(eq=False)
class _Run:
    """One transfer under way: the models, the data and the settings it goes by."""

    config: TransferConfig
    phases: Phases
    device: torch.device
    source: nn.Module
    target: nn.Module
    tokenizers: tuple[Any, Any]
    examples: ExampleSet
    aligned: AlignedPositions
    vocabulary: SharedVocabulary
    owns_source: bool
    source_base: nn.Module | None = None
    pairs: list[LayerPair] = field(default_factory=list)
    scores: Tensor | None = None
    alignment: list[Alignment] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        src: Any,
        tgt: Any,
        data: Any,
        tokenizer: Any,
        config: TransferConfig,
        progress: bool,
        source_base: Any = None,
    ) -> _Run:
        """Load everything and check that it fits together, before any work is done."""
        if source_base is not None:
            check_change(config)
        phases = Phases(progress)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        with phases.phase("read data", 1):
            tokenizers = load_tokenizers(
                tokenizer, src, tgt, trust_remote_code=config.trust_remote_code
            )
            writes = config.labels == "source" or config.source_rows > 0
            if writes:
                rows, origin = read_rows(data, limit=config.limit)
                if config.labels == "given":
                    check_rows(rows, origin)
            else:
                examples = encode(
                    data, tokenizers[1], max_length=config.max_length, limit=config.limit
                )
        with phases.phase("load", 1):
            options: dict[str, Any] = {
                "dtype": dtype,
                "trust_remote_code": config.trust_remote_code,
            }
            source = load_model(src, role="source", **options)
            target = load_model(tgt, role="target", **options)
            base: nn.Module | None = None
            if source_base is not None:
                base = load_model(source_base, role="source_base", **options).eval()
                _check_base(Anatomy.of(base), Anatomy.of(source))
        for model, role in ((source, "source"), (target, "target"), (base, "source_base")):
            if model is not None:
                check_dtype(model, config.dtype, role)
        _check_unadapted(target)
        vocabulary = match_vocabularies(
            Anatomy.of(source).vocab_size, Anatomy.of(target).vocab_size, *tokenizers
        )
        _check_layers(config, Anatomy.of(target))
        if writes:
            rows = _with_written(rows, source.eval().to(device), tokenizers[0], config, phases)
            examples = encode(rows, tokenizers[1], max_length=config.max_length)
        aligned = AlignedPositions.between(examples, *tokenizers)
        check_token_ids(source, aligned.examples, "source")
        check_token_ids(target, examples, "target")
        return cls(
            config,
            phases,
            device,
            source.eval(),
            target.eval(),
            tokenizers,
            examples,
            aligned,
            vocabulary,
            owns_source=not isinstance(src, nn.Module),
            source_base=base,
        )

    def transfer(self) -> TransferResult:
        """Attribute, pair, align, steer."""
        self.source.to(self.device)
        self._pair()
        self._check_adaptable()
        maps = self._map()
        supervision = self._source_pass(maps)
        source_head = None
        if needs_source_head(self.config):
            anatomy = Anatomy.of(self.source)
            source_head = FrozenHead.of(anatomy.head, anatomy.head_transform())
        maker = self._delta_maker()
        self._release_source()
        self.target.to(self.device)
        model, history = self._steer(maker, supervision, source_head)
        delta = LayerDelta.from_peft(model)
        return TransferResult(
            model=model,
            tokenizer=self.tokenizers[1],
            delta=delta,
            pairs=self.pairs,
            attribution=self.scores,
            history=history,
            report=transfer_report(
                self.config,
                self.device,
                self.phases.clock,
                pairs=self.pairs,
                scores=self.scores,
                examples=self.examples,
                alignment=self.alignment,
                shared_tokens=len(self.vocabulary),
                history=history,
                trained_parameters=delta.num_parameters,
                store_bytes=0 if supervision is None else supervision.num_bytes,
                delta=maker.report(),
            ),
        )

    def diagnose(self) -> list[Alignment]:
        """Attribute, pair, align; then say how well the maps predict the target."""
        self.source.to(self.device)
        self._pair()
        self._map()
        return self.alignment

    # ----------------------------------------------------------------- attribute and pair

    def _pair(self) -> None:
        """Paper, "layer attribution" and "layer pairing"."""
        source_layers = Anatomy.of(self.source).num_layers
        target_layers = Anatomy.of(self.target).num_layers
        chosen = self.config.layers
        if chosen == "all":
            chosen = tuple(range(target_layers))
        if chosen is not None:
            self.pairs = [source_for(source_layers, target_layers, int(k)) for k in chosen]
            return
        picked = self.aligned.examples[: self.config.attribution_examples]
        order = longest_first(picked)
        tokens = sum(map(len, picked))
        with self.phases.phase("attribute", tokens) as update:
            batches = processing_batches(
                picked, order, self.config.micro_batch_size, pad_token_id(self.tokenizers[0])
            )

            def counted() -> Any:
                for batch in batches:
                    yield batch
                    update(batch.num_tokens, "")

            self.scores = attribute(
                self.source,
                counted(),
                interface=self.config.interface,
                reduction=self.config.reduction,
            )
        self.phases.clock.count("attribute", tokens)
        self.pairs = pair_by_score(
            source_layers, target_layers, self.scores.tolist(), self.config.num_layers
        )

    # ----------------------------------------------------------------- align

    def _map(self) -> dict[int, LatentMap]:
        """Paper, "semantic basis" and "decompose and recompose": a map for every target layer."""
        if self.config.objective in ("none", *LEARNED_OBJECTIVES):
            return {}
        fit_on, held_out = split_examples(
            len(self.examples), self.config.fit_examples, self.config.seed
        )
        if self.config.recompose not in FITTED_RECOMPOSITIONS:
            fit_on = []
        untuned = self.source if self.source_base is None else self.source_base
        with self._visiting(untuned, self.target):
            models = PairedModels(
                untuned,
                self.target,
                self.aligned,
                AlignedPositions.same(self.examples),
                self.pairs,
                self.config.interface,
                self.config.micro_batch_size,
                (pad_token_id(self.tokenizers[0]), pad_token_id(self.tokenizers[1])),
                self.vocabulary,
            )
            with self.phases.phase("semantic map", models.num_tokens(fit_on)) as update:
                built = build_maps(models, self.config, fit_on, lambda done: update(done, ""))
            with self.phases.phase("judge map", models.num_tokens(held_out)) as update:
                self.alignment = judge_maps(models, built, held_out, lambda done: update(done, ""))
        return built.maps

    @contextlib.contextmanager
    def _visiting(self, *models: nn.Module) -> Iterator[None]:
        """Have ``models`` on the device for the block, then where they were before.

        The source makes room for them and comes back, unless it is one of them.
        """
        homes = [next(model.parameters()).device for model in models]
        away = not any(model is self.source for model in models)
        if away:
            self.source.to("cpu")
        for model in models:
            model.to(self.device)
        try:
            yield
        finally:
            for model, home in zip(models, homes, strict=True):
                model.to(home)
            if away:
                self.source.to(self.device)

    def _source_pass(self, maps: Mapping[int, LatentMap]) -> ActivationStore | None:
        """Run the source once; keep aligned activations, and its head input if a loss needs it."""
        supervised = self.config.objective != "none"
        wanted = [Wanted.of_pair(pair) for pair in self.pairs] if supervised else []
        with_head = needs_source_head(self.config)
        if not wanted and not with_head:
            return None
        source, target = Anatomy.of(self.source), Anatomy.of(self.target)
        width = target.hidden_size if maps else source.hidden_size
        dtype = target.head.weight.dtype
        columns = {layer_column(want.key): (width, dtype) for want in wanted}
        if with_head:
            columns[HEAD] = (source.hidden_size, source.head.weight.dtype)
        tokens = sum(map(len, self.aligned.examples))
        by_column = {layer_column(layer): mapping for layer, mapping in maps.items()}

        def fill(store: ActivationStore) -> None:
            untuned = self._untuned(wanted) if maps and self.source_base is not None else None
            with self.phases.phase("source pass", tokens) as update:
                passed = run_source(
                    self.source,
                    self.aligned,
                    wanted,
                    self.config.interface,
                    batch_size=self.config.micro_batch_size,
                    pad_token_id=pad_token_id(self.tokenizers[0]),
                    with_head=with_head,
                    advance=lambda done: update(done, ""),
                )
                for rows in passed:
                    for name in rows.keys() & by_column.keys():
                        if untuned is None:
                            rows[name] = by_column[name](rows[name])
                        else:
                            at = store.columns[name].filled
                            rows[name] = untuned.moved(by_column[name], name, rows[name], at)
                    store.append(rows)
            self.phases.clock.count("source pass", tokens)

        fingerprint = {
            "source": model_fingerprint(self.source),
            "data": self.examples.fingerprint(),
            "pairs": [[p.target, *p.source, p.weight] for p in self.pairs] if wanted else [],
            "interface": self.config.interface,
            "map": map_digest(maps),
            "columns": sorted(columns),
        }
        if self.source_base is not None:
            fingerprint["source_base"] = model_fingerprint(self.source_base)
            fingerprint["target"] = model_fingerprint(self.target)
        return self._place().filled(
            "source",
            [len(p) for p in self.aligned.positions],
            longest_first(self.aligned.examples),
            columns,
            fingerprint,
            fill,
        )

    def _untuned(self, wanted: Sequence[Wanted]) -> UntunedRows:
        """What the source's change starts from and what it is added to."""
        assert self.source_base is not None
        own = [Wanted(want.key, (want.key,)) for want in wanted]
        source_tokenizer, target_tokenizer = self.tokenizers
        return UntunedRows(
            self._untuned_rows("source", self.source_base, source_tokenizer, self.aligned, wanted),
            self._untuned_rows(
                "target", self.target, target_tokenizer, AlignedPositions.same(self.examples), own
            ),
        )

    def _untuned_rows(
        self,
        kind: str,
        model: nn.Module,
        tokenizer: Any,
        aligned: AlignedPositions,
        wanted: Sequence[Wanted],
    ) -> ActivationStore:
        """Rows of an untuned model, in the order in which the source pass has them."""
        anatomy = Anatomy.of(model)
        order = longest_first(self.aligned.examples)
        tokens = sum(map(len, aligned.examples))

        def fill(store: ActivationStore) -> None:
            name = f"untuned {kind}"
            with self._visiting(model), self.phases.phase(name, tokens) as update:
                passed = run_source(
                    model,
                    aligned,
                    wanted,
                    self.config.interface,
                    batch_size=self.config.micro_batch_size,
                    pad_token_id=pad_token_id(tokenizer),
                    with_head=False,
                    advance=lambda done: update(done, ""),
                    order=order,
                )
                for rows in passed:
                    store.append(rows)
            self.phases.clock.count(name, tokens)

        fingerprint = {
            "model": model_fingerprint(model),
            "data": self.examples.fingerprint(),
            "layers": [[want.key, *want.layers, want.weight] for want in wanted],
            "interface": self.config.interface,
        }
        column = (anatomy.hidden_size, anatomy.head.weight.dtype)
        return self._place().filled(
            f"untuned-{kind}",
            [len(p) for p in self.aligned.positions],
            order,
            {layer_column(want.key): column for want in wanted},
            fingerprint,
            fill,
        )

    def _release_source(self) -> None:
        """Let go of a source this run loaded itself; move a borrowed one off the GPU."""
        self.source_base = None
        if self.owns_source:
            self.source = nn.Module()
            gc.collect()
        if self.device.type == "cuda":
            self.source.to("cpu")
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------- steer

    def _delta_maker(self) -> DeltaMaker:
        """What trains: LoRA, or what the method makes of the source's weights."""
        source_tokenizer, target_tokenizer = self.tokenizers
        inputs = MethodInputs(
            self.config,
            self.source,
            self.target,
            self.pairs,
            self.aligned.examples,
            self.examples,
            (pad_token_id(source_tokenizer), pad_token_id(target_tokenizer)),
        )
        if self.config.solver == "ridge":
            return RidgeMaker(inputs)
        with self.phases.phase("prepare delta", 1):
            return delta_maker(self.config.method, inputs)

    def _steer(
        self,
        maker: DeltaMaker,
        supervision: ActivationStore | None,
        source_head: FrozenHead | None,
    ) -> tuple[nn.Module, list[Record]]:
        """Paper, "training": LoRA on the paired layers, against the two losses."""
        history: list[Record] = []
        joint = self.config.schedule == "joint"
        try:
            model = maker.attach(self.target)
            with _checkpointing(model, self.config.gradient_checkpointing):
                # The frontier goes from shallow to deep; earlier layers stay as trained.
                for layers in [maker.layers] if joint else [[layer] for layer in maker.layers]:
                    history += self._stage(
                        maker, model, layers, supervision, source_head, len(history)
                    )
            return maker.finish(model), history
        except BaseException:
            maker.abandon()
            raise

    def _stage(
        self,
        maker: DeltaMaker,
        model: nn.Module,
        layers: Sequence[int],
        supervision: ActivationStore | None,
        source_head: FrozenHead | None,
        first_step: int,
    ) -> list[Record]:
        """Train the adapters of ``layers`` on the tail that starts at the first of them."""
        anatomy = Anatomy.of(model)
        parameters = maker.parameters(model, layers)
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        loader = Loader(
            self.examples,
            supervision,
            self._prefix(model, layers[0]),
            self.device,
            pad_token_id(self.tokenizers[1]),
            anatomy.head.weight.dtype,
        )
        if self._solves:
            solution = self._solve(model, layers, loader, first_step)
            if self.config.solver == "ridge":
                return solution
        tail = Tail(model, layers[0], layers, self.config.interface, needs_target_head(self.config))
        terms = training_terms(
            self.config,
            layers,
            anatomy.head,
            anatomy.head_transform(),
            source_head,
            self.vocabulary,
            _supervision_width(supervision, layers),
        )
        parameters += [parameter for term in terms for parameter in term.parameters]
        planned = plan_steps(self.examples.lengths, self.config)
        visited = [self.examples.lengths[i] for s in planned for micro in s.micro for i in micro]
        name = "steer" if len(layers) == len(self.pairs) else f"steer layer {layers[0]}"
        with self.phases.phase(name, len(planned)) as update:

            def on_step(record: Record) -> None:
                update(1, " ".join(f"{k} {record[k]:.4f}" for k in loss_names([record])))

            history = train(
                tail, loader, terms, parameters, self.config, on_step=on_step, first_step=first_step
            )
        self.phases.clock.count(name, sum(visited))
        return history

    @property
    def _solves(self) -> bool:
        """Whether the closed-form solution is wanted, as the result or as a start."""
        return self.config.solver == "ridge" or self.config.warm_start

    def _check_adaptable(self) -> None:
        """Refuse, before any pass over the data, layers that have nothing to adapt, or no output
        projection where one is solved for.
        """
        target, modules = Anatomy.of(self.target), self.config.target_modules
        layers = [pair.target for pair in self.pairs]
        for layer in layers:
            target.lora_targets(layer, modules)
        if self._solves:
            output_projections(target, layers, self.config.interface, modules)

    def _solve(
        self, model: nn.Module, layers: Sequence[int], loader: Loader, first_step: int
    ) -> list[Record]:
        """The closed-form change of ``layers``, written into the adapter."""
        tokens = sum(self.examples.lengths)
        with self.phases.phase("solve", tokens) as update:
            records = solve_layers(
                model,
                layers,
                loader,
                self.config,
                advance=lambda done: update(done, ""),
                first_step=first_step,
            )
        self.phases.clock.count("solve", tokens)
        return records

    def _prefix(self, model: nn.Module, first: int) -> ActivationStore | None:
        """The input of block ``first`` for all real tokens; block 0 starts at the embeddings."""
        if first == 0:
            return None
        anatomy = Anatomy.of(model)
        tokens = sum(self.examples.lengths)

        def fill(store: ActivationStore) -> None:
            with self.phases.phase("target pass", tokens) as update:
                for rows in run_prefix(
                    model,
                    self.examples,
                    first,
                    batch_size=self.config.micro_batch_size,
                    pad_token_id=pad_token_id(self.tokenizers[1]),
                    advance=lambda done: update(done, ""),
                ):
                    store.append(rows)
            self.phases.clock.count("target pass", tokens)

        fingerprint = {
            "target": model_fingerprint(model),
            "data": self.examples.fingerprint(),
            "block": first,
        }
        return self._place().filled(
            "target",
            self.examples.lengths,
            longest_first(self.examples),
            {INPUT: (anatomy.hidden_size, anatomy.head.weight.dtype)},
            fingerprint,
            fill,
        )

    def _place(self) -> StorePlace:
        return StorePlace.of(self.config.store, self.config.store_budget_gb)


def _supervision_width(supervision: ActivationStore | None, layers: Sequence[int]) -> int | None:
    """Width of the stored rows that steer ``layers``."""
    column = None if supervision is None else supervision.columns.get(layer_column(layers[0]))
    return None if column is None else column.width


@contextlib.contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """With ``wanted``, gradient checkpointing inside; a model that had it on keeps it."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def _check_unadapted(target: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in target.modules()):
        raise ModelError(
            "the target carries a PEFT adapter, and the new one would stand on it: merge it "
            "(merge_and_unload), take it off (unload), or load the target anew"
        )


def _check_base(base: Anatomy, source: Anatomy) -> None:
    if (base.num_layers, base.hidden_size) != (source.num_layers, source.hidden_size):
        raise ModelError(
            f"source_base has {base.num_layers} layers of width {base.hidden_size}, the source has "
            f"{source.num_layers} of {source.hidden_size}: give the source before its fine-tuning"
        )


def _check_layers(config: TransferConfig, target: Anatomy) -> None:
    if isinstance(config.layers, tuple):
        wrong = [layer for layer in config.layers if layer >= target.num_layers]
        if wrong:
            raise ConfigError(
                f"layers={list(config.layers)}: target layer {wrong[0]} is out of range; the "
                f"target has layers 0 to {target.num_layers - 1}"
            )
    if config.num_layers > target.num_layers:
        raise ConfigError(
            f"num_layers={config.num_layers}: the target has {target.num_layers} layers"
        )


def _with_written(
    rows: Sequence[Mapping[str, Any]],
    source: nn.Module,
    tokenizer: Any,
    config: TransferConfig,
    phases: Phases,
) -> list[dict[str, Any]]:
    """The rows with the replies, and followed by the rows, that the source is to write."""
    known = [dict(row) for row in rows]
    at_once = 4 * config.micro_batch_size  # no graph is kept
    if config.labels == "source":
        with phases.phase("source replies", len(known)) as update:
            known = answer_rows(
                source, known, tokenizer,
                max_new_tokens=config.max_new_tokens, batch_size=at_once,
                advance=lambda done: update(done, ""),
            )  # fmt: skip
    if config.source_rows:
        with phases.phase("source rows", config.source_rows) as update:
            known += write_rows(
                source, known, tokenizer, config.source_rows,
                max_new_tokens=config.max_new_tokens, batch_size=at_once,
                seed=config.seed, advance=lambda done: update(done, ""),
            )  # fmt: skip
    return known


