"""Train and evaluate the cells of an ablation, each stage by its command, and update the table after each cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
    """Runs a `cllm4rec` command and raises an exception if it fails."""

    def __call__(self, name: str, *arguments: str) -> None: ...


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
) -> str:
    """Run all cells without an evaluation and return the table as Markdown.

    A cell that was interrupted resumes where it stopped.

    Args:
        files: run files of the method.
        ranks: options of the commands that start ranks.
        make_random_backbone: writes a decoder of the shape of another one, with random weights of a seed, to a folder.
        echo: prints a line.
        baselines: fit the baselines, once, with the first cell.

    Raises:
        ConfigError: if a cell has been trained with other settings, or another process trains here.
    """
    for cell in cells:
        _require_same_settings(cell)
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError("--output", str(output), "is in use by another ablation", "Wait for its end.") from None
    with lock:
        for index, cell in enumerate(cells, start=1):
            head = f"[{index}/{len(cells)}] {cell.variant.name}, seed {cell.seed}"
            if cell.is_evaluated:
                echo(f"{head}: done before")
                continue
            echo(head)
            _write_settings(cell)
            if cell.variant.config.backbone == "random" and not (Path(cell.backbone) / "config.json").is_file():
                make_random_backbone(cell.given_backbone, Path(cell.backbone), cell.seed)
            for name, *arguments in _commands(cell, files, ranks, baselines=baselines and index == 1):
                run_command(name, *arguments)
            write_table(cells, output)
    return write_table(cells, output)


def _commands(cell: Cell, files: RunFiles, ranks: Sequence[str], *, baselines: bool) -> Iterator[list[str]]:
    """Yield the commands of a cell, without stages that have ended."""
    if not _is_done(cell.pretrain_run):
        yield _training("pretrain", cell, files, ranks, [path_override("output", cell.pretrain_run)])
    if cell.variant.config.ranked_by == "finetune" and not _is_done(cell.finetune_run):
        paths = [path_override("output", cell.finetune_run), path_override("init_from", cell.pretrain_run)]
        yield _training("finetune", cell, files, ranks, paths)
    options = ["--output", str(cell.evaluation), *([] if baselines else ["--no-baselines"])]
    yield ["evaluate", str(cell.ranked_run), *options, *ranks]


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
