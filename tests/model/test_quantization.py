"""A 4-bit backbone computes as with its dequantized weights; evaluation does not change them; ZeRO-3 shards them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import Conv1D

from cllm4rec_dist.config import AdapterConfig, RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, resolve_settings, sharded_loading
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.backbone import DualBackbone, load_backbone
from tests.harness import make_backbone, make_catalog, run_ranks
from tests.model.test_backbone import DEEPSPEED

FAMILIES = ["gpt2", "llama"]
LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
D = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, catalog = tmp_path_factory.mktemp("backbones"), make_catalog()
    return {family: make_backbone(root / family, catalog, family=family, hidden_size=D) for family in FAMILIES}


def embeddings(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 7, D, generator=torch.Generator().manual_seed(seed))


def packed(dual: DualBackbone) -> dict[str, nn.Module]:
    layers = {n: m for n, m in dual.named_modules() if type(m).__module__ == "bitsandbytes.nn.modules"}
    return {name.replace("base_layer.", "").removesuffix(".base_layer"): layer for name, layer in layers.items()}


def packed_bytes(dual: DualBackbone) -> dict[str, Tensor]:
    return {name: layer.weight.data.view(torch.uint8).clone() for name, layer in packed(dual).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_compute_as_their_dequantized_values(folders: dict[str, Path], family: str) -> None:
    quantized = load_backbone(folders[family], LORA, torch.float32, 5, "nf4")
    dense = load_backbone(folders[family], LORA, torch.float32, 5)
    layers = packed(quantized)
    assert len(layers) >= 2 * 4, "two layers of at least four matrices"
    exact = dense.decoder.state_dict()
    for name, module in dense.named_modules():
        key = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear | Conv1D) and key in layers:
            weight: Any = layers[key].weight
            unpacked = dequantize_4bit(weight.data, weight.quant_state)
            unpacked = unpacked.T if isinstance(module, Conv1D) else unpacked
            assert 0 < (module.weight - unpacked).abs().max() < 0.3 * module.weight.abs().max()
            module.weight.data = unpacked.clone()
    assert exact.keys() == dense.decoder.state_dict().keys()

    inputs = embeddings(1, 5).requires_grad_()
    results = []
    for dual in (quantized, dense):
        hidden = dual(inputs, None, 17)
        results.append([hidden, *torch.autograd.grad((hidden * embeddings(3, 5)).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_does_not_change_packed_weights(folders: dict[str, Path]) -> None:
    dual = load_backbone(folders["llama"], LORA, torch.bfloat16, 5, "nf4")
    before = packed_bytes(dual)
    x = embeddings(1).bfloat16()
    dual.train(True)
    trained = dual(x, None, 9)
    dual.train(False)
    with torch.no_grad():
        dual(x, None, 9)
    dual.train(True)
    assert all(torch.equal(content, before[name]) for name, content in packed_bytes(dual).items())
    assert torch.equal(dual(x, None, 9), trained)


def engine_steps(world: World, folder: str) -> dict[str, Any]:
    """Two steps with the same inputs on every rank; losses and bytes of packed weights on this rank."""
    tree = {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-", "deepspeed": str(DEEPSPEED)}
    settings = resolve_settings(validate(RunConfig, tree, "test"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with sharded_loading(settings):
        dual = load_backbone(Path(folder), LORA, torch.float32, 5, "nf4")
    trained = [p for p in dual.parameters() if p.requires_grad]
    engine = Engine(dual, settings, torch.optim.AdamW(trained, lr=0.0), dual.layers)
    engine.train(True)
    losses = []
    for step in range(2):
        loss = engine(embeddings(step, 5).requires_grad_(), None, 16)[..., 0].square().mean()
        engine.backward(loss)
        engine.step(1e-2)
        losses.append(loss.item())
    return {"losses": losses, "kept": sum(layer.weight.ds_tensor.nbytes for layer in packed(dual).values())}


@pytest.mark.slow
def test_the_engine_shards_packed_weights(folders: dict[str, Path]) -> None:
    (alone,) = run_ranks(1, engine_steps, str(folders["llama"]))
    ranks = run_ranks(2, engine_steps, str(folders["llama"]))
    assert alone["losses"][0] != alone["losses"][1]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert rank["kept"] == alone["kept"] / 2


def test_a_backbone_that_is_trained_whole_cannot_be_quantized() -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-", "quantization": "nf4"}
    assert validate(RunConfig, tree, "test").quantization == "nf4"
    with pytest.raises(ConfigError, match="frozen"):
        validate(RunConfig, tree | {"adapter": {"kind": "full"}}, "test")


def test_without_bitsandbytes_the_error_says_how_to_install_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="qlora"):
        load_backbone(folders["llama"], LORA, torch.float32, 5, "nf4")
