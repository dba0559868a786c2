"""Documents of very different lengths in rows that are full.

Padding every document to the longest one computes mostly nothing: histories and texts have long tails. Here documents
stand one behind the other in as few rows as are needed, and `position_ids` that start anew at each of them keep the
backbone's attention inside of a document. So a packed batch gives what its documents give alone. The documents of both
LLMs stand in the same rows, one LLM's behind the other's, so that the backbone, which they share, runs over all of them
at once.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort

import numpy as np

FULL = 0.97
"""Least share of real tokens in packed rows."""
_ROOM = 1.02
"""Places for each token: with room to spare, best fit finds the rows that it should."""
_STRIDE = 1.05
"""How much longer than the last length that was tried the next one is at least: trying takes time."""


Packing = tuple[tuple[int, int], tuple[np.ndarray, np.ndarray], int]
"""Rows R and their length L; for each group int64 [n] flat position of each document's first token; the flat position
before which the first group is, and behind which the second one is."""


def balance(lengths: np.ndarray, num_parts: int, loads: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Share documents out so that the parts are about equally long: the longest first, each to the shortest part.

    Args:
        lengths: int64 [n].
        loads: int64 [num_parts] that the parts have already.

    Returns:
        The part of each document, and what stands before it in its part; both int64 [n].
    """
    part, before, known = [0] * len(lengths), [0] * len(lengths), lengths.tolist()
    heap = [(0, index) for index in range(num_parts)]
    if loads is not None:
        heap = sorted(zip(loads.tolist(), range(num_parts), strict=True))
    for document in np.argsort(-lengths, kind="stable").tolist():
        before[document], part[document] = heap[0]
        heapq.heapreplace(heap, (before[document] + known[document], part[document]))
    return np.array(part, np.int64), np.array(before, np.int64)


def pack(first: np.ndarray, second: np.ndarray) -> Packing:
    """Place the documents of two groups in the same rows, at least `FULL` of all places real tokens.

    Attention is paid by the row's length, so the rows are the shortest, from the longest document's on, with which this
    is found. The last row of the first group is also the first one of the second, so that no group has a row that is
    half empty. One row is always full.

    Args:
        first, second: int64 [n] lengths of each group's documents, each at least 1. A group may be empty.
    """
    total = int(first.sum() + second.sum())
    longest = max(int(lengths.max(initial=1)) for lengths in (first, second))
    tried = 0
    for width in (longest, *(math.ceil(_ROOM * total / count) for count in range(total // longest, 1, -1))):
        if width >= _STRIDE * tried:
            found, tried = _best_fit(first, second, width), width
            (rows, length), _, _ = found
            if total >= FULL * rows * length:
                return found
    return _best_fit(first, second, max(1, total))


def _best_fit(first: np.ndarray, second: np.ndarray, width: int) -> Packing:
    """Rows of `width`, as few as best fit finds."""
    starts, rooms = _fit(first, width, [])
    room, num_rows = 0, len(rooms)
    if rooms:  # the emptiest one comes last, and is where the second group begins
        room, emptiest = max((room, row) for row, room in enumerate(rooms))
        row = starts // width
        swapped = np.where(row == emptiest, num_rows - 1, np.where(row == num_rows - 1, emptiest, row))
        starts = starts + (swapped - row) * width
    shared = num_rows - (room > 0)
    more, rooms = _fit(second, width, [room] if room else [])
    shape = max(1, shared + len(rooms)), width
    return shape, (starts, shared * width + more), num_rows * width - room


def _fit(lengths: np.ndarray, width: int, rooms: list[int]) -> tuple[np.ndarray, list[int]]:
    """Each document, the longest first, to the fullest row with room for it.

    Args:
        rooms: of rows that are there already.

    Returns:
        int64 [n] flat places, and the room that is left in each row.
    """
    starts, known, rooms = [0] * len(lengths), lengths.tolist(), [*rooms]
    order = sorted((room, row) for row, room in enumerate(rooms))
    for document in np.argsort(-lengths, kind="stable").tolist():
        found = bisect_left(order, (known[document], 0))
        if found == len(order):
            order.append((width, len(rooms)))
            rooms.append(width)
        room, row = order.pop(found)
        starts[document] = (row + 1) * width - room
        rooms[row] = room - known[document]
        insort(order, (rooms[row], row))
    return np.array(starts, np.int64), rooms
