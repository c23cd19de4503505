"""Where a decoder-only Transformers model keeps its layers, sublayers, final norm and head.

This package is the only place that knows.  Nothing here is a list of class names: a model is taken
apart by running a tiny *probe* (two rows of six random tokens) and watching the tensors that pass.

* **Blocks** (:mod:`.blocks`).  The largest ``ModuleList``; its members must each map (B, T, D) to
  (B, T, D).
* **Sublayers** (:mod:`.sublayers` records, :mod:`.residual` solves).  A residual block computes
  ``out = in + attention + mlp``, whatever its norms and wiring.  So the sublayer outputs *as added
  to the residual stream* are the module outputs that solve ``out - in = sum_i s_i * c_i``
  numerically, with s_i = 1 in nearly every family.  Post-norm families resolve to the norm's output
  and parallel blocks need no special case.
* **Roles** (:mod:`.roles`).  Attention is the first contribution, in execution order, that reacts
  at later positions when only the block input at position 0 is changed.
* **Linear modules** (:mod:`.linears`).  What a LoRA can adapt, and the paper's four among them.
* **Head** (:mod:`.head`).  ``logits = softcap(scale * head(hidden))`` is read off by feeding known
  values through whatever the model does after its head.

:mod:`.probe` runs these steps and :mod:`.findings` holds what they find.  :class:`Anatomy`
(:mod:`.model`) is what people use; it reads activations through :mod:`.taps` and runs parts of a
model through :mod:`.rerouting`.
"""

from .findings import HeadTransform
from .linears import is_transposed
from .model import Anatomy
from .modules import base_model
from .rerouting import HeadInput
from .taps import Tap, TapValue

__all__ = [
    "Anatomy",
    "HeadInput",
    "HeadTransform",
    "Tap",
    "TapValue",
    "base_model",
    "is_transposed",
]
