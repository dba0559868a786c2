"""Counts of what is left out of a corpus, with reason, fraction and first occurrence.

Raw files are dirty, and results cannot be checked if a reader drops rows silently. So everything that is left out is
counted in a `SkipLog`. It distinguishes *lost* rows, which cannot be used (too few fields, a missing id, an invalid
time), from *skipped* ones, which are left out on purpose (a filter, a duplicate). Lost rows are a warning above 1 % of
a file, and an error above `max_lost` of it.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_WARN_SHARE = 0.01
_MAX_VALUE = 120


@dataclass
class Skip:
    """Rows, texts or users that were left out for one reason.

    Attributes:
        count: number left out.
        total: number of all; 0 if unknown.
        file, line, value: first one; None if it is not from a file.
    """

    count: int = 0
    total: int = 0
    file: str | None = None
    line: int | None = None
    value: str | None = None

    @property
    def share(self) -> float:
        """Fraction of the total that was left out; 0 if unknown."""
        return self.count / self.total if self.total else 0.0


@dataclass
class _FileCount:
    rows: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    num_unusable: int = 0
    first: tuple[int, str, str] | None = None
    totalled: set[str] = field(default_factory=set)


class SkipLog:
    """Counts what is left out while reading and filtering.

    Args:
        on_bad_line: `skip` counts unusable rows, `error` stops at the first one.
        max_lost: largest fraction of a file's rows that may be lost.
    """

    def __init__(self, on_bad_line: Literal["skip", "error"] = "skip", max_lost: float = 0.5) -> None:
        self._stops, self._max_lost = on_bad_line == "error", max_lost
        self._skips: dict[str, Skip] = {}
        self._files: dict[str, _FileCount] = {}
        self._closed: set[str] = set()

    @property
    def skipped(self) -> Mapping[str, Skip]:
        """Everything left out, by reason."""
        return self._skips

    @property
    def counts(self) -> dict[str, int]:
        """Number left out, by reason."""
        return {reason: skip.count for reason, skip in self._skips.items()}

    def skip(
        self,
        reason: str,
        count: int,
        total: int = 0,
        *,
        file: str | None = None,
        line: int | None = None,
        value: object = None,
    ) -> None:
        """Count something that is left out on purpose; no effect if `count` is 0."""
        if not count:
            return
        entry = self._skips.setdefault(reason, Skip())
        if entry.count == 0:
            entry.file = None if file is None else base_name(file)
            entry.line, entry.value = line, None if value is None else excerpt(value)
        entry.count += count
        entry.total += total

    def copy(self) -> SkipLog:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def read(self, path: str, rows: int) -> None:
        """Add to the number of rows of a file, including lost ones."""
        if path in self._closed:
            return
        self._files.setdefault(path, _FileCount()).rows += rows

    def lose(self, reason: str, path: str, line: int, value: object, count: int = 1, *, is_gap: bool = False) -> None:
        """Count unusable rows of a file, the first of them on `line`.

        A file with both interactions and items is read twice; its lost rows are counted only once.

        Args:
            reason: clause that follows `row that`.
            is_gap: the row is well-formed but lacks a value, which does not suggest a wrong recipe; `max_lost` does not
                count it.

        Raises:
            DataError: with the line, if the recipe sets `on_bad_line: error`.
        """
        if path in self._closed:
            return
        if self._stops and not is_gap:
            raise DataError(
                f"{path} line {line}", excerpt(value), reason, "Fix the line, or set on_bad_line: skip in the recipe."
            )
        self.skip(f"row that {reason}", count, file=path, line=line, value=value)
        entry = self._files.setdefault(path, _FileCount())
        entry.lost[reason] += count
        entry.num_unusable += 0 if is_gap else count
        if entry.first is None or line < entry.first[0]:
            entry.first = line, excerpt(value), reason

    def close_file(self, path: str) -> None:
        """Warn about or refuse the lost rows of a file, after all of it is read.

        Raises:
            DataError: if more than `max_lost` of its rows are lost.
        """
        entry = self._files.get(path)
        if entry is None or path in self._closed:
            return
        self._closed.add(path)
        for reason in entry.lost.keys() - entry.totalled:
            self._skips[f"row that {reason}"].total += entry.rows
            entry.totalled.add(reason)
        lost = sum(entry.lost.values())
        if not lost or entry.first is None or not entry.rows:
            return
        line, value, reason = entry.first
        if entry.num_unusable > self._max_lost * entry.rows:
            share = 100 * entry.num_unusable / entry.rows
            raise DataError(
                f"{path} line {line}",
                value,
                f"{reason}: {entry.num_unusable:,} of {entry.rows:,} rows ({share:.3g} %) cannot be used, more than"
                f" max_lost: {self._max_lost:g} allows ({_list_reasons(entry.lost)})",
                "Fix the file or the recipe (separator, quoting, encoding, decimal, time_format), or raise max_lost.",
            )
        if lost > _WARN_SHARE * entry.rows:
            logger.warning(
                "%s: %s of %s rows (%.3g %%) are left out: %s. The first is line %d: %r %s.",
                path,
                f"{lost:,}",
                f"{entry.rows:,}",
                100 * lost / entry.rows,
                _list_reasons(entry.lost),
                line,
                value,
                reason,
            )


def _list_reasons(lost: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in lost.most_common())


def base_name(path: str) -> str:
    """Return the last part of a path or URL; a corpus must not depend on the folder of its raw files."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def excerpt(value: object) -> str:
    """Format a value as short text on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."
