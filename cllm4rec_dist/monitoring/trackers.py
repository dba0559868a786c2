"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, each through its own client on rank 0.

A tracker that fails must neither end a run nor slow it: each works in a thread of its own (`BackgroundTracker`), which
opens it, too, and after its first failure is silent but for one warning. Where a tracker sends its data, with which
credentials and under which project is decided by the library's own variables (WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, ...). A run that is resumed goes on in the tracker's run of before, whose id is a file in the run's
folder. Libraries are imported only where they are used.
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
"""Lines of metrics that wait for a tracker at most; what comes while so many wait is dropped."""
_CLOSE_SECONDS = 30.0
"""How long the end of a run waits for what a tracker has not sent yet."""
_MLFLOW_STATUS = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, end: End) -> None: ...


class TensorBoardTracker:
    """Event files in `RUN/tensorboard`. Steps after `first_step` of an earlier process are purged."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, end: End) -> None:
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; its local files are in `RUN/wandb`.

    Metrics have the axis `step` instead of wandb's own counter, which refuses the steps that a resumed run repeats.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # else it would ask for a key on a terminal
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
    """A run of MLflow, in `RUN/mlflow.db` where MLFLOW_TRACKING_URI names no other place.

    Settings become parameters when the run is made; MLflow lets none be changed later.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its store tells of each table that it makes
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run}/mlflow.db")
        logging.getLogger("mlflow").setLevel(logging.WARNING)

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cllm4rec")
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            created = str(self._client.create_run(number, run_name=_run_name(run)).info.run_id)
            parameters = [Param(key, str(value)) for key, value in dotted_items(settings)]
            self._client.log_batch(created, params=parameters)
            return created

        self._metric = Metric
        self._id = _kept_id(run, "mlflow", create)
        try:
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException:  # made at another place, or deleted there
            _id_file(run, "mlflow").unlink()
            self._id = _kept_id(run, "mlflow", create)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow refuses the @ of recall@20.
        metrics = [self._metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, end: End) -> None:
        self._client.set_terminated(self._id, _MLFLOW_STATUS[end])


class BackgroundTracker:
    """Runs a tracker in a thread, so that the training loop neither waits for it nor meets its errors.

    Args:
        name: for the warning.
        start: opens the tracker, in the thread.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name, self._start = name, start
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | End] = queue.Queue(_LONGEST_QUEUE)
        self._dropped = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over one line of metrics; dropped where the tracker has failed or is far behind."""
        try:
            self._lines.put_nowait((step, values))
        except queue.Full:
            if not self._dropped and self._thread.is_alive():
                logger.warning("tracker %s is too slow: some metrics are missing there", self._name)
            self._dropped = True

    def close(self, end: End) -> None:
        """Let the tracker send what it has, for `_CLOSE_SECONDS` at most."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive():  # a full queue is emptied by a thread that lives
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
                "tracker %s failed and gets no more metrics; the run goes on (%s: %s)",
                self._name,
                type(error).__name__,
                reason,
            )


def open_trackers(config: RunConfig, run: Path, first_step: int) -> list[BackgroundTracker]:
    """Start the trackers of a run. Called on rank 0 alone.

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
    """`demo/finetune` for `runs/demo/finetune`."""
    return f"{run.parent.name}/{run.name}"


def _id_file(run: Path, name: str) -> Path:
    return run / f"{name}.run-id"


def _kept_id(run: Path, name: str, create: Callable[[], str]) -> str:
    """The id of the run at a tracker, made at the first start and kept for those that resume it."""
    file = _id_file(run, name)
    if file.is_file() and (kept := file.read_text(encoding="utf-8").strip()):
        return kept
    created = create()
    file.write_text(created + "\n", encoding="utf-8")
    return created
