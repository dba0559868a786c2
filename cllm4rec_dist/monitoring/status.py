"""Status of a run, read from its folder for `cllm4rec status`, without torch and without affecting the run.

`status.json` has the last state that the run recorded, the lock shows whether its process is alive, `metrics.jsonl` has
its progress, and the store its checkpoints. A missing or damaged file is reported, and the rest is shown.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cllm4rec_dist.checkpointing.find_run import read_state
from cllm4rec_dist.checkpointing.increments import STATE_FILE, read_base
from cllm4rec_dist.checkpointing.run_folder import (
    BEST,
    CONFIG_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    STATUS_FILE,
    STEP,
    RunRecord,
    is_earlier,
    is_locked,
    read_config,
    read_metrics,
    store_of_run,
)
from cllm4rec_dist.checkpointing.store import COMMIT, FileEntry, Store
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.monitoring.chosen import chosen_settings
from cllm4rec_dist.monitoring.next_steps import next_commands, resume_command
from cllm4rec_dist.monitoring.progress import Schedule

Condition = Literal["starting", "running", "silent", "done", "interrupted", "failed", "killed", "unknown"]
"""`silent`: alive, but no metrics for much longer than a step takes. `killed`: ended without recording why."""
_SHORTEST_SILENCE = 60.0
_LINES_OF_SILENCE = 20
"""A run is silent after this multiple of the usual time between two lines, but not before `_SHORTEST_SILENCE`."""
_STARTING_SECONDS = 900.0
"""Time that loading a large backbone may take."""
_RECENT_LINES = 200


@dataclass(frozen=True)
class Newest:
    """A checkpoint that is intact by its marker and file sizes, with its age in seconds if known."""

    name: str
    age: float | None


@dataclass
class RunStatus:
    """Status of a run; None and empty values are unknown.

    Attributes:
        updated: seconds since the last line of metrics.
        losses, tokens_per_second: from the last lines of metrics.
        eta: seconds to the end, if the run is alive.
        validation: metrics of the last validation, at `validated_step`.
        damaged: unusable checkpoints that are newer than the usable ones, or all if none is usable.
        chosen: what validation has chosen (`chosen.py`), in a finetuning run that is done.
        problems: files that are missing or cannot be read.
        next: suggested commands.
    """

    run: str
    stage: str | None = None
    condition: Condition = "unknown"
    message: str = ""
    host: str | None = None
    num_ranks: int | None = None
    device: str | None = None
    step: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    updated: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    eta: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int | None = None
    best_metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    checkpoint: Newest | None = None
    best_checkpoint: Newest | None = None
    checkpoints: str | None = None
    damaged: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)

    @property
    def schedule(self) -> Schedule | None:
        """Schedule of the run; None until its steps are known."""
        if not self.total_steps or not self.steps_per_epoch:
            return None
        return Schedule(0, self.total_steps, self.steps_per_epoch)

    @property
    def lives(self) -> bool:
        """True while the process of the run is alive."""
        return self.condition in ("starting", "running", "silent")


def read_statuses(path: str, now: float) -> list[RunStatus]:
    """Return the status of a run, or of each run of a project folder, pretraining first.

    Args:
        path: a run, one of its checkpoints, a folder of runs or of checkpoints, or a URL of checkpoints.
        now: Unix time.

    Raises:
        ConfigError: if there is no run at the path.
    """
    if is_url(path):
        return [_read_store(path, now)]
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise ConfigError("RUN", path, "is not a folder", "Give the output of a run, or a folder of runs.")
    if (folder / COMMIT).is_file() and folder.parent.name == "checkpoints":
        folder = folder.parents[1]
    if _is_run(folder):
        return [_read_run(folder, now)]
    for parent in (folder / "runs", folder):
        runs = [child for child in sorted(parent.glob("*")) if child.is_dir() and _is_run(child)]
        if runs:
            return sorted((_read_run(run, now) for run in runs), key=lambda status: status.stage != "pretrain")
    if Store(str(folder)).names(STEP) or Store(str(folder)).names(BEST):
        return [_read_store(str(folder), now)]
    raise ConfigError(
        "RUN",
        path,
        f"holds no run: neither {STATUS_FILE}, {CONFIG_FILE}, {METRICS_FILE} nor checkpoints",
        "Give the output of a run, or a folder of runs.",
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STATUS_FILE, METRICS_FILE, CONFIG_FILE, "checkpoints")) and not (
        (folder / COMMIT).exists() or (folder / "manifest.json").exists()
    )


def _read_run(run: Path, now: float) -> RunStatus:
    status = RunStatus(str(run))
    config = _read_settings(run, status)
    record = _read_record(run, status)
    if record is not None:
        status.stage, status.message, status.host = record.stage, record.message, record.host
        status.num_ranks, status.device = record.num_ranks, record.device
        status.total_steps, status.steps_per_epoch = record.total_steps or None, record.steps_per_epoch or None
    elif config.get("stage") in ("pretrain", "finetune"):
        status.stage = config["stage"]
    num_lines = _count_lines(run / METRICS_FILE)
    pace, num_read = _add_metrics(run, status, config, now)
    try:
        _add_checkpoints(Store(store_of_run(str(run))), status, now)
    except CLLM4RecError as error:
        if str(error) not in status.problems:  # the settings may have raised the same error
            status.problems.append(str(error))
    status.condition = _condition(record, is_locked(run), status, pace, now)
    status.problems += _problems_of_metrics(status, num_lines, num_read)
    if not status.lives:
        status.eta = None
    status.next = _next(status, run, has_config=bool(config))
    if status.stage == "finetune" and status.condition == "done" and status.best_checkpoint is not None:
        try:
            state = read_state(Store(store_of_run(str(run))), status.best_checkpoint.name)
            status.chosen = chosen_settings(state, status.steps_per_epoch)
        except CLLM4RecError as error:
            status.problems.append(str(error))
    return status


def _read_store(url: str, now: float) -> RunStatus:
    """Read checkpoints without a run folder, as in an object store, where it is unknown if the run is alive."""
    status = RunStatus(url)
    store = Store(url)
    _add_checkpoints(store, status, now)
    newest = status.checkpoint or status.best_checkpoint
    if newest is None:
        what = (
            f"holds only damaged checkpoints: {', '.join(status.damaged)}" if status.damaged else "holds no checkpoint"
        )
        raise ConfigError("RUN", url, what, "Give the folder or URL that checkpoint.dir names.")
    state = read_state(store, newest.name)
    if not state:
        status.problems.append(f"{newest.name} holds no {STATE_FILE}")
        return status
    run = state["run"]
    status.stage = state["config"].get("stage")
    status.best, status.best_metric, status.best_step = (run.get(key) for key in ("best", "best_metric", "best_step"))
    return status


def _read_settings(run: Path, status: RunStatus) -> dict[str, Any]:
    try:
        config = read_config(run)
    except ConfigError as error:
        status.problems.append(str(error))
        return {}
    if not config:
        status.problems.append(f"{CONFIG_FILE} is missing or empty")
    return config


def _read_record(run: Path, status: RunStatus) -> RunRecord | None:
    try:
        return RunRecord.model_validate_json((run / STATUS_FILE).read_bytes())
    except FileNotFoundError:
        status.problems.append(
            f"{STATUS_FILE} is missing: the run ended before writing it, or is of an earlier version"
        )
    except (OSError, ValidationError) as error:
        status.problems.append(f"{STATUS_FILE} cannot be read: {str(error).splitlines()[0]}")
    return None


def _count_lines(file: Path) -> int | None:
    """Number of complete lines that are not blank; None if there is no file."""
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(line.endswith(b"\n") and not line.isspace() for line in lines)


def _problems_of_metrics(status: RunStatus, num_lines: int | None, num_read: int) -> Iterator[str]:
    """Describe what is wrong with metrics, of whose `num_lines` lines `num_read` could be read."""
    if num_lines and num_read < num_lines:
        unreadable = "none can" if num_read == 0 else f"{num_lines - num_read} cannot"
        yield f"{METRICS_FILE} is damaged: of {num_lines} lines {unreadable} be read"
    elif not num_read and (status.step or status.condition == "done"):
        yield f"{METRICS_FILE} {'is missing' if num_lines is None else 'is empty'}, although steps have been taken"
    elif not num_read:
        yield f"{METRICS_FILE} holds no line: no step has been taken yet"


def _add_metrics(run: Path, status: RunStatus, config: Mapping[str, Any], now: float) -> tuple[float | None, int]:
    """Add metrics to the status. Returns the median seconds between training lines, and the number of lines read."""
    validation = config.get("validation")
    chosen = validation.get("metrics") if isinstance(validation, dict) else None
    metric = str(chosen[0]) if isinstance(chosen, list) and chosen else None
    steps: deque[dict[str, Any]] = deque(maxlen=_RECENT_LINES)
    last: dict[str, Any] = {}
    num_read = 0
    for line in read_metrics(run):
        last, num_read = line, num_read + 1
        if "loss" in line:
            steps.append(line)
        validated = {key.removeprefix("valid/"): value for key, value in _numbers(line, "valid/")}
        if not validated:
            continue
        status.validation, status.validated_step = validated, line["step"]
        value = validated.get(metric or next(iter(validated)))
        if value is not None and (status.best is None or value > status.best):
            status.best, status.best_metric, status.best_step = value, metric or next(iter(validated)), line["step"]
    if not last:
        return None, 0
    status.step = last["step"]
    if isinstance(last.get("time"), int | float):
        status.updated = max(0.0, now - last["time"])
    if not steps:
        return None, num_read
    status.losses = {key.removeprefix("loss/"): value for key, value in _numbers(steps[-1], "loss/")}
    speeds = [line["tokens_per_second"] for line in steps if isinstance(line.get("tokens_per_second"), int | float)]
    status.tokens_per_second = statistics.median(speeds) if speeds else None
    timed = [line for line in steps if isinstance(line.get("time"), int | float)]
    gaps = [later["time"] - earlier["time"] for earlier, later in zip(timed, list(timed)[1:], strict=False)]
    if not gaps:
        return None, num_read
    by_step = (timed[-1]["time"] - timed[0]["time"]) / max(1, timed[-1]["step"] - timed[0]["step"])
    if status.total_steps is not None:
        status.eta = max(0, status.total_steps - status.step) * by_step
    return statistics.median(gaps), num_read


def _numbers(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if key.startswith(prefix) and isinstance(value, int | float):
            yield key, float(value)


def _add_checkpoints(store: Store, status: RunStatus, now: float) -> None:
    status.checkpoints = store.url
    status.checkpoint = _newest_intact(store, STEP, status, now)
    status.best_checkpoint = _newest_intact(store, BEST, status, now)
    if status.checkpoint is None:
        status.damaged += store.quarantined_names(STEP)
    steps = [name.removeprefix(STEP) for name in store.names(STEP)]
    status.step = max(status.step, *(int(step) for step in steps if step.isdecimal()), 0)


def _newest_intact(store: Store, prefix: str, status: RunStatus, now: float) -> Newest | None:
    for name in reversed(store.names(prefix)):
        problem = _damage(store, name)
        if problem is None:
            written = store.modified(name)
            age = None if written is None else max(0.0, now - written.astimezone(UTC).timestamp())
            return Newest(name, age)
        if store.is_committed(name):  # otherwise the run has removed it meanwhile
            status.damaged.append(name)
            status.problems.append(f"{name} is damaged: {problem}")
    return None


def _damage(store: Store, name: str, expected: FileEntry | None = None) -> str | None:
    """Return why a checkpoint, or its base, is unusable, judged by markers and sizes; None if it seems intact."""
    try:
        unseen = store.unseen(name, store.marker(name, expected).files)
    except CheckpointError as error:
        return f"{COMMIT} {error.constraint}"
    if unseen:
        return f"{', '.join(unseen)} missing or truncated"
    try:
        base = read_base(store, name)
    except CheckpointError:
        return None  # whoever reads the state reports it
    problem = base and _damage(store, base.name, base.marker)
    return f"it needs {base.name}: {problem}" if base and problem else None


def _condition(
    record: RunRecord | None, is_held: bool | None, status: RunStatus, pace: float | None, now: float
) -> Condition:
    """Derive the condition of a run from its record, its lock and the age of its metrics."""
    if is_held is False or is_held is None:
        if record is None:
            return "unknown"
        if record.state in ("starting", "running"):
            return "killed" if is_held is False else record.state
        return record.state
    if record is None or record.state == "starting" or status.updated is None:
        began = now if record is None else record.started
        return "silent" if now - began > _STARTING_SECONDS else "starting"
    quiet = min(status.updated, now - record.started)  # the last line may be from the previous process
    patience = max(_SHORTEST_SILENCE, _LINES_OF_SILENCE * (pace or 0.0))
    return "silent" if quiet > patience else "running"


def _next(status: RunStatus, run: Path, *, has_config: bool) -> list[str]:
    """Suggested commands; none that would be rejected."""
    if status.stage is None or status.lives or status.checkpoints is None:
        return []
    if is_earlier(run) and not (status.stage == "finetune" and status.condition == "done"):
        return []  # its settings would go on with the run that replaced it
    if status.condition == "done":
        is_usable = status.checkpoint is not None or status.best_checkpoint is not None
        if not is_usable or not (has_config or status.stage == "finetune") or _has_successor(run):
            return []
        return next_commands(status.stage, run, is_evaluated=_is_evaluated(run, status))
    only_damaged = status.checkpoint is None and any(name.startswith(STEP) for name in status.damaged)
    return [resume_command(status.stage, run, status.num_ranks or 1)] if has_config and not only_damaged else []


def _has_successor(run: Path) -> bool:
    """True if a sibling run started from this one. Compares names, because a copied folder has the original's paths."""
    for file in run.parent.glob(f"*/{CONFIG_FILE}"):
        try:
            start = read_config(file.parent).get("init_from")
        except ConfigError:
            continue
        is_other = file.parent != run and not is_earlier(file.parent)
        if start is not None and is_other and Path(str(start)).name == run.name:
            return True
    return False


def _is_evaluated(run: Path, status: RunStatus) -> bool:
    """True if the run's folder has an evaluation of the checkpoint that other commands use."""
    used = status.best_checkpoint or status.checkpoint
    try:
        checkpoint = json.loads((run / "evaluation" / EVALUATION_FILE).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return used is not None and str(checkpoint).rpartition("/")[2] == used.name
