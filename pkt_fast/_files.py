"""Writing results so that nothing half-written is ever seen under the final name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import OutputError, PktFastError

# What pkt_fast writes into output directories; nothing else is ever removed from one.
RESULT_FILES = frozenset(
    {
        "adapter_config.json",
        "adapter_model.safetensors",
        "analysis.json",
        "analysis.md",
        "cka.png",
        "comparison.json",
        "comparison.md",
        "recomposition.png",
        "report.html",
        "report.json",
        "round_trip.png",
    }
)
INVENTORY = "pkt_fast_files.json"
"""Lists the files of a directory whose names are not ours alone to use, as those of a model."""


def local(path: str | os.PathLike[str]) -> Path:
    """``path`` with a leading ``~`` expanded; as it is where nobody has such a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_output_dir(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse, before any work is done, an output directory that cannot or must not be written.

    Raises :class:`OutputError` when the path is empty or a file, is not empty without
    ``overwrite``, holds anything that pkt_fast did not write, or is not writable.
    """
    if not isinstance(path, str | os.PathLike):
        raise OutputError(f"the output directory is {path!r}; give a path")
    if not os.fspath(path):
        raise OutputError("the output directory has an empty name; give a directory")
    directory = local(path)
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"output path {directory} is a file; give a directory")
    try:
        present = sorted(os.listdir(directory)) if directory.is_dir() else []
    except OSError as error:
        raise OutputError(
            f"output directory {directory} is not readable: {error.strerror}"
        ) from error
    if present and not overwrite:
        raise OutputError(
            f"output directory {directory} is not empty; choose another or --overwrite"
        )
    inventory = _inventory(directory)
    foreign = [
        name
        for name in present
        if name not in inventory
        and (name not in RESULT_FILES or _is_folder(directory / name))
    ]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"output directory {directory} holds what pkt_fast did not write "
            f"({', '.join(foreign[:3])}{more}), and overwriting would delete it; choose another"
        )
    os.rmdir(_stage(directory))
    return directory


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def write_inventory(directory: Path) -> None:
    """Note that all files now in ``directory`` are pkt_fast's, so that overwriting may remove
    them.
    """
    write_json(directory / INVENTORY, sorted([*os.listdir(directory), INVENTORY]))


def _inventory(directory: Path) -> frozenset[str]:
    """The names in a directory's inventory; none where there is none that can be read."""
    try:
        names = json.loads((directory / INVENTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return frozenset(names) if listed else frozenset()


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory whose contents stand at ``path`` when the block ends without an
    error.

    Whoever writes files of other names than :data:`RESULT_FILES` calls :func:`write_inventory`
    last.  On an error the temporary directory is removed and what stood at ``path`` before is
    untouched.  Raises :class:`OutputError` as :func:`check_output_dir`, and when the disk is full.
    """
    final = check_output_dir(path, overwrite)
    temporary = _stage(final)
    try:
        yield temporary
        usual_access(temporary)
        if temporary.parent == final.absolute():
            _replace_contents(temporary, final)
        else:
            _replace_directory(temporary, final)
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OutputError(f"cannot write {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stage(final: Path) -> Path:
    """A new temporary directory: beside ``final``, or inside it where it has to keep its place."""
    absolute = final.absolute()
    try:
        absolute.parent.mkdir(parents=True, exist_ok=True)
        where = absolute if _stays(absolute) else absolute.parent
        return Path(tempfile.mkdtemp(prefix=f".{absolute.name}.", dir=where))
    except OSError as error:
        raise OutputError(f"output directory {final} is not writable: {error.strerror}") from error


def _stays(directory: Path) -> bool:
    """Whether a directory cannot be swapped for another: a mount point, a link, the working
    directory or one above it, or one whose parent is not ours to change.
    """
    if not directory.is_dir():
        return False
    real = directory.resolve()
    return (
        os.path.ismount(real)
        or directory.is_symlink()
        or _holds_working_directory(directory)
        or not os.access(directory.parent, os.W_OK)
    )


def _replace_directory(temporary: Path, final: Path) -> None:
    if not final.exists():
        os.rename(temporary, final)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.absolute().parent))
    os.rename(final, retired / "previous")
    os.rename(temporary, final)
    shutil.rmtree(retired, ignore_errors=True)


def _holds_working_directory(directory: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(directory.resolve())
    except FileNotFoundError:  # the working directory was deleted: nothing holds it
        return False


def _replace_contents(temporary: Path, final: Path) -> None:
    """Move what is in ``temporary``, a directory inside ``final``, in the place of all else."""
    for old in final.iterdir():
        if old.name == temporary.name:
            continue
        if _is_folder(old):
            shutil.rmtree(old)
        else:
            old.unlink()
    for new in list(temporary.iterdir()):
        os.rename(new, final / new.name)


def usual_access(path: Path) -> None:
    """Give a file, or a directory and the files in it, the permissions that new ones have.

    Temporary directories, and the files that safetensors writes, are their owner's alone.
    """
    allowed = ~_umask()
    for entry in (path, *path.rglob("*")):
        os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & allowed)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that is renamed to it when the block ends without
    error.

    Raises :class:`OutputError` when the file cannot be written (the disk is full, no permission).
    """
    final = local(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        usual_access(temporary)
        os.replace(temporary, final)
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OutputError(f"cannot write {final}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON to ``path`` through a temporary name in the same directory."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_object(path: Path, role: str, error_type: type[PktFastError]) -> dict[str, Any]:
    """The JSON object in a file; otherwise raises ``error_type``, with ``role`` before the path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError) as error:
        raise error_type(f"{role}{path} cannot be read: {error}") from error
    except ValueError as error:
        raise error_type(f"{role}{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_type(f"{role}{path} holds a {type(value).__name__}; give an object")
    return value
