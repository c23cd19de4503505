"""Where a decoder-only Transformers model keeps its layers, sublayers, final norm and head.

This is the only module that knows.  Nothing here is a list of class names: a model is taken apart
by running a tiny *probe* (two rows of six random tokens) and watching the tensors that pass.

* **Blocks.**  The largest ``ModuleList``; its members must each map (B, T, D) to (B, T, D).
* **Sublayers.**  A residual block computes ``out = in + attention + mlp``, whatever its norms and
  wiring.  So the sublayer outputs *as added to the residual stream* are the module outputs that
  solve ``out - in = sum_i s_i * c_i`` numerically, with s_i = 1 in nearly every family.  Post-norm
  families resolve to the norm's output and parallel blocks need no special case.
* **Roles.**  Attention is the first contribution, in execution order, that reacts at later
  positions when only the block input at position 0 is changed.
* **Head.**  ``logits = softcap(scale * head(hidden))`` is read off by feeding known values through
  whatever the model does after its head.

Results are cached per model as module paths, not modules, so adapters injected later (which replace
modules in place) are seen.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pkt_fast.errors import ConfigError, ModelError, NumericsError, PktFastError
from pkt_fast.lending import eager, evaluating

INTERFACES = ("mlp", "attention", "block", "contribution")

_ROWS, _TOKENS = 2, 6


@dataclass(frozen=True)
class TapValue:
    """A layer activation as the tensors it is made of: a fused kernel can do the arithmetic.

    Attributes:
        value: (B, T, D).
        minus: (B, T, D) to subtract from ``value``, or None.
        scale: multiplies the difference (a model's residual multiplier); 1.0 otherwise.
    """

    value: Tensor
    minus: Tensor | None = None
    scale: float = 1.0

    def tensor(self) -> Tensor:
        """``scale * (value - minus)``, shape (B, T, D)."""
        result = self.value if self.minus is None else self.value - self.minus
        return result if self.scale == 1.0 else result * self.scale


@dataclass(frozen=True, eq=False)
class Tap:
    """One place where a layer's activation can be read with a forward hook on ``module``.

    Register the hook with ``with_kwargs=True`` and give what it receives to :meth:`read`.  Keep the
    tap alive as long as the hook: some families flatten their tokens inside the block, and the tap
    then watches the block to know the batch shape.
    """

    module: nn.Module
    _reader: Callable[[tuple[Any, ...], Mapping[str, Any], Any], TapValue] = field(repr=False)
    _index: int | None = None

    def returned(self, output: Any) -> Tensor:
        """The tensor that :meth:`read` takes its value from, as the module returned it.

        It stands in the autograd graph of what follows also where :meth:`read` copies or reshapes
        it.
        """
        if self._index is not None:
            return cast(Tensor, output[self._index])
        return cast(Tensor, output if isinstance(output, Tensor) else output[0])

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
        """The activation of this call; the live tensors unless the block overwrites them later."""
        return self._reader(args, kwargs, output)


@dataclass(frozen=True)
class HeadTransform:
    """``logits = f(head(hidden))`` with f(z) = softcap * tanh(scale * z / softcap).

    Attributes:
        scale: multiplies the head's output.
        softcap: bound of the logits; 0.0 means none, then f(z) = scale * z.
        bias: whether the head adds a bias (before f).
        exact: False when no such f explains the model's logits.
    """

    scale: float
    softcap: float
    bias: bool
    exact: bool

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply f to the head's output (..., V)."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled


class HeadInput:
    """Holds the head's input of the latest call inside :meth:`Anatomy.bypass_head`."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, T, D), part of the autograd graph when there is one."""
        if self._hidden is None:
            raise ModelError("the head was not reached inside bypass_head(): call the model first")
        return self._hidden


# --------------------------------------------------------------------------- what a probe finds


@dataclass(frozen=True)
class _Source:
    """A tensor a hook can read: part of a module's output, perhaps minus one of its inputs."""

    path: str  # relative to the block
    index: int | None  # element of a tuple output; None: the output itself
    minus: int | str | None  # argument to subtract, by position or name
    flat: bool  # (B*T, D) instead of (B, T, D)
    scale: float = 1.0
    copy: bool = False  # the block changes this tensor in place after the hook has seen it

    def bare(self) -> _Source:
        """The tensor itself, as the probe records it."""
        return replace(self, scale=1.0, copy=False)


@dataclass(frozen=True)
class _Linear:
    """A linear module of a block, its shape, and what is special about it."""

    path: str
    in_features: int
    out_features: int
    mixes: bool  # its output depends on earlier positions
    fused: bool  # a fused kernel may read its weight without calling it


@dataclass(frozen=True)
class _LayerPlan:
    """What the probe learned about one block."""

    taps: Mapping[str, _Source]  # "attention", "mlp": those that were found
    projections: Mapping[str, str]  # interface -> path of the linear whose output is the tap
    linears: tuple[_Linear, ...]  # in execution order
    output: tuple[type, int] | None  # container type and length; None: a bare tensor
    copy: bool  # the model changes the block's output in place after its hooks have seen it


@dataclass(frozen=True)
class _Structure:
    """All findings of a probe.  Holds no reference to the model."""

    layers_path: str
    block_ids: tuple[int, ...]
    hidden_size: int
    plans: tuple[_LayerPlan, ...]
    final_norm_path: str | None
    head_transform: HeadTransform
    resumable: bool


_structures: weakref.WeakKeyDictionary[nn.Module, _Structure] = weakref.WeakKeyDictionary()


# ------------------------------------------------------------------------------------ the API


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

    def __init__(self, model: nn.Module, structure: _Structure) -> None:
        self.model = model
        self._structure = structure
        self.layers_path = structure.layers_path
        self.layers: tuple[nn.Module, ...] = tuple(_children(model, structure.layers_path))
        self.num_layers = len(self.layers)
        self.hidden_size = structure.hidden_size
        self.head = cast(nn.Linear, _head_of(model))  # or an adapter that wraps one
        self.vocab_size = int(_weight_of(self.head).shape[0])
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
        """
        base = _base_model(model)
        structure = _structures.get(base)
        if structure is None or structure.block_ids != _ids(base, structure.layers_path):
            structure = _probe(base)
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
        block = self.layers[self._checked(layer)]
        if interface in ("block", "contribution"):
            return self._tap_block(layer, minus_input=interface == "contribution")
        if interface not in INTERFACES:
            raise ConfigError(f"interface {interface!r} is unknown: use one of {INTERFACES}")
        source = self._structure.plans[layer].taps.get(interface)
        if source is None:
            raise ModelError(
                f"layer {layer} of {_name(self.model)} has no module whose output is the "
                f"{interface} term of its residual sum: use interface='contribution' or 'block'"
            )
        return _tap_source(block, source)

    def block_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The (B, T, D) residual stream among the arguments of a block call."""
        return _stream(args, kwargs, self.hidden_size)[1]

    def block_output(self, output: Any) -> Tensor:
        """The (B, T, D) residual stream in what a block returned."""
        return output if isinstance(output, Tensor) else output[0]

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
                f"{_name(self.model)} cannot resume inside: its upper layers also read other "
                "state of the lower ones"
            )
        with _resume(self.layers, self._structure.plans, layer, hidden, self.hidden_size):
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

        def stop(module: nn.Module, args: Any) -> None:
            raise _Stop

        # On entry of what comes next, not on exit of the block: the order in which the block's own
        # forward hooks were registered then does not matter.
        with contextlib.ExitStack() as stack, contextlib.suppress(_Stop):
            for module in following:
                stack.enter_context(module.register_forward_pre_hook(stop, prepend=True))
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
        caught = HeadInput()

        def keep(hidden: Tensor) -> Tensor:
            caught._hidden = hidden
            return hidden.new_zeros((*hidden.shape[:-1], 0))

        with _patched_forward(self.head, keep):
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
                fused) and output projection.

        Raises:
            ConfigError: no linear module of the block has one of these names.
        """
        block = self.layers[self._checked(layer)]
        present = [path for path, _ in _linears(block)]
        if modules is None:
            chosen = set(_paper_targets(self._structure.plans[layer].linears))
        else:
            chosen = {path for path in present if _last(path) in modules}
        if not chosen:
            names = sorted({_last(path) for path in present})
            wanted = "projections found by structure" if modules is None else sorted(modules)
            raise ConfigError(
                f"target_modules {wanted} match no linear module of layer {layer}: it has {names}"
            )
        prefix = f"{self.layers_path}.{layer}."
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
                f"layer {layer} is out of range: {_name(self.model)} has layers 0 to "
                f"{self.num_layers - 1}"
            )
        return layer

    def _tap_block(self, layer: int, minus_input: bool) -> Tap:
        copy = self._structure.plans[layer].copy

        def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
            value = self.block_output(output)
            minus = self.block_input(args, kwargs) if minus_input else None
            if copy:
                value, minus = value.clone(), None if minus is None else minus.clone()
            return TapValue(value, minus)

        return Tap(self.layers[layer], read)


# --------------------------------------------------------------------------- reading and patching


class _Stop(BaseException):
    """Ends a forward early.  Not an Exception, so that no handler inside a model swallows it."""


def _tap_source(block: nn.Module, source: _Source) -> Tap:
    grid: list[tuple[int, int]] = []

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> TapValue:
        value = output if source.index is None else output[source.index]
        minus = None if source.minus is None else _argument(args, kwargs, source.minus)
        if source.flat:
            value = value.view(*grid[-1], -1)
            minus = None if minus is None else minus.view(*grid[-1], -1)
        if source.copy:
            value = value.clone()
            minus = None if minus is None else minus.clone()
        return TapValue(value, minus, source.scale)

    tap = Tap(block.get_submodule(source.path), read, source.index)
    if source.flat:

        def learn_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = next(t for t in (*args, *kwargs.values()) if _is_stream(t))
            grid[:] = [(stream.shape[0], stream.shape[1])]

        handle = block.register_forward_pre_hook(learn_shape, with_kwargs=True)
        weakref.finalize(tap, handle.remove)
    return tap


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(args)
    yield from kwargs.items()


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _is_stream(value: Any, width: int | None = None) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and value.is_floating_point()
        and (width is None or value.shape[-1] == width)
    )


def _stream(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int
) -> tuple[int | str, Tensor]:
    """The first (B, T, width) argument of a block call, and where it was passed."""
    for key, value in _arguments(args, kwargs):
        if _is_stream(value, width):
            return key, value
    raise ModelError(f"a block was called without a (B, T, {width}) argument")


def _with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block call with the residual stream replaced by ``hidden``."""
    key, old = _stream(args, kwargs, hidden.shape[-1])
    if old.shape != hidden.shape:
        raise ConfigError(
            f"hidden has shape {tuple(hidden.shape)}, the batch needs {tuple(old.shape)}"
        )
    hidden = hidden.to(old.device)
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}


@contextlib.contextmanager
def _patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` on this instance; nesting and foreign patches are restored."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def _resume(
    blocks: Sequence[nn.Module],
    plans: Sequence[_LayerPlan],
    layer: int,
    hidden: Tensor,
    width: int,
) -> Iterator[None]:
    if not _is_stream(hidden, width):
        raise ConfigError(f"hidden has shape {tuple(hidden.shape)}, expected (B, T, {width})")

    def pass_through(plan: _LayerPlan) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = _stream(args, kwargs, width)[1].detach()
            if plan.output is None:
                return stream
            container, length = plan.output
            return container([stream] + [None] * (length - 1))

        return forward

    # A hook, not a patched forward: the block's own forward hooks then see the new input too.
    def feed(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _with_stream(args, kwargs, hidden)

    with contextlib.ExitStack() as stack:
        for index in range(layer):
            stack.enter_context(_patched_forward(blocks[index], pass_through(plans[index])))
        stack.enter_context(
            blocks[layer].register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        )
        yield


# ------------------------------------------------------------------------------------ the probe


def _probe(model: nn.Module) -> _Structure:
    head = _head_of(model)
    inputs = _probe_inputs(model, head)
    with _undisturbed(model):
        survey = _survey(model, head, inputs)
        blocks = _children(model, survey.layers_path)
        record = _record_blocks(model, head, survey, blocks, inputs)
        mixing = _record_mixing(model, survey, blocks, record, inputs)
        plans = _make_plans(blocks, record, mixing)
        resumable = _check_resume(model, blocks, plans, record, survey, inputs)
        transform = _probe_head(model, head, inputs)
    return _Structure(
        layers_path=survey.layers_path,
        block_ids=tuple(map(id, blocks)),
        hidden_size=survey.width,
        plans=tuple(plans),
        final_norm_path=record.final_norm_path,
        head_transform=transform,
        resumable=resumable,
    )


def _base_model(model: nn.Module) -> nn.Module:
    model = eager(model)
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _head_of(model: nn.Module) -> nn.Module:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{_name(model)} is an encoder-decoder model: pkt_fast needs decoder-only")
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ModelError(
            f"{_name(model)} has no language-model head: load it with AutoModelForCausalLM"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{_name(model)} has weights on the meta device: load them first")
    return head


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _weight_of(head: nn.Module) -> Tensor:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"the head ({_name(head)}) has no (V, D) weight")
    return weight


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _ids(model: nn.Module, path: str) -> tuple[int, ...]:
    """Identities of the blocks now at ``path``: a pruned or replaced stack is probed again."""
    try:
        return tuple(map(id, _children(model, path)))
    except AttributeError:
        return ()


def _probe_inputs(model: nn.Module, head: nn.Module) -> dict[str, Any]:
    """Two rows of random tokens that differ in the last one only."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = int(min(_weight_of(embeddings).shape[0], _weight_of(head).shape[0]))
    config = getattr(model, "config", None)
    special = {
        value
        for name, value in (vars(config) if config is not None else {}).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    allowed = [token for token in range(min(size, 4096)) if token not in special]
    if len(allowed) < _TOKENS + 1:
        raise ModelError(f"{_name(model)} has a vocabulary of {size} tokens: too few to probe")
    generator = torch.Generator().manual_seed(20251)
    order = torch.randperm(len(allowed), generator=generator)[: _TOKENS + 1].tolist()
    tokens = [allowed[i] for i in order]
    ids = torch.tensor([tokens[:_TOKENS], [*tokens[: _TOKENS - 1], tokens[-1]]])
    ids = ids.to(_weight_of(embeddings).device)
    optional = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    return {"input_ids": ids, **{k: v for k, v in optional.items() if k in accepted}}


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state come back afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    uncompiled = torch.compiler.set_stance("force_eager")  # compiled calls may skip new hooks
    with torch.random.fork_rng(devices=devices), torch.no_grad(), uncompiled, evaluating(model):
        yield


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    try:
        output = model(**inputs)
    except PktFastError:
        raise
    except Exception as error:
        raise ModelError(
            f"{_name(model)} does not run on token ids alone: {type(error).__name__}: {error}"
        ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{_name(model)} returns no (B, T, V) logits")
    return logits


def _exact(value: Tensor) -> Tensor:
    """A float64 copy on the CPU, where the solving is done."""
    return value.detach().to("cpu", copy=True).double()


@contextlib.contextmanager
def _forward_hooks(
    modules: Iterable[tuple[str, nn.Module]],
    hook: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None],
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, module in modules:

            def call(
                module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
            ) -> None:
                hook(name, args, kwargs, output)

            stack.enter_context(module.register_forward_hook(call, with_kwargs=True))
        yield


# -- step 1: the blocks


@dataclass(frozen=True)
class _Survey:
    layers_path: str
    width: int
    logits: Tensor


def _survey(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> _Survey:
    """One forward that finds the list of blocks and checks that the model is causal."""
    order: list[str] = []
    shapes: dict[str, tuple[torch.Size | None, torch.Size | None]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        order.append(name)
        given = next((t for t in (*args, *kwargs.values()) if _on_grid(t)), None)
        made = output if isinstance(output, Tensor) else _first_tensor(output)
        shapes[name] = (
            None if given is None else given.shape,
            None if made is None else made.shape,
        )

    with _forward_hooks(model.named_modules(), note):
        logits = _logits(model, inputs)
    _check_causal(model, logits)
    calls = Counter(order)
    path, names = _largest_list(model, calls)
    if not all(calls[name] for name in names):
        raise ModelError(f"{_name(model)} leaves out blocks of {path}: not supported")
    width = _width(shapes, names)
    if width is None:
        given, made = (None if shape is None else tuple(shape) for shape in shapes[names[0]])
        raise ModelError(
            f"the blocks of {_name(model)} ({path}) do not map (B, T, D) to (B, T, D): "
            f"{given} became {made} for B={_ROWS}, T={_TOKENS}"
        )
    if any(calls[name] > 1 for name in names):
        raise ModelError(
            f"{_name(model)} calls the blocks of {path} several times a forward: not supported"
        )
    if [name for name in order if name in set(names)] != names:
        raise ModelError(f"{_name(model)} does not run the blocks of {path} in order")
    if calls[next(name for name, module in model.named_modules() if module is head)] != 1:
        raise ModelError(f"{_name(model)} does not call its head once a forward")
    return _Survey(path, width, _exact(logits))


def _largest_list(model: nn.Module, calls: Mapping[str, int]) -> tuple[str, list[str]]:
    """Path and members of the ``ModuleList`` with the most parameters that takes part at all.

    Lists inside a block (experts, heads) are smaller than the list of blocks around them.
    """
    best, size = None, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            names = [f"{path}.{name}" for name, _ in module.named_children()]
            count = sum(parameter.numel() for parameter in module.parameters())
            if count > size and any(calls[name] for name in names):
                best, size = (path, names), count
    if best is None:
        raise ModelError(f"{_name(model)} has no list of blocks")
    return best


def _on_grid(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 3
        and _ROWS in value.shape
    )


def _first_tensor(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    return first if isinstance(first, Tensor) else None


def _width(shapes: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The D for which every named module maps (B, T, D) to (B, T, D), if there is one."""
    seen = {shape for name in names for shape in shapes[name]}
    if len(seen) != 1:
        return None
    shape = seen.pop()
    fits = shape is not None and len(shape) == 3 and tuple(shape[:2]) == (_ROWS, _TOKENS)
    return int(shape[2]) if fits else None


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """The rows differ in their last token only, so their earlier logits must agree."""
    first, second = _exact(logits[:, : _TOKENS - 1])
    epsilon = torch.finfo(logits.dtype).eps
    if (first - second).norm() > math.sqrt(epsilon) * first.norm():
        raise ModelError(
            f"{_name(model)} is not causal (a later token changes earlier logits): "
            "encoders cannot be used, pkt_fast needs a decoder-only model"
        )


# -- step 2: the sublayers


@dataclass
class _BlockRecord:
    """One block's probe: inner products of its contribution (index 0) and all candidates."""

    sources: list[_Source]  # in order of completion
    overwritten: frozenset[_Source]  # those the block changes after their module returned
    gram: Tensor  # (1 + n, 1 + n) float64
    noise: float  # size of the rounding error in ``out - in``
    stream: Tensor  # the block's input, as passed
    output: tuple[type, int] | None
    copy: bool  # the output was changed in place later
    linears: list[tuple[str, int, int]]  # path, in, out; in execution order


@dataclass
class _Record:
    blocks: list[_BlockRecord]
    final_norm_path: str | None


def _record_blocks(
    model: nn.Module,
    head: nn.Module,
    survey: _Survey,
    blocks: Sequence[nn.Module],
    inputs: Mapping[str, Any],
) -> _Record:
    """One forward that reduces every block to the inner products of what its modules put out."""
    records: list[_BlockRecord] = []
    values: dict[_Source, Tensor] = {}
    read_again: dict[_Source, Callable[[], Tensor]] = {}
    calls: Counter[str] = Counter()
    final_norm: list[str] = []
    last: list[Tensor] = []
    streams: dict[str, tuple[Tensor, Tensor]] = {}  # block -> its input, as passed and copied
    outs: list[tuple[Tensor, Tensor]] = []

    def block_called(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = _stream(args, kwargs, survey.width)[1]
        streams[name] = stream, _exact(stream)

    def inside(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] += 1
        for source, read in _readings(name, args, kwargs, output, survey.width):
            values[source], read_again[source] = read(), read

    def block_done(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream, entered = streams[name]
        if not bool(torch.isfinite(output if isinstance(output, Tensor) else output[0]).all()):
            raise NumericsError(
                f"layer {len(records)} of {_name(model)} gives NaN or inf on six random tokens: "
                "check the checkpoint, or use dtype='float32'"
            )
        if not torch.equal(_exact(stream), entered):
            raise ModelError(f"{_name(model)} overwrites the input of block {name}: not supported")
        out = output if isinstance(output, Tensor) else output[0]
        outs.append((out, _exact(out)))
        once = {source: value for source, value in values.items() if calls[source.path] == 1}
        inner = model.get_submodule(name)
        order = {path: i for i, path in enumerate(calls)}
        linears = [entry for entry in _linears(inner) if calls[entry[0]] == 1]
        linears.sort(key=lambda entry: order[entry[0]])
        records.append(
            _BlockRecord(
                sources=list(once),
                overwritten=frozenset(s for s in once if not torch.equal(once[s], read_again[s]())),
                gram=_inner_products(_exact(out) - _exact(stream), list(once.values())),
                noise=_noise(stream, out),
                stream=stream.detach().clone(),
                output=None if isinstance(output, Tensor) else (type(output), len(output)),
                copy=False,
                linears=[(path, *_features(module)) for path, module in linears],
            )
        )
        values.clear()
        read_again.clear()
        calls.clear()
        last[:] = [_exact(out)]

    def outside(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(records) == len(blocks) and args and _is_stream(args[0]) and not final_norm:
            module = model.get_submodule(name)
            follows = args[0].shape == last[0].shape and torch.equal(_exact(args[0]), last[0])
            # A norm has no matrix and is not the identity; dropout and projections fail one of it.
            vector = all(parameter.dim() < 2 for parameter in module.parameters())
            moved = isinstance(output, Tensor) and not torch.equal(_exact(output), last[0])
            if follows and vector and moved and module is not head:
                final_norm.append(name)

    prefix = survey.layers_path + "."
    within = {id(module) for block in blocks for module in block.modules()}
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            submodules = [entry for entry in block.named_modules() if entry[0]]
            stack.enter_context(_forward_hooks(submodules, inside))
            name = f"{prefix}{index}"
            stack.enter_context(_forward_hooks([(name, block)], block_done))
            stack.enter_context(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: block_called(name, args, kwargs),
                    with_kwargs=True,
                )
            )
        rest = [entry for entry in model.named_modules() if id(entry[1]) not in within]
        stack.enter_context(_forward_hooks(rest, outside))
        _logits(model, inputs)
    for record, (out, finished) in zip(records, outs, strict=True):
        record.copy = not torch.equal(_exact(out), finished)
    return _Record(records, final_norm[0] if final_norm else None)


def _readings(
    path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, width: int
) -> Iterator[tuple[_Source, Callable[[], Tensor]]]:
    """Every (B, T, width) tensor a hook on this call can read, with and without its arguments."""
    items: list[tuple[int | None, Any]] = [(None, output)]
    if isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    for index, item in items:
        if not _token_rows(item, width):
            continue
        flat = item.dim() == 2
        yield _Source(path, index, None, flat), partial(_grid, item, None)
        for key, argument in _arguments(args, kwargs):
            if _token_rows(argument, width) and argument.shape == item.shape:
                yield _Source(path, index, key, flat), partial(_grid, item, argument)


def _grid(value: Tensor, minus: Tensor | None) -> Tensor:
    """``value - minus`` as float64 (B, T, D)."""
    exact = _exact(value) if minus is None else _exact(value) - _exact(minus)
    return exact.reshape(_ROWS, _TOKENS, -1)


def _token_rows(value: Any, width: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape in ((_ROWS, _TOKENS, width), (_ROWS * _TOKENS, width))
    )


def _inner_products(contribution: Tensor, values: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([contribution, *values]).flatten(1)
    return rows @ rows.T


def _noise(stream: Tensor, out: Tensor) -> float:
    epsilon = torch.finfo(out.dtype).eps
    return 4 * epsilon * float(_exact(stream).norm() + _exact(out).norm())


@dataclass(frozen=True)
class _Explanation:
    """``out - in`` = sum of ``sources`` (with their scales), up to ``residual`` (relative)."""

    sources: tuple[_Source, ...]
    residual: float


def _explain(records: Sequence[_BlockRecord]) -> _Explanation | None:
    """The one or two tensors that sum to the contribution in all blocks of one kind.

    Solved on the inner products summed over the blocks, each divided by its contribution's squared
    norm: residual^2 = 1 - 2 s.g + s.G.s for scales s.  The sources come in execution order.
    """
    shared = [s for s in records[0].sources if all(s in record.sources for record in records)]
    grams = [_restricted(record, shared) for record in records if record.gram[0, 0] > 0]
    if not grams:
        return None
    gram = torch.stack(grams).mean(0)
    epsilon = max(r.noise / math.sqrt(float(r.gram[0, 0])) for r in records if r.gram[0, 0] > 0)
    tolerance = min(1e-5 + epsilon, 0.5)
    candidates = _distinct(shared, gram)
    units: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = []
    scaled: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = []
    for size in (1, 2):
        for chosen in itertools.combinations(candidates, size):
            units.append((_residual(gram, chosen, (1.0,) * size), chosen, (1.0,) * size))
            scales = _least_squares(gram, chosen)
            if scales is not None:
                scaled.append((_residual(gram, chosen, scales), chosen, scales))
    best = _simplest(units, epsilon / 8)
    free = _simplest(scaled, epsilon / 8)
    # A free scale must earn itself: it wins only where scale one is clearly worse.
    if free is not None and (best is None or free[0] < 0.5 * best[0]):
        best = free
    if best is None or best[0] > tolerance:
        return None
    residual, chosen, scales = best
    overwritten = frozenset[_Source]().union(*(record.overwritten for record in records))
    found = [(shared[i - 1], scale) for i, scale in sorted(zip(chosen, scales, strict=True))]
    return _Explanation(
        tuple(replace(s, scale=_short(scale), copy=s in overwritten) for s, scale in found),
        residual,
    )


def _restricted(record: _BlockRecord, shared: Sequence[_Source]) -> Tensor:
    """The record's inner products for the shared sources, in units of the contribution's norm."""
    position = {source: i + 1 for i, source in enumerate(record.sources)}
    index = torch.tensor([0] + [position[source] for source in shared])
    return record.gram[index][:, index] / record.gram[0, 0]


def _distinct(sources: Sequence[_Source], gram: Tensor) -> list[int]:
    """Candidates in order of preference: plain before differences, outermost, then latest.

    Of several with the same values (a module and its last submodule) only the first is kept.
    """

    def preference(i: int) -> tuple[bool, int, int]:
        source = sources[i - 1]
        return source.minus is not None, source.path.count("."), -i

    kept: list[int] = []
    for i in sorted(range(1, len(sources) + 1), key=preference):
        size = float(gram[i, i])
        if size > 1e-10 and not any(_same(gram, i, j) for j in kept):
            kept.append(i)
    return kept


def _same(gram: Tensor, i: int, j: int) -> bool:
    distance = float(gram[i, i] + gram[j, j] - 2 * gram[i, j])
    return distance <= 1e-11 * float(gram[i, i])


def _residual(gram: Tensor, chosen: Sequence[int], scales: Sequence[float]) -> float:
    index = torch.tensor([0, *chosen])
    weights = torch.tensor([-1.0, *scales], dtype=torch.float64)
    square = float(weights @ gram[index][:, index] @ weights)
    return max(math.sqrt(max(square, 0.0)), 1e-7)  # below it the inner products cannot resolve


def _least_squares(gram: Tensor, chosen: Sequence[int]) -> tuple[float, ...] | None:
    index = torch.tensor(chosen)
    matrix, target = gram[index][:, index], gram[index, 0]
    norms = matrix.diagonal().sqrt()
    if len(chosen) == 2 and float(matrix[0, 1].abs()) > (1 - 1e-9) * float(norms.prod()):
        return None
    scales = torch.linalg.solve(matrix, target)
    sane = (scales.abs() > 1e-3) & (scales.abs() < 1e3)
    return tuple(scales.tolist()) if bool(sane.all()) else None


def _simplest(
    found: Sequence[tuple[float, tuple[int, ...], tuple[float, ...]]], rounding: float
) -> tuple[float, tuple[int, ...], tuple[float, ...]] | None:
    """The first (fewest terms, most preferred) of those as good as the best, up to rounding."""
    if not found:
        return None
    best = min(entry[0] for entry in found)
    return next(entry for entry in found if entry[0] <= max(2 * best, rounding))


def _holds(record: _BlockRecord, explanation: _Explanation) -> bool:
    """Whether an explanation found on all blocks of a kind is right for this one."""
    bare = [source.bare() for source in explanation.sources]
    position = {source: i + 1 for i, source in enumerate(record.sources)}
    index = torch.tensor([0] + [position[source] for source in bare])
    weights = torch.tensor([-1.0, *(s.scale for s in explanation.sources)], dtype=torch.float64)
    square = max(float(weights @ record.gram[index][:, index] @ weights), 0.0)
    return math.sqrt(square) <= 1e-4 * math.sqrt(float(record.gram[0, 0])) + record.noise


# -- step 3: which is attention, and what the linear modules do


@dataclass
class _Mixing:
    """Per block: which modules react at later positions to a change of the input at position 0."""

    explanations: list[_Explanation | None]
    mixes: list[dict[str, bool]]  # module path -> reacts


def _record_mixing(
    model: nn.Module,
    survey: _Survey,
    blocks: Sequence[nn.Module],
    record: _Record,
    inputs: Mapping[str, Any],
) -> _Mixing:
    """One forward in which every block gets two rows that differ at position 0 only."""
    mixes: list[dict[str, bool]] = [{} for _ in blocks]

    def feed(index: int) -> Callable[..., Any]:
        row = record.blocks[index].stream[:1]
        other = row.clone()
        other[:, 0] = -row[:, 0].flip(-1)
        pair = torch.cat([row, other])
        return lambda module, args, kwargs: _with_stream(args, kwargs, pair)

    def watch(index: int) -> Callable[..., None]:
        def note(path: str, args: Any, kwargs: Any, output: Any) -> None:
            value = output if isinstance(output, Tensor) else _first_tensor(output)
            if value is not None and value.numel() % (_ROWS * _TOKENS) == 0:
                mixes[index][path] = _reacts(value)

        return note

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(
                block.register_forward_pre_hook(feed(index), with_kwargs=True, prepend=True)
            )
            inner = [entry for entry in block.named_modules() if entry[0]]
            stack.enter_context(_forward_hooks(inner, watch(index)))
        _logits(model, inputs)
    return _Mixing(_explain_all(blocks, record), mixes)


def _reacts(value: Tensor) -> bool:
    first, second = _exact(value).reshape(_ROWS, _TOKENS, -1)[:, 1:]
    return bool((first - second).norm() > 0.01 * first.norm())


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one class with the same submodules are explained together."""
    return type(block), tuple(name for name, _ in block.named_modules())


def _explain_all(blocks: Sequence[nn.Module], record: _Record) -> list[_Explanation | None]:
    kinds = [_kind(block) for block in blocks]
    found: dict[tuple[Any, ...], _Explanation | None] = {}
    for kind in dict.fromkeys(kinds):
        members = [r for r, k in zip(record.blocks, kinds, strict=True) if k == kind]
        found[kind] = _explain(members)
    result: list[_Explanation | None] = []
    for kind, entry in zip(kinds, record.blocks, strict=True):
        explanation = found[kind]
        result.append(explanation if explanation and _holds(entry, explanation) else None)
    return result


def _make_plans(blocks: Sequence[nn.Module], record: _Record, mixing: _Mixing) -> list[_LayerPlan]:
    plans = []
    for block, entry, explanation, mixes in zip(
        blocks, record.blocks, mixing.explanations, mixing.mixes, strict=True
    ):
        taps = {} if explanation is None else _roles(explanation, mixes)
        fused = _fused(block, [path for path, _, _ in entry.linears])
        linears = tuple(
            _Linear(path, given, made, mixes.get(path, False), path in fused)
            for path, given, made in entry.linears
        )
        projections = {
            interface: path
            for interface, source in taps.items()
            if (path := _projection(entry, source)) is not None
        }
        plans.append(_LayerPlan(taps, projections, linears, entry.output, entry.copy))
    return plans


def _fused(block: nn.Module, linears: Sequence[str]) -> set[str]:
    """The linears of state-space mixers, but for the input projection.

    Their fused kernels take the other weights as they are when the model trains, past the module
    and any adapter in it; PEFT refuses some of them for that reason.
    """
    found: set[str] = set()
    for parent in {path.rpartition(".")[0] for path in linears}:
        own = {name for name, _ in block.get_submodule(parent).named_parameters(recurse=False)}
        if {"A_log", "D"} <= own:
            found.update([x for x in linears if x.rpartition(".")[0] == parent][1:])
    return found


def _roles(explanation: _Explanation, mixes: Mapping[str, bool]) -> dict[str, _Source]:
    """Attention is the first contribution that mixes positions; the other one is the MLP."""
    sources = list(explanation.sources)
    attention = next((s for s in sources if mixes.get(s.path, False)), None)
    if attention is None:
        return {"mlp": sources[0]} if len(sources) == 1 else {}
    rest = [source for source in sources if source is not attention]
    return {"attention": attention, **({"mlp": rest[0]} if rest else {})}


def _projection(record: _BlockRecord, tap: _Source) -> str | None:
    """The linear module with the tap's values: nothing comes between it and the residual sum."""
    if tap.scale != 1.0:
        return None
    position = {source: i + 1 for i, source in enumerate(record.sources)}
    wanted = position[tap.bare()]
    for path, _, _ in record.linears:
        own = next((s for s in record.sources if s.path == path and s.minus is None), None)
        if own is not None and _same(record.gram, wanted, position[own]):
            return path
    return None


def _linears(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear modules LoRA can adapt, in module order; an adapted one counts as itself."""
    found: list[tuple[str, nn.Module]] = []
    adapted: list[str] = []
    for path, module in block.named_modules():
        if any(path.startswith(prefix) for prefix in adapted):
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            adapted.append(path + ".")
        if path and _is_linear(base if isinstance(base, nn.Module) else module):
            found.append((path, module))
    return found


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    # transformers' Conv1D, a linear layer with a transposed weight
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output width."""
    inner: Any = getattr(module, "base_layer", module)
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    return int(inner.weight.shape[0]), int(inner.weight.shape[1])


def _paper_targets(linears: Sequence[_Linear]) -> list[str]:
    """The paper's four projections, or their counterparts, among the linears of a block."""
    output = next((linear for linear in linears if linear.mixes), None)
    # The attention's linears are those that share a parent with its output projection.
    parent = "" if output is None else output.path.rpartition(".")[0]
    attention = [x for x in linears if parent and x.path.startswith(parent + ".")]
    mlp = [x for x in linears if x not in attention and x is not output]
    fused = {x.path for x in linears if x.fused}
    chosen = _attention_targets(attention, output) + _mlp_targets(mlp)
    return [path for path in chosen if path not in fused]


def _attention_targets(linears: Sequence[_Linear], output: _Linear | None) -> list[str]:
    named = [x.path for x in linears if _last(x.path) in ("v_proj", "o_proj")]
    if len(named) == 2:
        return named
    if output is None:
        return []
    before = [x for x in linears if not x.mixes]
    # Query, key, value: the value comes last wherever the three are not one fused projection.
    return [x.path for x in before[-1:]] + [output.path]


def _mlp_targets(linears: Sequence[_Linear]) -> list[str]:
    named = [x.path for x in linears if _last(x.path) in ("up_proj", "down_proj")]
    if {_last(path) for path in named} == {"up_proj", "down_proj"}:
        return named
    if not linears:
        return []
    output = linears[-1]
    widths = (output.in_features, 2 * output.in_features)  # plain, or fused with its gate
    inputs = [x for x in linears[:-1] if x.out_features in widths]
    return [x.path for x in (*inputs, output)]


# -- step 4: resuming and the head


def _check_resume(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    plans: Sequence[_LayerPlan],
    record: _Record,
    survey: _Survey,
    inputs: Mapping[str, Any],
) -> bool:
    """Whether the residual stream is all that upper blocks read of lower ones."""
    for layer in {len(blocks) // 2, len(blocks) - 1}:
        hidden = record.blocks[layer].stream
        try:
            with _resume(blocks, plans, layer, hidden, survey.width):
                logits = _logits(model, inputs)
        except ModelError:
            return False
        epsilon = torch.finfo(logits.dtype).eps
        error = (_exact(logits) - survey.logits).norm()
        if not error <= 100 * epsilon * survey.logits.norm():
            return False
    return True


def _probe_head(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> HeadTransform:
    """Feed known values out of the head and fit scale and softcap to what the model returns."""
    rows = _weight_of(head).shape[0]
    grid = torch.logspace(-2, 4, rows, dtype=torch.float64)
    grid[1::2] *= -1
    fed: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        values = grid.to(hidden).expand(*hidden.shape[:-1], rows)
        fed[:] = [values]
        return values.clone()

    with _patched_forward(head, forward):
        got = _exact(_logits(model, inputs))
    bias = getattr(head, "bias", None) is not None
    z = _exact(fed[0])
    if got.shape != z.shape or not bool(torch.isfinite(got).all()):
        return HeadTransform(1.0, 0.0, bias, exact=False)
    epsilon = float(torch.finfo(fed[0].dtype).eps)
    for scale, softcap in _head_fits(z, got):
        expected = softcap * torch.tanh(scale * z / softcap) if softcap else scale * z
        if torch.allclose(got, expected, rtol=8 * epsilon, atol=8 * epsilon * softcap):
            return HeadTransform(scale, softcap, bias, exact=True)
    return HeadTransform(1.0, 0.0, bias, exact=False)


def _head_fits(z: Tensor, got: Tensor) -> Iterator[tuple[float, float]]:
    """Scales and softcaps to try: nothing, a factor, a tanh whose bound the largest values show."""
    yield 1.0, 0.0
    yield _short(float((got / z).median())), 0.0
    bound = float(got.abs().max())
    bent = (got.abs() > 0.05 * bound) & (got.abs() < 0.95 * bound)
    if bound > 0 and bool(bent.any()):
        softcap = _short(bound)
        yield 1.0, softcap  # before the measured one, which is rough in 16 bits
        scale = (softcap * torch.atanh(got[bent] / softcap) / z[bent]).median()
        yield _short(float(scale)), softcap


def _short(value: float) -> float:
    """0.22 for 0.2200000123: configs hold short numbers, the probe measures long ones."""
    short = float(f"{value:.4g}")
    return short if abs(short - value) < 1e-5 * abs(value) else value
