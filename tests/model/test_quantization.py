"""A 4-bit backbone computes what its weights, unpacked, compute; evaluation does not spoil it; ZeRO-3 shards it."""

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
    found = {n: m for n, m in dual.named_modules() if type(m).__module__ == "bitsandbytes.nn.modules"}
    return {name.replace("base_layer.", "").removesuffix(".base_layer"): module for name, module in found.items()}


def packed_bytes(dual: DualBackbone) -> dict[str, Tensor]:
    return {name: layer.weight.data.view(torch.uint8).clone() for name, layer in packed(dual).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_compute_what_they_unpack_to(folders: dict[str, Path], family: str) -> None:
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
    found = []
    for dual in (quantized, dense):
        hidden = dual(inputs, None, 17)
        found.append([hidden, *torch.autograd.grad((hidden * embeddings(3, 5)).sum(), inputs)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_packed_weights_as_they_are(folders: dict[str, Path]) -> None:
    dual = load_backbone(folders["llama"], LORA, torch.bfloat16, 5, "nf4")
    before = packed_bytes(dual)
    x = embeddings(1).bfloat16()
    dual.train(True)
    trained = dual(x, None, 9)
    dual.train(False)
    with torch.no_grad():
        dual(x, None, 9)
    dual.train(True)
    assert all(torch.equal(found, before[name]) for name, found in packed_bytes(dual).items())
    assert torch.equal(dual(x, None, 9), trained)


def engine_steps(world: World, folder: str) -> dict[str, Any]:
    """Two steps over inputs that are the same on every rank; packed bytes that this rank keeps."""
    tree = {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-", "deepspeed": str(DEEPSPEED)}
    settings = resolve_settings(validate(RunConfig, tree, "test"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with sharded_loading(settings):
        dual = load_backbone(Path(folder), LORA, torch.float32, 5, "nf4")
    trained = [p for p in dual.parameters() if p.requires_grad]
    engine = Engine(dual, settings, torch.optim.AdamW(trained, lr=0.0), dual.layers)
    engine.train(True)
    losses = []
    for number in range(2):
        loss = engine(embeddings(number, 5).requires_grad_(), None, 16)[..., 0].square().mean()
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


def test_what_is_trained_whole_is_not_quantized() -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-", "quantization": "nf4"}
    assert validate(RunConfig, tree, "test").quantization == "nf4"
    with pytest.raises(ConfigError, match="frozen"):
        validate(RunConfig, tree | {"adapter": {"kind": "full"}}, "test")


def test_a_machine_without_bitsandbytes_says_how_to_get_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="qlora"):
        load_backbone(folders["llama"], LORA, torch.float32, 5, "nf4")
