"""Backbones that cannot be used are refused by name, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.backbone import load_backbone
from cllm4rec_dist.model.pretrained import (
    load_config,
    require_static_rotary,
    require_targets,
    require_weights,
)
from tests.model.backbones import FAMILIES, TARGETS, changed, copied, rewrite

LORA = AdapterConfig(kind="lora", rank=2, alpha=4)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2}, "'bert' is an encoder"),
        ({"model_type": "t5"}, "'t5' is no decoder"),
        ({"model_type": "bart"}, "'bart' is no decoder"),
        ({"model_type": "clip"}, "'clip' is no decoder"),
        ({"model_type": "gemma3"}, r"'gemma3' has several models \(.*text_config"),
        ({"model_type": "opt", "layerdrop": 0.1}, "layerdrop: 0.1 skips layers at random"),
        ({"model_type": "unheard-of"}, r"no valid config\.json.*unheard-of"),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path)


QUANTIZED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}, "fp8, e4m3"),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "compressed-tensors"),
    ({"compression_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "modelopt, NVFP4"),
    ({"quantization_config": {"quant_method": "something-new"}}, "something-new"),
    ({"quantization_config": {"bits": 4}}, "unknown method"),
    ({"quantization_config": {}}, "unknown method"),
    ({"quantization_config": "fp8"}, "fp8"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config: quantization_config.*fp8"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits.*=nf4"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits.*=nf4"),
]


@pytest.mark.parametrize(("settings", "named"), QUANTIZED)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_quantized_folder_is_refused_with_its_method(
    folders: dict[str, Path], tmp_path: Path, family: str, settings: dict[str, Any], named: str
) -> None:
    folder = changed(folders[family], tmp_path / "quantized", **settings)
    (folder / "model.safetensors").unlink()  # the refusal needs no weights
    with pytest.raises(ConfigError, match=f"{named}") as refusal:
        load_config(folder)
    assert "Use the model that it was made from" in str(refusal.value)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_quantization_does_not_make_quantized_weights_usable(
    folders: dict[str, Path], tmp_path: Path, quantization: str
) -> None:
    folder = changed(folders["llama"], tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="gptq"):
        load_backbone(folder, LORA, torch.float32, 0, quantization)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_quantizers_file_is_recognized_too(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    folder = copied(folders["llama"], tmp_path / "quantized")
    (folder / file).write_text(json.dumps({"bits": 4}))
    with pytest.raises(ConfigError, match=file):
        load_config(folder)


def test_no_quantization_is_no_quantization(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path / "null")
    tree = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(tree))
    assert load_config(folder).model_type == "llama"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_without_a_quantization_config_are_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Names and shapes match, so transformers would read the numbers without their scales."""
    folder = copied(folders[family], tmp_path / "raw")
    path = folder / "model.safetensors"
    name = next(name for name in load_file(path) if "mlp" in name and name.endswith("weight"))
    rewrite(path, **{name: load_file(path)[name].to(dtype), f"{name}_scale_inv": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"mlp.*quantized.*no quantization_config"):
        require_weights(folder, load_config(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_unquantized_dtype_are_read(
    folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = copied(folders["llama"], tmp_path / "plain")
    path = folder / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})
    require_weights(folder, load_config(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_in_the_folder_is_refused(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = copied(folders[family], tmp_path / "adapted")
    settings = LoraConfig(r=2, target_modules=TARGETS[family][:1], fan_in_fan_out=family == "gpt2")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(ConfigError, match=rf"{file}.*merge_and_unload"):
            load_config(folder)
        (folder / file).unlink()
    assert load_config(folder).model_type == family


def test_a_folder_with_nothing_but_an_adapter_is_refused_for_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*merge_and_unload"):
        load_config(tmp_path)


def test_adapter_weights_among_the_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path / "mixed")
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rewrite(folder / "model.safetensors", **{name: torch.zeros(2, 16)})
    with pytest.raises(ConfigError, match=r"lora_A.*merge_and_unload"):
        require_weights(folder, load_config(folder))


def test_stored_weights_that_the_decoder_does_not_have_are_logged(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(folders["llama"], tmp_path / "more")
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.ones(2, 16)}
    rewrite(folder / "model.safetensors", **constants)
    require_weights(folder, load_config(folder))
    assert not caplog.messages
    rewrite(folder / "model.safetensors", **{"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    require_weights(folder, load_config(folder))
    assert "does not have 1 of the stored weights (layers.0.self_attn.q_proj.bias)" in caplog.text


def test_a_weight_with_and_without_prefix_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path / "twice")
    rewrite(folder / "model.safetensors", **{"norm.weight": torch.zeros(16)})
    with pytest.raises(ConfigError, match=r"norm\.weight.*twice"):
        require_weights(folder, load_config(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bidirectional_decoder_is_refused(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = changed(folders[family], tmp_path / "both-sides", is_causal=False)
    with pytest.raises(ConfigError, match="is_causal"):
        load_config(folder)
    assert load_config(changed(folders[family], tmp_path / "causal", is_causal=True)).model_type == family


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("llama", ("q_proj", "c_attn"), "'c_attn' matches no layer"),
        ("llama", ("q_proj", "k_porj"), "'k_porj' matches no layer"),
        ("gpt2", ("c_attn", "q_proj"), "'q_proj' matches no layer"),
        ("gpt2", ("c_fc", "wpe"), r"'wpe' matches a layer that is not linear \(Embedding\)"),
        ("gpt2", ("ln_1",), r"'ln_1' matches a layer that is not linear \(LayerNorm\)"),
        ("qwen2", ("mlp",), r"'mlp' matches a layer that is not linear \(Qwen2MLP\)"),
        ("mistral", ("proj",), "'proj' matches no layer"),
        ("mistral", ("lm_head",), "'lm_head' matches no layer"),
        ("mistral", ("all-linear",), "'all-linear' matches no layer"),
        ("mistral", ("q_proj", ""), "'' matches no layer"),
        ("mistral", ("layers.9.self_attn.q_proj",), "'layers.9.self_attn.q_proj' matches no layer"),
        ("mistral", (".*_proj",), r"'\.\*_proj' matches no layer"),
    ],
)
def test_every_adapter_target_must_match_linear_layers(
    folders: dict[str, Path], family: str, targets: tuple[str, ...], named: str
) -> None:
    adapter = AdapterConfig(kind="lora", rank=2, targets=targets)
    with pytest.raises(ConfigError, match=f"adapter.targets: {named}.*Choose from"):
        require_targets(load_config(folders[family]), adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_matching_targets_are_accepted(folders: dict[str, Path], family: str) -> None:
    config, names = load_config(folders[family]), TARGETS[family]
    first_layer = "h.0.mlp.c_fc" if family == "gpt2" else "layers.0.mlp.up_proj"
    for targets in (None, tuple(names), (names[0],), (first_layer,)):
        require_targets(config, AdapterConfig(kind="lora", targets=targets))


ROTARY: list[tuple[dict[str, Any], int | None]] = [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 16),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 16),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 16),
    (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [3.0, 5.0, 7.0, 9.0],
                "original_max_position_embeddings": 6,
                "factor": 2.0,
            }
        },
        6,
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "factor": 2.0,
            },
            "original_max_position_embeddings": 5,
        },
        5,
    ),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 6,
            }
        },
        None,
    ),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6}}, None),
    ({}, None),
]


def hidden(folder: Path, lengths: list[int]) -> list[torch.Tensor]:
    """Hidden states of documents packed into one row, by document, with attention that is far from uniform."""
    dual = load_backbone(folder, AdapterConfig(kind="none"), torch.float32, seed=0).eval()
    for name, weight in dual.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data *= 30
    documents = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        return list(dual(torch.cat(documents)[None], positions[None], 0)[0].split(lengths))


@pytest.mark.parametrize(("settings", "constant"), ROTARY)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_packed_documents_compute_as_alone_for_every_accepted_rotary_type(
    folders: dict[str, Path], tmp_path: Path, family: str, settings: dict[str, Any], constant: int | None
) -> None:
    clean = {"rope_parameters": None, "max_position_embeddings": 16}
    folder = changed(folders[family], tmp_path / "rotary", **(clean | settings))
    config = load_config(folder)
    longest = constant or 24
    require_static_rotary(config, "method.max_history", longest - 3, 3)
    together = hidden(folder, [4, longest])
    torch.testing.assert_close(together[0], hidden(folder, [4])[0], rtol=1e-4, atol=1e-5)
    if constant is None:
        return
    named = rf"max_history: {longest - 2} .*{constant} positions.*rope_type.*{constant - 3} or"
    with pytest.raises(ConfigError, match=named):
        require_static_rotary(config, "method.max_history", longest - 2, 3)
    # The refusal is needed: with a longer document in the batch the result differs.
    assert not torch.allclose(hidden(folder, [4, constant + 4])[0], hidden(folder, [4])[0], atol=1e-4)


def test_rotary_settings_of_each_type_of_layer_are_seen(folders: dict[str, Path]) -> None:
    config = load_config(folders["llama"])
    config.rope_parameters = {
        "full_attention": {"rope_type": "default"},
        "sliding_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8},
    }
    require_static_rotary(config, "method.max_history", 5, 3)
    with pytest.raises(ConfigError, match=r"rope_parameters\.sliding_attention\.rope_type 'longrope'"):
        require_static_rotary(config, "method.max_history", 6, 3)
    require_static_rotary(load_config(folders["gpt2"]), "method.max_history", 10**9, 3)
