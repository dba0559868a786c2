"""Decide the order of day, month and year in numeric dates, such as 3/4/2024 and 25-01-23.

`3/4/2024` is the third of April or the fourth of March, and `25-01-23` a day of January 2023 or 2025. The dates of a
file decide together: by those that exist in one order only, and by the part that takes more values, which is the day.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cllm4rec_dist.errors import DataError

DateOrder = Literal["day-first", "month-first", "year-first"]

_PARTS = re.compile(
    r"(\d{1,2})([/.\-])\d{1,2}\2(\d{4}|\d{2})(?:(,? |T)\d{1,2}:\d{2}(:\d{2})?( [AaPp][Mm])?)?", re.ASCII
)
_MIN_DAYS, _MIN_RATIO = 13, 1.5
"""The day takes at least so many distinct values, and so many times as many as the year."""
_FEW_DAYS, _HIGH_RATIO, _MIN_SPREAD = 5, 3, 15
"""Fewer distinct values suffice with a higher ratio and a larger difference between the largest and the smallest."""
_MONTH_ENDS, _MANY_DAYS = {1, 28, 29, 30, 31}, 26
"""Monthly dates over many years look like many days of few years, unless there are so many."""


@dataclass(frozen=True)
class UndecidedDates:
    """Numeric dates of one file whose order has to be decided.

    Attributes:
        positions: int64 [n] positions of their interactions.
        readings: float64 [n] seconds since 1970 in each order, NaN if that is no date.
        example: text of the first date.
    """

    positions: np.ndarray
    readings: Mapping[DateOrder, np.ndarray]
    example: str

    @staticmethod
    def join(parts: Sequence[UndecidedDates]) -> UndecidedDates:
        """Concatenate the dates of several parts."""
        return UndecidedDates(
            np.concatenate([part.positions for part in parts]),
            {order: np.concatenate([part.readings[order] for part in parts]) for order in parts[0].readings},
            parts[0].example,
        )

    @property
    def possible(self) -> set[DateOrder]:
        """Orders in which all of them are dates."""
        return {order for order, seconds in self.readings.items() if not np.isnan(seconds).any()}

    @property
    def order(self) -> DateOrder | None:
        """Order that the dates themselves decide, or None."""
        possible = self.possible
        if "year-first" in possible and len(possible) > 1:
            is_year_first = self._is_year_first()
            if is_year_first is None:
                return None
            possible = {"year-first"} if is_year_first else possible - {"year-first"}
        return possible.pop() if len(possible) == 1 else None

    @property
    def usual_order(self) -> DateOrder | None:
        """Order if the year comes last, as it does in dates with slashes or points; None if that decides nothing."""
        possible = self.possible - {"year-first"}
        is_usual = "-" not in self.example and self._is_year_first() is not True
        return possible.pop() if is_usual and len(possible) == 1 else None

    def _is_year_first(self) -> bool | None:
        """Decide which of the first and the last part is the day: the one that takes clearly more distinct values."""
        first, last = (_distinct_days(self.readings[order]) for order in ("day-first", "year-first"))
        few, many = sorted((first, last), key=len)
        is_scattered = len(many) >= max(_FEW_DAYS, _HIGH_RATIO * len(few)) and max(many) - min(many) >= _MIN_SPREAD
        is_frequent = len(many) >= max(_MIN_DAYS, _MIN_RATIO * len(few))
        is_monthly = few <= _MONTH_ENDS and len(many) < _MANY_DAYS
        return many is last if (is_scattered or is_frequent) and not is_monthly else None

    def refusal(self, where: str) -> DataError:
        """Return the error for dates whose order cannot be decided."""
        counts = {order: int((~np.isnan(seconds)).sum()) for order, seconds in self.readings.items()}
        can_be = ", ".join(f"{count:,} {order}" for order, count in counts.items() if count)
        formats = [*numeric_formats(self.example).values()] or ["%d/%m/%Y", "%m/%d/%Y %I:%M:%S %p"]
        return DataError(
            where,
            self.example,
            f"is ambiguous: of {len(self.positions):,} such dates {can_be} are possible",
            f"Set time_format in the recipe, for example {' or '.join(map(repr, formats))}.",
        )


def decide_orders(files: Mapping[str, UndecidedDates]) -> dict[str, DateOrder | None]:
    """Decide the order of each file's dates; None if nothing decides it.

    Its own dates come first, then the order of the other files if these agree, then the dates of all files together,
    and last the usual order of dates with slashes or points.
    """
    orders = {path: dates.order for path, dates in files.items()}
    decided = {order for order in orders.values() if order is not None}
    left = [path for path, order in orders.items() if order is None and files[path].possible]
    if not left:
        return orders
    together = UndecidedDates.join([files[path] for path in left])
    order = decided.pop() if len(decided) == 1 else together.order or together.usual_order
    return orders | {path: order for path in left if order in files[path].possible}


def numeric_formats(text: str) -> dict[DateOrder, str]:
    """Return the `strptime` formats of a numeric date such as 3/4/2024 10:30 by its possible orders.

    Returns an empty dictionary for a text of another form.
    """
    match = _PARTS.fullmatch(text.strip())
    if match is None:
        return {}
    first, mark, year, gap, second, half = match.groups()
    clock = "" if gap is None else f"{gap}{'%I' if half else '%H'}:%M{':%S' if second else ''}{' %p' if half else ''}"
    last = "%Y" if len(year) == 4 else "%y"
    formats: dict[DateOrder, str] = {
        "day-first": f"%d{mark}%m{mark}{last}{clock}",
        "month-first": f"%m{mark}%d{mark}{last}{clock}",
    }
    return formats | ({"year-first": f"%y{mark}%m{mark}%d{clock}"} if len(first) == len(year) == 2 else {})


def _distinct_days(seconds: np.ndarray) -> set[int]:
    """Return the days of the month of times."""
    moments = seconds[~np.isnan(seconds)].astype("datetime64[s]").astype("datetime64[D]")
    days = np.unique((moments - moments.astype("datetime64[M]")).astype(np.int64) + 1)
    return set(days.tolist())
