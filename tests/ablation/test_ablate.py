"""Cells of an ablation, what runs again, and the table; stages are replaced by a function that writes results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import polars as pl
import pytest

from cllm4rec_dist.ablation.ablate import ablate
from cllm4rec_dist.ablation.cells import Cell, RunFiles, make_cells, without_duplicates
from cllm4rec_dist.ablation.variants import load_variants
from cllm4rec_dist.checkpointing.run_folder import RunRecord, write_record
from cllm4rec_dist.config import RunConfig, load_config
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.evaluation.files import USERS_FILE
from cllm4rec_dist.evaluation.results import ResultRow, Results

NUM_USERS = 40


class Stages:
    """Stands for the commands: records them, and writes results that depend on the variant and the seed."""

    def __init__(self, fail: Callable[[str, Path], bool] = lambda name, path: False) -> None:
        self.commands: list[list[str]] = []
        self.random_backbones: list[tuple[str, int]] = []
        self.slots: list[int] = []
        self.fail = fail

    def __call__(self, name: str, *arguments: str, cell: Cell, slot: int) -> None:
        self.commands.append([name, *arguments])
        self.slots.append(slot)
        values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if name == "evaluate":
            self._evaluate(Path(arguments[arguments.index("--output") + 1]), arguments)
            return
        run = Path(json.loads(values["output"]))
        if self.fail(name, run):
            raise RuntimeError("stopped")
        run.mkdir(parents=True, exist_ok=True)
        record = RunRecord(stage=name, state="done", started=0.0, host="a", num_ranks=1, device="CPU")  # type: ignore[arg-type]
        write_record(run, record)
        lines = [{"step": step, "time": 10.0 * step, "stage": name} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _evaluate(self, folder: Path, arguments: tuple[str, ...]) -> None:
        variant, seed = folder.parent.parent.name, int(folder.parent.name.removeprefix("seed-"))
        value = (0.5 if variant == "full" else 0.3) + 0.01 * seed
        users = np.linspace(-0.1, 0.1, NUM_USERS) * (1 if variant == "full" else -1) + value
        rows = [ResultRow(name="CLLM4Rec", metrics={"recall@20": value, "ndcg@100": value / 2})]
        if "--no-baselines" not in arguments:
            rows.append(ResultRow(name="EASE", metrics={"recall@20": 0.25, "ndcg@100": 0.1}, baseline=True))
        folder.mkdir(parents=True)
        results = Results(dataset="tiny", rows=tuple(rows), num_users=NUM_USERS, seconds=1.0)
        (folder / "results.json").write_text(results.model_dump_json())
        (folder / "evaluation.json").write_text("{}")
        ids = [str(user) for user in range(NUM_USERS)]
        pl.DataFrame({"user": ids, "recall@20": users}).write_parquet(folder / USERS_FILE)

    def make_random_backbone(self, backbone: str, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        self.random_backbones.append((backbone, seed))

    @property
    def names(self) -> list[str]:
        return [command[0] for command in self.commands]


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    for stage in ("pretrain", "finetune"):
        (tmp_path / f"{stage}.yaml").write_text(f"corpus: corpus\nbackbone: decoder\noutput: runs/{stage}\n")
    return RunFiles(tmp_path / "pretrain.yaml", tmp_path / "finetune.yaml")


def cells_of(files: RunFiles, names: list[str], seeds: list[int], tmp_path: Path) -> list[Cell]:
    return make_cells(files, load_variants(names), seeds, tmp_path / "out")


def run(cells: list[Cell], files: RunFiles, stages: Stages, tmp_path: Path, num_jobs: int = 1) -> str:
    output, ranks, random = tmp_path / "out", ["--launcher", "process"], stages.make_random_backbone
    return ablate(cells, files, ranks, stages, random, output, lambda line: None, baselines=True, num_jobs=num_jobs)


def test_the_table_has_means_over_seeds_their_errors_and_a_paired_test(files: RunFiles, tmp_path: Path) -> None:
    stages = Stages()
    table = run(cells_of(files, ["full", "llm-cf"], [0, 1, 2], tmp_path), files, stages, tmp_path)
    # Seeds give .50 .51 .52: a standard deviation of .01 over sqrt(3).
    assert "| CLLM4Rec | 3 | 0.5100 ± 0.0058 | 0.2550 ± 0.0029 | – | – | 20 s |" in table
    assert "| LLM-CF | 3 | 0.3100 ± 0.0058 |" in table
    assert "| -0.2000 (-0.2383 to -0.1617), behind |" in table
    assert "| EASE |  | 0.2500 | 0.1000 |" in table
    content = json.loads((tmp_path / "out/ablation.json").read_text())
    assert content["variants"][1]["against_first"]["verdict"] == "behind"
    assert content["variants"][0]["values"]["recall@20"] == [0.5, 0.51, 0.52]
    assert (tmp_path / "out/ablation.md").read_text() == table


def test_baselines_are_fitted_once_and_cells_that_pretrain_alike_share_it(files: RunFiles, tmp_path: Path) -> None:
    stages = Stages()
    cells = cells_of(files, ["full", "llm-prerec"], [0, 1], tmp_path)
    run(cells, files, stages, tmp_path)
    assert stages.names == ["pretrain", "finetune", "evaluate", "evaluate"] * 2
    assert [command.count("--no-baselines") for command in stages.commands if command[0] == "evaluate"] == [0, 1, 1, 1]
    assert cells[1].pretrain_run == cells[0].pretrain_run != cells[2].pretrain_run
    ranked = [command[1] for command in stages.commands if command[0] == "evaluate"]
    assert ranked[:2] == [str(cells[0].finetune_run), str(cells[0].pretrain_run)]


def test_a_random_decoder_of_the_backbones_shape_for_each_seed(files: RunFiles, tmp_path: Path) -> None:
    stages = Stages()
    run(cells_of(files, ["full", "llm-scratch"], [0, 3], tmp_path), files, stages, tmp_path)
    assert stages.random_backbones == [("decoder", 0), ("decoder", 3)]
    folder = tmp_path / "out/random-backbones/seed-3"
    trained = [command for command in stages.commands if f'backbone="{folder}"' in command]
    assert [command[0] for command in trained] == ["pretrain", "finetune"]
    assert all('adapter.kind="full"' in command and "seed=3" in command for command in trained)


def test_an_interrupted_ablation_resumes_and_does_nothing_twice(files: RunFiles, tmp_path: Path) -> None:
    cells = cells_of(files, ["full", "llm-cf"], [0], tmp_path)
    stopped = Stages(fail=lambda name, run: name == "finetune" and "llm-cf" in str(run))
    with pytest.raises(RuntimeError):
        run(cells, files, stopped, tmp_path)
    assert "| CLLM4Rec | 1 | 0.5000 |" in (tmp_path / "out/ablation.md").read_text(), "the table so far is kept"
    resumed = Stages()
    table = run(cells, files, resumed, tmp_path)
    assert resumed.names == ["finetune", "evaluate"], "the evaluated cell and the ended pretraining do not run again"
    assert "| LLM-CF | 1 |" in table
    again = Stages()
    assert run(cells, files, again, tmp_path) == table
    assert again.commands == []


class Together(Stages):
    """Stages of which two must run at the same time, each in a slot of its own."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.meeting = stage, Barrier(2)
        self.used: set[int] = set()

    def __call__(self, name: str, *arguments: str, cell: Cell, slot: int) -> None:
        assert slot not in self.used
        self.used.add(slot)
        if name == self.stage:
            self.meeting.wait(timeout=60)
        super().__call__(name, *arguments, cell=cell, slot=slot)
        self.used.remove(slot)


def test_cells_that_run_at_once_have_the_same_table(files: RunFiles, tmp_path: Path) -> None:
    cells = cells_of(files, ["full", "llm-cf"], [0, 1], tmp_path)
    stages = Together("finetune")
    table = run(cells, files, stages, tmp_path, num_jobs=2)
    assert sorted(stages.names) == sorted(["pretrain", "finetune", "evaluate"] * 4)
    assert set(stages.slots) == {0, 1}
    shutil.rmtree(tmp_path / "out")
    assert run(cells, files, Stages(), tmp_path) == table


def test_the_table_does_not_read_what_another_cell_is_writing(files: RunFiles, tmp_path: Path) -> None:
    table = tmp_path / "out/ablation.md"

    class HalfWritten(Stages):
        begun = Event()

        def __call__(self, name: str, *arguments: str, cell: Cell, slot: int) -> None:
            if name == "evaluate" and cell is cells[0]:
                assert self.begun.wait(timeout=60)
            if name == "evaluate" and cell is cells[1]:
                cell.evaluation.mkdir(parents=True)
                for file in ("evaluation.json", "results.json"):
                    (cell.evaluation / file).write_text("{")
                self.begun.set()
                deadline = time.monotonic() + 60
                while not table.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                shutil.rmtree(cell.evaluation)
            super().__call__(name, *arguments, cell=cell, slot=slot)

    cells = cells_of(files, ["full", "llm-cf"], [0], tmp_path)
    assert "| LLM-CF | 1 |" in run(cells, files, HalfWritten(), tmp_path, num_jobs=2)


def test_cells_that_run_at_once_share_a_pretraining_and_a_random_decoder(files: RunFiles, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("label: other\nbackbone: random\npretrain: {batch: {users: 3}}\n")
    stages = Together("evaluate")
    names = ["full", "llm-prerec", "llm-scratch", str(tmp_path / "other.yaml")]
    run(cells_of(files, names, [0], tmp_path), files, stages, tmp_path, num_jobs=2)
    assert sorted(stages.names) == sorted(["pretrain"] * 3 + ["finetune"] * 3 + ["evaluate"] * 4)
    assert stages.random_backbones == [("decoder", 0)]


def test_after_a_failure_no_cell_starts_and_those_that_run_end(files: RunFiles, tmp_path: Path) -> None:
    class FirstFails(Stages):
        others_run, has_failed = Event(), Event()

        def __call__(self, name: str, *arguments: str, cell: Cell, slot: int) -> None:
            if cell is cells[0] and name == "finetune":
                assert self.others_run.wait(timeout=60)
                self.has_failed.set()
                raise RuntimeError("out of memory")
            if cell is cells[1] and name == "finetune":
                self.others_run.set()
                assert self.has_failed.wait(timeout=60)
            super().__call__(name, *arguments, cell=cell, slot=slot)

    cells = cells_of(files, ["full", "llm-cf"], [0, 1, 2], tmp_path)
    stages = FirstFails()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(cells, files, stages, tmp_path, num_jobs=2)
    assert cells[1].is_evaluated
    assert stages.names.count("evaluate") == 1
    assert "| LLM-CF | 1 |" in (tmp_path / "out/ablation.md").read_text()


def test_a_cell_of_other_settings_is_refused_before_anything_runs(files: RunFiles, tmp_path: Path) -> None:
    run(cells_of(files, ["full"], [0], tmp_path), files, Stages(), tmp_path)
    changed = RunFiles(files.pretrain, files.finetune, ["optimizer.lr=0.5"])
    stages = Stages()
    with pytest.raises(ConfigError, match=r"seed-0: pretrain\.optimizer\.lr: 0\.5 was 0\.001") as error:
        run(cells_of(changed, ["llm-cf", "full"], [0], tmp_path), changed, stages, tmp_path)
    assert "another --output" in str(error.value)
    assert stages.commands == []


@pytest.mark.parametrize(
    ("override", "neighbors"), [("batch.users=9", 0), ("linear.text_weight=3", 0), ("linear.neighbors=7", 7)]
)
def test_what_is_recorded_is_what_runs(files: RunFiles, tmp_path: Path, override: str, neighbors: int) -> None:
    files.finetune.write_text(files.finetune.read_text() + "linear: {neighbors: 50}\n")
    files = RunFiles(files.pretrain, files.finetune, [override])
    stages = Stages()
    run(cells_of(files, ["llm-cf", "llm-scratch"], [4], tmp_path), files, stages, tmp_path)
    trained = [command for command in stages.commands if command[0] != "evaluate"]
    assert len(trained) == 4
    for name, _, path, *arguments in trained:
        overrides = [argument for argument in arguments if "=" in argument]
        config = load_config(RunConfig, path, [*overrides, f"stage={name}"])
        folder = Path(config.output).parent
        recorded = json.loads((folder / "settings.json").read_text())[name]
        assert recorded == config.model_dump(mode="json", include=set(recorded))
        assert name == "pretrain" or config.linear.neighbors == neighbors


def test_a_variant_that_equals_another_is_left_out(files: RunFiles, tmp_path: Path) -> None:
    whole = RunFiles(files.pretrain, files.finetune, ["adapter.kind=full"])
    cells = cells_of(whole, ["full", "llm-ftall", "llm-scratch", "llm-prerec"], [0, 1], tmp_path)
    kept, duplicates = without_duplicates(cells)
    assert duplicates == {"llm-ftall": "full"}
    assert [cell.variant.name for cell in kept] == ["full", "llm-scratch", "llm-prerec"] * 2


@pytest.mark.parametrize("override", ["seed=3", "output=x", "backbone=other"])
def test_settings_that_the_ablation_decides_are_refused(files: RunFiles, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="the ablation decides"):
        cells_of(RunFiles(files.pretrain, files.finetune, [override]), ["full"], [0], tmp_path)


def test_overrides_may_give_what_the_run_files_lack(files: RunFiles, tmp_path: Path) -> None:
    for path in (files.pretrain, files.finetune):
        path.write_text(path.read_text().replace("corpus: corpus\n", ""))
    (cell,) = cells_of(RunFiles(files.pretrain, files.finetune, ["corpus=given"]), ["full"], [0], tmp_path)
    assert cell.pretrain.corpus == "given"


def test_swapped_run_files_are_refused(files: RunFiles, tmp_path: Path) -> None:
    swapped = RunFiles(files.finetune, files.pretrain)
    with files.finetune.open("a") as file:
        file.write("init_from: runs/pretrain\n")
    with pytest.raises(ConfigError, match=r"--pretrain: .*init_from.*swapped"):
        make_cells(swapped, load_variants(["full"]), [0], tmp_path)


def test_an_invalid_setting_of_any_variant_is_refused_at_once(files: RunFiles, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("label: wrong\nfinetune: {optimizer: {lr: -1}}\n")
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        cells_of(files, ["full", str(wrong)], [0], tmp_path)


def test_stages_with_rows_of_different_widths_are_refused_before_any_is_trained(
    tmp_path: Path, files: RunFiles
) -> None:
    backbone = tmp_path / "decoder"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"hidden_size": 64}')
    files.pretrain.write_text(f"{{corpus: corpus, backbone: {backbone}, output: o}}\n")
    files.finetune.write_text(f"{{corpus: corpus, backbone: {backbone}, output: o, embeddings: {{dim: 16}}}}\n")
    for names in (["full"], ["llm-scratch"]):
        with pytest.raises(ConfigError, match=r"embeddings\.dim: 16 is not that of pretraining, 64"):
            make_cells(files, load_variants(names), [0], tmp_path / "out")
    make_cells(RunFiles(files.pretrain, files.finetune, ["embeddings.dim=16"]), load_variants(["full"]), [0], tmp_path)
