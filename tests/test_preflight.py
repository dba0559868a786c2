"""A run that is bound to fail is refused before it starts, with all its problems at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm4rec_dist import cli, preflight
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import RunConfig, load_config
from cllm4rec_dist.corpus.manifest import Manifest, load_manifest
from cllm4rec_dist.corpus.recipe import Preparation
from cllm4rec_dist.corpus.split_settings import NoSplit
from cllm4rec_dist.errors import CLLM4RecError, ConfigError, DataError
from tests.harness import make_backbone, make_catalog, make_corpus

FIELDS = "stage=finetune", "corpus=c", "backbone=b", "output=runs/x"
DATA = Manifest.model_construct(
    num_users=60, num_items=40, num_interactions={"train": 9, "valid": 1, "test": 1}, preparation=Preparation()
)


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, None, [*FIELDS, *overrides])


def manifest(**changes: Any) -> Manifest:
    return DATA.model_copy(update=changes)


def fields(problems: Any) -> list[str]:
    return [problem.field for problem in problems]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("preflight")
    catalog = make_catalog()
    return make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog))


SETTINGS = [
    ("validation.metrics=[mrr@10]", ["validation.metrics"]),
    ("validation.metrics=[recall@0, recall@5, map]", ["validation.metrics"] * 2),
    ("validation.metrics=[]", ["validation.metrics"]),
    ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas"]),
    ("optimizer.betas=[-0.1, 0.9]", ["optimizer.betas"]),
    ("optimizer.betas=[.nan, 0.9]", ["optimizer.betas"]),
    ("optimizer.betas=[0, 0.99]", []),
    ("embeddings={dim: 96}", []),
    ("optimizer.embeddings_state=int8", []),
]


@pytest.mark.parametrize(("override", "wrong"), SETTINGS)
def test_settings_that_end_a_run_late_are_refused(override: str, wrong: list[str]) -> None:
    assert fields(preflight.setting_problems(config(override))) == wrong


@pytest.mark.parametrize("override", ["stage=pretrain", "validation.every_epochs=0"])
def test_metrics_that_nobody_computes_are_not_looked_at(override: str) -> None:
    assert not preflight.setting_problems(config("validation.metrics=[mrr@10]", override))


def test_rows_that_cannot_be_packed_are_refused() -> None:
    packed = "optimizer.embeddings_state=int8"
    assert not preflight.setting_problems(config(packed, "embeddings.dim=128"))
    (problem,) = preflight.setting_problems(config(packed, "embeddings.dim=96"))
    assert "'int8' cannot pack rows of width 96. Set embeddings.dim to a multiple of 64" in str(problem)


def test_checkpoints_of_changed_rows_are_refused_where_every_row_changes() -> None:
    dense = "optimizer.sparse_embedding_updates=false"
    assert not preflight.setting_problems(config("checkpoint.full_every=4"))
    assert not preflight.setting_problems(config(dense))
    (problem,) = preflight.setting_problems(config(dense, "checkpoint.full_every=4"))
    assert (problem.field, problem.value) == ("checkpoint.full_every", 4)
    assert "optimizer.sparse_embedding_updates=false, where each step changes every row. Set it to 1" in str(problem)


def test_widths_are_checked_against_the_backbone_and_the_run_to_start_from(tmp_path: Path, corpus: str) -> None:
    backbone, earlier = tmp_path / "backbone", Store(f"{tmp_path}/earlier/checkpoints")
    backbone.mkdir()

    def problems(*overrides: str) -> list[str]:
        run = config(f"output={tmp_path}/run", f"backbone={backbone}", f"corpus={corpus}", *overrides)
        return [str(problem) for problem in preflight.source_problems(run)]

    def save(embeddings: dict[str, Any]) -> None:
        state = {"config": {"embeddings": embeddings}, "num_users": 9, "num_items": 11}
        name = "step-00000009"
        entry = earlier.write(name, "state.json", lambda path: path.write_text(json.dumps(state)))
        earlier.commit(name, {"state.json": entry})

    for key in ("hidden_size", "n_embd"):
        (backbone / "config.json").write_text(json.dumps({key: 16}))
        assert not problems("embeddings.dim=16")
        (problem,) = problems("embeddings.dim=17")
        assert problem.startswith("embeddings.dim: 17 exceeds the backbone's hidden size, 16")
    start = f"init_from={tmp_path}/earlier"
    for saved, equal, other in (({"dim": 8}, 8, 4), ({}, 16, 8), ({"dim": None}, 16, 8), ({"dim": 16}, 16, 8)):
        save(saved)
        assert not problems(start, f"embeddings.dim={equal}")
        (problem,) = problems(start, f"embeddings.dim={other}")
        assert f"step-00000009: embeddings.dim: {equal} is not this run's, {other}" in problem
        assert f"Set embeddings.dim={equal}, or start without init_from." in problem
    assert not problems(start)
    save({"dim": 8})
    assert "8 is not this run's, 16" in problems(start)[0]
    for content in ("{}", "[]", '{"hidden_size": "?"}', "?"):
        (backbone / "config.json").write_text(content)
        assert not problems(start, "embeddings.dim=17") if content == "none" else problems(start, "embeddings.dim=17")
        assert not problems(start)


def test_item_vectors_are_checked_before_anything_starts(tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.parquet"

    def problems(*overrides: str) -> list[str]:
        run = config(f"output={tmp_path}", f"embeddings.item_vectors={vectors}", *overrides)
        return [str(problem) for problem in preflight.item_vectors_problems(run.embeddings)]

    assert "does not exist" in problems()[0]
    pq.write_table(pa.table({"item": ["a", "a"], "vector": [[1.0], [2.0]]}), vectors)
    assert "row 2: 'a' is also the id of row 1" in problems()[0]
    pq.write_table(pa.table({"item": ["a"], "vector": [[1.0]]}), vectors)
    assert not problems()
    assert "no effect with embeddings.init=prior" in problems("embeddings.init=prior")[0]
    vectors.unlink()
    vectors.mkdir()
    assert "is a folder" in problems()[0]


def test_the_path_of_item_vectors_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    resolved, errors = preflight.resolve_paths(config("embeddings.item_vectors=v.parquet"))
    assert resolved.embeddings.item_vectors == str(tmp_path / "v.parquet")
    assert not errors


def test_a_warm_up_longer_than_the_run_is_refused_with_numbers() -> None:
    # 60 users in batches of 16: 4 steps an epoch.
    run = "epochs=3", "batch.users=16"
    (problem,) = preflight.corpus_problems(config(*run, "optimizer.warmup_steps=13"), DATA)
    assert (problem.field, problem.value) == ("optimizer.warmup_steps", 13)
    assert "12 steps (3 epochs of 4)" in str(problem)
    assert "optimizer.warmup_steps=1 " in str(problem)
    assert not preflight.corpus_problems(config(*run, "optimizer.warmup_steps=12"), DATA)
    assert preflight.warmup_warning(config(*run, "optimizer.warmup_steps=12"), DATA) is None


def test_a_run_that_is_trained_behind_its_end_is_refused(tmp_path: Path) -> None:
    # 60 users in batches of 16: 4 steps an epoch.
    run = f"output={tmp_path}", "batch.users=16"
    store = Store(f"{tmp_path}/checkpoints")
    assert not preflight.past_end_problems(config(*run, "epochs=1"), DATA)
    name = "step-00000009"
    store.commit(name, {"state.json": store.write(name, "state.json", lambda path: path.write_text("{}"))})
    (problem,) = preflight.past_end_problems(config(*run, "epochs=2"), DATA)
    assert "epochs: 2 ends the run after 8 steps, but 9 steps are already trained" in str(problem)
    assert "Set epochs=3 or more, or choose another output" in str(problem)
    (problem,) = preflight.past_end_problems(config(*run, "epochs=9", "max_steps=5"), DATA)
    assert "Set max_steps=9 or more" in str(problem)
    for enough in (["epochs=3"], ["epochs=9", "max_steps=9"]):
        assert not preflight.past_end_problems(config(*run, *enough), DATA)


def test_the_default_warm_up_in_a_recorded_configuration_is_as_good_as_left_out() -> None:
    recorded = config("epochs=3", "batch.users=16")
    again = RunConfig.model_validate(recorded.model_dump(mode="json"))
    assert not preflight.corpus_problems(again, DATA)
    assert "12 of optimizer.warmup_steps=100 steps" in str(preflight.warmup_warning(again, DATA))


def test_a_run_that_is_cut_short_or_left_to_the_default_is_warned() -> None:
    cut = config("epochs=30", "batch.users=16", "optimizer.warmup_steps=10", "max_steps=5")
    default = config("epochs=3", "batch.users=16")
    assert not preflight.corpus_problems(cut, DATA)
    assert not preflight.corpus_problems(default, DATA)
    assert "after 5 of optimizer.warmup_steps=10 steps" in str(preflight.warmup_warning(cut, DATA))
    assert "12 of optimizer.warmup_steps=100 steps" in str(preflight.warmup_warning(default, DATA))


def test_a_corpus_that_does_not_allow_the_run_is_refused() -> None:
    empty = manifest(num_interactions={"train": 9, "valid": 0, "test": 1})
    (problem,) = preflight.corpus_problems(config(), empty)
    assert "validation.every_epochs=0" in problem.cure
    assert "split.valid" in problem.cure
    for override in ("validation.every_epochs=0", "stage=pretrain"):
        assert not preflight.corpus_problems(config(override), empty)
    (problem,) = preflight.corpus_problems(config(), manifest(num_items=1))
    assert "items" in problem.field


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for wrong in ("file", "file/run", "gone/run"):
        (problem,) = preflight.folder_problems("output", str(tmp_path / wrong))
        assert "cannot be a folder" in str(problem)
    (problem,) = preflight.folder_problems("output", "/proc/run")
    assert "cannot be written" in str(problem)
    for url in ("s3://bucket/run", "s3:/bucket/run"):
        (problem,) = preflight.folder_problems("output", url)
        assert "is a URL" in str(problem)
    assert not preflight.folder_problems("output", str(tmp_path / "new" / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone"], "nothing is left behind"


def test_every_problem_is_in_one_error(corpus: str, tmp_path: Path) -> None:
    loaded, errors = preflight.resolve_paths(
        config(
            f"corpus={corpus}",
            "output=s3://bucket/run",
            "init_from=$NO_SUCH_VARIABLE/run",
            f"deepspeed={tmp_path}/ds.json",
            f"resume={tmp_path}/run",
            "checkpoint.dir=nosuch://x",
            "validation.metrics=[mrr@10]",
            "optimizer.betas=[0.9, 2]",
            "optimizer.warmup_steps=1000",
        )
    )
    with pytest.raises(ConfigError) as caught:
        preflight.require_ready(loaded, errors)
    wrong = [
        "init_from",
        "validation.metrics",
        "optimizer.betas",
        "output",
        "deepspeed",
        "resume",
        "checkpoint.dir",
        "optimizer.warmup_steps",
    ]
    assert sorted(caught.value.value) == sorted(wrong)  # type: ignore[call-overload]
    for field in wrong:
        assert f"\n  - {field}: " in str(caught.value)
    assert "NO_SUCH_VARIABLE is not set" in str(caught.value)


def test_one_problem_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CLLM4RecError, match=r"^corpus: .* has no readable manifest\.json"):
        preflight.require_ready(preflight.resolve_paths(config(f"corpus={tmp_path}", f"output={tmp_path}/run"))[0])


def test_only_settings_are_looked_at_where_the_ranks_have_other_file_systems() -> None:
    preflight.require_ready(config("corpus=/nowhere", "output=/proc/run"), sees_files=False)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir"):
        preflight.require_ready(config("output=s3://bucket/run"), sees_files=False)


def test_a_run_that_has_checkpoints_needs_no_init_from(tmp_path: Path) -> None:
    given = config("init_from=/nowhere/run", f"output={tmp_path}")
    assert fields(preflight.source_problems(given)) == ["init_from"]
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "COMMIT.json").write_text("{}")
    assert not fields(preflight.source_problems(given))


def test_paths_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("STORE", "memory://runs")
    monkeypatch.chdir(tmp_path)
    given = config("corpus=~/corpus", "output=run", "backbone=org/name", "checkpoint.dir=${STORE}/x", "resume=old")
    resolved, errors = preflight.resolve_paths(given)
    assert not errors
    assert (resolved.corpus, resolved.output) == ("/home/me/corpus", f"{tmp_path}/run")
    assert (resolved.backbone, resolved.deepspeed) == ("org/name", None)
    assert (resolved.checkpoint.dir, resolved.resume) == ("memory://runs/x", f"{tmp_path}/old")
    assert preflight.resolve_paths(config())[0].resume == "auto"


def test_an_evaluation_without_held_out_items_is_refused() -> None:
    nothing = manifest(num_interactions={"train": 9, "valid": 0, "test": 2})
    preflight.require_held_out(nothing, "test", with_baselines=False)
    with pytest.raises(DataError, match="Give --no-baselines"):
        preflight.require_held_out(nothing, "test", with_baselines=True)
    with pytest.raises(DataError, match="Give --split test"):
        preflight.require_held_out(nothing, "valid", with_baselines=False)


def test_a_corpus_to_train_on_everything_says_so_where_it_cannot_be_judged() -> None:
    everything = manifest(
        num_interactions={"train": 9, "valid": 0, "test": 0}, preparation=Preparation(split=NoSplit(kind="none"))
    )
    (problem,) = preflight.corpus_problems(config(), everything)
    assert "train on everything" in str(problem)
    assert "validation.every_epochs=0" in str(problem)
    assert not preflight.corpus_problems(config("validation.every_epochs=0"), everything)
    with pytest.raises(DataError, match=r"train on everything.*Build the corpus again"):
        preflight.require_held_out(everything, "test", with_baselines=True)


def test_held_out_items_of_new_users_are_enough_to_validate_and_evaluate() -> None:
    new = manifest(
        num_interactions={"train": 9, "valid": 0, "test": 0},
        num_new_users=3,
        num_new_interactions={"history": 9, "valid": 2, "test": 2},
    )
    assert not preflight.corpus_problems(config(), new)
    preflight.require_held_out(new, "test", with_baselines=True)


@pytest.mark.parametrize(
    ("option", "folder"),
    [
        ([], "evaluation"),
        (["--split", "test"], "evaluation"),
        (["--without-rows"], "evaluation-without-rows"),
        (["--split", "valid"], "evaluation-valid"),
        (["--split", "valid", "--without-rows"], "evaluation-valid-without-rows"),
    ],
)
def test_another_kind_of_evaluation_does_not_replace_the_usual_one(
    option: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.launch_short", lambda *args, **kwargs: arguments.update(kwargs))
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.find_trained", str)
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.is_main", lambda *args: False)
    cli.app(["evaluate", str(tmp_path), "--launcher", "process", *option], standalone_mode=False)
    assert arguments["without_rows"] == ("--without-rows" in option)
    assert arguments["output"] == str(tmp_path / folder)


def test_evaluate_refuses_its_options_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.launch_short", lambda *args, **kwargs: pytest.fail("started ranks"))
    options = ["--metrics", "mrr@10,recall@5", "--split", "train", "--output", "s3://bucket/x", "--launcher", "process"]
    with pytest.raises(ConfigError) as caught:
        cli.app(["evaluate", str(tmp_path), *options], standalone_mode=False)
    assert caught.value.value == ["--metrics", "--output", "--split"]
    for command in (["recommend", str(tmp_path), "s3://b/x"], ["export", str(tmp_path), "s3://b/x"]):
        with pytest.raises(ConfigError, match="is a URL"):
            cli.app(command, standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "options", "names"),
    [
        (None, [], ["popularity", "ease", "title_ease", "ials"]),
        ("ials_factors: [8]", [], ["popularity", "ease", "title_ease", "ials"]),
        ("names: [ials, popularity]", [], ["ials", "popularity"]),
        ("names: [ials]", ["--baselines", "sparse_ease,popularity"], ["popularity", "sparse_ease"]),
        (None, ["--no-baselines"], []),
    ],
)
def test_settings_of_baselines_come_from_a_file(
    text: str | None, options: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.launch_short", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.find_trained", str)
    monkeypatch.setattr(
        "cllm4rec_dist.evaluation.comparison.compare", lambda *args, **kwargs: given.update(kwargs) or ""
    )
    if text is not None:
        (tmp_path / "baselines.yaml").write_text(text)
        options = [*options, "--baseline-settings", str(tmp_path / "baselines.yaml")]
    cli.app(["evaluate", str(tmp_path), "--launcher", "process", *options], standalone_mode=False)
    assert list(given["baselines"]) == names
    assert given["settings"].ials_factors == ((8,) if text and "factors" in text else (64, 256))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ials_factor: [8]", [], r"ials_factor is not a key of the file \(did you mean 'ials_factors'\?\)"),
        ("ials_alphas: [0]", [], r"ials_alphas\.0: Input should be greater than 0 \(got 0\)"),
        ("ials_alphas: 5", [], r"Write ials_alphas: \[5\]"),
        ("ials_alphas: [0]", [], r"is invalid: ials_alphas\.0: [^;]* \(got 0\)\. `"),
        ("ials_alphas: [.inf]", [], r"ials_alphas\.0: Input should be less than .*\(got inf\)"),
        ("ease_lambdas: [.nan]", [], r"is invalid: ease_lambdas\.0: [^;]*\(got nan\)\. `"),
        ("ease_lambdas:", [], r"ease_lambdas must be a list \(got None\)\. Leave ease_lambdas out for its default"),
        ("num_threads: 100000", [], r"num_threads: Input should be less than or equal to 1024"),
        ("", [], "must consist of key: value pairs. `cllm4rec settings baselines` explains its keys"),
        ("names: [knn]", [], "'knn' is not one of popularity, ease"),
        ("select_by: auc", [], r"select_by: must be recall@K or ndcg@K .*\(got 'auc'\)"),
        ("output: runs/a", [], "'a run configuration' is not settings of baselines.*`cllm4rec settings baselines`"),
        ("seed: 1", ["--no-baselines"], "has nothing to set, because --no-baselines fits none"),
        (None, ["--no-baselines", "--baselines", "ease"], "'ease' names what to fit, but --no-baselines fits none"),
        (None, [], "'.*baselines.yaml' does not exist"),
    ],
)
def test_wrong_settings_of_baselines_are_refused_before_ranks_start(
    text: str | None, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm4rec_dist.cli.evaluate.launch_short", lambda *args, **kwargs: pytest.fail("started ranks"))
    if text is not None:
        (tmp_path / "baselines.yaml").write_text(text)
    given = ["--baseline-settings", str(tmp_path / "baselines.yaml"), *options]
    with pytest.raises(ConfigError, match=message):
        cli.app(["evaluate", str(tmp_path), "--launcher", "process", *given], standalone_mode=False)


def test_paths_of_the_command_line_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/run.yaml' does not exist"):
        cli.app(["pretrain", "-c", "~/run.yaml"], standalone_mode=False)
    with pytest.raises(ConfigError, match=r"run: .*NO_SUCH_VARIABLE is not set"):
        cli.app(["evaluate", "$NO_SUCH_VARIABLE/run"], standalone_mode=False)


def test_the_corpus_manifest_is_all_that_is_read(corpus: str) -> None:
    manifest, fingerprint = load_manifest(corpus)
    assert (manifest.num_users, manifest.num_items, len(fingerprint)) == (23, 17, 64)


def test_a_typo_is_answered_without_torch(corpus: str, tmp_path: Path) -> None:
    """Importing torch, transformers and DeepSpeed takes eight seconds."""
    program = (
        "import sys\nfrom cllm4rec_dist import cli, errors\n"
        "try: cli.app(sys.argv[1:], standalone_mode=False)\n"
        "except errors.CLLM4RecError as error: print(error)\n"
        "assert not {'torch', 'deepspeed', 'ray'} & sys.modules.keys()\n"
    )
    (tmp_path / "run.yaml").write_text(f"{{corpus: {corpus}, backbone: b, output: {tmp_path}/run}}")
    arguments = ["finetune", "-c", str(tmp_path / "run.yaml"), "validation.metrics=[mrr@10]"]
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "validation.metrics: 'mrr@10' must be recall@K or ndcg@K" in process.stdout
