"""Statistics of a column, from its name and its values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.times import Times, read_times
from cllm4rec_dist.corpus.values import MISSING_WORDS, column_text, whole_ids, without_missing
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.project.sample import Sample
from cllm4rec_dist.project.words import kinds_of

_TAGS = r"(?i)</?(?:p|br|b|i|u|ul|ol|li|div|span|strong|em|h[1-6]|a|td|tr|table)(?:\s[^<>]*)?/?>"
_EARLIEST, _LATEST = 3.15e7, 4.1e9
"""Plausible epochs of an interaction: 1971 to 2100. A rating of 5 is no time."""
_DAY, _YEAR_2000, _YEAR_2040 = 86400, 946_684_800, 2_208_988_800
_LATEST_SECOND = 1e11
"""Larger epochs are in milliseconds or smaller units."""


@dataclass(frozen=True)
class ColumnStats:
    """Statistics of one column of a sample."""

    name: str
    values: pl.Series

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds that the column's name matches."""
        return kinds_of(self.name)

    @cached_property
    def texts(self) -> pl.Series:
        """Values as text, without missing ones."""
        try:
            return without_missing(column_text(self.values, self.name), MISSING_WORDS).drop_nulls().str.strip_chars()
        except DataError:
            return pl.Series(self.name, [], dtype=pl.String)

    @property
    def example(self) -> str:
        """The first value."""
        return self.texts[0] if len(self.texts) else ""

    @property
    def fill_ratio(self) -> float:
        """Fraction of the rows that have a value."""
        return len(self.texts) / max(1, len(self.values))

    @cached_property
    def num_distinct(self) -> int:
        """Number of distinct values."""
        return self.texts.n_unique()

    @property
    def distinct_ratio(self) -> float:
        """Distinct values divided by all values."""
        return self.num_distinct / max(1, len(self.texts))

    @property
    def mean_length(self) -> float:
        """Mean number of characters in a value."""
        return float(self.texts.str.len_chars().mean() or 0)  # type: ignore[arg-type]

    @property
    def num_words(self) -> float:
        """Mean number of words in a value."""
        return 1 + float(self.texts.str.count_matches(r"\s+").mean() or 0)  # type: ignore[arg-type]

    def numbers(self, decimal: str = ".") -> np.ndarray:
        """Values as numbers; NaN if not a number."""
        texts = self.texts if decimal == "." else self.texts.str.replace(decimal, ".", literal=True)
        return texts.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()

    @cached_property
    def times(self) -> Times | None:
        """Values as times; None if the column has no times."""
        present = self.values.filter(self.values.is_not_null())
        try:
            times = read_times(present, self.name, "%Y%m%d" if self.is_compact_date else None, MISSING_WORDS)
        except DataError:
            return None
        seconds = times.seconds[~np.isnan(times.seconds)]
        plausible = int(((seconds > _EARLIEST) & (seconds < _LATEST)).sum())
        is_time = plausible + int(times.is_undecided.sum()) >= 0.9 * len(self.texts) and len(self.texts) > 0
        return times if is_time else None

    @property
    def seconds(self) -> np.ndarray:
        """Times of all rows in seconds since 1970, float64; NaN if missing, undecided or no time."""
        seconds = np.full(len(self.values), np.nan)
        if self.times is not None:
            seconds[self.values.is_not_null().to_numpy()] = self.times.seconds
        return seconds

    @cached_property
    def is_epoch(self) -> bool:
        """True for whole numbers that are epochs in any unit, from 2000 to 2040, spanning more than a day.

        Numbers of ten digits may also be ids; ids are dense, times are not.
        """
        numbers = self.numbers()
        if not len(numbers) or self.times is None or not (numbers == np.floor(numbers)).all():
            return False
        seconds = self.times.seconds[~np.isnan(self.times.seconds)]
        if seconds.min() < _YEAR_2000 or seconds.max() > _YEAR_2040 or np.ptp(seconds) < _DAY:
            return False
        return bool(numbers.min() > _LATEST_SECOND or np.ptp(seconds) > 10 * self.num_distinct)

    @cached_property
    def is_scale(self) -> bool:
        """True for a few small numbers that repeat, as in ratings and quantities."""
        numbers = self.numbers()
        is_small = len(numbers) >= 50 and np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 10
        return bool(is_small) and 5 * self.num_distinct <= len(numbers)

    @cached_property
    def is_compact_date(self) -> bool:
        """True for values like 20241126, which as epochs would be in 1970."""
        return bool(len(self.texts)) and bool(self.texts.str.contains(r"^(19|20)\d\d[01]\d[0-3]\d$").all())

    @cached_property
    def ids(self) -> frozenset[str]:
        """Distinct values as ids."""
        return frozenset(whole_ids(self.texts.unique()).to_list())

    @property
    def has_tags(self) -> bool:
        """True if any value has HTML tags."""
        return bool(self.texts.str.contains(_TAGS).any())


def column_stats(sample: Sample) -> dict[str, ColumnStats]:
    """Return the statistics of each column by name."""
    return {name: ColumnStats(name, sample.columns[name]) for name in sample.names}
