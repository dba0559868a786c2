"""Summary at the end of `cllm4rec run`: data, time, metrics next to the baselines, paths and next commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm4rec_dist.corpus.manifest import Manifest, load_manifest
from cllm4rec_dist.project.layout import Project
from cllm4rec_dist.project.pipeline import duration
from cllm4rec_dist.project.stages import Settings, read_record, stages_of

_MAX_REASONS = 5
_WIDEST_COMMAND = 60
"""Width of the column of commands; the reason of a longer one follows it."""


def summarize(project: Project, settings: Settings, command_line: str) -> str:
    """Return the summary, in lines of at most 100 characters if paths allow it.

    Args:
        command_line: the `run` command with its overrides, without `--redo`.
    """
    manifest, _ = load_manifest(str(project.corpus))
    parts = [_data(manifest), _times(project, settings), _table(project), _paths(project), _unchosen(settings)]
    return "\n".join([line for part in parts for line in part] + _next(project, command_line))


def _data(manifest: Manifest) -> Iterator[str]:
    counts = manifest.num_interactions
    yield ""
    num_customers = manifest.num_users + manifest.num_new_users
    total = sum(counts.values()) + sum(manifest.num_new_interactions.values())
    yield f"data      {num_customers:,} customers, {manifest.num_items:,} items, {total:,} interactions"
    yield f"          {', '.join(f'{count:,} to {_PURPOSES.get(name, name)}' for name, count in counts.items())}"
    if manifest.num_new_users:
        parts = ", ".join(f"{n:,} {_NEW_PURPOSES.get(name, name)}" for name, n in manifest.num_new_interactions.items())
        yield f"          {manifest.num_new_users:,} of these customers are held out whole: {parts}"
    reasons = sorted(manifest.skipped.items(), key=lambda pair: -pair[1].count)
    for reason, skipped in reasons[:_MAX_REASONS]:
        yield f"          left out: {skipped.count:,} x {reason}"
    if len(reasons) > _MAX_REASONS:
        yield f"          left out: {len(reasons) - _MAX_REASONS} more reasons, in corpus/manifest.json"


_PURPOSES = {"train": "train", "valid": "validate", "test": "test"}
_NEW_PURPOSES = {"history": "shown as their history", "valid": "to validate", "test": "to test"}


def _times(project: Project, settings: Settings) -> Iterator[str]:
    records = [(stage.name, read_record(project, stage.name)) for stage in stages_of(project, settings)]
    parts = [f"{name} {duration(record.seconds)}" for name, record in records if record is not None]
    total = sum(record.seconds for _, record in records if record is not None)
    yield f"time      {duration(total)}: {', '.join(parts)}"


def _table(project: Project) -> Iterator[str]:
    """Yield the metrics of each model; the best in a column is marked."""
    rows = _results(project.evaluation / "results.json")
    if not rows:
        return
    names = [name for name in rows[0]["metrics"] if all(name in row["metrics"] for row in rows)]
    best = {name: max(row["metrics"][name] for row in rows) for name in names}
    width = max(len(row["name"]) for row in rows)
    yield ""
    yield f"          {'':<{width}}" + "".join(f"{name:>13}" for name in names)
    for row in rows:
        values = ((row["metrics"][name], "*" if row["metrics"][name] == best[name] else " ") for name in names)
        yield f"          {row['name']:<{width}}" + "".join(f"{value:>12.3f}{mark}" for value, mark in values)
    yield ""


def _results(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if isinstance(row["name"], str) and isinstance(row["metrics"], dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _paths(project: Project) -> Iterator[str]:
    yield f"model     {project.finetune_run}"
    if (project.evaluation / "report.html").is_file():
        yield f"report    {project.evaluation / 'report.html'}"
    yield f"lists     {project.recommendations} (Parquet: user, item, rank, score)"


def _unchosen(settings: Settings) -> Iterator[str]:
    """Yield what the lists lack because nothing was held out to choose it."""
    validation, linear = settings.finetune.validation, settings.finetune.linear
    if validation.every_epochs == 0 and linear.neighbors and linear.weight is None:
        yield "          without the linear memory: its weight is chosen on validation, or given (docs/linear.md)"


def _next(project: Project, command_line: str) -> list[str]:
    folder = shlex.quote(str(project.folder))
    commands = {
        f"cllm4rec serve {folder}": "a page to try it, and a service",
        f"cllm4rec recommend {folder} FOLDER --top 20": "lists again, with other options",
        f"cllm4rec export {folder} FOLDER": "for other programs",
        f"{command_line} --redo": "when the data have changed",
    }
    width = min(_WIDEST_COMMAND, max(map(len, commands)))
    heads = ["next", "", "", ""]
    return [f"{head:<10}{line:<{width}}  {why}" for head, (line, why) in zip(heads, commands.items(), strict=True)]
