"""Clients that never finish a header are cut off; others are not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
import uvicorn

from cllm4rec_dist.serving import slow_clients
from cllm4rec_dist.serving.address import listen
from cllm4rec_dist.serving.app import server_config
from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import FakeRecommender, FakeRun, options

SECONDS = 0.4
WHOLE = b"GET /run HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Address of a service whose answers take twice as long as a header may."""
    monkeypatch.setattr(slow_clients, "HEADER_SECONDS", SECONDS)
    live = FakeRun(FakeRecommender(seconds=2 * SECONDS)).live()
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(create_app(live, options())))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    yield listener.getsockname()[:2]
    server.should_exit = True
    thread.join(30)


def seconds_to_end(client: socket.socket, trickle: bytes) -> float:
    """How long the service keeps a connection on which a byte comes every twentieth of a second."""
    started = time.monotonic()
    client.settimeout(0.05)
    while time.monotonic() - started < 10 * SECONDS:
        try:
            if trickle:
                client.sendall(trickle)
            if not client.recv(1 << 16):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "trickle"),
    [
        (b"", b""),
        (b"GET /run HTTP/1.1\r\nX: ", b"x"),
        (b"", b"\r\n"),
        (WHOLE, b"\r\n"),
        (WHOLE + b"GET /run HTTP/1.1\r\nX: ", b"x"),
    ],
)
def test_a_header_without_an_end_is_cut_off(address: tuple[str, int], first: bytes, trickle: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(first)
        if first.startswith(WHOLE):
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert seconds_to_end(client, trickle) < 5 * SECONDS


@pytest.mark.slow
def test_slow_answers_and_later_requests_are_not_cut_off(address: tuple[str, int]) -> None:
    body = b'{"history": ["s1"]}'
    client = HTTPConnection(*address, timeout=30)
    client.connect()
    client.auto_open = 0  # fails where the service has closed the connection
    for _ in range(2):
        client.putrequest("POST", "/recommend")
        client.putheader("Content-Type", "application/json")
        client.putheader("Content-Length", str(len(body)))
        client.endheaders(body[:5])
        time.sleep(1.5 * SECONDS)  # a body has its own limit
        client.send(body[5:])
        response = client.getresponse()
        assert response.status == 200
        response.read()
        time.sleep(1.5 * SECONDS)
    client.close()
