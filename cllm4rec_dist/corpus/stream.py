"""Which example comes when, and where its data are.

The order of an epoch is a function of (seed, epoch) alone: records are permuted, and the examples of `window` records
in a row are mixed with each other. A global batch is a range of positions in that order. So every rank makes the same
number of steps, every example comes exactly once an epoch (the last batch of an epoch may be short), and the position
is known from the number of completed optimizer steps: it resumes anywhere, at any world size, with no state of its own.
WebDataset's own splitting of shards over ranks gives unequal steps, on which ZeRO-3 hangs. Who reads which examples of
a global batch is left to `loader.py`.

Records are read a window at a time and laid end to end, so that a batch is cut out of them by operations on whole
arrays; it is made ahead of the step by `prefetch`.

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
"""Column of a window with a value for each of its records: the row of the record's first example."""


@dataclass(frozen=True)
class Examples:
    """n examples in the order of the stream, as columns with a value for each.

    Attributes:
        columns: [n] by name: `records` and `indexes` (where an example is: its record, and its index in that), `epochs`
            (visit, from 0), `windows` (of the stream, counted on through the epochs), and what was read or drawn since.
    """

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self["records"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, which: np.ndarray | slice) -> Examples:
        """Some of them, by index or mask."""
        return Examples({name: column[which] for name, column in self.columns.items()})

    def with_columns(self, **columns: np.ndarray) -> Examples:
        """Add columns."""
        return Examples(self.columns | columns)

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        """All parts, one behind the other; at least one part, all with the same columns."""
        return cls({name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns})


class EpochSampler:
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
        self._num_windows = -(-len(record_sizes) // window)
        self.num_examples = int(record_sizes.sum())
        self._kept_epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._kept_window: tuple[int, Examples] | None = None

    def records(self, window: int) -> np.ndarray:
        """Records of a window of the stream, in the order of the corpus."""
        epoch, within = divmod(window, self._num_windows)
        return np.sort(self._epoch(epoch)[0][within * self._window : (within + 1) * self._window])

    def range(self, start: int, stop: int) -> Examples:
        """Examples at positions [start, stop); positions go on through the epochs."""
        found: list[Examples] = []
        while start < stop:
            epoch, offset = divmod(start, self.num_examples)
            _, starts = self._epoch(epoch)
            within = int(np.searchsorted(starts, offset, side="right")) - 1
            first = offset - int(starts[within])
            taken = self._mixed(epoch * self._num_windows + within).take(slice(first, first + stop - start))
            found.append(taken)
            start += len(taken)
        return Examples.concat(found)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Records in the epoch's order [R], and the position at which each window starts."""
        if self._kept_epoch is None or self._kept_epoch[0] != epoch:
            records = np.random.default_rng([self._seed, 10, epoch]).permutation(len(self._sizes))
            ends = np.cumsum(self._sizes[records])
            starts = np.concatenate([[0], ends[self._window - 1 :: self._window], ends[-1:]])
            self._kept_epoch = (epoch, records, starts)
        return self._kept_epoch[1:]

    def _mixed(self, window: int) -> Examples:
        """All examples of a window, in the epoch's order."""
        if self._kept_window is None or self._kept_window[0] != window:
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
            self._kept_window = window, examples.take(order)
        return self._kept_window[1]


class WindowCache:
    """The data of examples, read a window at a time. As many windows are kept decoded as a batch was seen to lie in.

    Args:
        shards: what is read.
        sampler: the stream's order.
        columns: names of arrays that have a value for each example.
        lists: names of the arrays that hold offsets and values of a list for each example.
    """

    def __init__(self, shards: ShardSet, sampler: EpochSampler, columns: Sequence[str], lists: tuple[str, str]) -> None:
        self._shards, self._sampler, self._columns, self._lists = shards, sampler, columns, lists
        self._windows: OrderedDict[bytes, tuple[dict[str, np.ndarray], Ragged]] = OrderedDict()
        self._capacity = 1

    def columns(self, examples: Examples) -> dict[str, np.ndarray]:
        """A value of each example by the name of its column, and int64 `counts` of the values in their lists."""
        found: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int64)] for name in (*self._columns, "counts")}
        for columns, lists, rows in self._located(examples):
            for name in self._columns:
                found[name].append(columns[name][rows])
            found["counts"].append(lists.lengths[rows])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def lists(self, examples: Examples) -> Ragged:
        """The list of each example."""
        parts = [lists.take(rows) for _, lists, rows in self._located(examples)]
        return Ragged.concat([Ragged.from_lists([]), *parts])

    def _located(self, examples: Examples) -> Iterator[tuple[dict[str, np.ndarray], Ragged, np.ndarray]]:
        """Columns and lists of each window that examples lie in, in their order, and the rows of its examples."""
        windows = np.unique(examples["windows"]).tolist()
        self._capacity = max(self._capacity, len(windows))
        for window in windows:
            records = self._sampler.records(window)
            columns, lists = self._read(records)
            mine = examples.take(examples["windows"] == window)
            yield columns, lists, columns[_FIRST_ROW][np.searchsorted(records, mine["records"])] + mine["indexes"]

    def _read(self, records: np.ndarray) -> tuple[dict[str, np.ndarray], Ragged]:
        """A window's columns and lists, laid end to end, and the row at which each of its records begins."""
        key = records.tobytes()
        if key not in self._windows:
            offsets, values = self._lists
            found = [self._shards.read_record(int(r), {*self._columns, offsets, values}) for r in records]
            sizes = np.array([len(record[offsets]) - 1 for record in found])
            columns = {name: np.concatenate([record[name] for record in found]) for name in self._columns}
            lists = Ragged.concat([Ragged(record[offsets], record[values]) for record in found])
            self._windows[key] = columns | {_FIRST_ROW: np.cumsum(sizes) - sizes}, lists
            if len(self._windows) > self._capacity:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps that see every example once; the last one may be short."""
    return -(-num_examples // batch_size)


def batch_range(step: int, num_examples: int, batch_size: int) -> tuple[int, int]:
    """Positions of a global batch that does not cross the end of its epoch."""
    epoch, within = divmod(step, steps_per_epoch(num_examples, batch_size))
    start = epoch * num_examples + within * batch_size
    return start, min(start + batch_size, (epoch + 1) * num_examples)


def prefetch(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """make(start), ..., make(stop - 1), each made by a thread while its predecessor is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        pending = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert pending is not None
            ready = pending.result()
            pending = pool.submit(make, step + 1) if step + 1 < stop else None
            yield ready
