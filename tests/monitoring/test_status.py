"""What `cllm4rec status` says of runs that live, ended, died, or left damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from cllm4rec_dist.checkpointing.run_folder import LOCK_FILE, RunRecord, read_metrics, write_record
from cllm4rec_dist.checkpointing.store import COMMIT, Store
from cllm4rec_dist.cli import app
from cllm4rec_dist.cli import status as status_command
from cllm4rec_dist.errors import ConfigError, DamagedCheckpointError
from cllm4rec_dist.monitoring.status import RunStatus, read_statuses
from cllm4rec_dist.monitoring.status_text import format_status

NOW = 1_000_000.0
STARTED = NOW - 100


def make_record(**changes: Any) -> RunRecord:
    record = RunRecord(
        stage="finetune",
        state="running",
        started=STARTED,
        host="host-1",
        num_ranks=2,
        device="CPU",
        total_steps=120,
        steps_per_epoch=10,
    )
    return record.model_copy(update=changes)


def make_run(run: Path, steps: int = 46, record: RunRecord | None = None) -> Path:
    """A run that took a step every two seconds and validated every ten steps, best at the second time."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("stage: finetune\nvalidation: {metrics: [ndcg@100, recall@20]}\n")
    write_record(run, record or make_record())
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        at = NOW - 3 - 2 * (steps - step)
        losses = {"loss": 9.6, "loss/items": 4.6, "loss/text": 5.0, "loss/mutual": 5e-5}
        lines.append({"step": step, "time": at, "epoch": step // 10, **losses, "tokens_per_second": 9000.0 + step})
        if step % 10 == 0:
            value = 0.5 if step == 20 else 0.4
            lines.append(
                {"step": step, "time": at, "epoch": 0, "valid/ndcg@100": value, "valid/recall@20": 0.9 - value}
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = Store(f"{run}/checkpoints")
    for name in ("step-00000040", "best-00000020"):
        store.commit(name, {"state.json": store.write(name, "state.json", lambda path: path.write_text("{}"))})
    return run


def read(run: Path) -> RunStatus:
    (status,) = read_statuses(str(run), NOW)
    return status


def rows_of(status: RunStatus) -> dict[str, str]:
    _, *lines = format_status(status).splitlines()
    return {line[:13].strip() or "and": line[13:].strip() for line in lines}


def test_a_run_that_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with FileLock(run / LOCK_FILE):
        status = read(run)
    assert (status.condition, status.eta, status.updated, status.problems, status.next) == ("running", 148, 3, [], [])
    text = format_status(status)
    assert text.splitlines()[0] == f"{run}: finetune is running"
    rows = rows_of(status)
    assert rows["machine"] == "2 ranks on CPU, rank 0 on host-1"
    assert rows["progress"] == "epoch 5 of 12, step 46 of 120 (38%)"
    assert rows["speed"] == "9,024 tokens/s, 2 min 28 s to go"
    assert rows["loss"] == "9.600 (items 4.600, text 5.000, mutual 5.0e-05)"
    assert rows["validation"] == "ndcg@100 0.4000, recall@20 0.5000 at step 40"
    assert rows["best"] == "ndcg@100 0.5000 at epoch 2 of 12 (step 20)"
    assert rows["checkpoint"].startswith("step-00000040")
    assert rows["and"].startswith("best-00000020")
    assert rows["updated"] == "3 s ago"


def test_looking_at_a_run_does_not_take_its_lock(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    read(run)
    with FileLock(run / LOCK_FILE, timeout=0):
        assert read(run).condition == "running"


@pytest.mark.parametrize(
    ("record", "condition", "sentence"),
    [
        (make_record(state="done", ended=NOW - 3), "done", "is done"),
        (make_record(state="interrupted", message="SIGTERM"), "interrupted", "was interrupted and has saved"),
        (make_record(state="failed", message="step 46: loss is not finite"), "failed", "has failed"),
        (make_record(), "killed", "ended without recording why"),
        (make_record(state="starting", total_steps=0, steps_per_epoch=0), "killed", "ended without recording why"),
    ],
)
def test_a_run_that_ended_says_how_and_how_to_go_on(
    tmp_path: Path, record: RunRecord, condition: str, sentence: str
) -> None:
    run = make_run(tmp_path / "run", record=record)
    status = read(run)
    assert status.condition == condition
    assert status.eta is None
    text = format_status(status)
    assert sentence in text.splitlines()[0]
    assert record.message in text
    if condition == "done":
        assert status.next == [f"cllm4rec evaluate {run}", f"cllm4rec serve {run}"]
    else:
        assert status.next == [f"cllm4rec finetune -c {run}/config.yaml --workers 2"]
        assert rows_of(status)["resume"] == status.next[0]


def test_a_run_is_silent_after_many_times_its_usual_time_between_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", record=make_record(started=NOW - 10_000))
    with FileLock(run / LOCK_FILE):
        for later, condition in ((50, "running"), (70, "silent")):  # a line every 2 s: at least a minute
            (status,) = read_statuses(str(run), NOW + later)
            assert status.condition == condition
        write_record(run, make_record(started=NOW + 60))  # started again, and no line yet
        assert read_statuses(str(run), NOW + 70)[0].condition == "running"


def test_a_run_that_loads_its_backbone_is_starting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_record(run, make_record(state="starting", total_steps=0, steps_per_epoch=0))
    with FileLock(run / LOCK_FILE):
        assert read(run).condition == "starting"
        assert read_statuses(str(run), NOW + 1000)[0].condition == "silent"
        assert "no step has been taken yet" in format_status(read(run))


DAMAGE = [
    ("status.json", "", "status.json cannot be read"),
    ("status.json", "{", "status.json cannot be read"),
    ("status.json", '{"stage": 3}', "status.json cannot be read"),
    ("status.json", None, "status.json is missing"),
    ("config.yaml", "a: [", "is not readable YAML"),
    ("config.yaml", "- 1", "config.yaml is missing or empty"),
    ("config.yaml", "checkpoint: 3\nvalidation: [1]\n", ""),
    ("config.yaml", "checkpoint: {dir: 'nosuch://x'}", "is on no supported file system"),
    ("config.yaml", None, "config.yaml is missing"),
    ("metrics.jsonl", "", "metrics.jsonl is empty, although steps have been taken"),
    ("metrics.jsonl", "x\n[]\n3\n\n" + '{"step": "a"}\n', "metrics.jsonl is damaged: of 4 lines none can be read"),
    ("metrics.jsonl", 'x\n{"step": 3}\n{"st', "metrics.jsonl is damaged: of 2 lines 1 cannot be read"),
    ("metrics.jsonl", '{"step": 3, "time": "x", "loss": null, "loss/items": "a"}\n{"step": 4, "lo', ""),
    ("metrics.jsonl", None, "metrics.jsonl is missing, although steps have been taken"),
    ("checkpoints/step-00000040/COMMIT.json", None, ""),
    ("checkpoints/step-00000040/COMMIT.json", "x", "step-00000040 is damaged: COMMIT.json is not readable"),
    ("checkpoints/step-00000040/COMMIT.json", "{}", "step-00000040 is damaged: COMMIT.json is not readable"),
    ("checkpoints/step-00000040/state.json", None, "step-00000040 is damaged: state.json missing or truncated"),
]


@pytest.mark.parametrize(("file", "content", "note"), DAMAGE)
def test_damaged_files_are_said_and_the_rest_is_shown(
    tmp_path: Path, file: str, content: str | None, note: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    status = read(run)
    text = format_status(status)
    assert note in text
    assert "no step has been taken" not in text
    assert status.step in (4, 40, 46)
    assert len(status.problems) == len(set(status.problems)) == bool(note)


def spoil_markers(run: Path) -> None:
    for marker in run.glob(f"checkpoints/*/{COMMIT}"):
        marker.write_text("x")


def spoil_steps(run: Path) -> None:
    (run / "checkpoints/step-00000040" / COMMIT).write_text("x")


def set_steps_aside(run: Path) -> None:
    Store(f"{run}/checkpoints").quarantine("step-00000040")


def spoil_config(run: Path) -> None:
    (run / "config.yaml").write_text("a: [")


def remove_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


@pytest.mark.parametrize(
    ("spoil", "state", "num_next", "checkpoint"),
    [
        (spoil_markers, "done", 0, "none that is intact in "),
        (remove_checkpoints, "done", 0, "none in "),
        (spoil_config, "done", 0, None),
        (spoil_steps, "done", 2, "best-00000020"),
        (spoil_markers, "failed", 0, "none that is intact in "),
        (spoil_steps, "failed", 0, "best-00000020"),
        (set_steps_aside, "failed", 0, "best-00000020"),
        (remove_checkpoints, "failed", 1, "none in "),  # it starts anew
        (spoil_config, "failed", 0, None),
    ],
)
def test_no_command_is_named_that_would_be_refused(
    tmp_path: Path, spoil: Callable[[Path], None], state: str, num_next: int, checkpoint: str | None
) -> None:
    run = make_run(tmp_path / "run", record=make_record(state=state))
    spoil(run)
    status = read(run)
    rows = rows_of(status)
    assert len(status.next) == num_next
    assert checkpoint is None or any(rows.get(label, "").startswith(checkpoint) for label in ("checkpoint", "and"))
    assert len(status.problems) == len(set(status.problems))


def test_a_living_run_without_a_checkpoint_has_none_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    remove_checkpoints(run)
    with FileLock(run / LOCK_FILE):
        assert rows_of(read(run))["checkpoint"].startswith("none yet in ")


def test_a_line_without_an_end_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}')
    assert list(read_metrics(tmp_path)) == [{"step": 3}]


def test_a_project_shows_both_stages(tmp_path: Path) -> None:
    make_run(tmp_path / "shop/runs/finetune", record=make_record(state="done"))
    make_run(tmp_path / "shop/runs/pretrain", record=make_record(stage="pretrain", state="done"))
    (tmp_path / "shop/finetune.yaml").write_text(f"init_from: {tmp_path}/shop/runs/pretrain\n")
    for path in ("shop", "shop/runs"):
        statuses = read_statuses(str(tmp_path / path), NOW)
        assert [status.stage for status in statuses] == ["pretrain", "finetune"]
    assert statuses[0].next == [
        f"cllm4rec finetune -c {tmp_path}/shop/finetune.yaml init_from={tmp_path}/shop/runs/pretrain"
    ]


def test_what_has_been_done_is_not_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "shop/runs/finetune", record=make_record(state="done"))
    before = make_run(tmp_path / "shop/runs/pretrain", record=make_record(stage="pretrain", state="done"))
    with (run / "config.yaml").open("a") as file:
        file.write(f"init_from: {before}\n")
    (run / "evaluation").mkdir()
    evaluation = run / "evaluation/evaluation.json"
    evaluation.write_text(json.dumps({"checkpoint": f"{run}/checkpoints/best-00000010"}))
    pretrain, finetune = read_statuses(str(tmp_path / "shop"), NOW)
    assert pretrain.next == [], "the finetuning has started from it"
    assert finetune.next == [f"cllm4rec evaluate {run}", f"cllm4rec serve {run}"], (
        "an evaluation of an earlier checkpoint"
    )
    evaluation.write_text(json.dumps({"checkpoint": f"{run}/checkpoints/best-00000020"}))
    assert read(run).next == [f"cllm4rec serve {run}"]


def test_a_run_that_was_replaced_and_kept_suggests_nothing_that_would_go_on_with_the_new_one(tmp_path: Path) -> None:
    runs = tmp_path / "shop/runs"
    before = make_run(runs / "pretrain", record=make_record(stage="pretrain", state="done"))
    ends = ("done", "pretrain"), ("interrupted", "pretrain"), ("failed", "finetune")
    for number, (state, stage) in enumerate(ends):
        kept = make_run(runs / f"{stage}-earlier-{number}", record=make_record(stage=stage, state=state))
        assert read(kept).next == []
    tuned = make_run(runs / "finetune-earlier-9", record=make_record(state="done"))
    with (tuned / "config.yaml").open("a") as file:
        file.write(f"init_from: {before}\n")
    assert read(tuned).next == [f"cllm4rec {command} {tuned}" for command in ("evaluate", "serve")]
    (command,) = read(before).next
    assert command.startswith("cllm4rec finetune"), "the kept finetuning started from the run that was replaced"


def test_what_validation_has_chosen_is_shown_as_settings(tmp_path: Path) -> None:
    """A run that is trained on everything cannot choose them (docs/linear.md)."""
    run = make_run(tmp_path / "run", record=make_record(state="done"))
    state = {
        "run": {"step": 30, "linear_weight": 42.49627, "new_item_offset": -2.75},
        "linear": {"text_weight": 10.0, "regularization": 100.0, "history_power": 0.25, "dropout": 0.0},
    }
    store, name = Store(f"{run}/checkpoints"), "best-00000030"
    content = json.dumps(state)
    store.commit(name, {"state.json": store.write(name, "state.json", lambda path: path.write_text(content))})
    linear = "linear.weight=42.4963 linear.text_weight=10 linear.regularization=100 linear.history_power=0.25"
    assert rows_of(read(run))["chosen"] == f"epochs=3 {linear} linear.dropout=0 head.new_item_offset=-2.75"
    write_record(run, make_record(state="interrupted"))
    assert "chosen" not in rows_of(read(run))
    write_record(run, make_record(state="done"))
    Path(store.path(name), "state.json").write_text(content.replace("42", "43"))  # of the same size
    status = read(run)
    assert (status.chosen, len(status.problems)) == ([], 1)
    assert "is not what was committed" in status.problems[0]


def test_an_untrained_project_names_the_next_command(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "finetune.yaml"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"without a trained run yet. `cllm4rec run {tmp_path}`"):
        CliRunner().invoke(app, ["status", str(tmp_path)], catch_exceptions=False)


def test_a_checkpoint_of_a_run_means_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert read(run / "checkpoints/step-00000040").run == str(run)


def test_checkpoints_at_a_url_say_what_they_know(tmp_path: Path) -> None:
    store = Store(f"{tmp_path}/bucket")
    run = {"step": 40, "best": 0.5, "best_metric": "ndcg@100", "best_step": 20}
    state = json.dumps({"run": run, "config": {"stage": "finetune"}})
    for name in ("step-00000040", "best-00000020"):
        store.commit(name, {"state.json": store.write(name, "state.json", lambda path: path.write_text(state))})
    for path in (f"file://{tmp_path}/bucket", f"{tmp_path}/bucket"):
        (status,) = read_statuses(path, NOW)
        assert (status.condition, status.stage, status.step, status.best) == ("unknown", "finetune", 40, 0.5)
        assert rows_of(status)["best"] == "ndcg@100 0.5000 at step 20"
    content = (tmp_path / "bucket/step-00000040/state.json").read_bytes()
    (tmp_path / "bucket/step-00000040/state.json").write_text("{}")
    (status,) = read_statuses(f"file://{tmp_path}/bucket", NOW)
    assert (status.damaged, status.best) == (["step-00000040"], 0.5)
    (tmp_path / "bucket/step-00000040/state.json").write_bytes(b"x" * len(content))
    with pytest.raises(DamagedCheckpointError):
        read_statuses(f"file://{tmp_path}/bucket", NOW)
    for name in ("step-00000040", "best-00000020"):
        (tmp_path / "bucket" / name / COMMIT).write_text("x")
    with pytest.raises(ConfigError, match="holds only damaged checkpoints: step-00000040, best-00000020"):
        read_statuses(f"file://{tmp_path}/bucket", NOW)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Give the output of a run"):
        read_statuses(str(tmp_path / name), NOW)


def test_the_command_prints_text_or_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", record=make_record(state="done"))
    result = CliRunner().invoke(app, ["status", str(run)])
    assert result.exit_code == 0
    assert "finetune is done" in result.stdout
    (actual,) = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).stdout)
    assert (actual["condition"], actual["step"], actual["best"]) == ("done", 46, 0.5)
    assert actual["checkpoint"]["name"] == "step-00000040"
    followed = CliRunner().invoke(app, ["status", str(run), "--follow"])  # ends at once: nothing lives
    assert len(followed.stdout.splitlines()) == len(result.stdout.splitlines())


def test_a_run_is_followed_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    with FileLock(run / LOCK_FILE):
        before = read(run)
    states = [before, replace(before), replace(before, step=47, eta=146), replace(before, step=47, condition="done")]
    looks = iter([[state] for state in states])
    monkeypatch.setattr(status_command, "read_statuses", lambda path, now: next(looks))
    monkeypatch.setattr(status_command, "_FOLLOW_SECONDS", 0.0)
    lines = CliRunner().invoke(app, ["status", str(run), "--follow"]).stdout.splitlines()
    middle = "loss 9.600 (items 4.600, text 5.000, mutual 5.0e-05)  ndcg@100 0.4000, recall@20 0.5000"
    assert lines[-3:] == [
        f"finetune running  epoch 5/12  step 46/120  {middle}  ETA 2 min 28 s",
        f"finetune running  epoch 5/12  step 47/120  {middle}  ETA 2 min 26 s",
        f"finetune done  epoch 5/12  step 47/120  {middle}  ETA 2 min 28 s",
    ]


def test_looking_needs_no_torch() -> None:
    code = "import sys, cllm4rec_dist.cli, cllm4rec_dist.monitoring.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
