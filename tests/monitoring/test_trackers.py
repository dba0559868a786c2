"""Metrics at TensorBoard, Weights & Biases and MLflow, read back through their own clients, without a network."""

from __future__ import annotations

import importlib.util
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.monitoring import trackers
from cllm4rec_dist.monitoring.trackers import BackgroundTracker, End, open_trackers
from cllm4rec_dist.preflight import require_none, require_ready, tracker_problems

LINES = [(step, {"loss": 10.0 - step, "valid/recall@20": 0.1 * step}) for step in (1, 2, 3)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    for name in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "shop" / "finetune"
    folder.mkdir(parents=True)
    return folder


def make_config(run: Path, *names: str, **changes: Any) -> RunConfig:
    tree = {"stage": "finetune", "corpus": "-", "backbone": "-", "output": str(run), "trackers": names}
    return validate(RunConfig, tree | changes, "test")


def track(
    config: RunConfig, run: Path, lines: list[tuple[int, dict[str, float]]], end: End, first_step: int = 0
) -> None:
    opened = open_trackers(config, run, first_step)
    for step, values in lines:
        for tracker in opened:
            tracker.write(step, values)
    for tracker in opened:
        tracker.close(end)


def test_tensorboard_holds_every_number_and_purges_what_is_done_again(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(run, "tensorboard")
    track(config, run, LINES, "failed")
    track(config, run, [(2, {"loss": 7.5})], "done", first_step=1)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 7.5)]


@pytest.mark.slow
def test_mlflow_goes_on_in_its_run_and_knows_how_it_ended(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient

    config = make_config(run, "mlflow", epochs=5)
    track(config, run, LINES[:2], "interrupted")
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("cllm4rec")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("shop/finetune", "KILLED")
    assert (logged.data.params["epochs"], logged.data.params["optimizer.lr"]) == ("5", "0.001")

    # A parameter cannot be changed in MLflow; raised epochs must not break what follows.
    track(make_config(run, "mlflow", epochs=7), run, LINES[2:], "done", first_step=2)
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    for name, expected in (("loss", [9.0, 8.0, 7.0]), ("valid/recall_at_20", [0.1, 0.2, 0.3])):
        history = client.get_metric_history(logged.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3]
        assert [metric.value for metric in history] == pytest.approx(expected)

    (run / "mlflow.run-id").write_text("deleted there\n")
    track(config, run, LINES, "done")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert not [record for record in caplog.records if record.name.startswith("cllm4rec_dist")]


def wandb_history(file: Path) -> list[dict[str, str]]:
    """Read the metrics from a file that `wandb sync` would send: protobuf in the records of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    rows, at, whole = [], 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
    return rows


@pytest.mark.slow
def test_wandb_writes_offline_and_goes_on_under_one_id(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(run, "wandb", epochs=5)
    track(config, run, LINES[:2], "interrupted")
    kept = (run / "wandb.run-id").read_text().strip()
    time.sleep(1.1)  # its folders are named by seconds
    track(config, run, LINES[2:], "done", first_step=2)
    assert (run / "wandb.run-id").read_text().strip() == kept
    files = sorted(run.glob(f"wandb/offline-run-*-{kept}/run-{kept}.wandb"))
    assert len(files) == 2

    deadline = time.monotonic() + 20  # the process of wandb may write the last bytes after `finish`
    while len(rows := [row for file in files for row in wandb_history(file)]) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert not caplog.records


class Broken:
    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise OSError("no route to host\nand more")

    def close(self, end: End) -> None:
        raise AssertionError("is not reached")


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker("wandb", Broken)
    for step in range(50):
        tracker.write(step, {})
    tracker.close("done")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "tracker wandb failed and gets no more metrics; the run continues (OSError: no route to host)"
    )


def test_a_tracker_that_hangs_slows_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_LONGEST_QUEUE", 5)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.3)
    released = threading.Event()

    def start() -> Broken:
        released.wait(30)
        raise OSError("late")

    started = time.monotonic()
    tracker = BackgroundTracker("mlflow", start)
    for step in range(1000):
        tracker.write(step, {})
    tracker.close("done")
    assert time.monotonic() - started < 5
    assert [record.getMessage() for record in caplog.records] == [
        "tracker mlflow is too slow: some metrics are missing there",
        "tracker mlflow does not answer: the last metrics may be missing there",
    ]
    released.set()


def test_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = ("wandb", "sqlalchemy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracker_problems(["tensorboard"]) == []
    with pytest.raises(ConfigError) as caught:
        require_none(tracker_problems(["wandb", "wandb"]), "run")
    assert str(caught.value) == (
        "trackers: 'wandb' needs wandb, which is not installed. pip install 'cllm4rec_dist[wandb]', or leave wandb out"
        " of trackers."
    )
    assert "sqlalchemy" in str(tracker_problems(["mlflow"])[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracker_problems(["mlflow"]) == []


def test_a_run_is_refused_for_it_before_it_starts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'cllm4rec_dist\[wandb\]'"):
        require_ready(make_config(run, "wandb"))


def test_unknown_trackers_are_refused_and_none_may_be_named(run: Path) -> None:
    assert open_trackers(make_config(run), run, 0) == []
    with pytest.raises(ConfigError, match="trackers"):
        make_config(run, "comet")
