"""Finding a run's checkpoints without importing torch, so that a wrong path is reported at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from cllm4rec_dist.checkpointing.increments import STATE_FILE
from cllm4rec_dist.checkpointing.run_folder import BEST, CONFIG_FILE, STEP, CheckpointKind, store_of_run
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME, load_manifest
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.suggestions import did_you_mean_path

_MOST_RUNS = 3


def find(path: str, kinds: Sequence[CheckpointKind] = (BEST, STEP)) -> tuple[Store, list[str]]:
    """Return the checkpoints at a path, the preferred one first.

    Args:
        path: a checkpoint, a run's folder, or a folder of checkpoints.
        kinds: order in a run or folder: all of the first kind, newest first, then all of the second.

    Raises:
        CheckpointError: if there is none; it says what the path is instead.
    """
    if not is_url(path) and Path(path).is_file():
        raise CheckpointError("checkpoint", path, "is neither a checkpoint nor a run: it is a file", "Give a folder.")
    parent, _, name = path.rstrip("/").rpartition("/")
    store = Store(parent or ".")
    if name and store.is_committed(name):
        return store, [name]
    for store in (Store(store_of_run(path)), Store(path)):
        names = [name for kind in kinds for name in reversed(store.names(kind))]
        if names:
            return store, names
    what, cure = _instead(path)
    raise CheckpointError("checkpoint", path, f"is neither a checkpoint nor a run with a finished one{what}", cure)


def newest_step(run: Path) -> int:
    """Return the completed steps of a run's newest checkpoint; 0 if there is none yet."""
    names = Store(store_of_run(str(run))).names(STEP)
    return int(names[-1].removeprefix(STEP)) if names else 0


def read_state(store: Store, name: str) -> dict[str, Any]:
    """Read a checkpoint's `state.json` as plain values; empty if it has none.

    Raises:
        DamagedCheckpointError: if marker or state are damaged.
        CheckpointError: if the store cannot be read.
    """
    files = store.marker(name).files
    if STATE_FILE not in files:
        return {}
    return cast(dict[str, Any], json.loads(store.fetch(name, STATE_FILE, files[STATE_FILE]).read_bytes()))


def corpus_in_project(store: Store, fingerprint: str | None) -> str | None:
    """Return the corpus with a fingerprint in the project of a run; None if there is none.

    A checkpoint records absolute paths. In a copy of a project they refer to the original, which may have changed or
    been removed. A corpus that was moved aside has another path than the recorded one.

    Args:
        store: store of the run's checkpoints.
    """
    return next((str(f) for f in folders_in_project(store, "corpus") if _fingerprint(f) == fingerprint), None)


def folders_in_project(store: Store, kind: Literal["corpus", "backbone"]) -> list[Path]:
    """Return the corpus or backbone of a run's project, then those that were moved aside; empty outside a project.

    Args:
        store: store of the run's checkpoints.
    """
    if is_url(store.url):
        return []
    checkpoints = Path(store.url).absolute()
    project = checkpoints.parents[2] if len(checkpoints.parents) > 2 else checkpoints
    if checkpoints.parent.parent.name != "runs" or not (project / "recipe.yaml").is_file():
        return []
    return [folder for folder in (project / kind, *sorted(project.glob(f"{kind}-earlier-*"))) if folder.is_dir()]


def _fingerprint(corpus: Path) -> str | None:
    """Return the fingerprint of a corpus; None if the folder is not a corpus."""
    try:
        return load_manifest(str(corpus))[1]
    except CLLM4RecError:
        return None


def _instead(path: str) -> tuple[str, str]:
    """Return the constraint and the cure for a path without checkpoints."""
    folder = Path(path)
    where = f" in {store_of_run(path)}"
    if is_url(path):
        return where, "Give a run that trained, or the folder of its checkpoints."
    if not folder.exists():
        return f"{where}: it does not exist", f"Give a run that trained.{did_you_mean_path(path) or _runs_here()}"
    if (folder / MANIFEST_NAME).is_file():
        return ": it is a corpus", f"Give a run that was trained on it.{_runs_here()}"
    if (folder / CONFIG_FILE).is_file():
        return where, "It has not written its first checkpoint: start it again, or give another run."
    if (folder / "config.json").is_file():
        return ": it is a backbone", f"Give a run that was trained with it.{_runs_here()}"
    inside = [str(run) for run in _runs_below(folder)]
    hint = f" There are {', '.join(inside)}." if inside else ""
    return where, f"Give a run that trained, or the folder of its checkpoints.{hint}"


def _runs_here() -> str:
    """Name some runs in `./runs`, as the end of a cure."""
    runs = [str(run) for run in _runs_below(Path("runs"))]
    return f" There are {', '.join(runs)}." if runs else ""


def _runs_below(folder: Path) -> Iterator[Path]:
    """Yield up to `_MOST_RUNS` runs at one or two levels below a folder."""
    runs = sorted({file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{CONFIG_FILE}")})
    yield from runs[:_MOST_RUNS]
