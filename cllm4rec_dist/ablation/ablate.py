"""Train and evaluate the cells of an ablation, each stage by its command, and update the table after each cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, Protocol

from filelock import FileLock, Timeout

from cllm4rec_dist.ablation.cells import Cell, RunFiles
from cllm4rec_dist.ablation.table import write_table
from cllm4rec_dist.ablation.variants import Stage
from cllm4rec_dist.checkpointing.run_folder import STATUS_FILE, RunRecord
from cllm4rec_dist.config import dotted_items, path_override
from cllm4rec_dist.errors import ConfigError

SETTINGS_FILE = "settings.json"
"""Settings of a cell's stages, written when it starts."""


class RunCommand(Protocol):
    """Runs a `cllm4rec` command of a cell and raises an exception if it fails.

    Args:
        slot: 0 to `num_jobs` - 1; cells that run at once have different ones.
    """

    def __call__(self, name: str, *arguments: str, cell: Cell, slot: int) -> None: ...


def ablate(
    cells: Sequence[Cell],
    files: RunFiles,
    ranks: Sequence[str],
    run_command: RunCommand,
    make_random_backbone: Callable[[str, Path, int], None],
    output: Path,
    echo: Callable[[str], None],
    *,
    baselines: bool,
    num_jobs: int = 1,
) -> str:
    """Run all cells without an evaluation and return the table as Markdown.

    A cell that was interrupted resumes where it stopped. After a failure no other cell starts; those that run at the
    same time end first.

    Args:
        files: run files of the method.
        ranks: options of the commands that start ranks.
        make_random_backbone: writes a decoder of the shape of another one, with random weights of a seed, to a folder.
        echo: prints a line.
        baselines: fit the baselines, once, with the first cell.
        num_jobs: cells that run at once, each in a thread.

    Raises:
        ConfigError: if a cell has been trained with other settings, or another process trains here.
    """
    for cell in cells:
        _require_same_settings(cell)
    output.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(output / ".lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError("--output", str(output), "is in use by another ablation", "Wait for its end.") from None
    shared = _SharedFiles(make_random_backbone, cells)
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(num_jobs):
        slots.put(slot)
    has_failed = Event()

    def run(index: int, cell: Cell) -> bool:
        """Return True if the cell has an evaluation."""
        head = f"[{index + 1}/{len(cells)}] {cell.variant.name}, seed {cell.seed}"
        if cell.is_evaluated:
            echo(f"{head}: done before")
            return True
        slot = slots.get()
        try:
            if has_failed.is_set():
                return False
            echo(head)
            run_in_slot = partial(run_command, cell=cell, slot=slot)
            _run_cell(cell, files, ranks, run_in_slot, shared, baselines=baselines and index == 0)
        except BaseException:
            has_failed.set()
            raise
        finally:
            slots.put(slot)
        if num_jobs > 1:
            echo(f"{head}: done")
        return True

    with held, ThreadPoolExecutor(num_jobs) as executor:
        futures = {executor.submit(run, index, cell): cell for index, cell in enumerate(cells)}
        evaluated: set[Path] = set()
        for future in as_completed(futures):
            if future.exception() is None and future.result():
                evaluated.add(futures[future].folder)
                # Others may be writing their results.
                write_table([cell for cell in cells if cell.folder in evaluated], output)
    for future in futures:
        future.result()  # raises its exception
    return write_table(cells, output)


class _SharedFiles:
    """What several cells use, made by one of them while others wait.

    Attributes:
        pretraining: a lock for each pretraining run.
    """

    def __init__(self, make_random_backbone: Callable[[str, Path, int], None], cells: Sequence[Cell]) -> None:
        self._make_random_backbone, self._making = make_random_backbone, Lock()
        self.pretraining = {cell.pretrain_run: Lock() for cell in cells}

    def make_backbone(self, cell: Cell) -> None:
        """Make the cell's random decoder, if it has one that does not exist."""
        with self._making:
            if cell.variant.config.backbone == "random" and not (Path(cell.backbone) / "config.json").is_file():
                self._make_random_backbone(cell.given_backbone, Path(cell.backbone), cell.seed)


def _run_cell(
    cell: Cell,
    files: RunFiles,
    ranks: Sequence[str],
    run_command: Callable[..., None],
    shared: _SharedFiles,
    *,
    baselines: bool,
) -> None:
    """Run the commands of a cell, without stages that have ended."""
    _write_settings(cell)
    shared.make_backbone(cell)
    with shared.pretraining[cell.pretrain_run]:
        if not _is_done(cell.pretrain_run):
            run_command(*_training("pretrain", cell, files, ranks, [path_override("output", cell.pretrain_run)]))
    if cell.variant.config.ranked_by == "finetune" and not _is_done(cell.finetune_run):
        paths = [path_override("output", cell.finetune_run), path_override("init_from", cell.pretrain_run)]
        run_command(*_training("finetune", cell, files, ranks, paths))
    options = ["--output", str(cell.evaluation), *([] if baselines else ["--no-baselines"])]
    run_command("evaluate", str(cell.ranked_run), *options, *ranks)


def _training(stage: Stage, cell: Cell, files: RunFiles, ranks: Sequence[str], paths: Sequence[str]) -> list[str]:
    settings = [*files.settings(stage, cell.variant), f"seed={cell.seed}", path_override("backbone", cell.backbone)]
    return [stage, "--config", str(files.path(stage)), *settings, *paths, "--no-next", *ranks]


def _is_done(run: Path) -> bool:
    """True if a run has ended."""
    try:
        return RunRecord.model_validate_json((run / STATUS_FILE).read_text(encoding="utf-8")).state == "done"
    except (OSError, ValueError):
        return False


def _require_same_settings(cell: Cell) -> None:
    """Refuse a cell that was started with other settings."""
    path = cell.folder / SETTINGS_FILE
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError("settings of a cell", str(path), f"cannot be read ({error})", "Restore the file.") from error
    was, is_now = dict(dotted_items(before)), dict(dotted_items(cell.settings))
    # A setting that was added in a later version has its default.
    changed = [key for key, value in was.items() if json.loads(json.dumps(is_now.get(key))) != value]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{cell.folder}: {key}",
            is_now.get(key),
            f"was {was[key]!r} when this cell was trained",
            "Undo the change, give another --output, or remove the folder.",
        )


def _write_settings(cell: Cell) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(cell.settings, indent=1) + "\n"
    (cell.folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
