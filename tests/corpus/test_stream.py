"""Each epoch has every example once, in an order independent of world size, batch size and resumption."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.stream import EpochSampler, Examples, WindowCache, batch_range, prefetch, steps_per_epoch

patient = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
"""A loaded machine is no failure."""

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=12)
WINDOWS = st.integers(1, 14)
SEEDS = st.integers(0, 5)
BATCHES = st.integers(1, 17)


def order(sizes: list[int], seed: int, window: int) -> EpochSampler:
    return EpochSampler(np.array(sizes, dtype=np.int64), seed, window)


def positions(examples: Examples) -> list[tuple[int, int]]:
    return list(zip(examples["records"].tolist(), examples["indexes"].tolist(), strict=True))


def visits(examples: Examples) -> list[tuple[int, int, int]]:
    return [
        (epoch, *position) for epoch, position in zip(examples["epochs"].tolist(), positions(examples), strict=True)
    ]


@patient
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS)
def test_every_epoch_visits_each_example_exactly_once(sizes: list[int], seed: int, window: int) -> None:
    stream = order(sizes, seed, window)
    everything = {(record, index) for record, size in enumerate(sizes) for index in range(size)}
    assert stream.num_examples == len(everything)
    for epoch in range(3):
        examples = stream.range(epoch * len(everything), (epoch + 1) * len(everything))
        assert Counter(positions(examples)) == Counter(everything)
        assert set(examples["epochs"].tolist()) == {epoch}
        for window in np.unique(examples["windows"]):
            inside = examples.take(examples["windows"] == window)
            assert np.unique(inside["records"]).tolist() == stream.records(window).tolist()


@patient
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS, batch=BATCHES, data=st.data())
def test_resumption_from_any_step_goes_on_with_the_same_sequence(
    sizes: list[int], seed: int, window: int, batch: int, data: st.DataObject
) -> None:
    stream = order(sizes, seed, window)
    total = 2 * steps_per_epoch(stream.num_examples, batch)
    steps = [visits(stream.range(*batch_range(step, stream.num_examples, batch))) for step in range(total)]
    resumed_at = data.draw(st.integers(0, total - 1))
    fresh = order(sizes, seed, window)
    resumed = [visits(fresh.range(*batch_range(step, fresh.num_examples, batch))) for step in range(resumed_at, total)]
    assert resumed == steps[resumed_at:]


@patient
@given(num_examples=st.integers(1, 40), batch=BATCHES)
def test_batches_fill_their_epoch_and_do_not_cross_its_end(num_examples: int, batch: int) -> None:
    per_epoch = steps_per_epoch(num_examples, batch)
    position = 0
    for step in range(3 * per_epoch):
        start, stop = batch_range(step, num_examples, batch)
        assert start == position
        assert 1 <= stop - start <= batch
        assert start // num_examples == (stop - 1) // num_examples
        if (step + 1) % per_epoch:
            assert stop - start == batch, "only the last batch of an epoch may be short"
        position = stop
    assert position == 3 * num_examples


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    sizes, total = [5, 4, 6, 5, 5, 3], 28
    epochs = [positions(order(sizes, 1, 2).range(epoch * total, (epoch + 1) * total)) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert positions(order(sizes, 2, 2).range(0, total)) != epochs[0]
    # Read in any pieces, in any order, the same stream gives the same examples.
    stream = order(sizes, 1, 2)
    stream.range(70, 90)
    pieces = [stream.range(start, min(start + 3, 2 * total)) for start in range(0, 2 * total, 3)]
    assert [position for piece in pieces for position in positions(piece)] == epochs[0] + epochs[1]


def test_a_single_record_is_in_another_order_at_every_epoch() -> None:
    stream = order([20], 0, 4)
    epochs = [tuple(positions(stream.range(20 * epoch, 20 * epoch + 20))) for epoch in range(5)]
    assert len(set(epochs)) == 5


def test_examples_of_a_window_are_mixed_and_only_they() -> None:
    sizes = [50] * 6
    examples = positions(order(sizes, 0, 2).range(0, 300))
    for start in range(0, 300, 100):
        window = examples[start : start + 100]
        records = [record for record, _ in window]
        assert len(set(records)) == 2
        assert records != sorted(records)
        changes = sum(a != b for a, b in pairwise(records))
        assert changes > 20, "records are hardly mixed"
    assert positions(order(sizes, 0, 1).range(0, 50)) != [(examples[0][0], index) for index in range(50)]


class Shards:
    """Records of two examples each, which remember how often they were read."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read_record(self, index: int, names: Collection[str]) -> dict[str, np.ndarray]:
        assert set(names) == {"users", "offsets", "values"}
        self.reads.append(index)
        return {
            "users": 10 * index + np.arange(2),
            "offsets": np.array([0, 1, 3]),
            "values": 100 * index + np.arange(3),
        }


def cache(num_records: int, window: int) -> tuple[WindowCache, EpochSampler, Shards]:
    stream, shards = order([2] * num_records, 0, window), Shards()
    return WindowCache(shards, stream, ["users"], ("offsets", "values")), stream, shards  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 3, 5, 40])
def test_a_batch_has_the_data_of_its_examples_and_reads_each_record_once_an_epoch(step: int) -> None:
    made, stream, shards = cache(num_records=7, window=3)
    for start in range(0, 14 * 3, step):
        examples = stream.range(start, min(start + step, 14 * 3))
        columns, lists = made.columns(examples), made.lists(examples)
        expected = [100 * r + np.arange(3)[i : 2 * i + 1] for r, i in positions(examples)]
        assert columns["users"].tolist() == [10 * r + i for r, i in positions(examples)]
        assert columns["counts"].tolist() == lists.lengths.tolist() == [len(values) for values in expected]
        assert lists.values.tolist() == np.concatenate(expected).tolist()
    assert Counter(shards.reads) == dict.fromkeys(range(7), 3)
    assert len(made.columns(examples.take(slice(0)))["users"]) == len(made.lists(examples.take(slice(0)))) == 0


def test_records_that_are_all_in_one_window_are_read_once_in_a_run() -> None:
    made, stream, shards = cache(num_records=5, window=8)
    for start in range(0, 40, 4):
        made.lists(stream.range(start, start + 4))
    assert sorted(shards.reads) == [0, 1, 2, 3, 4]


def test_ahead_yields_in_order_and_makes_one_in_advance() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 4:
            second.set()
        return 10 * step

    stream = prefetch(make, 3, 7)
    assert next(stream) == 30
    assert second.wait(60), "the next one is made while this one is used"
    assert list(stream) == [40, 50, 60]
    assert made == [3, 4, 5, 6]


def test_ahead_of_nothing_makes_nothing() -> None:
    def make(step: int) -> int:
        raise AssertionError(step)

    assert list(prefetch(make, 5, 5)) == []


def test_an_exception_comes_out_at_the_step_that_caused_it() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("record 2 is damaged")
        return step

    stream: Iterator[int] = prefetch(make, 0, 5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="record 2 is damaged"):
        next(stream)


def test_a_stream_that_is_left_early_leaves_no_thread_behind() -> None:
    stream = prefetch(lambda step: step, 0, 100)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
