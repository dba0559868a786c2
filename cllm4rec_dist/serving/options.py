"""How a run is served: the settings that `cllm4rec serve` and `serve run` share, and the limits of a request."""

from __future__ import annotations

from pydantic import Field

from cllm4rec_dist.config import StrictModel

MAX_BODY_BYTES = 1_000_000
MAX_HISTORY = 1_000
"""Items of a history that a request may send."""
MAX_TOP = 100
MAX_IDS = 10_000
"""Ids that a request may exclude, or choose from."""
MAX_ID_LENGTH = 1_000
MAX_EXPLAINED = 100
"""Items of a history that can be explained: each costs a forward."""
MAX_CATEGORIES = 100
MAX_QUERY_LENGTH = 200
"""Characters of a search."""
MAX_FOUND = 50
"""Items that a search lists."""


class ServiceOptions(StrictModel):
    """Settings of a service."""

    run: str
    """Run folder or URL, folder of one checkpoint, or project folder."""
    backbone: str | None = None
    """Where the backbone is now, if not where the run says."""
    corpus: str | None = None
    """Where the corpus is now, if not where the run says."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; more than one needs Ray Serve."""
    max_batch: int = Field(default=64, ge=1)
    """Requests that one forward answers at most."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that a replica holds at a time, running and waiting; further ones are answered with 503."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Time within which a request is answered, or given up with 503."""
    check_seconds: float = Field(default=10.0, gt=0)
    """Time between looks for a new checkpoint."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model; as many as there are cores if left out, and one for each replica of Ray Serve."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a replica under Ray Serve; a fraction shares one."""
