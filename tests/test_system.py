"""Parts of a run that do not fit each other are refused before anything is computed, by runs and plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.config import embedding_width as embedding_width_module
from cllm4rec_dist.config.embedding_width import embedding_width
from cllm4rec_dist.corpus.prompts import largest_prompt_id
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.model import backbone
from cllm4rec_dist.planning.hardware import find_gpu
from cllm4rec_dist.planning.plan import Cluster, make_plan
from cllm4rec_dist.system import assemble_for_inference, open_backbone, require_embeddings
from cllm4rec_dist.train import train
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.model.backbones import changed, copied

Made = tuple[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A corpus and the backbone of its tokenizer."""
    folder, catalog = tmp_path_factory.mktemp("system"), make_catalog()
    decoder = make_backbone(folder / "backbone", catalog, family="llama")
    return make_corpus(folder / "corpus", catalog, decoder), decoder


def run_config(corpus: str, folder: Path, output: Path, **changes: Any) -> RunConfig:
    tree = {
        "stage": "pretrain",
        "corpus": corpus,
        "backbone": str(folder),
        "output": str(output),
        "epochs": 1,
        "batch": {"users": 9, "texts": 7},
        "adapter": {"kind": "lora", "rank": 2},
        "validation": {"every_epochs": 0},
    }
    return validate(RunConfig, tree | changes, "test")


def outcome(world: World, config: RunConfig) -> str:
    """Message of a refused run, or an empty text if it trains."""
    try:
        train(world, lambda metrics: None, config)
    except CLLM4RecError as error:
        return str(error)
    return ""


def planned(config: RunConfig) -> str:
    try:
        make_plan(config, Cluster(find_gpu("h100"), 2, 8, 0.45), 1)
    except CLLM4RecError as error:
        return str(error)
    return ""


def headless(folder: Path, to: Path) -> Path:
    copy = copied(folder, to)
    AutoModel.from_pretrained(folder).save_pretrained(copy)
    return copy


def with_adapter_file(folder: Path, to: Path) -> Path:
    copy = copied(folder, to)
    (copy / "adapter_config.json").write_text("{}")
    return copy


def fp8(folder: Path, to: Path) -> Path:
    return changed(folder, to, quantization_config={"quant_method": "fp8"})


def longrope(folder: Path, to: Path) -> Path:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128, **factors}
    return changed(folder, to, rope_parameters=None, rope_scaling=rope)


REFUSED: list[tuple[Callable[[Path, Path], Path], dict[str, Any], str]] = [
    (fp8, {}, "fp8"),
    (fp8, {"quantization": "nf4"}, "fp8"),
    (headless, {}, "no language-model head"),
    (with_adapter_file, {}, "merge_and_unload"),
    (longrope, {}, "longrope"),
    (copied, {"adapter": {"kind": "lora", "targets": ["q_proj", "c_attn"]}}, "'c_attn' matches no layer"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "changes", "named"), REFUSED)
def test_run_and_plan_refuse_the_same_backbones(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path], Path],
    changes: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.setattr(backbone, "load_backbone", lambda *a: pytest.fail("read weights"))
    config = run_config(made[0], make(made[1], tmp_path / "backbone"), tmp_path / "run", **changes)
    for refusal in run_ranks(2, outcome, config):
        assert named in refusal
    assert named in planned(config)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_backbone_without_head_trains_where_there_is_no_content_llm(made: Made, tmp_path: Path) -> None:
    folder = headless(made[1], tmp_path / "backbone")
    config = run_config(made[0], folder, tmp_path / "run", batch={"users": 9, "texts": 0})
    assert run_ranks(1, outcome, config) == [""]
    assert planned(config) == ""


def test_longrope_trains_where_no_document_is_long(made: Made, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), made[1], max_text_tokens=64)
    config = run_config(corpus, longrope(made[1], tmp_path / "backbone"), tmp_path / "run", method={"max_history": 64})
    assert planned(config) == ""
    refused = config.model_copy(update={"method": config.method.model_copy(update={"max_history": 65})})
    assert "longrope" in planned(refused)


def resized_embeddings(folder: Path, to: Path, num_words: int) -> Path:
    """A backbone with another number of word embeddings than its tokenizer has tokens."""
    copy = copied(folder, to)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(num_words)
    model.save_pretrained(copy)
    return copy


def with_added_token(folder: Path, to: Path, token: str) -> Path:
    """A backbone whose tokenizer has a token without an embedding."""
    copy = copied(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens([token]) == 1
    tokenizer.save_pretrained(copy)
    return copy


def largest_in_texts(corpus: str) -> int:
    content = Corpus.open(corpus).content
    return max(int(content.read_record(index)["tokens"].max()) for index in range(len(content)))


def test_a_text_with_a_token_that_has_no_embedding_is_refused(made: Made, tmp_path: Path) -> None:
    folder = with_added_token(made[1], tmp_path / "added", "spress")
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), folder)
    num_words = len(WordTokenizer.load(made[1]))
    assert largest_in_texts(corpus) == num_words
    for texts in (7, 0):
        config = run_config(corpus, folder, tmp_path / "run", batch={"users": 9, "texts": texts})
        for message in (*run_ranks(2, outcome, config), planned(config)):
            assert f"vocab_size: {num_words} word embeddings, but the texts" in message
            assert f"token {num_words}" in message


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(made: Made, tmp_path: Path) -> None:
    folder = with_added_token(made[1], tmp_path / "added", "interacted")
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), folder)
    assert "vocab_size" in (message := planned(run_config(corpus, folder, tmp_path / "run")))
    assert "the prompts use token" in message


def test_a_token_that_nothing_uses_needs_no_embedding(made: Made, tmp_path: Path) -> None:
    folder = with_added_token(made[1], tmp_path / "added", "<pad>")
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), folder)
    assert run_ranks(1, outcome, run_config(corpus, folder, tmp_path / "run")) == [""]


def test_the_largest_token_needs_an_embedding(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, tokenizer = Corpus.open(made[0]), WordTokenizer.load(made[1])
    largest = max(largest_in_texts(made[0]), largest_prompt_id(tokenizer))
    require_embeddings(corpus, tokenizer, largest + 1)
    with pytest.raises(ConfigError, match=f"token {largest}"):
        require_embeddings(corpus, tokenizer, largest)
    monkeypatch.setattr(type(corpus.content), "read_record", lambda *a: pytest.fail("read texts for nothing"))
    require_embeddings(corpus, tokenizer, tokenizer.largest_id + 1)


def test_the_largest_prompt_id_counts_the_start_of_a_sequence(made: Made) -> None:
    tokenizer = WordTokenizer.load(made[1])
    words = largest_prompt_id(tokenizer)
    assert words < len(tokenizer)
    tokenizer.prefix = [10_000]
    assert largest_prompt_id(tokenizer) == 10_000


def test_a_backbone_with_more_embeddings_than_tokens_is_accepted(made: Made, tmp_path: Path) -> None:
    more = resized_embeddings(made[1], tmp_path / "more", len(WordTokenizer.load(made[1])) + 7)
    assert run_ranks(1, outcome, run_config(made[0], more, tmp_path / "run")) == [""]


def test_a_backbone_cut_below_its_tokenizer_is_refused(made: Made, tmp_path: Path) -> None:
    fewer = resized_embeddings(made[1], tmp_path / "fewer", 10)
    (refusal,) = run_ranks(1, outcome, run_config(made[0], fewer, tmp_path / "run"))
    assert "vocab_size: 10 word embeddings" in refusal


@pytest.mark.slow
def test_a_second_weight_file_changes_nothing_in_a_run(made: Made, tmp_path: Path) -> None:
    """The content LLM's loss is that of the model that transformers loads."""
    second = copied(made[1], tmp_path / "second")
    weights = load_file(second / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, second / "model_ema.safetensors", {"format": "pt"})
    files = []
    for name, folder in (("one", made[1]), ("two", second)):
        assert run_ranks(1, outcome, run_config(made[0], folder, tmp_path / name)) == [""]
        (checkpoint,) = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1:]
        files.append({path.name: load_file(path) for path in checkpoint.glob("*.safetensors")})
    assert files[0].keys() == files[1].keys()
    for name, tensors in files[0].items():
        assert all(torch.equal(value, files[1][name][key]) for key, value in tensors.items())


def test_embeddings_wider_than_the_backbone_are_refused(made: Made, tmp_path: Path) -> None:
    for width in (None, 1, 16):
        open_backbone(run_config(*made, tmp_path, embeddings={"dim": width}), Corpus.open(made[0]))
    with pytest.raises(ConfigError, match=r"embeddings\.dim: 17 exceeds the backbone's hidden size, 16\. Lower it"):
        open_backbone(run_config(*made, tmp_path, embeddings={"dim": 17}), Corpus.open(made[0]))


def test_embeddings_of_a_large_catalog_are_narrow_by_default() -> None:
    assert embedding_width(None, 4096, 524_288) == 4096
    assert embedding_width(None, 4096, 524_289) == 256
    assert embedding_width(None, 128, 1 << 30) == 128
    assert embedding_width(4096, 4096, 1 << 30) == 4096
    assert embedding_width(64, 4096, 100) == 64


@pytest.mark.parametrize(("limit", "width"), [(1 << 20, 16), (100, 8)])
def test_run_and_plan_choose_the_same_width(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, width: int
) -> None:
    monkeypatch.setattr(embedding_width_module, "NARROW_WIDTH", 8)
    monkeypatch.setattr(embedding_width_module, "_MAX_ENTRIES", limit)
    config, world = run_config(*made, tmp_path), World(0, 1, 0, torch.device("cpu"))
    cluster = Cluster(find_gpu("h100"), 2, 8, 0.45)
    items = assemble_for_inference(config, world).recommender.collaborative.items.local_rows
    explicit = run_config(*made, tmp_path, embeddings={"dim": width})
    assert items.shape[1] == width
    assert make_plan(config, cluster).memory == make_plan(explicit, cluster).memory
