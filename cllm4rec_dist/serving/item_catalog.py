"""The items of a run by row: external ids, titles, categories, popularity, and search by title or id.

Nothing here imports torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from anyascii import anyascii

from cllm4rec_dist.corpus.ragged import Ragged

if TYPE_CHECKING:
    from cllm4rec_dist.corpus.shards import Corpus

_ACCENTS = re.compile("[\u0300-\u036f]")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_LAST = chr(0x10FFFF)
"""No text that begins with P sorts behind P with this character."""
_HAN_AND_KANA = r"\u{3040}-\u{30FF}\u{3400}-\u{9FFF}"
"""Written without blanks between words, so each character counts as one."""
_WORDS = rf"[{_HAN_AND_KANA}]|[\w--[{_HAN_AND_KANA}]]+"


@dataclass(frozen=True)
class ItemCatalog:
    """The items of a run, by row.

    Attributes:
        ids: I external ids.
        titles: I titles, "" where an item has none.
        categories: I categories, "" where an item has none; None where the corpus has no categories.
        popularity: int64 [I] training interactions.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    categories: Sequence[str] | None
    popularity: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus) -> ItemCatalog:
        """The items of a corpus."""
        table = corpus.items()
        categories = None
        if "category" in table.column_names:
            categories = [name or "" for name in table["category"].to_pylist()]
        popularity = np.bincount(corpus.split("train").values, minlength=corpus.num_items)
        titles = [title or "" for title in table["title"].to_pylist()]
        return cls(table["item"].to_pylist(), titles, categories, popularity)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row by external id."""
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def by_popularity(self) -> np.ndarray:
        """int64 [I] rows, the most popular first; equal ones in the order of the rows."""
        return np.argsort(-self.popularity, kind="stable")

    def rows(self, items: Iterable[str]) -> list[int]:
        """Rows of those of `items` that the run knows."""
        return [row for item in items if (row := self.row_of.get(item)) is not None]

    def candidates(self, only: Collection[str] | None, exclude: Collection[str]) -> np.ndarray | None:
        """bool [I] of the items to choose from; None for all of them."""
        if only is None and not exclude:
            return None
        mask = np.full(len(self.ids), only is None)
        mask[self.rows(only or ())] = True
        mask[self.rows(exclude)] = False
        return mask

    def row(self, item: str) -> int | None:
        """Row of an external id; None for one that the run does not know."""
        return self.row_of.get(item)

    def search(self, query: str, limit: int = 10) -> list[int]:
        """Rows of the items that a search finds, best first.

        An item is found where every word of `query` is in its title, or where its id begins with `query`; the last word
        may be the beginning of one. Case and accents are ignored, and a ligature is its letters. An item whose id is
        the query comes first; then items that have the last word whole, items that have its beginning, and ids, each
        by popularity; ids before titles where the query has punctuation.
        """
        query = query.strip()
        if not query:
            return []
        exact = self.rows([query])
        words = _words([query])[0].to_list()
        titles = self._titled(words, limit + 1) if words else []
        ids = self._sorted(self._identified(query))[: limit + 1]
        found = ids + titles if _PUNCTUATION.search(query) else titles + ids
        return list(dict.fromkeys(exact + found))[:limit]

    def titled(self, query: str) -> list[int]:
        """Rows of all items that have every word of `query` in their titles, whole, the most popular first."""
        words = _words([query])[0].to_list()
        return self._sorted(self._with_all(words)) if words else []

    def _titled(self, words: list[str], limit: int) -> list[int]:
        *first, last = words
        before = self._with_all(first)
        vocabulary, rows = self._index
        beginning = np.zeros(len(self.ids), dtype=bool)
        beginning[rows.slice(*_prefixed(vocabulary, last)).values] = True
        whole = self._with_all([last])
        best = self._sorted(before & whole)
        return (best + self._sorted(before & beginning & ~whole))[:limit]

    def _identified(self, prefix: str) -> np.ndarray:
        """bool [I] where an id begins with `prefix`."""
        ids, rows = self._sorted_ids
        start, stop = _prefixed(ids, _folded([prefix])[0])
        kept = np.zeros(len(self.ids), dtype=bool)
        kept[rows[start:stop]] = True
        return kept

    def _with_all(self, words: list[str]) -> np.ndarray:
        """bool [I] where a title has all of `words`."""
        vocabulary, rows = self._index
        kept = np.ones(len(self.ids), dtype=bool)
        for word in words:
            place = vocabulary.search_sorted(word)
            has = np.zeros(len(self.ids), dtype=bool)
            if place < len(vocabulary) and vocabulary[place] == word:
                has[rows[place]] = True
            kept &= has
        return kept

    def _sorted(self, kept: np.ndarray) -> list[int]:
        found = np.flatnonzero(kept)
        return found[np.argsort(-self.popularity[found], kind="stable")].tolist()

    @cached_property
    def _sorted_ids(self) -> tuple[pl.Series, np.ndarray]:
        """Folded ids, sorted, and the row of each. Made at the first search."""
        pairs = pl.DataFrame({"id": _folded(self.ids), "row": np.arange(len(self.ids))}).sort("id")
        return pairs["id"], pairs["row"].to_numpy()

    @cached_property
    def _index(self) -> tuple[pl.Series, Ragged]:
        """Distinct words of the titles, sorted, and the rows of each word's items. Made at the first search."""
        pairs = pl.DataFrame({"word": _words(self.titles), "row": np.arange(len(self.ids))})
        pairs = pairs.explode("word").drop_nulls().unique().sort("word", "row")
        words = pairs["word"].unique(maintain_order=True)
        lengths = pairs["word"].rle().struct.field("len").to_numpy().astype(np.int64)
        return words, Ragged.from_lengths(lengths, pairs["row"].to_numpy())


def _words(texts: Sequence[str]) -> pl.Series:
    """The words of each text, folded."""
    return _folded(texts).str.extract_all(_WORDS)


def _folded(texts: Sequence[str]) -> pl.Series:
    """Each text case folded, without accents, and with Latin letters that have none in ASCII spelt out (œ, ø, ł)."""
    text = unicodedata.normalize("NFKD", "\n".join(text.replace("\n", " ") for text in texts).casefold())
    text = _ACCENTS.sub("", text)
    for letter in set(text):
        if not letter.isascii() and unicodedata.name(letter, "").startswith("LATIN "):
            text = text.replace(letter, anyascii(letter).lower())
    return pl.Series("text", text.split("\n"), pl.String)


def _prefixed(ordered: pl.Series, prefix: str) -> tuple[int, int]:
    """The range of sorted texts that begin with `prefix`."""
    return int(ordered.search_sorted(prefix)), int(ordered.search_sorted(prefix + _LAST))
