"""The linear modules of a block: which there are, and which of them a LoRA should adapt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .findings import Linear
from .modules import last_part

_STATE_SPACE_PARAMETERS = {"A_log", "D"}


def linear_modules(block: nn.Module) -> list[tuple[str, nn.Module]]:
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
        return type(module).forward is nn.Linear.forward or _multiplies(module)
    return is_transposed(module) and hasattr(module, "nf")


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether a linear module with a forward of its own returns its product; routers do not."""
    row = module.weight.new_zeros(1, module.in_features)
    try:
        output = module.forward(row)
    except (RuntimeError, TypeError, ValueError):  # wants other arguments or shapes
        return False
    return isinstance(output, Tensor) and output.shape == (1, module.out_features)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module stores its weight (in, out), as Transformers' Conv1D does."""
    return type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear module."""
    inner: Any = getattr(module, "base_layer", module)
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    return int(inner.weight.shape[0]), int(inner.weight.shape[1])


def misread(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The linear modules among ``paths`` that PEFT would not adapt, but something else.

    For mixture-of-experts families whose experts Transformers stacks, it takes their projections'
    names, wherever they stand, for the stacked weights, when it attaches an adapter and when it
    loads one.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version of PEFT that takes names as they are
        return []
    from peft import LoraConfig

    found = []
    for path in paths:
        config = LoraConfig(target_modules=[path])
        try:
            conversion.convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a name that goes with another
            found.append(path)
            continue
        if set(config.target_modules or ()) != {path}:
            found.append(path)
    return found


def fused(block: nn.Module, linears: Sequence[str]) -> set[str]:
    """The linears of state-space mixers, but for the input projection.

    Their fused kernels take the other weights as they are when the model trains, past the module
    and any adapter in it; PEFT refuses some of them for that reason.
    """
    found: set[str] = set()
    for parent in {path.rpartition(".")[0] for path in linears}:
        own = {name for name, _ in block.get_submodule(parent).named_parameters(recurse=False)}
        if own >= _STATE_SPACE_PARAMETERS:
            found.update([x for x in linears if x.rpartition(".")[0] == parent][1:])
    return found


def paper_targets(linears: Sequence[Linear]) -> list[str]:
    """The paper's four projections, or their counterparts, among the linears of a block."""
    output = next((linear for linear in linears if linear.mixes), None)
    # The attention's linears are those that share a parent with its output projection.
    parent = "" if output is None else output.path.rpartition(".")[0]
    attention = [x for x in linears if parent and x.path.startswith(parent + ".")]
    mlp = [x for x in linears if x not in attention and x is not output]
    taken_as_they_are = {x.path for x in linears if x.fused}
    chosen = _attention_targets(attention, output) + _mlp_targets(mlp)
    return [path for path in chosen if path not in taken_as_they_are]


def _attention_targets(linears: Sequence[Linear], output: Linear | None) -> list[str]:
    named = [x.path for x in linears if last_part(x.path) in ("v_proj", "o_proj")]
    if len(named) == 2:
        return named
    if output is None:
        return []
    before = [x for x in linears if not x.mixes]
    # Query, key, value: the value comes last wherever the three are not one fused projection.
    return [x.path for x in before[-1:]] + [output.path]


def _mlp_targets(linears: Sequence[Linear]) -> list[str]:
    named = [x.path for x in linears if last_part(x.path) in ("up_proj", "down_proj")]
    if {last_part(path) for path in named} == {"up_proj", "down_proj"}:
        return named
    if not linears:
        return []
    output = linears[-1]
    widths = (output.in_features, 2 * output.in_features)  # plain, or fused with its gate
    inputs = [x for x in linears[:-1] if x.out_features in widths]
    return [x.path for x in (*inputs, output)]
