"""Whole runs: equal at any world size, resumed as if never stopped, saved when they should be."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cllm4rec_dist.train as train_module
from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import ADAPTER, Checkpoint
from cllm4rec_dist.checkpointing.run_folder import BEST
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import Preparation
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation import inference
from cllm4rec_dist.evaluation.inference import evaluate_run
from cllm4rec_dist.step import StepResult
from tests.harness import alone, make_catalog, make_corpus, run_ranks
from tests.training import Made, about, assert_equal_checkpoints, make_config, metrics, names, newest, refused, run

NARROW = {"init": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1, "dim": 6}
"""Embeddings narrower than the backbone."""


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_resumes_on_any_number_of_ranks(made: Made, tmp_path: Path) -> None:
    # 2 -> 3 -> 1 -> 4 in one run, each leg inside of an epoch, with moments in every optimizer.
    for stage in ("pretrain", "finetune"):
        whole, parts = tmp_path / f"whole-{stage}", tmp_path / f"parts-{stage}"
        changes = {
            "method": {"max_history": 100, "shared_user_ratio": 0.3 if stage == "finetune" else 0.0},
            "head": {"projection": stage == "finetune"},
            "embeddings": NARROW if stage == "pretrain" else {"init": "spectral", "dropout": 0.3},
        }
        run_ranks(2, run, make_config(made, whole, stage, **changes))
        for size, until in ((2, 2), (3, 4), (1, 7), (4, None)):
            run_ranks(size, run, make_config(made, parts, stage, **changes, max_steps=until))
        got, expected = ([line for line in metrics(folder) if "loss" in line] for folder in (parts, whole))
        for one, other in zip(got, expected, strict=True):
            for key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), (other["step"], key)


@pytest.mark.slow
def test_finetuning_starts_from_pretraining_and_its_best_checkpoint_is_evaluated(made: Made, tmp_path: Path) -> None:
    pretrained, tuned = tmp_path / "pretrain", tmp_path / "finetune"
    run_ranks(2, run, make_config(made, pretrained, embeddings=NARROW))
    run_ranks(3, run, make_config(made, tuned, "finetune", init_from=str(pretrained), embeddings=NARROW))
    _, (best, *_) = find(str(tuned))
    assert best.startswith(BEST)
    recorded = about(tuned, best).run

    for size in (1, 2):
        run_ranks(size, evaluated, str(tuned), str(tmp_path / f"valid-{size}"))
        evaluation = json.loads((tmp_path / f"valid-{size}" / "evaluation.json").read_text())
        assert evaluation["mean"]["recall@5"] == pytest.approx(recorded.best, rel=1e-6)
        assert evaluation["num_users"] == 23


def evaluated(world: World, folder: str, output: str) -> None:
    evaluate_run(world, lambda metrics: None, folder, "valid", ["recall@5", "ndcg@10"], 4, output)


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
def test_a_run_that_stopped_early_takes_no_further_step_and_keeps_one_whole_best(made: Made, tmp_path: Path) -> None:
    # With a learning rate of nothing the second validation cannot be better than the first.
    changes: dict[str, Any] = {
        "optimizer": {"lr": 1e-12, "embeddings_lr": 1e-12, "warmup_steps": 3},
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
def test_no_run_stops_early_during_its_warm_up(made: Made, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"lr": 1e-12, "embeddings_lr": 1e-12, "warmup_steps": 6},
        "validation": {"metrics": ["recall@5"], "early_stopping_patience": 1},
    }
    run_ranks(1, run, make_config(made, tmp_path / "run", "finetune", **changes))
    assert metrics(tmp_path / "run")[-1]["step"] == 9, "the validation at step 9 is the first that counts"


@pytest.mark.slow
def test_texts_longer_than_the_backbone_are_refused(made: Made, tmp_path: Path) -> None:
    backbone = Path(made[2])
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), backbone, max_text_tokens=500)
    config = make_config(made, tmp_path / "run").model_copy(update={"corpus": corpus})
    message = run_ranks(1, refused, config)[0]
    assert "max_text_tokens: 500 with its prompt exceeds the backbone's 512 positions" in message
