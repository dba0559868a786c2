"""Too many requests and a model that hangs: reported with 503, and gone as soon as the load is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from cllm4rec_dist.serving import service
from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import FakeRecommender, FakeRun, options


def test_more_requests_than_the_service_holds_are_sent_away() -> None:
    model = FakeRecommender()
    with (
        TestClient(create_app(FakeRun(model).live(), options(max_waiting=4, max_batch=2))) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        model.gate.clear()
        held = [pool.submit(client.post, "/recommend", json={"history": ["s1"]}) for _ in range(4)]
        deadline = time.monotonic() + 10
        while 'cllm4rec_waiting_requests{replica="alone"} 4.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        response = client.post("/recommend", json={"history": ["s1"]})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "4 requests" in response.json()["detail"]
        assert client.get("/healthz").status_code == 200
        assert client.get("/items", params={"query": "soap"}).status_code == 200
        model.gate.set()
        assert [future.result().status_code for future in held] == [200] * 4
        assert client.post("/recommend", json={"history": ["s1"]}).status_code == 200


def test_a_request_that_breaks_the_model_takes_no_other_with_it() -> None:
    model = FakeRecommender()
    app = create_app(FakeRun(model).live(), options())
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(4) as pool:
        model.gate.clear()
        histories = ["s1", "explode", "s2", "b1"]
        held = [pool.submit(client.post, "/recommend", json={"history": [item]}) for item in histories]
        deadline = time.monotonic() + 10
        while 'cllm4rec_waiting_requests{replica="alone"} 4.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        model.gate.set()
        assert [future.result().status_code for future in held] == [200, 500, 200, 200]


def test_a_request_is_given_up_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeRecommender()
    with TestClient(create_app(FakeRun(model).live(), options(timeout_seconds=0.5))) as client:
        model.gate.clear()
        response = client.post("/recommend", json={"history": ["s1"]})
        assert response.status_code == 503
        assert "0.5 seconds" in response.json()["detail"]
        assert "retry-after" in response.headers
        monkeypatch.setattr(service, "STUCK_SECONDS", 0.05)
        health = client.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "stuck")
        model.gate.set()
        assert client.post("/recommend", json={"history": ["s1"]}).status_code == 200
        assert client.get("/healthz").status_code == 200
