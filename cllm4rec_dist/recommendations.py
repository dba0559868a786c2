"""The folder that `recommend` writes: one Parquet file a rank, replaced as a whole.

    OUTPUT/recommendations-00001-of-00002.parquet      user, item (external ids), rank from 1, score

A list of an earlier run, of whatever number of ranks, stays until every rank has written its part of the new one under
a hidden name, and is gone before the first new file appears. So a reader of the folder never sees two lists, and a run
that fails leaves the earlier list as it was. Other files of the folder are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist.collectives import barrier
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.topology import World

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])
_LISTS = re.compile(r"recommendations-\d+-of-\d+\.parquet")
_PARTS = re.compile(r"\.recommendations-\d+-of-\d+\.parquet\.part")


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


def write_recommendations(tables: Iterable[pa.Table], folder: Path, world: World) -> None:
    """Write this rank's `tables` (of `SCHEMA`) and replace the list that the folder holds. Collective.

    Args:
        tables: exhausted on all ranks before anything of the folder changes; may be none.
        folder: exists; shared by all ranks, or one on each host.
    """
    path = folder / f"recommendations-{world.rank:05d}-of-{world.size:05d}.parquet"
    part = folder / f".{path.name}.part"
    try:
        with pq.ParquetWriter(part, SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
        barrier(world, "all recommendations to be written")
        _remove_earlier(folder, world.size)
        barrier(world, "earlier recommendations to be removed")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_earlier(folder: Path, num_ranks: int) -> None:
    """Remove the list of an earlier run, and what one that died was writing. Every rank may do so at once."""
    current = {f".recommendations-{rank:05d}-of-{num_ranks:05d}.parquet.part" for rank in range(num_ranks)}
    for found in folder.iterdir():
        if _LISTS.fullmatch(found.name) or (_PARTS.fullmatch(found.name) and found.name not in current):
            found.unlink(missing_ok=True)
