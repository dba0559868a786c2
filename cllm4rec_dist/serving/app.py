"""Starting the service: in this process, or as replicas of Ray Serve; the same application in both.

cllm4rec serve RUN                                               one process, without Ray
cllm4rec serve RUN --replicas 4                                  Ray Serve, here or on the cluster of RAY_ADDRESS
serve run cllm4rec_dist.serving.app:build run=RUN replicas=4     the same by Ray's own command
serve build cllm4rec_dist.serving.app:build ...                  a configuration file for a cluster
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cllm4rec_dist.config import validate
from cllm4rec_dist.errors import ConfigError, DamagedCheckpointError, FaultError
from cllm4rec_dist.find_run import find
from cllm4rec_dist.log import setup_logging
from cllm4rec_dist.ray_launcher import ray_address, start_ray
from cllm4rec_dist.serving.address import url
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.serving.web import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from uvicorn import Config

__all__ = ["build", "create_app", "open_run", "serve_here", "serve_on_ray"]

logger = logging.getLogger(__name__)

NAME = "cllm4rec"
"""Of Ray Serve's application and its deployment."""
_MAX_CONNECTIONS = 2_000
_SHUTDOWN_SECONDS = 30
_START_TRIES = 3
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Ray Serve's logs; ours tell what happens to a checkpoint, and metrics count requests."""


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


def server_config(app: FastAPI) -> Config:
    """How one process serves the application."""
    from uvicorn import Config

    from cllm4rec_dist.serving.slow_clients import TimedHeaderProtocol

    return Config(
        app,
        http=TimedHeaderProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
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

        return create_app(self._live, self._options, serve.get_replica_context().replica_id.unique_id)


def serve_on_ray(options: ServiceOptions, host: str, port: int) -> None:
    """Serve by replicas on Ray until SIGINT or SIGTERM. Joins the cluster of RAY_ADDRESS, or starts one here.

    Raises:
        ConfigError: where a cluster of this host has too few processors or GPUs.
        FaultError: where the replicas do not start.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    start_ray()
    from ray import serve

    _require_room(options)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
        try:
            serve.run(build(options.model_dump()), name=NAME, route_prefix="/", logging_config=_QUIET)
        except RuntimeError as error:
            raise FaultError(
                "replicas", str(error).strip()[-500:], "did not start", "Serve the run without --replicas to see why."
            ) from None
        _tell(f"{options.run} by {options.replicas} replicas", host, port)
        stop.wait()
    finally:
        serve.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


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
