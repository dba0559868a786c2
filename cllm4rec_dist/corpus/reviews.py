"""External sort of reviews on disk.

The reviews of a large shop do not fit into memory, and a corpus stores them by user. So they are written to a temporary
folder while the raw files are read, and later sorted by buckets: each bucket is a range of the new order that fits into
memory. The folder is in TMPDIR and is deleted with the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

_FLUSH_BYTES = 1 << 26
_BUCKET_BYTES = 1 << 28


class ReviewStore:
    """Reviews by position, written once.

    Attributes:
        num_positions: one more than the largest position of a text.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: list[Path] = []
        self._pending: list[pl.DataFrame] = []
        self._pending_bytes = self._num_bytes = 0
        self.num_positions = 0

    def append(self, positions: np.ndarray, texts: pl.Series) -> None:
        """Add texts; positions must ascend."""
        if not len(texts):
            return
        self.num_positions = int(positions[-1]) + 1
        self._pending.append(pl.DataFrame({"position": positions.astype(np.int64), "text": texts}))
        self._pending_bytes += int(texts.str.len_bytes().sum()) + 16 * len(texts)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._files.append(self._write(f"{len(self._files):06d}", pl.concat(self._pending)))
            self._num_bytes += self._pending_bytes
            self._pending, self._pending_bytes = [], 0

    def _write(self, name: str, table: pl.DataFrame) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cllm4rec-")
        path = Path(self._folder.name) / f"{name}.arrow"
        table.write_ipc(path, compression="lz4")
        return path

    def _tables(self) -> Iterator[pl.DataFrame]:
        for path in self._files:
            yield pl.read_ipc(path)
        yield from self._pending

    def __iter__(self) -> Iterator[str]:
        """Yield all texts in the order of their positions."""
        for table in self._tables():
            yield from table["text"]

    def sorted_by(self, ranks: np.ndarray) -> Iterator[pl.DataFrame]:
        """Yield the texts in the order of their ranks, in tables with columns rank int64 and text.

        Args:
            ranks: int64 [positions] rank of each position's text in the new order, from 0; -1 leaves it out.
        """
        num_bytes = self._num_bytes + self._pending_bytes
        num_buckets = max(1, -(-num_bytes // _BUCKET_BYTES))
        last = int(ranks.max(initial=-1))
        width = max(1, -(-(last + 1) // num_buckets))
        buckets: list[list[pl.DataFrame | Path]] = [[] for _ in range(num_buckets)]
        for table_index, table in enumerate(self._tables()):
            rank = ranks[table["position"].to_numpy()]
            ranked = table.select(pl.lit(pl.Series("rank", rank)), "text").filter(pl.Series(rank >= 0))
            if num_buckets == 1:
                buckets[0].append(ranked)
                continue
            for (index,), part in ranked.group_by(pl.col("rank") // width):
                buckets[int(str(index))].append(self._write(f"bucket-{index}-{table_index}", part))
        for parts in buckets:
            if parts:
                yield pl.concat([pl.read_ipc(part) if isinstance(part, Path) else part for part in parts]).sort("rank")
            for path in parts:
                if isinstance(path, Path):
                    path.unlink()
