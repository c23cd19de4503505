"""Run the suite: operations, whole transfers, scaling curves; JSON, Markdown and a plot.

    pkt-fast bench                                     # everything, printed
    pkt-fast bench --output benchmarks/results         # and written
    pkt-fast bench --small                             # tiny shapes, seconds: does it run at all?
    python benchmarks/run.py --update-readme benchmarks/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # so that this file also runs as a script

from benchmarks import end_to_end, micro, scaling  # noqa: E402
from benchmarks.harness import markdown, measure  # noqa: E402
from pkt_fast._files import write_json  # noqa: E402
from pkt_fast.report import machine, versions  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PARTS = ("micro", "end_to_end", "scaling")


def run(
    parts: Sequence[str], device: str, *, small: bool = False, only: str = "", seconds: float = 0
) -> dict[str, Any]:
    """Measure ``parts``; the result is what the JSON file holds."""
    started = time.time()
    result: dict[str, Any] = {
        "format": 1,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)),
        "device": device,
        "small": small,
        "machine": machine(),
        "load_before": list(os.getloadavg()),
        "versions": versions(),
        "rows": [],
        "scaling": [],
    }
    if "micro" in parts:
        for case in micro.cases(micro.SMALL if small else micro.FULL, device, only):
            case.seconds = seconds or case.seconds
            result["rows"].append(measure(case))
            print(markdown(result["rows"][-1:]).split("\n", 2)[2], end="", flush=True)
    if "end_to_end" in parts and device == "cpu":
        result["rows"] += end_to_end.measure_all(end_to_end.SMALL if small else end_to_end.FULL)
    if "scaling" in parts:
        result["scaling"] = scaling.curves(device, small=small)
    return result | {
        "load_after": list(os.getloadavg()), "seconds": round(time.time() - started, 1)
    }


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
        "",
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
        "`pkt-fast bench`; all rows, peers and spreads are in `benchmarks/results`.",
        "",
        "| what | ours | peer | faster | ours / limit | targets |",
        "|---|---|---|---|---|---|",
    ]
    from benchmarks.harness import seconds_text

    for row in result["rows"]:
        name = next(iter(row["peers"]))
        peer = row["peers"][name]
        other = f"{name}, {seconds_text(peer['median_s'])}" if "median_s" in peer else f"{name}: –"
        faster = f"{row['speedups'][name]:.1f}x" if name in row["speedups"] else "–"
        limit = next((f"{r:.2f} ({n})" for n, r in row["of_limit"].items()), "–")
        targets = "; ".join(
            f"{t['what']} {'met' if t['met'] else 'missed'}" for t in row["targets"]
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
    parser = argparse.ArgumentParser(prog="pkt-fast bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="rows of operations whose name contains this")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=0, help="time to spend on each operation")
    parser.add_argument("--output", type=Path, help="directory for JSON, Markdown and plot")
    parser.add_argument("--name", default="", help="file name without suffix (the device)")
    parser.add_argument("--update-readme", type=Path, metavar="JSON", help="no run: fill README")
    args = parser.parse_args(argv)
    if args.update_readme:
        result = json.loads(args.update_readme.read_text(encoding="utf-8"))
        update_readme(result, ROOT / "README.md")
        return 0
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    result = run(
        parts, args.device, small=args.small, only=args.only, seconds=args.seconds
    )
    print(document(result))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        stem = args.name or args.device
        write_json(args.output / f"{stem}.json", result)
        (args.output / f"{stem}.md").write_text(document(result), encoding="utf-8")
        scaling.plot(result["scaling"], args.output, stem)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
