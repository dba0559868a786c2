"""Word embeddings and head: those that transformers would load as a causal language model, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
)

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.frozen_embeddings import load_frozen_embeddings
from cllm4rec_dist.model.pretrained import load_config, require_head, require_weights
from cllm4rec_dist.model.weights import stored_weights
from tests.model.backbones import FAMILIES, changed, copied, rewrite

CPU = torch.device("cpu")
NO_HEAD = r"no language-model head.*batch\.texts=0"


def with_weights_of(folder: Path, to: Path, model: type, *, tied: bool = True) -> Path:
    """A folder with the weights of another class of the family."""
    copy = copied(folder, to)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    made = model.from_config(config) if hasattr(model, "from_config") else model(config)
    made.save_pretrained(copy)
    return copy


def assert_as_transformers(folder: Path) -> None:
    """Reference: the causal language model that transformers loads."""
    words, model = load_frozen_embeddings(folder, torch.float32, CPU), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(words.embedding, model.get_input_embeddings().weight)
    assert torch.equal(words.head, model.get_output_embeddings().weight)


def assert_headless(folder: Path) -> None:
    with pytest.raises(ConfigError, match=NO_HEAD):
        load_frozen_embeddings(folder, torch.float32, CPU)
    with pytest.raises(ConfigError, match=NO_HEAD):
        require_head(folder, load_config(folder), stored_weights(folder))
    require_weights(folder, load_config(folder))  # the decoder is whole
    words = load_frozen_embeddings(folder, torch.float32, CPU, head=False)
    assert words.embedding.shape == (load_config(folder).vocab_size, 16)
    assert words.head.shape == (0, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_the_models_tied_weights(folders: dict[str, Path], family: str) -> None:
    words = load_frozen_embeddings(folders[family], torch.float32, CPU)
    assert_as_transformers(folders[family])
    assert words.head is words.embedding
    assert words.scale == pytest.approx(words.embedding.square().mean().sqrt().item())


def test_an_untied_head_is_read_as_well(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_weights_of(folders["llama"], tmp_path / "untied", AutoModelForCausalLM, tied=False)
    assert_as_transformers(folder)
    words, model = load_frozen_embeddings(folder, torch.bfloat16, CPU), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(words.head, model.get_output_embeddings().weight.bfloat16())
    assert not torch.equal(words.head, words.embedding)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_from_the_base_model_has_no_head(
    folders: dict[str, Path], tmp_path: Path, family: str, tied: bool
) -> None:
    assert_headless(with_weights_of(folders[family], tmp_path / "base", AutoModel, tied=tied))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_has_no_head(folders: dict[str, Path], tmp_path: Path, family: str, model: type) -> None:
    assert_headless(with_weights_of(folders[family], tmp_path / "classifier", model))


@pytest.mark.parametrize("sign", ["modules.json", "config_sentence_transformers.json"])
def test_an_embedding_model_has_no_head_whatever_its_architecture(
    folders: dict[str, Path], tmp_path: Path, sign: str
) -> None:
    folder = copied(folders["qwen2"], tmp_path / "embedder")
    (folder / sign).write_text("[]")
    assert_headless(folder)


def test_an_absent_head_is_not_replaced_by_the_embeddings(folders: dict[str, Path], tmp_path: Path) -> None:
    """Transformers would initialize it at random, because config.json says that it is not tied."""
    for family in FAMILIES:
        folder = changed(folders[family], tmp_path / family, tie_word_embeddings=False)
        _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert loading["missing_keys"] == {"lm_head.weight"}
        assert_headless(folder)
    assert_headless(changed(folders["llama"], tmp_path / "left-out", tie_word_embeddings=None))  # false for LLaMA


def test_a_stored_head_is_used_whatever_ties_and_architecture_say(folders: dict[str, Path], tmp_path: Path) -> None:
    """Transformers does not tie weights that are stored with other values."""
    for index, settings in enumerate(({}, {"architectures": ["LlamaModel"]}, {"architectures": None})):
        folder = changed(folders["llama"], tmp_path / str(index), **settings)
        embedding = load_frozen_embeddings(folder, torch.float32, CPU, head=False).embedding
        rewrite(folder / "model.safetensors", **{"lm_head.weight": embedding + 1})
        assert_as_transformers(folder)
        assert torch.equal(load_frozen_embeddings(folder, torch.float32, CPU).head, embedding + 1)
        rewrite(folder / "model.safetensors", **{"lm_head.weight": embedding.clone()})
        words = load_frozen_embeddings(folder, torch.float32, CPU)
        assert words.head is words.embedding, "stored twice with the same values"


def unprefixed(folder: Path) -> Path:
    path = folder / "model.safetensors"
    weights = {name.split(".", 1)[1]: value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    return folder


def test_a_folder_without_architectures_is_judged_by_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        saved_with_head = changed(folders[family], tmp_path / family, architectures=None)
        assert_as_transformers(saved_with_head)
        assert_headless(unprefixed(copied(saved_with_head, tmp_path / f"{family}-base")))


def test_weights_without_prefix_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in the original GPT-2, whose config.json says GPT2LMHeadModel."""
    for family in FAMILIES:
        folder = unprefixed(copied(folders[family], tmp_path / family))
        require_weights(folder, load_config(folder))
        assert_as_transformers(folder)


def test_a_model_with_a_second_head_has_one_that_predicts_words(folders: dict[str, Path], tmp_path: Path) -> None:
    assert_as_transformers(with_weights_of(folders["gpt2"], tmp_path / "double", GPT2DoubleHeadsModel))


@pytest.mark.parametrize("name", ["draft.embed_tokens.weight", "medusa.lm_head.weight", "vision.wte.weight"])
def test_names_that_only_end_like_words_are_no_words(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copied(folders["llama"], tmp_path / "more")
    rewrite(folder / "model.safetensors", **{name: torch.ones(3, 2)})
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    "change", [lambda w: w[1:].contiguous(), lambda w: w.to(torch.int8), lambda w: w[:, 1:].clone()]
)
def test_a_head_of_another_shape_or_type_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = with_weights_of(folders["llama"], tmp_path / "untied", AutoModelForCausalLM, tied=False)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    rewrite(folder / "model.safetensors", **{"lm_head.weight": change(head)})
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*unquantized matrix"):
        load_frozen_embeddings(folder, torch.float32, CPU)


def test_without_weights_the_configuration_decides(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        require_head(folders[family], load_config(folders[family]), None)
        base = changed(folders[family], tmp_path / family, architectures=["GPT2Model"])
        with pytest.raises(ConfigError, match=NO_HEAD):
            require_head(base, load_config(base), None)


def test_foreign_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["gpt2"], tmp_path / "backbone")
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"wte\.weight"):
        load_frozen_embeddings(folder, torch.float32, CPU)
