"""JSON requests and answers of the service. Types are strict: "10" is not a number and 1 is not a boolean."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cllm4rec_dist.serving import options

Id = Annotated[str, Field(min_length=1, max_length=options.MAX_ID_LENGTH)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class NewItem(_Request):
    """A product that the run does not have, known by its text alone. Title or description must have a word that the
    run's items have."""

    item: Id
    """Item id, not one of the run's."""
    title: str = Field(default="", max_length=options.MAX_TITLE_LENGTH)
    """Title, shown in lists."""
    description: str = Field(default="", max_length=options.MAX_DESCRIPTION_LENGTH)
    """Further text."""


class RecommendRequest(_Request):
    """A user, a history, or both; with neither, popular items are listed."""

    user: Id | None = None
    """Id of a user of the run; their items in the corpus need not be sent."""
    history: list[Id] = Field(default=[], max_length=options.MAX_HISTORY)
    """Item ids, oldest first: a basket, or a known user's items since training. Unknown ids are ignored and
    listed in the answer."""
    top: int = Field(default=10, ge=1, le=options.MAX_TOP)
    """Length of the list."""
    exclude: list[Id] = Field(default=[], max_length=options.MAX_IDS)
    """Item ids to leave out, such as sold-out items."""
    only: list[Id] | None = Field(default=None, max_length=options.MAX_IDS)
    """Item ids to choose from; default: the whole catalog."""
    exclude_categories: list[Id] = Field(default=[], max_length=options.MAX_CATEGORIES)
    """Categories to leave out."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """Lowest score of a listed item."""
    include_seen: bool = False
    """Also list items of the history."""
    new_items: list[NewItem] = Field(default=[], max_length=options.MAX_NEW_ITEMS)
    """Products that the run does not have. They may be listed, and in `history`, `exclude` and `only`; nothing of them
    is kept."""
    explain: bool = False
    """Return the contribution of every history item to each score."""


class SimilarRequest(_Request):
    """An item to find similar items for."""

    item: Id
    """Item id."""
    top: int = Field(default=10, ge=1, le=options.MAX_TOP)
    """Length of the list."""
    new_items: list[NewItem] = Field(default=[], max_length=options.MAX_NEW_ITEMS)
    """Products that the run does not have; `item` may be one of them, and they may be listed."""


class ItemsRequest(BaseModel):
    """A search for items."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    query: str = Field(min_length=1, max_length=options.MAX_QUERY_LENGTH)
    """Words of a title, the last of which may be incomplete, or the beginning of an item id."""
    limit: int = Field(default=10, ge=1, le=options.MAX_FOUND)
    """Maximum number of items to list."""


class Item(_Answer):
    """A product."""

    item: str
    """Item id."""
    title: str
    """Title; empty if the item has none."""
    category: str | None
    """Category; null if the item has none."""


class Contribution(_Answer):
    """Contribution of a history item to a score."""

    item: str
    """Item id."""
    title: str
    """Title; empty if the item has none."""
    contribution: float
    """The score with this history item minus the score without it; negative if it lowers the score."""


class RecommendedItem(Item):
    """An item of a list."""

    score: float | None
    """The model's score, comparable within one list; null for popular items."""
    because: list[Contribution] | None
    """Contributions, largest first; null unless `explain` is set and `fallback` is false."""


class RecommendAnswer(_Answer):
    """A list of items, best first."""

    items: list[RecommendedItem]
    """Fewer than `top` if no more are left."""
    unknown_items: list[str]
    """History ids that are unknown to the run and were ignored."""
    fallback: bool
    """True if no user row and no item is known, so that popular items are listed."""
    known_user: bool
    """True if the run has trained a row for this user."""
    checkpoint: str
    """Name of the checkpoint that made the list."""


class SimilarItem(Item):
    """An item similar to another one."""

    score: float
    """Cosine of the items' embeddings."""


class SimilarAnswer(_Answer):
    """Similar items, most similar first."""

    items: list[SimilarItem]
    checkpoint: str
    """Name of the checkpoint that made the list."""


class FoundItems(_Answer):
    """Items that match a search, best match first."""

    items: list[Item]


class Run(_Answer):
    """The run in use."""

    run: str
    """Name of the run's folder."""
    checkpoint: str
    step: int
    """Optimizer steps of the checkpoint."""
    date: str
    """Time at which the checkpoint was written, in UTC."""
    stage: str
    """pretrain or finetune."""
    best_metric: str | None
    """Validation metric that selects checkpoints; null if the run never validated."""
    best_value: float | None
    """Its value for this checkpoint; null if this is not the best one, as where that one is damaged."""
    corpus: str
    num_users: int
    num_items: int
    backbone: str
    num_parameters: int
    num_trained: int
    """Number of trainable parameters."""
    has_categories: bool
    version: str
    """Version of cllm4rec_dist."""


class Health(_Answer):
    """Health of the service."""

    status: str
    checkpoint: str
    step: int


class Violation(_Answer):
    """A rule that a request breaks."""

    field: str
    constraint: str
    """The rule, with the given value."""
    cure: str
    """How to fix it."""


class Problem(_Answer):
    """Why a request was not answered."""

    detail: str
    """All violations in one text."""
    errors: list[Violation]
