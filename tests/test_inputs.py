"""Configurations, manifests and shards spoilt at random: understood or refused clearly, never met deep inside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cllm4rec_dist import cli
from cllm4rec_dist.config import AdapterConfig, RunConfig, load_config
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.distributed.engine import resolve_settings
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError, CorpusError, DataError
from cllm4rec_dist.model import backbone
from cllm4rec_dist.serving.bulk import BulkRequest
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.known_ids import KnownIds
from tests.damage import DAMAGE
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import make_config, refused

ROOT = Path(__file__).parents[1]
patient = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just("../../etc"),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def keys_of(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a tree of plain values."""
    pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    return [(tree, key) for key, _ in pairs] + [pair for _, child in pairs for pair in keys_of(child)]


def spoil(tree: Any, data: st.DataObject) -> None:
    """Change, remove or rename one to three things."""
    for _ in range(data.draw(st.integers(1, 3))):
        keys = keys_of(tree)
        container, key = keys[data.draw(st.integers(0, len(keys) - 1))]
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if kind == "replace" or isinstance(container, list):
            container[key] = data.draw(ODD)
        elif kind == "remove":
            del container[key]
        else:
            container[str(key) + data.draw(st.sampled_from(["s", "_", "é"]))] = container.pop(key)
        if not tree:
            return


FILES = [(RunConfig, path) for path in sorted((ROOT / "launch" / "configs").glob("*.yaml"))]
FILES += [(PrepareConfig, path) for path in sorted((ROOT / "shards").glob("*.yaml"))]


@pytest.mark.slow
@patient
@given(which=st.sampled_from(FILES), data=st.data())
def test_spoilt_configurations(which: tuple[Any, Path], data: st.DataObject, tmp_path: Path) -> None:
    model, path = which
    tree = yaml.safe_load(path.read_text())
    spoil(tree, data)
    spoilt = tmp_path / "spoilt.yaml"
    spoilt.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(model, spoilt), model)


@patient
@given(which=st.sampled_from(FILES), seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(DAMAGE)))
def test_damaged_configuration_files(which: tuple[Any, Path], seed: int, kind: str, tmp_path: Path) -> None:
    model, path = which
    spoilt = tmp_path / f"{kind}.yaml"
    if spoilt.is_dir():
        spoilt.rmdir()
    shutil.copy(path, spoilt)
    DAMAGE[kind][0](spoilt, random.Random(seed))
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(model, spoilt), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("optimizer: {lr: 1.0, warmup_steps: 2, lr: 2.0}\n", "'lr' is given twice"),
        ("output: 2024-13-45\n", "month"),
        ("a: " + 5000 * "[", "recursion"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: *nobody\n", "undefined alias"),
        ("[1, 2]\n", "must consist of key: value pairs"),
    ],
)
def test_files_that_yaml_would_misread(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    catalog = make_catalog()
    return Path(make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog)))


@patient
@given(data=st.data())
def test_spoilt_manifests(corpus: Path, data: st.DataObject) -> None:
    tree = json.loads((corpus / "manifest.json").read_text())
    spoil(tree, data)
    with contextlib.suppress(CorpusError):
        manifest = Manifest.from_bytes(json.dumps(tree).encode(), "manifest.json")
        assert not any(Path(entry.path).is_absolute() or ".." in Path(entry.path).parts for entry in manifest.files)


def read_all(folder: Path) -> None:
    opened = Corpus.open(str(folder))
    opened.users(), opened.items()
    for name in ("train", "valid", "test"):
        opened.split(name)
    for shards in (opened.interactions, opened.content):
        for record in range(len(shards)):
            shards.read_record(record)


def forge(folder: Path, name: str) -> None:
    """Update the manifest after a change, as an attacker would."""
    tree = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    for entry in tree["files"]:
        if entry["path"] == name:
            entry |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.slow
def test_damaged_corpora(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: Counter[str] = Counter()
    names = [path.relative_to(corpus).as_posix() for path in sorted(corpus.rglob("*")) if path.is_file()]
    monkeypatch.chdir(tmp_path)
    for name in names:
        for kind, (damage, times) in DAMAGE.items():
            for index in range(times):
                for forged in (False, True):
                    if forged and (kind in ("folder", "missing") or name == "manifest.json"):
                        continue
                    copy = tmp_path / "copy"
                    shutil.copytree(corpus, copy)
                    damage(copy / name, random.Random(f"{name}{kind}{index}"))
                    if forged:
                        forge(copy, name)
                    try:
                        read_all(copy)
                        # A change inside of a value is another corpus, which its fingerprint tells.
                        assert forged or name == "manifest.json", (name, kind)
                        assert Corpus.open(str(copy)).fingerprint != Corpus.open(str(corpus)).fingerprint
                        outcomes["another corpus"] += 1
                    except CLLM4RecError:
                        outcomes["refused with a clear error"] += 1
                    shutil.rmtree(copy)
    assert not (tmp_path / "exploded").exists()
    print_outcomes("damaged corpora", outcomes, capsys)
    assert sum(outcomes.values()) >= 200


def print_outcomes(what: str, outcomes: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Print the counts, past pytest."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    with capsys.disabled():
        os.write(1, f"\n{what}: {sum(outcomes.values())} tried: {counts}\n".encode())


Facts = tuple[str, str, list[Tensor]]


def facts_of(folder: Path) -> Facts:
    """Fingerprints of a backbone and its tokenizer, and all weights as they are loaded."""
    decoder = backbone.load_config(folder)
    tokenizer = WordTokenizer.load(folder)
    fingerprint = backbone.fingerprint(folder)
    backbone.max_positions(decoder)
    backbone.require_weights(folder, decoder)
    words = backbone.load_frozen_embeddings(folder, torch.float32, torch.device("cpu"))
    dual = backbone.load_backbone(folder, AdapterConfig(rank=2), torch.float32, 0)
    return fingerprint, tokenizer.fingerprint, [words.embedding, words.head, *dual.state_dict().values()]


def same_or_another(loaded: Facts, expected: Facts) -> str:
    """Describe a loaded backbone: equal weights, or another fingerprint."""
    if loaded[:2] != expected[:2]:
        return "another backbone"
    assert all(torch.equal(one, other) for one, other in zip(loaded[2], expected[2], strict=True))
    return "harmless"


@pytest.fixture(scope="module")
def decoder(corpus: Path) -> Path:
    return corpus.parent / "backbone"


@pytest.mark.slow
def test_damaged_backbones(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes: Counter[str] = Counter()
    expected = facts_of(decoder)
    for path in sorted(decoder.iterdir()):
        for kind, (damage, times) in DAMAGE.items():
            for index in range(times):
                copy = tmp_path / "copy"
                shutil.copytree(decoder, copy)
                damage(copy / path.name, random.Random(f"{path.name}{kind}{index}"))
                try:
                    outcomes[same_or_another(facts_of(copy), expected)] += 1
                except ConfigError:
                    outcomes["refused with a clear error"] += 1
                shutil.rmtree(copy)
    assert not (tmp_path / "exploded").exists()
    print_outcomes("damaged backbones", outcomes, capsys)


@pytest.mark.parametrize("change", ["gone", "renamed", "cut"])
def test_weights_that_do_not_fit_the_backbone_are_never_made_up(decoder: Path, tmp_path: Path, change: str) -> None:
    """Transformers starts weights that it does not find at random, and only warns."""
    copy = tmp_path / "copy"
    shutil.copytree(decoder, copy)
    (file,) = copy.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if "mlp" in name and name.endswith("weight"))
    weight = weights.pop(name)
    if change != "gone":
        weights |= {f"{name}s": weight} if change == "renamed" else {name: weight[1:].contiguous()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="mlp"):
        facts_of(copy)
    config = make_config((tmp_path, str(decoder.parent / "corpus"), str(copy)), tmp_path / "run")
    for message in run_ranks(2, refused, config):  # ZeRO-3 loads in another way
        assert "mlp" in message


@pytest.mark.slow
@settings(patient, derandomize=True)  # libraries read these files: damage the same ones in every run
@given(data=st.data())
def test_spoilt_backbone_configurations(decoder: Path, data: st.DataObject, tmp_path: Path) -> None:
    expected = facts_of(decoder)
    copy = tmp_path / "copy"
    shutil.copytree(decoder, copy, dirs_exist_ok=True)
    tree = json.loads((copy / "config.json").read_text())
    spoil(tree, data)
    (copy / "config.json").write_text(json.dumps(tree))
    with contextlib.suppress(ConfigError):
        assert same_or_another(facts_of(copy), expected)


@patient
@given(which=st.sampled_from(sorted((ROOT / "ds_configs").glob("*.json"))), data=st.data())
def test_spoilt_deepspeed_files(which: Path, data: st.DataObject, tmp_path: Path) -> None:
    tree = json.loads(which.read_text())
    spoil(tree, data)
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(tree))
    config = load_config(RunConfig, ROOT / "launch/configs/demo-pretrain.yaml", ["stage=pretrain", f"deepspeed={path}"])
    with contextlib.suppress(ConfigError):
        DeepSpeedConfig(resolve_settings(config))


@pytest.mark.parametrize(("key", "value"), [("optimizer", {"type": "Adam"}), ("zero_optimisation", {}), ("fp16", {})])
def test_deepspeed_settings_that_would_do_nothing_are_refused(tmp_path: Path, key: str, value: object) -> None:
    tree = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    path = tmp_path / "more.json"
    path.write_text(json.dumps(tree | {key: value}))
    config = load_config(RunConfig, ROOT / "launch/configs/demo-pretrain.yaml", ["stage=pretrain", f"deepspeed={path}"])
    with pytest.raises(ConfigError, match=key):
        resolve_settings(config)


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_run_that_is_not_there_is_refused_before_ranks_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        f"cllm4rec_dist.cli.{command}.launch_short", lambda *args, **kwargs: pytest.fail("started ranks")
    )
    arguments = [command, str(tmp_path / "nothing"), *([str(tmp_path / "out")] if command == "recommend" else [])]
    with pytest.raises(CheckpointError, match="nothing' is neither a checkpoint nor a run"):
        cli.app(arguments, standalone_mode=False)


def test_users_and_paths_reach_the_ranks_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("cllm4rec_dist.cli.recommend.launch_short", lambda *args, **kwargs: calls.append(kwargs))
    monkeypatch.setattr("cllm4rec_dist.cli.recommend.find_trained", lambda run: run)
    known = KnownIds(["a", "b", "c"], ItemCatalog(["i"], [""], None, np.zeros(1, np.int64)))
    monkeypatch.setattr("cllm4rec_dist.cli.recommend.read_known_ids", lambda run, corpus: known)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cllm4rec_dist.cli.options.load_manifest", lambda corpus: None)
    Path("backbone").mkdir()
    Path("backbone/config.json").write_text("{}")
    Path("empty.txt").write_text(" \n\n")
    Path("some.txt").write_text("a \r\nb\r\n")
    for options, users in (
        ([], None),
        (["--users-file", "empty.txt"], []),
        (["--users-file", "empty.txt", "--user", "c"], ["c"]),
        (["--users-file", "some.txt", "--user", "c"], ["c", "a", "b"]),
    ):
        cli.app(["recommend", "run", "out", *options], standalone_mode=False)
        request = calls[-1]["request"]
        assert request == BulkRequest(top=20, users=users)
        assert (calls[-1]["backbone"], calls[-1]["corpus"]) == (None, None)
    moved = ["--backbone", "backbone", "--corpus", "corpus"]
    cli.app(["recommend", "run", "out", *moved, "--known-items", "train", "--include-seen"], standalone_mode=False)
    assert calls[-1]["request"] == BulkRequest(top=20, known_items="train", include_seen=True)
    assert (calls[-1]["backbone"], calls[-1]["corpus"]) == (str(tmp_path / "backbone"), str(tmp_path / "corpus"))
    with pytest.raises(DataError, match="cannot be read"):
        cli.app(["recommend", "run", "out", "--users-file", "nothing.txt"], standalone_mode=False)


def test_every_local_path_of_a_run_is_made_absolute_and_urls_stay(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers run in another folder."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("cllm4rec_dist.cli.train.launch", lambda *args, config, **kwargs: configs.append(config))
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "before").mkdir()
    (corpus.parent / "ds.json").write_text("{}")
    text = "{corpus: corpus, backbone: backbone, output: run, init_from: before, deepspeed: ds.json}"
    (tmp_path / "run.yaml").write_text(text)
    for folder in ("saves", "memory://saves"):
        arguments = ["pretrain", "--config", str(tmp_path / "run.yaml"), f"checkpoint.dir={folder}"]
        cli.app(arguments, standalone_mode=False)
    for name in ("corpus", "backbone", "output", "init_from", "deepspeed"):
        assert Path(getattr(configs[0], name)).is_absolute(), name
    assert configs[0].checkpoint.dir == str(corpus.parent / "saves")
    for flags, allowed in (([], False), (["--allow-leak"], True)):
        cli.app(["finetune", "--config", str(tmp_path / "run.yaml"), *flags], standalone_mode=False)
        assert configs[-1].allow_leak is allowed
    assert configs[1].checkpoint.dir == "memory://saves"


def test_adapters_on_layers_that_the_backbone_has_not_are_refused(decoder: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets.*do not fit the backbone"):
        backbone.load_backbone(decoder, AdapterConfig(rank=2, targets=("nosuch",)), torch.float32, 0)
