"""A model taken apart, for those who use it: :class:`Anatomy`."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..config import INTERFACES
from ..errors import ConfigError, ModelError
from ..lending import usual_defaults
from . import rerouting, streams
from .findings import HeadTransform, Structure
from .linears import linear_modules, misread, paper_targets
from .modules import base_model, children_at, head_of, ids_at, last_part, name_of, weight_of
from .probe import probe
from .rerouting import Contexts, HeadInput
from .taps import Tap, block_tap, sublayer_tap

# Structures hold no reference to their model, so an entry goes when its model does.
_structures: weakref.WeakKeyDictionary[nn.Module, Structure] = weakref.WeakKeyDictionary()
_probing = threading.RLock()  # two probes of one model would see each other's forward passes


class Anatomy:
    """A decoder-only language model taken apart.  Build it with :meth:`of`.

    Attributes:
        model: the Transformers model (the base model when given a PEFT wrapper).
        layers: the decoder blocks, in order of execution.
        layers_path: module path of their list, e.g. ``"model.layers"``.
        num_layers: number of blocks.
        hidden_size: width of the residual stream.
        vocab_size: rows of the head.
        final_norm: the norm between the last block and the head, or None.
        head: the LM head, with ``.weight`` (V, D) and perhaps ``.bias``.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model = model
        self._structure = structure
        self.layers_path = structure.layers_path
        self.layers: tuple[nn.Module, ...] = tuple(children_at(model, structure.layers_path))
        self.num_layers = len(self.layers)
        self.hidden_size = structure.hidden_size
        self.head = cast(nn.Linear, head_of(model))  # or an adapter that wraps one
        self.vocab_size = int(weight_of(self.head).shape[0])
        path = structure.final_norm_path
        self.final_norm = None if path is None else model.get_submodule(path)

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Take ``model`` apart, or recall the result of an earlier call.

        Args:
            model: a PreTrainedModel with an LM head, also LoRA-injected or wrapped in a PeftModel.

        Raises:
            ModelError: the model is not a decoder-only language model, has no weights (meta
                device), or its blocks do not map (B, T, D) to (B, T, D) once per forward.
            NumericsError: a block gives NaN or inf on random tokens.
        """
        base = base_model(model)
        with _probing:
            structure = _structures.get(base)
            if structure is None or structure.block_ids != ids_at(base, structure.layers_path):
                with usual_defaults():
                    structure = probe(base)
                _structures[base] = structure
        return cls(base, structure)

    def tap(self, layer: int, interface: str) -> Tap:
        """Where to read an activation of ``layer`` (0-based).

        Args:
            layer: block index.
            interface: ``"attention"`` or ``"mlp"``, the sublayer's output as added to the residual
                stream; ``"block"``, the block's output; ``"contribution"``, output minus input.

        Raises:
            ConfigError: ``layer`` or ``interface`` does not exist.
            ModelError: the block has no such sublayer, or none that a hook can read.
        """
        block, plan = self.layers[self._checked(layer)], self._structure.plans[layer]
        if interface in ("block", "contribution"):
            minus_input = interface == "contribution"
            return block_tap(block, self.hidden_size, minus_input=minus_input, copy=plan.copy)
        if interface not in INTERFACES:
            raise ConfigError(f"interface {interface!r} is unknown: use one of {INTERFACES}")
        source = plan.taps.get(interface)
        if source is None:
            raise ModelError(
                f"layer {layer} of {name_of(self.model)} has no module whose output is the "
                f"{interface} term of its residual sum: use interface='contribution' or 'block'"
            )
        return sublayer_tap(block, source)

    def block_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The (B, T, D) residual stream among the arguments of a block call."""
        return streams.block_input(args, kwargs, self.hidden_size)[1]

    def block_output(self, output: Any) -> Tensor:
        """The (B, T, D) residual stream in what a block returned."""
        return streams.block_output(output)

    @contextlib.contextmanager
    def resume_at(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Inside, the model runs from block ``layer`` on, fed with ``hidden``.

        Call the model as usual, with the ``input_ids``, ``attention_mask`` and ``position_ids`` of
        the pass that produced ``hidden``; masks and rotary tables then come from the model itself.
        Blocks below ``layer`` compute nothing and build no graph.

        Args:
            layer: first block to run.
            hidden: (B, T, D), the input of that block.

        Raises:
            ConfigError: ``layer`` does not exist, or ``hidden`` does not fit the batch.
            ModelError: upper blocks read more of the lower ones than the residual stream.
        """
        self._checked(layer)
        if not self._structure.resumable:
            raise ModelError(
                f"{name_of(self.model)} cannot resume inside: its upper layers also read other "
                "state of the lower ones"
            )
        with rerouting.resumed(self.layers, self._structure.plans, layer, hidden, self.hidden_size):
            yield

    @contextlib.contextmanager
    def recompute_from(self, layer: int, contexts: Contexts) -> Iterator[None]:
        """Inside, blocks from ``layer`` up keep no activations for backward but their input.

        Unlike a model's own gradient checkpointing this also holds in evaluation mode, in which
        dropout is off, and for models that have none.  ``contexts`` gives the contexts of a block's
        run in the forward pass and of the one in backward.
        """
        with rerouting.recomputed(self.layers[self._checked(layer) :], contexts):
            yield

    @contextlib.contextmanager
    def stop_after(self, layer: int) -> Iterator[None]:
        """Inside, a call of the model ends the ``with`` body right after block ``layer``.

        Hooks on the block itself have run by then; later blocks, final norm and head have not.
        """
        following: list[nn.Module] = [self.head]
        if self._checked(layer) + 1 < self.num_layers:
            following = [self.layers[layer + 1]]
        elif self.final_norm is not None:
            following.append(self.final_norm)
        # On entry of what comes next, not on exit of the block: the order in which the block's own
        # forward hooks were registered then does not matter.
        with rerouting.stopped_after(self.layers[layer], following):
            yield

    def run_until(self, layer: int, **inputs: Any) -> None:
        """Run the model on ``inputs`` up to and including block ``layer``."""
        with self.stop_after(layer):
            self.model(**inputs)

    @contextlib.contextmanager
    def bypass_head(self) -> Iterator[HeadInput]:
        """Inside, the model skips its vocabulary-wide matmul; the yielded object has its input.

        The logits the model returns have width 0, so do not pass ``labels``.
        """
        with rerouting.bypassed(self.head) as caught:
            yield caught

    def head_transform(self) -> HeadTransform:
        """What the model does to the head's output to make logits."""
        return self._structure.head_transform

    def lora_targets(self, layer: int, modules: Sequence[str] | None = None) -> list[str]:
        """Full paths of the linear modules of block ``layer`` that a LoRA should adapt.

        Args:
            layer: block index.
            modules: last path components to match.  None takes ``up_proj``, ``down_proj``,
                ``v_proj`` and ``o_proj`` (the paper's choice), or for each sublayer that names them
                differently the counterparts: MLP input and output projections, attention value (or
                fused) and output projection.  Modules whose names PEFT takes for those of stacked
                experts are left out.

        Raises:
            ConfigError: no linear module of the block has one of these names, or PEFT would adapt
                something else.
        """
        block = self.layers[self._checked(layer)]
        prefix = f"{self.layers_path}.{layer}."
        present = [path for path, _ in linear_modules(block)]
        if modules is None:
            chosen = set(paper_targets(self._structure.plans[layer].linears))
        else:
            chosen = {path for path in present if last_part(path) in modules}
        lost = misread(self.model, [prefix + path for path in sorted(chosen)])
        if lost and modules is not None:
            raise ConfigError(
                f"target_modules {sorted({last_part(path) for path in lost})} are the names of "
                f"experts in {name_of(self.model)}, which PEFT would adapt in place of {lost[0]}: "
                "leave them out"
            )
        chosen -= {path.removeprefix(prefix) for path in lost}
        if not chosen:
            names = sorted({last_part(path) for path in present})
            wanted = "projections found by structure" if modules is None else sorted(modules)
            raise ConfigError(
                f"target_modules {wanted} match no linear module of layer {layer}: it has {names}"
            )
        return [prefix + path for path in present if path in chosen]

    def output_projection(self, layer: int, interface: str) -> tuple[str, nn.Module] | None:
        """The linear module whose output *is* ``tap(layer, interface)``, with its full path.

        None when a norm or a scale follows it, when experts share the work, or when the interface
        is not a sublayer.
        """
        path = self._structure.plans[self._checked(layer)].projections.get(interface)
        if path is None:
            return None
        return f"{self.layers_path}.{layer}.{path}", self.layers[layer].get_submodule(path)

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            raise ConfigError(
                f"layer {layer} is out of range: {name_of(self.model)} has layers 0 to "
                f"{self.num_layers - 1}"
            )
        return layer
