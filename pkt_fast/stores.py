"""Activation rows kept between the phases of a transfer, in memory or in a directory of shards.

A store holds one or more named columns, (rows, D) each.  Its rows are grouped by example: example i
owns ``counts[i]`` consecutive rows.  Rows are appended once, in the order in which examples are
processed, and read back by example in any order.

On disk a store is ``manifest.json`` beside safetensors shards.  The manifest holds shapes, dtypes,
a checksum of every shard and the fingerprints of the model and the data, so that a second transfer
with the same source and data finds and trusts it.  Shards are memory-mapped on reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import shutil
import tempfile
import threading
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ._files import read_object, usual_access, write_json
from .errors import OutputError, StoreError
from .ops import capture_rows

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_BYTES = 64 * 2**20
_SAMPLES = 64
_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

Item = TypeVar("Item")


# --------------------------------------------------------------------------- columns


class Column(ABC):
    """One (rows, D) matrix, appended to in order, then read by row range."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self.filled = 0

    def append(self, values: Tensor) -> None:
        """Add rows (n, D) at the end; cast to the column's dtype."""
        self._check_room(len(values))
        self._write(values.detach().to(self.dtype))
        self.filled += len(values)

    def _check_room(self, rows: int) -> None:
        if self.filled + rows > self.rows:
            raise StoreError(f"store: {self.filled + rows} rows appended, {self.rows} expected")

    def capture(self, value: Tensor, index: Tensor) -> None:
        """Add rows ``index`` (n,) of an activation (B, T, D) at the end; cast likewise."""
        self.append(value.reshape(-1, self.width)[index.to(value.device)])

    @abstractmethod
    def _write(self, values: Tensor) -> None: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), perhaps as a view."""


class MemoryColumn(Column):
    """A preallocated tensor in host memory.

    With ``pinned`` pages, rows leave a GPU beside its work:
    :func:`~pkt_fast.ops.synchronize_captures` waits for those on their way.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, pinned: bool = False) -> None:
        super().__init__(rows, width, dtype)
        self._values = torch.empty(rows, width, dtype=dtype, pin_memory=pinned)
        self._pinned = pinned

    def capture(self, value: Tensor, index: Tensor) -> None:
        if value.device.type != "cpu" and not self._pinned:
            return super().capture(value, index)
        self._check_room(len(index))
        capture_rows(self._values, self.filled, index, value)
        self.filled += len(index)

    def _write(self, values: Tensor) -> None:
        if values.device.type != "cpu" and self._pinned:
            capture_rows(self._values, self.filled, torch.arange(len(values)), values)
        else:
            self._values[self.filled : self.filled + len(values)].copy_(values)

    def read(self, start: int, stop: int) -> Tensor:
        return self._values[start:stop]


class ShardedColumn(Column):
    """Safetensors files of at most :data:`SHARD_BYTES`, memory-mapped on reading.

    Rows go to the open file as they come: none are kept in memory.
    """

    def __init__(
        self, directory: Path, name: str, rows: int, width: int, dtype: torch.dtype
    ) -> None:
        super().__init__(rows, width, dtype)
        self.directory, self.name = directory, name
        self.shard_rows = max(1, SHARD_BYTES // max(1, width * dtype.itemsize))
        self.checksums: list[int] = []
        self._writer: _ShardWriter | None = None
        self._open: dict[int, Any] = {}

    def path(self, shard: int) -> Path:
        """File of one shard."""
        return self.directory / f"{self.name}-{shard:05d}.safetensors"

    def _write(self, values: Tensor) -> None:
        values = values.cpu()
        done = 0
        while done < len(values):
            shard, at = divmod(self.filled + done, self.shard_rows)
            size = min(self.shard_rows, self.rows - shard * self.shard_rows)
            count = min(size - at, len(values) - done)
            if self._writer is None:
                self._writer = _ShardWriter(self.path(shard), size, self.width, self.dtype)
            self._writer.write(values[done : done + count])
            done += count
            if at + count == size:
                self.checksums.append(self._writer.close())
                self._writer = None

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            shard, at = divmod(start, self.shard_rows)
            count = min(self.shard_rows - at, stop - start)
            parts.append(self._slice(shard, at, at + count))
            start += count
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, self.width, dtype=self.dtype)

    def _slice(self, shard: int, start: int, stop: int) -> Tensor:
        if shard not in self._open:
            self._open[shard] = safe_open(self.path(shard), "pt")
        rows: Tensor = self._open[shard].get_slice("rows")[start:stop]
        return rows


class _ShardWriter:
    """A safetensors file of one tensor "rows" (rows, D), written piece by piece.

    Raises :class:`OutputError` when it cannot be written.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self.path, self.crc32 = path, 0
        size = rows * width * dtype.itemsize
        entry = {"dtype": _SAFETENSORS[dtype], "shape": [rows, width], "data_offsets": [0, size]}
        header = json.dumps({"rows": entry}).encode()
        header += b" " * (-len(header) % 8)  # so that the data is aligned
        with self._named():
            self._file = path.open("wb")
        self._put(len(header).to_bytes(8, "little") + header)

    def write(self, rows: Tensor) -> None:
        """Add rows (n, D) of the file's dtype."""
        self._put(rows.contiguous().view(torch.uint8).numpy().data.cast("B"))

    def close(self) -> int:
        """Finish the file; returns its CRC-32."""
        with self._named():
            self._file.close()
        return self.crc32

    def _put(self, data: bytes | memoryview) -> None:
        with self._named():
            self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error


_SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}


def checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            value = zlib.crc32(piece, value)
    return value


# --------------------------------------------------------------------------- store


class ActivationStore:
    """Named columns whose rows are grouped by example.

    Attributes:
        counts: rows of every example.
        order: examples in the order their rows are appended.
        columns: the matrices by name.
    """

    def __init__(
        self, counts: Sequence[int], order: Sequence[int], columns: Mapping[str, Column]
    ) -> None:
        # Arrays: eight bytes an example, where a list of numbers takes forty.
        self.counts, self.order = array("q", counts), array("q", order)
        self.columns = dict(columns)
        self.total = sum(self.counts)
        self._starts = array("q", bytes(8 * len(self.counts)))
        stops = itertools.accumulate(self.counts[i] for i in self.order)
        for example, stop in zip(self.order, stops, strict=True):
            self._starts[example] = stop - self.counts[example]

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Append the rows of the next examples of :attr:`order` to every column."""
        for name, values in rows.items():
            self.columns[name].append(values)

    def capture(self, name: str, value: Tensor, index: Tensor) -> None:
        """Append rows ``index`` (n,) of an activation (B, T, D) to column ``name``."""
        self.columns[name].capture(value, index)

    def rows(self, name: str, examples: Iterable[int]) -> Tensor:
        """Rows of ``examples`` in the order given, packed: (Σ counts, D)."""
        column = self.columns[name]
        parts = [column.read(self._starts[i], self._starts[i] + self.counts[i]) for i in examples]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check_complete(self) -> None:
        """Raise :class:`StoreError` unless every row has been appended."""
        for name, column in self.columns.items():
            if column.filled != column.rows:
                raise StoreError(
                    f"store column {name}: {column.filled} of {column.rows} rows written"
                )

    @property
    def num_bytes(self) -> int:
        """Size of all columns."""
        return sum(c.rows * c.width * c.dtype.itemsize for c in self.columns.values())


ColumnSpec = tuple[int, torch.dtype]


def store_bytes(counts: Sequence[int], columns: Mapping[str, ColumnSpec]) -> int:
    """Bytes a store of ``columns`` (width, dtype) takes."""
    return sum(counts) * sum(width * dtype.itemsize for width, dtype in columns.values())


def memory_store(
    counts: Sequence[int],
    order: Sequence[int],
    columns: Mapping[str, ColumnSpec],
    pinned: bool = False,
) -> ActivationStore:
    """A store in host memory; ``pinned`` is for rows that come from a GPU."""
    total = sum(counts)
    return ActivationStore(
        counts,
        order,
        {
            name: MemoryColumn(total, width, dtype, pinned)
            for name, (width, dtype) in columns.items()
        },
    )


@contextlib.contextmanager
def writing_directory_store(
    path: Path,
    counts: Sequence[int],
    order: Sequence[int],
    columns: Mapping[str, ColumnSpec],
    fingerprint: Mapping[str, Any],
) -> Iterator[ActivationStore]:
    """Yield a store to append to; it takes the name ``path`` once complete, or leaves nothing
    behind.
    """
    total = sum(counts)
    with _made_in(path.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        store = ActivationStore(
            counts,
            order,
            {
                name: ShardedColumn(temporary, name, total, width, dtype)
                for name, (width, dtype) in columns.items()
            },
        )
        yield store
        store.check_complete()
        write_json(temporary / MANIFEST, _manifest(store, fingerprint))
        usual_access(temporary)
        _take_place(temporary, path)
        for column in store.columns.values():
            assert isinstance(column, ShardedColumn)
            column.directory = path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Give a finished store its name, unless another process has finished the same one meanwhile:
    that one may be in use already.
    """
    if (path / MANIFEST).is_file():
        return
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.rename(temporary, path)
    except OSError as error:
        if not (path / MANIFEST).is_file():
            raise OutputError(f"cannot make the store {path}: {error.strerror}") from error


@contextlib.contextmanager
def _made_in(directory: Path) -> Iterator[None]:
    """Make ``directory``; an error of that or of the block is an :class:`OutputError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"cannot make a store in {directory}: {error.strerror}") from error


def _manifest(store: ActivationStore, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "counts": store.counts.tolist(),
        "order": store.order.tolist(),
        "columns": {
            name: {
                "rows": column.rows,
                "width": column.width,
                "dtype": str(column.dtype).removeprefix("torch."),
                "shard_rows": column.shard_rows,
                "crc32": column.checksums,
            }
            for name, column in store.columns.items()
            if isinstance(column, ShardedColumn)
        },
    }


def open_directory_store(path: Path, fingerprint: Mapping[str, Any]) -> ActivationStore | None:
    """The store at ``path`` if it was made under ``fingerprint``; None when there is none.

    Raises :class:`StoreError` when the store is damaged or was made from something else.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return None
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        made_from = manifest["fingerprint"]
        columns = {
            name: _open_column(path, name, entry) for name, entry in manifest["columns"].items()
        }
        store = ActivationStore(manifest["counts"], manifest["order"], columns)
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise StoreError(
            f"store {path} is damaged ({error}); delete it to build it anew"
        ) from error
    if made_from != dict(fingerprint):
        differs = sorted(k for k in fingerprint if made_from.get(k) != fingerprint[k])
        raise StoreError(
            f"store {path} was made from another {', '.join(differs)}; delete it to build it anew"
        )
    return store


def _open_column(path: Path, name: str, entry: Mapping[str, Any]) -> ShardedColumn:
    column = ShardedColumn(
        path, name, entry["rows"], entry["width"], getattr(torch, entry["dtype"])
    )
    column.shard_rows = entry["shard_rows"]
    column.checksums = list(entry["crc32"])
    column.filled = column.rows
    for shard, expected in enumerate(column.checksums):
        if checksum(column.path(shard)) != expected:
            raise StoreError(
                f"store shard {column.path(shard)} is damaged (checksum); delete {path} to build "
                "it anew"
            )
    return column


def remembered_values(
    path: Path, fingerprint: Mapping[str, Any], compute: Callable[[], list[float]]
) -> list[float]:
    """The numbers in the file named ``path`` and ".json", or what ``compute`` returns, kept there.

    Raises :class:`StoreError` when the file is damaged or holds what was computed from something
    else, :class:`OutputError` when it cannot be written.
    """
    file = path.with_name(f"{path.name}.json")
    if not file.exists():
        with _made_in(path.parent):  # before anything is computed
            pass
        values = compute()
        write_json(file, {"fingerprint": dict(fingerprint), "values": values})
        return values
    known = read_object(file, "", StoreError)
    values = known.get("values", [])
    numbers = isinstance(values, list) and all(isinstance(value, float) for value in values)
    if known.get("fingerprint") != dict(fingerprint) or not values or not numbers:
        raise StoreError(f"{file} is damaged; delete it to compute it anew")
    return values


# --------------------------------------------------------------------------- fingerprints


def model_fingerprint(model: nn.Module) -> str:
    """Digest of a model's configuration and of evenly spaced elements of every weight, quantised
    ones in buffers included.

    Sampling (64 elements a weight) keeps this fast for large models; any training step changes
    nearly every element, so it tells checkpoints of one model apart.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        known = config.to_dict()
        for volatile in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
            known.pop(volatile, None)
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    weights = {name: w for name, w in model.state_dict().items() if isinstance(w, Tensor)}
    for name, weight in weights.items():
        flat = weight.detach().flatten()
        count = min(_SAMPLES, len(flat))
        # In integers: a float32 has no room for the positions of more than 16 million elements.
        picks = [i * (len(flat) - 1) // max(1, count - 1) for i in range(count)]
        sample = flat[torch.tensor(picks, dtype=torch.int64, device=flat.device)]
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample.to(torch.float64).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # PEFT's: which adapters act, and how strongly
            acting = [getattr(module, what, None) for what in _ADAPTER_STATE]
            digest.update(f"{name}{acting}".encode())
    return digest.hexdigest()[:32]


# --------------------------------------------------------------------------- prefetching


def prefetched(items: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Yield ``items`` while a thread prepares the next ``depth`` of them.

    An exception in the thread is raised here; leaving the loop early ends the thread.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="pkt_fast-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()
