"""Steering: train the paired target layers' LoRA on the tail of the target model.

Only the blocks from the first steered layer upwards run.  Blocks below are frozen; their output was
stored once (:mod:`pkt_fast.phases`), so no graph and no computation happens there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._random import seeded
from .anatomy import Anatomy, is_transposed
from .config import TransferConfig
from .data.batches import Batch, collate, moved
from .data.bucketing import batch_indices
from .data.examples import IGNORE_INDEX, Examples
from .errors import ModelError, NumericsError
from .objectives import Rows, WeightedTerm
from .ops.linear import own_products, owns_products
from .phases import INPUT
from .stores import ActivationStore, prefetched

Record = dict[str, float | int]
OnStep = Callable[[Record], None]

_READ_EVERY = 10  # steps between two readings of losses from a GPU
_FLOAT16_SCALE = 2.0**12  # the loss scale a float16 model starts with


# --------------------------------------------------------------------------- the adapter


def attach_lora(
    model: nn.Module,
    layers: Sequence[int],
    config: TransferConfig,
    paths: Sequence[str] | None = None,
) -> nn.Module:
    """Wrap ``model`` in PEFT with LoRA on the linear modules of ``layers`` only.

    ``config.target_modules`` names them; by default they are the paper's up, down, value and output
    projections.  ``paths`` names them in full instead.  The initialisation depends on
    ``config.seed`` alone.  Raises :class:`ModelError` for modules that PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    anatomy = Anatomy.of(model)
    names = list(paths or ()) or [
        path for layer in layers for path in anatomy.lora_targets(layer, config.target_modules)
    ]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=config.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(is_transposed(anatomy.model.get_submodule(name)) for name in names),
    )
    model.requires_grad_(False)
    with seeded(config.seed):
        try:
            wrapped: nn.Module = get_peft_model(model, lora)  # type: ignore[arg-type]
        except ValueError as error:  # a module it does not know, or one it knows to be bypassed
            raise ModelError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error
    return wrapped


def adapter_parameters(model: nn.Module, layers: Sequence[int]) -> list[nn.Parameter]:
    """The LoRA parameters inside blocks ``layers``."""
    blocks = Anatomy.of(model).layers
    return [
        parameter
        for layer in layers
        for name, parameter in blocks[layer].named_parameters()
        if "lora_" in name
    ]


# --------------------------------------------------------------------------- micro-batches


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Everything a forward pass of the tail needs, on the model's device.

    Attributes:
        batch: padded ids, mask and labels.
        hidden: input of the first steered block (B, T, D), or None to start at the embeddings.
        index: flat positions (b·T + t) of the supervised rows.
        labels: (N,) the token each row predicts.
        starts: (S + 1,) offsets of the sequences among the rows.
        supervision: stored rows (N, ·) by column.
    """

    batch: Batch
    hidden: Tensor | None
    index: Tensor
    labels: Tensor
    starts: Tensor
    supervision: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Loader:
    """Builds micro-batches from the stores, ahead of the training loop, in a thread."""

    examples: Examples
    supervision: ActivationStore | None
    inputs: ActivationStore | None
    device: torch.device
    pad_token_id: int
    dtype: torch.dtype

    def stream(self, plan: Sequence[Sequence[int]]) -> Generator[MicroBatch, None, None]:
        """Micro-batches for ``plan``, a list of example lists.

        Their copies to a GPU are in order with what the caller computes there: a thread has a
        current device and a current stream of its own.
        """
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if on_gpu else None

        def built() -> Iterator[MicroBatch]:
            for examples in plan:
                with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
                    micro = self.build(examples)
                yield micro

        return prefetched(built())

    def build(self, examples: Sequence[int]) -> MicroBatch:
        """One micro-batch, copied to the device without waiting where the device allows it."""
        batch = collate(self.examples, examples, pad_token_id=self.pad_token_id)
        targets = batch.targets.flatten()
        index = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
        counts = batch.supervised.sum(1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        supervision = (
            {}
            if self.supervision is None
            else {
                name: self._move(self.supervision.rows(name, examples))
                for name in self.supervision.columns
            }
        )
        return MicroBatch(
            batch.to(self.device, non_blocking=True),
            self._padded(batch, examples),
            self._move(index),
            self._move(targets[index]),
            self._move(starts),
            supervision,
        )

    def _padded(self, batch: Batch, examples: Sequence[int]) -> Tensor | None:
        if self.inputs is None:
            return None
        rows = self.inputs.rows(INPUT, examples)
        hidden = rows.new_zeros(*batch.input_ids.shape, rows.shape[-1])
        hidden[batch.attention_mask.bool()] = rows
        return self._move(hidden).to(self.dtype)

    def _move(self, tensor: Tensor) -> Tensor:
        return moved(tensor, self.device, non_blocking=True)


# --------------------------------------------------------------------------- the tail


@dataclass(eq=False)
class Tail:
    """The target from block ``first`` up, read at the steered ``layers``."""

    model: nn.Module
    first: int
    layers: Sequence[int]
    interface: str
    needs_head: bool
    anatomy: Anatomy = field(init=False)

    def __post_init__(self) -> None:
        self.anatomy = Anatomy.of(self.model)

    def rows(self, micro: MicroBatch) -> Rows:
        """Run the tail on a micro-batch and keep the supervised rows, with their graph."""
        values: dict[int, Tensor] = {}
        inputs = {**micro.batch.model_inputs(), "use_cache": False}
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(self._read_into(values, layer))
            if micro.hidden is not None:
                stack.enter_context(self.anatomy.resume_at(self.first, micro.hidden))
            if self.needs_head:
                head_input = stack.enter_context(self.anatomy.bypass_head())
                self.anatomy.model(**inputs)
                head = pick_rows(head_input.hidden, micro.index)
            else:
                head = None
                self.anatomy.run_until(max(self.layers), **inputs)
        return Rows(
            {layer: pick_rows(value, micro.index) for layer, value in values.items()},
            head,
            micro.labels,
            micro.starts,
            micro.supervision,
        )

    @contextlib.contextmanager
    def checkpointed(self, wanted: bool) -> Iterator[None]:
        """With ``wanted``, the tail's activations are recomputed in backward.

        torch takes function modes off in a backward pass: linear layers are told to multiply there
        as they do here.
        """

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), own_products(owns_products())

        if not wanted:
            yield
            return
        with self.anatomy.recompute_from(self.first, contexts):
            yield

    @contextlib.contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """With ``wanted``, ``torch.compile`` the blocks above ``first`` that nothing is read from.

        Blocks with hooks stay eager: hooks come and go with every batch, which would compile anew.
        """
        blocks = [
            block
            for i, block in enumerate(self.anatomy.layers)
            if wanted and i > self.first and i not in self.layers
        ]
        for block in blocks:
            block.compile(dynamic=True)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def _read_into(self, values: dict[int, Tensor], layer: int) -> RemovableHandle:
        tap = self.anatomy.tap(layer, self.interface)

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values[layer] = tap.read(args, kwargs, output).tensor()

        return tap.module.register_forward_hook(hook, with_kwargs=True)


def pick_rows(value: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of (B, T, D), or of (B·T, D) where a block flattens its tokens."""
    return value.reshape(-1, value.shape[-1]).index_select(0, index)


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class StepPlan:
    """One optimiser step: its micro-batches (example indices) and where it stands."""

    epoch: int
    micro: tuple[tuple[int, ...], ...]


def plan_steps(lengths: Sequence[int], config: TransferConfig) -> list[StepPlan]:
    """Every optimiser step of training, decided by the seed alone."""
    planned: list[StepPlan] = []
    for epoch in range(config.epochs) if config.steps is None else itertools.count():
        for indices in batch_indices(
            lengths, config.batch_size, seed=config.seed, epoch=epoch, bucket=config.bucket
        ):
            ordered = sorted(indices, key=lambda i: (-lengths[i], i))
            micro = tuple(
                tuple(ordered[start : start + config.micro_batch_size])
                for start in range(0, len(ordered), config.micro_batch_size)
            )
            planned.append(StepPlan(epoch, micro))
            if len(planned) == config.steps:
                return planned
    return planned


def share_steps(planned: Sequence[StepPlan], stages: int) -> list[Sequence[StepPlan]]:
    """``planned`` cut into ``stages`` runs of steps, as even as they get, in order."""
    cuts = [len(planned) * stage // stages for stage in range(stages + 1)]
    return [planned[start:end] for start, end in itertools.pairwise(cuts)]


def learning_rate_factor(step: int, steps: int, config: TransferConfig) -> float:
    """Multiplier of the learning rate at ``step`` (0-based) of ``steps``: warm-up, then decay."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return decay[config.learning_rate_schedule]


def train(
    tail: Tail,
    loader: Loader,
    terms: Sequence[WeightedTerm],
    parameters: Sequence[nn.Parameter],
    steps: Sequence[StepPlan],
    config: TransferConfig,
    *,
    on_step: OnStep = lambda record: None,
    first_step: int = 0,
) -> list[Record]:
    """Minimise the weighted terms over ``parameters`` in ``steps``; one record a step.

    The learning rate rises and falls once over ``steps``.

    Losses stay on the device and are read every ``config.log_every`` steps: on a GPU every read
    waits for it.  A float16 model trains
    on a scaled loss: the gradients of the mean over many rows would be subnormal.  Raises
    :class:`NumericsError` naming the step and the term when a loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=loader.device.type == "cuda",
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, len(steps), config)
    )
    scaler = torch.amp.GradScaler(
        loader.device.type,
        init_scale=_FLOAT16_SCALE,
        enabled=tail.anatomy.head.weight.dtype == torch.float16,
    )
    counts = loader.examples.num_supervised
    every = config.log_every or (1 if loader.device.type == "cpu" else _READ_EVERY)
    log = _LossLog(steps, first_step, every, on_step)
    stream = loader.stream([micro for step in steps for micro in step.micro])
    with (
        seeded(config.seed, loader.device),
        _adapter_dropout(tail.model),
        tail.checkpointed(config.gradient_checkpointing),
        tail.compiled(config.compile),
        contextlib.closing(stream),
    ):
        for number, step in enumerate(steps):
            units = _units(step, counts)
            sums: dict[str, Tensor] = {}
            for _ in step.micro:
                rows = tail.rows(next(stream))
                _backward(terms, rows, units, sums, scaler)
            if config.max_grad_norm:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            rate = float(scheduler.get_last_lr()[0])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            log.add(number, sums, rate, units["rows"])
    return log.finish()


def _units(step: StepPlan, counts: Sequence[int]) -> dict[str, int]:
    examples = [i for micro in step.micro for i in micro]
    return {"rows": sum(counts[i] for i in examples), "sequences": len(examples)}


def _backward(
    terms: Sequence[WeightedTerm],
    rows: Rows,
    units: dict[str, int],
    sums: dict[str, Tensor],
    scaler: torch.amp.GradScaler,
) -> None:
    """Back-propagate one micro-batch's share of the step's mean losses, and add up their values."""
    total: Tensor | None = None
    for term in terms:
        share = term.term(rows).sum() / units["sequences" if term.per_sequence else "rows"]
        weighted = term.weight * share
        total = weighted if total is None else total + weighted
        shown = weighted if term.name == "layer_loss" else share
        sums[term.name] = sums.get(term.name, 0) + shown.detach()
    assert total is not None
    scaler.scale(total).backward()


@contextlib.contextmanager
def _adapter_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode for the adapter's dropout alone: frozen blocks act as in the stored passes."""
    model.eval()
    for name, module in model.named_modules():
        if ".lora_dropout" in name:
            module.train()
    try:
        yield
    finally:
        model.eval()


class _LossLog:
    """Collects losses on the device and reads them in groups."""

    def __init__(
        self, steps: Sequence[StepPlan], first_step: int, every: int, on_step: OnStep
    ) -> None:
        self.steps, self.first_step, self.every, self.on_step = steps, first_step, every, on_step
        self.records: list[Record] = []
        self.waiting: list[tuple[int, dict[str, Tensor], float, int]] = []

    def add(self, number: int, sums: dict[str, Tensor], rate: float, rows: int) -> None:
        self.waiting.append((number, sums, rate, rows))
        if len(self.waiting) >= self.every:
            self._read()

    def finish(self) -> list[Record]:
        self._read()
        return self.records

    def _read(self) -> None:
        if not self.waiting:
            return
        names = list(self.waiting[0][1])
        stacked = torch.stack(
            [sums[name].double() for _, sums, _, _ in self.waiting for name in names]
        )
        values = stacked.reshape(-1, len(names)).tolist()
        for (number, _, rate, rows), losses in zip(self.waiting, values, strict=True):
            step = self.first_step + number
            for name, value in zip(names, losses, strict=True):
                if not math.isfinite(value):
                    raise NumericsError(
                        f"{name} is {value} at step {step}: lower learning_rate or use "
                        "dtype='float32'"
                    )
            record: Record = {"step": step, "epoch": self.steps[number].epoch, "rows": rows}
            record |= {"learning_rate": rate, **dict(zip(names, losses, strict=True))}
            self.records.append(record)
            self.on_step(record)
        self.waiting.clear()
