"""Step 2 of a probe, the recording: every block reduced to inner products of what its modules put
out.

:mod:`.residual` solves them for the sublayers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError
from .blocks import Survey
from .findings import Source
from .linears import features, linear_modules
from .modules import name_of
from .streams import arguments, block_input, block_output, is_stream
from .trial import ROWS, TOKENS, exact, logits_of, watched


@dataclass
class BlockRecord:
    """One block's probe: inner products of its contribution (index 0) and all candidates."""

    sources: list[Source]  # in order of completion
    overwritten: frozenset[Source]  # those the block changes after their module returned
    gram: Tensor  # (1 + n, 1 + n) float64
    noise: float  # size of the rounding error in ``out - in``
    stream: Tensor  # the block's input, as passed
    output: tuple[type, int] | None
    copy: bool  # the output was changed in place later
    linears: list[tuple[str, int, int]]  # path, in, out; in execution order

    def index(self, sources: Sequence[Source]) -> list[int]:
        """Where ``sources`` stand in ``gram``."""
        position = {source: i + 1 for i, source in enumerate(self.sources)}
        return [position[source] for source in sources]


@dataclass(frozen=True)
class Record:
    """All blocks' records, in order, and the norm that follows the last block."""

    blocks: list[BlockRecord]
    final_norm_path: str | None


def record_blocks(
    model: nn.Module,
    head: nn.Module,
    survey: Survey,
    blocks: Sequence[nn.Module],
    inputs: Mapping[str, Any],
) -> Record:
    """One forward that records every block.

    Raises:
        NumericsError: a block puts out NaN or inf.
        ModelError: a block overwrites its input.
    """
    recorder = _Recorder(model, head, survey, blocks)
    with recorder.watching():
        logits_of(model, inputs)
    return recorder.result()


class _Recorder:
    """The hooks of the recording forward.

    Tensors are kept for the block under way only: a record holds numbers.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, survey: Survey, blocks: Sequence[nn.Module]
    ) -> None:
        self._model, self._head, self._blocks = model, head, blocks
        self._prefix, self._width = survey.layers_path + ".", survey.width
        self._records: list[BlockRecord] = []
        self._outputs: list[tuple[Tensor, Tensor]] = []  # of each block, live and as returned
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}  # block -> live, and as passed
        self._final_norm: str | None = None
        # Of the block under way: what its modules returned, how to read it anew, and their calls.
        self._values: dict[Source, Tensor] = {}
        self._read_again: dict[Source, Callable[[], Tensor]] = {}
        self._calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model's modules carry the hooks."""
        within = {id(module) for block in self._blocks for module in block.modules()}
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                submodules = [entry for entry in block.named_modules() if entry[0]]
                stack.enter_context(watched(submodules, self._inside))
                name = f"{self._prefix}{index}"
                stack.enter_context(watched([(name, block)], self._block_done))
                stack.enter_context(
                    block.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: self._block_called(name, args, kwargs),
                        with_kwargs=True,
                    )
                )
            rest = [entry for entry in self._model.named_modules() if id(entry[1]) not in within]
            stack.enter_context(watched(rest, self._outside))
            yield

    def result(self) -> Record:
        """The records, once the forward is over."""
        for record, (output, returned) in zip(self._records, self._outputs, strict=True):
            record.copy = not torch.equal(exact(output), returned)
        return Record(self._records, self._final_norm)

    def _block_called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = block_input(args, kwargs, self._width)[1]
        self._inputs[name] = stream, exact(stream)

    def _inside(
        self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._calls[path] += 1
        for source, read in _readings(path, args, kwargs, output, self._width):
            self._values[source], self._read_again[source] = read(), read

    def _block_done(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        out = block_output(output)
        if not bool(torch.isfinite(out).all()):
            raise NumericsError(
                f"layer {len(self._records)} of {name_of(self._model)} gives NaN or inf on six "
                "random tokens: check the checkpoint, or use dtype='float32'"
            )
        stream, passed = self._inputs[name]
        if not torch.equal(exact(stream), passed):
            raise ModelError(
                f"{name_of(self._model)} overwrites the input of block {name}: not supported"
            )
        returned = exact(out)
        self._outputs.append((out, returned))
        again = self._read_again
        once = {s: value for s, value in self._values.items() if self._calls[s.path] == 1}
        self._records.append(
            BlockRecord(
                sources=list(once),
                overwritten=frozenset(s for s in once if not torch.equal(once[s], again[s]())),
                gram=_inner_products(returned - passed, list(once.values())),
                noise=4 * torch.finfo(out.dtype).eps * float(passed.norm() + returned.norm()),
                stream=stream.detach().clone(),
                output=None if isinstance(output, Tensor) else (type(output), len(output)),
                copy=False,
                linears=self._linears_called_once(name),
            )
        )
        self._values.clear()
        self._read_again.clear()
        self._calls.clear()

    def _linears_called_once(self, name: str) -> list[tuple[str, int, int]]:
        """Path and widths of the block's linear modules, in execution order."""
        order = {path: i for i, path in enumerate(self._calls)}
        block = self._model.get_submodule(name)
        found = [entry for entry in linear_modules(block) if self._calls[entry[0]] == 1]
        found.sort(key=lambda entry: order[entry[0]])
        return [(path, *features(module)) for path, module in found]

    def _outside(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note the final norm: the first module after the blocks that changes the last output."""
        over = len(self._records) == len(self._blocks)
        if not over or self._final_norm is not None or not (args and is_stream(args[0])):
            return
        module = self._model.get_submodule(name)
        last = self._outputs[-1][1]
        follows = args[0].shape == last.shape and torch.equal(exact(args[0]), last)
        # A norm has no matrix and is not the identity; dropout and projections fail one of it.
        vector = all(parameter.dim() < 2 for parameter in module.parameters())
        moved = isinstance(output, Tensor) and not torch.equal(exact(output), last)
        if follows and vector and moved and module is not self._head:
            self._final_norm = name


def _readings(
    path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, width: int
) -> Iterator[tuple[Source, Callable[[], Tensor]]]:
    """Every (B, T, width) tensor a hook on this call can read, with and without its arguments."""
    items: list[tuple[int | None, Any]] = [(None, output)]
    if isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    for index, item in items:
        if not _token_rows(item, width):
            continue
        flat = item.dim() == 2
        yield Source(path, index, None, flat), partial(_grid, item, None)
        for key, argument in arguments(args, kwargs):
            if _token_rows(argument, width) and argument.shape == item.shape:
                yield Source(path, index, key, flat), partial(_grid, item, argument)


def _grid(value: Tensor, minus: Tensor | None) -> Tensor:
    """``value - minus`` as float64 (B, T, D)."""
    difference = exact(value) if minus is None else exact(value) - exact(minus)
    return difference.reshape(ROWS, TOKENS, -1)


def _token_rows(value: Any, width: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape in ((ROWS, TOKENS, width), (ROWS * TOKENS, width))
    )


def _inner_products(contribution: Tensor, values: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([contribution, *values]).flatten(1)
    return rows @ rows.T
