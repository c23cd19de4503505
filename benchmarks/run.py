"""Run the suite: operations, whole transfers, scaling curves; JSON, Markdown and a plot.

    pkt-fast bench --json benchmarks/results/cpu.json          # everything; also cpu.md, cpu.png
    pkt-fast bench micro --only align                          # rows of single operations
    pkt-fast bench transfer --json FILE                        # adds to what FILE holds
    pkt-fast bench --small                                     # tiny shapes: does it run at all?
    pkt-fast bench compare OLD.json NEW.json                   # what became slower
    python benchmarks/run.py --update-readme FILE.json         # put the table into README.md

A row that fails ends nothing: the file says why, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # so that this file also runs as a script

from benchmarks import compare_results, end_to_end, micro, scaling  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    CLOCKS,
    clock_name,
    entry_text,
    markdown,
    measure,
    samples_text,
    seconds_text,
    use_clock,
    use_device,
)
from benchmarks.record import Record, measured_when, read  # noqa: E402
from pkt_fast._files import atomic_file  # noqa: E402
from pkt_fast.cli import Parser, answered  # noqa: E402
from pkt_fast.errors import ConfigError, DataError  # noqa: E402
from pkt_fast.report import machine, versions  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
CPU_TIMES = "CPU seconds on one thread, as the machine did other work at the same time"

Entry = tuple[str, str, Callable[[], dict[str, Any]]]
"""(part, name, how to measure it)."""


def micro_rows(device: str, small: bool, seconds: float) -> Iterator[Entry]:
    """The rows of single operations."""
    for name in micro.BUILDERS:

        def row(name: str = name) -> dict[str, Any]:
            case = micro.build(name, micro.SMALL if small else micro.FULL, device)
            case.seconds = seconds or case.seconds
            return measure(case)

        yield "micro", name, row


def transfer_rows(device: str, small: bool, seconds: float) -> Iterator[Entry]:
    """The rows of whole transfers."""
    setup = end_to_end.SMALL if small else end_to_end.FULL
    for name, row in end_to_end.rows(setup, device):
        yield "transfer", name, row


def scaling_points(device: str, small: bool, seconds: float) -> Iterator[Entry]:
    """The points of the scaling curves."""
    for name, point in scaling.points(device, small=small):
        yield "scaling", name, point


PARTS = {"micro": micro_rows, "transfer": transfer_rows, "scaling": scaling_points}


def settings(device: str, small: bool) -> dict[str, Any]:
    """What two runs have to share for their entries to stand in one file."""
    return {
        "device": device, "small": small, "clock": clock_name(), "machine": machine(),
        "versions": versions(),
    }


def run(
    record: Record, parts: Sequence[str], device: str, *, small: bool, only: str, seconds: float
) -> None:
    """Measure ``parts`` into ``record``: the entries whose name contains ``only``."""
    entries = [
        entry for part in parts for entry in PARTS[part](device, small, seconds)
        if only in entry[1]
    ]
    if not entries:
        raise ConfigError(f"--only {only!r} is in no name of {', '.join(parts)}")
    for part, name, measured in entries:
        print(f"{part}: {name}", file=sys.stderr, flush=True)
        record.add(part, name, measured)


def device_of(result: Mapping[str, Any]) -> str:
    """The device of a result, a GPU by its name as well."""
    if result["device"] == "cpu":
        return "cpu"
    return f"{result['device']} ({result['machine']['gpus'][0]})"


def measured_on(result: Mapping[str, Any]) -> str:
    """The processor that computed."""
    described = result["machine"]
    if result["device"] == "cpu":
        return f"{described['cores']} cores of {described['cpu']} ({described['cpu_capability']})"
    return f"one {described['gpus'][0]}"


def document(result: Mapping[str, Any]) -> str:
    """The Markdown page of a result."""
    described = result["machine"]
    lines = [
        "# Measured",
        "",
        f"{described['cpu']}, {described['cores']} cores, {described['torch_threads']} threads, "
        f"{described['cpu_capability']}, device {device_of(result)}, torch "
        f"{result['versions']['torch']}; {measured_when(result)}.",
        *([f"Times are {CPU_TIMES}.", ""] if result["clock"] == "cpu" else [""]),
        markdown(result["rows"]),
    ]
    notes = [
        f"- **{row['name']}**: "
        + (f"relative error {row['error']:.1g}. " if row["error"] is not None else "")
        + "; ".join(filter(None, (row["note"], samples_text(row))))
        for row in result["rows"]
    ]
    lines += ["Errors are ours against the first peer.", "", *notes, ""]
    if result["failures"]:
        lines += ["## Failed", ""]
        lines += [f"- {f['part']}, **{f['name']}**: {f['why']}" for f in result["failures"]]
        lines += [""]
    if result["scaling"]:
        lines += ["## Scaling", "", scaling.scaling_markdown(result["scaling"])]
    return "\n".join(lines)


def readme_table(result: Mapping[str, Any]) -> str:
    """What the README shows: a line a row, the first peer, and the machine."""
    lines = [
        f"Measured on {measured_on(result)}, torch {result['versions']['torch']}, "
        f"{measured_when(result)}, by `pkt-fast bench`; all rows, peers and spreads are in "
        "`benchmarks/results`."
        + (f" Times are {CPU_TIMES}." if result["clock"] == "cpu" else ""),
        "",
        "| what | ours | peer | faster | ours / limit | targets |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = next(iter(row["peers"]))
        peer = row["peers"][name]
        other = f"{name}, {entry_text(peer)}"
        faster = f"{row['speedups'][name]:.1f}x" if name in row["speedups"] else "–"
        limit = next((f"{r:.2f} ({n})" for n, r in row["of_limit"].items()), "–")
        targets = "; ".join(
            f"{t['what']} {'met' if t['met'] else 'missed'}"
            for t in row["targets"]
            if t["met"] is not None
        )
        lines.append(
            f"| {row['name']}: {row['shape']} | {seconds_text(row['ours']['median_s'])} | {other} "
            f"| {faster} | {limit} | {targets or '–'} |"
        )
    return "\n".join(lines)


def update_readme(result: Mapping[str, Any], readme: Path) -> None:
    """Put the table between the markers of ``readme``."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{readme} lacks {BEGIN} … {END}")
    with atomic_file(readme) as temporary:
        temporary.write_text(
            f"{before}{BEGIN}\n{readme_table(result)}\n{END}{after}", encoding="utf-8"
        )


def write_pages(result: Mapping[str, Any], path: Path) -> None:
    """The Markdown page and the plot beside the JSON file ``path``."""
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(document(result), encoding="utf-8")
    scaling.plot(result["scaling"], path.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 1 when something failed.  Raises for bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        return compare_results.main(argv[1:])
    args = _parse(argv)
    if args.update_readme:
        update_readme(read(args.update_readme), ROOT / "README.md")
        return 0
    use_clock(args.clock)
    use_device(args.device)
    record = Record(settings(args.device, args.small), args.json)
    parts = tuple(PARTS) if args.part == "all" else (args.part,)
    try:
        run(record, parts, args.device, small=args.small, only=args.only, seconds=args.seconds)
    finally:  # also what an interrupted run has measured
        if args.json:
            write_pages(record.result, args.json)
    print(document(record.result))
    for complaint in record.complaints:
        print(complaint, file=sys.stderr)
    return int(bool(record.complaints))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    assert __doc__
    summary, _, examples = __doc__.partition("\n")
    parser = Parser(
        prog="pkt-fast bench", description=summary, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS, "compare"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows and points whose name contains this"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: CPU seconds on one thread, for a machine that does other work as well",
    )
    parser.add_argument(
        "--seconds", type=float, default=0, metavar="S",
        help="time to spend on each operation (default: 4)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="file to write or to add to, with .md and .png beside it",
    )
    parser.add_argument("--update-readme", type=Path, metavar="FILE", help="no run: fill README")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    if args.device == "cuda" and args.clock == "cpu":
        raise ConfigError("--clock cpu: a GPU's work takes no CPU seconds; leave it at 'wall'")
    return args


if __name__ == "__main__":
    raise SystemExit(answered(main))
