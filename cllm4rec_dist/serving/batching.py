"""Dynamic batching: the next batch is whatever arrived while the model was busy.

If the model is idle, a request runs at once. If requests are queued already, the next batch waits for up to a tenth of
the last one's duration, so that clients that were just answered can join it with their next request. Otherwise clients
fall into two groups that take turns, and each waits for the other's batch. A single thread runs the model, so that
batches do not compete for the processor and the event loop stays free to accept requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from cllm4rec_dist.errors import FaultError

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")

_REFILL_RATIO = 0.1
"""Longest wait for clients that were just answered, as a fraction of the last batch's duration."""
_REFILL_CHECK_SECONDS = 0.001


class OverloadError(FaultError):
    """More concurrent requests than the service accepts."""

    def __init__(self, limit: int) -> None:
        super().__init__("requests", limit, "are being answered, and no more fit", "Send the request again later.")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.value,)


class Batcher(Generic[Q, A]):
    """Answer single queries in batches, for one event loop.

    Args:
        answer: answers a batch in the model's thread; returns an answer or an exception for each query.
        max_batch: maximum number of queries in a batch.
        max_waiting: maximum number of running and waiting queries and calls.
        observe: called with the size of every batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A | Exception]],
        max_batch: int,
        max_waiting: int,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._answer, self._max_batch, self._max_waiting, self._observe = answer, max_batch, max_waiting, observe
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._drain: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self.num_held = 0
        """Number of running and waiting queries and calls."""

    async def submit(self, query: Q) -> A:
        """Return the answer to a query.

        Raises:
            OverloadError: at once, if `max_waiting` queries and calls are pending.
            Exception: the exception that `answer` returned for this query.
        """
        self._reserve()
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._drain is None:
            self._drain = asyncio.create_task(self._run_batches())
        try:
            return await future
        finally:
            self.num_held -= 1

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the model's thread between two batches and return its result."""
        self._reserve()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, function)
        finally:
            self.num_held -= 1

    def busy_seconds(self) -> float:
        """Return the seconds since the current batch or call began; 0 if the model is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def close(self) -> None:
        """Finish pending queries and calls, then stop the thread."""
        if self._drain is not None:
            await self._drain
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _reserve(self) -> None:
        if self.num_held >= self._max_waiting:
            raise OverloadError(self._max_waiting)
        self.num_held += 1

    async def _run_batches(self) -> None:
        try:
            while batch := self._next_batch():
                started = time.monotonic()
                await self._run(batch)
                if self._waiting:
                    full = min(self._max_batch, len(self._waiting) + len(batch))
                    await self._refill(full, time.monotonic() + _REFILL_RATIO * (time.monotonic() - started))
        finally:
            self._drain = None

    async def _refill(self, full: int, deadline: float) -> None:
        """Wait until `full` queries are waiting, or for the deadline."""
        while len(self._waiting) < full and time.monotonic() < deadline:
            await asyncio.sleep(_REFILL_CHECK_SECONDS)

    def _next_batch(self) -> list[tuple[Q, asyncio.Future[A]]]:
        """Take the queries that have waited longest; drop those cancelled meanwhile."""
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if not entry[1].done():
                batch.append(entry)
        return batch

    async def _run(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        self._observe(len(batch))
        queries = [query for query, _ in batch]
        loop = asyncio.get_running_loop()
        answers: Sequence[A | Exception]
        try:
            answers = await loop.run_in_executor(self._thread, self._timed, lambda: self._answer(queries))
            assert len(answers) == len(batch)
        except Exception as error:  # fails the whole batch: each of its requests reports it
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _timed(self, function: Callable[[], T]) -> T:
        self._busy_since = time.monotonic()
        try:
            return function()
        finally:
            self._busy_since = None
