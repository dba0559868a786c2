"""The recommender in use, and its replacement when the run has a better checkpoint.

A new checkpoint is loaded beside the one in use, has to answer a query, and only then takes its place; batches that run
meanwhile finish on the old one, so no request is lost. One that cannot be loaded is reported and tried again later,
with growing pauses; the old one serves on. During a change both are in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender, RunInfo

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 3600.0

Outcome = Literal["unchanged", "loaded", "failed"]


@dataclass(frozen=True)
class Served:
    """A recommender with what is looked up beside it.

    Attributes:
        items_of: item ids by category; empty where the run has no categories.
    """

    recommender: Recommender
    items_of: Mapping[str, frozenset[str]]

    def category(self, item: str) -> str | None:
        """Category of an item of the run; None where it has none."""
        categories = self.recommender.items.categories
        row = self.recommender.items.row(item)
        return None if categories is None or row is None else categories[row] or None


def _by_category(recommender: Recommender) -> dict[str, frozenset[str]]:
    items = recommender.items
    grouped: dict[str, list[str]] = {}
    for item, category in zip(items.ids, items.categories or (), strict=items.categories is not None):
        if category:
            grouped.setdefault(category, []).append(item)
    return {category: frozenset(found) for category, found in grouped.items()}


class LiveRecommender:
    """A recommender that follows its run.

    Args:
        load: reads the checkpoint at a path.
        best: path of the checkpoint to use now, and a fingerprint of its contents; None where there is none.
        path: what to load first: the run, which may fall back on an earlier checkpoint where its best is damaged.

    Attributes:
        current: what answers; a caller keeps one for as long as its request takes.

    Raises:
        CLLM4RecError: where there is nothing to start with.
    """

    def __init__(
        self, load: Callable[[str], Recommender], best: Callable[[], tuple[str, str] | None], path: str
    ) -> None:
        self._load, self._best = load, best
        found = best()
        self.current = self._ready(path)
        loaded_best = found is not None and found[0].rpartition("/")[2] == self.info.checkpoint
        self._using = found if loaded_best else None
        self._failed: tuple[str, str] | None = None
        self._failures, self._next_try = 0, 0.0
        self._last_message = ""

    @property
    def info(self) -> RunInfo:
        """What is in use."""
        return self.current.recommender.info

    def _ready(self, path: str) -> Served:
        """A recommender that has answered and searched once, so that its first request is as fast as the others."""
        recommender = self._load(path)
        recommender.answer([Query(history=tuple(recommender.items.ids[:1]), top=1)])
        recommender.items.search("a", 1)
        return Served(recommender, _by_category(recommender))

    def check(self, pause_seconds: float) -> Outcome:
        """Take up the run's best checkpoint if it is not the one in use. Blocks while it loads.

        Args:
            pause_seconds: before a checkpoint that failed is tried again; doubles each time.
        """
        try:
            found = self._best()
        except CLLM4RecError as error:
            if str(error) != self._last_message:
                logger.warning("cannot look for a new checkpoint: %s", error)
            self._last_message = str(error)
            return "unchanged"
        if found is None or found == self._using:
            return "unchanged"
        if found == self._failed and time.monotonic() < self._next_try:
            return "unchanged"
        try:
            self.current = self._ready(found[0])
        except Exception as error:  # whatever it is: the old checkpoint serves on
            self._report_failure(found, error, pause_seconds)
            return "failed"
        self._using, self._failed, self._failures = found, None, 0
        logger.info("now serving %s, step %d", found[0], self.info.step)
        return "loaded"

    def _report_failure(self, found: tuple[str, str], error: Exception, pause_seconds: float) -> None:
        self._failures = self._failures + 1 if found == self._failed else 1
        self._failed = found
        pause = min(pause_seconds * 2**self._failures, MAX_PAUSE_SECONDS)
        self._next_try = time.monotonic() + pause
        logger.error(
            "NEW CHECKPOINT NOT USED: %s (%s); step %d is served on; next try in %.0f s",
            found[0],
            error,
            self.info.step,
            pause,
            exc_info=not isinstance(error, CLLM4RecError),
        )

    async def watch(self, every_seconds: float, observe: Callable[[Outcome], object]) -> None:
        """Check for ever, in a thread; ends when it is cancelled."""
        while True:
            await asyncio.sleep(every_seconds)
            observe(await asyncio.to_thread(self.check, every_seconds))
