"""Settings of the service, shared by `cllm4rec serve` and `serve run`, and limits of a request."""

from __future__ import annotations

from pydantic import Field

from cllm4rec_dist.config import StrictModel

MAX_BODY_BYTES = 1_000_000
MAX_HISTORY = 1_000
"""Maximum number of history items in a request."""
MAX_TOP = 100
MAX_IDS = 10_000
"""Maximum number of ids that a request may exclude or choose from."""
MAX_ID_LENGTH = 1_000
MAX_EXPLAINED = 100
"""Maximum number of history items for `explain`; each costs a forward."""
MAX_CATEGORIES = 100
MAX_NEW_ITEMS = 50
"""Maximum number of products that a request may give by their texts; the linear memory fits a ridge regression for
each."""
MAX_TITLE_LENGTH = 1_000
MAX_DESCRIPTION_LENGTH = 10_000
MAX_QUERY_LENGTH = 200
"""Maximum length of a search, in characters."""
MAX_FOUND = 50
"""Maximum number of items that a search lists."""


class ServiceOptions(StrictModel):
    """Settings of a service."""

    run: str
    """Run folder or URL, folder of one checkpoint, or project folder."""
    backbone: str | None = None
    """Current path of the backbone, if it differs from the one in the run."""
    corpus: str | None = None
    """Current path of the corpus, if it differs from the one in the run."""
    new_item_offset: float | None = Field(default=None, allow_inf_nan=False)
    """Item bias of new items relative to the mean of the others, instead of the run's."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; more than one needs Ray Serve."""
    max_batch: int = Field(default=64, ge=1)
    """Maximum number of requests in a forward."""
    max_waiting: int = Field(default=256, ge=1)
    """Maximum number of running and waiting requests of a replica; further ones get status 503."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Time limit of a request; after it the answer is status 503."""
    check_seconds: float = Field(default=10.0, gt=0)
    """Interval between checks for a new checkpoint."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model. Default: all cores, or one per replica on Ray Serve."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per replica on Ray Serve; a fraction shares a GPU."""
