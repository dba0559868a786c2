"""The backbone: one decoder for both LLMs, and its adapters.

`DualBackbone` is the only module in the DeepSpeed engine. It maps embeddings to hidden states, for the collaborative
and the content LLM in one pass: the tokens of both go through each frozen weight together, and each adapter adds its
update to the tokens of its LLM. So a weight is gathered once for both LLMs, products are larger, and every adapter runs
in every forward. (A ZeRO-3 engine whose adapters take turns between forwards silently accumulates stale gradients.)

`architecture.py` reads from transformers how a decoder is built; no family is known by name. `hub.py`, `weights.py`,
`pretrained.py` and `frozen_embeddings.py` read and check a backbone's folder; their functions
are re-exported here.

Decoders get right-padded batches without an attention mask: attention is causal, so no token sees the padding after it.

Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.distributed.hidden_modules import hidden_modules
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.architecture import (
    decoder_class,
    decoder_layers,
    finds_packed_documents,
    lora_targets,
    meta_decoder,
)
from cllm4rec_dist.model.frozen_embeddings import FrozenEmbeddings, load_frozen_embeddings
from cllm4rec_dist.model.hub import local_folder
from cllm4rec_dist.model.pretrained import (
    load_config,
    max_positions,
    require_adaptable,
    require_head,
    require_static_rotary,
    require_targets,
    require_weights,
)
from cllm4rec_dist.model.weights import fingerprint, fingerprint_on_each_host, stored_weights

if TYPE_CHECKING:  # takes seconds to import; only runs with adapters need it
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

__all__ = [
    "COLLABORATIVE",
    "CONTENT",
    "DualBackbone",
    "FrozenEmbeddings",
    "fingerprint",
    "fingerprint_on_each_host",
    "load_backbone",
    "load_config",
    "load_frozen_embeddings",
    "local_folder",
    "lora_settings",
    "max_positions",
    "meta_backbone",
    "require_adaptable",
    "require_head",
    "require_static_rotary",
    "require_targets",
    "require_weights",
    "stored_weights",
]

COLLABORATIVE, CONTENT = "collaborative", "content"


class _Pass:
    """The pass that is computed.

    Attributes:
        content_start: flat index of the content LLM's first token; the collaborative LLM's tokens are before it.
        num_tokens: tokens of both LLMs.
    """

    def __init__(self) -> None:
        self.content_start, self.num_tokens = 0, 0

    def begin(self, content_start: int, num_tokens: int) -> None:
        self.content_start, self.num_tokens = content_start, num_tokens

    @contextmanager
    def restored(self, content_start: int, num_tokens: int) -> Iterator[None]:
        """Return to an earlier pass while its activations are recomputed."""
        current = self.content_start, self.num_tokens
        self.begin(content_start, num_tokens)
        try:
            yield
        finally:
            self.begin(*current)


def _adapt(layer: LoraLayer, current: _Pass) -> None:
    """Make a PEFT layer apply each adapter to the tokens of its LLM; PEFT itself applies one adapter to all tokens.

    Both updates are one product, [tokens, 2r] @ [2r, out], in which a token has zeros in the r columns of the other
    adapter. `addmm` adds it to the base output in the same pass; one product per adapter would need two more passes
    over [tokens, out]. The scaling is applied to [tokens, r], which is smaller.

    Raises:
        ConfigError: for adapters that PEFT computes in another way: DoRA and other variants, a bias, merged weights.
            In a forward, for a layer that is given only some of the tokens.
    """
    names = (COLLABORATIVE, CONTENT)
    _require_plain_adapters(layer, names)

    def forward(x: Tensor) -> Tensor:
        base, tokens = layer.base_layer(x), x.flatten(0, -2)
        if len(tokens) != current.num_tokens:
            raise ConfigError(
                "adapter.targets",
                f"a {type(layer.base_layer).__name__} that is given {len(tokens)} of {current.num_tokens} tokens",
                "cannot be adapted, because its tokens cannot be assigned to an LLM",
                "Name other layers in adapter.targets.",
            )
        parts = tokens.tensor_split([current.content_start])
        first, second = (
            layer.lora_A[name](layer.lora_dropout[name](part)) * layer.scaling[name]
            for name, part in zip(names, parts, strict=True)
        )
        narrow = torch.cat([F.pad(first, (0, second.shape[1])), F.pad(second, (first.shape[1], 0))])
        wide = torch.cat([layer.lora_B[name].weight for name in names], dim=1)  # type: ignore[misc]
        return torch.addmm(base.flatten(0, -2), narrow, wide.T).view_as(base)

    layer.forward = forward  # type: ignore[attr-defined]


def _require_plain_adapters(layer: LoraLayer, names: tuple[str, ...]) -> None:
    """Refuse adapters of a layer that `_adapt` would compute without a part of them."""
    ignored = {
        "a variant of LoRA, such as DoRA": [*layer.lora_variant],
        "a bias (lora_bias)": [name for name, has_bias in layer.lora_bias.items() if has_bias],
        "already merged into the weights": layer.merged_adapters,
        "an adapter of neither LLM": [name for name in layer.lora_A if name not in names],
    }
    for problem, adapters in ignored.items():
        if adapters:
            raise ConfigError(
                "adapter",
                ", ".join(map(str, adapters)),
                f"is or has {problem}, and its update would be computed without it",
                "Use plain LoRA: LoraConfig without use_dora and lora_bias, as adapter.kind=lora makes it.",
            )


class DualBackbone(nn.Module):
    """A decoder that is the collaborative LLM for some tokens of a pass and the content LLM for the others.

    Args:
        decoder: a Hugging Face decoder without head.
        dual: True if each LLM has its own adapter.

    Attributes:
        packed_mask: makes the attention mask of packed documents from embeddings and positions, for a decoder that does
            not find them by itself; None for one that does.
    """

    packed_mask: Callable[[Tensor, Tensor], Tensor | None] | None

    def __init__(self, decoder: PreTrainedModel, *, dual: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self._pass = _Pass()
        self.packed_mask = None if finds_packed_documents(type(decoder), decoder.config) else self._mask
        if dual:
            for layer in _adapted_layers(decoder):
                _adapt(layer, self._pass)
        if not any(parameter.requires_grad for parameter in decoder.parameters()):
            # A ZeRO-3 engine without trainable parameters refuses to run backward, and training the tables alone needs
            # the gradient of the input embeddings. This scalar never gets a gradient and stays zero.
            self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: Tensor, positions: Tensor | None, content_start: int) -> Tensor:
        """Embeddings of packed documents [R, L, D] -> hidden states [R, L, D]. Documents do not attend to each other.

        Args:
            embeddings: [R, L, D].
            positions: int64 [R, L], positions of tokens in their documents; a document starts where they do not
                increase by one. None makes each row one document.
            content_start: flat index (row * L + column) of the content LLM's first document; the collaborative LLM's
                documents are before it.
        """
        self.begin_pass(content_start, embeddings.shape[0] * embeddings.shape[1])
        shape = embeddings.shape
        if positions is not None and self.decoder.config._attn_implementation == "flash_attention_2":
            # It detects packed documents in a batch of one row only.
            embeddings, positions = embeddings.flatten(0, 1)[None], positions.flatten()[None]
        mask = None
        if positions is not None and self.packed_mask is not None:
            mask = self.packed_mask(embeddings, positions)
        output = self.decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False)
        return output.last_hidden_state.view(shape)

    def begin_pass(self, content_start: int, num_tokens: int) -> None:
        """Set which tokens of the next pass through the decoder belong to which LLM."""
        self._pass.begin(content_start, num_tokens)

    def _mask(self, embeddings: Tensor, positions: Tensor) -> Tensor | None:
        mask = create_causal_mask(self.decoder.config, embeddings, None, None, position_ids=positions)
        assert mask is None or isinstance(mask, Tensor)
        return mask

    def enable_activation_checkpointing(self) -> None:
        """Keep only layer inputs and recompute the rest in backward, with the `content_start` of that forward."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._pass.restored(self._pass.content_start, self._pass.num_tokens)

        self.decoder.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
        )

    def train(self, mode: bool = True) -> DualBackbone:
        """Switch dropout on or off. 4-bit layers, which have no dropout, always stay in training mode.

        In evaluation mode bitsandbytes repacks their weights in place on some CPUs, and later training steps are
        silently wrong.
        """
        super().train(mode)
        for module in self.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return [*decoder_layers(self.decoder).values()]


def _adapted_layers(decoder: nn.Module) -> list[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    layers: list[LoraLayer] = [module for module in decoder.modules() if isinstance(module, LoraLayer)]
    assert layers, "the decoder has no adapters"
    return layers


def lora_settings(adapter: AdapterConfig, decoder: PreTrainedModel) -> LoraConfig:
    """PEFT configuration of one adapter.

    Args:
        decoder: without adapters; may be on the meta device.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets or lora_targets(decoder)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in decoder.modules()),
    )


def load_backbone(
    folder: Path, adapter: AdapterConfig, dtype: torch.dtype, seed: int, quantization: str = "none"
) -> DualBackbone:
    """Build the decoder with its adapters.

    Call it inside `engine.sharded_loading`, so that ZeRO-3 shards the weights while they are read. Attention is
    flash-attn for bf16 on a GPU if it is installed, else torch's SDPA.

    Args:
        dtype: dtype of frozen weights and adapters (DeepSpeed keeps fp32 masters of trained parameters).
        seed: seed of the adapters' initialization, equal on all ranks.
        quantization: `none` or `nf4` (QLoRA), for the frozen linear layers. ZeRO-3 shards the packed weights, but each
            rank first loads all of them.
    """
    return _adapted(_load_decoder(folder, dtype, quantization), adapter, dtype, seed)


def meta_backbone(config: PretrainedConfig, adapter: AdapterConfig, dtype: torch.dtype) -> DualBackbone:
    """Build the module of `load_backbone` on the meta device: shapes without values."""
    decoder = meta_decoder(config, dtype=dtype, attn_implementation=_attention(config, dtype))
    with torch.device("meta"):
        return _adapted(decoder, adapter, dtype, seed=0)


def _adapted(decoder: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype, seed: int) -> DualBackbone:
    """Add the adapters to a decoder; only the parameters that `adapter.kind` selects require gradients."""
    # The inputs are embeddings already, so that an embedding layer would be a useless weight in the engine.
    decoder.set_input_embeddings(nn.Identity())
    decoder.requires_grad_(adapter.kind == "full")
    if adapter.kind == "lora":
        with _without_bitsandbytes(), warnings.catch_warnings():
            from peft import inject_adapter_in_model

            torch.manual_seed(seed)
            settings = lora_settings(adapter, decoder)
            # PEFT warns about a second adapter, which is intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            try:
                for name in (COLLABORATIVE, CONTENT):
                    inject_adapter_in_model(settings, decoder, name)
            except ValueError as error:
                raise ConfigError(
                    "adapter.targets",
                    settings.target_modules,
                    f"do not fit the backbone ({error})",
                    "Name linear layers of the backbone, or leave adapter.targets out.",
                ) from error
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.to(dtype)
    return DualBackbone(decoder, dual=adapter.kind == "lora")


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes, which takes most of a second, unless a quantized decoder has done so."""
    with hidden_modules("bitsandbytes"):
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        try:
            yield
        finally:  # both cache their answer, and the next decoder of this process may be quantized
            is_bnb_available.cache_clear()
            is_bnb_4bit_available.cache_clear()


def _load_decoder(folder: Path, dtype: torch.dtype, quantization: str) -> PreTrainedModel:
    """Load the decoder without its head."""
    config = load_config(folder)
    settings = None if quantization == "none" else _nf4(dtype)
    try:
        with _without_progress_bar():
            return AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=_attention(config, dtype),
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
    """Hide transformers' progress bar, which every rank would write to its log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA configuration: NF4 with quantized scales, stored as `dtype` because ZeRO-3 shards weights of one dtype."""
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


def _attention(config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Fastest implementation of attention that the decoder supports."""
    kind = decoder_class(config)
    assert kind is not None
    if kind._supports_flash_attn and torch.cuda.is_available() and dtype is torch.bfloat16:
        from transformers.utils import is_flash_attn_2_available  # optional extra

        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa" if kind._supports_sdpa else "eager"
