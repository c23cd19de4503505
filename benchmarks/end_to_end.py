"""A whole transfer beside the same method written with Transformers and PEFT."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pkt_fast
from benchmarks.harness import (
    Targets,
    judged,
    now,
    peak_anonymous_bytes,
    peak_bytes,
    reason,
    summary,
)
from benchmarks.micro import random_llama
from benchmarks.peer_transfer import transfer_plainly
from pkt_fast.data.encoding import encode
from pkt_fast.data.examples import Examples
from pkt_fast.pairing import source_for
from pkt_fast.steering import plan_steps

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm_train.jsonl"


@dataclass(frozen=True)
class Setup:
    """Two random Llama-like models and how long they train."""

    source: tuple[int, int]
    target: tuple[int, int]
    vocabulary: int
    rows: int
    epochs: int
    batch_size: int


FULL = Setup((384, 12), (256, 6), 32000, 32, 5, 16)
SMALL = Setup((64, 4), (48, 2), 1200, 12, 2, 6)

# How many times the rows and, for the cost of compilation, the epochs of a Setup.
_MORE_ROWS = 4
_MORE_EPOCHS = 2


def rows_of(count: int) -> tuple[list[dict[str, Any]], str]:
    """(chat rows, where they are from): GSM8K where it lies beside the repository."""
    if GSM8K.is_file():
        lines = GSM8K.read_text(encoding="utf-8").split("\n")[:count]
        return [{"messages": json.loads(line)["messages"]} for line in lines], "GSM8K"
    from pkt_fast.demo import bundled_rows

    return bundled_rows()[:count], "bundled rows"


def byte_pair_tokenizer(rows: list[dict[str, Any]], size: int) -> Any:
    """A byte-level tokenizer of exactly ``size`` tokens, trained on the rows themselves.

    Rows of text this few give fewer merges; the rest are entries that no text reaches, so that
    every row of the head stands for a token, as in a real model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([m["content"] for row in rows for m in row["messages"]], trainer)
    parts = json.loads(tokenizer.to_str())
    known = parts["model"]["vocab"]
    known |= {f"<unused{i}>": i for i in range(len(known), size)}
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


OUR_RUNS = 3
"""Of a whole transfer."""

PEER = "Transformers + PEFT"


def measure_transfer(
    setup: Setup,
    layer: int,
    *,
    name: str,
    at_least: float | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    peer_runs: int = 1,
) -> dict[str, Any]:
    """One row: both transfers in turn, their losses compared; all of a transfer is timed.

    Before that both run on tiny models, so that neither pays for imports.  A peer that fails leaves
    a row without its time.  With ``compile`` nothing compiled before is used, in any run.
    """
    rows, origin = rows_of(setup.rows)
    tokenizer = byte_pair_tokenizer(rows, setup.vocabulary)
    options = {
        "layers": [layer], "epochs": setup.epochs, "batch_size": setup.batch_size,
        "micro_batch_size": 16, "device": device, "dtype": dtype,
    }
    config = pkt_fast.TransferConfig(**options)
    pair = source_for(setup.source[1], setup.target[1], layer)

    def models(*sizes: tuple[int, int]) -> list[Any]:
        made = (random_llama(*size, setup.vocabulary, device) for size in sizes)
        return [model.to(getattr(torch, dtype)) for model in made]

    with contextlib.suppress(Exception):  # what fails here fails below, and is said there
        some = encode(rows[:2], tokenizer, max_length=config.max_length)
        tiny = {**options, "layers": [1], "epochs": 1}
        pkt_fast.transfer(
            *models((32, 4), (16, 2)), rows[:2], tokenizer=tokenizer, progress=False, **tiny
        )
        tiny_config = pkt_fast.TransferConfig(**tiny)
        transfer_plainly(*models((32, 4), (16, 2)), some, source_for(4, 2, 1), tiny_config)

    mine, theirs = _Runs(), _Runs()

    def ours(source: Any, target: Any) -> None:
        start = now()
        result = pkt_fast.transfer(
            source, target, rows, tokenizer=tokenizer, progress=False, compile=compile, **options
        )
        mine.seconds.append(now() - start)
        mine.history, mine.phases = result.history, result.report["phases"]

    def peer(source: Any, target: Any) -> None:
        start = now()
        examples = encode(rows, tokenizer, max_length=config.max_length)
        theirs.history = transfer_plainly(source, target, examples, pair, config)[1]
        theirs.seconds.append(now() - start)

    failed = ""
    for turn in range(max(OUR_RUNS, peer_runs)):
        if turn < OUR_RUNS:
            with _nothing_compiled() if compile else contextlib.nullcontext():
                mine.watch(partial(ours, *models(setup.source, setup.target)))
        if turn < peer_runs and not failed:
            try:
                theirs.watch(partial(peer, *models(setup.source, setup.target)))
            except Exception as raised:
                failed = reason(raised)
    error = None
    if not failed:
        error = max(
            abs(a[loss] - b[loss])
            for a, b in zip(mine.history, theirs.history, strict=True)
            for loss in ("layer_loss", "output_loss")
        )
        if error > (1e-4 if dtype == "float32" else 2e-2):
            raise AssertionError(f"losses of the two transfers differ by {error:.2g}")

    examples = encode(rows, tokenizer, max_length=config.max_length)
    row: dict[str, Any] = {
        "name": name,
        "shape": f"{setup.source[1]}×{setup.source[0]} → {setup.target[1]}×{setup.target[0]}, "
        f"V={setup.vocabulary:,}, {len(rows)} rows of {origin} "
        f"({sum(examples.lengths):,} tokens), "
        f"{setup.epochs} epochs, target layer {layer} of 0–{setup.target[1] - 1}",
        "ours": mine.entry(),
        "peers": {PEER: {"failed": failed} if failed else theirs.entry()},
        "limits": {},
        "error": error,
        "note": "error is the largest difference of a loss at any step; "
        f"{padding(examples, config):.1%} of a batch is padding; phases of the last run: "
        + ", ".join(f"{name} {phase['seconds']:.2f} s" for name, phase in mine.phases.items()),
    }
    return row | judged(row, Targets({} if at_least is None else {PEER: at_least}))


@dataclass
class _Runs:
    """What the runs of one transfer gave: seconds and bytes of each, the rest of the last."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, Any] = field(default_factory=dict)

    def watch(self, call: Callable[[], None]) -> None:
        self.peaks.append(peak_bytes(call))

    def entry(self) -> dict[str, Any]:
        known = [peak for peak in self.peaks if peak is not None]
        return summary(self.seconds) | {"peak_bytes": max(known, default=None)}


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """As in a new process with empty caches."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def padding(examples: Examples, config: pkt_fast.TransferConfig) -> float:
    """Share of the positions of all training batches that are padding."""
    lengths = examples.lengths
    batches = [micro for step in plan_steps(lengths, config) for micro in step.micro]
    area = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / area


def measure_compilation(setup: Setup, layer: int, *, name: str, device: str) -> dict[str, Any]:
    """One row: a training step with ``compile=True`` and without, and what compilation takes.

    Both train on the same batches, so step is compared with step: the median difference is what
    compiled code saves, and what it took beyond that is compilation, which happens in the steps
    that first need it.  Nothing compiled before is used.
    """
    rows, origin = rows_of(setup.rows)
    eager = _step_seconds(setup, layer, rows, device, compile=False)
    compiled = _step_seconds(setup, layer, rows, device, compile=True)
    saved = statistics.median(a - b for a, b in zip(eager, compiled, strict=True))
    compilation = sum(compiled) - sum(eager) + len(eager) * saved
    pays = f"from {compilation / saved:,.0f} steps on" if saved > 0 else "never"
    row: dict[str, Any] = {
        "name": name,
        "shape": f"{setup.target[1]}×{setup.target[0]}, V={setup.vocabulary:,}, "
        f"{len(rows)} rows of {origin}, batches of {setup.batch_size}, "
        f"target layer {layer} of 0–{setup.target[1] - 1}",
        "ours": summary(compiled),
        "peers": {"eager": summary(eager)},
        "limits": {},
        "error": None,
        "note": f"a compiled step saves {1e3 * saved:.0f} ms of the same step; compilation takes "
        f"{compilation:.1f} s and pays {pays}",
    }
    return row | judged(row, Targets())


def _step_seconds(
    setup: Setup, layer: int, rows: list[dict[str, Any]], device: str, *, compile: bool
) -> list[float]:
    """Seconds of every training step of a transfer."""
    tokenizer = byte_pair_tokenizer(rows, setup.vocabulary)
    sizes = setup.source, setup.target
    source, target = (random_llama(*size, setup.vocabulary, device) for size in sizes)
    ends: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    try:
        with _nothing_compiled():
            result = pkt_fast.transfer(
                source, target, rows, tokenizer=tokenizer, progress=False, compile=compile,
                layers=[layer], epochs=_MORE_EPOCHS * setup.epochs, device=device,
                batch_size=setup.batch_size, micro_batch_size=16,
            )
    finally:
        handle.remove()
    first = result.report["phases"]["steer"]["seconds"] - (ends[-1] - ends[0])
    return [first, *(after - before for before, after in itertools.pairwise(ends))]


def rows(setup: Setup, device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row's name, and how to measure it: the middle and the last layer, two options, more
    rows where GSM8K is at hand, and what compilation costs.
    """
    middle, last = setup.target[1] // 2, setup.target[1] - 1
    for what, layer, options in (
        ("middle layer", middle, {"at_least": 2.5, "peer_runs": 2}),
        ("last layer", last, {"at_least": 5, "peer_runs": 2}),
        ("last layer, bfloat16", last, {"dtype": "bfloat16"}),
        ("middle layer, compile=True", middle, {"compile": True}),
    ):
        name = f"whole transfer, {what}"
        yield name, partial(
            measure_transfer, setup, layer, name=name, device=device, **options
        )
    if GSM8K.is_file():
        many = replace(setup, rows=_MORE_ROWS * setup.rows)
        name = f"whole transfer, {many.rows} rows of GSM8K"
        yield name, partial(measure_transfer, many, last, name=name, device=device, at_least=5)
    name = "training step, compile=True"
    yield name, partial(measure_compilation, setup, middle, name=name, device=device)


def store_run(directory: Path, count: int, vocabulary: int = 1200) -> tuple[float, int]:
    """Seconds of a transfer with a directory store, and the anonymous memory it takes at its
    peak, in bytes.
    """
    rows, _ = rows_of(16)
    tokenizer = byte_pair_tokenizer(rows, vocabulary)
    many = [rows[i % len(rows)] for i in range(count)]
    source, target = random_llama(192, 4, vocabulary), random_llama(128, 2, vocabulary)
    start = now()
    grown = peak_anonymous_bytes(
        lambda: pkt_fast.transfer(
            source, target, many, tokenizer=tokenizer, progress=False, layers=[1], epochs=1,
            batch_size=8, micro_batch_size=8, store=str(directory), device="cpu",
        )
    )
    return now() - start, grown
