"""The recommender in use, replaced when its run has a better checkpoint.

A new checkpoint is loaded while the current one serves, and replaces it after answering a test query. Running batches
finish on the old one, so no request is lost. If loading fails, the error is logged and loading is retried with
exponential backoff, while the old checkpoint keeps serving. During a change both are in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cllm4rec_dist.errors import CLLM4RecError, DataError
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender, RunInfo

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 3600.0

Outcome = Literal["unchanged", "loaded", "failed"]


@dataclass(frozen=True)
class Served:
    """A recommender with its categories.

    Attributes:
        items_of: item ids by category; empty if the run has no categories.
    """

    recommender: Recommender
    items_of: Mapping[str, frozenset[str]]

    def category(self, item: str) -> str | None:
        """Return the category of an item; None if it has none."""
        categories = self.recommender.items.categories
        row = self.recommender.items.row(item)
        return None if categories is None or row is None else categories[row] or None


def _by_category(recommender: Recommender) -> dict[str, frozenset[str]]:
    items = recommender.items
    grouped: dict[str, list[str]] = {}
    for item, category in zip(items.ids, items.categories or (), strict=items.categories is not None):
        if category:
            grouped.setdefault(category, []).append(item)
    return {category: frozenset(ids) for category, ids in grouped.items()}


class LiveRecommender:
    """A recommender that follows the best checkpoint of its run.

    Args:
        load: loads the checkpoint at a path.
        best: returns the path and a content fingerprint of the best checkpoint; None if there is none.
        path: path to load first. A run's path falls back to an earlier checkpoint if the best one is damaged.

    Attributes:
        current: recommender in use; a request keeps its reference until it is answered.

    Raises:
        CLLM4RecError: if no checkpoint can be loaded.
    """

    def __init__(
        self, load: Callable[[str], Recommender], best: Callable[[], tuple[str, str] | None], path: str
    ) -> None:
        self._load, self._best = load, best
        candidate = best()
        self.current = self._load_and_warm_up(path)
        loaded_best = candidate is not None and candidate[0].rpartition("/")[2] == self.info.checkpoint
        self._using = candidate if loaded_best else None
        self._failed: tuple[str, str] | None = None
        self._failures, self._next_try = 0, 0.0
        self._last_message = ""

    @property
    def info(self) -> RunInfo:
        """Description of the checkpoint in use."""
        return self.current.recommender.info

    def _load_and_warm_up(self, path: str) -> Served:
        """Load a recommender and warm it up with a query, a search and texts, so that its first request is fast."""
        recommender = self._load(path)
        recommender.answer([Query(history=tuple(recommender.items.ids[:1]), top=1)])
        recommender.items.search("a", 1)
        try:
            recommender.fit_texts()
        except DataError as error:
            logger.info("requests cannot have new items: %s", error)
        return Served(recommender, _by_category(recommender))

    def check(self, pause_seconds: float) -> Outcome:
        """Switch to the run's best checkpoint if it is not in use yet. Blocks while it loads.

        Args:
            pause_seconds: base delay before a failed checkpoint is retried; doubles with each failure.
        """
        try:
            candidate = self._best()
        except CLLM4RecError as error:
            if str(error) != self._last_message:
                logger.warning("cannot look for a new checkpoint: %s", error)
            self._last_message = str(error)
            return "unchanged"
        if candidate is None or candidate == self._using:
            return "unchanged"
        if candidate == self._failed and time.monotonic() < self._next_try:
            return "unchanged"
        try:
            self.current = self._load_and_warm_up(candidate[0])
        except Exception as error:  # whatever it is: the old checkpoint keeps serving
            self._report_failure(candidate, error, pause_seconds)
            return "failed"
        self._using, self._failed, self._failures = candidate, None, 0
        logger.info("now serving %s, step %d", candidate[0], self.info.step)
        return "loaded"

    def _report_failure(self, candidate: tuple[str, str], error: Exception, pause_seconds: float) -> None:
        self._failures = self._failures + 1 if candidate == self._failed else 1
        self._failed = candidate
        pause = min(pause_seconds * 2**self._failures, MAX_PAUSE_SECONDS)
        self._next_try = time.monotonic() + pause
        logger.error(
            "NEW CHECKPOINT NOT USED: %s (%s); still serving step %d; next attempt in %.0f s",
            candidate[0],
            error,
            self.info.step,
            pause,
            exc_info=not isinstance(error, CLLM4RecError),
        )

    async def watch(self, every_seconds: float, observe: Callable[[Outcome], object]) -> None:
        """Check periodically in a thread until cancelled."""
        while True:
            await asyncio.sleep(every_seconds)
            observe(await asyncio.to_thread(self.check, every_seconds))
