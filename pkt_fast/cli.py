"""The command line: the words of the Python API, one subcommand for each thing a person does.

Only argparse and the settings are imported here, so that ``pkt-fast --help`` answers at once; what
a command does is in :mod:`pkt_fast.commands`.

Exit codes: 0, done; 2, bad usage or input (one line on stderr); 130, interrupted.  An unexpected
exception keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from ._version import __version__
from .config import PRESETS, STEADY, TransferConfig
from .errors import ConfigError, PktFastError

PROGRAM = "pkt-fast"
INTERRUPTED = 130
REFUSED = 2

_HINTS = typing.get_type_hints(TransferConfig)
_MODEL_SETTINGS = ("dtype", "device", "backend", "trust_remote_code")
_MODEL = "model directory or hub id"
_DATA_SETTINGS = ("max_length", "limit")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`ConfigError`: one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkt-fast`` with ``argv`` (default: the process's arguments); returns the exit code."""

    def run() -> int:
        args = _parse(sys.argv[1:] if argv is None else argv)
        from . import commands  # torch and transformers are imported here, not for --help

        commands.run(args)
        return 0

    return answered(run)


def answered(run: Callable[[], int]) -> int:
    """The exit code of ``run()``; its refusals become one line on stderr and their code."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except PktFastError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, say) has seen enough
        _drop_output()
    except OSError as error:
        if error.filename is not None:  # some other file: whoever opened it has to say more
            raise
        _drop_output()
        print(f"{PROGRAM}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return REFUSED
    return 0


def _drop_output() -> None:
    """Let what is still to be written to stdout go nowhere; the interpreter flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; those of ``bench`` belong to the benchmarks, options included."""
    parser = build_parser()
    if argv[:1] != ["bench"]:
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # argparse would point to the help of the program, not of the command
            raise ConfigError(
                f"unrecognized arguments: {' '.join(unknown)} (see {PROGRAM} {args.command} --help)"
            )
        return args
    args = parser.parse_args(argv[:1])
    args.arguments = list(argv[1:])
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = Parser(
        prog=PROGRAM,
        description="Move what a large language model knows about a task into a smaller one.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(commands)
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`TransferConfig` that were given on the command line."""
    return {name: value for name, value in vars(args).items() if name in TransferConfig.fields()}


# --------------------------------------------------------------------------- subcommands


def _command(commands: Any, name: str, summary: str) -> Parser:
    parser: Parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no tables")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own messages")
    return parser


def _transfer(commands: Any) -> None:
    parser = _command(commands, "transfer", "move knowledge from a source into a smaller target")
    parser.add_argument("--output", metavar="DIR", help="where to write the adapter and the report")
    _add_transfer(parser)


def _diagnose(commands: Any) -> None:
    parser = _command(
        commands, "diagnose", "say how well a transfer's maps fit the pair, before any training"
    )
    _add_transfer(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    """The options of a transfer, but for where its result goes."""
    _add_pair(parser)
    _add_source_base(parser)
    _add_data(parser, "rows to transfer on")
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"settings to start from: {', '.join(PRESETS)}"
    )
    _add_settings(parser)


def _demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "transfer between the two bundled models and compare with fine-tuning"
    )
    parser.add_argument("--output", metavar="DIR", help="keep the adapter and the report here")
    _add_settings(parser, ("seed", "device", "overwrite"))


def _attribute(commands: Any) -> None:
    parser = _command(commands, "attribute", "score the source's layers by gradient x activation")
    parser.add_argument("--source", required=True, metavar="MODEL", help=_MODEL)
    parser.add_argument("--target", metavar="MODEL", help="also pair layers with this target's")
    _add_data(parser, "rows to measure on")
    layers = ("interface", "reduction", "num_layers", "pairing")
    chosen = (*layers, "attribution_examples", "micro_batch_size")
    _add_settings(parser, (*chosen, *_DATA_SETTINGS, *_MODEL_SETTINGS))


def _inject(commands: Any) -> None:
    parser = _command(commands, "inject", "write a model with an adapter merged into its weights")
    parser.add_argument("--model", required=True, metavar="MODEL", help=_MODEL)
    parser.add_argument("--delta", required=True, metavar="DIR", help="LoRA adapter directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the model")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the delta (default: 1)")
    parser.add_argument(
        "--stochastic-seed",
        type=int,
        metavar="SEED",
        help="round to the weights' dtype stochastically, from this seed",
    )
    _add_settings(parser, ("dtype", "backend", "overwrite", "trust_remote_code"))


def _evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "exact match and next-token loss on held-out rows")
    parser.add_argument("--model", required=True, metavar="MODEL", help=_MODEL)
    parser.add_argument("--delta", metavar="DIR", help="LoRA adapter to inject first")
    _add_data(parser, "rows to evaluate on")
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval tasks instead (extra [eval])")
    parser.add_argument("--task-dir", metavar="DIR", help="YAML files of more lm-eval tasks")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    _add_generation(parser, 256)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_settings(parser, (*_DATA_SETTINGS, *_MODEL_SETTINGS))


def _analyze(commands: Any) -> None:
    parser = _command(
        commands, "analyze", "round-trip fidelity, recomposition cosines and CKA of a pair"
    )
    _add_pair(parser)
    _add_data(parser, "rows to measure on")
    parser.add_argument("--delta", metavar="DIR", help="adapter to apply to the target")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write")
    chosen = ("interface", "micro_batch_size", "seed", "overwrite")
    _add_settings(parser, (*chosen, *_DATA_SETTINGS, *_MODEL_SETTINGS))


def _compare(commands: Any) -> None:
    parser = _command(commands, "compare", "train every method on equal terms and tabulate them")
    _add_pair(parser)
    _add_source_base(parser)
    parser.add_argument(
        "--methods",
        default="sft,kd,sft+kd,hidden_kd,paper",
        metavar="A,B",
        help="what to compare (default: %(default)s; an unknown name lists all)",
    )
    _add_data(parser, "rows to train on")
    for role in ("validation", "test"):
        parser.add_argument(
            f"--{role}", metavar="FILE", help=f"{role} rows (default: a fifth of --data)"
        )
    parser.add_argument("--other", metavar="FILE", help="other text, to see what is forgotten")
    parser.add_argument("--examples", type=int, metavar="N", help="rows each seed draws")
    parser.add_argument(
        "--labels", default="given", metavar="NAME", help="given, none or source (default: given)"
    )
    parser.add_argument(
        "--seeds", type=int_list, default=(0, 1, 2), metavar="LIST", help="default: 0,1,2"
    )
    parser.add_argument(
        "--tune-budget", type=int, default=4, metavar="N", help="trials a method (default: 4)"
    )
    parser.add_argument(
        "--learning-rates",
        type=float_list,
        metavar="LIST",
        help="rates to try, most likely first (default: those of each method)",
    )
    _add_generation(parser, 64)
    parser.add_argument("--output", metavar="DIR", help="where to write the table")
    steps = ("epochs", "steps", "batch_size", "micro_batch_size")
    rates = ("learning_rate_schedule", "warmup_fraction", "max_grad_norm")
    adapter = ("rank", "alpha", "target_modules")
    names = (*steps, *rates, *adapter, "max_length", "overwrite", *_MODEL_SETTINGS)
    _add_settings(parser, names, STEADY)


def _bench(commands: Any) -> None:
    _command(commands, "bench", "run the benchmark suite of a source checkout")


def _info(commands: Any) -> None:
    parser = _command(commands, "info", "versions, machine, and who serves each op")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


_SUBCOMMANDS = (
    _transfer,
    _diagnose,
    _demo,
    _attribute,
    _inject,
    _evaluate,
    _analyze,
    _compare,
    _bench,
    _info,
)


# --------------------------------------------------------------------------- options


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="MODEL", help=_MODEL)
    parser.add_argument("--target", required=True, metavar="MODEL", help=_MODEL)


def _add_data(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--data", metavar="FILE", help=f"{what}: .jsonl, .json or .txt (default: a bundled set)"
    )


def _add_source_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source-base",
        metavar="MODEL",
        help="the source before its fine-tuning: transfer the change",
    )


def _add_generation(parser: argparse.ArgumentParser, longest: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=longest,
        metavar="N",
        help=f"longest generated answer (default: {longest})",
    )
    parser.add_argument(
        "--generate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate answers for exact match (default: on)",
    )


def _add_settings(
    parser: argparse.ArgumentParser,
    names: Iterable[str] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Options for fields of :class:`TransferConfig` (all by default); absent ones stay unset.

    ``defaults`` are those of the command where they differ from the fields' own.
    """
    group = parser.add_argument_group("settings")
    chosen = None if names is None else set(names)
    for field in dataclasses.fields(TransferConfig):
        if chosen is None or field.name in chosen:
            _add_setting(group, field, defaults.get(field.name, field.default))


def _add_setting(group: Any, field: dataclasses.Field[Any], default: Any) -> None:
    option = "--" + field.name.replace("_", "-")
    doc = f"{field.metadata['doc']} (default: {_shown(default)})".replace("%", "%%")
    if _HINTS[field.name] is bool:
        group.add_argument(
            option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=doc
        )
        return
    parse = _parser_of(field.name)
    group.add_argument(
        option, type=parse, default=argparse.SUPPRESS, metavar=_METAVARS[parse], help=doc
    )


def _parser_of(name: str) -> Callable[[str], Any]:
    """How the text of an option becomes the field's value."""
    if name == "layers":
        return layer_list
    hint = _HINTS[name]
    kinds = (hint, *typing.get_args(hint))
    return next((kind for kind in (int, float) if kind in kinds), str)


def layer_list(text: str) -> tuple[int, ...] | str:
    """``"3,5"`` as (3, 5); ``"all"`` as it is."""
    return text if text == "all" else int_list(text)


def int_list(text: str) -> tuple[int, ...]:
    """``"3,5"`` as (3, 5)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 3,5") from error


def float_list(text: str) -> tuple[float, ...]:
    """``"1e-3,3e-3"`` as (0.001, 0.003)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1e-3,3e-3") from error


_METAVARS: dict[Callable[[str], Any], str] = {int: "N", float: "X", str: "NAME", layer_list: "LIST"}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
