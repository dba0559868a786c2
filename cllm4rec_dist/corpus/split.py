"""Assign each interaction to training, validation or test.

A random split is drawn for each user from the recipe's seed and the ids: adding or removing other users does not change
it. `catalog.py` filters before, and makes the lists of each part.

Legend: U users, I items, N interactions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.split_settings import ColdItemsSplit, GivenSplit, NoSplit, RandomSplit, UsersSplit
from cllm4rec_dist.corpus.stateless_rng import mix
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

TRAIN, VALID, TEST, HISTORY = range(4)
"""Parts of the interactions; the history of users who are held out whole is neither trained on nor predicted."""


ITEM_PART = "item_part"
"""Column of an interaction's item: VALID or TEST if it is held out whole, else TRAIN."""


def hold_out_items(frame: pl.DataFrame, names: pl.Series, split: ColdItemsSplit, seed: int) -> pl.DataFrame:
    """Draw the items that are held out whole, and add column `ITEM_PART`.

    The draw is a function of the seed and the item's id, so it does not depend on users or other items.

    Args:
        frame: interactions with a column item.
        names: external id of each value of that column.

    Raises:
        DataError: if no item is drawn for a part with a share above 0, or none is left to train on.
    """
    draw = _hashes(seed, "cold item", names) * 2.0**-64
    group = np.full(len(names), TRAIN, dtype=np.uint8)
    group[draw < split.test_items + split.valid_items] = VALID
    group[draw < split.test_items] = TEST
    part = group[frame["item"].to_numpy()]
    num_items = frame["item"].n_unique()
    for code, key in ((VALID, "valid_items"), (TEST, "test_items")):
        if getattr(split, key) > 0 and not (part == code).any():
            what = f"holds out none of the {num_items:,} items"
            raise DataError(f"split.{key}", getattr(split, key), what, "Raise it, or write split: {kind: random}.")
    if not (part == TRAIN).any():
        raise DataError("split", split.kind, "holds out all items", "Lower split.valid_items and split.test_items.")
    return frame.with_columns(pl.Series(ITEM_PART, part))


def assign_parts(
    frame: pl.DataFrame,
    users: np.ndarray,
    items: np.ndarray,
    ids: dict[str, pl.Series],
    config: PrepareConfig,
) -> np.ndarray:
    """Return the part of each interaction, uint8 [N]; `users` is sorted, a user's items are in time order."""
    if isinstance(config.split, GivenSplit) or "part" in frame.columns:
        return _given_part(frame, config)
    if isinstance(config.split, ColdItemsSplit):
        part = frame[ITEM_PART].to_numpy().copy()
        warm = part == TRAIN
        of_others = config.model_copy(update={"split": config.split.of_other_items()})
        part[warm] = assign_parts(frame.filter(pl.Series(warm)), users[warm], items[warm], ids, of_others)
        return part
    if isinstance(config.split, NoSplit):
        return np.full(len(users), TRAIN, dtype=np.uint8)
    lengths = np.bincount(users, minlength=len(ids["user"]))
    group = np.full(len(lengths), TRAIN, dtype=np.uint8)
    if isinstance(config.split, RandomSplit | UsersSplit):
        drawn = _drawn_order(users, items, ids, config.seed)
        num_valid, num_test = _random_counts(lengths, config.split)
        if isinstance(config.split, UsersSplit):
            group = _groups(lengths, ids["user"], config.split, config.seed)
            num_held = np.clip(np.floor(lengths * config.split.held_out + 0.5).astype(np.int64), 1, lengths - 1)
            num_valid = np.where(group == TRAIN, num_valid, num_held * (group == VALID))
            num_test = np.where(group == TRAIN, num_test, num_held * (group == TEST))
    else:
        drawn = np.arange(len(users))[::-1]
        drawn = drawn[np.argsort(users[drawn], kind="stable")]
        num_valid, num_test = _last_counts(lengths, config.split.num_valid, config.split.num_test)
    if num_whole := int((num_valid + num_test == 0).sum()):  # logged, not counted as left out: they are trained on
        logger.info(
            "%s of %s users have too few items to hold any out: all of theirs are trained on",
            f"{num_whole:,}",
            f"{len(lengths):,}",
        )
    # Index of each draw among its user's draws: the first ones are test, the next ones validation.
    within = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = users[drawn]
    part = np.full(len(users), TRAIN, dtype=np.uint8)
    part[drawn[within < (num_test + num_valid)[owner]]] = VALID
    part[drawn[within < num_test[owner]]] = TEST
    part[(part == TRAIN) & (group != TRAIN)[users]] = HISTORY
    return part


def _groups(lengths: np.ndarray, names: pl.Series, split: UsersSplit, seed: int) -> np.ndarray:
    """Return uint8 [U]: VALID or TEST for users who are held out whole, TRAIN for the others."""
    draw = _hashes(seed, "new user", names) * 2.0**-64
    eligible = lengths >= 3
    group = np.full(len(names), TRAIN, dtype=np.uint8)
    group[eligible & (draw < split.test_users + split.valid_users)] = VALID
    group[eligible & (draw < split.test_users)] = TEST
    for code, key in ((VALID, "valid_users"), (TEST, "test_users")):
        if getattr(split, key) > 0 and not (group == code).any():
            raise DataError(
                f"split.{key}",
                getattr(split, key),
                f"holds out none of the {int(eligible.sum()):,} users with three or more items",
                "Raise it, or write split: {kind: random}.",
            )
    if not (group == TRAIN).any():
        raise DataError("split", split.kind, "holds out all users", "Lower split.valid_users and split.test_users.")
    return group


def _given_part(frame: pl.DataFrame, config: PrepareConfig) -> np.ndarray:
    if "part" not in frame.columns:
        raise DataError(
            "split.kind", "given", "needs files of a split, and the source has none", "Choose another split."
        )
    if not isinstance(config.split, GivenSplit):
        raise DataError(
            "split.kind",
            config.split.kind,
            "would replace the split of the data set's files",
            "Write split: {kind: given}, or give one file of all interactions.",
        )
    return frame["part"].to_numpy()


def _drawn_order(users: np.ndarray, items: np.ndarray, ids: dict[str, pl.Series], seed: int) -> np.ndarray:
    """Return each user's interactions in random order, user by user; int64 [N]."""
    user_keys, item_keys = _hashes(seed, "user", ids["user"]), _hashes(seed, "item", ids["item"])
    keys = pl.DataFrame({"user": users, "key": mix(mix(user_keys)[users] + item_keys[items])})
    return keys.select(pl.arg_sort_by("user", "key", maintain_order=True)).to_series().to_numpy().astype(np.int64)


def _random_counts(lengths: np.ndarray, split: RandomSplit | UsersSplit) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of validation and test items of each user, int64 [U] each.

    Fractions are rounded half up; at least one item is left for training.
    """
    available = np.where(lengths < 3, 0, lengths - 1)
    num_test = np.minimum(np.floor(lengths * split.test + 0.5).astype(np.int64), available)
    num_valid = np.minimum(np.floor(lengths * split.valid + 0.5).astype(np.int64), available - num_test)
    return num_valid, num_test


def _last_counts(lengths: np.ndarray, num_valid: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of validation and test items of each user; 0 if none would be left to train on."""
    has_enough = (lengths >= 3) & (lengths > num_valid + num_test)
    return has_enough * num_valid, has_enough * num_test


def _hashes(seed: int, kind: str, names: Sequence[str] | pl.Series) -> np.ndarray:
    """Hash ids to uint64; equal on every machine and in every process."""
    digests = b"".join(hashlib.sha256(f"{seed}/{kind}/{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
