"""From raw interactions to numbered users and items with a training, validation and test part.

Rows are numbered by sorted external id, so that they do not depend on the order of lines in a file. A random split is
drawn for each user alone, from the recipe's seed and the ids: adding or removing other users moves nothing. Reviews of
held-out interactions are left out, because they would give the answer away.

Everything is arrays: a million interactions take seconds. Reading is left to `sources/`, writing to `writer.py`.

Legend: U users, I items, N interactions.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import LastSplit, PrepareConfig, RandomSplit
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_TRAIN, _VALID, _TEST = range(3)


@dataclass(frozen=True)
class Reviews:
    """Texts of training interactions, sorted by user.

    Attributes:
        users: int64 [n] user rows.
        items: int64 [n] item rows.
        texts: n texts, none empty.
    """

    users: np.ndarray
    items: np.ndarray
    texts: list[str]


@dataclass(frozen=True)
class Catalog:
    """Numbered users and items; a row is the position in these lists.

    Attributes:
        user_ids: U external ids, sorted.
        item_ids: I external ids, sorted.
        user_texts: U texts, "" where there is none.
        item_titles: I titles, "" where there is none.
        item_descriptions: I descriptions, "" where there is none.
        train, valid, test: int32 item rows of each user, in time order (file order where times are unknown); every
            user has at least one training item.
        reviews: of training interactions only.
        skipped: everything of the raw data that is not here: reason -> count.
    """

    user_ids: list[str]
    item_ids: list[str]
    user_texts: list[str]
    item_titles: list[str]
    item_descriptions: list[str]
    train: Ragged
    valid: Ragged
    test: Ragged
    reviews: Reviews
    skipped: Counter[str]

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)


def build_catalog(raw: RawData, config: PrepareConfig) -> Catalog:
    """Filter, number and split.

    Raises:
        DataError: if a filter leaves nothing, or asks for ratings that the source does not have.
    """
    skipped = Counter(raw.skipped)
    frame = _above_threshold(raw.interactions, config.rating_threshold, skipped)
    frame = _core(frame, config.min_user_items, config.min_item_users, skipped)
    users, user_ids = _number(frame["user"])
    items, item_ids = _number(frame["item"])
    # lexsort puts NaN last, but an unknown time counts as the oldest.
    times = frame["timestamp"].fillna(-np.inf).to_numpy()
    order = np.lexsort((frame["position"].to_numpy(), times, users))
    users, items, texts = users[order], items[order], frame["text"].to_numpy()[order]
    part = _split(users, items, user_ids, item_ids, config, skipped)
    parts = [_ragged(users[part == p], items[part == p], len(user_ids)) for p in (_TRAIN, _VALID, _TEST)]
    titles = _aligned(raw.items, "item", "title", item_ids)
    _count(skipped, "item without title", titles.count(""))
    return Catalog(
        user_ids=user_ids,
        item_ids=item_ids,
        user_texts=_aligned(raw.users, "user", "text", user_ids),
        item_titles=titles,
        item_descriptions=_aligned(raw.items, "item", "description", item_ids),
        train=parts[_TRAIN],
        valid=parts[_VALID],
        test=parts[_TEST],
        reviews=_reviews(users, items, texts, part == _TRAIN, skipped),
        skipped=skipped,
    )


def _count(skipped: Counter[str], reason: str, count: int) -> None:
    if count:
        skipped[reason] += count


def _above_threshold(frame: pd.DataFrame, threshold: float | None, skipped: Counter[str]) -> pd.DataFrame:
    if threshold is None:
        return frame
    if frame["rating"].isna().all():
        raise DataError("rating_threshold", threshold, "needs ratings, and the source has none", "Set it to null.")
    kept = frame[frame["rating"] >= threshold]
    if kept.empty:
        highest = frame["rating"].max()
        raise DataError("rating_threshold", threshold, f"is above every rating (up to {highest})", "Lower it.")
    _count(skipped, f"interaction rated below {threshold:g}", len(frame) - len(kept))
    return kept


def _core(frame: pd.DataFrame, min_user_items: int, min_item_users: int, skipped: Counter[str]) -> pd.DataFrame:
    """The largest part in which every user has enough items and every item enough users."""
    users, items = pd.factorize(frame["user"])[0], pd.factorize(frame["item"])[0]
    kept = np.arange(len(frame))
    while len(kept):
        enough = (np.bincount(users[kept])[users[kept]] >= min_user_items) & (
            np.bincount(items[kept])[items[kept]] >= min_item_users
        )
        if enough.all():
            break
        kept = kept[enough]
    if not len(kept):
        raise DataError(
            "min_user_items, min_item_users", (min_user_items, min_item_users), "leave no interaction", "Lower them."
        )
    reason = f"interaction outside of the core ({min_user_items} items a user, {min_item_users} users an item)"
    _count(skipped, reason, len(frame) - len(kept))
    return frame.iloc[kept]


def _number(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Row of each value, int64 [N], and the ids by row, sorted by code point."""
    codes, uniques = pd.factorize(column)
    names = [str(name) for name in uniques]
    order = sorted(range(len(names)), key=names.__getitem__)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[order] = np.arange(len(names))
    return ranks[codes], [names[index] for index in order]


def _hashes(seed: int, kind: str, names: Sequence[str]) -> np.ndarray:
    """uint64 for each id, the same on every machine and in every process."""
    digests = b"".join(hashlib.sha256(f"{seed}/{kind}/{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014): uint64 to well-mixed uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _split(
    users: np.ndarray,
    items: np.ndarray,
    user_ids: list[str],
    item_ids: list[str],
    config: PrepareConfig,
    skipped: Counter[str],
) -> np.ndarray:
    """Part of each interaction, uint8 [N]; `users` is sorted, a user's items are in time order."""
    lengths = np.bincount(users, minlength=len(user_ids))
    if isinstance(config.split, RandomSplit):
        user_keys, item_keys = _hashes(config.seed, "user", user_ids), _hashes(config.seed, "item", item_ids)
        drawn = np.lexsort((_mix(_mix(user_keys)[users] + item_keys[items]), users))
        num_valid, num_test = _random_counts(lengths, config.split)
    else:
        drawn = np.arange(len(users))[::-1]
        drawn = drawn[np.argsort(users[drawn], kind="stable")]
        num_valid, num_test = _last_counts(lengths, config.split)
    _count(skipped, "user with too few items to hold any out", int((num_valid + num_test == 0).sum()))
    # Place of each interaction in its user's drawing order: the first ones are the test, the next ones validation.
    place = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = users[drawn]
    part = np.full(len(users), _TRAIN, dtype=np.uint8)
    part[drawn[place < (num_test + num_valid)[owner]]] = _VALID
    part[drawn[place < num_test[owner]]] = _TEST
    return part


def _random_counts(lengths: np.ndarray, split: RandomSplit) -> tuple[np.ndarray, np.ndarray]:
    """Items to hold out of each user, int64 [U] each: shares rounded half up, one item at least left for training."""
    available = np.where(lengths < 3, 0, lengths - 1)
    num_test = np.minimum(np.floor(lengths * split.test + 0.5).astype(np.int64), available)
    num_valid = np.minimum(np.floor(lengths * split.valid + 0.5).astype(np.int64), available - num_test)
    return num_valid, num_test


def _last_counts(lengths: np.ndarray, split: LastSplit) -> tuple[np.ndarray, np.ndarray]:
    """The same for the last items: all of them are held out, or none where that left nothing to train on."""
    whole = (lengths >= 3) & (lengths > split.num_valid + split.num_test)
    return whole * split.num_valid, whole * split.num_test


def _ragged(users: np.ndarray, items: np.ndarray, num_users: int) -> Ragged:
    return Ragged.from_lengths(np.bincount(users, minlength=num_users), items.astype(np.int32))


def _aligned(table: pd.DataFrame, key: str, column: str, names: list[str]) -> list[str]:
    """Texts in the order of `names`, "" where the table has none."""
    texts = dict(zip(table[key].tolist(), table[column].tolist(), strict=True))
    return [texts.get(name, "") for name in names]


def _reviews(
    users: np.ndarray, items: np.ndarray, texts: np.ndarray, training: np.ndarray, skipped: Counter[str]
) -> Reviews:
    has_text = texts != ""
    _count(skipped, "review of a held-out interaction", int((has_text & ~training).sum()))
    kept = np.flatnonzero(has_text & training)
    return Reviews(users[kept], items[kept], texts[kept].tolist())
