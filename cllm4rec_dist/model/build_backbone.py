"""A small decoder with random weights, and a tokenizer trained on given texts.

For demos, tests and data sets too small for a pretrained backbone. All of its weights are trained
(`adapter.kind: full`). Its folder has the format of a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cllm4rec_dist.config import BackboneConfig
from cllm4rec_dist.corpus.prompts import CONTENT_PROMPTS, RECOMMENDATION_PROMPT

_ROTARY = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def train_tokenizer(texts: Iterable[str], num_words: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `num_words` tokens, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=max(num_words, len(alphabet) + 1),
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    prompts = [RECOMMENDATION_PROMPT, *CONTENT_PROMPTS.values()]
    tokenizer.train_from_iterator([*texts, *prompts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def decoder_config(config: BackboneConfig, num_words: int) -> PretrainedConfig:
    """Hugging Face configuration of the decoder."""
    if config.family == "gpt2":
        return GPT2Config(
            vocab_size=num_words,
            n_positions=config.max_positions,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            embd_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
            bos_token_id=None,
            eos_token_id=0,
        )
    return _ROTARY[config.family](
        vocab_size=num_words,
        max_position_embeddings=config.max_positions,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        attention_dropout=config.dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def build_backbone(config: BackboneConfig, texts: Iterable[str], folder: Path) -> int:
    """Write a tokenizer and a random decoder to `folder`; return the number of parameters."""
    tokenizer = train_tokenizer(texts, config.vocab_size)
    torch.manual_seed(config.seed)
    decoder = AutoModelForCausalLM.from_config(decoder_config(config, len(tokenizer)), dtype=torch.float32)
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in decoder.parameters())
