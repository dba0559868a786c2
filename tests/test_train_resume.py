"""What a run may resume from and with which changes, and which value its best one is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import cllm4rec_dist.train as train_module
from cllm4rec_dist import preflight
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint, RunState
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.checkpointing.trajectory import require_same_trajectory
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.evaluation.trained_run import load_local
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks, with_messages
from tests.training import Made, about, make_config, metrics, newest, refused, run


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


def checkpoint_fingerprint(folder: Path) -> str:
    from cllm4rec_dist.model.backbone import fingerprint

    return fingerprint(folder)


def test_settings_that_came_later_have_their_defaults_in_an_older_checkpoint(tmp_path: Path) -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-"}
    old = validate(RunConfig, tree, "test").model_dump(mode="json")
    del old["quantization"], old["embeddings"]["comm_dtype"], old["optimizer"]["embeddings_state"]
    del old["head"]["projection"], old["embeddings"]["dim"]
    candidate = SimpleNamespace(path="old", metadata=SimpleNamespace(config=old, embedding_width=None))
    require_same_trajectory(cast(Checkpoint, candidate), validate(RunConfig, tree, "test"))
    changed = validate(RunConfig, tree | {"embeddings": {"comm_dtype": "bf16"}}, "test")
    with pytest.raises(CheckpointError, match="comm_dtype"):
        require_same_trajectory(cast(Checkpoint, candidate), changed)
    assert not validate(RunConfig, old, "test").head.projection, "older checkpoints have the plain form"
    changed = validate(RunConfig, tree | {"head": {"projection": True}}, "test")
    with pytest.raises(CheckpointError, match=r"head\.projection"):
        require_same_trajectory(cast(Checkpoint, candidate), changed)


def test_the_width_of_embeddings_counts_and_not_how_it_was_chosen() -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-"}
    default, named = (validate(RunConfig, tree | {"embeddings": {"dim": dim}}, "test") for dim in (None, 32))
    metadata = SimpleNamespace(config=default.model_dump(mode="json"), embedding_width=32)
    candidate = cast(Checkpoint, SimpleNamespace(path="saved", metadata=metadata))
    for config in (default, named):
        require_same_trajectory(candidate, config, 32)
    with pytest.raises(CheckpointError, match=r"embeddings\.dim: 32 is not this run's, 8\. Set embeddings\.dim=32"):
        require_same_trajectory(candidate, default, 8)


def then_with_narrow_default(world: World, config: RunConfig, *changes: dict[str, Any]) -> list[str]:
    """Train, then with each change where the default width is 8; return what refuses it."""
    run(world, config)
    assert about(Path(config.output)).embedding_width == 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cllm4rec_dist.config.embedding_width.NARROW_WIDTH", 8)
        patch.setattr("cllm4rec_dist.config.embedding_width._MAX_ENTRIES", 100)
        return [refused(world, config.model_copy(update=change)) for change in changes]


@pytest.mark.slow
def test_a_run_whose_default_width_has_changed_is_refused_without_loss_and_can_be_used(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    wide = {"max_steps": 2, "embeddings": config.embeddings.model_copy(update={"dim": 16})}
    ((narrow, nothing),) = run_ranks(1, then_with_narrow_default, config, {"max_steps": 2}, wide)
    assert "embeddings.dim: 16 is not this run's, 8. Set embeddings.dim=16" in narrow
    assert nothing == ""
    assert about(tmp_path / "run").run.step == 2
    monkeypatch.setattr("cllm4rec_dist.config.embedding_width.NARROW_WIDTH", 8)
    monkeypatch.setattr("cllm4rec_dist.config.embedding_width._MAX_ENTRIES", 100)
    system, _ = load_local(str(newest(tmp_path / "run")), torch.device("cpu"))
    assert system.recommender.collaborative.items.width == 16


@pytest.mark.slow
def test_a_changed_setting_is_refused_and_named(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=1)
    run_ranks(2, run, config)
    changed = config.model_copy(update={"seed": 5, "max_steps": 2})
    assert "'seed': (0, 5)" in run_ranks(2, refused, changed)[0]


def test_a_refusal_names_only_the_settings_that_differ() -> None:
    tree: dict[str, Any] = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-"}
    saved = validate(RunConfig, tree, "test").model_dump(mode="json")
    metadata = SimpleNamespace(config=saved, embedding_width=None)
    candidate = cast(Checkpoint, SimpleNamespace(path="saved", metadata=metadata))
    free: dict[str, Any] = {
        "batch": {"gradient_accumulation_steps": 3},
        "optimizer": {"embeddings_state": "cpu"},
        "validation": {"early_stopping_patience": 3},
        "head": {"new_item_offset": 0.5},
        "allow_leak": True,
        "corpus": "moved",
        "init_from": "another",
    }
    require_same_trajectory(candidate, validate(RunConfig, tree | free, "test"))
    changed = free | {
        "batch": {"gradient_accumulation_steps": 3, "users": 7},
        "optimizer": {"lr": 0.5, "embeddings_state": "cpu"},
    }
    with pytest.raises(CheckpointError) as refusal:
        require_same_trajectory(candidate, validate(RunConfig, tree | changed, "test"))
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
