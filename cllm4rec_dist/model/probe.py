"""Probe at the start of a run: our way through the backbone must equal the model as transformers runs it.

A few documents go packed through the engine, embeddings and word head, and each alone through the causal language model
of transformers: from its word ids through its embedding layer, its decoder, its head and its loss. The decoder is the
engine's own, so that no second copy of the weights is needed; its attention is the model's own code (`eager`), where it
can be switched. Adapters must be at their start, where they add nothing.

Hidden states are compared after each layer and word losses at the end, so that a difference is reported with the first
layer that shows it. A document that is the start of another one also tests that attention is causal.

Legend: R rows, L their length, N tokens of a document, D hidden size, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.architecture import decoder_layers, meta_language_model, word_layers
from cllm4rec_dist.model.backbone import DualBackbone
from cllm4rec_dist.model.frozen_embeddings import FrozenEmbeddings, materialized_embedding, read_embedding, read_head
from cllm4rec_dist.model.losses import text_losses
from cllm4rec_dist.model.weights import stored_weights

LENGTH, PREFIX = 10, 4
"""Tokens of the two whole documents, and of the third, which is the start of the first."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest relative difference of a token's hidden state. Layers add their rounding: SmolLM2's 30 reach 0.03 in bf16."""
LOSS_TOLERANCE = 1e-3
"""Largest difference of a word's loss in nats, besides the rounding of transformers' logits to the model's dtype."""


@torch.no_grad()
def require_equal_to_transformers(
    dual: DualBackbone,
    engine: Callable[..., Tensor],
    words: FrozenEmbeddings,
    folder: Path,
    word_ids: Sequence[int],
) -> None:
    """Compare packed documents with each alone through transformers' model.

    Args:
        dual: the engine's module, with adapters at their start.
        engine: runs a forward of `dual`.
        words: embeddings, and the head unless there is no content LLM.
        folder: of the backbone.
        word_ids: of a text; repeated if it is short.

    Raises:
        ConfigError: names the first layer that differs, the word head, or the error of the decoder.

    Collectives: those of two forwards.
    """
    device = words.embedding.device
    ids = torch.tensor(word_ids, device=device).repeat(-(-2 * LENGTH // len(word_ids)))[: 2 * LENGTH].view(2, LENGTH)
    family = dual.decoder.config.model_type
    modes = {module: module.training for module in dual.modules()}
    dual.eval()
    try:
        packed = _packed(dual, engine, words, ids)
        alone, output = _alone(dual, engine, words, folder, ids)
    except ConfigError:
        raise
    except Exception as error:
        raise _refusal(family, f"cannot compute packed documents ({type(error).__name__}: {error})") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    _require_equal_states(family, packed, alone, words.embedding.dtype)
    if output is not None:
        _require_equal_losses(family, alone[_LAST], words, ids, output)


_LAST = "the last layer's norm and projection"
_DOCUMENTS = {
    "the start of a document": (0, 0, PREFIX),
    "a document": (PREFIX, 1, LENGTH),
    "a document with padding after it": (PREFIX + LENGTH, 0, LENGTH),
}
"""Flat index in the packed batch, row among the documents alone, and length."""


def _require_equal_states(family: str, packed: dict[str, Tensor], alone: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse documents whose hidden states differ after any layer, in the order of the layers."""
    for name, expected in alone.items():
        for document, (index, row, length) in _DOCUMENTS.items():
            difference = _difference(packed[name][index : index + length], expected[row, :length])
            if not difference <= TOLERANCES[dtype]:
                raise _refusal(
                    family,
                    f"computes {document} of a packed batch with other hidden states than alone: they first differ"
                    f" after {name}, by {difference:.2g} of their norm ({TOLERANCES[dtype]:.2g} is rounding)",
                )


def _require_equal_losses(family: str, hidden: Tensor, words: FrozenEmbeddings, ids: Tensor, output: Any) -> None:
    """Refuse a word head that computes other losses from the hidden states alone than transformers' model."""
    queries, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ours = text_losses(queries, words, torch.arange(len(queries), device=ids.device), targets)
    theirs = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), targets, reduction="none")
    rounding = torch.finfo(output.logits.dtype).eps * output.logits.abs().max().item()
    gap = max((ours - theirs).abs().max().item(), (ours.mean() - output.loss).abs().item())
    if not gap <= LOSS_TOLERANCE + rounding:
        raise _refusal(
            family,
            "has other word losses than transformers' causal language model for equal hidden states:"
            f" {ours.mean():.4f} and {output.loss:.4f} nats a word (head: weight, bias, scale or soft cap)",
        )


def _packed(
    dual: DualBackbone, engine: Callable[..., Tensor], words: FrozenEmbeddings, ids: Tensor
) -> dict[str, Tensor]:
    """Run the packed batch; return the hidden states after each layer and the last ones, [R * L, D].

    The first row is the start of a document, for the collaborative LLM, and a document for the content LLM.
    """
    lengths = [PREFIX, LENGTH, LENGTH] + [1] * PREFIX
    packed = torch.cat([ids[0, :PREFIX], ids[1], ids[0], ids[0, :1].repeat(PREFIX)])
    positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
    with _recorded(dual) as states:
        hidden = engine(
            F.embedding(packed, words.embedding).view(2, PREFIX + LENGTH, -1), positions.view(2, -1), PREFIX
        )
    states[_LAST] = hidden
    return {name: state.flatten(0, -2) for name, state in states.items()}


def _alone(
    dual: DualBackbone, engine: Callable[..., Tensor], words: FrozenEmbeddings, folder: Path, ids: Tensor
) -> tuple[dict[str, Tensor], Any]:
    """Run each document in a row of its own through transformers' model, with the engine's decoder.

    Returns:
        Hidden states after each layer and the last ones, [2, N, D], and the model's output with logits and loss, which
        is None without a content LLM.
    """
    identity = dual.decoder.get_input_embeddings()
    model = _language_model(dual.decoder, words, folder, ids)
    results: dict[str, Any] = {}

    def forward(labels: Tensor) -> Tensor:
        dual.begin_pass(labels.numel(), labels.numel())
        row_ids = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        if len(words.head):
            results["output"] = model(input_ids=row_ids, labels=labels, use_cache=False)
            return results["last"]
        return dual.decoder(input_ids=row_ids, use_cache=False).last_hidden_state

    def keep_last(_: nn.Module, __: Any, output: Any) -> None:
        results["last"] = output.last_hidden_state

    decoder = model.get_decoder() if len(words.head) else dual.decoder
    hook = decoder.register_forward_hook(keep_last)
    dual.forward = forward  # type: ignore[assignment,method-assign]
    try:
        with _eager_attention(dual.decoder), _recorded(dual) as states:
            states[_LAST] = engine(ids)
    finally:
        del dual.forward
        hook.remove()
        dual.decoder.set_input_embeddings(identity)
    return states, results.get("output")


def _language_model(decoder: PreTrainedModel, words: FrozenEmbeddings, folder: Path, ids: Tensor) -> PreTrainedModel:
    """Build transformers' causal language model around a decoder, with stored word embeddings and head.

    Its embedding layer has only the rows of the documents' words, in their order.
    """
    stored, model = stored_weights(folder), meta_language_model(decoder.config)
    dtype, device = words.embedding.dtype, words.embedding.device
    rows = read_embedding(folder, model, stored)[ids.flatten().cpu()].to(device, dtype)
    embedding = materialized_embedding(model, rows)
    if len(words.head):
        weight, bias = read_head(folder, decoder.config, model, stored)
        head = word_layers(model).head
        head.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    setattr(model, model.base_model_prefix, decoder)
    decoder.set_input_embeddings(embedding)
    return model


@contextmanager
def _recorded(dual: DualBackbone) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each decoder layer, by its name."""
    states: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [
        layer.register_forward_hook(record(f"{name} ({type(layer).__name__})"))
        for name, layer in decoder_layers(dual.decoder).items()
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eager_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Compute attention with the model's eager code, if transformers can switch it."""
    chosen = decoder.config._attn_implementation
    if decoder._supports_attention_backend:
        decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        if decoder.config._attn_implementation != chosen:
            decoder.set_attn_implementation(chosen)


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest norm of a token's difference, in units of the norm of what is expected."""
    norms = (got.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-12)
    return norms.max().item()


def _refusal(family: str, problem: str) -> ConfigError:
    return ConfigError(
        "backbone",
        family,
        problem,
        "Choose another decoder; docs/backbone.md lists those that are tested. If this one should work, report it.",
    )
