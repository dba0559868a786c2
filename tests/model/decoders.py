"""Tiny configurations of the decoder families that the documentation lists, with every setting that changes a result.

Random weights are scaled up, so that attention is far from uniform; biases and norms are not at their neutral start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.harness import make_backbone, make_catalog

WIDTH, LAYERS, HEADS, WORDS, POSITIONS = 32, 2, 4, 300, 128
_ALTERNATING = ["sliding_attention", "full_attention"]
_ROTARY = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_CAPPED = {"final_logit_softcapping": 2.0, "sliding_window": 4, "layer_types": _ALTERNATING}

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
    "llama": _ROTARY,
    "mistral": _ROTARY | {"sliding_window": 4},
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "gemma": _ROTARY,
    "gemma2": _ROTARY | _CAPPED | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _ROTARY | _CAPPED | {"query_pre_attn_scalar": 8},
    "phi": _ROTARY,
    "phi3": _ROTARY | {"sliding_window": 4},
    "olmo2": _ROTARY,
    "olmo3": _ROTARY | {"sliding_window": 4, "layer_types": _ALTERNATING},
    "smollm3": _ROTARY | {"no_rope_layers": [1, 0]},
    "granite": _ROTARY
    | {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "cohere": _ROTARY | {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": _ROTARY | {"logit_scale": 0.25, "sliding_window": 4, "layer_types": _ALTERNATING},
    "gpt_neox": {k: v for k, v in _ROTARY.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "dropout": 0.0,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
    "falcon": {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "alibi": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
    "stablelm": _ROTARY,
    "mixtral": _ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": _ROTARY
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""Settings by `model_type`. Windows are shorter than the documents of the tests."""


def tiny_config(family: str, **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{"vocab_size": WORDS, **DECODERS[family], **settings})


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, none of them zero or one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        scale = 4.0 if parameter.dim() > 1 and "embed" not in name else 1.0
        parameter.data = parameter.data * scale + 0.1 * torch.randn_like(parameter)
    return model


def tiny_folder(folder: Path, family: str, **settings: Any) -> Path:
    """The model in a folder, with the tokenizer of `make_backbone`."""
    make_backbone(folder, make_catalog(), vocab_size=WORDS, hidden_size=8)
    (folder / "model.safetensors").unlink()
    tiny_model(tiny_config(family, **settings)).save_pretrained(folder)
    return folder
