"""Packing: documents of different lengths in rows with little padding.

With every document padded to the longest one, most tokens would be padding: lengths of histories and texts have long
tails. Here each row holds several documents, and `position_ids` that restart at each document keep attention inside of
it. So a packed batch gives the same results as its documents alone. The documents of both LLMs share rows, first one
LLM's, then the other's, so that one forward of the backbone runs over both.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort

import numpy as np

FULL = 0.97
"""Least packing efficiency: ratio of real tokens to positions."""
_SLACK = 1.02
"""Positions for each token in a row length to try: best fit needs some slack."""
_STRIDE = 1.05
"""Least ratio of a row length to the last one tried; each try costs time."""


Packing = tuple[tuple[int, int], tuple[np.ndarray, np.ndarray], int]
"""(R, L), number of rows and their length; for each group int64 [n] flat position of each document's first token; flat
position at which the second group starts."""


def balance(lengths: np.ndarray, num_parts: int, loads: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distribute documents over parts of about equal length: the longest first, each to the shortest part.

    Args:
        lengths: int64 [n].
        loads: int64 [num_parts] tokens that the parts already have.

    Returns:
        The part of each document, and the number of tokens before it in its part; both int64 [n].
    """
    part, before, sizes = [0] * len(lengths), [0] * len(lengths), lengths.tolist()
    heap = [(0, index) for index in range(num_parts)]
    if loads is not None:
        heap = sorted(zip(loads.tolist(), range(num_parts), strict=True))
    for document in np.argsort(-lengths, kind="stable").tolist():
        before[document], part[document] = heap[0]
        heapq.heapreplace(heap, (before[document] + sizes[document], part[document]))
    return np.array(part, np.int64), np.array(before, np.int64)


def pack(first: np.ndarray, second: np.ndarray) -> Packing:
    """Pack the documents of two groups into the same rows with an efficiency of at least `FULL`.

    The cost of attention grows with the row length, so this tries lengths from the longest document's on and returns
    the first that is efficient enough. The first group's last row is also the second group's first, so that it is not
    left half empty. One single row is always full.

    Args:
        first, second: int64 [n] lengths of each group's documents, each at least 1. A group may be empty.
    """
    total = int(first.sum() + second.sum())
    longest = max(int(lengths.max(initial=1)) for lengths in (first, second))
    tried = 0
    for width in (longest, *(math.ceil(_SLACK * total / count) for count in range(total // longest, 1, -1))):
        if width >= _STRIDE * tried:
            packing, tried = _best_fit(first, second, width), width
            (rows, length), _, _ = packing
            if total >= FULL * rows * length:
                return packing
    return _best_fit(first, second, max(1, total))


def _best_fit(first: np.ndarray, second: np.ndarray, width: int) -> Packing:
    """Pack both groups into rows of `width` by best fit."""
    starts, rooms = _fit(first, width, [])
    room, num_rows = 0, len(rooms)
    if rooms:  # move the emptiest row to the end, where the second group starts
        room, emptiest = max((room, row) for row, room in enumerate(rooms))
        row = starts // width
        swapped = np.where(row == emptiest, num_rows - 1, np.where(row == num_rows - 1, emptiest, row))
        starts = starts + (swapped - row) * width
    shared = num_rows - (room > 0)
    more, rooms = _fit(second, width, [room] if room else [])
    shape = max(1, shared + len(rooms)), width
    return shape, (starts, shared * width + more), num_rows * width - room


def _fit(lengths: np.ndarray, width: int, rooms: list[int]) -> tuple[np.ndarray, list[int]]:
    """Put each document, the longest first, into the fullest row with room for it.

    Args:
        rooms: free positions of the existing rows.

    Returns:
        int64 [n] flat position of each document's first token, and the free positions of each row.
    """
    starts, sizes, rooms = [0] * len(lengths), lengths.tolist(), [*rooms]
    order = sorted((room, row) for row, room in enumerate(rooms))
    for document in np.argsort(-lengths, kind="stable").tolist():
        index = bisect_left(order, (sizes[document], 0))
        if index == len(order):
            order.append((width, len(rooms)))
            rooms.append(width)
        room, row = order.pop(index)
        starts[document] = (row + 1) * width - room
        rooms[row] = room - sizes[document]
        insort(order, (rooms[row], row))
    return np.array(starts, np.int64), rooms
