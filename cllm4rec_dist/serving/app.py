"""Start the service in this process or as replicas on Ray Serve, with the same application.

cllm4rec serve RUN                                               one process, without Ray
cllm4rec serve RUN --replicas 4                                  Ray Serve, here or on the cluster at RAY_ADDRESS
serve run cllm4rec_dist.serving.app:build run=RUN replicas=4     the same with Ray's command
serve build cllm4rec_dist.serving.app:build ...                  a configuration file for a cluster
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.config import validate
from cllm4rec_dist.errors import ConfigError, DamagedCheckpointError, FaultError
from cllm4rec_dist.launchers.ray_launcher import ray_address, start_ray
from cllm4rec_dist.log import setup_logging
from cllm4rec_dist.serving.address import url
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.serving.web import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp
    from uvicorn import Config

    from cllm4rec_dist.serving.gateway import HttpAnswer

__all__ = ["build", "create_app", "open_run", "serve_here", "serve_on_ray"]

logger = logging.getLogger(__name__)

NAME = "cllm4rec"
"""Name of the deployment on Ray Serve."""
_MAX_CONNECTIONS = 2_000
_SHUTDOWN_SECONDS = 30
_START_TRIES = 3
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Logging of Ray Serve. Requests are counted by metrics, and our logger reports checkpoints."""

_ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Environment variables that save two thread switches per request. Slow work here runs in separate threads."""


def open_run(options: ServiceOptions) -> LiveRecommender:
    """Load a run's best checkpoint.

    Raises:
        CLLM4RecError: if there is no intact checkpoint, or the backbone or corpus is missing or has changed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    load = partial(
        Recommender.load,
        backbone=options.backbone,
        corpus=options.corpus,
        new_item_offset=options.new_item_offset,
    )
    return LiveRecommender(load, partial(_best_checkpoint, options.run), options.run)


def _best_checkpoint(run: str) -> tuple[str, str]:
    """Path of a run's best checkpoint, and the contents of its marker."""
    store, names = find(run)
    try:
        return store.path(names[0]), store.marker(names[0]).model_dump_json()
    except DamagedCheckpointError as error:
        return store.path(names[0]), str(error)  # loading it raises the same error


def serve_here(options: ServiceOptions, listener: socket.socket) -> None:
    """Serve in this process until SIGINT or SIGTERM, then finish running requests.

    Args:
        listener: a listening socket.

    Raises:
        CLLM4RecError: as for `open_run`.
    """
    from uvicorn import Server

    live = open_run(options)
    app = create_app(live, options)
    _log_address(f"{options.run} ({live.info.checkpoint}, step {live.info.step})", *listener.getsockname()[:2])
    Server(server_config(app)).run(sockets=[listener])


def server_config(app: ASGIApp, lifespan: Literal["on", "off"] = "on") -> Config:
    """uvicorn settings for serving an application in this process."""
    from uvicorn import Config

    from cllm4rec_dist.serving.slow_clients import TimedHeaderProtocol

    return Config(
        app,
        http=TimedHeaderProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan=lifespan,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )


def build(arguments: Mapping[str, Any]) -> Application:
    """The Ray Serve application of a run, for `serve run` and `serve build`.

    Args:
        arguments: fields of `ServiceOptions`. `run` is required, and its path must be readable on every host.
    """
    from ray import serve

    options = validate(ServiceOptions, dict(arguments), "arguments")
    deployment = serve.deployment(
        serve.ingress()(_Replica),
        name=NAME,
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_waiting,
        max_queued_requests=options.replicas * options.max_waiting,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": options.gpus},
        graceful_shutdown_timeout_s=_SHUTDOWN_SECONDS,
        max_constructor_retry_count=_START_TRIES,
        logging_config=_QUIET,
    )
    return deployment.bind(options.model_dump())  # type: ignore[attr-defined]  # typed as a decorator


class _Replica:
    """Replica on Ray Serve: the model and the application."""

    def __init__(self, settings: dict[str, Any]) -> None:
        setup_logging()
        self._options = ServiceOptions.model_validate(settings)
        self._live = open_run(self._options)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve

        self._served = create_app(self._live, self._options, serve.get_replica_context().replica_id.unique_id)
        return self._served

    async def answer(self, scope: dict[str, Any], body: bytes) -> HttpAnswer:
        """Answer a request from `Gateway`."""
        from cllm4rec_dist.serving.gateway import call_whole

        return await call_whole(self._served, scope, body)


def serve_on_ray(options: ServiceOptions, listener: socket.socket) -> None:
    """Serve with replicas on Ray until SIGINT or SIGTERM. Joins the cluster at RAY_ADDRESS, or starts one here.

    Args:
        listener: a listening socket, served by this process.

    Raises:
        ConfigError: if a cluster on this host has too few CPUs or GPUs.
        FaultError: if the replicas do not start.
    """
    for variable, value in _ONE_LOOP.items():
        os.environ.setdefault(variable, value)
    start_ray()
    from ray import serve
    from uvicorn import Server

    from cllm4rec_dist.serving.gateway import Gateway

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _exit)
    _require_resources(options)
    host, port = listener.getsockname()[:2]
    # Unique on a shared cluster, and unchanged when this command is restarted.
    name = f"{NAME}-{socket.gethostname()}-{host}-{port}".replace(":", ".")
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    with asyncio.Runner() as runner:
        try:
            gateway = Gateway(_deploy(options, name), options.timeout_seconds)
            _log_address(f"{options.run} by {options.replicas} replica{'s' * (options.replicas > 1)}", host, port)
            runner.run(Server(server_config(gateway, lifespan="off")).serve(sockets=[listener]))
        finally:
            runner.run(asyncio.to_thread(serve.delete, name))  # while the loop is alive: Ray reports to it


def _deploy(options: ServiceOptions, name: str) -> DeploymentHandle[Any]:
    """Start the replicas without Ray's HTTP proxy.

    Raises:
        FaultError: if they do not start.
    """
    from ray import serve

    try:
        return serve.run(build(options.model_dump()), name=name, route_prefix=None, logging_config=_QUIET)
    except RuntimeError as error:
        raise FaultError(
            "replicas", str(error).strip()[-500:], "did not start", "Serve the run without --replicas to see why."
        ) from None


def _exit(signum: int, frame: FrameType | None) -> None:
    """Exit with status 0; Ray's handler would exit with the signal's number."""
    raise SystemExit(0)


def _require_resources(options: ServiceOptions) -> None:
    """Reject more replicas than a local cluster can hold; an external cluster may still grow."""
    import ray

    total = ray.cluster_resources()
    for kind, each in {"CPU": float(options.threads or 1), "GPU": options.gpus}.items():
        if options.replicas * each <= total.get(kind, 0.0):
            continue
        text = f"{options.replicas} with {each:g} {kind} each"
        if ray_address(os.environ) == "local":
            raise ConfigError(
                "--replicas", text, f"need more than the {total.get(kind, 0.0):g} of this host", "Use fewer replicas."
            )
        logger.warning("%s: the cluster has %g now; waiting for more hosts", text, total.get(kind, 0.0))


def _log_address(served: str, host: str, port: int) -> None:
    logger.info("serving %s", served)
    logger.info("page: %s   for programs: %s/docs   end: Ctrl-C", url(host, port), url(host, port))
    if host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "anybody who can reach %s can send requests: there is no authentication (see docs/serving.md)", host
        )
