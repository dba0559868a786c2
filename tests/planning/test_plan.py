"""The command `plan` and its output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cllm4rec_dist import cli
from cllm4rec_dist.config import OptimizerConfig, RunConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.planning import changes
from cllm4rec_dist.planning.changes import faster_runs, suggest_changes
from cllm4rec_dist.planning.hardware import GIB, GPUS, find_gpu
from cllm4rec_dist.planning.plan import Cluster, Plan, make_plan
from cllm4rec_dist.planning.table import as_json, format_faster_runs, format_plan
from tests.harness import make_backbone, make_catalog, make_corpus
from tests.planning.runs import make_config

CLUSTER = Cluster(GPUS["h100"], 4, 2, 0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("plan")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog, hidden_size=32)
    return make_config((make_corpus(folder / "corpus", catalog, backbone), str(backbone)), folder, {}, {})


def test_a_plan_reports_everything_and_starts_nothing(config: RunConfig) -> None:
    plan = make_plan(config, CLUSTER)
    text = format_plan(plan)
    for part in ("activations", "tables", "row gradients", "FLOPs", "time of a step", "An epoch: 3 steps", "fits"):
        assert part in text
    figures = as_json(plan)
    assert figures["needed"] == sum(figures["memory"].values())
    assert figures["fits"]
    json.dumps(figures)


def test_an_item_softmax_in_bf16_is_computed_at_the_peak_of_bf16(config: RunConfig) -> None:
    head = config.head.model_copy(update={"compute_dtype": "bf16"})
    slow = replace(CLUSTER, gpu=replace(CLUSTER.gpu, bf16=4e6, fp32=1e6))  # so that launches take no time
    plans = [make_plan(part, slow) for part in (config, config.model_copy(update={"head": head}))]
    exact, rounded = (plan.seconds["item head"] for plan in plans)
    assert rounded == pytest.approx(exact / 4)
    assert plans[0].traffic == plans[1].traffic


@pytest.mark.slow
def test_more_ranks_hold_less_and_send_more(config: RunConfig) -> None:
    alone, few, many = (make_plan(config, replace(CLUSTER, num_ranks=n)) for n in (1, 2, 8))
    for part in ("tables", "optimizer"):
        assert alone.memory[part] >= few.memory[part] >= many.memory[part], part
    assert alone.traffic.total() == 0 < few.traffic.total() < many.traffic.total()


@pytest.mark.slow
def test_a_run_that_does_not_fit_gets_changes_that_help(config: RunConfig) -> None:
    gpu = replace(CLUSTER.gpu, memory=2 * GIB + (1 << 20))
    plan = make_plan(config, replace(CLUSTER, gpu=gpu))
    assert not plan.fits
    changes = list(suggest_changes(config, plan, 2))
    assert changes[0].settings == "precision=bf16"
    needed = [plan.needed, *(change.needed for change in changes)]
    assert needed[-1] < needed[0]
    assert "does NOT fit" in format_plan(plan)


@pytest.mark.slow
def test_a_run_with_wide_embeddings_that_does_not_fit_may_have_narrow_ones(tmp_path: Path) -> None:
    catalog = make_catalog(num_items=3000)
    backbone = make_backbone(tmp_path / "backbone", catalog, hidden_size=512)
    config = make_config((make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)), tmp_path, {}, {})
    plan = plan_of(config)
    assert plan.embedding_width == 512
    needed = {change.settings: change.needed for change in suggest_changes(config, plan, 2)}
    settings = [*needed]
    index = settings.index("embeddings.dim=256")
    assert needed[settings[index]] < needed[settings[index - 1]]
    narrow = config.model_copy(update={"embeddings": config.embeddings.model_copy(update={"dim": 256})})
    assert not any("embeddings.dim" in change.settings for change in suggest_changes(narrow, plan_of(narrow), 2))


def plan_of(config: RunConfig) -> Plan:
    """Plan on GPUs with less memory than is reserved; with a few bytes the heads would compute a logit at a time."""
    return make_plan(config, replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory=1 << 30)))


@pytest.mark.slow
def test_a_plan_names_layouts_that_make_a_step_faster(config: RunConfig, tmp_path: Path) -> None:
    """Within a host of two GPUs communication is free; among hosts a byte takes a microsecond."""
    sharded = {"stage3_param_persistence_threshold": 0}
    config = make_config((config.corpus, config.backbone), tmp_path, {}, sharded)
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, network=1e6, link=1e15))
    plan = make_plan(config, cluster)
    groups, hpz = faster_runs(config, plan, 2)
    assert groups.settings == "embeddings.shard_group=2"
    assert groups.plan.seconds["other communication"] < plan.seconds["other communication"]
    assert groups.plan.memory["tables"] > plan.memory["tables"]
    assert hpz.settings == "zero_hpz_partition_size: 2 in the DeepSpeed file"
    assert hpz.plan.seconds["communication of weights"] < groups.plan.seconds["communication of weights"]
    assert hpz.plan.memory["weights"] > groups.plan.memory["weights"]
    assert hpz.plan.memory["tables"] == groups.plan.memory["tables"], "hpZ is tried on top of the groups"
    assert f" {hpz.plan.step_seconds:.3g} s | " in format_faster_runs([groups, hpz])
    assert list(faster_runs(with_shard_group(config, 2), hpz.plan, 2)) == []
    assert list(faster_runs(config, make_plan(config, replace(cluster, ranks_per_host=4)), 2)) == []
    with pytest.raises(ConfigError, match="does not divide the 4 ranks"):
        make_plan(with_shard_group(config, 3), cluster)


@pytest.mark.slow
def test_a_plan_names_a_sampled_softmax_for_a_large_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = make_catalog(num_items=5000)
    backbone = make_backbone(tmp_path / "backbone", catalog, hidden_size=32)
    config = make_config((make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)), tmp_path, {}, {})
    slow = Cluster(replace(CLUSTER.gpu, bf16=1e6, fp32=1e6), 1, 1, 0.5)  # so that launches take no time
    plan = make_plan(config, slow)
    assert list(faster_runs(config, plan, 2)) == [], "exact where sampling saves little"
    monkeypatch.setattr(changes, "_NUM_NEGATIVES", 100)
    (sampled,) = faster_runs(config, plan, 2)
    assert sampled.settings == "head.num_negatives=100"
    assert sampled.plan.seconds["item head"] < plan.seconds["item head"] / 5
    sharing = config.model_copy(update={"optimizer": OptimizerConfig(words_lr_ratio=1.0)})
    (sampled,) = faster_runs(sharing, make_plan(sharing, slow), 2)
    assert sampled.settings == "head.num_negatives=100 optimizer.words_lr_ratio=0.0"


def with_shard_group(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"embeddings": config.embeddings.model_copy(update={"shard_group": size})})


def test_a_plan_names_settings_that_it_does_not_include(config: RunConfig, tmp_path: Path) -> None:
    settings = {"zero_quantized_weights": True}
    plan = make_plan(make_config((config.corpus, config.backbone), tmp_path, {}, settings), CLUSTER)
    assert "Not included: zero_quantized_weights." in format_plan(plan)


def test_the_linear_memory_of_a_finetuning_run_is_counted(config: RunConfig) -> None:
    num_items = Corpus.open(config.corpus).num_items
    local = -(-num_items // CLUSTER.num_ranks)
    for neighbors in (0, 4, 10_000):
        linear = config.linear.model_copy(update={"neighbors": neighbors})
        plan = make_plan(config.model_copy(update={"stage": "finetune", "linear": linear}), CLUSTER)
        # The plan knows the rows of the fullest rank, which all others are taken to have.
        kept = min(neighbors, local * CLUSTER.num_ranks - 1)
        starts = (local * CLUSTER.num_ranks + 2) * 8 if neighbors else 0
        assert plan.memory["linear"] == local * kept * 8 + starts
        assert plan.linear_flops == local * 2 * kept**3 // 3
        assert ("for the linear memory" in format_plan(plan)) == (neighbors > 0)
    pretraining = make_plan(config, CLUSTER)
    assert (pretraining.memory["linear"], pretraining.linear_flops) == (0, 0)


def test_the_command(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.model_dump_json(exclude={"stage"}))
    given = ["plan", "-c", str(tmp_path / "run.yaml"), "--gpus", "3", "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(cli.app, [*given, "init_from=elsewhere"])
    assert result.exit_code == 0, result.output
    assert "finetune on 3 x h100" in result.output
    assert json.loads((tmp_path / "plan.json").read_text())["gpus"] == 3


def test_a_configuration_whose_corpus_and_backbone_have_moved(config: RunConfig, tmp_path: Path) -> None:
    gone = {"corpus": str(tmp_path / "gone"), "backbone": str(tmp_path / "gone")}
    (tmp_path / "run.yaml").write_text(config.model_copy(update=gone).model_dump_json(exclude={"stage"}))
    given = ["plan", "-c", str(tmp_path / "run.yaml"), "--gpus", "1"]
    for more, cure in (([], "--backbone PATH"), (["--backbone", config.backbone], "--corpus PATH")):
        with pytest.raises(CLLM4RecError, match=cure):
            cli.app([*given, *more], standalone_mode=False)
    result = CliRunner().invoke(cli.app, [*given, "--backbone", config.backbone, "--corpus", config.corpus])
    assert result.exit_code == 0, result.output


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu"):
        find_gpu("tpu")
