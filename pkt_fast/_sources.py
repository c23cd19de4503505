"""The identity of the extension's sources, so that one built from others is noticed.

setup.py runs this file by its path and compiles the digest in; ``pkt_fast.ops`` compares.  It must
import nothing but the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def digest(csrc: Path) -> str:
    """16 hexadecimal digits over the names and contents of the C++ and CUDA sources in ``csrc``."""
    total = hashlib.sha256()
    for name in sorted(p.relative_to(csrc).as_posix() for p in csrc.rglob("*")):
        path = csrc / name
        if path.suffix in _SUFFIXES and path.is_file():
            content = path.read_bytes()
            total.update(f"{name} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()[:16]
