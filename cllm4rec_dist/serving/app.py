"""Starting the service: in this process, or as replicas of Ray Serve; the same application in both.

cllm4rec serve RUN                                               one process, without Ray
cllm4rec serve RUN --replicas 4                                  Ray Serve, here or on the cluster of RAY_ADDRESS
serve run cllm4rec_dist.serving.app:build run=RUN replicas=4     the same by Ray's own command
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
"""Ray Serve's logs; ours tell what happens to a checkpoint, and metrics count requests."""

_ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Variables that spare a request of Ray Serve two changes of thread; what takes time here has threads of its own."""


def open_run(options: ServiceOptions) -> LiveRecommender:
    """A run's best checkpoint, loaded.

    Raises:
        CLLM4RecError: where there is no whole checkpoint, or the backbone or corpus is gone or another one.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    load = partial(Recommender.load, backbone=options.backbone, corpus=options.corpus)
    return LiveRecommender(load, partial(_best_checkpoint, options.run), options.run)


def _best_checkpoint(run: str) -> tuple[str, str]:
    """Path and contents of the marker of the checkpoint that a run means now."""
    store, names = find(run)
    try:
        return store.path(names[0]), store.marker(names[0]).model_dump_json()
    except DamagedCheckpointError as error:
        return store.path(names[0]), str(error)  # loading it says the same


def serve_here(options: ServiceOptions, listener: socket.socket) -> None:
    """Serve in this process until SIGINT or SIGTERM; requests that are running are finished.

    Args:
        listener: a listening socket.

    Raises:
        CLLM4RecError: as `open_run`.
    """
    from uvicorn import Server

    live = open_run(options)
    app = create_app(live, options)
    _tell(f"{options.run} ({live.info.checkpoint}, step {live.info.step})", *listener.getsockname()[:2])
    Server(server_config(app)).run(sockets=[listener])


def server_config(app: ASGIApp, lifespan: Literal["on", "off"] = "on") -> Config:
    """How this process serves an application."""
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
        arguments: settings of `ServiceOptions`, of which `run` is needed; a path that every host can read.
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
    """A copy of the model with the application over it, in a process of Ray Serve."""

    def __init__(self, settings: dict[str, Any]) -> None:
        setup_logging()
        self._options = ServiceOptions.model_validate(settings)
        self._live = open_run(self._options)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve

        self._served = create_app(self._live, self._options, serve.get_replica_context().replica_id.unique_id)
        return self._served

    async def answer(self, scope: dict[str, Any], body: bytes) -> HttpAnswer:
        """The application's answer to a request of `Gateway`."""
        from cllm4rec_dist.serving.gateway import call_whole

        return await call_whole(self._served, scope, body)


def serve_on_ray(options: ServiceOptions, listener: socket.socket) -> None:
    """Serve by replicas on Ray until SIGINT or SIGTERM. Joins the cluster of RAY_ADDRESS, or starts one here.

    Args:
        listener: a listening socket, served by this process.

    Raises:
        ConfigError: where a cluster of this host has too few processors or GPUs.
        FaultError: where the replicas do not start.
    """
    for variable, value in _ONE_LOOP.items():
        os.environ.setdefault(variable, value)
    start_ray()
    from ray import serve
    from uvicorn import Server

    from cllm4rec_dist.serving.gateway import Gateway

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    _require_room(options)
    host, port = listener.getsockname()[:2]
    # Unique on a cluster that others use too, and the same when this command is started again.
    name = f"{NAME}-{socket.gethostname()}-{host}-{port}".replace(":", ".")
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    with asyncio.Runner() as runner:
        try:
            gateway = Gateway(_deploy(options, name), options.timeout_seconds)
            _tell(f"{options.run} by {options.replicas} replica{'s' * (options.replicas > 1)}", host, port)
            runner.run(Server(server_config(gateway, lifespan="off")).serve(sockets=[listener]))
        finally:
            runner.run(asyncio.to_thread(serve.delete, name))  # in the loop's lifetime: Ray reports to it


def _deploy(options: ServiceOptions, name: str) -> DeploymentHandle[Any]:
    """Start the replicas, without a proxy of Ray's in front.

    Raises:
        FaultError: where they do not start.
    """
    from ray import serve

    try:
        return serve.run(build(options.model_dump()), name=name, route_prefix=None, logging_config=_QUIET)
    except RuntimeError as error:
        raise FaultError(
            "replicas", str(error).strip()[-500:], "did not start", "Serve the run without --replicas to see why."
        ) from None


def _end(number: int, frame: FrameType | None) -> None:
    """End this process as one that did what it was to do; Ray itself ends with the number of the signal."""
    raise SystemExit(0)


def _require_room(options: ServiceOptions) -> None:
    """Refuse more replicas than a cluster of this host can hold; one that was joined may grow."""
    import ray

    total = ray.cluster_resources()
    for kind, each in {"CPU": float(options.threads or 1), "GPU": options.gpus}.items():
        if options.replicas * each <= total.get(kind, 0.0):
            continue
        text = f"{options.replicas} with {each:g} {kind} each"
        if ray_address(os.environ) == "local":
            raise ConfigError(
                "--replicas", text, f"need more than the {total.get(kind, 0.0):g} of this host", "Ask for fewer."
            )
        logger.warning("%s: the cluster has %g now; waiting for more hosts", text, total.get(kind, 0.0))


def _tell(what: str, host: str, port: int) -> None:
    logger.info("serving %s", what)
    logger.info("page: %s   for programs: %s/docs   end: Ctrl-C", url(host, port), url(host, port))
    if host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("anybody who reaches %s may ask: there is no authentication (see docs/serving.md)", host)
