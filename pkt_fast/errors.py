"""Every error pkt_fast raises on purpose.

All of them derive from :class:`PktFastError`, so one ``except`` clause separates "the input or the
setting is wrong" from a bug.  Messages are one line: what is wrong, where, and what to do about it.
Each class also derives from the built-in exception a Python user would expect for that situation.
"""

from __future__ import annotations


class PktFastError(Exception):
    """Base class of every error raised on purpose."""


class ConfigError(PktFastError, ValueError):
    """A setting is unknown or has an impossible value."""


class DataError(PktFastError, ValueError):
    """Training data cannot be read, or holds nothing to learn from."""


class ModelError(PktFastError, ValueError):
    """A model is not a decoder-only language model pkt_fast can take apart."""


class VocabularyError(PktFastError, ValueError):
    """Source and target do not share enough vocabulary to be aligned."""


class NumericsError(PktFastError, ArithmeticError):
    """An activation, a loss or a weight is not finite."""


class DeltaError(PktFastError, ValueError):
    """An adapter cannot be read, or its shapes do not fit the model."""


class StoreError(PktFastError, ValueError):
    """An activation store is damaged or was made from another model or other data."""


class OutputError(PktFastError, OSError):
    """An output cannot be written."""


class ShapeError(PktFastError, ValueError):
    """Tensors handed to an op do not fit each other."""


class BackendError(PktFastError, RuntimeError):
    """The requested backend cannot serve this op on this device."""


class MissingExtraError(PktFastError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}: pip install 'pkt-fast[{extra}]'"
        )
