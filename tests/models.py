"""Tiny random decoder-only models, one per family, for every test that needs a model.

Norm weights, biases and other parameters that are initialised to ones or zeros get random values,
so that a test which forgets one of them fails.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GQA = {**_LLAMA, "head_dim": 12}
_GPT2 = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
_NEOX = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 5},
    "qwen2": _LLAMA,
    "qwen3": _GQA,
    "gemma": {**_GQA, "num_hidden_layers": 3},
    "gemma2": {**_GQA, "num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        **_GQA,
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gpt_neo": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "max_position_embeddings": 128,
    },
    "gptj": {**_GPT2, "rotary_dim": 8},
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
    },
    "phi": _NEOX,
    "phi3": _LLAMA,
    "falcon": {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "alibi": False,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "bias": False,
    },
    "olmo2": _LLAMA,
    "stablelm": {**_LLAMA, "num_attention_heads": 2},
    "starcoder2": _LLAMA,
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "granite": {
        **_LLAMA,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
    },
    "bloom": {"hidden_size": 48, "n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 48, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GQA,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}

FAMILIES = list(_CONFIGS)

# Blocks of one sublayer, so not for tests of the MLP interface.
_MAMBA = {"hidden_size": 48, "num_hidden_layers": 4, "state_size": 8, "expand": 2}
_STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 12, "n_groups": 1},
    "falcon_mamba": _MAMBA,
}
STATE_SPACE_FAMILIES = list(_STATE_SPACE)

# For tests of what these do differently.
_OTHERS: dict[str, dict[str, Any]] = {
    # scales its embeddings in place
    "ctrl": {"n_embd": 48, "n_layer": 3, "n_head": 4, "dff": 80, "n_positions": 128},
    # one norm before the first block and after the last
    "nanochat": _LLAMA,
    # routers are linear modules that return two tensors
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    # a dense block, then blocks with shared experts beside stacked ones
    "deepseek_v3": {
        **_LLAMA,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
    },
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of ``family``; ``overrides`` are config fields."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    known = (_CONFIGS | _STATE_SPACE | _OTHERS)[family]
    settings = {"vocab_size": VOCAB, **tokens, **known, **overrides}
    return AutoConfig.for_model(family, **settings)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random float32 model of ``family`` in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), dtype=torch.float32
        )
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Give constant parameters random values, and matrices weight enough to matter."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif parameter.dim() > 1 and "embed" not in name:
            parameter.mul_(4.0)


def token_batch(
    *, rows: int = 3, length: int = 9, seed: int = 0, padding: str | None = None
) -> dict[str, torch.Tensor]:
    """Random ``input_ids``, ``attention_mask`` and matching ``position_ids``.

    Row i has i tokens of padding on the side named by ``padding`` ("left" or "right").
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padding else 0):
        side = slice(0, row) if padding == "left" else slice(length - row, length)
        mask[row, side] = 0
    ids = ids.masked_fill(mask == 0, 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
