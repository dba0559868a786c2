"""Which weight files are read: those that transformers reads, whole, or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError, FaultError
from cllm4rec_dist.model import weights
from cllm4rec_dist.model.frozen_embeddings import load_frozen_embeddings
from cllm4rec_dist.model.pretrained import load_config, require_weights
from cllm4rec_dist.model.weights import INDEX, fingerprint, fingerprint_on_each_host, stored_weights, weight_files
from tests.harness import run_ranks
from tests.model.backbones import changed, copied, rewrite, sharded

CPU = torch.device("cpu")


def noisy(weights: Path, to: Path) -> None:
    """Another file with the same names."""
    save_file({name: value + 1 for name, value in load_file(weights).items()}, to, {"format": "pt"})


def assert_read_as_transformers_does(folder: Path) -> None:
    require_weights(folder, load_config(folder))
    words, model = load_frozen_embeddings(folder, torch.float32, CPU), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(words.embedding, model.get_input_embeddings().weight)
    assert torch.equal(words.head, model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.safetensors",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model-00001-of-00001.safetensors",
        "aaa.safetensors",
        "model-00001-of-00002.safetensors",
    ],
)
def test_a_second_file_with_the_same_names_is_not_read(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = folders["llama"]
    for folder, second in ((copied(source, tmp_path / "one"), name), (sharded(source, tmp_path / "many"), f"x-{name}")):
        before = fingerprint(folder)
        noisy(source / "model.safetensors", folder / second)
        assert fingerprint(folder) == before
        assert_read_as_transformers_does(folder)


def test_several_files_are_read_as_the_index_says(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in folders:
        folder = sharded(folders[family], tmp_path / family)
        assert {path.name for path in weight_files(folder)} == {path.name for path in folder.glob("*.safetensors")}
        assert_read_as_transformers_does(folder)


def test_a_single_file_goes_before_an_index(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = sharded(folders["gpt2"], tmp_path / "both")
    noisy(folders["gpt2"] / "model.safetensors", folder / "model.safetensors")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    assert_read_as_transformers_does(folder)


def test_a_file_that_the_configuration_names_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["llama"], tmp_path / "named", transformers_weights="other.safetensors")
    noisy(folder / "model.safetensors", folder / "other.safetensors")
    assert [path.name for path in weight_files(folder)] == ["other.safetensors"]
    assert_read_as_transformers_does(folder)
    for outside in ("../llama/model.safetensors", "/model.safetensors", 3):
        folder = changed(folders["llama"], tmp_path / str(len(str(outside))), transformers_weights=outside)
        with pytest.raises(ConfigError, match="transformers_weights"):
            weight_files(folder)


def test_ordinary_folders_keep_the_fingerprints_of_earlier_checkpoints(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for folder in (folders["gpt2"], sharded(folders["llama"], tmp_path / "sharded")):
        settings = json.loads((folder / "config.json").read_text())
        for volatile in ("transformers_version", "_name_or_path"):
            settings.pop(volatile, None)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        assert fingerprint(folder) == digest.hexdigest()


def test_the_fingerprint_changes_with_one_byte_of_a_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    same, other = copied(folders["gpt2"], tmp_path / "same"), copied(folders["gpt2"], tmp_path / "other")
    assert fingerprint(same) == fingerprint(folders["gpt2"])
    path = other / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert fingerprint(other) != fingerprint(same)


def test_the_fingerprint_knows_the_architecture_but_not_the_library(folders: dict[str, Path], tmp_path: Path) -> None:
    before = fingerprint(folders["gpt2"])
    assert fingerprint(changed(folders["gpt2"], tmp_path / "same", transformers_version="99.0")) == before
    assert fingerprint(changed(folders["gpt2"], tmp_path / "other", layer_norm_epsilon=1e-3)) != before


def test_a_folder_without_safetensors_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["gpt2"], tmp_path / "backbone")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for function in (fingerprint, stored_weights, lambda f: load_frozen_embeddings(f, torch.float32, CPU)):
        with pytest.raises(ConfigError, match=r"no \.safetensors file.*pytorch_model\.bin"):
            function(folder)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(shards(folder)[1])
    weights.pop(sorted(weights)[0])
    save_file(weights | {"extra": torch.zeros(1)}, shards(folder)[1], {"format": "pt"})


def lose_a_tensor_that_the_decoder_does_not_need(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))


def hold_a_tensor_twice(folder: Path) -> None:
    name, value = next(iter(load_file(shards(folder)[0]).items()))
    rewrite(shards(folder)[1], **{name: value})


def change_index(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: shards(f)[1].unlink(), "model-00002-of-.*absent"),
        (lambda f: cut(shards(f)[1], 3000), "model-00002-of-.*damaged or incomplete"),
        (lambda f: cut(shards(f)[1], 0), "model-00002-of-.*damaged or incomplete"),
        (lambda f: cut(shards(f)[-1], -1), "damaged or incomplete"),
        (lambda f: shards(f)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs"),
        (lose_a_tensor, "model-00002-of-.*is not in the file"),
        (lose_a_tensor_that_the_decoder_does_not_need, r"lm_head\.weight.*is not in the file"),
        (hold_a_tensor_twice, "is in both model-00001"),
        (lambda f: cut(f / INDEX, 100), r"model\.safetensors\.index\.json.*damaged"),
        (lambda f: (f / INDEX).write_text("[]"), r"model\.safetensors\.index\.json.*not a JSON object"),
        (change_index(lambda index: index.pop("weight_map")), "weight_map"),
        (change_index(lambda index: index.update(weight_map={})), "weight_map"),
        (change_index(lambda index: index.update(weight_map={"a": 1})), "weight_map"),
        (change_index(lambda index: index.pop("metadata")), "metadata"),
        (change_index(lambda index: index["weight_map"].update(a="../m.safetensors")), "inside of the folder"),
        (change_index(lambda index: index["weight_map"].update(a="pytorch_model.bin")), "not a safetensors file"),
        (lambda f: (f / INDEX).unlink(), "no .safetensors file that transformers would read.*model-00001-of"),
        (lambda f: (f / "shard-00000-model-00001-of-00002.safetensors").touch(), "distributed checkpoint"),
    ],
)
def test_an_incomplete_download_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    folder = sharded(folders["llama"], tmp_path / "backbone")
    damage(folder)
    for function in (
        lambda f: require_weights(f, load_config(f)),
        lambda f: load_frozen_embeddings(f, torch.float32, CPU),
    ):
        with pytest.raises(ConfigError, match=named):
            function(folder)


def test_a_single_file_that_is_cut_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["qwen2"], tmp_path / "backbone")
    for size in (-1, 2000, 9, 0):
        cut(folder / "model.safetensors", size)
        with pytest.raises(ConfigError, match=r"model\.safetensors.*damaged or incomplete"):
            stored_weights(folder)


def test_a_link_whose_file_is_gone_is_no_weight_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """The cache of the hub is made of links."""
    folder = sharded(folders["gpt2"], tmp_path / "backbone")
    first = shards(folder)[0]
    first.unlink()
    first.symlink_to(tmp_path / "blob")
    with pytest.raises(ConfigError, match=r"model-00001-of-.*absent"):
        weight_files(folder)


def hashed(world: World, folders: list[Path], local_ranks: list[int]) -> tuple[str, int]:
    """Fingerprint or refusal, and how often this rank has hashed."""
    calls = []

    def counted(folder: Path) -> str:
        calls.append(folder)
        return unpatched(folder)

    unpatched, weights.fingerprint = weights.fingerprint, counted
    try:
        return fingerprint_on_each_host(folders[world.rank], replace(world, local_rank=local_ranks[world.rank])), len(
            calls
        )
    except FaultError as error:
        return str(error), len(calls)


def test_the_first_rank_of_each_host_hashes_the_backbone(folders: dict[str, Path]) -> None:
    digest = fingerprint(folders["gpt2"])
    assert run_ranks(3, hashed, [folders["gpt2"]] * 3, [0, 1, 0]) == [(digest, 1), (digest, 0), (digest, 1)]


def test_hosts_with_different_backbones_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    other = copied(folders["gpt2"], tmp_path / "other")
    noisy(other / "model.safetensors", other / "model.safetensors")
    for refusal, _ in run_ranks(3, hashed, [folders["gpt2"], folders["gpt2"], other], [0, 1, 0]):
        assert "on the hosts of ranks 2" in refusal
        assert "Copy the same files to every host." in refusal
