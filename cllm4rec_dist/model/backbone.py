"""The backbone: one decoder that serves both LLMs, its adapters, and its frozen word embeddings.

`DualBackbone` is the only module that goes into the DeepSpeed engine. It takes embeddings and gives hidden states, for
the collaborative and the content LLM in ONE pass: the rows of both go through each frozen weight together, and each
adapter adds its part to its own LLM's rows. So a weight is gathered once for both, products are larger, and no adapter
ever rests: a ZeRO-3 engine whose adapters take turns between forwards accumulates stale gradients, without a word. Word
embeddings and the word head are frozen and small next to the backbone; `load_words` reads them straight from the weight
files, because a weight that ZeRO-3 owns is empty outside its module's forward.

Decoders are fed right-padded batches without an attention mask: attention is causal, so no real position ever sees
the padding behind it.

Legend: B batch, T tokens, D hidden, V words.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.errors import ConfigError

COLLABORATIVE, CONTENT = "collaborative", "content"

LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""Supported decoder families and where their adapters sit by default (every linear layer)."""

_WORD_WEIGHTS = ("embed_tokens.weight", "wte.weight")
_HEAD_WEIGHT = "lm_head.weight"


@dataclass(frozen=True)
class Words:
    """The frozen ends of the language model, one copy a rank.

    Attributes:
        embedding: [V, D].
        head: [V, D]; the same tensor where the backbone ties them.
    """

    embedding: Tensor
    head: Tensor

    @property
    def scale(self) -> float:
        """Root mean square of an embedding entry: the scale on which new rows start."""
        return self.embedding.float().square().mean().sqrt().item()


def local_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of a backbone: itself, or the cached snapshot of a hub id, without its weights where none is read."""
    if Path(name).is_dir():
        return Path(name).absolute()
    from huggingface_hub import snapshot_download  # only where a hub id is used

    try:
        patterns = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            "backbone",
            name,
            f"is neither a folder nor a hub id that can be had ({error})",
            "Give a folder with config.json.",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a backbone folder, sorted. Pickled weights are not read."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise ConfigError(
            "backbone", str(folder), "holds no .safetensors file", "Convert it: model.save_pretrained(folder)."
        )
    return files


def fingerprint(folder: Path) -> str:
    """sha256 over the architecture and every weight byte; another base model has another one.

    ZeRO-3's universal load does not restore frozen weights and says nothing, so checkpoints carry this.
    """
    digest = hashlib.sha256()
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("transformers_version", "_name_or_path"):
        settings.pop(volatile, None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_config(folder: Path) -> PretrainedConfig:
    """The decoder's configuration; refuses what is none, and families that nobody has tested here."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"holds no config.json of a decoder ({error})", "Fetch the backbone again."
        ) from error
    if config.model_type not in LORA_TARGETS:
        raise ConfigError(
            "backbone", config.model_type, f"is not one of {sorted(LORA_TARGETS)}", "Choose a supported decoder."
        )
    return config


def positions(config: PretrainedConfig) -> int:
    """The longest sequence that a decoder takes."""
    found = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise ConfigError("backbone: max_position_embeddings", found, "is no length", "Fetch the backbone again.")
    return found


def require_weights(folder: Path, config: PretrainedConfig) -> None:
    """Refuse files that lack a weight of the decoder, or have it in another shape. Outside of `sharded_loading`.

    Transformers would start it at random with no more than a warning, under ZeRO-3 on rank 0 alone.
    """
    try:
        with torch.device("meta"):
            decoder = AutoModel.from_config(config)
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"has a config.json of which no decoder can be made ({error})",
            "Fetch the backbone again.",
        ) from error  # fmt: skip
    found: dict[str, list[int]] = {}
    for path in weight_files(folder):
        with _weights_of(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                found[name.removeprefix(f"{decoder.base_model_prefix}.")] = tensors.get_slice(name).get_shape()
    wrong = [name for name, weight in decoder.state_dict().items() if found.get(name) != list(weight.shape)]
    if wrong:
        raise ConfigError(
            f"backbone {folder}", wrong[:3], f"are missing or have not the shape that config.json says (and"
            f" {len(wrong[3:])} more)", "Fetch the backbone again.",
        )  # fmt: skip


def load_words(folder: Path, dtype: torch.dtype, device: torch.device) -> Words:
    """Read the word embeddings and the word head from the weight files, without building the model."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with _weights_of(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name.endswith(_WORD_WEIGHTS):
                    found["embedding"] = tensors.get_tensor(name)
                elif name.endswith(_HEAD_WEIGHT):
                    found["head"] = tensors.get_tensor(name)
    if "embedding" not in found:
        raise ConfigError("backbone", str(folder), f"has none of {_WORD_WEIGHTS}", "Choose a supported decoder.")
    embedding = found["embedding"].to(device, dtype)
    return Words(embedding, found["head"].to(device, dtype) if "head" in found else embedding)


@contextmanager
def _weights_of(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ConfigError("backbone", str(path), f"is damaged ({error})", "Fetch the weights again.") from error


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
        adapted = [module for module in decoder.modules() if isinstance(module, LoraLayer)]
        assert dual == bool(adapted)
        for layer in adapted:
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


def lora_settings(adapter: AdapterConfig, model_type: str) -> LoraConfig:
    """PEFT's settings of one adapter."""
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
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, dtype=dtype, attn_implementation=_attention(dtype))
        return _adapted(decoder, adapter, dtype, seed=0)


def _adapted(decoder: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype, seed: int) -> DualBackbone:
    """The decoder for both LLMs; only what `adapter.kind` names asks for gradients."""
    # Words enter as embeddings; an embedding layer here would be a weight that ZeRO-3 carries for nothing.
    decoder.set_input_embeddings(nn.Identity())
    decoder.requires_grad_(adapter.kind == "full")
    if adapter.kind == "lora":
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
                    "adapter.targets", settings.target_modules, f"do not fit the backbone ({error})",
                    "Name linear layers that it has, or leave them out.",
                ) from error  # fmt: skip
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.to(dtype)
    return DualBackbone(decoder, dual=adapter.kind == "lora")


def _load_decoder(folder: Path, dtype: torch.dtype, quantization: str) -> PreTrainedModel:
    """The decoder without its head."""
    settings = None if quantization == "none" else _nf4(dtype)
    try:
        return AutoModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=_attention(dtype), local_files_only=True,
            trust_remote_code=False, quantization_config=settings,
        )  # fmt: skip
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"cannot be loaded ({error})", "Fetch the backbone again."
        ) from error


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's: NF4 with quantized scales, packed into `dtype` because ZeRO-3 shards weights of one dtype."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization", "nf4", "needs bitsandbytes, which is not installed", "pip install -e '.[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )  # fmt: skip


def _attention(dtype: torch.dtype) -> str:
    if torch.cuda.is_available() and dtype is torch.bfloat16:
        from transformers.utils import is_flash_attn_2_available  # optional extra

        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"
