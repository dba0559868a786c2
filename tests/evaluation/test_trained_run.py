"""Which checkpoint of a run is used, what is said of it, and runs whose corpus or backbone has moved."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint, shard_file
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import evaluate_run, load
from cllm4rec_dist.evaluation.trained_run import load_local, log_choice, relocated
from cllm4rec_dist.export.source import open_source
from cllm4rec_dist.serving.known_ids import read_known_ids
from tests.harness import alone, make_backbone, make_catalog, make_corpus, make_run, run_ranks, with_messages
from tests.training import Made, make_config, run


@pytest.fixture
def made(tmp_path: Path) -> Made:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    return tmp_path, make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)


def said_of(path: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged of the checkpoint that a path means."""
    store, names = find(path)
    caplog.clear()
    with caplog.at_level("INFO", logger="cllm4rec_dist"):
        log_choice(store, names, Checkpoint.open(store, names[0]))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.slow
def test_newer_weights_that_nobody_validated_are_told(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    output = made[0] / "run"
    validation = {"metrics": ["recall@5"], "batch_users": 5}
    config = make_config(made, output, "finetune", validation=validation, epochs=1)
    run_ranks(1, run, config)
    (message,) = said_of(str(output), caplog)
    assert "best-00000003: step 3, best recall@5=0." in message

    silent = config.validation.model_copy(update={"every_epochs": 0})
    run_ranks(1, run, config.model_copy(update={"epochs": 2, "validation": silent}))
    message, warning = said_of(str(output), caplog)
    assert "best-00000003" in message
    assert "NEWER CHECKPOINT NOT VALIDATED" in warning
    assert "step 6, but the last validation was at step 3" in warning
    (message,) = said_of(f"{output}/checkpoints/step-00000006", caplog)
    assert "step 6, not the best one (best recall@5=" in message

    # A validation that finds the newer weights worse is a validation.
    frozen = config.optimizer.model_copy(update={"lr": 1e-12, "embeddings_lr": 1e-12})
    config = config.model_copy(update={"output": f"{output}-2", "optimizer": frozen, "epochs": 2})
    run_ranks(1, run, config)
    assert len(said_of(f"{output}-2", caplog)) == 1
    run_ranks(1, run, config.model_copy(update={"epochs": 3, "validation": silent}))
    assert "step 9, but the last validation was at step 6" in said_of(f"{output}-2", caplog)[1]


@pytest.mark.slow
def test_a_run_without_validation_says_so(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    run_ranks(1, run, make_config(made, made[0] / "run", max_steps=1))
    (message,) = said_of(str(made[0] / "run"), caplog)
    assert message.endswith("step-00000001: step 1, never validated")


@pytest.mark.slow
def test_a_run_that_has_not_ended_says_so(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    output = made[0] / "run"
    run_ranks(1, run, make_config(made, output, max_steps=1))
    record = json.loads((output / "status.json").read_text())
    for state in ("interrupted", "failed", "running"):
        (output / "status.json").write_text(json.dumps(record | {"state": state, "total_steps": 9}))
        _, warning = said_of(str(output), caplog)
        assert "stopped before its end, with a checkpoint of step 1 of 9; `cllm4rec pretrain -c " in warning
        assert len(said_of(str(output / "checkpoints/step-00000001"), caplog)) == 2
    with (output / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, warning = said_of(str(output), caplog)
    assert warning == "the run is still training: its newest checkpoint is of step 1 of 9"
    for unknown in ("{", json.dumps(record | {"state": "interrupted"})):  # its last step was saved
        (output / "status.json").write_text(unknown)
        assert len(said_of(str(output), caplog)) == 1


def loaded(world: World, folder: str, backbone: str | None, corpus: str | None) -> str:
    """The paths of corpus and backbone that a run is used with, or why it is not."""
    try:
        system, _ = load(folder, world, backbone, corpus)
    except CLLM4RecError as error:
        return str(error)
    return f"{system.config.corpus} {system.config.backbone}"


def evaluated(world: World, folder: str, backbone: str, corpus: str, output: str) -> None:
    evaluate_run(world, lambda m: None, folder, "test", ["recall@5"], 4, output, backbone=backbone, corpus=corpus)


@pytest.mark.slow
def test_a_moved_run_names_the_cure_and_fingerprints_decide(made: Made) -> None:
    folder = made[0]
    deepspeed = str(shutil.copy("ds_configs/zero3.json", folder / "zero3.json"))
    run_ranks(2, run, make_config(made, folder / "run", max_steps=1, deepspeed=deepspeed))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("run", "corpus", "backbone", "zero3.json"):
        (folder / name).rename(elsewhere / name)
    moved, backbone, corpus = (str(elsewhere / name) for name in ("run", "backbone", "corpus"))

    assert "If it has moved, give its path: --backbone PATH" in run_ranks(1, loaded, moved, None, None)[0]
    assert "If it has moved, give its path: --corpus PATH" in run_ranks(1, loaded, moved, backbone, None)[0]
    for result in run_ranks(2, loaded, moved, backbone, corpus):
        assert result == f"{corpus} {backbone}"
    other = make_corpus(folder / "other", make_catalog(seed=1), Path(backbone))
    assert "corpus fingerprint" in run_ranks(2, loaded, moved, backbone, other)[1]
    strange = str(make_backbone(folder / "strange", make_catalog(), seed=1))
    assert "backbone fingerprint" in run_ranks(1, loaded, moved, strange, corpus)[0]

    output = elsewhere / "evaluation"
    (_, messages), _ = run_ranks(2, with_messages, evaluated, moved, backbone, corpus, str(output))
    assert any("zero3.json does not exist" in message for message in messages)
    compare(output, ["recall@5"], baselines=(), seconds=1.0)
    assert json.loads((output / "results.json").read_text())["config"]["corpus"] == corpus
    assert (output / "report.html").is_file()


def test_only_what_looks_like_a_path_is_looked_for(made: Made, tmp_path: Path) -> None:
    tree = {"stage": "pretrain", "corpus": made[1], "backbone": "openai-community/gpt2", "output": "-"}
    config = validate(RunConfig, tree, "test")
    assert relocated(config, "x", None, None) == config
    assert relocated(config, "x", "b", "c").model_dump() == config.model_dump() | {"backbone": "b", "corpus": "c"}
    gone = config.model_copy(update={"backbone": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match=r"x: backbone.*holds no backbone"):
        relocated(gone, "x", None, None)
    with pytest.raises(ConfigError, match=r"x: corpus.*holds no corpus"):
        relocated(config.model_copy(update={"corpus": str(tmp_path)}), "x", None, None)


def test_a_run_of_a_copied_project_reads_the_copys_corpus_and_backbone(tmp_path: Path) -> None:
    shop, copy = tmp_path / "shop", tmp_path / "copy"
    catalog = make_catalog()
    backbone = make_backbone(shop / "backbone", catalog)
    corpus = make_corpus(shop / "corpus", catalog, backbone)
    make_run(shop / "runs/finetune", corpus, backbone)
    for name in ("recipe.yaml", "finetune.yaml"):
        (shop / name).write_text("{}")
    shutil.copytree(shop, copy)
    result = load_local(str(copy / "runs/finetune"), torch.device("cpu"))[0].config
    assert (result.corpus, result.backbone) == (str(copy / "corpus"), str(copy / "backbone"))
    shutil.rmtree(shop)
    assert load_local(str(copy / "runs/finetune"), torch.device("cpu"))[0].config == result
    assert len(read_known_ids(str(copy / "runs/finetune")).users) == catalog.num_users
    assert open_source(str(copy / "runs/finetune"), None, None).config.corpus == str(copy / "corpus")

    # A changed recipe sets corpus and run aside, and the run finds its corpus there.
    (copy / "corpus").rename(copy / "corpus-earlier-2")
    (copy / "runs/finetune").rename(copy / "runs/finetune-earlier-1")
    other = make_corpus(copy / "corpus", make_catalog(seed=1), copy / "backbone")
    result = load_local(str(copy / "runs/finetune-earlier-1"), torch.device("cpu"))[0].config
    assert result.corpus == str(copy / "corpus-earlier-2")
    assert load_manifest(other)[1] != load_manifest(result.corpus)[1]


def test_a_damaged_checkpoint_is_told_of_alone_and_a_run_of_damaged_ones_as_such(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(runs["paper"], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard")))
    shutil.copytree(folder / "checkpoints/best-00000007", folder / "checkpoints/step-00000007")
    store, names = find(str(folder))
    first, second = names
    cpu = torch.device("cpu")
    (folder / "checkpoints" / first / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"checkpoint: '{store.path(first)}' is damaged. Use another checkpoint"):
        load_local(store.path(first), cpu)
    with pytest.raises(CheckpointError, match=f"checkpoint: '{store.path(first)}' is damaged. Use another checkpoint"):
        open_source(store.path(first), None, None)
    assert "trying" not in caplog.text
    assert load_local(str(folder), cpu)[1].name == second
    assert f"{first} cannot be used (ranks [0]); trying {second}" in caplog.text
    (folder / "checkpoints" / second / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"'{folder}' has 2 checkpoints, all damaged. Use another run"):
        load_local(str(folder), cpu)


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that a tensor is mapped from; empty for memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, stop = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(stop, 16):
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_command_maps_tables_and_changing_them_changes_no_checkpoint(made: Made) -> None:
    folder = make_run(made[0] / "run", made[1], made[2])
    system, used = load(str(folder), alone())
    shard = str(used.file(shard_file(0, 1)))
    for _, parameter, _ in system.recommender.sharded_parameters():
        assert mapped_file(parameter) == shard
        with torch.no_grad():
            parameter.add_(1.0)
    again, _ = load_local(str(folder), torch.device("cpu"))  # verifies the digest of each file
    pairs = zip(again.recommender.sharded_parameters(), system.recommender.sharded_parameters(), strict=True)
    for (_, unchanged, _), (_, changed, _) in pairs:
        assert mapped_file(unchanged) != shard, "a service lives longer than a file"
        torch.testing.assert_close(unchanged + 1.0, changed.detach(), rtol=0, atol=0)
