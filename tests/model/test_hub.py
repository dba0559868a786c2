"""Hub ids: from a cache with the required files only; no other file is fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.utils import filter_repo_objects

from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.frozen_embeddings import load_frozen_embeddings
from cllm4rec_dist.model.hub import local_folder
from cllm4rec_dist.model.pretrained import load_config, require_weights
from cllm4rec_dist.model.weights import fingerprint
from tests.model.backbones import sharded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = [
    "README.md",
    "original/params.json",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "consolidated.safetensors",
    "model_ema.safetensors",
    "onnx/config.json",
    "onnx/model.onnx",
    "pytorch_model.bin",
    "tf_model.h5",
    "model.fp16.safetensors",
    "weights.gguf",
    "training_args.json",
]
"""Other files of repositories."""


def in_cache(folder: Path, root: Path, *, revision: str = COMMIT, tree: Sequence[str] = ()) -> Path:
    """Put a folder into a cache as org/name; `tree` are the hub's files that the cache has recorded."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    if tree:
        entry = TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
        write_tree_cache(str(repository), revision, dict.fromkeys(tree, entry))
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the hub is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_usable(folder: Path, like: Path) -> None:
    require_weights(folder, load_config(folder))
    assert fingerprint(folder) == fingerprint(like)
    assert WordTokenizer.load(folder).fingerprint == WordTokenizer.load(like).fingerprint
    words = load_frozen_embeddings(folder, torch.float32, torch.device("cpu"))
    assert torch.equal(words.head, load_frozen_embeddings(like, torch.float32, torch.device("cpu")).head)


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("revision", [COMMIT, "abc"])
@pytest.mark.parametrize("has_tree", [False, True])
def test_a_filtered_cache_is_enough_offline(
    folders: dict[str, Path], tmp_path: Path, offline: Path, in_shards: bool, revision: str, has_tree: bool
) -> None:
    """With and without a record of the hub's files in the cache."""
    folder = sharded(folders["llama"], tmp_path / "shards") if in_shards else folders["llama"]
    tree = [*(path.name for path in folder.iterdir()), *OTHERS, "vocab.json", "modules.json"] if has_tree else []
    snapshot = in_cache(folder, offline, revision=revision, tree=tree)
    assert local_folder("org/name") == snapshot
    assert local_folder("org/name", weights=False) == snapshot
    assert_usable(local_folder("org/name"), folder)


@pytest.mark.parametrize("has_tree", [False, True])
def test_weights_that_the_cache_lacks_are_named_offline(
    folders: dict[str, Path], tmp_path: Path, offline: Path, has_tree: bool
) -> None:
    folder = sharded(folders["llama"], tmp_path / "shards")
    lost = sorted(path.name for path in folder.glob("model-*"))[1]
    snapshot = in_cache(folder, offline, tree=[path.name for path in folder.iterdir()] if has_tree else [])
    (snapshot / lost).unlink()
    assert local_folder("org/name", weights=False) == snapshot, "a plan reads none"
    with pytest.raises(ConfigError, match=lost):
        fingerprint(local_folder("org/name"))
    for path in snapshot.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        local_folder("org/name")


def test_what_is_not_in_the_cache_is_refused_offline(offline: Path) -> None:
    for name in ("org/other", "other"):
        with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
            local_folder(name)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_an_offline_process_reads_the_cache(folders: dict[str, Path], tmp_path: Path, variable: str) -> None:
    snapshot = in_cache(folders["gpt2"], tmp_path, tree=["config.json", "tokenizer.json", "added_tokens.json", *OTHERS])
    script = "from cllm4rec_dist.model.hub import local_folder; print(local_folder('org/name'))"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), variable: "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


class Hub:
    """A hub that can be reached; notes what is fetched from it."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.snapshot, self.fetched = files, cache / COMMIT, list[str]()

    def download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str], **options: Any) -> str:
        assert repo_id == "org/name"
        assert revision in (None, COMMIT)
        names = [path.relative_to(self.files).as_posix() for path in self.files.rglob("*") if path.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            self.fetched.append(file)
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files / file, self.snapshot / file)
        return str(self.snapshot)


@pytest.mark.parametrize("in_shards", [False, True])
def test_only_files_that_are_read_are_fetched(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_shards: bool
) -> None:
    folder = tmp_path / "repository"
    if in_shards:
        sharded(folders["llama"], folder)
    else:
        shutil.copytree(folders["llama"], folder)
    read = {path.name for path in folder.iterdir()} - {"generation_config.json"}
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0")
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    assert local_folder("org/name", weights=False) == hub.snapshot
    assert not any("model" in name for name in hub.fetched)
    snapshot = local_folder("org/name")
    assert set(hub.fetched) == read
    assert_usable(snapshot, folder)


def test_an_adapter_on_the_hub_is_fetched_far_enough_to_be_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "repository"))
    (folder / "adapter_config.json").write_text(json.dumps({}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(folder, tmp_path / "cache").download)
    with pytest.raises(ConfigError, match="merge_and_unload"):
        load_config(local_folder("org/name"))


def test_the_cache_is_used_where_the_hub_refuses(
    folders: dict[str, Path], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_cache(folders["gpt2"], offline)
    real = huggingface_hub.snapshot_download

    def refuse(*, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            raise PermissionError("403: this proxy lets nobody through")
        return real(local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert local_folder("org/name") == snapshot
    with pytest.raises(ConfigError, match=r"neither a folder nor a hub id.*403: this proxy"):
        local_folder("org/other")


@pytest.mark.parametrize(
    "name", ["./bacbones/demo", "../demo", "/data/backbones/demo", "~/backbones/demo", "a/b/demo", r"C:\demo", "demo/"]
)
def test_a_path_that_does_not_exist_is_never_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: pytest.fail("called the hub"))
    started = time.monotonic()
    with pytest.raises(ConfigError, match="does not exist"):
        local_folder(name)
    assert time.monotonic() - started < 1


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file"):
        local_folder(str(tmp_path / "model.safetensors"))


def test_a_folder_is_taken_as_it_is(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: pytest.fail("called the hub"))
    monkeypatch.chdir(folders["gpt2"].parent)
    assert local_folder("gpt2") == folders["gpt2"].absolute()
    monkeypatch.setenv("HOME", str(folders["gpt2"].parent))
    assert local_folder("~/gpt2") == folders["gpt2"].absolute()
