"""The other published ways to move knowledge: same data, trainer, adapter and report.

Fine-tuning, logit distillation and hidden-state distillation are settings of the common trainer
(:data:`pkt_fast.config.METHOD_SETTINGS`).  Two methods also read the source's weights, so they make
their delta in their own way: :mod:`~pkt_fast.methods.seeking` and :mod:`~pkt_fast.methods.laten`.
"""

from .delta_maker import DeltaMaker, LoraMaker, MethodInputs
from .laten import LatenMaker
from .seeking import SeekingMaker

__all__ = ["DeltaMaker", "LatenMaker", "LoraMaker", "MethodInputs", "SeekingMaker", "maker_of"]

_MAKERS: dict[str, type[DeltaMaker]] = {"seeking": SeekingMaker, "laten": LatenMaker}


def maker_of(method: str) -> type[DeltaMaker]:
    """What makes the delta of ``method``; made, it has read what it needs of the source."""
    return _MAKERS.get(method, LoraMaker)
