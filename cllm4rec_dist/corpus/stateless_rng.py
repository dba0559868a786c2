"""Random numbers that are a function of what they are for, and of nothing else.

Each is a hash of numbers that name its use, (seed, stream, epoch, row, ...). So a document is the same on whichever
rank it is made and in whichever batch, there is no state to keep, and those of a whole batch are one array operation; a
generator for each document takes 20 microseconds to make. The hash is the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), applied after each number is added.

Legend: n lists, M values in all lists together.
"""

from __future__ import annotations

import numpy as np

from cllm4rec_dist.corpus.ragged import ranges

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_bits(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 of the shape that the parts, whole numbers from 0 on, have together."""
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # products and sums are meant modulo 2^64
        for part in parts:
            bits = mix(bits + np.asarray(part).astype(np.uint64) + _GOLDEN)
    return bits


def mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 to well-mixed uint64, one to one."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keyed_uniform(*parts: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (keyed_bits(*parts) >> np.uint64(11)) * 2.0**-53


def keyed_permutations(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A permutation of each list: int64 [M], the place of each value among the values of its list, from 0 on.

    Args:
        keys: uint64 [n], one for each list.
        lengths: int64 [n] of the lists.
    """
    lists, within = np.repeat(np.arange(len(lengths)), lengths), ranges(np.zeros_like(lengths), lengths)
    order = np.lexsort((keyed_bits(keys[lists], within), lists))
    places = np.empty_like(within)
    places[order] = within
    return places
