"""Documents of very different lengths in rows that are full.

Padding every document to the longest one computes mostly nothing: histories and texts have long tails. Here documents
stand one behind the other in as few rows as are needed, and `position_ids` that start anew at each of them keep the
backbone's attention inside of a document. So a packed batch gives what its documents give alone.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

FULL = 0.97
"""Least share of real tokens in a packed batch."""


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
    part, before = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    loads = [(0, number) for number in range(num_parts)]
    for document in np.argsort(-lengths, kind="stable"):
        load, number = loads[0]
        part[document], before[document] = number, load
        heapq.heapreplace(loads, (load + int(lengths[document]), number))
    return part, before


def pack(lengths: np.ndarray) -> Packing:
    """Place documents in rows that are hardly longer than the longest one, at least `FULL` of them real tokens.

    Attention is paid by the row's length, so rows are kept short: there are as many as the longest document allows, and
    fewer only where the rows would not fill. One row is always full.

    Args:
        lengths: int64 [n] of at least one document, each at least 1.
    """
    total = int(lengths.sum())
    num_rows = total // int(lengths.max())
    while True:
        row, before = balance(lengths, num_rows)
        width = int((before + lengths).max())
        if num_rows == 1 or total >= FULL * num_rows * width:
            return Packing((num_rows, width), row * width + before)
        num_rows = max(1, num_rows * 3 // 4)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each start, `length` of them: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
