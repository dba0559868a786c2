"""Which stages of a project run: what is missing, interrupted or out of date, and never a trained run unasked."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.errors import ConfigError, FaultError
from cllm4rec_dist.project.layout import Project
from cllm4rec_dist.project.pipeline import duration, load_settings, run_stages, split_overrides
from cllm4rec_dist.project.stages import Status, stages_of, state_of
from cllm4rec_dist.project.summary import summarize

RECIPE = "{name: shop, source: {format: table, interactions: {path: %s, user: u, item: i}}}\n"
RUN = "{corpus: c, backbone: b, output: o, epochs: %d}\n"
OUTPUTS = {
    "build-backbone": ["backbone/config.json", "backbone/tokenizer.json"],
    "prepare": ["corpus/manifest.json"],
    "pretrain": ["runs/pretrain/config.yaml"],
    "finetune": ["runs/finetune/config.yaml"],
    "evaluate": ["runs/finetune/evaluation/report.html"],
    "recommend": ["recommendations/list.parquet"],
}


class Shop:
    """A project whose stages only write their outputs, with what they have read."""

    def __init__(self, folder: Path) -> None:
        self.project = Project(folder / "shop")
        self.orders = folder / "orders.csv"
        self.ran: list[str] = []
        self.output: list[str] = []
        self.fails: str | None = None
        self.num_written = 0
        self.manifest: dict[str, Any] = {}
        self.project.folder.mkdir()
        self.orders.write_text("u,i\n1,2\n")
        self.project.recipe_file.write_text(RECIPE % self.orders)
        self.project.backbone_file.write_text("{hidden_size: 32}\n")
        for file in (self.project.pretrain_file, self.project.finetune_file):
            file.write_text(RUN % 3)

    def run(self, *overrides: str, redo: bool = False, top: int = 20) -> list[str]:
        """Names of the stages that a run of the project has done."""
        self.ran, self.output = [], []
        by_file = split_overrides(overrides)
        settings = load_settings(self.project, by_file, top)
        commands: dict[str, Callable[[], object]] = {name: self._command(name) for name in OUTPUTS}
        line = shlex.join(["cllm4rec", "run", str(self.project.folder), *overrides])
        run_stages(self.project, settings, commands, self.output.append, redo=redo, command_line=line)
        return self.ran

    def _command(self, name: str) -> Callable[[], None]:
        def command() -> None:
            self.ran.append(name)
            if self.fails == name:
                raise FaultError("rank", 1, "was lost", "Run it again.")
            for output in OUTPUTS[name]:
                path = self.project.folder / output
                path.parent.mkdir(parents=True, exist_ok=True)
                self.num_written += 1
                path.write_text(f"{name} {self.num_written}")
            if name == "prepare":
                write_manifest(self, **{"name": f"shop {self.num_written}"} | self.manifest)

        return command


def write_manifest(shop: Shop, **changes: Any) -> None:
    """Write a readable manifest as the corpus."""
    manifest = {
        "name": "shop",
        "num_users": 3,
        "num_items": 2,
        "num_interactions": {"train": 4, "valid": 1, "test": 1},
        "num_content": {},
        "tokenizer_fingerprint": "0",
        "preparation": {},
        "skipped": {"row that is odd": 7},
        "files": [
            {"path": f"{kind}.parquet", "kind": kind, "num_bytes": 1, "sha256": "0" * 64}
            for kind in ("users", "items", *(["new_users"] if "num_new_users" in changes else []))
        ],
        "schema_version": 1,
    }
    (shop.project.corpus / "manifest.json").write_text(json.dumps(manifest | changes))


ALL = list(OUTPUTS)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_everything_runs_once(shop: Shop) -> None:
    assert shop.run() == ALL
    assert shop.run() == []
    assert all("done before" in line for line in shop.output)


def test_a_failed_stage_resumes_and_earlier_ones_stay(shop: Shop) -> None:
    shop.fails = "finetune"
    with pytest.raises(FaultError):
        shop.run()
    assert shop.ran == ALL[:4]
    (shop.project.finetune_run / "checkpoints").mkdir(parents=True)
    shop.fails = None
    assert shop.run() == ALL[3:]
    assert any("(resumes)" in line for line in shop.output)
    assert (shop.project.finetune_run / "checkpoints").is_dir(), "what it had trained is still there"


def test_a_missing_output_is_made_again(shop: Shop) -> None:
    shop.run()
    (shop.project.evaluation / "report.html").unlink()
    assert shop.run() == ["evaluate"]


def test_before_anything_is_trained_a_changed_recipe_is_followed(shop: Shop) -> None:
    shop.fails = "pretrain"
    with pytest.raises(FaultError):
        shop.run()
    shop.fails = None
    assert shop.run("recipe.min_user_items=2") == ALL[1:]
    assert any("again: recipe.min_user_items: 1 is now 2" in line for line in shop.output)


@pytest.mark.parametrize(
    "overrides", [["recipe.min_user_items=2"], ["backbone.hidden_size=64"], ["optimizer.lr=0.5"], ["pretrain.seed=3"]]
)
def test_a_trained_run_is_replaced_only_with_redo(overrides: list[str], shop: Shop) -> None:
    shop.run()
    with pytest.raises(ConfigError, match=r"trained with other inputs .* is now .*--redo"):
        shop.run(*overrides)
    assert shop.ran == [], "nothing is touched before"
    ran = shop.run(*overrides, redo=True)
    assert ran[-4:] == ["pretrain", "finetune", "evaluate", "recommend"]
    assert (shop.project.folder / "runs" / "pretrain-earlier-1" / "config.yaml").is_file(), (
        "and the earlier one is kept"
    )
    assert shop.run(*overrides) == []


def test_a_raw_file_with_new_rows_is_noticed_and_a_copy_of_it_is_not(shop: Shop) -> None:
    shop.run()
    content = shop.orders.read_bytes()
    shop.orders.unlink()
    shop.orders.write_bytes(content)
    assert shop.run() == [], "another time, the same content"
    shop.orders.write_text("u,i\n1,3\n")
    with pytest.raises(ConfigError, match=r"orders.csv has changed\)"):
        shop.run()
    assert shop.run(redo=True) == ALL
    kept = shop.project.folder / "corpus-earlier-1" / "manifest.json"
    assert kept.is_file(), "the earlier run is of no use without its corpus"


def test_more_epochs_resume_the_run(shop: Shop) -> None:
    shop.run()
    (shop.project.finetune_run / "checkpoints").mkdir()
    assert shop.run("finetune.epochs=5") == ["finetune", "evaluate", "recommend"]
    assert (shop.project.finetune_run / "checkpoints").is_dir()
    assert any("(resumes: finetune.epochs: 3 is now 5)" in line for line in shop.output)
    with pytest.raises(ConfigError, match=r"'finetune' was trained with other inputs \(pretrain.epochs: 3 is now 5\)"):
        shop.run("pretrain.epochs=5", "finetune.epochs=5")


def test_more_epochs_resume_with_redo_too_and_it_is_reported(shop: Shop) -> None:
    shop.run()
    (shop.project.finetune_run / "checkpoints").mkdir()
    assert shop.run("finetune.epochs=5", redo=True) == ["finetune", "evaluate", "recommend"]
    assert (shop.project.finetune_run / "checkpoints").is_dir()
    line = f"--redo trains nothing again, as this run can resume: to start anew, rename {shop.project.finetune_run}"
    assert any(line in each for each in shop.output)


@pytest.mark.parametrize("override", ["finetune.epochs=2", "finetune.max_steps=5"])
def test_fewer_epochs_than_are_trained_are_refused_and_with_redo_train_anew(shop: Shop, override: str) -> None:
    shop.run("finetune.epochs=40")
    write_manifest(shop, num_users=512)  # two steps an epoch
    shop.run("finetune.epochs=40", redo=True)
    write_manifest(shop, num_users=512)
    commit(shop.project.finetune_run, "step-00000006")
    assert "finetune" in shop.run("finetune.epochs=3"), "it resumes to its end: this many are trained"
    assert any("(resumes: finetune.epochs: 40 is now 3)" in line for line in shop.output)
    with pytest.raises(ConfigError, match=r"is now .*; 6 steps are trained already, and it now ends after [45]\)"):
        shop.run(override)
    assert shop.run(override, redo=True)[:1] == ["finetune"]
    assert (shop.project.finetune_run.with_name("finetune-earlier-2") / "checkpoints/step-00000006").is_dir()
    assert not (shop.project.finetune_run / "checkpoints").exists()


def test_messages_repeat_the_overrides(shop: Shop) -> None:
    shop.run("epochs=4")
    with pytest.raises(ConfigError) as caught:
        shop.run("epochs=4", "seed=3", "recipe.split={kind: none}", "finetune.validation.every_epochs=0")
    line = "seed=3 'recipe.split={kind: none}' finetune.validation.every_epochs=0 --redo`"
    assert f"`cllm4rec run {shop.project.folder} epochs=4 {line}" in str(caught.value)


def test_earlier_outputs_are_reported_with_the_command_that_uses_them(shop: Shop) -> None:
    shop.run()
    shop.run("recipe.min_user_items=2", redo=True)
    folder = shop.project.folder
    output = "\n".join(shop.output)
    assert f"the earlier corpus is now {folder}/corpus-earlier-1; earlier runs use it" in output
    kept = folder / "runs/finetune-earlier-1"
    assert f"is now {kept}; to use it: cllm4rec serve {kept}, or cllm4rec recommend {kept} FOLDER" in output


def test_the_corpus_of_an_earlier_run_is_kept_if_the_next_run_has_not_started(shop: Shop) -> None:
    shop.run()
    shop.project.pretrain_run.rename(shop.project.pretrain_run.with_name("pretrain-earlier-1"))
    shop.run("recipe.min_user_items=2", redo=True)
    assert (shop.project.folder / "corpus-earlier-1").is_dir()


def commit(run: Path, name: str) -> None:
    """Add a checkpoint to a run, as training outside of `run` does."""
    store = Store(f"{run}/checkpoints")
    store.commit(name, {"state.json": store.write(name, "state.json", lambda path: path.write_text(name))})


@pytest.mark.parametrize("content", [None, "{"])
def test_a_trained_run_without_a_readable_record_is_replaced_only_with_redo(shop: Shop, content: str | None) -> None:
    shop.run()
    commit(shop.project.finetune_run, "step-00000006")
    record = shop.project.record("finetune")
    if content is None:
        record.unlink()
    else:
        record.write_text(content)
    with pytest.raises(ConfigError, match=r"'finetune' was trained, but .*finetune.json, .* --redo"):
        shop.run()
    assert shop.ran == []
    assert shop.run(redo=True)[0] == "finetune"
    assert (shop.project.finetune_run.with_name("finetune-earlier-1") / "checkpoints/step-00000006").is_dir()


def test_a_run_trained_further_by_another_command_is_evaluated_again(shop: Shop) -> None:
    shop.run()
    commit(shop.project.finetune_run, "best-00000020")
    assert shop.run() == ["evaluate", "recommend"]
    assert any("again: the checkpoint has changed" in line for line in shop.output)
    assert shop.run() == []
    commit(shop.project.pretrain_run, "step-00000020")
    with pytest.raises(ConfigError, match=r"'finetune' was trained with other inputs .the checkpoint has changed"):
        shop.run()


def test_results_that_another_command_has_changed_are_made_again(shop: Shop) -> None:
    shop.run()
    lists = shop.project.recommendations / "list.parquet"
    lists.unlink()
    assert shop.run() == ["recommend"], "the folder alone is no list"
    lists.write_text("three for each")
    assert shop.run() == ["recommend"]
    assert any("again: recommendations/list.parquet has changed" in line for line in shop.output)
    content = lists.read_bytes()
    lists.unlink()
    lists.write_bytes(content)
    assert shop.run() == [], "a copy"
    (shop.project.evaluation / "report.html").write_text("validation")
    assert shop.run() == ["evaluate"]
    shutil.rmtree(shop.project.recommendations)
    assert shop.run() == ["recommend"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"split": "valid"}, "of the split 'valid'"),
        ({"split": "test", "without_rows": True}, "without the users' rows"),
    ],
)
def test_an_evaluation_of_another_kind_is_not_that_of_the_project(
    content: dict[str, Any], why: str, shop: Shop
) -> None:
    shop.run()
    record = json.loads(shop.project.record("evaluate").read_text())
    del record["files"]  # as before they were recorded
    shop.project.record("evaluate").write_text(json.dumps(record))
    file = shop.project.evaluation / "evaluation.json"
    file.write_text(json.dumps({"split": "test", "without_rows": False}))
    assert shop.run() == []
    file.write_text(json.dumps(content))
    assert shop.run() == ["evaluate"]
    assert any(f"again: the evaluation is {why}" in line for line in shop.output)


@pytest.mark.parametrize("prefix", ["", "pretrain.", "finetune."])
@pytest.mark.parametrize("key", ["corpus", "backbone", "output", "init_from", "stage"])
def test_what_the_project_decides_is_no_override(prefix: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"sets {key}, which the project decides"):
        split_overrides([f"{prefix}{key}=x"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [("finetun.epochs=6", "finetune.epochs=6"), ("optmizer.lr=3", "optimizer.lr=3"), ("recip.name=x", "recipe.name=x")],
)
def test_an_override_that_begins_with_neither_a_file_nor_a_section_is_refused(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"override: '{override}' .*nor a section of a run. Did you mean {meant}"):
        split_overrides([override])


def test_a_renamed_section_is_refused_by_its_new_name(shop: Shop) -> None:
    with pytest.raises(ConfigError, match="embeddings"):
        shop.run("rows.start=x")


def test_lists_of_another_length_are_made_again(shop: Shop) -> None:
    shop.run()
    assert shop.run(top=5) == ["recommend"]


def test_without_held_out_items_nothing_is_evaluated(shop: Shop) -> None:
    with pytest.raises(ConfigError, match=r"every_epochs: 1 requires validation, .* holds nothing out"):
        shop.run("recipe.split={kind: none}")
    ran = shop.run("recipe.split={kind: none}", "finetune.validation.every_epochs=0")
    assert ran == [name for name in ALL if name != "evaluate"]


@pytest.mark.parametrize(("missing", "validates"), [("valid", True), ("test", True), ("test", False)])
def test_a_corpus_without_held_out_items_is_refused_before_anything_is_trained(
    shop: Shop, missing: str, validates: bool
) -> None:
    shop.manifest = {"num_interactions": {"train": 4, "valid": 1, "test": 1} | {missing: 0}}
    overrides = [] if validates else ["finetune.validation.every_epochs=0"]
    with pytest.raises(ConfigError, match=r"nothing to validate and test with: .* holds no items out of 3 customers"):
        shop.run(*overrides)
    assert "pretrain" not in shop.ran
    if missing == "valid":
        assert shop.run("finetune.validation.every_epochs=0") == ALL[2:]
    shop.manifest = {"num_interactions": {"train": 6, "valid": 0, "test": 0}}
    ran = shop.run("recipe.split={kind: none}", "finetune.validation.every_epochs=0", redo=True)
    assert [name for name in ALL[2:] if name in ran] == ["pretrain", "finetune", "recommend"]


def test_a_damaged_record_counts_as_missing(shop: Shop) -> None:
    shop.run()
    shop.project.record("recommend").write_text("{")
    assert shop.run() == ["recommend"]


def test_a_pretrained_backbone_is_not_built(shop: Shop) -> None:
    shop.project.backbone_file.unlink()
    assert shop.run() == ALL[1:]
    with pytest.raises(ConfigError, match="has a pretrained one"):
        shop.run("backbone.hidden_size=8")


def test_the_summary_has_data_times_table_and_paths(shop: Shop) -> None:
    shop.run()
    write_manifest(shop)
    rows = [{"name": "CLLM4Rec", "metrics": {"recall@20": 0.5}}, {"name": "EASE", "metrics": {"recall@20": 0.25}}]
    (shop.project.evaluation / "results.json").write_text(json.dumps({"rows": rows}))
    line = f"cllm4rec run {shop.project.folder} epochs=4"
    output = summarize(shop.project, load_settings(shop.project, split_overrides([]), 20), line)
    for words in (
        "3 customers, 2 items, 6 interactions",
        "left out: 7 x row that is odd",
        "0.500*",
        "report.html",
        f"cllm4rec recommend {shop.project.folder}",
        f"{line} --redo",
    ):
        assert words in output


def test_the_summary_counts_customers_who_are_held_out_whole(shop: Shop) -> None:
    shop.run()
    write_manifest(shop, num_new_users=2, num_new_interactions={"history": 6, "valid": 1, "test": 2})
    output = summarize(shop.project, load_settings(shop.project, split_overrides([]), 20), "cllm4rec run shop")
    assert "5 customers, 2 items, 15 interactions" in output
    assert "2 of these customers are held out whole: 6 shown as their history, 1 to validate, 2 to test" in output


def test_the_summary_says_that_lists_lack_the_linear_memory_if_nothing_chose_its_weight(shop: Shop) -> None:
    shop.run()
    for more, is_said in (([], False), (["every_epochs=0"], True), (["every_epochs=0", "weight=2"], False)):
        sections = {"every_epochs": "finetune.validation", "weight": "finetune.linear"}
        overrides = [f"{sections[each.partition('=')[0]]}.{each}" for each in more]
        settings = load_settings(shop.project, split_overrides(overrides), 20)
        assert ("without the linear memory" in summarize(shop.project, settings, "cllm4rec run shop")) == is_said


def test_durations_are_readable() -> None:
    assert [duration(seconds) for seconds in (0.2, 59, 61, 3700)] == ["0 s", "59 s", "1 min 1 s", "1 h 1 min"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.embeddings.dim=16"], r"finetune.yaml: embeddings.dim: 16 is not that of pretraining, 32"),
        (["pretrain.embeddings.dim=16"], r"finetune.yaml: embeddings.dim: 32 is not that of pretraining, 16"),
        (["embeddings.dim=64"], r"embeddings.dim: 64 exceeds the backbone's hidden size, 32"),
    ],
)
def test_widths_that_finetuning_would_refuse_are_refused_before_any_stage(
    shop: Shop, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        shop.run(*overrides)
    assert shop.ran == []


@pytest.mark.parametrize("overrides", [["embeddings.dim=16"], ["finetune.embeddings.dim=32"]])
def test_one_width_runs(shop: Shop, overrides: list[str]) -> None:
    assert shop.run(*overrides) == ALL


def test_widths_of_a_pretrained_backbone_are_read_from_its_config(shop: Shop, tmp_path: Path) -> None:
    shop.project.backbone_file.unlink()
    backbone = tmp_path / "decoder"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"n_embd": 48}')
    for file in (shop.project.pretrain_file, shop.project.finetune_file):
        file.write_text(f"{{corpus: c, backbone: {backbone}, output: o}}\n")
    with pytest.raises(ConfigError, match=r"embeddings.dim: 16 is not that of pretraining, 48"):
        shop.run("finetune.embeddings.dim=16")


def without_setting(shop: Shop, stage: str, *keys: str) -> None:
    """Remove an input from a stage's record, as if an earlier version without this setting had written it."""
    file = shop.project.record(stage)
    record = json.loads(file.read_text())
    section = record["inputs"]
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    file.write_text(json.dumps(record))


def test_a_setting_that_a_record_lacks_had_its_default(shop: Shop) -> None:
    shop.run()
    without_setting(shop, "recommend", "settings", "top")
    assert shop.run() == []


@pytest.mark.parametrize(
    ("stage", "keys", "override", "change"),
    [
        ("build-backbone", ("settings", "num_heads"), "backbone.num_heads=2", "num_heads: 4 is now 2"),
        ("prepare", ("recipe", "seed"), "recipe.seed=1", "recipe.seed: 0 is now 1"),
        (
            "finetune",
            ("settings", "embeddings", "dropout"),
            "finetune.embeddings.dropout=0.5",
            "dropout: 0.0 is now 0.5",
        ),
    ],
)
def test_a_setting_that_a_record_lacks_is_compared_with_its_default(
    shop: Shop, stage: str, keys: tuple[str, ...], override: str, change: str
) -> None:
    shop.run()
    current = load_settings(shop.project, split_overrides([]), 20)
    changed = load_settings(shop.project, split_overrides([override]), 20)
    without_setting(shop, stage, *keys)
    it = next(each for each in stages_of(shop.project, current) if each.name == stage)
    assert state_of(shop.project, current, it).status is Status.DONE
    state = state_of(shop.project, changed, it)
    assert state.status is Status.STALE
    assert change in "; ".join(state.changes)
