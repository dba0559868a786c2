"""Middleware for every request: body size and time limits, security headers, metrics, and errors without traceback."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm4rec_dist.serving.options import MAX_BODY_BYTES
from cllm4rec_dist.serving.problems import RequestError, problem_response, request_error
from cllm4rec_dist.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

BODY_SECONDS = 10.0
"""Time limit for receiving a request's body."""
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_API_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]


class Guard:
    """ASGI middleware around the whole application.

    Args:
        paths: paths of the application; all others share one metric label, so that clients cannot create labels.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, paths: Collection[str]) -> None:
        self._app, self._telemetry, self._paths = app, telemetry, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = add_headers(message["headers"])
            await send(message)

        try:
            body = await read_body(scope, receive)
            await self._app(scope, _replay(body, receive), send_guarded)
        except RequestError as error:
            await problem_response(error)(scope, receive, send_guarded)
        except Exception:
            logger.exception("a request of %s failed", scope["path"])
            if status == 0:
                await problem_response(FAILED)(scope, receive, send_guarded)
        finally:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            path = path if path in self._paths else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
            self._telemetry.requests.labels(method, path, str(status)).inc()
            self._telemetry.latency.labels(path).observe(time.perf_counter() - started)


FAILED = request_error("service", "failed to answer", "Send the request again; the service's log says why.", 500)


def add_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Add missing security headers to the headers of a response."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    return [*given, *(header for header in [*_HEADERS, *_API_HEADERS] if header[0] not in names)]


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Read the whole body of a request.

    Raises:
        RequestError: if it is too large or too slow.
    """
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    break  # the client has disconnected: the application will notice
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise request_error(
            "body", f"was not complete after {BODY_SECONDS:.0f} seconds", "Send it faster.", 408, connection="close"
        ) from None
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that replays a body already read, then continues with the original."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def _too_large() -> RequestError:
    return request_error(
        "body",
        f"has more than {MAX_BODY_BYTES:,} bytes",
        "Send fewer ids.",
        413,
        connection="close",
    )
