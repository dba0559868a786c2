"""The HTTP application, shared by a single process and the replicas of a cluster.

Routes only read memory: a request names ids, which never become file paths. There is no authentication; use a proxy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Query as Parameters
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cllm4rec_dist.serving import schemas
from cllm4rec_dist.serving.guard import Guard
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.pages import add_pages
from cllm4rec_dist.serving.problems import (
    RequestError,
    RequestT,
    from_validation_errors,
    parse_request,
    problem_response,
    request_error,
    require_once,
)
from cllm4rec_dist.serving.service import Service
from cllm4rec_dist.serving.telemetry import CONTENT_TYPE_LATEST

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    413: {"model": schemas.Problem, "description": "The request is too large."},
    422: {"model": schemas.Problem, "description": "A field is wrong; the answer names it and says how to fix it."},
    503: {"model": schemas.Problem, "description": "Too many requests; Retry-After says when to try again."},
}


def create_app(live: LiveRecommender, options: ServiceOptions, replica: str = "alone") -> FastAPI:
    """Create the application for a loaded recommender, without Ray.

    Args:
        live: the recommender in use.
        options: settings of the service.
        replica: name of this replica, for its metrics.
    """
    service = Service(live, options, replica)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="cllm4rec",
        version=version("cllm4rec_dist"),
        summary="Recommendations of one trained run.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_routes(app, service)
    add_pages(app)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Guard, telemetry=service.telemetry, paths=[getattr(route, "path", "") for route in app.routes])
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/recommend", **_body(schemas.RecommendRequest, schemas.RecommendAnswer))
    async def recommend(request: Request) -> Response:
        """Recommend the best items of the whole catalog for a user, a history, or both."""
        return _json(await service.recommend(await _read(request, schemas.RecommendRequest)))

    @app.post("/similar", **_body(schemas.SimilarRequest, schemas.SimilarAnswer))
    async def similar(request: Request) -> Response:
        """Return the items most similar to an item."""
        return _json(await service.similar(await _read(request, schemas.SimilarRequest)))

    @app.get("/items", response_model=schemas.FoundItems, responses={422: _PROBLEMS[422]})
    def items(request: Request, parameters: Annotated[schemas.ItemsRequest, Parameters()]) -> Response:
        """Search items by words of their titles, or by the beginning of their ids."""
        require_once([name for name, _ in request.query_params.multi_items()])
        return _json(service.find(parameters.query, parameters.limit))

    @app.get("/run", response_model=schemas.Run)
    async def run() -> Response:
        """Describe the run in use: checkpoint, date, validation metric, sizes."""
        return _json(service.run())

    @app.get("/healthz", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def healthz() -> Response:
        """Return 200 while the model answers, 503 if it hangs."""
        health = service.health()
        return _json(health, 200 if health.status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the metrics of this replica in Prometheus' text format."""
        return Response(service.telemetry.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _body(request: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI description of a route whose body is parsed by `_read`."""
    schema = request.model_json_schema()
    content = {"application/json": {"schema": _without_references(schema, schema.pop("$defs", {}))}}
    return {
        "response_model": answer,
        "responses": _PROBLEMS,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """Replace references to `definitions`: a part of an OpenAPI document cannot refer to its own."""
    if isinstance(schema, list):
        return [_without_references(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_references(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _without_references(part, definitions) for name, part in schema.items()}


async def _read(request: Request, model: type[RequestT]) -> RequestT:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise request_error(
            "Content-Type", f"{kind!r} is not application/json", "Send the header Content-Type: application/json.", 415
        )
    return parse_request(model, await request.body())


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return problem_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(from_validation_errors(error.errors(), schemas.ItemsRequest))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Convert the router's 404 and 405."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = request_error(
            "method", f"{method} is not allowed for {path}", f"Use {allowed or 'GET or POST'}.", 405
        )
        return problem_response(RequestError(refusal.violations, 405, {"Allow": allowed} if allowed else {}))
    return problem_response(
        request_error("path", "is not a path of this service", "See /docs for the available paths.", error.status_code)
    )
