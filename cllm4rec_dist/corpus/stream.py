"""Which example comes when, and on which rank.

The order of an epoch is a function of (seed, epoch) alone: records are permuted, and the examples of `window` records
in a row are mixed with each other. A global batch is a range of positions in that order, and each rank takes its
contiguous part of the range. So every rank makes the same number of steps, every example comes exactly once an epoch
(the last batch of an epoch may be short), and the position is known from the number of completed optimizer steps: it
resumes anywhere, at any world size, with no state of its own. WebDataset's own splitting of shards over ranks gives
unequal steps, on which ZeRO-3 hangs.

Records are read at random from the shards and the last few are kept decoded; what a batch needs is read ahead of the
step by `ahead`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cllm4rec_dist.corpus.shards import ShardSet

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A place in the corpus.

    Attributes:
        record: index of the record.
        index: of the example in its record.
        epoch: visit, from 0.
    """

    record: int
    index: int
    epoch: int


class EpochOrder:
    """The order of all examples in each epoch.

    Args:
        record_sizes: int64 [R] examples of each record.
        seed: of the permutations.
        window: records that are mixed with each other.
    """

    def __init__(self, record_sizes: np.ndarray, seed: int, window: int) -> None:
        assert len(record_sizes)
        assert record_sizes.min() > 0
        self._sizes, self._seed, self._window = record_sizes, seed, window
        self.num_examples = int(record_sizes.sum())
        self._window_cache: tuple[tuple[int, int], np.ndarray] | None = None

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Records in the epoch's order [R], and the position at which each window starts."""
        records = np.random.default_rng([self._seed, 10, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[records])
        return records, np.concatenate([[0], ends[self._window - 1 :: self._window], ends[-1:]])

    def _mixed(self, epoch: int, window: int, records: np.ndarray) -> np.ndarray:
        """[examples of the window, 2] pairs of record and index, in the epoch's order."""
        if self._window_cache is None or self._window_cache[0] != (epoch, window):
            members = records[window * self._window : (window + 1) * self._window]
            pairs = np.concatenate(
                [np.stack([np.full(n, r), np.arange(n)], 1) for r, n in zip(members, self._sizes[members], strict=True)]
            )
            self._window_cache = (
                (epoch, window),
                np.random.default_rng([self._seed, 11, epoch, window]).permutation(pairs),
            )
        return self._window_cache[1]

    def range(self, start: int, stop: int) -> list[Example]:
        """Examples at positions [start, stop); positions go on through the epochs."""
        found: list[Example] = []
        while start < stop:
            epoch, offset = divmod(start, self.num_examples)
            records, starts = self._windows(epoch)
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            pairs = self._mixed(epoch, window, records)
            first = offset - int(starts[window])
            taken = pairs[first : first + stop - start]
            found += [Example(int(record), int(index), epoch) for record, index in taken]
            start += len(taken)
        return found


class RecordCache:
    """Decoded records, the most recently used `capacity` of them."""

    def __init__(self, shards: ShardSet, capacity: int) -> None:
        self._shards, self._capacity = shards, capacity
        self._records: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        if record in self._records:
            self._records.move_to_end(record)
        else:
            self._records[record] = self._shards.read_record(record)
            if len(self._records) > self._capacity:
                self._records.popitem(last=False)
        return self._records[record]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps that see every example once; the last one may be short."""
    return -(-num_examples // batch_size)


def batch_range(step: int, num_examples: int, batch_size: int) -> tuple[int, int]:
    """Positions of a global batch that does not cross the end of its epoch."""
    epoch, within = divmod(step, steps_per_epoch(num_examples, batch_size))
    start = epoch * num_examples + within * batch_size
    return start, min(start + batch_size, (epoch + 1) * num_examples)


def ahead(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """make(start), ..., make(stop - 1), each made by a thread while its predecessor is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        pending = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert pending is not None
            ready = pending.result()
            pending = pool.submit(make, step + 1) if step + 1 < stop else None
            yield ready
