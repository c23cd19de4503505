"""The benchmark suite: ``pkt-fast bench``, or ``python -m benchmarks`` in a checkout.

python -m benchmarks --json benchmarks/results/NAME.json     # everything; also NAME.md, NAME.png
python -m benchmarks micro --only align                      # one row
python -m benchmarks compare OLD.json NEW.json               # what got slower
python -m benchmarks readme benchmarks/results/NAME.json     # put the table into README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pkt_fast._files import atomic_file, write_json
from pkt_fast.report import machine, versions

from . import end_to_end, harness, micro, scaling
from .compare_results import compare

PARTS = ("micro", "transfer", "scaling")
README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


def main(argv: list[str] | None = None) -> int:
    """Run the suite; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.what == "compare":
        return compare(*args.files, tolerance=args.tolerance)
    if args.what == "readme":
        update_readme(Path(args.files[0]))
        return 0
    parts = PARTS if args.what == "all" else (args.what,)
    results = run(parts, args)
    if args.json:
        save(results, Path(args.json))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pkt-fast bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="all", choices=("all", *PARTS, "compare", "readme")
    )
    parser.add_argument("files", nargs="*", help="result files of compare and readme")
    parser.add_argument("--only", help="micro rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20, help="seconds a row, peers included")
    parser.add_argument("--json", help="write results here, with a .md and a .png beside it")
    parser.add_argument("--tolerance", type=float, default=0.25, help="compare: allowed slowdown")
    return parser


def run(parts: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Measure ``parts``, printing each table as it is ready."""
    device = torch.device(args.device)
    results: dict[str, Any] = {"machine": machine(), "versions": versions(), "quick": args.quick}
    if "micro" in parts:
        shapes = micro.QUICK if args.quick else micro.Shapes()
        results["micro"] = []
        for row in micro.rows(shapes, device, args.only):
            results["micro"].append(harness.measure(row, device, args.rounds, args.budget))
            harness.show(results["micro"][-1:], "")
        harness.show(results["micro"], "building blocks")
    if "transfer" in parts:
        setting = end_to_end.QUICK if args.quick else end_to_end.Setting()
        results["transfer"] = end_to_end.run(setting, device)
        print(transfer_markdown(results["transfer"]))
    if "scaling" in parts:
        results["scaling"] = scaling.run(device, args.quick)
        print(json.dumps(results["scaling"], indent=1))
    return results


def save(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, as a Markdown page, and the curves as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    if "scaling" in results:
        scaling.plot(results["scaling"], str(path.with_suffix(".png")))


def page(results: dict[str, Any]) -> str:
    """The Markdown of a results file."""
    described = results["machine"]
    found = results["versions"]
    parts = [
        f"{described['cpu']}, {described['torch_threads']} threads, "
        f"{described['cpu_capability']}"
        + (f", {', '.join(described['gpus'])}" if "gpus" in described else "")
        + f"; torch {found['torch']}, transformers {found['transformers']}, peft {found['peft']}.\n"
    ]
    if "micro" in results:
        parts.append(harness.markdown(results["micro"]))
    if "transfer" in results:
        parts.append(transfer_markdown(results["transfer"]))
    return "\n".join(parts)


def transfer_markdown(results: list[dict[str, Any]]) -> str:
    """The table of whole transfers."""
    lines = [
        "| what | ours | Transformers + PEFT | faster | by arithmetic | target | losses differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        met = "met" if row["speedup"] >= row["target"] else "missed"
        lines.append(
            f"| {row['name']}, {row['tokens']:,} tokens of {row['data']} "
            f"| {harness.seconds(row['ours_seconds'])} | {harness.seconds(row['peer_seconds'])} "
            f"| {row['speedup']:.1f}× | {row['expected_speedup']:.1f}× "
            f"| ≥ {row['target']:g}× {met} | {row['largest_loss_difference']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def update_readme(path: Path) -> None:
    """Put the page of a results file between the markers of README.md."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    body = page(json.loads(path.read_text(encoding="utf-8")))
    with atomic_file(README) as temporary:
        temporary.write_text(
            f"{before}{MARKERS[0]}\n{body.strip()}\n{MARKERS[1]}{after}", encoding="utf-8"
        )


if __name__ == "__main__":
    raise SystemExit(main())
