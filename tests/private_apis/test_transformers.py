"""transformers and bitsandbytes: names in a decoder, and attention within packed documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cllm4rec_dist.model.architecture import decoder_class, logit_transform, meta_decoder, meta_language_model
from cllm4rec_dist.model.backbone import load_backbone, load_config
from cllm4rec_dist.model.frozen_embeddings import embedded_words
from cllm4rec_dist.model.weights import stored_weights
from tests.harness import make_backbone, make_catalog
from tests.model.backbones import TARGETS
from tests.model.decoders import tiny_config
from tests.private_apis.backbone import LORA, WIDTH
from tests.private_apis.listing import relies_on


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, catalog = tmp_path_factory.mktemp("families"), make_catalog()
    return {family: make_backbone(root / family, catalog, family=family, hidden_size=WIDTH) for family in TARGETS}


@relies_on("model/backbone.py", "_attn_implementation")
@relies_on("model/architecture.py", "_no_split_modules")
@relies_on("planning/dry_run.py", "_attn_implementation")
def test_transformers_names_the_attention_and_the_layers_of_a_decoder(families: dict[str, Path]) -> None:
    """Packing depends on the attention in use, and ZeRO-3 gathers the decoder's layers, which transformers names.

    If this fails, see `PreTrainedModel` for where the class names of layers are now (`decoder_layers`), and
    `PreTrainedConfig` for the attention that was chosen (`DualBackbone.forward`, `_mask_packed_rows`).
    """
    for family, folder in families.items():
        dual = load_backbone(folder, LORA, torch.float32, 0)
        assert dual.decoder.config._attn_implementation == "sdpa"
        assert len(dual.layers) == dual.decoder.config.num_hidden_layers == 2, family


@relies_on("model/architecture.py", "_model_mapping", "forward")
@relies_on("model/backbone.py", "_supports_flash_attn", "_supports_sdpa")
@relies_on("model/frozen_embeddings.py", "_init_weights", "_is_hf_initialized")
@relies_on("model/probe.py", "_attn_implementation", "_supports_attention_backend", "forward")
def test_transformers_says_how_a_decoder_is_built() -> None:
    """Decoders are described by what transformers keeps about their classes, not by a list of families.

    If this fails, see `model/architecture.py` for what is wanted: the class of a configuration's decoder, the attention
    that it supports, code of a causal language model that runs with another forward of its decoder, and buffers of an
    embedding layer with the values of a loaded model.
    """
    config = tiny_config("gemma2")
    kind = decoder_class(config)
    assert kind is not None
    assert kind.__name__ == "Gemma2Model"
    assert (kind._supports_sdpa, kind._supports_flash_attn, kind._supports_attention_backend) == (False, True, True)
    assert decoder_class(AutoConfig.for_model("t5")) is None
    transform = logit_transform(config)
    assert transform is not None
    logits = torch.tensor([[-3.0, 0.5, 7.0]])
    torch.testing.assert_close(transform(logits), 2.0 * torch.tanh(logits / 2.0))
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    embedded = embedded_words(meta_language_model(config), rows)
    torch.testing.assert_close(embedded, rows * 32**0.5)


@relies_on("model/pretrained.py", "base_model_prefix")
@relies_on("export/models.py", "base_model_prefix")
def test_transformers_stores_a_decoder_under_its_prefix(families: dict[str, Path]) -> None:
    """Weights of a causal language model are those of its decoder behind `base_model_prefix`.

    If this fails, `require_weights` finds none of them, and exported adapters fit one of two model classes: see
    `PreTrainedModel.save_pretrained` for the names.
    """
    for family, folder in families.items():
        decoder = meta_decoder(load_config(folder))
        prefix = f"{decoder.base_model_prefix}."
        stored = {name.removeprefix(prefix) for name in stored_weights(folder) if name.startswith(prefix)}
        assert stored == {*decoder.state_dict()}, family
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {name for name in model.state_dict() if name.startswith(prefix)} == {prefix + name for name in stored}


@relies_on("model/backbone.py", "position_ids")
def test_transformers_keeps_documents_apart_where_positions_start_again(families: dict[str, Path]) -> None:
    """Documents are packed into rows without a mask: transformers finds them by `position_ids` that start again.

    If this fails, documents see those before them in their row: see `find_packed_sequence_indices` in
    transformers/masking_utils.py for what it expects, or pass a mask in `DualBackbone.forward`.
    """
    x = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    for family, folder in families.items():
        decoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        packed = decoder(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
        for start, stop in ((0, 4), (4, 6), (6, 9)):
            alone = decoder(inputs_embeds=x[:, start:stop], use_cache=False).last_hidden_state
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=1e-5, msg=family)


@relies_on("model/backbone.py", "Linear4bit")
def test_bitsandbytes_calls_its_layer_linear4bit(tmp_path: Path) -> None:
    """`DualBackbone.train` finds 4-bit layers by the name of their class and keeps them in training mode.

    If this fails, they switch to evaluation with the rest, and bitsandbytes repacks their weights in place on some
    CPUs: training that goes on from there is wrong. Look for the class in bitsandbytes/nn/modules.py.
    """
    folder = make_backbone(tmp_path / "wide", make_catalog(), family="llama", hidden_size=64, num_layers=1)
    dual = load_backbone(folder, LORA, torch.float32, 0, "nf4").train(False)
    packed = [module for module in dual.modules() if type(module).__module__ == "bitsandbytes.nn.modules"]
    assert {type(module).__name__ for module in packed} == {"Linear4bit"}
    assert len(packed) == len(TARGETS["llama"])
    assert all(module.training for module in packed)
    assert not dual.training
