"""Codes for ids, and the ids of float columns."""

from __future__ import annotations

import logging

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.values import is_float_column, whole_ids

logger = logging.getLogger(__name__)

_ROUNDED = r"^\d(\.\d+)?[eE]\+\d+$"


class IdCodes:
    """Gives each different text a code, from 0 on, in the order of their first use."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self._alive: pl.Series | None = None
        self.size = 0

    def encode(self, ids: pl.Series) -> np.ndarray:
        """uint32 code of each id; none may be null."""
        categorical = ids.cast(pl.Categorical(self._categories))
        self._alive = categorical.head(1)  # Polars forgets categories that no series has
        codes = categorical.to_physical().to_numpy()
        self.size = max(self.size, int(codes.max()) + 1 if len(codes) else 0)
        return codes.astype(np.uint32)

    def ids(self) -> pl.Series:
        """Id of each code."""
        codes = pl.Series("id", np.arange(self.size, dtype=np.uint32))
        return codes.cat.to(pl.Categorical(self._categories)).cast(pl.String)


def canonical_ids(ids: pl.Series, codes: np.ndarray, kind: str) -> tuple[pl.Series, np.ndarray]:
    """Ids of a float column without `.0`, with the codes of those that then are one; other ids as they are.

    Args:
        ids: id of each code.
        codes: of the interactions.
        kind: `user` or `item`, for messages.
    """
    rounded = ids.filter(ids.str.contains(_ROUNDED))
    if len(rounded):
        logger.warning(
            "%s %s ids look like numbers that a spreadsheet has rounded, such as %r: different ones may be one now",
            f"{len(rounded):,}",
            kind,
            rounded[0],
        )
    if not is_float_column(ids):
        return ids, codes
    unique = IdCodes()
    new_codes = unique.encode(whole_ids(ids))
    return unique.ids(), new_codes[codes]
