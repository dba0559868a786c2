"""Whole runs: equal at any world size, resumed as if never stopped, refused in outputs of other runs."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import cllm4rec_dist.train as train_module
from cllm4rec_dist import preflight
from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import ADAPTER, Checkpoint, CheckpointMetadata, RunState
from cllm4rec_dist.checkpointing.run_folder import BEST
from cllm4rec_dist.checkpointing.store import FileEntry, Store
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import Preparation
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, DataError
from cllm4rec_dist.evaluation import inference
from cllm4rec_dist.evaluation.inference import evaluate_run
from cllm4rec_dist.model import recommender as recommender_module
from cllm4rec_dist.step import StepResult
from cllm4rec_dist.system import System
from cllm4rec_dist.train import train
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks, with_messages
from tests.training import Made, make_config, metrics, refused, run


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_worlds_1_to_4_give_the_same_run(made: Made, tmp_path: Path, stage: str) -> None:
    # With seed 0 the items of a prompt nearly cancel at one step, where the direction of their sum multiplies rounding.
    for size in (1, 2, 3, 4):
        run_ranks(size, run, make_config(made, tmp_path / str(size), stage, seed=1))
    alone = metrics(tmp_path / "1")
    assert len(alone) >= 9
    assert alone[0]["loss"] > alone[8]["loss"]
    for size in (2, 3, 4):
        for got, expected in zip(metrics(tmp_path / str(size)), alone, strict=True):
            assert got.keys() == expected.keys()
            for key in expected:
                assert got[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), (size, expected["step"], key)


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(made: Made, tmp_path: Path) -> None:
    # Adapter dropout draws from torch's random state, which must be equal after a resume.
    changes: dict[str, Any] = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "optimizer": {"warmup_steps": 2}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, run, make_config(made, whole, "finetune", **changes))
    run_ranks(2, run, make_config(made, parts, "finetune", **changes, max_steps=5))
    assert names(parts) == ["step-00000003", "step-00000005"]
    run_ranks(2, run, make_config(made, parts, "finetune", **changes))
    # The interrupted run validated once more, at the last step of its `max_steps`.
    assert [line for line in metrics(parts) if line["step"] != 5 or "loss" in line] == metrics(whole)
    assert_equal_checkpoints(whole, parts)


@pytest.mark.slow
def test_the_learning_rates_of_every_step_are_recorded(made: Made, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-2, "embeddings_lr": 4e-3, "warmup_steps": 2, "schedule": "linear", "min_lr_ratio": 0.5}
    run_ranks(2, run, make_config(made, tmp_path, optimizer=optimizer, epochs=2))
    lines = metrics(tmp_path)
    expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625]  # two steps of warm-up, then from 1 towards 1/2 in four
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * factor for factor in expected])
    assert [line["embeddings_lr"] for line in lines] == pytest.approx([4e-3 * factor for factor in expected])


def test_a_checkpoint_is_due_after_so_many_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: now))
    clock, never = train_module._SaveTimer(2.5), train_module._SaveTimer(None)

    def is_due_at(seconds: float) -> bool:
        nonlocal now
        now = seconds
        return clock.is_due()

    due = [is_due_at(seconds) for seconds in (1149.9, 1150.0, 1200.0)]
    clock.restart()
    due += [is_due_at(seconds) for seconds in (1349.9, 1350.0, 1e9)]
    assert due == [False, True, True, False, True, True]
    assert not never.is_due()


def with_slow_steps(world: World, config: RunConfig) -> None:
    """Train with a clock that advances 25 seconds in each step on rank 0, and ten times as fast on other ranks."""
    genuine, now = train_module.train_step, 0.0

    def slow_step(*arguments: Any) -> StepResult:
        nonlocal now
        now += 25.0 if world.is_main else 250.0
        return genuine(*arguments)

    train_module.train_step = slow_step
    train_module.time = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)  # type: ignore[assignment]
    run(world, config)


def test_all_ranks_save_when_the_clock_of_rank_0_says_so(made: Made, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_minutes": 1, "every_steps": 4, "keep": 10}, "max_steps": 8}
    run_ranks(2, with_slow_steps, make_config(made, tmp_path / "run", **changes))
    # Due after 75 seconds (3); step 4 saves by number and starts the minute anew (7); the last step always saves (8).
    assert names(tmp_path / "run") == [f"step-0000000{step}" for step in (3, 4, 7, 8)]
    store = Store(f"{tmp_path}/run/checkpoints")
    for name in names(tmp_path / "run"):
        saved = Checkpoint.open(store, name)
        assert saved.metadata.run.step == int(name[-1])
        assert saved.rows("collaborative.users", 23, 0, 23) is not None  # parts of both ranks


def test_an_evaluation_that_cannot_be_done_ranks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.model_construct(num_interactions={"train": 9, "valid": 0, "test": 1}, preparation=Preparation())
    system = SimpleNamespace(corpus=SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(inference, "load", lambda *arguments: (system, None))
    with pytest.raises(DataError, match="--no-baselines"):
        evaluate_run(alone(), lambda metrics: None, "run", "test", ["recall@5"], 4, "out", baselines=True)


def names(run: Path) -> list[str]:
    return Store(f"{run}/checkpoints").names("step-")


def newest(run: Path) -> Path:
    return run / "checkpoints" / names(run)[-1]


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Check that the newest checkpoints of two runs are equal bit for bit, with moments and step counts."""
    files = sorted(path.name for path in newest(one).glob("*.safetensors"))
    assert files == sorted(path.name for path in newest(other).glob("*.safetensors"))
    for file in files:
        first, second = load_file(newest(one) / file), load_file(newest(other) / file)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key


@pytest.mark.slow
def test_a_run_resumes_on_any_number_of_ranks(made: Made, tmp_path: Path) -> None:
    # 2 -> 3 -> 1 -> 4 in one run, each leg inside of an epoch, with moments in every optimizer.
    for stage in ("pretrain", "finetune"):
        whole, parts = tmp_path / f"whole-{stage}", tmp_path / f"parts-{stage}"
        changes = {
            "method": {"max_history": 100, "shared_user_ratio": 0.3 if stage == "finetune" else 0.0},
            "head": {"projection": stage == "finetune"},
        }
        run_ranks(2, run, make_config(made, whole, stage, **changes))
        for size, until in ((2, 2), (3, 4), (1, 7), (4, None)):
            run_ranks(size, run, make_config(made, parts, stage, **changes, max_steps=until))
        got, expected = ([line for line in metrics(folder) if "loss" in line] for folder in (parts, whole))
        for one, other in zip(got, expected, strict=True):
            for key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), (other["step"], key)


@pytest.mark.slow
def test_another_backbone_corpus_or_tokenizer_is_refused_with_both_fingerprints(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    run_ranks(1, run, config)
    saved = about(tmp_path / "run").fingerprints

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

    backbone = make_backbone(tmp_path / "words", catalog, vocab_size=320)
    message = run_ranks(1, refused, config.model_copy(update={"backbone": str(backbone)}))[0]
    assert "tokenizer" in message
    assert saved["tokenizer"] in message


def about(run: Path, name: str | None = None) -> CheckpointMetadata:
    return Checkpoint.open(Store(f"{run}/checkpoints"), name or names(run)[-1]).metadata


def checkpoint_fingerprint(folder: Path) -> str:
    from cllm4rec_dist.model.backbone import fingerprint

    return fingerprint(folder)


def test_settings_that_came_later_have_their_defaults_in_an_older_checkpoint(tmp_path: Path) -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-"}
    old = validate(RunConfig, tree, "test").model_dump(mode="json")
    del old["quantization"], old["embeddings"]["comm_dtype"], old["optimizer"]["embeddings_state"]
    del old["head"]["projection"]
    candidate = SimpleNamespace(path="old", metadata=SimpleNamespace(config=old))
    train_module._require_same_trajectory(cast(Checkpoint, candidate), validate(RunConfig, tree, "test"))
    changed = validate(RunConfig, tree | {"embeddings": {"comm_dtype": "bf16"}}, "test")
    with pytest.raises(CheckpointError, match="comm_dtype"):
        train_module._require_same_trajectory(cast(Checkpoint, candidate), changed)
    assert not validate(RunConfig, old, "test").head.projection, "older checkpoints have the plain form"
    changed = validate(RunConfig, tree | {"head": {"projection": True}}, "test")
    with pytest.raises(CheckpointError, match=r"head\.projection"):
        train_module._require_same_trajectory(cast(Checkpoint, candidate), changed)


@pytest.mark.slow
def test_a_changed_setting_is_refused_and_named(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    run_ranks(2, run, config)
    changed = config.model_copy(update={"seed": 5, "max_steps": 2})
    assert "'seed': (0, 5)" in run_ranks(2, refused, changed)[0]


def test_a_refusal_names_only_the_settings_that_differ() -> None:
    tree: dict[str, Any] = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-"}
    saved = validate(RunConfig, tree, "test").model_dump(mode="json")
    candidate = cast(Checkpoint, SimpleNamespace(path="saved", metadata=SimpleNamespace(config=saved)))
    free: dict[str, Any] = {
        "batch": {"gradient_accumulation_steps": 3},
        "optimizer": {"embeddings_state": "cpu"},
        "validation": {"early_stopping_patience": 3},
        "allow_leak": True,
        "corpus": "moved",
        "init_from": "another",
    }
    train_module._require_same_trajectory(candidate, validate(RunConfig, tree | free, "test"))
    changed = free | {
        "batch": {"gradient_accumulation_steps": 3, "users": 7},
        "optimizer": {"lr": 0.5, "embeddings_state": "cpu"},
    }
    with pytest.raises(CheckpointError) as refusal:
        train_module._require_same_trajectory(candidate, validate(RunConfig, tree | changed, "test"))
    assert refusal.value.value == {"batch.users": (256, 7), "optimizer.lr": (0.001, 0.5)}


@pytest.mark.slow
def test_accumulation_and_the_storage_of_moments_may_change_on_resume(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    backbone = make_backbone(folder / "backbone", make_catalog(), hidden_size=64)
    wide = folder, make_corpus(folder / "corpus", make_catalog(), backbone), str(backbone)
    optimizer = {"lr": 1e-2, "embeddings_lr": 5e-3, "warmup_steps": 2}
    run_ranks(2, run, make_config(wide, tmp_path / "whole"))
    legs = [(3, 1, "fp32"), (5, 3, "cpu"), (7, 2, "int8"), (9, 4, "fp32")]
    for until, accumulation, storage in legs:
        batch = {"users": 9, "texts": 7, "gradient_accumulation_steps": accumulation}
        changes: dict[str, Any] = {"batch": batch, "optimizer": optimizer | {"embeddings_state": storage}}
        run_ranks(2, run, make_config(wide, tmp_path / "parts", max_steps=until, **changes))
    got, expected = ([x["loss"] for x in metrics(tmp_path / name) if "loss" in x] for name in ("parts", "whole"))
    assert got[:5] == pytest.approx(expected[:5], rel=2e-4)
    assert got == pytest.approx(expected, rel=2e-3)  # two steps of the nine packed their moments into 8 bits


@pytest.mark.slow
def test_an_ignored_init_from_is_logged(made: Made, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run_ranks(1, run, make_config(made, tmp_path / name, max_steps=1))
    config = make_config(made, tmp_path / "run", init_from=str(tmp_path / "one"), max_steps=1)
    ((_, messages),) = run_ranks(1, with_messages, run, config)
    again = config.model_copy(update={"max_steps": 2})
    ((_, more),) = run_ranks(1, with_messages, run, again)
    assert not any("is ignored" in message for message in (*messages, *more))
    changed = again.model_copy(update={"max_steps": 3, "init_from": str(tmp_path / "other")})
    ((_, messages),) = run_ranks(1, with_messages, run, changed)
    (message,) = [message for message in messages if "is ignored" in message]
    assert str(tmp_path / "other") in message
    assert str(tmp_path / "one") in message


@pytest.mark.slow
def test_a_best_value_is_compared_with_values_of_its_metric_only(made: Made, tmp_path: Path) -> None:
    # Recall@17 of 17 items is 1: nothing of another metric would ever be better.
    first = {"metrics": ["recall@17"], "batch_users": 5, "early_stopping_patience": 1}
    second = {"metrics": ["ndcg@3", "recall@17"], "batch_users": 5, "early_stopping_patience": 2}
    output = tmp_path / "run"
    ((_, messages),) = run_ranks(1, with_messages, run, make_config(made, output, "finetune", validation=first))
    assert not any("starts a new comparison" in message for message in messages)
    state = about(output).run
    assert (state.best, state.best_metric, state.best_step, state.validated_step) == (1.0, "recall@17", 3, 6)
    config = make_config(made, output, "finetune", validation=second, epochs=3)
    ((_, messages),) = run_ranks(1, with_messages, run, config)
    (message,) = [message for message in messages if "starts a new comparison" in message]
    assert "recall@17" in message
    assert "ndcg@3" in message
    state = about(output).run
    assert (state.best_metric, state.best_step) == ("ndcg@3", 9)
    _, (best, *_) = find(str(output))
    assert best == "best-00000009"
    assert state.best == metrics(output)[-1]["valid/ndcg@3"] < 1


def test_a_best_value_without_a_name_is_compared_with_nothing(made: Made, tmp_path: Path) -> None:
    state = RunState(step=4, best=0.9, best_step=2, validations_since_best=2, validated_step=4)
    config = make_config(made, tmp_path, "finetune", validation={"metrics": ["ndcg@3"]})
    anew = RunState(step=4, validated_step=4)
    assert train_module._reset_best_of_other_metric(state, config, alone()) == anew
    assert train_module._reset_best_of_other_metric(replace(state, best_metric="recall@3"), config, alone()) == anew
    same = replace(state, best_metric="ndcg@3")
    assert train_module._reset_best_of_other_metric(same, config, alone()) == same
    silent = make_config(made, tmp_path, "finetune", validation={"every_epochs": 0})
    assert train_module._reset_best_of_other_metric(same, silent, alone()) == same


@pytest.mark.slow
def test_the_best_checkpoint_that_is_kept_is_the_one_that_the_state_names(made: Made, tmp_path: Path) -> None:
    # A run that died after its best step, and resumes from an earlier one with another metric.
    validation = {"metrics": ["recall@5"], "batch_users": 5}
    config = make_config(made, tmp_path / "run", "finetune", validation=validation, max_steps=3)
    run_ranks(1, run, config)
    store = Store(f"{tmp_path}/run/checkpoints")
    (tmp_path / "run/checkpoints/best-00000003").rename(tmp_path / "run/checkpoints/best-00000099")
    run_ranks(
        1,
        run,
        config.model_copy(
            update={"max_steps": 4, "validation": config.validation.model_copy(update={"metrics": ("ndcg@10",)})}
        ),
    )
    assert store.names("best-") == ["best-00000004"]


@pytest.mark.slow
def test_finetuning_starts_from_pretraining_and_its_best_checkpoint_is_evaluated(made: Made, tmp_path: Path) -> None:
    pretrained, tuned = tmp_path / "pretrain", tmp_path / "finetune"
    run_ranks(2, run, make_config(made, pretrained))
    run_ranks(3, run, make_config(made, tuned, "finetune", init_from=str(pretrained)))
    _, (best, *_) = find(str(tuned))
    assert best.startswith(BEST)
    recorded = about(tuned, best).run

    for size in (1, 2):
        run_ranks(size, _evaluate, str(tuned), str(tmp_path / f"valid-{size}"))
        evaluation = json.loads((tmp_path / f"valid-{size}" / "evaluation.json").read_text())
        assert evaluation["mean"]["recall@5"] == pytest.approx(recorded.best, rel=1e-6)
        assert evaluation["num_users"] == 23


def _evaluate(world: World, folder: str, output: str) -> None:
    evaluate_run(world, lambda metrics: None, folder, "valid", ["recall@5", "ndcg@10"], 4, output)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_is_used(made: Made, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for output in (whole, broken):
        run_ranks(2, run, make_config(made, output, max_steps=8))
    flip_last_bit(newest(broken) / "shard-00001-of-00002.safetensors")  # step 8; rank 0 alone would not see it
    (broken / "checkpoints" / "step-00000006" / "replicated.safetensors").unlink()
    unfinished = broken / "checkpoints" / "step-00000007"
    unfinished.mkdir()
    for output in (whole, broken):
        run_ranks(2, run, make_config(made, output))
    assert metrics(broken) == metrics(whole)
    assert_equal_checkpoints(broken, whole)
    assert not unfinished.exists()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        find(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=2)
    run_ranks(1, run, config)
    flip_last_bit(newest(tmp_path / "run") / "replicated.safetensors")
    for _ in range(2):
        assert "holds no whole checkpoint, but damaged ones" in run_ranks(1, refused, config)[0]


@pytest.mark.slow
def test_resume_names_another_run_and_refuses_an_older_checkpoint_of_the_same(made: Made, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    run_ranks(1, run, make_config(made, whole))
    older = str(whole / "checkpoints" / "step-00000006")
    run_ranks(2, run, make_config(made, branch, resume=older, max_steps=7))
    run_ranks(1, run, make_config(made, branch, resume=older))  # resumes from its checkpoint, as after a crash
    assert [line["step"] for line in metrics(branch) if "loss" in line] == [7, 8, 9]
    assert metrics(branch)[-1]["loss"] == pytest.approx(metrics(whole)[-1]["loss"], rel=2e-4)
    assert "is not this run's newest" in run_ranks(1, refused, make_config(made, whole, resume=older))[0]


@pytest.mark.slow
def test_resume_none_starts_a_run_once_and_loses_none(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", resume="none", max_steps=1)
    assert preflight.resolve_resume(config, {}).resume == "auto"
    run_ranks(1, run, preflight.resolve_resume(config, {}))
    with pytest.raises(CheckpointError, match="would start from scratch, but the run has step-00000001"):
        preflight.resolve_resume(config, {})
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        assert preflight.resolve_resume(config, {name: "1"}).resume == "auto"


@pytest.mark.slow
def test_adapters_of_pretraining_survive_the_first_steps_of_finetuning(made: Made, tmp_path: Path) -> None:
    pretrained, tuned = tmp_path / "pretrain", tmp_path / "finetune"
    run_ranks(2, run, make_config(made, pretrained, max_steps=6))
    optimizer = {"lr": 1e-12, "embeddings_lr": 1e-12, "warmup_steps": 0}
    run_ranks(1, run, make_config(made, tuned, "finetune", init_from=str(pretrained), optimizer=optimizer, max_steps=2))
    start, end = newest(pretrained), newest(tuned)
    for name, shape in about(tuned).shapes.items():
        spans = (f"{ADAPTER}{name}", math.prod(shape), 0, math.prod(shape))
        before, after = (Checkpoint.open(Store(str(f.parent)), f.name).rows(*spans) for f in (start, end))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
        assert "lora_B" not in name or before.abs().max() > 1e-4  # it had moved from its start, zero


def bad_batch(world: World, config: RunConfig, bad: int, value: float) -> str:
    """Train with the item loss of one step multiplied by `value`."""
    genuine, steps = train_module.train_step, iter(range(100))

    def spoiled(system: System, batches: list[MicroBatch], factor: float, largest: float) -> StepResult:
        if next(steps) == bad and world.rank == 0:
            item_loss = recommender_module.item_loss
            recommender_module.item_loss = lambda *a: item_loss(*a) * value
            try:
                return genuine(system, batches, factor, largest)
            finally:
                recommender_module.item_loss = item_loss
        return genuine(system, batches, factor, largest)

    train_module.train_step = spoiled
    return refused(world, config)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_loss_stops_the_run_and_names_the_batch(made: Made, tmp_path: Path, value: float, precision: str) -> None:
    changes: dict[str, Any] = {"precision": precision, "max_steps": 6, "checkpoint": {"every_steps": 1, "keep": 10}}
    messages = run_ranks(2, bad_batch, make_config(made, tmp_path / "run", **changes), 4, value)
    for message in messages:
        assert "step 4 (epoch 1, users" in message
        assert "faults.on_bad_step=skip" in message
    assert names(tmp_path / "run")[-1] == "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing_but_the_position(made: Made, tmp_path: Path, precision: str) -> None:
    changes: dict[str, Any] = {
        "precision": precision,
        "faults": {"on_bad_step": "skip"},
        "checkpoint": {"every_steps": 1, "keep": 10},
    }
    assert run_ranks(2, bad_batch, make_config(made, tmp_path / "run", **changes, max_steps=6), 4, math.nan) == ["", ""]
    store = Store(str(tmp_path / "run" / "checkpoints"))
    before, after, later = (Checkpoint.open(store, f"step-0000000{step}") for step in (4, 5, 6))
    assert (after.metadata.run.step, after.metadata.run.skipped_in_a_row) == (5, 1)
    assert later.metadata.run.skipped_in_a_row == 0
    for file in ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "replicated.safetensors"):
        one, other, third = (load_file(c.file(file)) for c in (before, after, later))
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not all(torch.equal(one[key], third[key]) for key in one)
    assert [line["step"] for line in metrics(tmp_path / "run") if not line.get("accepted", True)] == [5]


def interrupted(world: World, config: RunConfig) -> tuple[int, bool]:
    """Send a signal to one rank at its fourth batch."""
    genuine, steps = train_module.train_step, iter(range(100))

    def signalled(*arguments: Any) -> StepResult:
        if next(steps) == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return genuine(*arguments)

    train_module.train_step = signalled
    result = train(world, lambda metrics: None, config)
    return result.state.step, result.interrupted


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_stops_all_at_the_same_step(made: Made, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, run, make_config(made, whole))
    assert run_ranks(2, interrupted, make_config(made, parts)) == [(5, True), (5, True)]
    assert names(parts)[-1] == "step-00000005"
    run_ranks(2, run, make_config(made, parts))
    assert metrics(parts) == metrics(whole)
    assert_equal_checkpoints(parts, whole)


def on_a_failing_store(world: World, config: RunConfig, failing: list[str]) -> str:
    """Train with a full disk under the named checkpoints, on rank 1."""
    genuine = Store.write

    def write(store: Store, name: str, file: str, make: Any) -> FileEntry:
        if world.rank == 1 and name in failing:
            (Path(store.url) / name).mkdir(exist_ok=True)
            (Path(store.url) / name / file).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(store, name, file, make)

    Store.write = write  # type: ignore[method-assign]
    return refused(world, config)


@pytest.mark.slow
def test_a_full_disk_harms_no_earlier_checkpoint_and_stops_no_step(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "run"
    messages = run_ranks(2, on_a_failing_store, make_config(made, output), ["step-00000006"])
    assert messages == ["", ""]
    assert names(output) == ["step-00000003", "step-00000009"]
    assert metrics(output)[-1]["step"] == 9
    # The last checkpoint of a run is not optional.
    messages = run_ranks(2, on_a_failing_store, make_config(made, output, epochs=4), ["step-00000012"])
    assert all("could not store the last checkpoint" in message for message in messages)
    assert names(output) == ["step-00000003", "step-00000009"]
    assert not (output / "checkpoints" / "step-00000012").exists()
    run_ranks(2, run, make_config(made, output, epochs=4))
    assert names(output)[-1] == "step-00000012"


def on_a_store_that_cannot_tidy_up(world: World, config: RunConfig) -> str:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    genuine = Store.names
    Store.remove = fails  # type: ignore[method-assign]
    Store.names = lambda store, prefix: (  # type: ignore[method-assign]
        fails() if threading.current_thread().name == "checkpoint" and prefix == "best-" else genuine(store, prefix)
    )
    return refused(world, config)


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_removed_stop_nothing(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", checkpoint={"every_steps": 3, "keep": 1})
    assert run_ranks(2, on_a_store_that_cannot_tidy_up, config) == ["", ""]
    assert names(tmp_path / "run") == ["step-00000003", "step-00000006", "step-00000009"]


@pytest.mark.slow
def test_checkpoints_live_on_any_file_system(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", checkpoint={"dir": "memory://run", "every_steps": 3, "keep": 5})
    assert run_ranks(1, _in_memory, config) == [["step-00000003", "step-00000006", "step-00000008"]]
    assert not (tmp_path / "run" / "checkpoints").exists()


def _in_memory(world: World, config: RunConfig) -> list[str]:
    run(world, config.model_copy(update={"max_steps": 3}))
    memory = Store("memory://run")
    run(world, config.model_copy(update={"max_steps": 8}))
    assert find(config.output)[1][0] == "step-00000008"
    marker = memory.marker("step-00000008")
    memory._fs.pipe_file("/run/step-00000008/state.json", b"{}")
    loaded = checkpoint.load_first_valid(
        memory, ["step-00000008", "step-00000006"], world, lambda c: c.metadata.run.step
    )
    assert marker.files
    assert loaded is None or loaded[1] == 6
    return memory.names("step-")


@pytest.mark.slow
def test_old_checkpoints_go_and_the_best_stays(made: Made, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1, "keep": 2}}
    run_ranks(2, run, make_config(made, tmp_path / "run", "finetune", **changes))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    state = about(tmp_path / "run").run
    assert kept == [f"best-{state.best_step:08d}", "step-00000008", "step-00000009"]


@pytest.mark.slow
def test_two_runs_do_not_share_an_output(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_LOCK_TIMEOUT_SECONDS", 0.2)
    with FileLock(tmp_path / ".lock"):
        assert "is being written by another run" in run_ranks(1, refused, make_config(made, tmp_path))[0]


@pytest.mark.slow
def test_a_run_that_stopped_early_takes_no_further_step_and_keeps_one_whole_best(made: Made, tmp_path: Path) -> None:
    # With a learning rate of nothing the second validation cannot be better than the first.
    changes: dict[str, Any] = {
        "optimizer": {"lr": 1e-12, "embeddings_lr": 1e-12},
        "validation": {"metrics": ["recall@5"], "early_stopping_patience": 1},
    }
    config = make_config(made, tmp_path / "run", "finetune", **changes)
    run_ranks(1, run, config)
    written = metrics(tmp_path / "run")
    assert written[-1]["step"] == 6
    run_ranks(1, run, config)
    assert metrics(tmp_path / "run") == written
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best-00000003", "step-00000003", "step-00000006"]


@pytest.mark.slow
def test_texts_longer_than_the_backbone_are_refused(made: Made, tmp_path: Path) -> None:
    backbone = Path(made[2])
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), backbone, max_text_tokens=500)
    config = make_config(made, tmp_path / "run").model_copy(update={"corpus": corpus})
    message = run_ranks(1, refused, config)[0]
    assert "max_text_tokens: 500 with its prompt exceeds the backbone's 512 positions" in message
