"""Requests are batched while the model is busy, and no answer gets to the wrong request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from cllm4rec_dist.serving.batching import Batcher, OverloadError


class Model:
    """Doubles numbers; refuses negative ones; waits for its gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []

    def __call__(self, queries: Sequence[int]) -> list[int | Exception]:
        assert self.gate.wait(10)
        self.batches.append(list(queries))
        if 666 in queries:
            raise RuntimeError("broken")
        return [ValueError("negative") if query < 0 else 2 * query for query in queries]


def test_an_idle_model_runs_at_once() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, 8, 8)
        assert [await batcher.submit(number) for number in range(3)] == [0, 2, 4]
        assert model.batches == [[0], [1], [2]]
        await batcher.close()

    asyncio.run(main())


def test_clients_that_take_turns_come_into_one_batch() -> None:
    async def main() -> None:
        sizes: list[int] = []

        def answer(queries: Sequence[int]) -> list[int]:
            time.sleep(0.05)
            return [*queries]

        batcher = Batcher(answer, 8, 100, sizes.append)

        async def client(start: float) -> None:
            await asyncio.sleep(start)
            for query in range(8):
                await batcher.submit(query)

        # Two clients begin together, the others while the first batch runs.
        await asyncio.gather(*(client(0.01 * (index >= 2)) for index in range(6)))
        await batcher.close()
        assert sizes[0] == 2
        assert sizes.count(6) >= 5, sizes

    asyncio.run(main())


def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    async def main() -> None:
        model, sizes = Model(), []
        batcher = Batcher(model, 4, 100, sizes.append)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(10)]
        await asyncio.sleep(0.05)
        assert batcher.num_held == 10
        assert batcher.busy_seconds() > 0
        model.gate.set()
        assert await asyncio.gather(*tasks) == [2 * number for number in range(10)]
        assert sum(sizes) == 10
        assert max(sizes) == 4
        assert len(sizes) <= 4
        assert (batcher.num_held, batcher.busy_seconds()) == (0, 0.0)
        await batcher.close()

    asyncio.run(main())


def test_a_refused_query_takes_no_other_with_it() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, 8, 8)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (5, -1, 7)]
        await asyncio.sleep(0.02)
        model.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert (answers[0], answers[2]) == (10, 14)
        assert isinstance(answers[1], ValueError)
        await batcher.close()

    asyncio.run(main())


def test_a_broken_batch_is_told_to_each_and_the_next_one_runs() -> None:
    async def main() -> None:
        batcher = Batcher(Model(), 8, 8)
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.submit(666)
        assert await batcher.submit(1) == 2
        await batcher.close()

    asyncio.run(main())


def test_no_more_are_held_than_allowed() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, 2, 3)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(3)]
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadError):
            await batcher.submit(4)
        with pytest.raises(OverloadError):
            await batcher.call(lambda: 1)
        model.gate.set()
        await asyncio.gather(*tasks)
        assert await batcher.submit(4) == 8
        await batcher.close()

    asyncio.run(main())


def test_who_gives_up_is_left_out_of_the_batch() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, 8, 8)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.02)
        impatient, patient = (asyncio.create_task(batcher.submit(number)) for number in (2, 3))
        await asyncio.sleep(0.02)
        impatient.cancel()
        await asyncio.sleep(0)
        assert batcher.num_held == 2
        model.gate.set()
        assert await asyncio.gather(first, patient) == [2, 6]
        assert model.batches == [[1], [3]]
        await batcher.close()

    asyncio.run(main())


def test_calls_take_their_turn_and_closing_finishes_what_is_held() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, 1, 8)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.02)
        call = asyncio.create_task(batcher.call(lambda: len(model.batches)))
        second = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.02)
        model.gate.set()
        await batcher.close()
        assert first.done()
        assert second.done()
        assert await call == 1  # after the first batch, before the second

    asyncio.run(main())
