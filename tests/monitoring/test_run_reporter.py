"""Reports that a run logs and writes while it trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.checkpointing.run_folder import STATUS_FILE, RunRecord
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.monitoring.run_reporter import RunReporter
from cllm4rec_dist.monitoring.status import read_statuses
from cllm4rec_dist.train import train
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks, with_messages


def make_config(folder: Path, output: Path, **changes: Any) -> RunConfig:
    tree = {
        "stage": "finetune",
        "corpus": str(folder / "corpus"),
        "backbone": str(folder / "backbone"),
        "output": str(output),
        "epochs": 3,
        "max_steps": 8,  # the last epoch is cut short
        "batch": {"users": 9, "texts": 7, "gradient_accumulation_steps": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "method": {"max_history": 100},
        "optimizer": {"lr": 1e-2, "warmup_steps": 4, "schedule": "cosine", "min_lr_ratio": 0.5},
        "validation": {"metrics": ["recall@5", "ndcg@10"], "batch_users": 5},
    }
    return validate(RunConfig, tree | changes, "test")


def run(world: World, config: RunConfig) -> None:
    train(world, lambda metrics: None, config)


def record_of(output: Path) -> RunRecord:
    return RunRecord.model_validate_json((output / STATUS_FILE).read_bytes())


@pytest.mark.slow
def test_a_run_says_what_it_is_how_far_it_is_and_how_it_ended(tmp_path: Path) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    make_corpus(tmp_path / "corpus", catalog, backbone)
    output = tmp_path / "runs" / "finetune"
    config = make_config(tmp_path, output)
    (_, messages), (_, others) = run_ranks(2, with_messages, run, config)

    (banner,) = [message for message in messages if message.startswith(f"finetune of {output}\n")]
    rows = dict(re.findall(r"^  (\w+) +(.*)$", banner, flags=re.MULTILINE))
    assert re.fullmatch(r"test: 23 users, 17 items, \d+ training interactions, \d+ texts", rows["data"])
    assert rows["backbone"] == f"{backbone}: gpt2, 2 layers of width 16, 300 words"
    # Four layers of LoRA in each of two decoder layers, two adapters of rank 4; two tables for each of two LLMs.
    adapters = 2 * 2 * 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    embeddings, head = 2 * (23 + 17) * 16, 17 + 1
    total = adapters + embeddings + head
    assert rows["trained"] == f"{total:,} parameters (adapters {adapters:,}, embeddings {embeddings:,}, head {head})"
    assert re.fullmatch(r"[\d,]+ parameters \(backbone [\d,]+, words 4,800\)", rows["frozen"])
    assert rows["precision"] == "fp32"
    assert rows["ranks"] == "2 on 1 host, CPU"
    assert rows["batch"] == "9 users and 7 texts a step, 4.5 and 3.5 on each rank, in 2 micro-batches"
    assert rows["steps"] == "8 in 3 epochs of 3"
    rate = r"0\.01 \(embeddings 0\.0001, 0\.\d\d% of their scale\), cosine to 0\.5 of it after 4 steps of warm-up"
    assert re.fullmatch(rate, rows["rate"])
    percent = float(re.search(r"([\d.]+)%", rows["rate"])[1])  # type: ignore[index]
    assert percent == pytest.approx(0.5, abs=0.02), "GPT-2's initial embeddings have a standard deviation of 0.02"
    assert re.fullmatch(r"every epoch on \d+ interactions; best by recall@5, also ndcg@10", rows["validation"])
    assert rows["start"] == "from scratch"
    assert rows["trackers"] == "tensorboard"

    epochs = [message for message in messages if message.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/3", "2/3", "3/3"]
    assert all("recall@5 " in line and "ndcg@10 " in line for line in epochs)
    assert epochs[0].count("* best") == 1
    assert ["ETA" in line for line in epochs] == [True, True, False]
    assert re.fullmatch(r"finetune done in .*: best recall@5 0\.\d{4} at epoch \d of 3 \(step [368]\)", messages[-2])
    assert messages[-1] == f"checkpoints: {output}/checkpoints"
    assert not any(message.startswith(("finetune of", "finetune done", "checkpoints:")) for message in others)

    record = record_of(output)
    assert (record.stage, record.state, record.num_ranks, record.device) == ("finetune", "done", 2, "CPU")
    assert (record.first_step, record.total_steps, record.steps_per_epoch) == (0, 8, 3)
    assert len(list((output / "tensorboard").iterdir())) == 1

    ((_, messages),) = run_ranks(1, with_messages, run, config)
    (banner,) = [message for message in messages if message.startswith("finetune of")]
    assert f"resumes {output}/checkpoints/step-00000008" in banner
    assert "8 in 3 epochs of 3, from step 8" in banner
    assert messages[-2].startswith("finetune is already done: best recall@5 ")
    (status,) = read_statuses(str(output), 2e9)
    assert (status.condition, status.step, status.best_metric) == ("done", 8, "recall@5")


def fail(config: RunConfig, output: Path, error: Exception) -> None:
    with RunReporter(output, alone(), config, lambda metrics: None):
        assert record_of(output).state == "starting"
        raise error


def test_a_run_that_fails_leaves_its_error_in_the_record(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path)
    for error, message in (
        (DataError("corpus", "x", "is not there", "Build it."), "corpus: 'x' is not there. Build it."),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
    ):
        with pytest.raises(type(error)):
            fail(config, tmp_path, error)
        record = record_of(tmp_path)
        assert (record.state, record.message) == ("failed", message)
        assert record.ended is not None


def test_a_record_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"
    with RunReporter(gone, alone(), make_config(tmp_path, gone), lambda metrics: None):
        pass
    assert "cannot be written" in caplog.text
