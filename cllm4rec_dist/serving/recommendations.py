"""The output folder of `recommend`: one file per rank, replaced as a whole.

    OUTPUT/recommendations-00001-of-00002.parquet      user, item (external ids), optional title, rank from 1, score

Files are Parquet, CSV with a header, or JSON lines. Every rank first writes its new file under a hidden name. Only then
are the files of earlier runs removed, whatever their format and number of ranks, and the new files renamed. A reader
never sees a mix of two runs, and a failed run leaves the earlier files unchanged. Other files of the folder are kept.

In CSV, a title that a spreadsheet would run as a formula (`=1+1`) is prefixed with an apostrophe. Ids never change.
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
"""Pattern for text that a spreadsheet runs as a formula, and the replacement that it shows as text."""
_LISTS = re.compile(r"recommendations-\d+-of-\d+\.(parquet|csv|jsonl)")
_PARTS = re.compile(rf"\.{_LISTS.pattern}\.part")


def list_schema(*, titles: bool = False) -> pa.Schema:
    """Return the schema of the files; the score of a popular item is null."""
    title = [("title", pa.string())] if titles else []
    return pa.schema(
        [("user", pa.string()), ("item", pa.string()), *title, ("rank", pa.int32()), ("score", pa.float32())]
    )


def make_folder(folder: Path) -> None:
    """Create the output folder.

    Raises:
        ConfigError: if it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "output", str(folder), f"cannot be created as a folder ({error.strerror})", "Choose another output."
        ) from error


def write_recommendations(
    tables: Iterable[pa.Table], folder: Path, world: World, file_format: FileFormat = "parquet", *, titles: bool = False
) -> None:
    """Write this rank's tables and replace the earlier files of the folder. Collective.

    Args:
        tables: tables with `list_schema`, possibly none; consumed on all ranks before the folder changes.
        folder: existing folder, shared by all ranks or local to each host.
        file_format: format of the files.
        titles: True if the tables have a title column.
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
    """Yield a function that appends tables to a new file."""
    if file_format == "jsonl":
        with path.open("wb") as file:
            yield lambda table: file.writelines(orjson.dumps(row) + b"\n" for row in table.to_pylist())
        return
    kind = pq.ParquetWriter if file_format == "parquet" else CSVWriter
    with kind(path, schema) as writer:
        yield writer.write_table if file_format == "parquet" else lambda table: writer.write_table(_as_text(table))


def _as_text(table: pa.Table) -> pa.Table:
    """Escape titles that a spreadsheet would run as formulas."""
    column = table.schema.get_field_index("title")
    if column < 0:
        return table
    titles = pc.replace_substring_regex(table["title"], FORMULA_START, PLAIN_START)
    return table.set_column(column, table.schema.field(column), titles)


def _remove_earlier(folder: Path, num_ranks: int, file_format: FileFormat) -> None:
    """Remove the files of earlier runs, including partial ones. Safe to call on all ranks at once."""
    names = [f"recommendations-{rank:05d}-of-{num_ranks:05d}.{file_format}" for rank in range(num_ranks)]
    current = {f".{name}.part" for name in names}
    for path in folder.iterdir():
        if _LISTS.fullmatch(path.name) or (_PARTS.fullmatch(path.name) and path.name not in current):
            path.unlink(missing_ok=True)
