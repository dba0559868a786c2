"""Codes for external ids, and ids that were stored as floats."""

from __future__ import annotations

import logging

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.values import is_float_column, whole_ids

logger = logging.getLogger(__name__)

_ROUNDED = r"^\d(\.\d+)?[eE]\+\d+$"


class IdCodes:
    """Assigns each unique text a code, from 0, in the order of first use."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self._category_owner: pl.Series | None = None
        self.size = 0

    def encode(self, ids: pl.Series) -> np.ndarray:
        """Return the uint32 code of each id; none may be null."""
        categorical = ids.cast(pl.Categorical(self._categories))
        self._category_owner = categorical.head(1)  # Polars drops categories without a series
        codes = categorical.to_physical().to_numpy()
        self.size = max(self.size, int(codes.max()) + 1 if len(codes) else 0)
        return codes.astype(np.uint32)

    def ids(self) -> pl.Series:
        """Return the id of each code."""
        codes = pl.Series("id", np.arange(self.size, dtype=np.uint32))
        return codes.cat.to(pl.Categorical(self._categories)).cast(pl.String)


def canonical_ids(ids: pl.Series, codes: np.ndarray, kind: str) -> tuple[pl.Series, np.ndarray]:
    """Remove `.0` from the ids of a float column and merge the codes of equal ids; leave other ids unchanged.

    Args:
        ids: id of each code.
        codes: code of each interaction.
        kind: `user` or `item`, for messages.
    """
    rounded = ids.filter(ids.str.contains(_ROUNDED))
    if len(rounded):
        logger.warning(
            "%s %s ids look like numbers rounded by a spreadsheet, such as %r: different ids may have become equal",
            f"{len(rounded):,}",
            kind,
            rounded[0],
        )
    if not is_float_column(ids):
        whole = whole_ids(ids)
        twice = ids.filter((whole != ids) & whole.is_in(ids.implode()))
        if len(twice):
            logger.warning(
                "%s %s ids are others with .0, such as %r and %r: they stay different, because the column also has ids"
                " that are no whole numbers. If they mean the same, write them alike in the files.",
                f"{len(twice):,}",
                kind,
                twice[0],
                whole_ids(twice)[0],
            )
        return ids, codes
    unique = IdCodes()
    new_codes = unique.encode(whole_ids(ids))
    return unique.ids(), new_codes[codes]
