"""The probe refuses a model that was broken on purpose, and names what differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cllm4rec_dist.config import AdapterConfig, RunConfig, validate
from cllm4rec_dist.distributed.local_engine import LocalEngine
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.backbone import DualBackbone, FrozenEmbeddings, load_backbone, load_frozen_embeddings
from cllm4rec_dist.model.probe import require_equal_to_transformers
from cllm4rec_dist.system import assemble, assemble_for_inference
from tests.harness import alone, make_catalog, make_corpus, run_ranks
from tests.model.decoders import tiny_folder

CPU = torch.device("cpu")
BROKEN = ["llama", "gemma2", "phi", "granite", "opt", "falcon", "mistral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {family: tiny_folder(root / family, family) for family in BROKEN}


def opened(folder: Path) -> tuple[DualBackbone, FrozenEmbeddings]:
    dual = load_backbone(folder, AdapterConfig(kind="lora", rank=2), torch.float32, 0)
    return dual, load_frozen_embeddings(folder, torch.float32, CPU)


def probe(folder: Path, dual: DualBackbone, words: FrozenEmbeddings) -> None:
    require_equal_to_transformers(dual, LocalEngine(dual, CPU), words, folder, range(40, 100, 3))


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(ConfigError, match=match) as refusal:
        yield
    assert "docs/backbone.md" in str(refusal.value)


def replaced_layer(dual: DualBackbone, index: int, change: Any) -> None:
    """Let a layer's forward be `change(layer's own forward)`."""
    layer = dual.layers[index]
    layer.forward = change(layer.forward)


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_attention_that_ignores_packing(folders: dict[str, Path], family: str) -> None:
    dual, words = opened(folders[family])
    probe(folders[family], dual, words)
    dual.packed_mask = None
    with refused(rf"{family}.*a document of a packed batch.*first differ after .*layers?\.0|h\.0"):
        probe(folders[family], dual, words)


def test_the_first_layer_that_ignores_the_mask_is_named(folders: dict[str, Path]) -> None:
    dual, words = opened(folders["llama"])

    def unmasked(forward: Any) -> Any:
        def changed(*inputs: Any, attention_mask: Any, **options: Any) -> Any:
            return forward(*inputs, attention_mask=None, **options)

        return changed

    replaced_layer(dual, 1, unmasked)
    with refused(r"first differ after layers\.1 \(LlamaDecoderLayer\)"):
        probe(folders["llama"], dual, words)


def test_attention_to_later_tokens(folders: dict[str, Path]) -> None:
    """Looks ahead, in a packed batch and alone, so that only the document that starts another one shows it."""
    dual, words = opened(folders["llama"])

    def looking_ahead(forward: Any) -> Any:
        def changed(hidden: Any, *inputs: Any, attention_mask: Any, **options: Any) -> Any:
            if attention_mask is None:
                mask = torch.ones(len(hidden), 1, hidden.shape[1], hidden.shape[1], dtype=torch.bool)
            else:
                allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
                mask = allowed | allowed.transpose(-1, -2)
                if attention_mask.dtype != torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
            return forward(hidden, *inputs, attention_mask=mask, **options)

        return changed

    replaced_layer(dual, 0, looking_ahead)
    with refused(r"the start of a document.*layers\.0"):
        probe(folders["llama"], dual, words)


def test_a_wrong_scale_of_the_embeddings(folders: dict[str, Path]) -> None:
    dual, words = opened(folders["gemma2"])
    unscaled = replace(words, embedding=words.embedding / 32**0.5)
    with refused(r"gemma2.*first differ after layers\.0"):
        probe(folders["gemma2"], dual, unscaled)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("phi", lambda words: replace(words, head=words.head[:, :-1].contiguous())),
        ("granite", lambda words: replace(words, logit_transform=None)),
        ("gemma2", lambda words: replace(words, logit_transform=None)),
        ("gemma2", lambda words: replace(words, head=words.embedding)),
        ("llama", lambda words: replace(words, head=words.embedding)),
        ("llama", lambda words: replace(words, logit_transform=torch.tanh)),
    ],
    ids=["no bias", "no scale", "no soft cap", "scaled head", "another head", "a soft cap too many"],
)
def test_a_wrong_word_head(folders: dict[str, Path], family: str, change: Any) -> None:
    dual, words = opened(folders[family])
    with refused(rf"{family}.*other word losses than transformers"):
        probe(folders[family], dual, change(words))


def test_a_window_that_counts_the_documents_before(folders: dict[str, Path]) -> None:
    dual, words = opened(folders["mistral"])
    dual.decoder.config.sliding_window = 2
    dual.packed_mask = dual._mask  # a mask without a window, in packed batches only
    with refused(r"mistral.*first differ after layers\.0"):
        probe(folders["mistral"], dual, words)


def test_alibi_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "falcon", "falcon", alibi=True)
    dual, words = opened(folder)
    with refused(r"falcon.*cannot compute packed documents|first differ after"):
        probe(folder, dual, words)


def test_a_decoder_without_positions_is_refused(folders: dict[str, Path]) -> None:
    dual, words = opened(folders["llama"])
    decoder = dual.decoder

    class Recurrent(type(decoder)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False) -> Any:
            raise AssertionError

    decoder.__class__ = Recurrent
    with refused("cannot compute packed documents.*TypeError"):
        probe(folders["llama"], dual, words)
    assert isinstance(decoder.get_input_embeddings(), nn.Identity)


def test_a_layer_that_is_given_only_some_tokens_cannot_be_adapted(folders: dict[str, Path]) -> None:
    """As experts that are linear layers: the adapters could not tell whose tokens they are."""
    dual, words = opened(folders["llama"])
    mlp: Any = dual.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :3],))
    with pytest.raises(ConfigError, match=r"adapter\.targets.*is given 6 of 28 tokens"):
        probe(folders["llama"], dual, words)


def start_of_run(world: World, tree: dict[str, Any]) -> str:
    """What training says about a decoder whose packed documents are not kept apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cllm4rec_dist.model.backbone.finds_packed_documents", lambda *_: True)
        with pytest.raises(ConfigError) as refusal:
            assemble(validate(RunConfig, tree, "test"), world)
    return str(refusal.value)


@pytest.mark.slow
def test_every_run_starts_with_the_probe(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), folders["opt"], max_text_tokens=48)
    tree: dict[str, Any] = {
        "stage": "pretrain",
        "corpus": corpus,
        "backbone": str(folders["opt"]),
        "output": str(tmp_path / "run"),
    }
    tree["method"] = {"max_history": 50}
    for message in run_ranks(2, start_of_run, tree):
        assert "first differ after decoder.layers.0 (OPTDecoderLayer)" in message
    config = validate(RunConfig, tree, "test")
    assemble_for_inference(config, alone())
    monkeypatch.setattr("cllm4rec_dist.model.backbone.finds_packed_documents", lambda *_: True)
    with refused(r"first differ after decoder\.layers\.0"):
        assemble_for_inference(config, alone())
