"""Curves and training time from a run's `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cllm4rec_dist.errors import DataError

Curve = tuple[list[int], list[float]]
Curves = dict[str, dict[str, Curve]]
"""Stage -> name of the logged value -> (steps, values), steps ascending."""

PAUSE_SECONDS = 3600.0
"""A longer gap between two lines is not training: the run was interrupted and resumed later."""


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("metrics file", str(path), f"cannot be read ({error})", "Give the log of a run.") from error
    lines = text.split("\n")
    # A run that is killed while it writes leaves an incomplete last line, which is ignored.
    entries = []
    for line_number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            int(entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {line_number}", line[:80], "must be a JSON object with a step", "Remove the line."
            ) from error
        entries.append(entry)
    return entries


def read_curves(metrics_files: Sequence[Path]) -> Curves:
    """Read JSON-lines training logs into curves.

    A line without a `stage` belongs to the stage of the line before. A step that was logged twice (a resumed run
    repeats the steps after its checkpoint) keeps the later value. Values that are not finite numbers are ignored.

    Raises:
        DataError: names the file and line that cannot be read.
    """
    by_step: dict[str, dict[str, dict[int, float]]] = {}
    for path in metrics_files:
        stage = path.stem
        for entry in _read_lines(path):
            stage = str(entry.get("stage", stage))
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float) and np.isfinite(value):
                    by_step.setdefault(stage, {}).setdefault(name, {})[int(entry["step"])] = float(value)
    return {
        stage: {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in named.items()}
        for stage, named in by_step.items()
    }


def training_seconds(metrics_files: Sequence[Path]) -> dict[str, float]:
    """Return the seconds from the first to the last line of each stage, without gaps longer than `PAUSE_SECONDS`.

    A stage with fewer than two lines that have a time is left out.

    Raises:
        DataError: as `read_curves`.
    """
    times: dict[str, list[float]] = {}
    for path in metrics_files:
        stage = path.stem
        for entry in _read_lines(path):
            stage = str(entry.get("stage", stage))
            moment = entry.get("time")
            if isinstance(moment, int | float) and np.isfinite(moment):
                times.setdefault(stage, []).append(float(moment))
    return {
        stage: sum(gap for before, after in pairwise(moments) if 0 < (gap := after - before) <= PAUSE_SECONDS)
        for stage, moments in times.items()
        if len(moments) > 1
    }
