"""Metrics of a run as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm4rec_dist.checkpointing.run_folder import METRICS_FILE
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.monitoring.trackers import BackgroundTracker


class MetricsLog:
    """Appends metrics of a run to `metrics.jsonl` and sends them to trackers, on rank 0.

    Args:
        run: folder of the run.
        world: only rank 0 writes.
        first_step: completed steps at the start. Lines of later steps, written by a process that died before its next
            checkpoint, are removed, so that each step is logged once.
        trackers: receive the numbers of each line.
    """

    def __init__(self, run: Path, world: World, first_step: int, trackers: Sequence[BackgroundTracker] = ()) -> None:
        self._file = None
        self._trackers = trackers
        if world.is_main:
            run.mkdir(parents=True, exist_ok=True)
            path = run / METRICS_FILE
            part = path.with_suffix(".part")
            part.write_text("".join(_lines_until(path, first_step)), encoding="utf-8")
            part.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _lines_until(path: Path, last_step: int) -> Iterator[str]:
    """Yield lines of steps up to `last_step`, without those that a dying process wrote in part."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                yield line
        except ValueError:
            continue
