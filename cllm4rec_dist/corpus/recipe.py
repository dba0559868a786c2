"""Recipes: how to build a corpus from raw data. One YAML file per data set, in `shards/` of the repository.

`source` says where the raw files are and how to read them (one model for each `format`); the other settings say what to
keep and how to split it. A path may be any fsspec URL, compressed or not; a relative one starts from the current
directory; `~`, `$NAME`, `${NAME}` and `${NAME:-default}` are replaced (`filesystems.expand_path`).

`sources/` reads the files; `catalog.py` filters and splits.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.corpus.split_settings import (
    ColdItemsSplit,
    GivenSplit,
    LastSplit,
    NoSplit,
    RandomSplit,
    UsersSplit,
)
from cllm4rec_dist.corpus.times import check_time_format
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.filesystems import expand_path

DataPath = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


DataPaths = Annotated[tuple[DataPath, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
"""One path or several. Each is a file, a pattern such as `orders-*.csv`, or a folder of parts as Spark and Hive write
them; compressed (gz, bz2, xz, zst, zip) or not."""


def _check_encoding(name: str) -> str:
    if name != "auto":
        try:
            b"x".decode(name, errors="replace")  # refuses codecs that are not text encodings, such as hex
        except (LookupError, UnicodeError):
            raise ValueError(f"{name!r} is not an encoding; write for example utf-8, cp1252 or shift_jis") from None
    return name


Encoding = Annotated[str, AfterValidator(_check_encoding)]


class FileSource(StrictModel):
    """Settings of all sources that read files."""

    on_bad_line: Literal["skip", "error"] = "skip"
    """What to do with an unusable row: `skip` leaves it out and counts it, `error` stops and names its line."""
    max_lost: float = Field(default=0.5, ge=0, le=1)
    """Largest fraction of a file's rows that may be unusable."""
    missing: tuple[str, ...] = MISSING_WORDS
    """Words for a missing id, rating, time or text, in addition to the empty one."""
    allow_unmatched: bool = False
    """Continue if no text of a file is about a user or item with interactions."""
    new_items: bool = False
    """Keep items that have a title or description and no interaction at all: new products, recommended by their texts.
    The files of public data sets describe many items that were left out on purpose, so only `table` keeps them by
    default."""
    encoding: Encoding = "auto"
    """Encoding of text files, by Python's name. `auto`: UTF-8, UTF-16 with a byte order mark, or a legacy encoding if
    it is clear which."""


class RecboleSource(FileSource):
    """RecBole atomic files: fields with a header of names and types (`user_id:token`)."""

    format: Literal["recbole"]
    interactions: DataPaths
    """The .inter file. If it does not exist, .train.inter, .valid.inter and .test.inter in the same folder are read and
    their split is kept."""
    items: DataPaths | None = None
    """The .item file."""
    users: DataPaths | None = None
    """The .user file."""
    field_separator: str = Field(default="\t", min_length=1)
    """Separator between fields."""
    user_field: str = "user_id"
    """Name of the user field in .inter and .user."""
    item_field: str = "item_id"
    """Name of the item field in .inter and .item."""
    rating_field: str | None = "rating"
    """Field of ratings in .inter, or null. Default fields may be absent from the file, those of the recipe may not."""
    timestamp_field: str | None = "timestamp"
    """Field of times in .inter, or null."""
    text_field: str | None = None
    """Field of reviews in .inter, or null."""
    title_field: str | None = "movie_title"
    """Field of titles in .item, or null."""
    description_fields: tuple[str, ...] = ("release_year", "class")
    """Fields of .item to join into the description."""
    profile_fields: tuple[str, ...] = ("age", "gender", "occupation")
    """Fields of .user to join into the user's text."""


class GroupLensSource(FileSource):
    """MovieLens as GroupLens publishes it."""

    format: Literal["grouplens"]
    edition: Literal["100k", "1m", "10m", "20m", "25m", "32m", "latest", "csv"]
    """`100k`: u.data, u.item, u.user. `1m`, `10m`: ratings.dat, movies.dat and users.dat, if it exists. The others:
    ratings.csv, movies.csv."""
    folder: DataPath
    """Folder of the files."""


class AmazonSource(FileSource):
    """Amazon reviews in JSON lines."""

    format: Literal["amazon"]
    edition: Literal["2014", "2018", "2023"]
    """Year of the collection; field names depend on it."""
    reviews: DataPaths
    """Files of reviews, one JSON object per line."""
    metadata: DataPaths | None = None
    """Files of items with titles and descriptions; lines may be Python literals, as in 2014."""


class YelpSource(FileSource):
    """The Yelp open dataset in JSON lines."""

    format: Literal["yelp"]
    reviews: DataPaths
    """yelp_academic_dataset_review.json"""
    businesses: DataPaths | None = None
    """yelp_academic_dataset_business.json"""
    users: DataPaths | None = None
    """yelp_academic_dataset_user.json"""


class SteamSource(FileSource):
    """Steam as McAuley's group publishes it: a Python literal per line."""

    format: Literal["steam"]
    reviews: DataPaths
    """steam_reviews.json.gz (a review per line), australian_users_items.json.gz or australian_user_reviews.json.gz (a
    user per line, with all games)."""
    games: DataPaths | None = None
    """steam_games.json.gz: titles, genres and tags."""


class MindSource(FileSource):
    """MIND, Microsoft's news data: a user's click history, and clicks among the articles shown."""

    format: Literal["mind"]
    behaviors: DataPaths
    """behaviors.tsv"""
    news: DataPaths | None = None
    """news.tsv"""


class SequencesSource(FileSource):
    """One line per user: the user, then the items in time order. JSON: {user: [items]}, or objects of user and list."""

    format: Literal["sequences"]
    sequences: DataPaths
    """File of sequences."""
    titles: DataPaths | None = None
    """A JSON object {item: title} or {item: {"title": ...}}, or lines of an item and its title."""
    separator: str | None = Field(default=None, min_length=1)
    """Separator between items; spaces and tabs if left out."""


class TableFile(StrictModel):
    """Rows and named columns in one file or several."""

    path: DataPaths
    """CSV, JSON or Parquet."""
    kind: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    """File format. `auto`: by the first bytes. `jsonl` is any JSON: an object per line, one array, one object of
    objects."""
    separator: str | None = Field(default=None, min_length=1, validation_alias=AliasChoices("separator", "delimiter"))
    """Separator between the fields of a CSV line, one or more characters. If left out: the one of comma, semicolon, tab
    and bar with which the header has the recipe's columns."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """Meaning of quotation marks. `auto`: a pair around a field quotes it, any other is a plain character; a quoted
    field over lines that look like rows is refused. `double`: RFC 4180. `none`: plain characters."""
    escape: str | None = Field(default=None, min_length=1, max_length=1)
    """Escape character before a quotation mark or separator: a backslash for Spark and MySQL."""
    encoding: Encoding | None = None
    """Encoding of this file if it differs from that of the source."""
    decimal: str = Field(default=".", min_length=1, max_length=1)
    """Decimal mark of ratings."""
    names: tuple[str, ...] | None = None
    """Names of a CSV file's columns, in order, if its first line is not a header."""
    html: bool = False
    """Remove HTML from texts."""

    @model_validator(mode="after")
    def _check_names(self) -> TableFile:
        if self.names is not None and self.kind not in ("csv", "auto"):
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
    """Column of times: epochs of any unit, ISO 8601, RFC 2822, dates. Only their order is used."""
    time_format: Annotated[str, AfterValidator(check_time_format)] | None = None
    """`strptime` format of the times, such as `%d/%m/%Y %H:%M`. Needed if all dates are ambiguous, such as 3/4/2024."""
    text: str | None = None
    """Column of reviews."""


class ItemTable(TableFile):
    """Columns of items."""

    item: str
    """Column of item ids."""
    title: str | None = None
    """Column of titles."""
    description: tuple[str, ...] = ()
    """Columns to join into the description."""
    category: str | None = None
    """Column of categories, one per item, by which recommendations can be filtered."""


class UserTable(TableFile):
    """Columns of users."""

    user: str
    """Column of user ids."""
    text: tuple[str, ...]
    """Columns to join into the user's text."""


class TableSource(FileSource):
    """CSV, JSON or Parquet with a mapping of columns."""

    format: Literal["table"]
    new_items: bool = True
    """Keep items that have a title or description and no interaction at all: new products, recommended by their
    texts."""
    interactions: InteractionTable
    """File of interactions."""
    items: ItemTable | None = None
    """File of titles and descriptions."""
    users: UserTable | None = None
    """File of texts about users."""


class SyntheticSource(StrictModel):
    """Synthetic users and items with a known structure; see `synthetic.py`."""

    format: Literal["synthetic"]
    num_users: int = Field(600, ge=1)
    """Number of users."""
    num_items: int = Field(400, ge=1)
    """Number of items, evenly distributed over the clusters."""
    num_clusters: int = Field(12, ge=1, le=16)
    """Number of clusters of interest, each with its own vocabulary."""
    mean_interactions: float = Field(20.0, ge=5)
    """Mean number of items per user; each user has at least five."""
    seed: int = Field(0, ge=0)
    """Random seed of the data (the recipe's `seed` is that of the split)."""

    @model_validator(mode="after")
    def _enough_items(self) -> SyntheticSource:
        if self.num_items < max(5, self.num_clusters):
            raise ValueError("num_items must be at least 5 and at least num_clusters")
        return self


SourceConfig = Annotated[
    RecboleSource
    | GroupLensSource
    | AmazonSource
    | YelpSource
    | SteamSource
    | MindSource
    | SequencesSource
    | TableSource
    | SyntheticSource,
    Field(discriminator="format"),
]


class TextsConfig(StrictModel):
    """Texts of the content corpus."""

    user_item: bool = True
    """Reviews of training interactions. Those of held-out interactions are never used: they would leak the target."""
    item: bool = True
    """Titles and descriptions of items."""
    user: bool = True
    """Profiles of users."""


class Preparation(StrictModel):
    """How raw data is filtered, split and packed; part of the manifest."""

    rating_threshold: float | None = None
    """Least rating of an interaction; null keeps every interaction."""
    min_user_items: int = Field(1, ge=1)
    """Least number of items per user. Applied with `min_item_users` until nothing changes (k-core)."""
    min_item_users: int = Field(1, ge=1)
    """Least number of users per item."""
    split: Annotated[
        RandomSplit | LastSplit | UsersSplit | ColdItemsSplit | NoSplit | GivenSplit, Field(discriminator="kind")
    ] = RandomSplit()
    """How to hold out items for validation and test."""
    seed: int = Field(0, ge=0)
    """Random seed of the split."""
    texts: TextsConfig = TextsConfig()
    """Texts to use."""
    max_text_tokens: int = Field(256, ge=1)
    """Word tokens to which longer texts are truncated."""
    examples_per_record: int = Field(256, ge=1)
    """Users or texts per record."""
    records_per_shard: int = Field(64, ge=1)
    """Records per tar file."""


class PrepareConfig(Preparation):
    """A recipe."""

    file_kind: ClassVar[str | None] = "a recipe"

    name: str = Field(min_length=1)
    """Name of the data set."""
    source: SourceConfig
    """Raw data and how to read it."""

    def preparation(self) -> Preparation:
        """Return the settings that the manifest keeps: all but name and source."""
        return Preparation(**{field: getattr(self, field) for field in Preparation.model_fields})
