"""Run the suite: operations, whole transfers, scaling curves; JSON, Markdown and a plot.

    pkt-fast bench --json benchmarks/results/cpu.json          # everything; also cpu.md, cpu.png
    pkt-fast bench micro --only align                          # rows of single operations
    pkt-fast bench --small                                     # tiny shapes: does it run at all?
    pkt-fast bench compare OLD.json NEW.json                   # what became slower
    python benchmarks/run.py --update-readme FILE.json         # put the table into README.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # so that this file also runs as a script

from benchmarks import compare_results, end_to_end, micro, scaling  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    CLOCKS,
    clock_name,
    markdown,
    measure,
    seconds_text,
    use_clock,
)
from pkt_fast._files import write_json  # noqa: E402
from pkt_fast.report import machine, versions  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
CPU_TIMES = "CPU seconds on one thread, as the machine did other work at the same time"
PARTS = ("micro", "transfer", "scaling")


def run(
    parts: Sequence[str],
    device: str,
    *,
    small: bool = False,
    only: str = "",
    seconds: float = 0,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure ``parts``; the result is what the JSON file holds.  ``keep`` gets it as it grows."""
    started = time.time()
    result: dict[str, Any] = {
        "format": 1,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)),
        "device": device,
        "small": small,
        "clock": clock_name(),
        "machine": machine(),
        "load_before": list(os.getloadavg()),
        "load_after": None,
        "versions": versions(),
        "rows": [],
        "scaling": [],
    }
    if "micro" in parts:
        for name in (name for name in micro.BUILDERS if only in name):
            case = micro.build(name, micro.SMALL if small else micro.FULL, device)
            case.seconds = seconds or case.seconds
            result["rows"].append(measure(case))
            print(markdown(result["rows"][-1:]).split("\n", 2)[2], end="", flush=True)
            keep(result)
    if "transfer" in parts and device == "cpu":
        result["rows"] += end_to_end.measure_all(end_to_end.SMALL if small else end_to_end.FULL)
        keep(result)
    if "scaling" in parts:
        result["scaling"] = scaling.curves(device, small=small)
    result["load_after"] = list(os.getloadavg())
    result["seconds"] = round(time.time() - started, 1)
    return result


def document(result: Mapping[str, Any]) -> str:
    """The Markdown page of a result."""
    described = result["machine"]
    lines = [
        "# Measured",
        "",
        f"{described['cpu']}, {described['cores']} cores, {described['torch_threads']} threads, "
        f"{described['cpu_capability']}, device {result['device']}, torch "
        f"{result['versions']['torch']}, {result['date']} UTC; load average before "
        f"{result['load_before'][0]:.1f}, after {result['load_after'][0]:.1f}.",
        *([f"Times are {CPU_TIMES}.", ""] if result["clock"] == "cpu" else [""]),
        markdown(result["rows"]),
    ]
    notes = [
        f"- **{row['name']}**: "
        + (f"relative error {row['error']:.1g}. " if row["error"] is not None else "")
        + row["note"]
        for row in result["rows"]
    ]
    lines += ["Errors are ours against the first peer.", "", *notes, ""]
    if result["scaling"]:
        lines += ["## Scaling", "", scaling.scaling_markdown(result["scaling"])]
    return "\n".join(lines)


def readme_table(result: Mapping[str, Any]) -> str:
    """What the README shows: a line a row, the first peer, and the machine."""
    described = result["machine"]
    lines = [
        f"Measured on {described['cores']} cores of {described['cpu']} "
        f"({described['cpu_capability']}), torch {result['versions']['torch']}, "
        f"{result['date'][:10]}, load average {result['load_before'][0]:.1f} before the run, by "
        "`pkt-fast bench`; all rows, peers and spreads are in `benchmarks/results`."
        + (f" Times are {CPU_TIMES}." if result["clock"] == "cpu" else ""),
        "",
        "| what | ours | peer | faster | ours / limit | targets |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = next(iter(row["peers"]))
        peer = row["peers"][name]
        other = f"{name}, {seconds_text(peer['median_s'])}" if "median_s" in peer else f"{name}: –"
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
        raise SystemExit(f"{readme} lacks {BEGIN} … {END}")
    readme.write_text(f"{before}{BEGIN}\n{readme_table(result)}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        return compare_results.main(argv[1:])
    parser = argparse.ArgumentParser(prog="pkt-fast bench", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS, "compare"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="rows of operations whose name contains this")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: CPU seconds on one thread, for a machine that does other work as well",
    )
    parser.add_argument("--seconds", type=float, default=0, help="time to spend on each operation")
    parser.add_argument("--json", type=Path, help="file to write, with .md and .png beside it")
    parser.add_argument("--update-readme", type=Path, metavar="JSON", help="no run: fill README")
    args = parser.parse_args(argv)
    if args.update_readme:
        result = json.loads(args.update_readme.read_text(encoding="utf-8"))
        update_readme(result, ROOT / "README.md")
        return 0
    use_clock(args.clock)
    path: Path | None = args.json

    def keep(result: dict[str, Any]) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)

    parts = PARTS if args.part == "all" else (args.part,)
    result = run(
        parts, args.device, small=args.small, only=args.only, seconds=args.seconds, keep=keep
    )
    print(document(result))
    keep(result)
    if path:
        path.with_suffix(".md").write_text(document(result), encoding="utf-8")
        scaling.plot(result["scaling"], path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
