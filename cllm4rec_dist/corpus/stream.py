"""The order of examples, and reading them from shards.

The order of an epoch is a function of (seed, epoch) alone: records are permuted, and the examples of `window`
consecutive records are shuffled together. A global batch is a range of positions in that order. So every rank makes the
same number of steps, every example comes exactly once an epoch (the last batch of an epoch may be short), and the
position follows from the number of completed optimizer steps: a run resumes at any step and world size without a saved
sampler state. WebDataset splits shards over ranks into unequal numbers of steps, on which ZeRO-3 hangs. `loader.py`
decides which rank reads which examples of a global batch.

Records are read and concatenated a window at a time, so that a batch is made with operations on whole arrays.
`prefetch` makes the next batch while a step runs.

Legend: R records, n examples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import ShardSet

T = TypeVar("T")
_FIRST_ROW = "first_row"
"""Column of a window with a value for each of its records: the index of the record's first example."""


@dataclass(frozen=True)
class Examples:
    """n examples in the order of the stream, as named columns.

    Attributes:
        columns: [n] by name: `records` and `indexes` (of an example in its record), `epochs`, `windows` (numbered
            through all epochs), and those added with `with_columns`.
    """

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self["records"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, which: np.ndarray | slice) -> Examples:
        """Select examples by index, mask or slice."""
        return Examples({name: column[which] for name, column in self.columns.items()})

    def with_columns(self, **columns: np.ndarray) -> Examples:
        """Add columns."""
        return Examples(self.columns | columns)

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        """Concatenate one or more parts, all with the same columns."""
        return cls({name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns})


class EpochSampler:
    """The order of all examples in each epoch.

    Args:
        record_sizes: int64 [R] examples of each record.
        seed: seed of the permutations.
        window: number of records that are shuffled together.
    """

    def __init__(self, record_sizes: np.ndarray, seed: int, window: int) -> None:
        assert len(record_sizes)
        assert record_sizes.min() > 0
        self._sizes, self._seed, self._window = record_sizes, seed, window
        self._num_windows = -(-len(record_sizes) // window)
        self.num_examples = int(record_sizes.sum())
        self._cached_epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._cached_window: tuple[int, Examples] | None = None

    def records(self, window: int) -> np.ndarray:
        """Return the records of a window of the stream, ascending."""
        epoch, within = divmod(window, self._num_windows)
        return np.sort(self._epoch(epoch)[0][within * self._window : (within + 1) * self._window])

    def range(self, start: int, stop: int) -> Examples:
        """Return the examples at positions [start, stop), which are numbered through all epochs."""
        parts: list[Examples] = []
        while start < stop:
            epoch, offset = divmod(start, self.num_examples)
            _, starts = self._epoch(epoch)
            within = int(np.searchsorted(starts, offset, side="right")) - 1
            first = offset - int(starts[within])
            part = self._shuffled(epoch * self._num_windows + within).take(slice(first, first + stop - start))
            parts.append(part)
            start += len(part)
        return Examples.concat(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the records in the epoch's order, [R], and the position of each window's first example."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            records = np.random.default_rng([self._seed, 10, epoch]).permutation(len(self._sizes))
            ends = np.cumsum(self._sizes[records])
            starts = np.concatenate([[0], ends[self._window - 1 :: self._window], ends[-1:]])
            self._cached_epoch = (epoch, records, starts)
        return self._cached_epoch[1:]

    def _shuffled(self, window: int) -> Examples:
        """Return all examples of a window, in the epoch's order."""
        if self._cached_window is None or self._cached_window[0] != window:
            epoch, within = divmod(window, self._num_windows)
            lists = Ragged.from_lists([np.arange(self._sizes[record]) for record in self.records(window)])
            order = np.random.default_rng([self._seed, 11, epoch, within]).permutation(len(lists.values))
            examples = Examples(
                {
                    "records": self.records(window)[lists.rows],
                    "indexes": lists.values,
                    "epochs": np.full_like(order, epoch),
                    "windows": np.full_like(order, window),
                }
            )
            self._cached_window = window, examples.take(order)
        return self._cached_window[1]


class WindowCache:
    """Reads the data of examples, a window at a time, and caches as many windows as the widest batch so far spans.

    Args:
        shards: shards to read.
        sampler: order of the stream.
        columns: names of arrays with a value for each example.
        lists: names of the arrays with the offsets and values of a list for each example.
    """

    def __init__(self, shards: ShardSet, sampler: EpochSampler, columns: Sequence[str], lists: tuple[str, str]) -> None:
        self._shards, self._sampler, self._columns, self._lists = shards, sampler, columns, lists
        self._windows: OrderedDict[bytes, tuple[dict[str, np.ndarray], Ragged]] = OrderedDict()
        self._capacity = 1

    def columns(self, examples: Examples) -> dict[str, np.ndarray]:
        """Return the columns of the examples by name, and as int64 `counts` the lengths of their lists."""
        chunks: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int64)] for name in (*self._columns, "counts")}
        for columns, lists, rows in self._by_window(examples):
            for name in self._columns:
                chunks[name].append(columns[name][rows])
            chunks["counts"].append(lists.lengths[rows])
        return {name: np.concatenate(parts) for name, parts in chunks.items()}

    def lists(self, examples: Examples) -> Ragged:
        """Return the list of each example."""
        parts = [lists.take(rows) for _, lists, rows in self._by_window(examples)]
        return Ragged.concat([Ragged.from_lists([]), *parts])

    def _by_window(self, examples: Examples) -> Iterator[tuple[dict[str, np.ndarray], Ragged, np.ndarray]]:
        """Yield, for each window of the examples, its columns and lists, and the rows of the examples in them."""
        windows = np.unique(examples["windows"]).tolist()
        self._capacity = max(self._capacity, len(windows))
        for window in windows:
            records = self._sampler.records(window)
            columns, lists = self._read(records)
            members = examples.take(examples["windows"] == window)
            yield columns, lists, columns[_FIRST_ROW][np.searchsorted(records, members["records"])] + members["indexes"]

    def _read(self, records: np.ndarray) -> tuple[dict[str, np.ndarray], Ragged]:
        """Return the concatenated columns, `_FIRST_ROW` among them, and lists of a window's records."""
        key = records.tobytes()
        if key not in self._windows:
            offsets, values = self._lists
            arrays = [self._shards.read_record(int(r), {*self._columns, offsets, values}) for r in records]
            sizes = np.array([len(record[offsets]) - 1 for record in arrays])
            columns = {name: np.concatenate([record[name] for record in arrays]) for name in self._columns}
            lists = Ragged.concat([Ragged(record[offsets], record[values]) for record in arrays])
            self._windows[key] = columns | {_FIRST_ROW: np.cumsum(sizes) - sizes}, lists
            if len(self._windows) > self._capacity:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of optimizer steps of an epoch; the last one may be short."""
    return -(-num_examples // batch_size)


def batch_range(step: int, num_examples: int, batch_size: int) -> tuple[int, int]:
    """Return the positions [start, stop) of the global batch of a step that ends at the end of its epoch."""
    epoch, within = divmod(step, steps_per_epoch(num_examples, batch_size))
    start = epoch * num_examples + within * batch_size
    return start, min(start + batch_size, (epoch + 1) * num_examples)


def prefetch(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """Yield make(start), ..., make(stop - 1); a thread makes the next one while the caller uses the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        pending = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert pending is not None
            ready = pending.result()
            pending = pool.submit(make, step + 1) if step + 1 < stop else None
            yield ready
