"""What the suite has measured, kept in a file from the first entry on.

Every entry is written as it comes, through a temporary name, so that an interrupted run keeps what
it had.  A later run on the same machine with the same settings adds to the file; an entry measured
again takes the earlier one's place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import reason
from pkt_fast._files import write_json
from pkt_fast.errors import ConfigError, DataError, OutputError

FORMAT = 3
LISTS = ("rows", "scaling", "failures")
IDENTITY = {
    "rows": ("name",), "scaling": ("curve", "name", "x"), "failures": ("part", "name"),
}


class Record:
    """The result of one or more runs.

    Attributes:
        result: what the JSON file holds: the settings, then lists of entries.  Every entry says
            when it was measured ("date", UTC) and how busy the machine was before it ("load").
        path: the file, or None.
        complaints: what failed in this run, a line each.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None) -> None:
        """Start with what ``path`` holds already.

        Raises :class:`ConfigError` when it was measured under other ``settings``,
        :class:`OutputError` when it cannot be written.
        """
        self.result: dict[str, Any] = {
            "format": FORMAT, **settings, **{name: [] for name in LISTS}
        }
        self.path = path
        self.complaints: list[str] = []
        if path is None:
            return
        if path.is_file():
            self._extend(read(path), settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        write_json(path, self.result)

    def _extend(self, known: dict[str, Any], settings: Mapping[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        differs = [name for name in settings if known.get(name) != settings[name]]
        if differs:
            raise ConfigError(
                f"{self.path} was measured with another {', '.join(differs)}: choose another file, "
                "or delete it to measure anew"
            )
        self.result = known

    def add(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one entry and keep it; a failure is kept as such and ends nothing."""
        stamp = {
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "load": round(os.getloadavg()[0], 2),
        }
        try:
            entry = measure() | stamp
        except Exception as error:
            self.complaints.append(f"{part}, {name}: {reason(error)}")
            self._put("failures", {"part": part, "name": name, "why": reason(error), **stamp})
        else:
            self.complaints += [f"{part}, {name}: {why}" for why in _failed_others(entry)]
            self.result["failures"] = [
                known for known in self.result["failures"]
                if (known["part"], known["name"]) != (part, name)
            ]
            self._put("scaling" if part == "scaling" else "rows", entry)
        if self.path:
            write_json(self.path, self.result)

    def _put(self, where: str, entry: dict[str, Any]) -> None:
        def identity(one: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(one[key] for key in IDENTITY[where])

        entries = self.result[where]
        for i, known in enumerate(entries):
            if identity(known) == identity(entry):
                entries[i] = entry
                return
        entries.append(entry)


def _failed_others(entry: Mapping[str, Any]) -> list[str]:
    """What failed beside our own call in a row or a point."""
    others = {**entry.get("peers", {}), **entry.get("limits", {})}
    if "peer_failed" in entry:
        others[entry["peer"]] = {"failed": entry["peer_failed"]}
    return [
        f"{name} failed: {found['failed']}" for name, found in others.items() if "failed" in found
    ]


def read(path: Path) -> dict[str, Any]:
    """A result file.  Raises :class:`DataError` for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = result["format"]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result of the suite: {reason(error)}") from error
    if known != FORMAT:
        raise DataError(f"{path} has format {known}, this suite writes {FORMAT}: measure anew")
    return result


def measured_when(result: Mapping[str, Any]) -> str:
    """Days and load averages of all entries, in words."""
    entries = [entry for name in LISTS for entry in result[name]]
    if not entries:
        return "nothing measured"
    days = sorted({entry["date"][:10] for entry in entries})
    loads = [f"{entry['load']:.1f}" for entry in entries]
    when, load = (
        values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
        for values in (days, sorted(loads, key=float))
    )
    return f"{when}, load average before a row {load}"
