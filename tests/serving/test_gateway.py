"""The gateway: the application's answers, from another replica where one is lost. Without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError
from ray.serve.exceptions import BackPressureError

from cllm4rec_dist.serving.gateway import Gateway, HttpAnswer, call_whole
from cllm4rec_dist.serving.options import MAX_BODY_BYTES
from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import FakeRecommender, FakeRun, options

LOST = [
    ActorDiedError(),
    ActorUnavailableError("gone", b"0" * 16),
    ObjectLostError("0" * 56, None, "there"),
]
BASKET = {"history": ["s1"], "top": 2}


class Replicas:
    """A handle whose first calls fail."""

    def __init__(self, app: Any, failures: list[Exception], seconds: float = 0.0) -> None:
        self.app, self.failures, self.seconds, self.calls = app, failures, seconds, 0

    @property
    def answer(self) -> Replicas:
        return self

    async def remote(self, scope: dict[str, Any], body: bytes) -> HttpAnswer:
        self.calls += 1
        await asyncio.sleep(self.seconds)
        if self.failures:
            raise self.failures.pop(0)
        return await call_whole(self.app, scope, body)


Make = Callable[..., tuple[TestClient, Replicas]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a client of a gateway, and the replicas behind it."""
    app = create_app(FakeRun(FakeRecommender()).live(), options())

    def made(*failures: Exception, seconds: float = 0.0, limit: float = 10.0) -> tuple[TestClient, Replicas]:
        replicas = Replicas(app, list(failures), seconds)
        return TestClient(Gateway(replicas, limit)), replicas  # type: ignore[arg-type]

    with TestClient(app):
        yield made


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/recommend", {"json": BASKET}),
        ("POST", "/recommend", {"json": {"top": 0}}),
        ("POST", "/recommend", {"content": b"{"}),
        ("GET", "/items?query=rose+soap&limit=1", {}),
        ("GET", "/items?limit=1&limit=1", {}),
        ("GET", "/run", {}),
        ("GET", "/", {}),
        ("GET", "/docs", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/healthz", {}),
        ("GET", "/nowhere%2F..", {}),
        ("DELETE", "/recommend", {}),
    ],
)
def test_answers_are_those_of_the_application(make: Make, method: str, path: str, content: dict[str, Any]) -> None:
    client, replicas = make()
    direct = TestClient(replicas.app).request(method, path, **content)
    through = client.request(method, path, **content)
    assert (through.status_code, through.content) == (direct.status_code, direct.content)
    assert sorted(through.headers.multi_items()) == sorted(direct.headers.multi_items())


@pytest.mark.parametrize("failures", [LOST[:1], LOST[1:2], LOST[2:], LOST[:2]])
def test_a_request_whose_replica_is_lost_goes_to_another_one(make: Make, failures: list[Exception]) -> None:
    client, replicas = make(*failures)
    assert client.post("/recommend", json=BASKET).json()["items"][0]["item"] == "s2"
    assert replicas.calls == len(failures) + 1


@pytest.mark.parametrize(
    ("failures", "settings", "says"),
    [
        (LOST, {}, "lost a replica at every attempt"),
        (
            [BackPressureError(num_queued_requests=9, max_queued_requests=9, status_code=503, retry_after_s=None)],
            {},
            "has too many requests",
        ),
        ([], {"seconds": 5.0, "limit": -0.9}, "did not answer within 0.1 seconds"),
    ],
)
def test_what_no_replica_can_answer_is_to_be_sent_again(
    make: Make, failures: list[Exception], settings: dict[str, float], says: str
) -> None:
    client, replicas = make(*failures, **settings)
    response = client.post("/recommend", json=BASKET)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert says in response.json()["detail"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert replicas.calls == max(len(failures), 1)


def test_another_failure_is_not_tried_again_and_not_shown(make: Make) -> None:
    client, replicas = make(ValueError("/secret"))
    response = client.post("/recommend", json=BASKET)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert replicas.calls == 1


def test_a_body_that_is_too_large_reaches_no_replica(make: Make) -> None:
    client, replicas = make()
    assert client.post("/recommend", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert replicas.calls == 0
