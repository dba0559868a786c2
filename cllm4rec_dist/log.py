"""Logging and the progress bar.

Only rank 0 shows a bar; every rank logs warnings. A Ray worker uses `tqdm_ray`, so that the driver's terminal shows one
bar. Without a terminal, progress is a log line every ten seconds, with every launcher. This module does not import
torch, so that a command can log before torch is imported.
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
"""Seconds between progress lines without a terminal."""

ReportMetrics = Callable[[dict[str, float]], None]
"""Called on every rank with the metrics of a validation and the final result; used by Ray Train."""


class ProgressBar(Protocol):
    """The interface of a progress bar."""

    def update(self, n: int = 1) -> object: ...
    def set_description(self, desc: str) -> object: ...
    def close(self) -> object: ...


class _Terminal(tqdm):
    """A tqdm that shows a new description at its next refresh."""

    def set_description(self, desc: str | None = None, refresh: bool | None = False) -> None:
        super().set_description(desc, refresh=bool(refresh))


class _Lines:
    """Progress as log lines, at most one per `LINE_SECONDS`."""

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
        """Do nothing; log lines need no clean-up."""


class _LineFormatter(logging.Formatter):
    """Formats `HH:MM:SS text`; warnings and errors, which every rank logs, as `HH:MM:SS [rank 1/2] WARNING text`."""

    def __init__(self, rank: int, size: int) -> None:
        where = f" [rank {rank}/{size}]" if size > 1 else ""
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._with_rank = logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self._with_rank.format(record) if record.levelno >= logging.WARNING else super().format(record)


class _TqdmHandler(logging.StreamHandler[Any]):
    """Writes to stderr, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup_logging(world: World | None = None) -> None:
    """Log to stderr with the time: INFO from rank 0, warnings from all ranks.

    Args:
        world: None for a command, whose ranks are other processes or not started yet.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    handler = _TqdmHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(rank, size))
    root = logging.getLogger("cllm4rec_dist")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def hide_accelerator_notice() -> None:
    """Drop DeepSpeed's warning about a missing GPU, which appears when accelerate, and so transformers, is imported."""
    logging.getLogger("DeepSpeed").addFilter(_is_no_accelerator_notice)


def _is_no_accelerator_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Setting accelerator to CPU")


def progress_bar(world: World, total: int, description: str, unit: str, done: int = 0) -> ProgressBar:
    """Return a progress bar for rank 0, or log lines if there is no terminal; hidden on other ranks."""
    if world.is_main and not world.has_terminal:
        return _Lines(total, description, unit, done)
    if world.is_main and _in_ray_worker():
        from ray.experimental import tqdm_ray  # imported only in a Ray worker

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
