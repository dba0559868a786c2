"""Documents of very different lengths in rows that are full.

Padding every document to the longest one computes mostly nothing: histories and texts have long tails. Here documents
stand one behind the other in as few rows as are needed, and `position_ids` that start anew at each of them keep the
backbone's attention inside of a document. So a packed batch gives what its documents give alone. The documents of both
LLMs stand in rows of one length, so that the backbone, which they share, runs over all of them at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FULL = 0.97
"""Least share of real tokens in packed rows, where there are documents enough for it."""
_STRIDE = 1.05
"""How much longer than the last length that was tried the next one is at least: trying takes time."""


@dataclass(frozen=True)
class Packing:
    """Where documents stand.

    Attributes:
        shape: rows R and their length L.
        starts: int64 [n] flat position of each document's first token.
    """

    shape: tuple[int, int]
    starts: np.ndarray


def balance(
    lengths: np.ndarray, num_parts: int, loads: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Share documents out so that the parts are about equally long: the longest first, each to the shortest part.

    Args:
        lengths: int64 [n].
        loads: int64 [num_parts] that the parts have already.

    Returns:
        The part of each document, and what stands before it in its part; both int64 [n].
    """
    part, before, known = [0] * len(lengths), [0] * len(lengths), lengths.tolist()
    heap = [(0, number) for number in range(num_parts)]
    if loads is not None:
        heap = sorted(zip(loads.tolist(), range(num_parts), strict=True))
    for document in np.argsort(-lengths, kind="stable").tolist():
        before[document], part[document] = heap[0]
        heapq.heapreplace(heap, (before[document] + known[document], part[document]))
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
    best, tried = _lay(groups, totals, longest), longest
    widths = _widths(totals, longest)
    for width in widths:
        if totals.sum() >= FULL * _num_places(best):
            break
        is_due = width >= _STRIDE * tried or width == widths[-1]
        if is_due and width * _num_rows(totals, width).sum() < _num_places(best):
            best, tried = min(best, _lay(groups, totals, width), key=_num_places), width
    return best


def _widths(totals: np.ndarray, longest: int) -> list[int]:
    """Row lengths that fill the rows of at least one group, from the longest document's on upwards."""
    exact = [-(-total // np.arange(1, total // longest + 1)) for total in totals]
    return [int(width) for width in np.unique(np.concatenate(exact))]


def _num_rows(totals: np.ndarray, width: int) -> np.ndarray:
    """Least rows of each group."""
    return np.maximum(1, -(-totals // width))


def _lay(groups: Sequence[np.ndarray], totals: np.ndarray, width: int) -> list[Packing]:
    """Each group in as few rows as `width` allows; they become longer where documents do not come out even."""
    num_rows = _num_rows(totals, width).tolist()
    rows, before = zip(*map(balance, groups, num_rows), strict=True)
    width = max(width, *(int((b + n).max(initial=0)) for b, n in zip(before, groups, strict=True)))
    return [Packing((number, width), row * width + b) for number, row, b in zip(num_rows, rows, before, strict=True)]


def _num_places(packings: Sequence[Packing]) -> int:
    return sum(packing.shape[0] * packing.shape[1] for packing in packings)
