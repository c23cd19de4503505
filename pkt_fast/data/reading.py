"""Rows from files and objects, not looked into; where each came from."""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import local
from ..errors import DataError

_SUFFIXES = (".jsonl", ".json", ".txt")

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where rows came from; ``lines[i]`` is the 1-based line of row i where there are lines."""

    name: str
    lines: Sequence[int] | None = None

    def where(self, row: int) -> str:
        """Name one row for an error message."""
        if self.lines is None:
            return f"{self.name} row {row}"
        return f"{self.name} line {self.lines[row]}"


def read_rows(data: Any = None, *, limit: int | None = None) -> tuple[list[Row], Origin]:
    """Read rows, without looking into them, and say where they came from.

    Args:
        data: a path to .jsonl (one JSON value a line), .json (a list) or .txt (one text a line);
            an iterable of dicts or strings; a ``datasets.Dataset``; None for the bundled set.
        limit: stop after this many rows.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON (with the line), of another
            kind; or a row is neither a dict nor a string.
    """
    rows, origin = stream_rows(data, limit=limit)
    return list(rows), origin


def stream_rows(data: Any = None, *, limit: int | None = None) -> tuple[Iterator[Row], Origin]:
    """Like :func:`read_rows`, but rows are read as they are asked for, and so are their errors.

    A .json file is one value, and read as a whole.
    """
    if data is None:
        from pkt_fast.demo import bundled_rows

        raw, origin = iter(bundled_rows()), Origin("bundled data")
    elif isinstance(data, str | os.PathLike):
        raw, origin = _open_file(local(data))
    else:
        raw, origin = _open_object(data)
    return _rows(itertools.islice(raw, limit), origin), origin


def _rows(raw: Iterator[Any], origin: Origin) -> Iterator[Row]:
    number = -1
    for number, value in enumerate(raw):
        yield as_row(value, origin, number)
    if number < 0:
        raise DataError(f"{origin.name}: no rows in it; give at least one example")


def _open_file(path: Path) -> tuple[Iterator[Any], Origin]:
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name a file ending in {', '.join(_SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{path}: unknown file type {path.suffix!r}; give a file ending in "
            f"{', '.join(_SUFFIXES)}"
        )
    if suffix == ".json":
        return iter(_read_list(path)), Origin(str(path))
    numbers = array("q")
    lines = _numbered(path, numbers)
    values = lines if suffix == ".txt" else _parse_lines(path, lines, numbers)
    return values, Origin(str(path), numbers)


def _read_list(path: Path) -> list[Any]:
    """The rows of a .json file."""
    text = "".join(_lines(path))
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    values = _parse_json(text, str(path))
    if not isinstance(values, list):
        raise DataError(
            f"{path}: a .json file must hold a list of rows, this one holds "
            f"{json_type(values)}; one row a line goes into a .jsonl file"
        )
    return values


def _numbered(path: Path, numbers: array[int]) -> Iterator[str]:
    """The lines of a file that are not blank; each one's 1-based number is put into ``numbers``."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            numbers.append(number)
            yield line.removesuffix("\n").removesuffix("\r")
    if not numbers:
        raise DataError(f"{path}: the file is empty")


def _parse_lines(path: Path, lines: Iterator[str], numbers: Sequence[int]) -> Iterator[Any]:
    for line in lines:
        yield _parse_json(line, str(path), numbers[-1])


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends.

    Newlines alone end them: inside texts there are Unicode's line separators.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _decoded(raw, path, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as "
            "UTF-8"
        ) from error


def _parse_json(text: str, name: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise DataError(
            f"{name} line {at}: not valid JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} line {line or 1}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{name} line {line or 1}: {error}") from error


def _open_object(data: Any) -> tuple[Iterator[Any], Origin]:
    kind = type(data)
    # By name, so that the datasets library is not imported (nor needed) for a list of dicts.
    from_datasets = kind.__module__.split(".")[0] == "datasets"
    if isinstance(data, Mapping):
        hint = f"choose a split: {', '.join(map(str, data))}" if from_datasets else "wrap it in []"
        raise DataError(f"data is a {kind.__name__}, not a sequence of rows; {hint}")
    if callable(getattr(data, "iterrows", None)):  # a table, whose iteration gives column names
        raise DataError(
            f"data is a {kind.__name__}, not a sequence of rows; give data.to_dict('records')"
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"data of type {kind.__name__} is not understood; give a path, a list of dicts or "
            "strings, or a datasets.Dataset"
        )
    name = f"datasets.{kind.__name__}" if from_datasets else kind.__name__
    return iter(data), Origin(name)


def as_row(value: Any, origin: Origin, row: int) -> Row:
    """One row as a dict; a string is a text.  Raises :class:`DataError` for anything else."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise DataError(
        f"{origin.where(row)}: a row must be an object or a string, not {json_type(value)}"
    )


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ]
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
