"""What holds for every request: time for a body, and an answer whatever happens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cllm4rec_dist.serving import guard
from cllm4rec_dist.serving.guard import Guard
from cllm4rec_dist.serving.telemetry import Telemetry

SCOPE: dict[str, Any] = {"type": "http", "path": "/recommend", "method": "POST", "headers": []}


def run(app: Any, receive: Receive) -> tuple[list[Message], Telemetry]:
    """What is sent for one request, and what is counted."""
    sent: list[Message] = []
    telemetry = Telemetry("alone")

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Guard(app, telemetry, ["/recommend"])(dict(SCOPE), receive, send))
    return sent, telemetry


async def never() -> Message:
    await asyncio.sleep(60)
    raise AssertionError


async def at_once() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def unused(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the application must not see this request")


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    sent, telemetry = run(unused, never)
    assert sent[0]["status"] == 408
    assert b'"field":"body"' in sent[1]["body"]
    assert b'status="408"} 1.0' in telemetry.text()


def test_an_exception_becomes_an_answer_without_its_text() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    sent, telemetry = run(broken, at_once)
    assert sent[0]["status"] == 500
    assert b"secret" not in sent[1]["body"]
    assert b'status="500"} 1.0' in telemetry.text()


def test_an_answer_that_has_begun_is_not_answered_again() -> None:
    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    sent, _ = run(breaks_off, at_once)
    assert [message["type"] for message in sent] == ["http.response.start"]


def test_the_application_reads_the_body_once() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    parts = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.request", "body": b"}", "more_body": False},
    ]

    async def in_parts() -> Message:
        return parts.pop(0)

    sent, _ = run(echo, in_parts)
    assert sent[1]["body"] == b"{}"
