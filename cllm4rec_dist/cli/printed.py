"""Print the list of one basket or user, or the neighbours of one item."""

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
    """Split `A,B` lists into ids; a text that is itself an id is not split."""
    ids = [part for text in texts for part in ([text] if items.row(text) is not None else text.split(","))]
    return tuple(name for part in ids if (name := part.strip()))


def require_known_basket(names: Sequence[str], items: ItemCatalog) -> None:
    """Refuse a basket without a known item: the list of popular items would look like an answer to it.

    Raises:
        DataError: with suggestions of similar ids, or of items by title.
    """
    if not names or any(items.row(name) is not None for name in names):
        return
    suggested = {name: _suggest(name, items) for name in dict.fromkeys(names)}
    likely = "; ".join(f"{' or '.join(texts)} for {name!r}" for name, texts in suggested.items() if texts)
    hint = f"Did you mean {likely}?" if likely else f"The run has ids such as {items.ids[0]!r}."
    value = names[0] if len(names) == 1 else list(names)
    rule = "is not an item of the run" if len(names) == 1 else "are not items of the run"
    raise DataError(
        "--basket",
        value,
        rule,
        f"{hint} Give ids between commas without blanks, or in quotes: --basket A,B or --basket 'A, B'.",
    )


def _suggest(name: str, items: ItemCatalog) -> list[str]:
    """Return ids spelt like a name, else items with its words in their titles."""
    ids = similar_ids(name, items.ids)
    return ids or [f"{items.ids[row]} ({items.titles[row]})" for row in items.search(name, 3)]


def warn_unknown(option: str, names: Sequence[str], items: ItemCatalog) -> None:
    """Print which items of a basket are unknown and left out, with suggestions."""
    for name in dict.fromkeys(names):
        if items.row(name) is None:
            likely = _suggest(name, items)
            hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
            typer.echo(f"{option}: {name!r} is not an item of the run and is left out{hint}", err=True)


def as_table(answer: Answer) -> pd.DataFrame:
    """Return a list as a table with columns rank, item, title and score."""
    import pandas as pd

    rows = [(rank, scored.item, scored.title, scored.score) for rank, scored in enumerate(answer.items, 1)]
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
    # Nothing is cut off if the output is not a terminal.
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False, emoji=False).print(shown)
