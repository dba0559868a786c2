"""Lists that are printed: of one basket, one user, or the neighbours of one item."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from cllm4rec_dist.cli.formats import Format
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.id_list import similar_ids
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


def tell_unknown(option: str, names: Sequence[str], items: ItemCatalog) -> None:
    """Say which items of a basket are left out, and which may be meant."""
    for name in dict.fromkeys(names):
        if items.row(name) is None:
            likely = similar_ids(name, items.ids)
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
        from cllm4rec_dist.recommendations import FORMULA_START, PLAIN_START  # imports torch

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
