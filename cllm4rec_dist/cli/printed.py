"""Lists that are printed: of one basket, one user, or the neighbours of one item."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from cllm4rec_dist.cli.formats import Format
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.item_catalog import ItemCatalog

if TYPE_CHECKING:
    import pandas as pd

    from cllm4rec_dist.serving.queries import Answer


def require_printed_format(file_format: Format | None) -> None:
    """Refuse a format that a terminal cannot show."""
    if file_format is Format.PARQUET:
        raise ConfigError("--format", file_format.value, "cannot be printed", "Write table, csv or jsonl.")


def split_basket(texts: Sequence[str], items: ItemCatalog) -> tuple[str, ...]:
    """Ids of `A,B` lists; a text that is an id itself is not split."""
    ids = [part for text in texts for part in ([text] if items.row(text) is not None else text.split(","))]
    return tuple(name for part in ids if (name := part.strip()))


def require_known_basket(names: Sequence[str], items: ItemCatalog) -> None:
    """Refuse a basket of which nothing is known: a list of popular items would look like an answer to it.

    Raises:
        DataError: with ids, or items by their titles, that may be meant.
    """
    if not names or any(items.row(name) is not None for name in names):
        return
    meant = {name: _meant(name, items) for name in dict.fromkeys(names)}
    likely = "; ".join(f"{' or '.join(found)} for {name!r}" for name, found in meant.items() if found)
    hint = f"Did you mean {likely}?" if likely else f"The run has ids such as {items.ids[0]!r}."
    value = names[0] if len(names) == 1 else list(names)
    rule = "is no item of the run" if len(names) == 1 else "are no items of the run"
    raise DataError(
        "--basket",
        value,
        rule,
        f"{hint} Give ids between commas without blanks, or in quotes: --basket A,B or --basket 'A, B'.",
    )


def _meant(name: str, items: ItemCatalog) -> list[str]:
    """Ids spelt like a name, else items that have its words in their titles, as text."""
    ids = similar_ids(name, items.ids)
    return ids or [f"{items.ids[row]} ({items.titles[row]})" for row in items.search(name, 3)]


def tell_unknown(option: str, names: Sequence[str], items: ItemCatalog) -> None:
    """Say which items of a basket are left out, and which may be meant."""
    for name in dict.fromkeys(names):
        if items.row(name) is None:
            likely = _meant(name, items)
            hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
            typer.echo(f"{option}: {name!r} is no item of the run and is left out{hint}", err=True)


def as_table(answer: Answer) -> pd.DataFrame:
    """Columns rank, item, title, score of a list."""
    import pandas as pd

    rows = [(rank, found.item, found.title, found.score) for rank, found in enumerate(answer.items, 1)]
    return pd.DataFrame(rows, columns=["rank", "item", "title", "score"]).astype({"score": "float32"})


def show(table: pd.DataFrame, file_format: Format | None) -> None:
    """Print columns rank, item, title and score as a table for people, as CSV or as JSON lines."""
    table = table[["rank", "item", "title", "score"]]
    if file_format is Format.CSV:
        from cllm4rec_dist.serving.recommendations import FORMULA_START, PLAIN_START  # imports torch

        titles = table["title"].astype(str).str.replace(FORMULA_START, PLAIN_START, regex=True)
        typer.echo(table.assign(title=titles).to_csv(index=False), nl=False)
    elif file_format is Format.JSONL:
        typer.echo(table.to_json(orient="records", lines=True, force_ascii=False), nl=False)
    else:
        _show_table(table)


def _show_table(table: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "item", "title", "score"):
        right = name in ("rank", "score")
        shown.add_column(name, justify="right" if right else "left", overflow="ellipsis", no_wrap=name != "title")
    columns = (table[name].tolist() for name in ("rank", "item", "title", "score"))
    for rank, item, title, score in zip(*columns, strict=True):
        shown.add_row(str(rank), item, title, "" if math.isnan(score) else f"{score:.4f}")
    # Where the output is no terminal nothing is cut off.
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False, emoji=False).print(shown)
