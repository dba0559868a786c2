"""Ray tasks that build the shards of a corpus, on one host or several."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cllm4rec_dist.corpus.writer import RunTasks

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def ray_tasks(num_workers: int) -> Iterator[RunTasks]:
    """Provide a `map` that runs its calls as Ray tasks, `num_workers` at a time, and yields results in order.

    Arguments and results go through Ray's object store, so hosts need no shared folder. Connects to the cluster in
    RAY_ADDRESS, or starts Ray on this host.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # only if Ray tasks are used

    starts_ray = not ray.is_initialized()
    if starts_ray:
        address = os.environ.get("RAY_ADDRESS", "local")
        num_cpus = max(num_workers, os.cpu_count() or 1) if address == "local" else None
        logger.info("starting Ray for %d tasks at a time (takes about 10 s)", num_workers)
        # Errors only: Ray warns about token authentication at each start.
        ray.init(address=address, num_cpus=num_cpus, logging_level=logging.ERROR, include_dashboard=False)

    def run(function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
        task: Any = ray.remote(_call)
        shared = ray.put(function)
        pending: deque[Any] = deque()
        for argument in arguments:
            if len(pending) >= 2 * num_workers:
                yield ray.get(pending.popleft())
            pending.append(task.remote(shared, argument))
        while pending:
            yield ray.get(pending.popleft())

    try:
        yield run
    finally:
        if starts_ray:
            ray.shutdown()


def _call(function: Callable[[T], R], argument: T) -> R:
    return function(argument)
