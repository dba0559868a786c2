"""Item catalog of a run: external ids, titles, categories, popularity, and search by title or id. Without torch."""

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
_SPELLINGS = {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"}
"""How German and Scandinavian letters are typed without their keys."""
_LAST = chr(0x10FFFF)
"""Largest code point: no text with prefix P sorts after P followed by it."""
_HAN_AND_KANA = r"\u{3040}-\u{30FF}\u{3400}-\u{9FFF}"
"""Scripts without spaces between words; each character counts as a word."""
_WORDS = rf"[{_HAN_AND_KANA}]|[\w--[{_HAN_AND_KANA}]]+"


@dataclass(frozen=True)
class ItemCatalog:
    """Items of a run, by row.

    Attributes:
        ids: I external ids.
        titles: I titles, "" for an item without one.
        categories: I categories, "" for an item without one; None if the corpus has no categories.
        popularity: int64 [I] numbers of training interactions.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    categories: Sequence[str] | None
    popularity: np.ndarray

    @classmethod
    def from_corpus(cls, corpus: Corpus, *, with_titles: bool = True) -> ItemCatalog:
        """Read the items of a corpus.

        Args:
            with_titles: False to read every title as "", which spares their memory.
        """
        table = corpus.items()
        categories = None
        if "category" in table.column_names:
            categories = [name or "" for name in table["category"].to_pylist()]
        popularity = corpus.training_counts()
        titles = [title or "" for title in table["title"].to_pylist()] if with_titles else [""] * len(table)
        return cls(table["item"].to_pylist(), titles, categories, popularity)

    def with_new(self, ids: Sequence[str], titles: Sequence[str]) -> ItemCatalog:
        """Return the catalog with items appended that have no category and no interactions."""
        categories = None if self.categories is None else [*self.categories, *[""] * len(ids)]
        popularity = np.concatenate([self.popularity, np.zeros(len(ids), np.int64)])
        return ItemCatalog([*self.ids, *ids], [*self.titles, *titles], categories, popularity)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row by external id."""
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def by_popularity(self) -> np.ndarray:
        """int64 [I] rows, most popular first; ties in row order."""
        return np.argsort(-self.popularity, kind="stable")

    def rows(self, items: Iterable[str]) -> list[int]:
        """Return the rows of the known ids among `items`."""
        return [row for item in items if (row := self.row_of.get(item)) is not None]

    def candidates(self, only: Collection[str] | None, exclude: Collection[str]) -> np.ndarray | None:
        """Return a bool [I] mask of the items to choose from; None for all items."""
        if only is None and not exclude:
            return None
        mask = np.full(len(self.ids), only is None)
        mask[self.rows(only or ())] = True
        mask[self.rows(exclude)] = False
        return mask

    def row(self, item: str) -> int | None:
        """Return the row of an external id; None for an unknown id."""
        return self.row_of.get(item)

    def search(self, query: str, limit: int = 10) -> list[int]:
        """Return the rows of the items that match `query`, best first.

        An item matches if its title contains every word of `query`, the last of which may be a prefix, or if its id
        begins with `query`. Case and accents are ignored, ligatures are expanded, and letters such as ö are found
        as `o` and `oe`. An item whose id equals the query
        comes first, then titles with the complete last word, titles with the prefix, and ids, each by popularity. If
        the query has punctuation, ids come before titles.
        """
        query = query.strip()
        if not query:
            return []
        exact = self.rows([query])
        words = _words([query])[0].to_list()
        titles = self._titled(words, limit + 1) if words else []
        ids = self._sorted(self._identified(query))[: limit + 1]
        matches = ids + titles if _PUNCTUATION.search(query) else titles + ids
        return list(dict.fromkeys(exact + matches))[:limit]

    def titled(self, query: str) -> list[int]:
        """Return the rows of all items whose titles contain every word of `query`, most popular first."""
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
        """bool [I], True if an id begins with `prefix`."""
        ids, rows = self._sorted_ids
        start, stop = _prefixed(ids, _folded([prefix])[0])
        kept = np.zeros(len(self.ids), dtype=bool)
        kept[rows[start:stop]] = True
        return kept

    def _with_all(self, words: list[str]) -> np.ndarray:
        """bool [I], True if a title contains all of `words`."""
        vocabulary, rows = self._index
        kept = np.ones(len(self.ids), dtype=bool)
        for word in words:
            position = vocabulary.search_sorted(word)
            has = np.zeros(len(self.ids), dtype=bool)
            if position < len(vocabulary) and vocabulary[position] == word:
                has[rows[position]] = True
            kept &= has
        return kept

    def _sorted(self, kept: np.ndarray) -> list[int]:
        rows = np.flatnonzero(kept)
        return rows[np.argsort(-self.popularity[rows], kind="stable")].tolist()

    @cached_property
    def _sorted_ids(self) -> tuple[pl.Series, np.ndarray]:
        """Sorted folded ids and their rows, built at the first search."""
        pairs = pl.DataFrame({"id": _folded(self.ids), "row": np.arange(len(self.ids))}).sort("id")
        return pairs["id"], pairs["row"].to_numpy()

    @cached_property
    def _index(self) -> tuple[pl.Series, Ragged]:
        """Inverted index: sorted distinct title words and the item rows of each, built at the first search."""
        pairs = pl.DataFrame({"word": _words(self.titles), "row": np.arange(len(self.ids))})
        pairs = (
            pl.concat([pairs.explode("word").drop_nulls(), _spelled_words(self.titles)]).unique().sort("word", "row")
        )
        words = pairs["word"].unique(maintain_order=True)
        lengths = pairs["word"].rle().struct.field("len").to_numpy().astype(np.int64)
        return words, Ragged.from_lengths(lengths, pairs["row"].to_numpy())


def _words(texts: Sequence[str]) -> pl.Series:
    """Split each text into folded words."""
    return _folded(texts).str.extract_all(_WORDS)


def _spelled_words(texts: Sequence[str]) -> pl.DataFrame:
    """Return the folded words, with the index of their text, that have letters of `_SPELLINGS`, these spelled out."""
    text = unicodedata.normalize("NFC", "\n".join(text.replace("\n", " ") for text in texts).casefold())
    found = pl.Series(text.split("\n")[: len(texts)], dtype=pl.String).str.extract_all(
        rf"\w*[{''.join(_SPELLINGS)}]\w*"
    )
    pairs = pl.DataFrame({"word": found, "row": np.arange(len(texts))}).explode("word").drop_nulls()
    spelled = pairs["word"].str.replace_many([*_SPELLINGS], [*_SPELLINGS.values()])
    return pairs.with_columns(word=_folded(spelled.to_list())[: len(pairs)])


def _folded(texts: Sequence[str]) -> pl.Series:
    """Case-fold each text, strip accents, and transliterate other Latin letters to ASCII (œ, ø, ł)."""
    text = unicodedata.normalize("NFKD", "\n".join(text.replace("\n", " ") for text in texts).casefold())
    text = _ACCENTS.sub("", text)
    for letter in set(text):
        if not letter.isascii() and unicodedata.name(letter, "").startswith("LATIN "):
            text = text.replace(letter, anyascii(letter).lower())
    return pl.Series("text", text.split("\n"), pl.String)


def _prefixed(ordered: pl.Series, prefix: str) -> tuple[int, int]:
    """Range of the sorted texts that begin with `prefix`."""
    return int(ordered.search_sorted(prefix)), int(ordered.search_sorted(prefix + _LAST))
