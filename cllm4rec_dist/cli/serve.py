"""`serve`: serve a run over HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated

import typer

from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    BackboneOption,
    CorpusOption,
    NewItemOffset,
    RunArgument,
    find_trained,
    log_alone,
    moved_paths,
)
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.launchers.imports import importing_libraries
from cllm4rec_dist.launchers.launch import require_launchable
from cllm4rec_dist.serving.address import listen
from cllm4rec_dist.serving.options import ServiceOptions


@app.command()
def serve(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas on Ray Serve; default: one process without Ray.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum requests in one forward pass.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum queued requests per replica; further ones get status 503.")
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request times out.")] = 10.0,
    check: Annotated[float, typer.Option(min=0.1, help="Seconds between checks for a new checkpoint.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs per replica, with --replicas; 0.5 shares one.")] = 0.0,
    new_item_offset: NewItemOffset = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Serve a run over HTTP: recommendations, similar items, search, a page at /, OpenAPI at /docs.

    New checkpoints of the run are loaded automatically. There is no authentication: put a proxy in front.
    """
    _require_extra(with_ray=replicas is not None)
    if gpus and replicas is None:
        raise ConfigError("--gpus", gpus, "is for replicas on Ray Serve", "Leave it out; one process takes the GPU.")
    listener = listen(host, port)
    if replicas is not None:
        require_launchable("ray", str(replicas), os.environ)
    options = ServiceOptions(
        run=find_trained(run),
        replicas=replicas or 1,
        max_batch=max_batch,
        max_waiting=max_waiting,
        timeout_seconds=timeout,
        check_seconds=check,
        threads=threads,
        gpus=gpus,
        new_item_offset=new_item_offset,
        **moved_paths(backbone, corpus),
    )
    log_alone()
    with importing_libraries():
        from cllm4rec_dist.serving import app as service

    if replicas is None:
        service.serve_here(options, listener)
    else:
        service.serve_on_ray(options, listener)


def _require_extra(*, with_ray: bool) -> None:
    needed = ["fastapi", "uvicorn", "prometheus_client", "fastapi_offline", *(["ray.serve"] if with_ray else [])]
    missing = [name for name in needed if find_spec(name.partition(".")[0]) is None]
    if missing:
        raise ConfigError("serve", missing, "are not installed", "Run pip install 'cllm4rec_dist[serve]'.")
