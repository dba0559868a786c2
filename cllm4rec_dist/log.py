"""What a run tells: logs with the rank, one progress bar, metrics as JSON lines and TensorBoard.

Only rank 0 shows a bar and writes metrics; warnings come from every rank. Inside a Ray worker the bar is Ray's own, so
that the driver's terminal shows one bar and not its redrawings. Where nobody has a terminal, progress is a log line
every ten seconds, under every launcher.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cllm4rec_dist.topology import World

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""

Report = Callable[[dict[str, float]], None]
"""Told the latest metrics at a run's milestones, on every rank alike; Ray Train listens here."""


class Bar(Protocol):
    """What the loop needs of a progress bar."""

    def update(self, n: int = 1) -> object: ...
    def set_description(self, desc: str) -> object: ...
    def close(self) -> object: ...


class _Terminal(tqdm):
    """A tqdm whose description waits for the next redrawing."""

    def set_description(self, desc: str | None = None, refresh: bool | None = False) -> None:
        super().set_description(desc, refresh=bool(refresh))


class _Lines:
    """Progress as log lines, one in `LINE_SECONDS` at most."""

    def __init__(self, total: int, description: str, unit: str, done: int) -> None:
        self._total, self._description, self._unit, self._first, self._done = total, description, unit, done, done
        self._started = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            meter = tqdm.format_meter(
                self._done,
                self._total,
                now - self._started,
                unit=self._unit,
                initial=self._first,
                bar_format="{n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}]",
            )
            logger.info("%s: %s", self._description, meter)

    def set_description(self, desc: str) -> None:
        self._description = desc

    def close(self) -> None:
        """Nothing is left on a screen."""


def setup_logging(world: World) -> None:
    """Log to stderr with time and rank: information from rank 0, warnings from all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank {world.rank}/{world.size}] %(levelname)s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger("cllm4rec_dist")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if world.is_main else logging.WARNING)


def progress_bar(world: World, total: int, description: str, unit: str, done: int = 0) -> Bar:
    """A bar on rank 0 where there is a terminal, lines where there is none; nothing on other ranks."""
    if world.is_main and not world.has_terminal:
        return _Lines(total, description, unit, done)
    if world.is_main and _in_ray_worker():
        from ray.experimental import tqdm_ray  # only where Ray is running this process

        bar = tqdm_ray.tqdm(total=total, desc=description, unit=unit)
        bar.update(done)
        return bar
    return _Terminal(
        total=total,
        desc=description,
        unit=unit,
        initial=done,
        disable=not world.is_main,
        dynamic_ncols=True,
        mininterval=0.5,
        leave=False,
    )


def _in_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


class MetricsLog:
    """Metrics of a run, appended to `metrics.jsonl` and TensorBoard on rank 0.

    Args:
        run: folder of the run.
        world: only rank 0 writes.
        first_step: lines of steps from here on, which a run wrote that then died before its next checkpoint, are
            dropped, so that the file tells one history.
    """

    def __init__(self, run: Path, world: World, first_step: int) -> None:
        self._file = None
        if world.is_main:
            run.mkdir(parents=True, exist_ok=True)
            path = run / METRICS_FILE
            part = path.with_suffix(".part")
            part.write_text("".join(_lines_until(path, first_step)), encoding="utf-8")
            part.replace(path)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; numbers also go to TensorBoard under their names."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _lines_until(path: Path, last_step: int) -> Iterator[str]:
    """Lines of steps up to `last_step`; what a dying process wrote in part is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                yield line
        except ValueError:
            continue
