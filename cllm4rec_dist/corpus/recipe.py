"""Recipes: how raw data becomes a corpus. One YAML file a data set, in `shards/` of the repository.

`source` says where the raw files are and in which format (a model for each, told apart by `format`); the rest says what
is kept of them and how it is split. A path may be any fsspec URL, compressed or not; a relative one starts from the
current directory; `~`, `$NAME`, `${NAME}` and `${NAME:-default}` are replaced (`filesystems.expand_path`).

Reading is left to `sources/`, filtering and splitting to `catalog.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.corpus.times import check_time_format
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.filesystems import expand_path

DataPath = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


DataPaths = Annotated[tuple[DataPath, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
"""One path or several. Each is a file, a pattern such as `orders-*.csv`, or a folder of parts as Spark and Hive write
them; compressed (gz, bz2, xz, zst, zip) or not."""


def _known_encoding(name: str) -> str:
    if name != "auto":
        try:
            b"x".decode(name, errors="replace")  # refuses codecs that are no encodings of text, such as hex
        except (LookupError, UnicodeError):
            raise ValueError(f"{name!r} is no encoding; write for example utf-8, cp1252 or shift_jis") from None
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]


class FileSource(StrictModel):
    """What all sources that read files share."""

    on_bad_line: Literal["skip", "error"] = "skip"
    """A row that cannot be used: leave it out and count it, or stop with its line."""
    max_lost: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a file's rows that may be left out because they cannot be used."""
    missing: tuple[str, ...] = MISSING_WORDS
    """Words that stand for a missing id, rating, time or text, beside the empty one."""
    allow_unmatched: bool = False
    """Go on where a file of texts knows none of the users or items of the interactions."""
    encoding: Encoding = "auto"
    """Encoding of text files, by Python's name. `auto`: UTF-8, UTF-16 by its mark, or a legacy encoding that can hardly
    be another one."""


class RecboleSource(FileSource):
    """RecBole atomic files: fields with a header of names and types (`user_id:token`)."""

    format: Literal["recbole"]
    interactions: DataPaths
    """The .inter file. Where it does not exist but .train.inter, .valid.inter and .test.inter beside it do, these are
    read, and their split is kept."""
    items: DataPaths | None = None
    """The .item file."""
    users: DataPaths | None = None
    """The .user file."""
    field_separator: str = Field(default="\t", min_length=1)
    """Between fields."""
    user_field: str = "user_id"
    """Name of the user field in .inter and .user."""
    item_field: str = "item_id"
    """Name of the item field in .inter and .item."""
    rating_field: str | None = "rating"
    """Field of .inter; null where there are no ratings. Names that the recipe does not give may be absent."""
    timestamp_field: str | None = "timestamp"
    """Field of .inter; null where there are no times."""
    text_field: str | None = None
    """Field of .inter that holds reviews."""
    title_field: str | None = "movie_title"
    """Field of .item; null where items have no titles."""
    description_fields: tuple[str, ...] = ("release_year", "class")
    """Fields of .item that make the description."""
    profile_fields: tuple[str, ...] = ("age", "gender", "occupation")
    """Fields of .user that make the user's text."""


class GroupLensSource(FileSource):
    """MovieLens as GroupLens publishes it."""

    format: Literal["grouplens"]
    edition: Literal["100k", "1m", "10m", "20m", "25m", "32m", "latest", "csv"]
    """`100k`: u.data, u.item, u.user. `1m`, `10m`: ratings.dat, movies.dat and, where there is one, users.dat. The
    others: ratings.csv, movies.csv."""
    folder: DataPath
    """Where the files are."""


class AmazonSource(FileSource):
    """Amazon reviews in JSON lines."""

    format: Literal["amazon"]
    edition: Literal["2014", "2018", "2023"]
    """Year of the collection; field names depend on it."""
    reviews: DataPaths
    """Files of reviews, one JSON object a line."""
    metadata: DataPaths | None = None
    """Files of items with titles and descriptions; lines in Python's notation, as in 2014, are read too."""


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
    """Steam as McAuley's group publishes it: lines in Python's notation."""

    format: Literal["steam"]
    reviews: DataPaths
    """steam_reviews.json.gz (a review a line), australian_users_items.json.gz or australian_user_reviews.json.gz (a
    user a line, with all games)."""
    games: DataPaths | None = None
    """steam_games.json.gz: titles, genres and tags."""


class MindSource(FileSource):
    """MIND, Microsoft's news data: what a user has clicked before, and clicks among the articles shown."""

    format: Literal["mind"]
    behaviors: DataPaths
    """behaviors.tsv"""
    news: DataPaths | None = None
    """news.tsv"""


class SequencesSource(FileSource):
    """One line a user: the user, then the items in time order. JSON: {user: [items]}, or objects of user and list."""

    format: Literal["sequences"]
    sequences: DataPaths
    """File of the lines."""
    titles: DataPaths | None = None
    """A JSON object {item: title} or {item: {"title": ...}}, else lines of an item and its words."""
    separator: str | None = Field(default=None, min_length=1)
    """Between items; blanks and tabs if left out."""


class TableFile(StrictModel):
    """Rows and named columns in one file or several."""

    path: DataPaths
    """CSV, JSON or Parquet."""
    kind: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    """How it is stored; by the first bytes if left out. `jsonl` is any JSON: an object a line, one array, one object of
    objects."""
    separator: str | None = Field(default=None, min_length=1, validation_alias=AliasChoices("separator", "delimiter"))
    """Between the fields of a CSV line, one letter or several; that of comma, semicolon, tab and bar that makes the
    recipe's columns of the header if left out."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """What a quotation mark means. `auto`: it encloses a field where it opens and closes one, and is a character
    elsewhere; a field that runs over lines that look like rows is refused. `double`: RFC 4180. `none`: a character."""
    escape: str | None = Field(default=None, min_length=1, max_length=1)
    """Letter that takes the meaning away from a mark or separator behind it: a backslash for Spark and MySQL."""
    encoding: Encoding | None = None
    """Encoding of this file, where it is not that of the source."""
    decimal: str = Field(default=".", min_length=1, max_length=1)
    """Decimal mark of ratings."""
    names: tuple[str, ...] | None = None
    """Names of a CSV file's columns, in order, where its first line is not a header."""
    html: bool = False
    """Texts come from web pages: take tags out of them."""

    @model_validator(mode="after")
    def _names_for_csv(self) -> TableFile:
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
    """Format of the times, as for strptime: `%d/%m/%Y %H:%M`. Needed where the file leaves open whether 3/4/2024 is in
    March or April."""
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
    category: str | None = None
    """Column of categories, one for each item, by which recommendations can be limited."""


class UserTable(TableFile):
    """Columns of users."""

    user: str
    """Column of user ids."""
    text: tuple[str, ...]
    """Columns that are joined to the user's text."""


class TableSource(FileSource):
    """CSV, JSON or Parquet with a mapping of columns."""

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


class UsersSplit(StrictModel):
    """Hold out whole users, of whom nothing is trained on, and items of the others (strong generalisation, as in the
    protocol of Mult-VAE, Liang et al., WWW 2018)."""

    kind: Literal["users"]
    valid_users: float = Field(default=0.1, ge=0, lt=1)
    """Share of the users with three or more items who are held out for validation."""
    test_users: float = Field(default=0.1, ge=0, lt=1)
    """Share of them who are held out for the test."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of a held-out user's items that is to be predicted from the rest, one item at least of each."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Share of every other user's items for validation, as in a random split."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Share of them for the test."""

    @model_validator(mode="after")
    def _leaves_training(self) -> UsersSplit:
        if self.valid_users + self.test_users == 0:
            raise ValueError("holds out no user; give valid_users or test_users, or write kind: random")
        for names in (("valid_users", "test_users"), ("valid", "test")):
            if sum(getattr(self, name) for name in names) >= 1:
                raise ValueError(f"{' + '.join(names)} must be below 1, so that something is left to train on")
        return self


class NoSplit(StrictModel):
    """Train on everything and hold nothing out: for production. Nothing can be validated or evaluated."""

    kind: Literal["none"]


class GivenSplit(StrictModel):
    """Keep the split that the data set's files have (RecBole's benchmark files)."""

    kind: Literal["given"]


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
    split: Annotated[RandomSplit | LastSplit | UsersSplit | NoSplit | GivenSplit, Field(discriminator="kind")] = (
        RandomSplit()
    )
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

    file_kind: ClassVar[str | None] = "a recipe"

    name: str = Field(min_length=1)
    """Of the data set."""
    source: SourceConfig
    """Where the raw data are."""

    def preparation(self) -> Preparation:
        """Everything but name and source: what the manifest keeps."""
        return Preparation(**{field: getattr(self, field) for field in Preparation.model_fields})
