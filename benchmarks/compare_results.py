"""Compare two result files of the suite: exit status 1 when something became slower or failed.

    python benchmarks/compare_results.py BEFORE.json AFTER.json --tolerance 0.25

Medians of our calls are compared row by row.  A row is slower when its median grew by more than the
tolerance *and* its middle half lies above the earlier one's, so that a noisy row is not reported.
Files from different machines are refused unless ``--any-machine`` is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt_fast.cli import Parser, answered

MACHINE = ("cpu", "cores", "torch_threads", "gpus")


def regressions(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float
) -> list[tuple[str, float, bool]]:
    """(row, after / before, whether that counts as slower) for every row both files have."""
    earlier = {(row["name"], row["shape"]): row["ours"] for row in before["rows"]}
    found = []
    for row in after["rows"]:
        old, new = earlier.get((row["name"], row["shape"])), row["ours"]
        if old is None:
            continue
        ratio = new["median_s"] / old["median_s"]
        apart = new["quartiles_s"][0] > old["quartiles_s"][1]
        found.append((f"{row['name']} ({row['shape']})", ratio, ratio > 1 + tolerance and apart))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print every row's ratio.

    Returns 1 when a row is slower or failed, 2 for files that cannot be compared.
    """
    parser = Parser(
        prog="pkt-fast bench compare", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.25)
    parser.add_argument("--any-machine", action="store_true")
    args = parser.parse_args(argv)
    try:
        before, after = (
            json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after)
        )
        rows = regressions(before, after, args.tolerance)
        machines = [
            {key: file["machine"].get(key) for key in MACHINE} | {"clock": file.get("clock")}
            for file in (before, after)
        ]
        failed = [f"{entry['name']}: {entry['why']}" for entry in after.get("failures", ())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"cannot compare: {error!r}", file=sys.stderr)
        return 2
    if machines[0] != machines[1] and not args.any_machine:
        print(f"not the same machine: {machines[0]} and {machines[1]}", file=sys.stderr)
        return 2
    if not rows and not failed:
        print("the files have no row in common", file=sys.stderr)
        return 2
    for name, ratio, slower in rows:
        print(f"{ratio:6.2f}x  {'SLOWER ' if slower else '       '}{name}")
    for name in failed:
        print(f"         FAILED {name}")
    return int(bool(failed) or any(slower for _, _, slower in rows))


if __name__ == "__main__":
    raise SystemExit(answered(main))
