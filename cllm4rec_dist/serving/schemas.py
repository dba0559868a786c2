"""Requests and answers of the service, as JSON. Types are strict: "10" is no number and 1 is no boolean."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cllm4rec_dist.serving import options

Id = Annotated[str, Field(min_length=1, max_length=options.MAX_ID_LENGTH)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class RecommendRequest(_Request):
    """A customer, a history, or both; with neither, popular items are listed."""

    user: Id | None = None
    """Id of a user of the run; their items are known and need not be sent."""
    history: list[Id] = Field(default=[], max_length=options.MAX_HISTORY)
    """Item ids, oldest first: a basket, or what a known user has taken since the training. Unknown ids are left out and
    listed in the answer."""
    top: int = Field(default=10, ge=1, le=options.MAX_TOP)
    """Length of the list."""
    exclude: list[Id] = Field(default=[], max_length=options.MAX_IDS)
    """Item ids not to list, such as what is sold out."""
    only: list[Id] | None = Field(default=None, max_length=options.MAX_IDS)
    """Item ids to choose from; the whole catalog if left out."""
    exclude_categories: list[Id] = Field(default=[], max_length=options.MAX_CATEGORIES)
    """Categories not to list."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """Lowest score of an item that is listed."""
    include_seen: bool = False
    """List items of the history too."""
    explain: bool = False
    """Say for each item what every item of the history contributes to its score."""


class SimilarRequest(_Request):
    """An item whose neighbours are wanted."""

    item: Id
    """Item id."""
    top: int = Field(default=10, ge=1, le=options.MAX_TOP)
    """Length of the list."""


class ItemsRequest(BaseModel):
    """A search for items."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    query: str = Field(min_length=1, max_length=options.MAX_QUERY_LENGTH)
    """Words of a title, of which the last may be unfinished; or an item id."""
    limit: int = Field(default=10, ge=1, le=options.MAX_FOUND)
    """Items to list."""


class Item(_Answer):
    """A product."""

    item: str
    """Item id."""
    title: str
    """Title; empty where the item has none."""
    category: str | None
    """Category; null where the run has none."""


class Contribution(_Answer):
    """What an item of the history adds to a score."""

    item: str
    """Item id."""
    title: str
    """Title; empty where the item has none."""
    contribution: float
    """The score minus the score that the list's item has without this one; negative where it lowers the score."""


class RecommendedItem(Item):
    """An item of a list."""

    score: float | None
    """The model's score, comparable within one list; null where popular items are listed."""
    because: list[Contribution] | None
    """Contributions, largest first; null unless `explain` is true and the model made the list."""


class RecommendAnswer(_Answer):
    """A list of items, best first."""

    items: list[RecommendedItem]
    """Fewer than `top` where no more are left."""
    unknown_items: list[str]
    """Ids of the history that the run does not know; they are left out."""
    fallback: bool
    """True where nothing of the history is known, so that popular items are listed."""
    known_user: bool
    """True where the run has learned this user."""
    checkpoint: str
    """Name of the checkpoint that made the list."""


class SimilarItem(Item):
    """A neighbour of an item."""

    score: float
    """Cosine of the items' embeddings."""


class SimilarAnswer(_Answer):
    """Neighbours of an item, nearest first."""

    items: list[SimilarItem]
    checkpoint: str
    """Name of the checkpoint that made the list."""


class FoundItems(_Answer):
    """Items whose titles a search finds, best first."""

    items: list[Item]


class Run(_Answer):
    """What is served."""

    run: str
    """Name of the run's folder."""
    checkpoint: str
    step: int
    """Training steps of the checkpoint."""
    date: str
    """When the checkpoint was written, in UTC."""
    stage: str
    """pretrain or finetune."""
    best_metric: str | None
    """Validation metric that the checkpoint was chosen by; null where the run never validated."""
    best_value: float | None
    corpus: str
    num_users: int
    num_items: int
    backbone: str
    num_parameters: int
    num_trained: int
    """Parameters that were trained."""
    has_categories: bool
    version: str
    """Version of cllm4rec_dist."""


class Health(_Answer):
    """That the service answers."""

    status: str
    checkpoint: str
    step: int


class Violation(_Answer):
    """What is wrong with a request."""

    field: str
    constraint: str
    """The rule that it breaks, with the value that it has."""
    cure: str
    """What to do about it."""


class Problem(_Answer):
    """Why a request was not answered."""

    detail: str
    """All violations in one text."""
    errors: list[Violation]
