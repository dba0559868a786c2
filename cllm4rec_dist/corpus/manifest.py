"""The manifest of a corpus, `manifest.json`.

It is written last, so that its presence means a complete corpus, and contains the size and sha256 of every file, so
that damage is detected before training starts. It contains no path outside of the corpus and no time: the same input
gives the same bytes on every machine, and the sha256 of the manifest identifies the corpus.

`shards.py` reads the other files and `writer.py` writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from enum import IntEnum
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.corpus.recipe import Preparation
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.filesystems import as_os_errors, is_url, locate
from cllm4rec_dist.suggestions import did_you_mean_path

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
INIT_CACHE = "init-cache"
"""Folder of a corpus with spectral factors of its items (`model/init_cache.py`). Not part of the corpus itself."""
SPLITS = ("train", "valid", "test")
NEW_USER_SPLITS = ("history", "valid", "test")
"""Parts of the items of users who are held out whole: input of the prediction, and held-out items."""
_RELATIVE_PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


class ContentKind(IntEnum):
    """Subject of a text in the content corpus; stored as uint8."""

    USER_ITEM = 0
    """A review by a user about an item."""
    ITEM_TITLE = 1
    ITEM_DESCRIPTION = 2
    USER_PROFILE = 3


class FileEntry(StrictModel):
    """One file of the corpus."""

    path: str
    """Relative to the manifest, with forward slashes."""
    kind: Literal["users", "items", "new_users", "interactions", "content"]
    """A table of users, items or users who are held out whole, or a shard of interactions or texts."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Hexadecimal sha256 of the file."""
    record_sizes: tuple[int, ...] = ()
    """Number of examples in each record, in file order; shards only."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not _RELATIVE_PATH.fullmatch(path):
            raise ValueError("must be a plain relative path inside of the corpus")
        return path


class LeftOut(StrictModel):
    """What was left out of the corpus for one reason."""

    count: int
    """Number of rows, texts or users."""
    share: float = 0.0
    """Fraction of their total in the raw data; 0 if unknown."""
    file: str | None = None
    """Name of the raw file with the first one, without its folder."""
    line: int | None = None
    """Line (row of a Parquet file, position in a JSON document) of the first one."""
    value: str | None = None
    """Value of the first one, shortened."""

    def describe(self) -> str:
        """Format the fraction and the first one for a log line, in brackets; empty if neither is known."""
        parts = [f"{100 * self.share:.3g} %"] if self.share else []
        line = "" if self.line is None else f" line {self.line}"
        value = "" if self.value is None else f" {self.value!r}"
        if self.file is not None or self.value is not None:
            parts.append(f"first: {self.file or ''}{line}{value}".replace(":  ", ": "))
        return f" ({'; '.join(parts)})" if parts else ""


class OrderColumns(StrictModel):
    """Columns of a table of interactions in the recipe; files with later orders have the same ones."""

    user: str
    """Column of user ids."""
    item: str
    """Column of item ids."""
    timestamp: str | None = None
    """Column of times."""
    time_format: str | None = None
    """`strptime` format of the times, if the recipe sets one."""


class ItemColumns(StrictModel):
    """Columns of the table of items in the recipe; files with new items have the same ones."""

    item: str
    """Column of item ids."""
    title: str | None = None
    """Column of titles."""
    description: tuple[str, ...] = ()
    """Columns that are joined into the description."""
    html: bool = False
    """HTML is removed from the texts."""


class Manifest(StrictModel):
    """Contents of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    """Version of the file layout."""
    name: str
    """Name of the data set."""
    num_users: int
    """Rows of users.parquet; each user has at least one training item."""
    num_items: int
    """Rows of items.parquet."""
    num_new_items: int = Field(default=0, ge=0)
    """Items without interactions in the raw data, known by their texts alone."""
    num_interactions: dict[str, int]
    """Number of interactions by split: train, valid, test."""
    num_new_users: int = Field(default=0, ge=0)
    """Rows of new_users.parquet: users who are held out whole and are not in users.parquet."""
    num_new_interactions: dict[str, int] = Field(default_factory=dict)
    """Interactions of these users by part: history, valid, test."""
    num_content: dict[str, int]
    """Number of texts by kind: user_item, item_title, item_description, user_profile."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that encoded the texts; a run with another one is refused."""
    preparation: Preparation
    """Filters, split, seed and texts of the recipe."""
    order_columns: OrderColumns | None = None
    """Columns of a table; None for other formats and in a corpus built by an earlier version."""
    item_columns: ItemColumns | None = None
    """Columns of a table of items; None for other formats and in a corpus built by an earlier version."""
    split_digests: dict[str, str] = Field(default_factory=dict)
    """sha256 by split over the keys of its interactions (`pair_keys.py`), which do not depend on order, tokenizer or
    rows; includes new users, whose `history` is a separate split. Empty in a corpus built by an earlier version."""
    skipped: dict[str, LeftOut]
    """Raw data left out of the corpus, by reason."""
    files: tuple[FileEntry, ...]
    """Every other file of the corpus, shards in order."""

    @field_validator("skipped", mode="before")
    @classmethod
    def _plain_counts(cls, skipped: object) -> object:
        """Accept older corpora, which have only counts."""
        if not isinstance(skipped, dict):
            return skipped
        return {reason: {"count": entry} if isinstance(entry, int) else entry for reason, entry in skipped.items()}

    @model_validator(mode="after")
    def _has_tables(self) -> Manifest:
        if [len(self.of_kind(kind)) for kind in ("users", "items")] != [1, 1]:
            raise ValueError("files must name one table of users and one of items")
        if len(self.of_kind("new_users")) != (self.num_new_users > 0):
            raise ValueError("files must name one table of new users if there are any")
        return self

    @property
    def has_cold_items(self) -> bool:
        """True if items without training interactions are in the catalog on purpose, with rows from their texts."""
        return self.num_new_items > 0 or self.preparation.split.kind == "cold_items"

    def num_held_out(self, split: str) -> int:
        """Return the number of items held out for `split`, of users with and without a row."""
        return self.num_interactions.get(split, 0) + self.num_new_interactions.get(split, 0)

    def of_kind(self, kind: str) -> tuple[FileEntry, ...]:
        """Return the files of one kind, in order."""
        return tuple(entry for entry in self.files if entry.kind == kind)

    def to_bytes(self) -> bytes:
        """Serialize; equal manifests give equal bytes."""
        absent = set() if self.num_new_users else {"num_new_users", "num_new_interactions"}
        absent |= set() if self.num_new_items else {"num_new_items"}
        absent |= set() if self.order_columns else {"order_columns"}
        absent |= set() if self.item_columns else {"item_columns"}
        return (self.model_dump_json(indent=1, exclude=absent) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> Manifest:
        """Parse and check; errors name `origin`.

        Raises:
            CorpusError: unless `content` is a manifest of this schema version.
        """
        try:
            version = json.loads(content)["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(origin, str(error), "is not a corpus manifest", "Build the corpus again.") from None
        if version != SCHEMA_VERSION:
            raise CorpusError(
                f"{origin} schema_version",
                version,
                f"is not {SCHEMA_VERSION}, which this cllm4rec_dist reads",
                "Use the version of cllm4rec_dist that built the corpus, or build it again with this one.",
            )
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CorpusError(
                f"{origin} {field}", first["input"], f"is invalid ({first['msg']})", "Build the corpus again."
            ) from None


def _suggest_corpus(url: str) -> str:
    """Return a sentence with the corpus closest to a wrong path, for the end of a cure."""
    inside = Path(url, "corpus")
    if not is_url(url) and (inside / MANIFEST_NAME).is_file():
        return f" Did you mean {str(inside)!r}?"
    return did_you_mean_path(url)


def load_manifest(url: str) -> tuple[Manifest, str]:
    """Read the manifest of a corpus, a folder or fsspec URL, and its sha256; no other file is read.

    Raises:
        CorpusError: if the corpus is absent, incomplete or of another schema version.
    """
    fs, root = locate("corpus", url, CorpusError)
    try:
        with as_os_errors():
            content = fs.cat_file(f"{root}/{MANIFEST_NAME}")
    except OSError as error:
        raise CorpusError(
            "corpus",
            url,
            f"has no readable {MANIFEST_NAME} ({error})",
            f"Build it with `cllm4rec prepare`; a build that was interrupted leaves no manifest.{_suggest_corpus(url)}",
        ) from error
    return Manifest.from_bytes(content, f"{url}/{MANIFEST_NAME}"), hashlib.sha256(content).hexdigest()
