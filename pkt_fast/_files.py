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

from .errors import OutputError


def check_output_dir(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse, before any work is done, an output directory that cannot or must not be written.

    Raises :class:`OutputError` when the path is a file, is not empty without ``overwrite``, or is
    not writable.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"output path {directory} is a file; give a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise OutputError(
            f"output directory {directory} is not empty; choose another or --overwrite"
        )
    try:
        parent = directory.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        probe = tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent)
        os.rmdir(probe)
    except OSError as error:
        raise OutputError(
            f"output directory {directory} is not writable: {error.strerror}"
        ) from error
    return directory


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the name ``path`` when the block ends without an
    error.

    On an error the temporary directory is removed and what stood at ``path`` before is untouched.
    Raises :class:`OutputError` as :func:`check_output_dir`, and when the disk is full.
    """
    final = check_output_dir(path, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.absolute().parent))
    try:
        yield temporary
        _replace_directory(temporary, final)
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(temporary: Path, final: Path) -> None:
    os.chmod(temporary, 0o777 & ~_umask())
    if not final.exists():
        os.rename(temporary, final)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.absolute().parent))
    os.rename(final, retired / "previous")
    os.rename(temporary, final)
    shutil.rmtree(retired, ignore_errors=True)


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
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON to ``path`` through a temporary name in the same directory."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
