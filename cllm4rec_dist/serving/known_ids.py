"""External ids of a run's users and items, read without torch, so that a mistyped id is rejected at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.checkpointing.find_run import corpus_in_project, find, read_state
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.corpus.about import alike_ids
from cllm4rec_dist.corpus.manifest import ItemColumns, OrderColumns, load_manifest
from cllm4rec_dist.errors import CLLM4RecError, CorpusError, DamagedCheckpointError, DataError
from cllm4rec_dist.filesystems import as_os_errors, locate
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.new_items import NewItem, require_new
from cllm4rec_dist.suggestions import plural

logger = logging.getLogger(__name__)

LATER_ORDERS = "Give --history FILE for people who came later, or --skip-unknown-users to leave them out."
NEW_ITEMS = "--new-items"
"""Option with a file of new items."""
_MAX_COMPARED = 100_000
"""Number of the catalog's ids that are compared with new ones; more would take seconds."""
_SHOWN = 10
"""Number of items that an error message lists."""


@dataclass(frozen=True)
class KnownIds:
    """External ids of a run.

    Attributes:
        users: ids of users, those without rows last.
        items: catalog without categories and popularity.
        order_columns, item_columns: column names of orders and of items in the corpus' recipe; None if they are not
            recorded.
        has_texts: True if any item has a title or description.
    """

    users: list[str]
    items: ItemCatalog
    order_columns: OrderColumns | None = None
    item_columns: ItemColumns | None = None
    has_texts: bool = True

    def with_new(self, new_items: Sequence[NewItem]) -> KnownIds:
        """Return the ids with those of new items.

        Raises:
            DataError: for an id that is known already or comes twice, or an item without a text, or if new items cannot
                be added to the run.
        """
        require_new(NEW_ITEMS, new_items, self.items)
        if new_items and not self.has_texts:
            raise DataError(
                NEW_ITEMS,
                new_items[0].item,
                "cannot be added: no item of the run has a title or description, so that texts mean nothing to it",
                "Prepare the corpus with texts of its items, and train again.",
            )
        ids, titles = [new.item for new in new_items], [new.title for new in new_items]
        _warn_of_alike(NEW_ITEMS, "item", ids, self.items.ids, "the same product would be listed twice")
        return replace(self, items=self.items.with_new(ids, titles))


def _warn_of_alike(field: str, kind: str, new_ids: Sequence[str], ids: Sequence[str], consequence: str) -> None:
    """Warn of new ids that are probably misspelt ids of the run."""
    alike = alike_ids(new_ids, ids[:_MAX_COMPARED])
    if alike:
        verb = "differs" if len(alike) == 1 else "differ"
        logger.warning(
            "%s: %s %s from ids of the run only in case, zeros or punctuation, such as %r and %r: %s",
            field,
            plural(len(alike), f"{kind} id"),
            verb,
            *alike[0],
            consequence,
        )


def warn_of_alike_users(field: str, ordering: Iterable[str], users: Sequence[str]) -> None:
    """Warn of customers of later orders whose ids are probably misspelt ones of the run's users.

    They would get lists as people whom the run does not know.
    """
    known = set(users)
    strangers = [name for name in ordering if name not in known]
    consequence = "they count as people who came later; if they are the same, write the ids equally"
    _warn_of_alike(field, "user", strangers, users, consequence)


def read_known_ids(run: str, corpus: str | None = None) -> KnownIds:
    """Read the ids of the corpus that is recorded in a run's best checkpoint.

    Args:
        run: as for `find_run.find`.
        corpus: current path of the corpus, if it differs from the recorded one.

    Raises:
        CLLM4RecError: if there is no checkpoint or corpus, or it cannot be read.
    """
    url = corpus or _corpus_of(run)
    users, items = _table(url, "users"), _table(url, "items")
    ids, titles = items["item"].to_list(), [title or "" for title in items["title"].to_list()]
    catalog = ItemCatalog(ids, titles, None, np.zeros(len(ids), np.int64))
    names = users["user"].to_list()
    manifest, _ = load_manifest(url)
    if manifest.of_kind("new_users"):
        names += _table(url, "new_users")["user"].to_list()
    has_texts = any(titles) or any(items["description"].to_list())
    return KnownIds(names, catalog, manifest.order_columns, manifest.item_columns, has_texts)


def _corpus_of(run: str) -> str:
    """Path of the corpus of a run's best checkpoint. Its configuration is validated later, by the ranks."""
    store, names = find(run)
    state = _first_state(store, names)
    in_project = corpus_in_project(store, state.get("fingerprints", {}).get("corpus"))
    return in_project or str(state["config"].get("corpus"))


def _first_state(store: Store, names: Sequence[str]) -> dict[str, Any]:
    """Return the state of the first checkpoint in which it is intact, as loading it passes over damaged ones."""
    for name in names[:-1]:
        try:
            return read_state(store, name)
        except DamagedCheckpointError:
            continue  # the ranks report it
    return read_state(store, names[-1])


def _table(url: str, kind: str) -> pl.DataFrame:
    # polars: pyarrow's threads sometimes abort a process that exits soon after reading Parquet.
    manifest, _ = load_manifest(url)
    fs, root = locate("corpus", url, CorpusError)
    (entry,) = manifest.of_kind(kind)
    try:
        with as_os_errors(), fs.open(f"{root}/{entry.path}", "rb") as file:
            return pl.read_parquet(file.read())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise CorpusError(f"{url}/{entry.path}", str(error), "cannot be read", "Copy the corpus again.") from error


def unknown_error(field: str, unknown: Sequence[str], known: Sequence[str], kind: str, cure: str) -> CLLM4RecError:
    """Return the error for ids that are not in the run, with similar ids that are."""
    shown = list(unknown[:5])
    hints = {name: similar_ids(name, known) for name in shown}
    likely = "; ".join(f"{' or '.join(similar)} for {name}" for name, similar in hints.items() if similar)
    if len(shown) == 1 and likely:
        likely = " or ".join(hints[shown[0]])
    value = shown[0] if len(unknown) == 1 else shown
    many = f" ({len(unknown):,} in all)" if len(unknown) > len(shown) else ""
    article = "an" if kind == "item" else "a"
    rule = f"is not {article} {kind} of the run" if len(unknown) == 1 else f"are not {kind}s of the run{many}"
    return DataError(field, value, rule, f"Did you mean {likely}? {cure}".rstrip() if likely else cure)


def require_joined_items(field: str, ordered: Iterable[str], items: ItemCatalog) -> None:
    """Reject orders without any item of the catalog, and warn if fewer than half are in it, as `prepare` does.

    Otherwise ids rewritten by a spreadsheet (leading zeros, 8.4E+09) would silently count as no orders.

    Raises:
        DataError: with an example id from the orders and from the catalog.
    """
    distinct = list(dict.fromkeys(ordered))
    known = set(items.ids)
    unknown = [item for item in distinct if item not in known]
    if 2 * len(unknown) <= len(distinct):
        return
    if len(unknown) == len(distinct):
        cure = f"The run has ids such as {items.ids[0]!r}: give orders of its items, with ids as they were in training."
        raise unknown_error(field, unknown, items.ids, "item", cure)
    logger.warning(
        "%s: %d of %d ordered items are unknown to the run and left out, such as %r; the run has ids such as %r",
        field,
        len(unknown),
        len(distinct),
        unknown[0],
        items.ids[0],
    )


def find_item(field: str, text: str, items: ItemCatalog) -> str:
    """Return the id of the item with this id, or whose title contains these words.

    Raises:
        DataError: if no title, or more than one, contains all of the words.
    """
    if items.row(text) is not None:
        return text
    rows = items.titled(text)
    same = [row for row in rows if items.titles[row].casefold() == text.strip().casefold()]
    if len(same) == 1 or len(rows) == 1:
        return items.ids[(same or rows)[0]]
    if rows:
        shown = "".join(f"\n  {items.ids[row]}  {items.titles[row]}" for row in rows[:_SHOWN])
        more = f"\n  and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
        raise DataError(field, text, f"is in the titles of {len(rows):,} items", f"Give the id of one:{shown}{more}")
    cure = "Give an id, or words of its title."
    similar = items.search(text, 3)
    if similar and similar_ids(text, items.ids):
        cure = ""
    elif similar:
        cure = f"Did you mean {' or '.join(f'{items.ids[row]} ({items.titles[row]})' for row in similar)}?"
    raise unknown_error(field, [text], items.ids, "item", cure)
