"""Helpers of the readers' tests: sources of small files, and what was read of them in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.config import validate
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source


@dataclass(frozen=True)
class Reading:
    """A source that was read, in plain Python."""

    raw: RawData
    messages: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """User and item of each interaction."""
        users, items = self.raw.user_ids, self.raw.item_ids
        return [(users[user], items[item]) for user, item in self.raw.interactions.select("user", "item").iter_rows()]

    def column(self, name: str) -> list[float | None]:
        """Ratings or timestamps, None where there is none."""
        return self.raw.interactions[name].fill_nan(None).to_list()

    @property
    def reviews(self) -> list[str]:
        """Texts of interactions."""
        return list(self.raw.reviews)

    @property
    def items(self) -> dict[str, tuple[str | None, str | None]]:
        """Title and description of each item that has one."""
        return {row[0]: (row[1], row[2]) for row in self.raw.items.iter_rows() if row[1] or row[2]}

    @property
    def users(self) -> dict[str, str]:
        """Texts about users."""
        return dict(self.raw.users.drop_nulls().iter_rows())

    @property
    def lost(self) -> dict[str, tuple[int, str | None, int | None, str | None]]:
        """Count, file, line and value of the first, of what was left out for each reason."""
        return {reason: (skip.count, skip.file, skip.line, skip.value) for reason, skip in self.raw.log.skipped.items()}


Content = str | bytes
Read = Callable[..., Reading]
Refuse = Callable[..., str]


def write_files(folder: Path, files: dict[str, Content]) -> None:
    """Write files below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read_files(folder: Path, files: dict[str, Content], caplog: pytest.LogCaptureFixture, /, **source: Any) -> Reading:
    """Read a source whose paths are relative to the current folder, which must be `folder`."""
    write_files(folder, files)
    caplog.clear()
    with caplog.at_level("INFO"):
        raw = read_source(validate(PrepareConfig, {"name": "sample", "source": source}, "test").source)
    return Reading(raw, "\n".join(f"{record.levelname}: {record.getMessage()}" for record in caplog.records))


def table(name: str = "i.csv", **columns: Any) -> dict[str, Any]:
    """Source of a table with columns u and i."""
    return {"format": "table", "interactions": {"path": name, "user": "u", "item": "i", **columns}}
