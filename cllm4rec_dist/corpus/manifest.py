"""What a corpus on disk says about itself: `manifest.json`.

It is written last, so that its presence means a complete corpus, and holds the size and sha256 of every file, so that
damage is found before training and not in it. It names no path outside of the corpus and no time: the same input gives
the same bytes wherever and whenever it is built, and the sha256 of the manifest identifies the corpus.

Reading and writing of the files is left to `shards.py` and `writer.py`.
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
SPLITS = ("train", "valid", "test")
NEW_USER_SPLITS = ("history", "valid", "test")
"""Parts of the items of users who are held out whole: what a prediction is made from, and what it is held against."""
_RELATIVE_PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


class ContentKind(IntEnum):
    """What a text of the content corpus is about; stored as uint8."""

    USER_ITEM = 0
    """A review: the text of a user about an item."""
    ITEM_TITLE = 1
    ITEM_DESCRIPTION = 2
    USER_PROFILE = 3


class FileEntry(StrictModel):
    """One file of the corpus."""

    path: str
    """Relative to the manifest, with forward slashes."""
    kind: Literal["users", "items", "new_users", "interactions", "content"]
    """A table of users, items or users who are held out whole, or a shard of one of the two corpora."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Of the whole file, hexadecimal."""
    record_sizes: tuple[int, ...] = ()
    """Shards only: number of examples in each record, in file order."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not _RELATIVE_PATH.fullmatch(path):
            raise ValueError("must be a plain relative path inside of the corpus")
        return path


class LeftOut(StrictModel):
    """What was left out of the corpus for one reason."""

    count: int
    """How many."""
    share: float = 0.0
    """Share of all of these in the raw data; 0 where unknown."""
    file: str | None = None
    """Name of the raw file of the first one, without its folder."""
    line: int | None = None
    """Line (row of a Parquet file, position in a JSON document) of the first one."""
    value: str | None = None
    """What was there, shortened."""

    def describe(self) -> str:
        """Share and first place in brackets, for a log line; empty where neither is known."""
        parts = [f"{100 * self.share:.3g} %"] if self.share else []
        line = "" if self.line is None else f" line {self.line}"
        value = "" if self.value is None else f" {self.value!r}"
        if self.file is not None or self.value is not None:
            parts.append(f"first: {self.file or ''}{line}{value}".replace(":  ", ": "))
        return f" ({'; '.join(parts)})" if parts else ""


class OrderColumns(StrictModel):
    """What the recipe calls the columns of interactions: later orders come in files of the same form."""

    user: str
    """Column of user ids."""
    item: str
    """Column of item ids."""
    timestamp: str | None = None
    """Column of times."""
    time_format: str | None = None
    """Format of the times, where the recipe names one."""


class Manifest(StrictModel):
    """Contents of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    """Of the files' layout."""
    name: str
    """Of the data set."""
    num_users: int
    """Rows of users.parquet; every one has at least one training item."""
    num_items: int
    """Rows of items.parquet."""
    num_interactions: dict[str, int]
    """By split: train, valid, test."""
    num_new_users: int = Field(default=0, ge=0)
    """Rows of new_users.parquet: users who are held out whole, and have no row in users.parquet."""
    num_new_interactions: dict[str, int] = Field(default_factory=dict)
    """Of these users, by part: history, valid, test."""
    num_content: dict[str, int]
    """Texts by kind, in lower case: user_item, item_title, item_description, user_profile."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made the words; a run with another one is refused."""
    preparation: Preparation
    """Filters, split, seed and texts that the recipe chose."""
    order_columns: OrderColumns | None = None
    """Of a table; None for other formats and in a corpus that an earlier version built."""
    split_digests: dict[str, str] = Field(default_factory=dict)
    """sha256 by split over the keys of its interactions (`pair_keys.py`), which do not depend on order, tokenizer or
    numbering; those of new users are counted in, with `history` as a split of its own. Empty in a corpus that an
    earlier version built."""
    skipped: dict[str, LeftOut]
    """Everything of the raw data that is not in the corpus, by reason."""
    files: tuple[FileEntry, ...]
    """Every other file of the corpus, shards in order."""

    @field_validator("skipped", mode="before")
    @classmethod
    def _plain_counts(cls, skipped: object) -> object:
        """Older corpora have counts alone."""
        if not isinstance(skipped, dict):
            return skipped
        return {reason: {"count": found} if isinstance(found, int) else found for reason, found in skipped.items()}

    @model_validator(mode="after")
    def _has_tables(self) -> Manifest:
        if [len(self.of_kind(kind)) for kind in ("users", "items")] != [1, 1]:
            raise ValueError("files must name one table of users and one of items")
        if len(self.of_kind("new_users")) != (self.num_new_users > 0):
            raise ValueError("files must name one table of new users if there are any")
        return self

    def num_held_out(self, split: str) -> int:
        """Items that are held out for `split`, of users with and without a row."""
        return self.num_interactions.get(split, 0) + self.num_new_interactions.get(split, 0)

    def of_kind(self, kind: str) -> tuple[FileEntry, ...]:
        """The files of one kind, in order."""
        return tuple(entry for entry in self.files if entry.kind == kind)

    def to_bytes(self) -> bytes:
        """The file's bytes: the same manifest gives the same ones."""
        absent = set() if self.num_new_users else {"num_new_users", "num_new_interactions"}
        absent |= set() if self.order_columns else {"order_columns"}
        return (self.model_dump_json(indent=1, exclude=absent) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> Manifest:
        """Parse and check; `origin` is named in errors.

        Raises:
            CorpusError: for anything but a manifest of this schema version.
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


def _meant(url: str) -> str:
    """The corpus that a wrong path is nearest to, for the end of a cure."""
    inside = Path(url, "corpus")
    if not is_url(url) and (inside / MANIFEST_NAME).is_file():
        return f" Did you mean {str(inside)!r}?"
    return did_you_mean_path(url)


def load_manifest(url: str) -> tuple[Manifest, str]:
    """The manifest of a corpus, a folder or fsspec URL, and its sha256. No other file is looked at.

    Raises:
        CorpusError: for a corpus that is absent, incomplete or of another schema version.
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
            f"Build it with `cllm4rec prepare`; a build that was interrupted leaves no manifest.{_meant(url)}",
        ) from error
    return Manifest.from_bytes(content, f"{url}/{MANIFEST_NAME}"), hashlib.sha256(content).hexdigest()
