"""Products that the run has never seen, given by id and text. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.queries import checked_id


@dataclass(frozen=True)
class NewItem:
    """A product that is not in the catalog.

    Attributes:
        item: external id.
        title: shown in lists; "" if it has none.
        description: further text; "" if it has none.
    """

    item: str
    title: str
    description: str = ""

    @property
    def text(self) -> str:
        """Title and description, joined as those of the items of a corpus."""
        return f"{self.title} {self.description}".strip()


def checked_titles(titles: object, descriptions: object) -> list[NewItem]:
    """Validate titles, and optionally descriptions, by id.

    Raises:
        DataError: for a value of the wrong type, or a description without a title.
    """
    if not isinstance(titles, Mapping):
        raise DataError(
            "new_items", type(titles).__name__, "is no mapping from ids to texts", 'Write {"ID": "the text", ...}.'
        )
    descriptions = {} if descriptions is None else descriptions
    if not isinstance(descriptions, Mapping):
        raise DataError(
            "descriptions", type(descriptions).__name__, "is no mapping from ids to texts", 'Write {"ID": "the text"}.'
        )
    for field, texts in (("new_items", titles), ("descriptions", descriptions)):
        for name, text in texts.items():
            checked_id(f"{field}: id", name)
            if not isinstance(text, str):
                raise DataError(f"{field}[{name!r}]", text, "is not a text", "Give the product's text.")
    without_title = [name for name in descriptions if name not in titles]
    if without_title:
        raise DataError("descriptions", without_title[0], "is not in new_items", "Give its title in new_items too.")
    return [NewItem(str(name), str(title), str(descriptions.get(name, ""))) for name, title in titles.items()]


def require_new(field: str, new_items: Sequence[NewItem], items: ItemCatalog) -> None:
    """Refuse products that `violations` names.

    Raises:
        DataError: the first violation.
    """
    for violation in violations(field, new_items, items):
        raise violation


def violations(field: str, new_items: Sequence[NewItem], items: ItemCatalog) -> Iterator[DataError]:
    """Yield an error for an empty id, an id that the catalog has or that comes twice, and an item without a text."""
    seen: set[str] = set()
    for new in new_items:
        if not new.item.strip():
            yield DataError(field, new.item, "is an empty id", "Give each new product an id.")
        elif items.row(new.item) is not None:
            yield DataError(
                field, new.item, "is an item of the run already", "Leave it out: it is ranked and shown by its own id."
            )
        elif new.item in seen:
            yield DataError(field, new.item, "comes twice", "Give each new product once.")
        elif not new.text:
            yield DataError(
                field, new.item, "has no text", "Give its title or description: nothing else is known of a new product."
            )
        seen.add(new.item)
