"""Models and tokenizers from objects, paths and hub ids, with one clear line when that fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ._files import local
from .anatomy import Anatomy
from .data.examples import Examples
from .errors import ConfigError, ModelError
from .lending import eager


def resolve_device(device: str) -> torch.device:
    """'auto' is the first GPU, or the CPU.  Raises :class:`ConfigError` for a device that is not
    there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()  # meta has the device, but no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason}") from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The dtype models are loaded in; None keeps each checkpoint's own.

    'auto' keeps the checkpoint's on a GPU and on CPUs that multiply bfloat16 in hardware, and takes
    float32 on other CPUs, where bfloat16 would be slower and less exact.
    """
    if dtype != "auto":
        resolved: torch.dtype = getattr(torch, dtype)
        return resolved
    return torch.float32 if device.type == "cpu" and not _cpu_multiplies_bfloat16() else None


def _cpu_multiplies_bfloat16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def check_dtype(model: nn.Module, dtype: str, role: str) -> None:
    """Raise :class:`ConfigError` when ``dtype`` asks for another one than ``model`` has.

    A model given as an object is used as it is: converting it would change the caller's.
    """
    own = Anatomy.of(model).head.weight.dtype
    if dtype != "auto" and own != getattr(torch, dtype):
        raise ConfigError(
            f"dtype={dtype!r}: the {role} was given as an object of {own}; convert it with "
            f"model.to(torch.{dtype}), or leave dtype at 'auto'"
        )


def load_model(
    model: nn.Module | str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    role: str = "model",
) -> nn.Module:
    """Return ``model`` itself, or load a decoder-only model from a path or hub id (on the CPU).

    A model given as an object keeps its dtype.  Raises :class:`ModelError` naming ``role`` and what
    could not be loaded.
    """
    if isinstance(model, nn.Module):
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ModelError(
                f"the {role} was made under torch.inference_mode(), and such weights cannot be "
                "trained with: make it outside"
            )
        return cast(nn.Module, eager(model))
    from transformers import AutoConfig, AutoModelForCausalLM

    name = _checked_name(model, role)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"cannot load the {role} {name}: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"the {role} {name} is an encoder-decoder model ({config.model_type}); "
            "pkt_fast works on decoder-only language models"
        )
    try:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:
        raise ModelError(f"cannot load the {role} {name}: {_first_line(error)}") from error
    return loaded.eval()


def load_tokenizer(
    source: nn.Module | str | Path, *, trust_remote_code: bool = False, role: str = "model"
) -> Any:
    """The tokenizer that lies with a model.  Raises :class:`ModelError` when there is none."""
    from transformers import AutoTokenizer

    if isinstance(source, nn.Module):
        source = getattr(source, "name_or_path", "")
        if not source:
            raise ModelError(f"the {role} was given as an object without a path: pass tokenizer=")
    name = _checked_name(source, role)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"cannot load a tokenizer of the {role} from {name}: {_first_line(error)}"
        ) from error


def load_tokenizers(
    tokenizer: Any, src: Any, tgt: Any, *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """(source tokenizer, target tokenizer) from what the user gave: one for both, a pair, or None.

    Raises :class:`ConfigError` for what is no tokenizer, and as :func:`load_tokenizer`.
    """
    if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str):
        if len(tokenizer) != 2:
            raise ConfigError(
                f"tokenizer: give one, or a pair (source, target), not {len(tokenizer)}"
            )
        pair = tuple(tokenizer)
    else:
        pair = (tokenizer, tokenizer)
    options = {"trust_remote_code": trust_remote_code}

    def resolved(given: Any, model: Any, role: str) -> Any:
        if given is None:
            return load_tokenizer(model, role=role, **options)
        if isinstance(given, str | Path):
            return load_tokenizer(given, role=role, **options)
        if not callable(given):
            raise ConfigError(
                f"tokenizer={given!r} of the {role}: give a tokenizer, or the path of one"
            )
        return given

    return resolved(pair[0], src, "source"), resolved(pair[1], tgt, "target")


def pad_token_id(tokenizer: Any) -> int:
    """A token to pad with; padding carries no attention and no loss, so any will do."""
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def check_token_ids(model: nn.Module, examples: Examples, role: str) -> None:
    """Raise :class:`ModelError` when a token of ``examples`` has no row in the model's tables."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = min(len(embeddings.weight), Anatomy.of(model).vocab_size)
    largest = examples.largest_id
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives token id {largest}, the {role} has {rows} tokens: use the "
            "tokenizer the model was trained with, or resize its embeddings"
        )


def _checked_name(model: Any, role: str) -> str:
    """A hub id, or the path of a directory that exists."""
    if not isinstance(model, str | os.PathLike) or not str(model):
        raise ModelError(f"the {role} is {model!r}; give a model, the path of one, or a hub id")
    name = str(model)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_local:
        if not Path(name).is_dir():
            _check_reachable(name, role)
        return name
    path = local(name)
    if not path.is_dir():
        raise ModelError(f"the {role} {name} does not exist; give a model directory or a hub id")
    return str(path)


def _check_reachable(name: str, role: str) -> None:
    """Raise :class:`ModelError` where a hub id is not in the cache and there is no connection.

    Asked once: Transformers tries again for over a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = repo_folder_name(repo_id=name, repo_type="model")
        if (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir():
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (HfHubHTTPError, HFValidationError):  # for Transformers to say
        return
    except Exception as error:  # of whichever library makes the connection
        raise ModelError(
            f"the {role} {name} is no directory here, and the hub cannot be reached "
            f"({_first_line(error)}): give a path, or connect"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
