"""The web page and the OpenAPI page: files of the package, read once and served from memory.

Neither loads external resources. Swagger UI comes from the package fastapi-offline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import NamedTuple

from fastapi import FastAPI
from starlette.responses import Response

_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_DOCS = _PAGE.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").replace(
    "img-src 'self'", "img-src 'self' data:"
)
"""Swagger UI uses inline styles, and data: images in its style sheet."""


class _File(NamedTuple):
    package: str
    name: str
    media_type: str
    policy: str


_FILES = {
    "/": _File("cllm4rec_dist.serving", "page/index.html", "text/html", _PAGE),
    "/page.css": _File("cllm4rec_dist.serving", "page/page.css", "text/css", _PAGE),
    "/page.js": _File("cllm4rec_dist.serving", "page/page.js", "text/javascript", _PAGE),
    "/icon.svg": _File("cllm4rec_dist.serving", "page/icon.svg", "image/svg+xml", _PAGE),
    "/docs": _File("cllm4rec_dist.serving", "page/docs.html", "text/html", _DOCS),
    "/docs.js": _File("cllm4rec_dist.serving", "page/docs.js", "text/javascript", _DOCS),
    "/swagger-ui.css": _File("fastapi_offline", "static/swagger-ui.css", "text/css", _DOCS),
    "/swagger-ui.js": _File("fastapi_offline", "static/swagger-ui-bundle.js", "text/javascript", _DOCS),
}


def add_pages(app: FastAPI) -> None:
    """Add a route for each file to an application."""
    for path, file in _FILES.items():
        app.add_api_route(path, _serve(file), methods=["GET", "HEAD"], include_in_schema=False)


def _serve(file: _File) -> Callable[[], Awaitable[Response]]:
    content = files(file.package).joinpath(file.name).read_bytes()
    headers = {"content-security-policy": file.policy, "cache-control": "no-cache"}

    async def serve() -> Response:
        return Response(content, headers=headers, media_type=file.media_type)

    return serve
