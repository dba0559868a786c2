"""Log lines and the progress bar.

Only rank 0 shows a bar; warnings come from every rank. Inside a Ray worker the bar is Ray's own, so
that the driver's terminal shows one bar and not its redrawings. Where nobody has a terminal, progress is a log line
every ten seconds, under every launcher. Nothing here imports torch, so that a command can log before it does.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    from cllm4rec_dist.distributed.topology import World

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""

ReportMetrics = Callable[[dict[str, float]], None]
"""Called with the latest metrics at a run's milestones, on every rank alike; Ray Train listens here."""


class ProgressBar(Protocol):
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


class _LineFormatter(logging.Formatter):
    """`HH:MM:SS text`; `HH:MM:SS [rank 1/2] WARNING text` for warnings and worse, which every rank may give."""

    def __init__(self, rank: int, size: int) -> None:
        where = f" [rank {rank}/{size}]" if size > 1 else ""
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._loud = logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self._loud.format(record) if record.levelno >= logging.WARNING else super().format(record)


class _AboveBars(logging.StreamHandler[Any]):
    """Writes to stderr, above a progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup_logging(world: World | None = None) -> None:
    """Log to stderr with the time: information from rank 0, warnings from all, with their rank.

    Args:
        world: None for a command line, whose ranks are other processes or have not begun.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    handler = _AboveBars(sys.stderr)
    handler.setFormatter(_LineFormatter(rank, size))
    root = logging.getLogger("cllm4rec_dist")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def hide_accelerator_notice() -> None:
    """Drop DeepSpeed's warning that it found no GPU. It comes when accelerate, and so transformers, is imported."""
    logging.getLogger("DeepSpeed").addFilter(_is_no_accelerator_notice)


def _is_no_accelerator_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Setting accelerator to CPU")


def progress_bar(world: World, total: int, description: str, unit: str, done: int = 0) -> ProgressBar:
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
