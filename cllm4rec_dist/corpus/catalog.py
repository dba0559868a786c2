"""Filter raw interactions, assign rows to users and items, and make the lists of each part of the split.

Rows follow the sorted external ids, so they do not depend on the order of lines in a file. Reviews of held-out
interactions are left out, because they would leak the target. Users who are held out whole have no row and no text;
items that only they have keep theirs, as do items whose interactions are all held out.

Everything is arrays, sorted once by user and time: a hundred million interactions take minutes. `sources/` reads,
`split.py` splits, `writer.py` writes.

Legend: U users, I items, N interactions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.split import HISTORY, ITEM_PART, TEST, TRAIN, VALID, assign_parts, hold_out_items
from cllm4rec_dist.corpus.split_settings import ColdItemsSplit
from cllm4rec_dist.errors import DataError


@dataclass(frozen=True)
class Reviews:
    """Texts of training interactions, sorted by user and time.

    Attributes:
        users: int32 [n] user rows.
        items: int32 [n] item rows.
        ranks: int64 [positions] rank of each position's text in this order; -1 if it is left out.
        store: the texts.
    """

    users: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    store: ReviewStore


@dataclass(frozen=True)
class NewUsers:
    """Users who are held out whole.

    Attributes:
        ids: N external ids, sorted.
        history: int32 item rows of each user, in time order: the input of the prediction; at least one.
        valid, test: int32 item rows to predict; each user has some in one of the two.
    """

    ids: pl.Series
    history: Ragged
    valid: Ragged
    test: Ragged

    @classmethod
    def none(cls) -> Self:
        """Return no users."""
        no_lists = Ragged.from_lists([])
        return cls(pl.Series([], dtype=pl.String), no_lists, no_lists, no_lists)

    def __len__(self) -> int:
        """N."""
        return len(self.ids)


@dataclass(frozen=True)
class Catalog:
    """Users and items by row, and their interactions by part.

    Attributes:
        user_ids: U external ids, sorted.
        item_ids: I external ids, sorted.
        user_texts: U texts, "" if missing.
        item_titles: I titles, "" if missing.
        item_descriptions: I descriptions, "" if missing.
        item_categories: I categories, "" if missing; None if the data have no categories.
        train, valid, test: int32 item rows of each user, in time order (file order if times are unknown); every user
            has at least one training item.
        reviews: reviews of training interactions only.
        log: counts of the raw data that is left out.
        num_new_items: items of the I without any interaction in the raw data.
        new_users: users who are held out whole and are not among the U.
    """

    user_ids: pl.Series
    item_ids: pl.Series
    user_texts: pl.Series
    item_titles: pl.Series
    item_descriptions: pl.Series
    train: Ragged
    valid: Ragged
    test: Ragged
    reviews: Reviews
    log: SkipLog
    item_categories: pl.Series | None = None
    num_new_items: int = 0
    new_users: NewUsers = field(default_factory=NewUsers.none)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)


def build_catalog(raw: RawData, config: PrepareConfig) -> Catalog:
    """Filter, assign rows and split.

    Raises:
        DataError: if a filter leaves nothing, or needs ratings or a split that the source does not have, or if a split
            leaves no user to train on or holds no user out.
    """
    log = raw.log.copy()
    ids = {"user": raw.user_ids, "item": raw.item_ids}
    frame = _sorted(raw, ids)
    frame = _above_threshold(frame, config.rating_threshold, raw, log)
    frame = _first_of_each_pair(frame, raw, ids, log)
    frame = _core(frame, config.min_user_items, config.min_item_users, raw, log)
    if "part" in frame.columns:
        frame = _with_training(frame, "part", log)
    elif isinstance(config.split, ColdItemsSplit):
        frame = _with_training(hold_out_items(frame, ids["item"], config.split, config.seed), ITEM_PART, log)
    users, ids["user"] = _assign_rows(frame["user"], ids["user"])
    items, ids["item"] = _assign_rows(frame["item"], ids["item"])
    items, ids["item"], num_new_items = _add_new_items(items, ids["item"], raw)
    part = assign_parts(frame, users, items, ids, config)
    users, ids["user"], new_users = _separate_new_users(users, items, part, ids["user"])
    masks = [(users >= 0) & (part == p) for p in (TRAIN, VALID, TEST)]
    parts = [_ragged(users[mask], items[mask], len(ids["user"])) for mask in masks]
    _count_profiles(raw, new_users, log)
    titles = _aligned(raw.items, "item", "title", ids["item"])
    log.skip("item without title", int((titles == "").sum()), len(titles))
    return Catalog(
        user_ids=ids["user"],
        item_ids=ids["item"],
        user_texts=_aligned(raw.users, "user", "text", ids["user"]),
        item_titles=titles,
        item_descriptions=_aligned(raw.items, "item", "description", ids["item"]),
        train=parts[TRAIN],
        valid=parts[VALID],
        test=parts[TEST],
        reviews=_reviews(frame, users, items, part == TRAIN, raw.reviews, log),
        log=log,
        item_categories=_aligned(raw.items, "item", "category", ids["item"])
        if "category" in raw.items.columns
        else None,
        new_users=new_users,
        num_new_items=num_new_items,
    )


def _add_new_items(items: np.ndarray, names: pl.Series, raw: RawData) -> tuple[np.ndarray, pl.Series, int]:
    """Add the items without any interaction in the raw data; rows follow the sorted ids of all items.

    Items whose interactions were filtered out are not new and stay out.

    Returns:
        The row of each interaction's item, int32 [N]; the ids of all rows; the number of new items.
    """
    new = raw.items["item"].filter(~raw.items["item"].is_in(raw.item_ids.implode()))
    if not len(new):
        return items, names, 0
    merged = pl.concat([names.alias("item"), new.alias("item")])
    order = merged.arg_sort().to_numpy()
    rows = np.empty(len(merged), dtype=np.int32)
    rows[order] = np.arange(len(merged), dtype=np.int32)
    return rows[items], merged[order], len(new)


def _sorted(raw: RawData, ids: dict[str, pl.Series]) -> pl.DataFrame:
    """Sort interactions by user, time and position, and replace codes with ranks of the ids; sorts `ids` in place."""
    frame = raw.interactions
    for kind, names in ids.items():
        order = names.arg_sort().to_numpy()
        ranks = np.empty(len(names), dtype=np.uint32)
        ranks[order] = np.arange(len(names), dtype=np.uint32)
        ids[kind] = names[order]
        frame = frame.with_columns(pl.Series(kind, ranks[frame[kind].to_numpy()]))
    # A missing time counts as the oldest, so that such an interaction is never held out as the latest.
    oldest = pl.when(pl.col("timestamp").is_nan()).then(-np.inf).otherwise(pl.col("timestamp"))
    frame = frame.with_columns(oldest.alias("timestamp"))
    return frame.sort("user", "timestamp", "position").drop("timestamp")


def _left_out(
    frame: pl.DataFrame, kept: np.ndarray, reason: str, raw: RawData, log: SkipLog, value: str = "rating"
) -> pl.DataFrame:
    """Keep the interactions where `kept`, bool [N], is true; count the others, with the first of them in the files."""
    if not kept.all():
        positions = frame["position"].to_numpy()[~kept]
        first = int(positions.min())
        row = raw.interactions.row(int(np.searchsorted(raw.interactions["position"].to_numpy(), first)), named=True)
        shown = [raw.user_ids[row["user"]], raw.item_ids[row["item"]]]
        if value in row and row[value] == row[value]:
            shown.append(f"{row[value]:g}")
        log.skip(reason, len(positions), len(frame), value=" ".join(shown), **raw.origins.find(first))
        frame = frame.filter(pl.Series(kept))
    return frame


def _first_of_each_pair(frame: pl.DataFrame, raw: RawData, ids: dict[str, pl.Series], log: SkipLog) -> pl.DataFrame:
    """Keep the earliest interaction of each user with each item."""
    pairs = frame["user"].cast(pl.UInt64) * max(1, len(ids["item"])) + frame["item"]
    first = pairs.is_first_distinct().to_numpy()
    frame = _left_out(frame, first, "repeated interaction of a user with an item", raw, log)
    if raw.has_reviews:
        log.skip("empty review", int((~frame["has_text"]).sum()), len(frame))
    return frame


def _above_threshold(frame: pl.DataFrame, threshold: float | None, raw: RawData, log: SkipLog) -> pl.DataFrame:
    if threshold is None:
        return frame
    ratings = frame["rating"].to_numpy()
    if np.isnan(ratings).all():
        raise DataError("rating_threshold", threshold, "needs ratings, and the source has none", "Set it to null.")
    if not (ratings >= threshold).any():
        highest = np.nanmax(ratings)
        raise DataError("rating_threshold", threshold, f"is above every rating (up to {highest})", "Lower it.")
    return _left_out(frame, ratings >= threshold, f"interaction rated below {threshold:g}", raw, log)


def _core(frame: pl.DataFrame, min_user_items: int, min_item_users: int, raw: RawData, log: SkipLog) -> pl.DataFrame:
    """Keep the largest part in which every user has enough items and every item enough users (k-core)."""
    users, items = frame["user"].to_numpy(), frame["item"].to_numpy()
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
    inside = np.zeros(len(frame), dtype=bool)
    inside[kept] = True
    return _left_out(frame, inside, reason, raw, log)


def _with_training(frame: pl.DataFrame, column: str, log: SkipLog) -> pl.DataFrame:
    """Keep the interactions of users with training items, by the parts in `column`."""
    has_training = frame["user"].is_in(frame.filter(pl.col(column) == TRAIN)["user"].unique().implode())
    log.skip("held-out interaction of a user without training items", int((~has_training).sum()), len(frame))
    if not has_training.any():
        raise DataError("interactions", "the files of the split", "have no training interaction", "Fix the recipe.")
    return frame.filter(has_training)


def _assign_rows(ranks: pl.Series, names: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Return the row of each rank among the used ones, int32 [N], and the ids by row."""
    values = ranks.to_numpy()
    used = np.zeros(len(names), dtype=bool)
    used[values] = True
    rows = (np.cumsum(used) - 1).astype(np.int32)
    return rows[values], names.filter(pl.Series(used))


def _separate_new_users(
    users: np.ndarray, items: np.ndarray, part: np.ndarray, names: pl.Series
) -> tuple[np.ndarray, pl.Series, NewUsers]:
    """Separate users who are held out whole from the others.

    Returns:
        The row of each interaction's user, int32 [N], -1 if held out whole; the ids of these rows; the users who are
        held out whole.
    """
    is_new = np.zeros(len(names), dtype=bool)
    is_new[users[part == HISTORY]] = True
    if not is_new.any():
        return users, names, NewUsers.none()
    order = (np.cumsum(is_new) - 1).astype(np.int32)
    of_new = is_new[users]
    lists = {
        name: _ragged(order[users[of_new & (part == p)]], items[of_new & (part == p)], int(is_new.sum()))
        for name, p in (("history", HISTORY), ("valid", VALID), ("test", TEST))
    }
    rows = np.where(is_new, -1, np.cumsum(~is_new) - 1).astype(np.int32)
    return rows[users], names.filter(pl.Series(~is_new)), NewUsers(names.filter(pl.Series(is_new)), **lists)


def _count_profiles(raw: RawData, new_users: NewUsers, log: SkipLog) -> None:
    profiles = raw.users.filter(pl.col("text").is_not_null())
    log.skip(
        "profile of a user who is held out",
        int(profiles["user"].is_in(new_users.ids.implode()).sum()) if len(new_users) else 0,
        len(profiles),
    )


def _ragged(users: np.ndarray, items: np.ndarray, num_users: int) -> Ragged:
    return Ragged.from_lengths(np.bincount(users, minlength=num_users), items)


def _aligned(table: pl.DataFrame, key: str, column: str, names: pl.Series) -> pl.Series:
    """Return the texts in the order of `names`, "" if the table has none."""
    left = names.alias(key).to_frame()
    return left.join(table.select(key, column), on=key, how="left", maintain_order="left")[column].fill_null("")


def _reviews(
    frame: pl.DataFrame, users: np.ndarray, items: np.ndarray, training: np.ndarray, store: ReviewStore, log: SkipLog
) -> Reviews:
    has_text = frame["has_text"].to_numpy()
    log.skip("review of a held-out interaction", int((has_text & ~training).sum()), int(has_text.sum()))
    kept = np.flatnonzero(has_text & training)
    positions = frame["position"].to_numpy()
    ranks = np.full(store.num_positions, -1, dtype=np.int64)  # includes interactions that were filtered out
    ranks[positions[kept]] = np.arange(len(kept))
    return Reviews(users[kept], items[kept], ranks, store)
