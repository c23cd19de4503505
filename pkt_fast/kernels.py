"""The Triton kernels, one module per op: the folder ``kernels/`` of the repository.

It is installed as ``pkt_fast/kernels/``.  In a source tree it lies beside ``pkt_fast/``, where it
must never be importable by its own name: ``kernels`` is another distribution that Transformers
looks for.  This module gives the folder its only importable name in both places.
"""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"

__path__ = [str(_installed if _installed.is_dir() else _here.parent / "kernels")]
