"""The folder that `recommend` writes: one file a rank, replaced as a whole.

    OUTPUT/recommendations-00001-of-00002.parquet      user, item (external ids), title if asked for, rank from 1, score

Files are Parquet, CSV with a header, or JSON lines. A list of an earlier run, of whatever format and number of ranks,
stays until every rank has written its part of the new one under a hidden name, and is gone before the first new file
appears. So a reader of the folder never sees two lists, and a run that fails leaves the earlier list as it was. Other
files of the folder are left alone.

A title in a CSV that a spreadsheet would take for a formula (`=1+1`) gets an apostrophe in front. Ids never change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter

from cllm4rec_dist.distributed.collectives import barrier
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError

FileFormat = Literal["parquet", "csv", "jsonl"]
FORMULA_START, PLAIN_START = r"^([=+\-@\t\r\n＝＋－＠])", r"'\1"
"""Beginning of a text that spreadsheets run as a formula, and its replacement that they show as text."""
_LISTS = re.compile(r"recommendations-\d+-of-\d+\.(parquet|csv|jsonl)")
_PARTS = re.compile(rf"\.{_LISTS.pattern}\.part")


def list_schema(*, titles: bool = False) -> pa.Schema:
    """Columns of a list; a score is null where it is one of popular items."""
    title = [("title", pa.string())] if titles else []
    return pa.schema(
        [("user", pa.string()), ("item", pa.string()), *title, ("rank", pa.int32()), ("score", pa.float32())]
    )


def make_folder(folder: Path) -> None:
    """Make the output folder.

    Raises:
        ConfigError: where it cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "output", str(folder), f"cannot be made a folder ({error.strerror})", "Choose another output."
        ) from error


def write_recommendations(
    tables: Iterable[pa.Table], folder: Path, world: World, file_format: FileFormat = "parquet", *, titles: bool = False
) -> None:
    """Write this rank's `tables` (of `list_schema`) and replace the list that the folder holds. Collective.

    Args:
        tables: exhausted on all ranks before anything of the folder changes; may be none.
        folder: exists; shared by all ranks, or one on each host.
        file_format: of the files.
        titles: the tables have titles.
    """
    path = folder / f"recommendations-{world.rank:05d}-of-{world.size:05d}.{file_format}"
    part = folder / f".{path.name}.part"
    try:
        with _writer(part, file_format, list_schema(titles=titles)) as write:
            for table in tables:
                write(table)
        barrier(world, "all recommendations to be written")
        _remove_earlier(folder, world.size, file_format)
        barrier(world, "earlier recommendations to be removed")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _writer(path: Path, file_format: FileFormat, schema: pa.Schema) -> Iterator[Callable[[pa.Table], object]]:
    """A function that appends tables to a new file."""
    if file_format == "jsonl":
        with path.open("wb") as file:
            yield lambda table: file.writelines(orjson.dumps(row) + b"\n" for row in table.to_pylist())
        return
    kind = pq.ParquetWriter if file_format == "parquet" else CSVWriter
    with kind(path, schema) as writer:
        yield writer.write_table if file_format == "parquet" else lambda table: writer.write_table(_as_text(table))


def _as_text(table: pa.Table) -> pa.Table:
    """The table with titles that no spreadsheet runs."""
    place = table.schema.get_field_index("title")
    if place < 0:
        return table
    titles = pc.replace_substring_regex(table["title"], FORMULA_START, PLAIN_START)
    return table.set_column(place, table.schema.field(place), titles)


def _remove_earlier(folder: Path, num_ranks: int, file_format: FileFormat) -> None:
    """Remove the list of an earlier run, and what one that died was writing. Every rank may do so at once."""
    names = [f"recommendations-{rank:05d}-of-{num_ranks:05d}.{file_format}" for rank in range(num_ranks)]
    current = {f".{name}.part" for name in names}
    for found in folder.iterdir():
        if _LISTS.fullmatch(found.name) or (_PARTS.fullmatch(found.name) and found.name not in current):
            found.unlink(missing_ok=True)
