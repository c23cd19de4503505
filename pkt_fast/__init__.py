"""pkt_fast: move what a large language model knows into a smaller one, through activations.

    import pkt_fast
    result = pkt_fast.transfer("path/to/source", "path/to/target", "train.jsonl")
    result.save("out")

The public names below load on first use, so that ``import pkt_fast`` itself is quick.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import errors, losses
    from .attribution import attribute
    from .capture import capture
    from .config import TransferConfig
    from .delta import LayerDelta, eject, inject
    from .losses import cka
    from .ops import backend
    from .pairing import LayerPair, pair_layers
    from .semantics import SemanticBasis, SemanticMap
    from .transfer import TransferResult, transfer

_HOMES = {
    "LayerDelta": "delta",
    "LayerPair": "pairing",
    "SemanticBasis": "semantics",
    "SemanticMap": "semantics",
    "TransferConfig": "config",
    "TransferResult": "transfer",
    "attribute": "attribution",
    "backend": "ops",
    "capture": "capture",
    "cka": "losses",
    "eject": "delta",
    "inject": "delta",
    "pair_layers": "pairing",
    "transfer": "transfer",
}
_MODULES = ("errors", "losses")

__all__ = [
    "LayerDelta",
    "LayerPair",
    "SemanticBasis",
    "SemanticMap",
    "TransferConfig",
    "TransferResult",
    "__version__",
    "attribute",
    "backend",
    "capture",
    "cka",
    "eject",
    "errors",
    "inject",
    "losses",
    "pair_layers",
    "transfer",
]


class _Package(types.ModuleType):
    """The package: a public function keeps its name when the submodule of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
