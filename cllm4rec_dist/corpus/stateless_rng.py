"""Stateless random numbers: each is a hash of integers that identify its use, (seed, stream, epoch, row, ...).

So a document is the same on every rank and in every batch, there is no state to save, and the numbers of a whole batch
are one array operation; to create a generator for each document would take 20 microseconds each. The hash is the
finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), applied after
each integer is added.

Legend: n lists, M values in all lists together.
"""

from __future__ import annotations

import numpy as np

from cllm4rec_dist.corpus.ragged import ranges

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_bits(*parts: int | np.ndarray) -> np.ndarray:
    """Hash non-negative integers to random bits: uint64 of the parts' broadcast shape."""
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        for part in parts:
            bits = mix(bits + np.asarray(part).astype(np.uint64) + _GOLDEN)
    return bits


def mix(bits: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finaliser, a bijection of uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keyed_uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Hash non-negative integers to uniform float64 in [0, 1)."""
    return (keyed_bits(*parts) >> np.uint64(11)) * 2.0**-53


def keyed_permutations(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a random permutation of each list: int64 [M], the new position of each value in its list, from 0.

    Args:
        keys: uint64 [n] key of each list.
        lengths: int64 [n] length of each list.
    """
    lists, within = np.repeat(np.arange(len(lengths)), lengths), ranges(np.zeros_like(lengths), lengths)
    order = np.lexsort((keyed_bits(keys[lists], within), lists))
    positions = np.empty_like(within)
    positions[order] = within
    return positions
