"""A new checkpoint is taken up without a lost request; one that cannot be used changes nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import FakeRecommender, FakeRun, at_step, options

NEWER = "/runs/shop/best-00000020"


def test_the_best_checkpoint_is_loaded_and_kept() -> None:
    run = FakeRun(FakeRecommender())
    live = run.live()
    assert [live.check(1.0) for _ in range(3)] == ["unchanged"] * 3
    assert len(run.loads) == 1
    assert live.info.step == 10


def test_a_newer_one_takes_its_place_after_it_has_answered() -> None:
    newer = at_step(20)
    run = FakeRun(FakeRecommender(), newer)
    live = run.live()
    run.best = NEWER
    assert live.check(1.0) == "loaded"
    assert live.info.step == 20
    assert newer.batches == [1]
    assert live.check(1.0) == "unchanged"


def test_a_checkpoint_of_the_same_name_with_other_contents_is_another_one() -> None:
    run = FakeRun(FakeRecommender())
    contents = ["first"]
    live = LiveRecommender(run.load, lambda: (run.best, contents[-1]), run.best)
    contents.append("trained anew")
    assert live.check(1.0) == "loaded"
    assert live.check(1.0) == "unchanged"


def test_a_damaged_one_is_told_once_and_tried_again_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(FakeRecommender(), at_step(20))
    live = run.live()
    run.best = NEWER
    run.damaged.add(NEWER)
    with caplog.at_level(logging.INFO):
        assert live.check(0.05) == "failed"
        assert live.check(0.05) == "unchanged"  # not tried before its pause is over
        assert live.info.step == 10
    assert caplog.text.count("NEW CHECKPOINT NOT USED") == 1
    assert NEWER in caplog.text
    assert "still serving step 10" in caplog.text
    time.sleep(0.11)
    run.damaged.clear()
    assert live.check(0.05) == "loaded"
    assert live.info.step == 20


def test_one_that_loads_but_cannot_answer_is_not_used() -> None:
    newer = at_step(20)
    newer.answer = None  # type: ignore[method-assign,assignment]
    run = FakeRun(FakeRecommender(), newer)
    live = run.live()
    run.best = NEWER
    assert live.check(1.0) == "failed"
    assert live.info.step == 10


def test_a_store_that_does_not_answer_changes_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(FakeRecommender())
    failing = [False]

    def best() -> tuple[str, str]:
        if failing[0]:
            raise CheckpointError("checkpoint", "/runs/shop", "cannot be read", "Mend the storage.")
        return run.best, ""

    live = LiveRecommender(run.load, best, run.best)
    failing[0] = True
    assert [live.check(1.0) for _ in range(3)] == ["unchanged"] * 3
    assert caplog.text.count("cannot be read") == 1


def test_no_request_is_lost_while_checkpoints_change() -> None:
    steps = [FakeRecommender(seconds=0.002), *(at_step(step, seconds=0.002) for step in (20, 30, 40))]
    run = FakeRun(*steps)
    with (
        TestClient(create_app(run.live(), options())) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        seen: list[str] = []

        def ask(_: int) -> int:
            response = client.post("/recommend", json={"history": ["s1"], "top": 2})
            seen.append(response.json()["checkpoint"])
            return response.status_code

        futures = [pool.submit(ask, number) for number in range(400)]
        for path in list(run.checkpoints)[1:]:
            asked = len(seen)
            run.best = path
            deadline = time.monotonic() + 10
            while client.get("/healthz").json()["checkpoint"] != path.rpartition("/")[2]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert len(seen) >= asked
        assert {future.result() for future in futures} == {200}
        assert len(seen) == 400
        assert len(set(seen)) > 1
        assert client.post("/recommend", json={}).json()["checkpoint"] == "best-00000040"
        assert 'cllm4rec_checkpoint_reloads_total{outcome="loaded",replica="alone"} 3.0' in client.get("/metrics").text
        assert 'cllm4rec_checkpoint_step{replica="alone"} 40.0' in client.get("/metrics").text


def test_the_watch_goes_on_after_a_failure() -> None:
    run = FakeRun(FakeRecommender(), at_step(20), at_step(30))
    live = run.live()
    outcomes: list[str] = []

    async def main() -> None:
        watch = asyncio.create_task(live.watch(0.01, outcomes.append))
        run.damaged.add(NEWER)
        run.best = NEWER
        await asyncio.sleep(0.1)
        run.best = "/runs/shop/best-00000030"
        await asyncio.sleep(0.1)
        watch.cancel()

    asyncio.run(main())
    assert "failed" in outcomes
    assert live.info.step == 30
