"""Whole runs: the same at any world size, resumed as if never stopped, refused where they do not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cllm4rec_dist import checkpoint
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError
from cllm4rec_dist.inference import evaluate_run, recommend_users
from cllm4rec_dist.log import METRICS_FILE
from cllm4rec_dist.topology import World
from cllm4rec_dist.train import train
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks

Made = tuple[Path, str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("train")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    return folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)


def make_config(made: Made, output: Path, stage: str = "pretrain", **changes: Any) -> RunConfig:
    tree = {
        "stage": stage, "corpus": made[1], "backbone": made[2], "output": str(output), "epochs": 3,
        "batch": {"users": 9, "texts": 7, "accumulation": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "rows": {"start": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1},
        "method": {"max_history": 100},
        "optimizer": {"lr": 1e-2, "tables_lr": 5e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 10},
        "validation": {"metrics": ["recall@5", "ndcg@10"], "batch_users": 5},
    } | changes  # fmt: skip
    return validate(RunConfig, tree, "test")


def run(world: World, config: RunConfig) -> None:
    train(world, lambda metrics: None, config)


def refused(world: World, config: RunConfig) -> str:
    try:
        train(world, lambda metrics: None, config)
    except CLLM4RecError as error:
        return str(error)
    return ""


def metrics(folder: Path) -> list[dict[str, Any]]:
    volatile = {"time", "tokens_per_second", "stage"}
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in volatile} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_worlds_1_to_4_give_the_same_run(made: Made, tmp_path: Path, stage: str) -> None:
    for size in (1, 2, 3, 4):
        run_ranks(size, run, make_config(made, tmp_path / str(size), stage))
    alone = metrics(tmp_path / "1")
    assert len(alone) >= 9
    assert alone[0]["loss"] > alone[8]["loss"]
    for size in (2, 3, 4):
        for got, wanted in zip(metrics(tmp_path / str(size)), alone, strict=True):
            assert got.keys() == wanted.keys()
            for key in wanted:
                assert got[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-6), (size, wanted["step"], key)


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(made: Made, tmp_path: Path) -> None:
    # Adapter dropout draws from torch's random state, which the checkpoint must carry too.
    changes: dict[str, Any] = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "optimizer": {"warmup_steps": 2}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, run, make_config(made, whole, "finetune", **changes))
    run_ranks(2, run, make_config(made, parts, "finetune", **changes, max_steps=5))
    assert checkpoint.latest(parts).name == "step-00000005"  # type: ignore[union-attr]
    run_ranks(2, run, make_config(made, parts, "finetune", **changes))
    # The interrupted run validated once more, at the step that it was told to be its last.
    assert [line for line in metrics(parts) if line["step"] != 5 or "loss" in line] == metrics(whole)
    last = [checkpoint.latest(folder) for folder in (whole, parts)]
    for name in ("adapter", "head", "tables-00000-of-00002", "tables-00001-of-00002"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in last if folder is not None)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


@pytest.mark.slow
def test_another_backbone_corpus_or_tokenizer_is_refused_with_both_fingerprints(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    run_ranks(1, run, config)
    saved = checkpoint.read_state(checkpoint.latest(tmp_path / "run"))["fingerprints"]  # type: ignore[arg-type]

    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "other", catalog, seed=1)
    message = run_ranks(1, refused, config.model_copy(update={"backbone": str(backbone)}))[0]
    assert "backbone fingerprint" in message
    assert message.count(saved["backbone"]) == 1
    assert message.count(checkpoint_fingerprint(backbone)) == 1

    corpus = make_corpus(tmp_path / "corpus", make_catalog(seed=1), Path(made[2]))
    message = run_ranks(1, refused, config.model_copy(update={"corpus": corpus}))[0]
    assert "corpus fingerprint" in message
    assert saved["corpus"] in message

    backbone = make_backbone(tmp_path / "words", catalog, words=320)
    message = run_ranks(1, refused, config.model_copy(update={"backbone": str(backbone)}))[0]
    assert "tokenizer" in message
    assert saved["tokenizer"] in message


def checkpoint_fingerprint(folder: Path) -> str:
    from cllm4rec_dist.model.backbone import fingerprint

    return fingerprint(folder)


@pytest.mark.slow
def test_a_changed_setting_or_world_size_is_refused_and_named(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    run_ranks(2, run, config)
    changed = config.model_copy(update={"seed": 5, "max_steps": 2})
    assert "'seed': (0, 5)" in run_ranks(2, refused, changed)[0]
    assert (
        "2 ranks wrote it, but this run has 1" in run_ranks(1, refused, config.model_copy(update={"max_steps": 2}))[0]
    )


@pytest.mark.slow
def test_finetuning_goes_on_from_pretraining_and_its_best_checkpoint_is_evaluated(made: Made, tmp_path: Path) -> None:
    pretrained, tuned = tmp_path / "pretrain", tmp_path / "finetune"
    run_ranks(2, run, make_config(made, pretrained))
    run_ranks(3, run, make_config(made, tuned, "finetune", init_from=str(pretrained)))
    best = checkpoint.find(str(tuned))
    assert best.name == checkpoint.BEST
    recorded = checkpoint.read_state(best)

    for size in (1, 2):
        run_ranks(size, _evaluate, str(tuned), str(tmp_path / f"valid-{size}"))
        found = json.loads((tmp_path / f"valid-{size}" / "evaluation.json").read_text())
        assert found["mean"]["recall@5"] == pytest.approx(recorded["best"], rel=1e-6)
        assert found["num_users"] == 23


def _evaluate(world: World, folder: str, output: str) -> None:
    evaluate_run(world, lambda metrics: None, folder, "valid", ["recall@5", "ndcg@10"], 4, output)


@pytest.mark.slow
def test_recommendations_have_external_ids_and_no_seen_item(made: Made, tmp_path: Path) -> None:
    import pandas as pd

    run_ranks(2, run, make_config(made, tmp_path / "run", "finetune", max_steps=2))
    run_ranks(2, _recommend, str(tmp_path / "run"), None, str(tmp_path / "all"))
    everyone = pd.read_parquet(tmp_path / "all")
    catalog = make_catalog()
    assert set(everyone["user"]) == set(catalog.user_ids)
    seen = {(catalog.user_ids[u], catalog.item_ids[i]) for u, items in enumerate(catalog.train) for i in items}
    assert not seen & set(zip(everyone["user"], everyone["item"], strict=True))
    for _, rows in everyone.groupby("user"):
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
        assert rows["score"].is_monotonic_decreasing

    run_ranks(1, _recommend, str(tmp_path / "run"), ["user-003"], str(tmp_path / "one"))
    one = pd.read_parquet(tmp_path / "one")
    assert one["item"].tolist() == everyone[everyone["user"] == "user-003"]["item"].tolist()


def _recommend(world: World, folder: str, users: list[str] | None, output: str) -> None:
    recommend_users(world, lambda metrics: None, folder, users, 6, 4, output)


@pytest.mark.slow
def test_a_damaged_or_unfinished_checkpoint_is_not_used(made: Made, tmp_path: Path) -> None:
    run_ranks(1, run, make_config(made, tmp_path / "run", max_steps=6))
    older, newest = sorted(checkpoint.checkpoints_folder(tmp_path / "run").glob("step-*"))
    damaged = newest / "adapter.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="not what was committed"):
        checkpoint.read_state(newest)
    (newest / checkpoint.COMMIT).unlink()
    assert checkpoint.latest(tmp_path / "run") == older
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        checkpoint.find(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_run_that_stopped_early_takes_no_further_step_and_keeps_one_whole_best(made: Made, tmp_path: Path) -> None:
    # With a learning rate of nothing the second validation cannot be better than the first.
    changes: dict[str, Any] = {
        "optimizer": {"lr": 1e-12, "tables_lr": 1e-12},
        "validation": {"metrics": ["recall@5"], "patience": 1},
    }
    config = make_config(made, tmp_path / "run", "finetune", **changes)
    run_ranks(1, run, config)
    written = metrics(tmp_path / "run")
    assert written[-1]["step"] == 6
    run_ranks(1, run, config)
    assert metrics(tmp_path / "run") == written
    names = sorted(folder.name for folder in checkpoint.checkpoints_folder(tmp_path / "run").iterdir())
    assert names == ["best", "step-00000003", "step-00000006"]
    checkpoint.read_state(checkpoint.checkpoints_folder(tmp_path / "run") / "best")


@pytest.mark.slow
def test_texts_longer_than_the_backbone_are_refused(made: Made, tmp_path: Path) -> None:
    backbone = Path(made[2])
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), backbone, max_text_tokens=500)
    config = make_config(made, tmp_path / "run").model_copy(update={"corpus": corpus})
    message = run_ranks(1, refused, config)[0]
    assert "max_text_tokens: 500 with its prompt passes the backbone's 512 positions" in message
