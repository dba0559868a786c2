"""PEFT: the parts of an adapted layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModel

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, DualBackbone, load_backbone
from tests.harness import make_backbone, make_catalog
from tests.model.backbones import TARGETS
from tests.private_apis.backbone import LORA, NUM_LAYERS, WIDTH
from tests.private_apis.listing import relies_on


@relies_on("model/backbone.py", "forward", "base_layer", "lora_A", "lora_B", "lora_dropout", "scaling")
def test_an_adapted_layer_computes_what_peft_computes(llama: Path) -> None:
    """`_adapt` replaces the forward of PEFT's layers on each instance, and reads the parts of an adapter by name.

    If this fails, compare `forward` of `Linear` in peft/tuners/lora/layer.py with `_adapt`: PEFT computes an adapter in
    another way now, or keeps its parts elsewhere.
    """
    dual = load_backbone(llama, LORA, torch.float32, 5)
    layers = [module for module in dual.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == NUM_LAYERS * len(TARGETS["llama"])
    random = torch.Generator().manual_seed(1)
    for layer in layers[:7]:
        for name in (COLLABORATIVE, CONTENT):
            layer.lora_B[name].weight.data = torch.randn(layer.lora_B[name].weight.shape, generator=random)
        x = torch.randn(3, 5, layer.in_features, generator=random)
        for name, boundary in ((COLLABORATIVE, 15), (CONTENT, 0)):
            dual.begin_pass(boundary, x.shape[0] * x.shape[1])
            layer.set_adapter(name)
            torch.testing.assert_close(layer.forward(x), type(layer).forward(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@relies_on("model/backbone.py", "lora_variant", "lora_bias", "merged_adapters")
@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias"), ({}, "merged"), ({}, "neither LLM")],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    llama: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    """`_adapt` computes plain LoRA alone and would leave out what PEFT adds to it.

    If this fails, PEFT notes it elsewhere (`LoraLayer.__init__` in peft/tuners/lora/layer.py), and a kind of adapter
    would be computed wrongly without a word.
    """
    folder = make_backbone(tmp_path / "gpt2", make_catalog(), family="gpt2", hidden_size=WIDTH, num_layers=1)
    decoder = AutoModel.from_pretrained(folder)
    names = [COLLABORATIVE, CONTENT, *(["third"] if problem == "neither LLM" else [])]
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    for name in names:
        inject_adapter_in_model(lora, decoder, name)
    if problem == "merged":
        for layer in decoder.modules():
            if isinstance(layer, LoraLayer):
                layer.merge(adapter_names=[COLLABORATIVE])
    with pytest.raises(ConfigError, match=problem):
        DualBackbone(decoder, dual=True)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias", "use_rslora", "bias"])
def test_settings_of_other_adapters_are_refused(setting: str) -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-", "adapter": {setting: True}}
    with pytest.raises(ConfigError, match=f"adapter.{setting}"):
        validate(RunConfig, tree, "test")


@pytest.mark.slow
@relies_on("model/backbone.py", "cache_clear")
def test_adapters_do_without_bitsandbytes_unless_weights_are_quantized(llama: Path) -> None:
    """PEFT imports bitsandbytes if `find_spec` finds it, and `is_bnb_available` caches the answer until `cache_clear`.

    If this fails, PEFT imports it elsewhere, or keeps its answer elsewhere: see peft/import_utils.py.
    """
    pytest.importorskip("bitsandbytes")
    code = f"""
import sys
from pathlib import Path
import torch
from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.model.backbone import load_backbone
load = lambda quantization: load_backbone(Path({str(llama)!r}), AdapterConfig(), torch.bfloat16, 0, quantization)
load("none")
assert "bitsandbytes" not in sys.modules
from peft.tuners.lora.bnb import Linear4bit
assert any(isinstance(module, Linear4bit) for module in load("nf4").modules())
"""
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
