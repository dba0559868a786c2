"""Keys of interactions, to compare corpora that number their users and items differently.

A key is a 64-bit hash of a user's and an item's external id. It does not depend on rows, the order of a file, the
tokenizer or the catalog, so an interaction has the same key in every corpus. Two different interactions collide with a
probability of about 2^-64.

Legend: N interactions, U users, I items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.stateless_rng import keyed_bits

_BLOCK = 1 << 22
"""Interactions hashed at a time; bounds the memory of intermediate results."""


def id_hashes(kind: str, ids: Sequence[str]) -> np.ndarray:
    """Hash external ids to uint64, 8 bytes of BLAKE2b over kind and id; equal on every machine."""
    digests = b"".join(hashlib.blake2b(f"{kind}/{name}".encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def pair_keys(user_hashes: np.ndarray, item_hashes: np.ndarray, items: Ragged) -> np.ndarray:
    """Return the key of each interaction, uint64 [N], in the order of `items.values`.

    Args:
        user_hashes: uint64 [U], from `id_hashes`.
        item_hashes: uint64 [I].
        items: item rows of each of the U users.
    """
    keys = np.empty(len(items.values), dtype=np.uint64)
    rows = items.rows
    for start in range(0, len(keys), _BLOCK):
        block = slice(start, start + _BLOCK)
        keys[block] = keyed_bits(user_hashes[rows[block]], item_hashes[items.values[block]])
    return keys


def digest(keys: np.ndarray) -> str:
    """Return the hexadecimal sha256 of a set of interactions: of their sorted keys as little-endian bytes."""
    return hashlib.sha256(np.sort(keys).astype("<u8", copy=False).tobytes()).hexdigest()


def split_digests(item_ids: Sequence[str], *groups: tuple[Sequence[str], dict[str, Ragged]]) -> dict[str, str]:
    """Return the digest of each split by its name.

    Args:
        item_ids: external id of each item row.
        groups: for each group of users, their external ids, and by split the item rows of each user.
    """
    items = id_hashes("item", item_ids)
    keys: dict[str, list[np.ndarray]] = {}
    for user_ids, splits in groups:
        users = id_hashes("user", user_ids)
        for name, lists in splits.items():
            keys.setdefault(name, []).append(pair_keys(users, items, lists))
    return {name: digest(np.concatenate(parts)) for name, parts in keys.items()}
