"""What got slower between two result files: ``python -m benchmarks compare OLD.json NEW.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def compare(old: str, new: str, tolerance: float) -> int:
    """Print the change of every row the files share; 1 when one is slower by more than
    ``tolerance``.

    Our time is judged relative to the row's limit where there is one, so that results of a slower
    moment, or of another machine, are not called regressions.
    """
    before, after = (_figures(json.loads(Path(p).read_text(encoding="utf-8"))) for p in (old, new))
    worse = 0
    for name in before.keys() & after.keys():
        change = after[name] / before[name] - 1
        slower = change > tolerance
        worse += slower
        print(f"{change:+7.1%}  {'SLOWER' if slower else '      '}  {name}")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"   only in {'OLD' if name in before else 'NEW'}  {name}")
    return int(worse > 0)


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The figure a row is judged by: time over the limit, or time over the peer."""
    figures = {row["name"]: row["over_limit"] for row in results.get("micro", [])}
    figures |= {row["name"]: 1 / row["speedup"] for row in results.get("transfer", [])}
    return figures
