"""Small questions about a model's modules and their paths."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ModelError
from ..lending import eager


def name_of(module: nn.Module) -> str:
    """The class name, for messages."""
    return type(module).__name__


def base_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside ``torch.compile`` and PEFT wrappers."""
    model = eager(model)
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def head_of(model: nn.Module) -> nn.Module:
    """The LM head.

    Raises:
        ModelError: encoder-decoders, models without a head, and weights on the meta device.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name_of(model)} is an encoder-decoder model: pkt_fast needs decoder-only"
        )
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ModelError(
            f"{name_of(model)} has no language-model head: load it with AutoModelForCausalLM"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{name_of(model)} has weights on the meta device: load them first")
    return head


def weight_of(head: nn.Module) -> Tensor:
    """The (V, D) weight of a head or an embedding; ModelError when there is none."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"the head ({name_of(head)}) has no (V, D) weight")
    return weight


def last_part(path: str) -> str:
    """``"mlp.up_proj"`` -> ``"up_proj"``."""
    return path.rpartition(".")[2]


def children_at(model: nn.Module, path: str) -> list[nn.Module]:
    """The members of the list of modules at ``path``."""
    return list(model.get_submodule(path).children())


def ids_at(model: nn.Module, path: str) -> tuple[int, ...]:
    """Identities of the blocks now at ``path``: a pruned or replaced stack is probed again."""
    try:
        return tuple(map(id, children_at(model, path)))
    except AttributeError:
        return ()
