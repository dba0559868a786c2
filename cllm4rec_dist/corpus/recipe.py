"""Recipes: how raw data becomes a corpus. One YAML file a data set, in `shards/` of the repository.

`source` says where the raw files are and in which format (a model for each, told apart by `format`); the rest says what
is kept of them and how it is split. A path may be any fsspec URL, compressed or not; a relative one starts from the
current directory; `${NAME}` and `${NAME:-default}` are replaced by environment variables.

Reading is left to `sources/`, filtering and splitting to `catalog.py`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cllm4rec_dist.config import StrictModel

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def expand_path(path: str) -> str:
    """Replace `${NAME}`, `${NAME:-default}` and a leading `~`. ValueError for a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"environment variable {name} is not set; set it or write ${{{name}:-some/folder}}")
        return found

    return os.path.expanduser(_VARIABLE.sub(value, path))


DataPath = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]


class FileSource(StrictModel):
    """What all sources that read files share."""

    on_bad_line: Literal["skip", "error"] = "skip"
    """A line that cannot be read: leave it out and count it, or stop with its number."""


class RecboleSource(FileSource):
    """RecBole atomic files: tab-separated, with a header of typed fields (`user_id:token`)."""

    format: Literal["recbole"]
    interactions: DataPath
    """The .inter file."""
    items: DataPath | None = None
    """The .item file."""
    users: DataPath | None = None
    """The .user file."""
    user_field: str = "user_id"
    """Name of the user field in .inter and .user."""
    item_field: str = "item_id"
    """Name of the item field in .inter and .item."""
    rating_field: str | None = "rating"
    """Field of .inter; null where there are no ratings."""
    timestamp_field: str | None = "timestamp"
    """Field of .inter; null where there are no times."""
    text_field: str | None = None
    """Field of .inter that holds reviews."""
    title_field: str = "movie_title"
    """Field of .item."""
    description_fields: tuple[str, ...] = ("release_year", "class")
    """Fields of .item that make the description."""
    profile_fields: tuple[str, ...] = ("age", "gender", "occupation")
    """Fields of .user that make the user's text."""


class GroupLensSource(FileSource):
    """MovieLens as GroupLens publishes it."""

    format: Literal["grouplens"]
    edition: Literal["100k", "1m", "csv"]
    """`100k`: u.data, u.item, u.user. `1m`: ratings.dat, movies.dat, users.dat.
    `csv`: ratings.csv, movies.csv (20m, 25m, 32m, latest)."""
    folder: DataPath
    """Where the files are, uncompressed."""


class AmazonSource(FileSource):
    """Amazon reviews in JSON lines."""

    format: Literal["amazon"]
    edition: Literal["2014", "2018", "2023"]
    """Year of the collection; field names depend on it."""
    reviews: DataPath
    """File of reviews, one JSON object a line."""
    metadata: DataPath | None = None
    """File of items with titles and descriptions; lines in Python's notation, as in 2014, are read too."""


class YelpSource(FileSource):
    """The Yelp open dataset in JSON lines."""

    format: Literal["yelp"]
    reviews: DataPath
    """yelp_academic_dataset_review.json"""
    businesses: DataPath | None = None
    """yelp_academic_dataset_business.json"""
    users: DataPath | None = None
    """yelp_academic_dataset_user.json"""


class SequencesSource(FileSource):
    """One line a user: the user, then the items in time order, separated by blanks."""

    format: Literal["sequences"]
    sequences: DataPath
    """File of the lines."""
    titles: DataPath | None = None
    """A JSON object {item: title} if the name ends with .json (or .json.gz), else lines of an item and its words."""


class TableFile(StrictModel):
    """A file of rows and named columns."""

    path: DataPath
    """CSV, JSON lines or Parquet."""
    kind: Literal["csv", "jsonl", "parquet"] = "csv"
    """How it is stored."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Between the fields of a CSV line; quotes are those of RFC 4180."""
    names: tuple[str, ...] | None = None
    """Names of a CSV file's columns, in order, where its first line is not a header."""

    @model_validator(mode="after")
    def _names_for_csv(self) -> TableFile:
        if self.names is not None and self.kind != "csv":
            raise ValueError("names belongs to csv; the other kinds name their columns themselves")
        return self


class InteractionTable(TableFile):
    """Columns of interactions."""

    user: str
    """Column of user ids."""
    item: str
    """Column of item ids."""
    rating: str | None = None
    """Column of ratings."""
    timestamp: str | None = None
    """Column of times: numbers in any one unit, or ISO 8601 dates. Only their order is used."""
    text: str | None = None
    """Column of reviews."""


class ItemTable(TableFile):
    """Columns of items."""

    item: str
    """Column of item ids."""
    title: str | None = None
    """Column of titles."""
    description: tuple[str, ...] = ()
    """Columns that are joined to the description."""


class UserTable(TableFile):
    """Columns of users."""

    user: str
    """Column of user ids."""
    text: tuple[str, ...]
    """Columns that are joined to the user's text."""


class TableSource(FileSource):
    """CSV, JSON lines or Parquet with a mapping of columns."""

    format: Literal["table"]
    interactions: InteractionTable
    """Who interacted with what."""
    items: ItemTable | None = None
    """Titles and descriptions."""
    users: UserTable | None = None
    """Texts about users."""


class SyntheticSource(StrictModel):
    """Invented users and items with a known structure; see `synthetic.py`."""

    format: Literal["synthetic"]
    num_users: int = Field(600, ge=1)
    """Users."""
    num_items: int = Field(400, ge=1)
    """Items, spread evenly over the clusters."""
    num_clusters: int = Field(12, ge=1, le=16)
    """Fields of interest, each with its own words."""
    mean_interactions: float = Field(20.0, ge=5)
    """Items of a user on average; nobody has fewer than five."""
    seed: int = Field(0, ge=0)
    """Of everything random in the data (the recipe's `seed` is that of the split)."""

    @model_validator(mode="after")
    def _enough_items(self) -> SyntheticSource:
        if self.num_items < max(5, self.num_clusters):
            raise ValueError("num_items must be at least 5 and at least num_clusters")
        return self


SourceConfig = Annotated[
    RecboleSource | GroupLensSource | AmazonSource | YelpSource | SequencesSource | TableSource | SyntheticSource,
    Field(discriminator="format"),
]


class RandomSplit(StrictModel):
    """Hold out a random share of each user's items."""

    kind: Literal["random"] = "random"
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Share for validation, rounded to whole items for each user."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Share for the test."""

    @model_validator(mode="after")
    def _leaves_training(self) -> RandomSplit:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must be below 1, so that something is left to train on")
        return self


class LastSplit(StrictModel):
    """Hold out each user's last items in time: the very last for the test, those before them for validation."""

    kind: Literal["last"]
    num_valid: int = Field(1, ge=0)
    """Items for validation."""
    num_test: int = Field(1, ge=0)
    """Items for the test."""


class TextsConfig(StrictModel):
    """Which texts the content corpus holds."""

    user_item: bool = True
    """Reviews of training interactions. Reviews of held-out ones never enter: they would give the answer away."""
    item: bool = True
    """Titles and descriptions."""
    user: bool = True
    """Profiles of users."""


class Preparation(StrictModel):
    """What is kept of the raw data, how it is split and packed; written into the manifest."""

    rating_threshold: float | None = None
    """Keep ratings of at least this; null keeps every interaction."""
    min_user_items: int = Field(1, ge=1)
    """Leave out users with fewer items ..."""
    min_item_users: int = Field(1, ge=1)
    """... and items with fewer users, again and again until nothing changes."""
    split: Annotated[RandomSplit | LastSplit, Field(discriminator="kind")] = RandomSplit()
    """What is held out for validation and test."""
    seed: int = Field(0, ge=0)
    """Of the random split."""
    texts: TextsConfig = TextsConfig()
    """Which texts are used."""
    max_text_tokens: int = Field(256, ge=1)
    """Longer texts are cut to this many words of the tokenizer."""
    examples_per_record: int = Field(256, ge=1)
    """Users, or texts, packed in one record."""
    records_per_shard: int = Field(64, ge=1)
    """Records in one tar file."""


class PrepareConfig(Preparation):
    """A recipe."""

    name: str = Field(min_length=1)
    """Of the data set."""
    source: SourceConfig
    """Where the raw data are."""

    def preparation(self) -> Preparation:
        """Everything but name and source: what the manifest keeps."""
        return Preparation(**{field: getattr(self, field) for field in Preparation.model_fields})
