"""The backbone: one decoder that serves both LLMs, and its adapters.

`DualBackbone` is the only module that goes into the DeepSpeed engine. It takes embeddings and gives hidden states, for
the collaborative and the content LLM in ONE pass: the rows of both go through each frozen weight together, and each
adapter adds its part to its own LLM's rows. So a weight is gathered once for both, products are larger, and no adapter
ever rests: a ZeRO-3 engine whose adapters take turns between forwards accumulates stale gradients, without a word.

What a backbone's folder holds and whether it can be used is left to `hub.py`, `weights.py`, `pretrained.py` and
`words.py`, whose functions are at hand here.

Decoders are fed right-padded batches without an attention mask: attention is causal, so no real position ever sees
the padding behind it.

Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.hub import local_folder
from cllm4rec_dist.model.pretrained import (
    LORA_TARGETS,
    load_config,
    outline_decoder,
    positions,
    require_head,
    require_static_rotary,
    require_targets,
    require_weights,
)
from cllm4rec_dist.model.weights import fingerprint, stored_weights
from cllm4rec_dist.model.words import Words, load_words

if TYPE_CHECKING:  # takes seconds to import, and is needed only where there are adapters
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

__all__ = [
    "COLLABORATIVE",
    "CONTENT",
    "LORA_TARGETS",
    "DualBackbone",
    "Words",
    "fingerprint",
    "load_backbone",
    "load_config",
    "load_words",
    "local_folder",
    "lora_settings",
    "outline_backbone",
    "positions",
    "require_head",
    "require_static_rotary",
    "require_targets",
    "require_weights",
    "stored_weights",
]

COLLABORATIVE, CONTENT = "collaborative", "content"


class _Boundary:
    """Before which token of a pass the collaborative LLM's stand, and behind it the content LLM's."""

    def __init__(self) -> None:
        self.place = 0

    @contextmanager
    def again(self, place: int) -> Iterator[None]:
        """Inside, the boundary of an earlier pass, whose activations are computed once more."""
        now, self.place = self.place, place
        try:
            yield
        finally:
            self.place = now


def _adapt(layer: LoraLayer, boundary: _Boundary) -> None:
    """Let a layer of PEFT add each adapter to its own LLM's tokens; PEFT itself runs one adapter over all of them.

    Both updates are one product, [tokens, 2r] @ [2r, out], in which a token has zeros where the other adapter's r
    columns are: it is added while it is made, where one product an adapter would be joined and added in two more passes
    over [tokens, out]. Factors are scaled where they are narrow.
    """
    names = (COLLABORATIVE, CONTENT)

    def forward(x: Tensor) -> Tensor:
        base = layer.base_layer(x)
        parts = x.flatten(0, -2).tensor_split([boundary.place])
        first, second = (
            layer.lora_A[name](layer.lora_dropout[name](part)) * layer.scaling[name]
            for name, part in zip(names, parts, strict=True)
        )
        narrow = torch.cat([F.pad(first, (0, second.shape[1])), F.pad(second, (first.shape[1], 0))])
        wide = torch.cat([layer.lora_B[name].weight for name in names], dim=1)  # type: ignore[misc]
        return torch.addmm(base.flatten(0, -2), narrow, wide.T).view_as(base)

    layer.forward = forward  # type: ignore[attr-defined]


class DualBackbone(nn.Module):
    """One frozen decoder that is the collaborative LLM for some tokens of a pass and the content LLM for the others.

    Args:
        decoder: a Hugging Face decoder without head.
        dual: True where each LLM has its own adapter.
    """

    def __init__(self, decoder: PreTrainedModel, *, dual: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self._boundary = _Boundary()
        if dual:
            for layer in _adapted_layers(decoder):
                _adapt(layer, self._boundary)
        if not any(parameter.requires_grad for parameter in decoder.parameters()):
            # A ZeRO-3 engine that trains nothing refuses to run backward, and rows-only training needs the gradient
            # of the embeddings. This scalar gives it something to train; it never gets a gradient and stays zero.
            self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: Tensor, positions: Tensor | None, boundary: int) -> Tensor:
        """Embeddings of packed documents -> hidden states of the same shape, [R, L, D], each document by itself.

        Args:
            embeddings: [R, L, D].
            positions: int64 [R, L] of each token in its document, which starts where they do not go on by one; a row is
                one document if left out.
            boundary: flat place (row * L + column) before which the collaborative LLM's documents stand; the content
                LLM's stand behind it.
        """
        self._boundary.place = boundary
        shape = embeddings.shape
        if positions is not None and self.decoder.config._attn_implementation == "flash_attention_2":
            # It finds the documents of one row only, and takes several rows for one document each.
            embeddings, positions = embeddings.flatten(0, 1)[None], positions.flatten()[None]
        found = self.decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        return found.last_hidden_state.view(shape)

    def enable_activation_checkpointing(self) -> None:
        """Keep only layer inputs and recompute the rest in backward, with the boundary of that forward."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._boundary.again(self._boundary.place)

        self.decoder.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
        )

    def train(self, mode: bool = True) -> DualBackbone:
        """Switch dropout on or off. 4-bit layers, which have none, always train.

        Where they do not, bitsandbytes repacks their weights in place at the first forward without gradients on some
        CPUs, and training that goes on from there is wrong without a word.
        """
        super().train(mode)
        for module in self.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        kinds = self.decoder._no_split_modules or []
        return [module for module in self.decoder.modules() if type(module).__name__ in kinds]


def _adapted_layers(decoder: nn.Module) -> list[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    found: list[LoraLayer] = [module for module in decoder.modules() if isinstance(module, LoraLayer)]
    assert found, "the decoder has no adapters"
    return found


def lora_settings(adapter: AdapterConfig, model_type: str) -> LoraConfig:
    """PEFT's settings of one adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets or LORA_TARGETS[model_type]),
        fan_in_fan_out=model_type == "gpt2",
    )


def load_backbone(
    folder: Path, adapter: AdapterConfig, dtype: torch.dtype, seed: int, quantization: str = "none"
) -> DualBackbone:
    """Build the decoder with its adapters.

    Call it inside `engine.sharded_loading`, which makes ZeRO-3 shard the weights while they are read. Attention is
    flash-attn where it can be imported on a GPU, else torch's SDPA.

    Args:
        dtype: of the frozen weights and the adapters (DeepSpeed keeps an fp32 master of what is trained).
        seed: of the adapters' start; the same on every rank.
        quantization: of the frozen linear layers, `none` or `nf4` (QLoRA). ZeRO-3 shards the packed weights, but each
            rank first loads all of them.
    """
    return _adapted(_load_decoder(folder, dtype, quantization), adapter, dtype, seed)


def outline_backbone(config: PretrainedConfig, adapter: AdapterConfig, dtype: torch.dtype) -> DualBackbone:
    """The same module as `load_backbone` makes, on the meta device: every shape and no value, whatever its size."""
    decoder = outline_decoder(config, dtype=dtype, attn_implementation=_attention(dtype))
    with torch.device("meta"):
        return _adapted(decoder, adapter, dtype, seed=0)


def _adapted(decoder: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype, seed: int) -> DualBackbone:
    """The decoder for both LLMs; only what `adapter.kind` names asks for gradients."""
    # Words enter as embeddings; an embedding layer here would be a weight that ZeRO-3 carries for nothing.
    decoder.set_input_embeddings(nn.Identity())
    decoder.requires_grad_(adapter.kind == "full")
    if adapter.kind == "lora":
        from peft import inject_adapter_in_model

        torch.manual_seed(seed)
        settings = lora_settings(adapter, decoder.config.model_type)
        with warnings.catch_warnings():
            # PEFT wonders at a second adapter; two are the point.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            try:
                for name in (COLLABORATIVE, CONTENT):
                    inject_adapter_in_model(settings, decoder, name)
            except ValueError as error:
                raise ConfigError(
                    "adapter.targets",
                    settings.target_modules,
                    f"do not fit the backbone ({error})",
                    "Name linear layers that it has, or leave them out.",
                ) from error
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.to(dtype)
    return DualBackbone(decoder, dual=adapter.kind == "lora")


def _load_decoder(folder: Path, dtype: torch.dtype, quantization: str) -> PreTrainedModel:
    """The decoder without its head."""
    config = load_config(folder)
    settings = None if quantization == "none" else _nf4(dtype)
    try:
        with _without_progress_bar():
            return AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=_attention(dtype),
                local_files_only=True,
                trust_remote_code=False,
                quantization_config=settings,
            )
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"cannot be loaded ({error})", "Fetch the backbone again."
        ) from error


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Inside, transformers shows no bar, which every rank would draw into its log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's: NF4 with quantized scales, packed into `dtype` because ZeRO-3 shards weights of one dtype."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization", "nf4", "needs bitsandbytes, which is not installed", "pip install -e '.[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def _attention(dtype: torch.dtype) -> str:
    if torch.cuda.is_available() and dtype is torch.bfloat16:
        from transformers.utils import is_flash_attn_2_available  # optional extra

        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"
