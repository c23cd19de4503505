"""What each subcommand of :mod:`pkt_fast.cli` does: call the Python API, show the result."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ._files import atomic_directory, check_output_dir, write_inventory
from .anatomy import Anatomy
from .attribution import attribute
from .cli import settings_of
from .config import TransferConfig
from .data.encoding import encode
from .data.reading import read_rows
from .delta import LayerDelta, inject
from .demo import bundled_rows
from .errors import ConfigError, ModelError
from .loading import (
    load_model,
    load_tokenizer,
    load_tokenizers,
    pad_token_id,
    resolve_device,
    resolve_dtype,
)
from .maps import diagnose
from .ops import backend, served_by
from .pairing import pair_by_score
from .phases import longest_first, processing_batches
from .progress import Phases
from .report import machine, versions
from .transfer import TransferResult, transfer

_PIPE_WIDTH = 110


def run(args: argparse.Namespace) -> None:
    """Run the subcommand ``args.command``."""
    _hush(args.verbose)
    with backend(getattr(args, "backend", None)):
        _COMMANDS[args.command](args)


def _hush(verbose: bool) -> None:
    """Keep the libraries' warnings and loading bars off the terminal, unless asked for them."""
    logging.getLogger("pkt_fast").setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # a line for every retry
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


# --------------------------------------------------------------------------- transfer


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What ``transfer`` and ``diagnose`` are given alike."""
    return {
        "src": args.source,
        "tgt": args.target,
        "data": args.data,
        "source_base": args.source_base,
        "config": args.config,
        "preset": args.preset,
        "progress": not args.quiet,
        **settings_of(args),
    }


def _transfer(args: argparse.Namespace) -> None:
    result = transfer(**_given(args), output_dir=args.output)
    if not args.quiet:
        show_transfer(console(), result, args.output)


def show_transfer(out: Console, result: TransferResult, output: str | None) -> None:
    """The closing table of a transfer, and how to use what it wrote."""
    data = result.report["data"]
    rows = f"{data['examples']:,} examples, {data['supervised_tokens']:,} supervised tokens"
    dropped = sum(map(len, data["dropped"].values()))
    if dropped:
        rows += f" ({dropped:,} of {data['rows']:,} rows dropped; see report.json)"
    table = facts("transfer", {"data": rows, **result.report["summary"]})
    if output is not None:
        table.add_row("written to", escape(str(output)))
    out.print(table)
    if output is None:
        out.print("Nothing was written: give --output DIR to keep the adapter.")
        return
    out.print(
        "Load it with PEFT: PeftModel.from_pretrained(target_model, "
        f"{escape(repr(str(output)))})\nor merge it: pkt-fast inject --model TARGET "
        f"--delta {escape(shlex.quote(str(output)))} --output MERGED",
        soft_wrap=True,
    )


def _diagnose(args: argparse.Namespace) -> None:
    found = diagnose(**_given(args))
    if args.json:
        print(json.dumps([alignment.as_dict() for alignment in found], indent=2))
        return
    figures = ("cosine", "chance", "r2", "round_trip")
    table = Table("target", "source", "held-out rows", "cosine", "chance", "R²", "round trip")
    for judged in found:
        values = (getattr(judged, name) for name in figures)
        source = "+".join(map(str, judged.source))
        shown = ("-" if value is None else f"{value:.3f}" for value in values)
        table.add_row(str(judged.target), source, f"{judged.rows:,}", *shown)
    console().print(table)


def _demo(args: argparse.Namespace) -> None:
    from .demo.run import run_demo

    run_demo(console(), output=args.output, progress=not args.quiet, **settings_of(args))


# --------------------------------------------------------------------------- attribute


def _attribute(args: argparse.Namespace) -> None:
    config = TransferConfig.make(**settings_of(args))
    tokenizer = _tokenizer(args.source, "source", config)
    examples = encode(args.data, tokenizer, max_length=config.max_length, limit=config.limit)
    source = _load(args.source, "source", config)
    picked = examples[: config.attribution_examples]
    batches = processing_batches(
        picked, longest_first(picked.lengths), config.micro_batch_size, pad_token_id(tokenizer)
    )
    with _phases(args).phase("attribute", len(picked)) as update:

        def counted() -> Any:
            for batch in batches:
                yield batch
                update(len(batch))

        scores = attribute(
            source, counted(), interface=config.interface, reduction=config.reduction
        ).tolist()
    pairs = []
    if args.target is not None:
        target = _load(args.target, "target", config)
        layers = len(scores), Anatomy.of(target).num_layers
        pairs = pair_by_score(*layers, scores, config.num_layers, config.pairing)
    paired = {layer for pair in pairs for layer in pair.source}
    table = Table("layer", "score", "", "paired" if pairs else "")
    top = max(map(abs, scores)) or 1.0
    for layer, score in enumerate(scores):
        bar = "█" * round(30 * abs(score) / top)
        table.add_row(str(layer), f"{score:.4g}", bar, "*" if layer in paired else "")
    out = console()
    out.print(table)
    for pair in pairs:
        out.print(f"critical pair: {pair}")


# --------------------------------------------------------------------------- inject


def _inject(args: argparse.Namespace) -> None:
    config = TransferConfig.make(**settings_of(args))
    check_output_dir(args.output, config.overwrite)
    delta = LayerDelta.load(args.delta)
    dtype = None if config.dtype == "auto" else resolve_dtype(config.dtype, torch.device("cpu"))
    model = load_model(args.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    done = inject(model, delta, args.scale, keep_backup=False, stochastic_seed=args.stochastic_seed)
    with atomic_directory(args.output, overwrite=config.overwrite) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        _copy_tokenizer(args.model, temporary, config)
        write_inventory(temporary)
    if not args.quiet:
        rows = {
            "matrices changed": done.matrices,
            "elements": f"{done.elements:,}",
            "left unchanged by rounding": f"{done.unchanged_fraction:.2%}",
            "written to": args.output,
        }
        console().print(facts("inject", rows))


def _copy_tokenizer(model: str, directory: Path, config: TransferConfig) -> None:
    """Put the model's tokenizer, if it has one, beside the merged weights."""
    try:
        tokenizer = _tokenizer(model, "model", config)
    except ModelError:
        return
    tokenizer.save_pretrained(directory)


# --------------------------------------------------------------------------- evaluate


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import evaluate
    from .evaluation.evaluate import injected
    from .evaluation.harness import evaluate_tasks

    config = TransferConfig.make(**settings_of(args))
    if args.tasks is not None and args.data is not None:
        raise ConfigError("give --data or --tasks, not both")
    if args.task_dir is not None and args.tasks is None:
        raise ConfigError("--task-dir goes with --tasks, which names what to run")
    tokenizer = _tokenizer(args.model, "model", config)
    delta = None if args.delta is None else LayerDelta.load(args.delta)
    model = _load(args.model, "model", config)
    if args.tasks is not None:
        tasks = [task.strip() for task in args.tasks.split(",")]
        with injected(model, delta):
            scores: Mapping[str, Any] = evaluate_tasks(
                model,
                tokenizer,
                tasks,
                batch_size=args.batch_size,
                limit=config.limit,
                task_dir=args.task_dir,
            )
        rows = {f"{task} {name}": v for task, found in scores.items() for name, v in found.items()}
    else:
        held_out = read_rows(args.data or bundled_rows("test"), limit=config.limit)[0]
        with _phases(args).phase("evaluate", len(held_out) * (1 + args.generate)) as update:
            evaluation = evaluate(
                model,
                held_out,
                tokenizer,
                delta=delta,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                max_length=config.max_length,
                generate=args.generate,
                advance=update,
            )
        scores = rows = evaluation.as_dict()
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        console().print(facts("evaluate", {name: _number(value) for name, value in rows.items()}))


# --------------------------------------------------------------------------- analyze


def _analyze(args: argparse.Namespace) -> None:
    from .analysis import analyze

    config = TransferConfig.make(**settings_of(args))
    check_output_dir(args.output, config.overwrite)
    tokenizers = load_tokenizers(
        None, args.source, args.target, trust_remote_code=config.trust_remote_code
    )
    analysis = analyze(
        _load(args.source, "source", config),
        _load(args.target, "target", config),
        args.data,
        tokenizers,
        delta=None if args.delta is None else LayerDelta.load(args.delta),
        interface=config.interface,
        batch_size=config.micro_batch_size,
        max_length=config.max_length,
        limit=config.limit,
        seed=config.seed,
        phases=_phases(args),
    )
    written = analysis.save(args.output, overwrite=config.overwrite)
    if not args.quiet:
        out = console()
        out.print(facts("analyze", analysis.summary()))
        if not any(path.suffix == ".png" for path in written):
            out.print("no pictures: they need pip install 'pkt-fast[plots]'", markup=False)
        out.print("written: " + escape(", ".join(str(path) for path in written)), soft_wrap=True)


# --------------------------------------------------------------------------- compare


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare

    own = {
        "validation": args.validation,
        "test": args.test,
        "other": args.other,
        "source_base": args.source_base,
        "examples": args.examples,
        "labels": args.labels,
        "seeds": args.seeds,
        "tune_budget": args.tune_budget,
        "learning_rates": args.learning_rates,
        "generate": args.generate,
        "max_new_tokens": args.max_new_tokens,
        "output_dir": args.output,
        "progress": not args.quiet,
    }
    # Some of these are also names of settings, with a meaning of their own here.
    settings = {**settings_of(args), **own}
    methods = [name.strip() for name in args.methods.split(",")]
    comparison = compare(args.source, args.target, args.data, methods, **settings)
    if not args.quiet:
        console().print(comparison.table())


# --------------------------------------------------------------------------- bench and info


def _bench(args: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ConfigError("bench needs a source checkout of pkt_fast, with its benchmarks/")
    sys.path.insert(0, str(root))
    code = importlib.import_module("benchmarks.__main__").main(args.arguments)
    if code:
        raise SystemExit(code)


def _info(args: argparse.Namespace) -> None:
    found = information()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    out = console()
    for title in ("versions", "machine", "build", "extras"):
        out.print(facts(title, found[title]))
    table = Table("op", "on CPU", "", "on GPU", "", title="ops")
    for op, served in found["ops"].items():
        table.add_row(op, served["cpu"], served["cpu_why"], served["cuda"], served["cuda_why"])
    out.print(table)


def information() -> dict[str, dict[str, Any]]:
    """What ``info`` shows: versions, machine, native build, extras, and who serves each op."""
    return {
        "versions": versions(),
        "machine": machine(),
        "build": _build(),
        "ops": {op: _served(op, devices) for op, devices in served_by().items()},
        "extras": {
            extra: "installed" if not missing else "missing " + ", ".join(missing)
            for extra, missing in ((e, _missing(packages)) for e, packages in _EXTRAS.items())
        },
    }


_EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "plots": ("matplotlib",),
    "bench": ("captum", "liger_kernel", "matplotlib", "pytest_benchmark"),
    "dev": ("captum", "datasets", "hypothesis", "mypy", "pytest", "xdist"),
}


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _build() -> dict[str, Any]:
    from .ops._registry import backend as current
    from .ops._registry import (
        cuda_problem,
        native_module,
        stale_extension,
        triton_available,
        triton_interpreted,
    )

    native, gpu = native_module(), torch.cuda.is_available()
    problem = cuda_problem(torch.device("cuda")) if gpu else "no GPU"
    missing = stale_extension() or "not built (no C++ compiler?)"
    return {
        "native extension": missing if native is None else "built",
        **({} if native is None else {k: v or "none" for k, v in native.build_info().items()}),
        "triton": "available" if triton_available() else "not installed",
        "triton interpreter": "on" if triton_interpreted() else "off",
        "gpu": "present" if gpu else "none found",
        "cuda kernels": "run" if problem is None else f"do not run: {problem}",
        "backend": str(current()),
    }


def _served(op: str, devices: Mapping[str, str]) -> dict[str, str]:
    """Who serves ``op`` on "cpu" and "cuda", and why."""
    from .ops._gemm import choice
    from .ops._registry import native_module, stale_extension, triton_available

    native = native_module()
    functions = [] if native is None else [n for n in dir(native) if not n.startswith("_")]
    compiled = any(op.startswith(name) for name in functions)
    products = "own" if choice().own else "library"
    wish = backend()
    why = {
        "native": "C++ kernel" if compiled else f"{products} matrix products",
        "triton": "fused kernel",
        "cuda": "CUDA kernel of the extension",
        "reference": "no kernel for it" if wish == "auto" else "as asked for",
        "none": f"no {wish} implementation: a call is refused",
    }
    cpu, cuda = why[devices["cpu"]], why[devices["cuda"]]
    if wish in ("auto", "native") and devices["cpu"] in ("reference", "none") and native is None:
        cpu = "extension out of date" if stale_extension() else "extension not built"
    if wish == "auto" and devices["cuda"] == "reference" and not triton_available():
        cuda = "Triton is not installed"
    return {**devices, "cpu_why": cpu, "cuda_why": cuda}


# --------------------------------------------------------------------------- showing things


class _Output(Console):
    """Leaves it to the command line what a reader that has gone means; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Standard output; wide enough for our tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return _Output(width=width, highlight=False)


def facts(title: str, rows: Mapping[str, Any]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(escape(str(name).replace("_", " ")), escape(str(value)))
    return table


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _phases(args: argparse.Namespace) -> Phases:
    return Phases(not args.quiet)


def _tokenizer(model: str, role: str, config: TransferConfig) -> Any:
    return load_tokenizer(model, role=role, trust_remote_code=config.trust_remote_code)


def _load(model: str, role: str, config: TransferConfig) -> nn.Module:
    """A model on the device and in the dtype the settings ask for."""
    device = resolve_device(config.device)
    loaded = load_model(
        model,
        role=role,
        dtype=resolve_dtype(config.dtype, device),
        trust_remote_code=config.trust_remote_code,
    )
    return loaded.to(device)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "transfer": _transfer,
    "diagnose": _diagnose,
    "demo": _demo,
    "attribute": _attribute,
    "inject": _inject,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "compare": _compare,
    "bench": _bench,
    "info": _info,
}
