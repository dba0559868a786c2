"""Files of a run's folder and how to read them. Does not import torch.

config.yaml      resolved configuration
status.json      stage, steps, machine and state of the run (`RunRecord`)
metrics.jsonl    one line for each step and each validation
checkpoints/     unless `checkpoint.dir` names another folder
tensorboard/, wandb/, mlflow.db    written by the trackers
.lock            locked while a run writes here
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml

from cllm4rec_dist.config import RunConfig, StrictModel
from cllm4rec_dist.config.renames import RUN_SETTINGS, require_new_keys
from cllm4rec_dist.errors import ConfigError

CONFIG_FILE = "config.yaml"
STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
EVALUATION_FILE = "evaluation.json"
"""File in the folder of an evaluation: means over users, examples, notes, configuration and fingerprints."""

CheckpointKind = Literal["step-", "best-"]
STEP: CheckpointKind = "step-"
BEST: CheckpointKind = "best-"
"""Prefixes of checkpoint names; the number of completed steps follows."""

State = Literal["starting", "running", "done", "interrupted", "failed"]


class RunRecord(StrictModel):
    """Contents of `status.json`."""

    schema_version: int = 1
    """Version of this file's format."""
    stage: Literal["pretrain", "finetune"]
    state: State
    """`interrupted`: a signal ended the run after it saved. It stays `running` if the run was killed."""
    started: float
    """Unix time of the start, or of the latest resumption."""
    ended: float | None = None
    """Unix time of the end."""
    message: str = ""
    """Why the run failed, or the signal that ended it."""
    host: str
    """Host of rank 0."""
    num_ranks: int
    device: str
    """`CPU`, or the GPU's name."""
    first_step: int = 0
    """Completed steps at the start."""
    total_steps: int = 0
    """Steps of the whole run; 0 until the corpus has been opened."""
    steps_per_epoch: int = 0


def store_url(config: RunConfig) -> str:
    """Return the folder or URL of a run's checkpoints."""
    return config.checkpoint.dir or f"{config.output}/checkpoints"


def store_of_run(path: str) -> str:
    """Return the folder or URL of the checkpoints of the run at `path`, as its configuration says.

    Raises:
        ConfigError: for a configuration that cannot be read or has settings of an earlier version.
    """
    tree = read_config(Path(path))
    require_new_keys(tree, RUN_SETTINGS, f"{path}/{CONFIG_FILE}")
    checkpoint = tree.get("checkpoint")
    folder = checkpoint.get("dir") if isinstance(checkpoint, dict) else None
    return str(folder or f"{path}/checkpoints")


def earlier_folder(folder: Path) -> Path:
    """Return a new name beside a folder that is about to be replaced and kept."""
    names = (folder.with_name(f"{folder.name}-earlier-{number}") for number in count(1))
    return next(path for path in names if not path.exists())


def is_earlier(run: Path) -> bool:
    """True for a run that was renamed by `earlier_folder`, so that its settings name the one that replaced it."""
    return re.search(r"-earlier-\d+$", run.name) is not None


def read_config(run: Path) -> dict[str, Any]:
    """Read the run's configuration as plain values; empty if there is none.

    Raises:
        ConfigError: for a file that cannot be read.
    """
    file = run / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "configuration of the run", str(file), f"is not readable YAML ({reason})", "Restore it from a copy."
        ) from None
    return tree if isinstance(tree, dict) else {}


def write_record(run: Path, record: RunRecord) -> None:
    """Replace `status.json` atomically: a reader sees the old file or the new one."""
    part = run / f".{STATUS_FILE}.part"
    part.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(run / STATUS_FILE)


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl` in order, without those that a dying process wrote in part."""
    path = run / METRICS_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def is_locked(run: Path) -> bool | None:
    """Return True while a process writes to the run's folder; None if this host cannot determine that."""
    try:
        with (run / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False  # closing the file releases the lock
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
