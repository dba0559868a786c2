"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, each through its client library, on rank 0.

A tracker must neither end a run nor slow it down: each runs in a separate thread (`BackgroundTracker`), which also
opens it and which logs one warning at the first failure and then stops. The environment variables of the libraries
(WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, ...) choose destination, credentials and project. A resumed run
continues the tracker's run, whose id is kept in a file in the run's folder. Libraries are imported only if used.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from cllm4rec_dist.config import RunConfig, TrackerName, dotted_items

logger = logging.getLogger(__name__)

End = Literal["done", "interrupted", "failed"]
"""How a run ended."""
_LONGEST_QUEUE = 10_000
"""Most lines of metrics that may wait for a tracker; further ones are dropped."""
_CLOSE_SECONDS = 30.0
"""Longest wait at the end of a run for a tracker to send the remaining lines."""
_MLFLOW_STATUS = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Tracker(Protocol):
    """Receiver of the metrics of one run."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, end: End) -> None: ...


class TensorBoardTracker:
    """Writes event files to `RUN/tensorboard`. Purges steps after `first_step`, written by an earlier process."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, end: End) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to a run of Weights & Biases, with local files in `RUN/wandb`.

    Metrics are plotted against `step` instead of wandb's counter, which rejects the steps that a resumed run repeats.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # or it would prompt for a key on a terminal
        self._run = wandb.init(
            id=_kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "cllm4rec"),
            name=os.environ.get("WANDB_NAME", _run_name(run)),
            dir=str(run),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, end: End) -> None:
        self._run.finish(exit_code=0 if end == "done" else 1)


class MlflowTracker:
    """Logs to a run of MLflow, in `RUN/mlflow.db` unless MLFLOW_TRACKING_URI is set.

    Settings become parameters when the run is created; MLflow does not allow changing them later.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its store logs each table that it creates
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run}/mlflow.db")
        logging.getLogger("mlflow").setLevel(logging.WARNING)

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cllm4rec")
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            run_id = str(self._client.create_run(experiment_id, run_name=_run_name(run)).info.run_id)
            parameters = [Param(key, str(value)) for key, value in dotted_items(settings)]
            self._client.log_batch(run_id, params=parameters)
            return run_id

        self._metric = Metric
        self._id = _kept_id(run, "mlflow", create)
        try:
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException:  # the run was created on another server, or deleted
            _id_file(run, "mlflow").unlink()
            self._id = _kept_id(run, "mlflow", create)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow rejects the @ of recall@20.
        metrics = [self._metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, end: End) -> None:
        self._client.set_terminated(self._id, _MLFLOW_STATUS[end])


class BackgroundTracker:
    """Runs a tracker in a thread, so that the training loop neither waits for it nor sees its errors.

    Args:
        name: name in the warning.
        start: opens the tracker; called in the thread.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name, self._start = name, start
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | End] = queue.Queue(_LONGEST_QUEUE)
        self._dropped = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one line of metrics; it is dropped if the queue is full or the tracker has failed."""
        try:
            self._lines.put_nowait((step, values))
        except queue.Full:
            if not self._dropped and self._thread.is_alive():
                logger.warning("tracker %s is too slow: some metrics are missing there", self._name)
            self._dropped = True

    def close(self, end: End) -> None:
        """Let the tracker send the queued lines, for `_CLOSE_SECONDS` at most."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive():  # a running thread drains a full queue
            try:
                self._lines.put(end, timeout=0.2)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("tracker %s does not answer: the last metrics may be missing there", self._name)

    def _work(self) -> None:
        try:
            tracker = self._start()
            while not isinstance(line := self._lines.get(), str):
                tracker.write(*line)
            tracker.close(line)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            logger.warning(
                "tracker %s failed and gets no more metrics; the run continues (%s: %s)",
                self._name,
                type(error).__name__,
                reason,
            )


def open_trackers(config: RunConfig, run: Path, first_step: int) -> list[BackgroundTracker]:
    """Start the trackers of a run. Called on rank 0 only.

    Args:
        run: the run's folder.
        first_step: completed steps at the start.
    """
    settings = config.model_dump(mode="json")
    starts: dict[TrackerName, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(run, first_step),
        "wandb": lambda: WandbTracker(run, settings),
        "mlflow": lambda: MlflowTracker(run, settings),
    }
    return [BackgroundTracker(name, starts[name]) for name in dict.fromkeys(config.trackers)]


def _run_name(run: Path) -> str:
    """Return `demo/finetune` for `runs/demo/finetune`."""
    return f"{run.parent.name}/{run.name}"


def _id_file(run: Path, name: str) -> Path:
    return run / f"{name}.run-id"


def _kept_id(run: Path, name: str, create: Callable[[], str]) -> str:
    """Return the tracker's run id, created at the first start and kept in a file for resumed runs."""
    file = _id_file(run, name)
    if file.is_file() and (run_id := file.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = create()
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id
