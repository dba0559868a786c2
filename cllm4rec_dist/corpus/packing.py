"""Documents of very different lengths in rows that are full.

Padding every document to the longest one computes mostly nothing: histories and texts have long tails. Here documents
stand one behind the other in as few rows as are needed, and `position_ids` that start anew at each of them keep the
backbone's attention inside of a document. So a packed batch gives what its documents give alone. The documents of both
LLMs stand in rows of one length, so that the backbone, which they share, runs over all of them at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FULL = 0.97
"""Least share of real tokens in packed rows, where there are documents enough for it."""


@dataclass(frozen=True)
class Packing:
    """Where documents stand.

    Attributes:
        shape: rows R and their length L.
        starts: int64 [n] flat position of each document's first token.
    """

    shape: tuple[int, int]
    starts: np.ndarray


def balance(lengths: np.ndarray, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Share documents out so that the parts are about equally long: the longest first, each to the shortest part.

    Args:
        lengths: int64 [n].

    Returns:
        The part of each document, and the length of what stands before it in its part; both int64 [n].
    """
    part, before, known = [0] * len(lengths), [0] * len(lengths), lengths.tolist()
    loads = [(0, number) for number in range(num_parts)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        before[document], part[document] = loads[0]
        heapq.heapreplace(loads, (before[document] + known[document], part[document]))
    return np.array(part, np.int64), np.array(before, np.int64)


def pack(groups: Sequence[np.ndarray]) -> list[Packing]:
    """Place the documents of each group in rows of its own, with one length L for the rows of all groups.

    At least `FULL` of all places are real tokens, and the rows are the shortest with which this is found, because
    attention is paid by their length. Few documents may not allow it: each group has one row at least, and a row is no
    shorter than the longest document of all. Then the rows are as full as was found; one group alone is always full.

    Args:
        groups: int64 [n] lengths of each group's documents, each at least 1. A group may be empty.
    """
    totals = np.array([lengths.sum() for lengths in groups], np.int64)
    longest = max(int(lengths.max(initial=1)) for lengths in groups)
    best: list[Packing] | None = None
    for width in _widths(totals, longest):
        num_rows = np.maximum(1, -(-totals // width))
        if best is None or width * num_rows.sum() < _num_places(best):
            found = _lay(groups, num_rows, width)
            best = found if best is None else min(best, found, key=_num_places)
            if totals.sum() >= FULL * _num_places(best):
                break
    assert best is not None
    return best


def _widths(totals: np.ndarray, longest: int) -> Iterator[int]:
    """Row lengths that fill the rows of at least one group, from the longest document's on upwards."""
    exact = [-(-total // np.arange(1, total // longest + 1)) for total in totals]
    yield from np.unique(np.concatenate([[longest], *exact])).tolist()


def _lay(groups: Sequence[np.ndarray], num_rows: np.ndarray, width: int) -> list[Packing]:
    """The groups in so many rows each, of `width` or as much longer as it takes."""
    rows, before = zip(*map(balance, groups, num_rows.tolist()), strict=True)
    width = max(width, *(int((b + n).max(initial=0)) for b, n in zip(before, groups, strict=True)))
    return [Packing((r, width), row * width + b) for r, row, b in zip(num_rows.tolist(), rows, before, strict=True)]


def _num_places(packings: Sequence[Packing]) -> int:
    return sum(packing.shape[0] * packing.shape[1] for packing in packings)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each start, `length` of them: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
