"""HTTP front end of a service on Ray Serve: sends complete requests to replicas, and retries if a replica dies.

Ray's proxies drop a request whose replica dies, and keep sending requests to it until they notice. Every request here
is read-only, so retries are safe.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm4rec_dist.serving.guard import FAILED, add_headers, read_body
from cllm4rec_dist.serving.problems import RequestError, problem_response, request_error

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
"""Keys of the ASGI scope that a replica receives; the others are local to this process."""
_TRIES = 3
_GRACE_SECONDS = 1.0
"""Time beyond the replica's limit, so that its own error response arrives."""

HttpAnswer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""


class Gateway:
    """ASGI application that forwards each request to a replica.

    Args:
        replicas: handle of a deployment whose method `answer(scope, body)` returns an `HttpAnswer`.
        seconds: a replica's time limit for an answer.
    """

    def __init__(self, replicas: DeploymentHandle[Any], seconds: float) -> None:
        self._replicas, self._seconds = replicas, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", scope["type"]
        try:
            body = await read_body(scope, receive)
            status, headers, content = await self._answer({name: scope[name] for name in _SENT}, body)
            response = Response(content, status)
            response.raw_headers = headers
        except RequestError as error:
            response = _refuse(error)
        except Exception:
            logger.exception("a request of %s failed", scope["path"])
            response = _refuse(FAILED)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, body: bytes) -> HttpAnswer:
        """Return the answer of the first replica that gives one. Raises RequestError with status 503 if none does."""
        try:
            async with asyncio.timeout(self._seconds + _GRACE_SECONDS):
                for _ in range(_TRIES):
                    try:
                        return await self._replicas.answer.remote(scope, body)
                    except (RayActorError, ObjectLostError) as error:
                        logger.warning(
                            "a replica was lost; its request is sent to another one (%s)", type(error).__name__
                        )
            raise _unavailable("lost a replica at every attempt to answer")
        except (BackPressureError, DeploymentUnavailableError):
            raise _unavailable("has too many requests to answer already") from None
        except TimeoutError:
            raise _unavailable(f"did not answer within {self._seconds + _GRACE_SECONDS:g} seconds") from None


def _unavailable(constraint: str) -> RequestError:
    return request_error("service", constraint, "Send the request again later.", 503, retry_after="1")


def _refuse(error: RequestError) -> Response:
    response = problem_response(error)
    response.raw_headers = add_headers(response.raw_headers)
    return response


async def call_whole(app: ASGIApp, scope: Scope, body: bytes) -> HttpAnswer:
    """Return the response of an ASGI application to a completely received request."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    return start["status"], list(start["headers"]), b"".join(part.get("body", b"") for part in parts)
