"""What `cllm4rec run` ends with: the data, the time, the table beside the baselines, where things are, what next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm4rec_dist.corpus.manifest import Manifest, load_manifest
from cllm4rec_dist.project.layout import Project
from cllm4rec_dist.project.pipeline import duration
from cllm4rec_dist.project.stages import Settings, read_record, stages_of

_MOST_REASONS = 5


def summarize(project: Project, settings: Settings) -> str:
    """The summary, as lines of at most 100 letters where paths allow it."""
    manifest, _ = load_manifest(str(project.corpus))
    return "\n".join(
        [*_data(manifest), *_times(project, settings), *_table(project), *_places(project), *_next(project)]
    )


def _data(manifest: Manifest) -> Iterator[str]:
    counts = manifest.num_interactions
    yield ""
    total = sum(counts.values())
    yield f"data      {manifest.num_users:,} customers, {manifest.num_items:,} items, {total:,} interactions"
    yield f"          {', '.join(f'{count:,} to {_PURPOSES.get(name, name)}' for name, count in counts.items())}"
    reasons = sorted(manifest.skipped.items(), key=lambda pair: -pair[1].count)
    for reason, found in reasons[:_MOST_REASONS]:
        yield f"          left out: {found.count:,} x {reason}"
    if len(reasons) > _MOST_REASONS:
        yield f"          left out: {len(reasons) - _MOST_REASONS} more reasons, in corpus/manifest.json"


_PURPOSES = {"train": "train", "valid": "validate", "test": "test"}


def _times(project: Project, settings: Settings) -> Iterator[str]:
    records = [(stage.name, read_record(project, stage.name)) for stage in stages_of(project, settings)]
    parts = [f"{name} {duration(record.seconds)}" for name, record in records if record is not None]
    total = sum(record.seconds for _, record in records if record is not None)
    yield f"time      {duration(total)}: {', '.join(parts)}"


def _table(project: Project) -> Iterator[str]:
    """Metrics of each model; the best of a column is marked."""
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


def _places(project: Project) -> Iterator[str]:
    yield f"model     {project.finetune_run}"
    if (project.evaluation / "report.html").is_file():
        yield f"report    {project.evaluation / 'report.html'}"
    yield f"lists     {project.recommendations} (Parquet: user, item, rank, score)"


def _next(project: Project) -> Iterator[str]:
    yield f"next      cllm4rec serve {project.folder}                        a page to try it, and a service"
    yield f"          cllm4rec recommend {project.folder} FOLDER --top 20    lists again, with other options"
    yield f"          cllm4rec export {project.folder} FOLDER                for other programs"
    yield f"          cllm4rec run {project.folder} --redo                   when the data have changed"
