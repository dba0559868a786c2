"""Every decoder family of docs/backbone.md, with tiny weights: a run computes what transformers computes.

The columns of the table there are the tests here; `test_the_documentation_lists_what_is_tested` compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Conv1D

from cllm4rec_dist.config import AdapterConfig, RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, gathered_by_layer, resolve_settings, sharded_loading
from cllm4rec_dist.distributed.local_engine import LocalEngine
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.export.models import write_adapters
from cllm4rec_dist.model import frozen_embeddings
from cllm4rec_dist.model.architecture import decoder_class, finds_packed_documents, lora_targets, meta_decoder
from cllm4rec_dist.model.backbone import (
    COLLABORATIVE,
    CONTENT,
    DualBackbone,
    FrozenEmbeddings,
    load_backbone,
    load_config,
    load_frozen_embeddings,
    meta_backbone,
)
from cllm4rec_dist.model.frozen_embeddings import embedding_scale
from cllm4rec_dist.model.losses import text_losses
from cllm4rec_dist.model.pretrained import require_adaptable, require_head, require_targets, require_weights
from cllm4rec_dist.model.probe import require_equal_to_transformers
from cllm4rec_dist.model.weights import stored_weights
from cllm4rec_dist.planning.meta_run import _words
from tests.harness import run_ranks
from tests.model.decoders import DECODERS, LAYERS, tiny_config, tiny_folder
from tests.model.test_backbone import DEEPSPEED

LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
CPU = torch.device("cpu")
EXPERTS = {"mixtral", "qwen2_moe"}
WITHOUT_NF4 = EXPERTS | {"falcon"}
EXPORTED = ["gemma2", "phi3", "opt", "falcon", "gpt_neox", "qwen2_moe"]
LENGTHS = [6, 8, 3]
WORDS = torch.arange(sum(LENGTHS)) * 17 % 300
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])

FAST = {"gpt2", "llama", "gemma3_text", "phi3", "opt"}
"""Families that `make fast` tests."""


def of_families(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for each of these families, marked as slow if `make fast` leaves it out."""
    marked = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("family", marked)


families = of_families(DECODERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {family: tiny_folder(root / family, family) for family in DECODERS}


def adapted(folder: Path, adapter: AdapterConfig = LORA, quantization: str = "none") -> DualBackbone:
    """A backbone whose adapters are not the identity."""
    dual = load_backbone(folder, adapter, torch.float32, 5, quantization)
    set_adapters(dual)
    return dual.eval()


def set_adapters(dual: DualBackbone) -> None:
    """Set the second factors of the adapters, which PEFT initializes to zero."""
    random = torch.Generator().manual_seed(9)
    for name, parameter in dual.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.3


def words_of(folder: Path) -> FrozenEmbeddings:
    return load_frozen_embeddings(folder, torch.float32, CPU)


def probe(folder: Path, dual: DualBackbone, words: FrozenEmbeddings | None = None) -> None:
    words = words_of(folder) if words is None else words
    require_equal_to_transformers(dual, LocalEngine(dual, CPU), words, folder, range(40, 100, 3))


@families
def test_the_folder_passes_every_check(folders: dict[str, Path], family: str) -> None:
    config = load_config(folders[family])
    require_weights(folders[family], config)
    require_head(folders[family], config, stored_weights(folders[family]))
    require_targets(config, AdapterConfig(kind="lora", targets=tuple(lora_targets(meta_decoder(config)))))
    require_adaptable(config, LORA, "none")


@families
def test_every_linear_layer_of_the_decoder_layers_is_adapted(folders: dict[str, Path], family: str) -> None:
    dual = load_backbone(folders[family], LORA, torch.float32, 5)
    assert len(dual.layers) == LAYERS
    adapted_layers = [m.base_layer for m in dual.modules() if isinstance(m, LoraLayer)]
    plain = AutoModel.from_pretrained(folders[family])
    kinds = [type(layer) for layer in dual.layers]
    layers = [layer for layer in plain.modules() if type(layer) in kinds]
    linear = [inner for layer in layers for inner in layer.modules() if isinstance(inner, nn.Linear | Conv1D)]
    assert len(adapted_layers) == len(linear) > 0


@families
def test_packed_documents_compute_as_alone(folders: dict[str, Path], family: str) -> None:
    """Forward and gradient, past the sliding windows, with adapters; the first document is the collaborative LLM's."""
    dual, words = adapted(folders[family]), words_of(folders[family])
    packed = F.embedding(WORDS, words.embedding)[None].requires_grad_()
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    together = dual(packed, POSITIONS[None], LENGTHS[0])
    (gradient,) = torch.autograd.grad((together * weights).sum(), packed)
    documents = zip(*(x[0].split(LENGTHS) for x in (packed, weights, together, gradient)), strict=True)
    for index, (tokens, weight, got, got_gradient) in enumerate(documents):
        document = tokens.detach()[None].requires_grad_()
        alone = dual(document, None, 0 if index else LENGTHS[0])
        (expected,) = torch.autograd.grad((alone * weight).sum(), document)
        torch.testing.assert_close(got, alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_gradient, expected[0], rtol=1e-3, atol=1e-4)


@families
def test_word_losses_and_their_gradients_are_the_models_own(folders: dict[str, Path], family: str) -> None:
    """Reference: the causal language model of transformers over each document."""
    dual = load_backbone(folders[family], LORA, torch.float32, 5).eval()
    words, model = words_of(folders[family]), AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    packed = F.embedding(WORDS, words.embedding)[None].requires_grad_()
    hidden = dual(packed, POSITIONS[None], 0)[0].split(LENGTHS)
    documents = WORDS.split(LENGTHS)
    losses = [
        text_losses(states[:-1], words, torch.arange(len(ids) - 1), ids[1:], max_logits=700).mean()
        for states, ids in zip(hidden, documents, strict=True)
    ]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), packed)
    for loss, ids, got in zip(losses, documents, gradient[0].split(LENGTHS), strict=True):
        embedded = model.get_input_embeddings()(ids)[None].detach().requires_grad_()
        own = model(inputs_embeds=embedded, labels=ids[None]).loss
        assert loss.item() == pytest.approx(own.item(), rel=1e-5)
        assert model(input_ids=ids[None], labels=ids[None]).loss.item() == pytest.approx(own.item(), rel=1e-5)
        (expected,) = torch.autograd.grad(own, embedded)
        torch.testing.assert_close(got, expected[0], rtol=1e-3, atol=1e-5)


@families
def test_recomputed_activations_give_the_same_gradients(folders: dict[str, Path], family: str) -> None:
    gradients = []
    for recompute in (False, True):
        dual = adapted(folders[family]).train()
        if recompute:
            dual.enable_activation_checkpointing()
        embedded = F.embedding(WORDS, words_of(folders[family]).embedding)[None].requires_grad_()
        hidden = dual(embedded, POSITIONS[None], 9)
        dual(embedded[:, :5], POSITIONS[None, :5], 1)  # a later pass with other adapters and another length
        hidden.square().sum().backward()
        gradients.append({name: p.grad for name, p in dual.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@families
def test_the_planner_has_the_same_parameters(folders: dict[str, Path], family: str) -> None:
    config, words = load_config(folders[family]), words_of(folders[family])
    planned = meta_backbone(config, LORA, torch.float32)
    real = load_backbone(folders[family], LORA, torch.float32, 5)
    shapes = [{name: p.shape for name, p in dual.named_parameters()} for dual in (planned, real)]
    assert shapes[0] == shapes[1]
    planned_words = _words(config, torch.float32, True)
    assert planned_words.embedding.shape == words.embedding.shape
    assert planned_words.head.shape == words.head.shape
    assert (planned_words.head is planned_words.embedding) == (words.head is words.embedding)
    assert (planned_words.logit_transform is None) == (words.logit_transform is None)


@families
def test_the_probe_accepts_it_in_bf16(folders: dict[str, Path], family: str) -> None:
    """And changes nothing. In fp32 it is tested under ZeRO-3 and with 4-bit weights."""
    dual = load_backbone(folders[family], LORA, torch.bfloat16, 5)
    modes, attention = [m.training for m in dual.modules()], dual.decoder.config._attn_implementation
    words = load_frozen_embeddings(folders[family], torch.bfloat16, CPU)
    for head in (words.head, words.head[:0]):
        probe(folders[family], dual, FrozenEmbeddings(words.embedding, head, words.logit_transform))
    assert [m.training for m in dual.modules()] == modes
    assert dual.decoder.config._attn_implementation == attention
    assert isinstance(dual.decoder.get_input_embeddings(), nn.Identity)
    assert "forward" not in vars(dual)


@of_families(sorted(DECODERS.keys() - WITHOUT_NF4))
def test_four_bit_weights_pass_the_probe(folders: dict[str, Path], family: str) -> None:
    require_adaptable(load_config(folders[family]), LORA, "nf4")
    dual = load_backbone(folders[family], LORA, torch.float32, 5, "nf4")
    matrices = [m for layer in dual.layers for m in layer.modules() if isinstance(m, nn.Linear) and m.weight.dim() == 2]
    four_bit = [m for m in matrices if type(m).__name__ == "Linear4bit"]
    assert len(four_bit) == sum(isinstance(m, LoraLayer) for m in dual.modules())
    probe(folders[family], dual)


@pytest.mark.parametrize("family", sorted(WITHOUT_NF4))
def test_weights_that_would_stay_unquantized_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"would leave \d+ matrices of {family} unquantized"):
        require_adaptable(tiny_config(family), LORA, "nf4")


@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_experts_stay_frozen_and_are_named(family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        require_adaptable(tiny_config(family), LORA, "none")
    assert f"{family}: LoRA adapts q_proj, k_proj, v_proj, o_proj" in caplog.text
    assert "experts and routers stay frozen" in caplog.text
    with pytest.raises(ConfigError, match=r"adapter\.kind: 'full' would train the router"):
        require_adaptable(tiny_config(family), AdapterConfig(kind="full"), "none")


@of_families(EXPORTED)
def test_exported_adapters_compute_the_same_in_transformers(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dual = adapted(folders[family])
    tensors = {name: p.detach() for name, p in dual.named_parameters() if p.requires_grad}
    run = SimpleNamespace(adapter=LORA)
    source: Any = SimpleNamespace(
        config=run, decoder=load_config(folders[family]), llms=[COLLABORATIVE, CONTENT], tensors=tensors
    )
    write_adapters(source, str(folders[family]), tmp_path)
    embedded = F.embedding(WORDS, words_of(folders[family]).embedding)[None]
    for llm, start in ((COLLABORATIVE, WORDS.numel()), (CONTENT, 0)):
        base = AutoModel.from_pretrained(folders[family], attn_implementation=dual.decoder.config._attn_implementation)
        model = PeftModel.from_pretrained(base, str(tmp_path / llm)).eval()
        expected = dual(embedded, None, start)
        torch.testing.assert_close(model(inputs_embeds=embedded).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def engine_results(world: World, folders: dict[str, str]) -> dict[str, Any]:
    """By family: hidden states of this rank's document, and its gradients of adapters and inputs, after the probe."""
    results: dict[str, Any] = {}
    for family, folder in folders.items():
        tree = {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-", "deepspeed": str(DEEPSPEED)}
        settings = resolve_settings(validate(RunConfig, tree, "test"))
        words = words_of(Path(folder))
        with sharded_loading(settings):
            dual = load_backbone(Path(folder), LORA, torch.float32, 5)
        with gathered_by_layer(dual, dual.layers, CPU):
            require_equal_to_transformers(dual, dual, words, Path(folder), range(40, 100, 3))
        parameters: list[Any] = [p for p in dual.parameters() if hasattr(p, "ds_status")]
        released = all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in parameters) and bool(parameters)
        set_adapters(dual)
        trained = [p for p in dual.parameters() if p.requires_grad]
        engine = Engine(dual, settings, torch.optim.AdamW(trained, lr=0.0), dual.layers)
        embedded = F.embedding(WORDS.roll(world.rank), words.embedding)[None].requires_grad_()
        engine.train(True)
        hidden = engine(embedded, POSITIONS[None], 6)
        engine.backward(hidden.square().sum())
        norms = {name: float(g.norm()) for name, g in engine.gradients().items() if world.size == 1}
        results[family] = {"hidden": hidden.detach(), "input": embedded.grad, "released": released, "norms": norms}
        engine.step(0.0)
    return results


@pytest.mark.slow
def test_every_family_is_sharded_as_it_is_dense(folders: dict[str, Path]) -> None:
    """Two ranks under ZeRO-3 with the probe before; the dense reference is one module per document."""
    results = run_ranks(2, engine_results, {family: str(folder) for family, folder in folders.items()})
    for family, folder in folders.items():
        for rank, result in enumerate(results):
            assert result[family]["released"]
            dual = adapted(folder).train()
            embedded = F.embedding(WORDS.roll(rank), words_of(folder).embedding)[None].requires_grad_()
            hidden = dual(embedded, POSITIONS[None], 6)
            hidden.square().sum().backward()
            torch.testing.assert_close(result[family]["hidden"], hidden.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(result[family]["input"], embedded.grad, rtol=1e-3, atol=1e-3)


def test_decoders_that_do_not_find_packed_documents_are_given_a_mask() -> None:
    decoders = {family: meta_decoder(tiny_config(family)) for family in DECODERS}
    without = {name for name, decoder in decoders.items() if not finds_packed_documents(type(decoder), decoder.config)}
    assert without == {"opt", "falcon"}


def test_rows_meet_words_on_the_scale_of_the_decoders_input(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma multiplies its word embeddings by sqrt(D); Granite multiplies all embeddings, rows too, in its forward."""
    for family, scale in (("gemma", 32**0.5), ("granite", 1.0)):
        model, words = AutoModelForCausalLM.from_pretrained(folders[family]), words_of(folders[family])
        layer: Any = model.get_input_embeddings()
        assert words.scale == pytest.approx(scale * layer.weight.square().mean().sqrt().item(), rel=1e-5)
        torch.testing.assert_close(words.embedding, layer(torch.arange(300)).detach())
        assert embedding_scale(folders[family]) == pytest.approx(words.scale, rel=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(frozen_embeddings, "_SAMPLED_WORDS", 100)
            assert embedding_scale(folders[family]) == pytest.approx(words.scale, rel=0.05)


def test_the_documentation_lists_what_is_tested() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "backbone.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in DECODERS}
    assert table.keys() == DECODERS.keys()
    for family, (_, attention, *columns) in table.items():
        kind = decoder_class(tiny_config(family))
        assert kind is not None
        assert attention.startswith("sdpa" if kind._supports_sdpa else "eager"), family
        nf4, exported = "refused" if family in WITHOUT_NF4 else "yes", "yes" if family in EXPORTED else "not run"
        exported = "yes" if family in ("gpt2", "llama") else exported  # tests/export/test_folder.py
        assert columns == ["yes", "yes", "yes", nf4, exported], family
