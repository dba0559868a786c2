"""Cache of the spectral factors of a corpus' items, so that restarts and further runs read them.

    FOLDER/KEY/factors.json              range, size and sha256 of each file; the folder appears when it is complete
    FOLDER/KEY/START-STOP.safetensors    `factors`, fp32 [stop - start, k], rows START to STOP of the items

KEY is a digest of everything that the factors depend on. Files may have been written by another number of ranks. An
entry that is incomplete, damaged or differs between the ranks' file systems is not used, and the factors are computed
again. No error of a cache ends a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from cllm4rec_dist.corpus.manifest import INIT_CACHE
from cllm4rec_dist.distributed.collectives import barrier, broadcast_text, gather_integers
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.filesystems import is_url

logger = logging.getLogger(__name__)

_INDEX = "factors.json"
_VERSION = 1
"""Raise it when the same settings give other factors."""
_TENSOR = "factors"
_ENTRY_LENGTH = 10
"""Integers that describe a written file: 1, its size and the eight words of its sha256."""


class InitCache:
    """Entries below local folders, each in the first of them that can be written.

    Args:
        corpus: folder or URL of the corpus; its folder is the first choice.
        output: the run's folder, the second choice.
        world: the ranks, which all call every method together.
        shards: those among them that together hold the rows; all of them if None. Its first replica writes.
    """

    def __init__(self, corpus: str, output: str, world: World, shards: World | None = None) -> None:
        self._world, self._shards = world, world if shards is None else shards
        self._folders = [Path(path) / INIT_CACHE for path in (corpus, output) if not is_url(path)]

    def read(self, key: str, partition: RowPartition, num_factors: int) -> Tensor | None:
        """Return this rank's rows of an entry, [n, k] on the host; None if there is no valid one. Collective."""
        for folder in self._folders:
            index = b""
            rows = None
            try:
                index = (folder / key / _INDEX).read_bytes()
                rows = _read_rows(folder / key, json.loads(index), partition.range(self._shards.rank), num_factors)
            except FileNotFoundError:
                problem = "is incomplete" if index else ""
            except Exception as error:  # whatever is in these files, the factors can be computed again
                problem = f"is damaged ({error})"
            if rows is None and problem:
                logger.warning("the cache %s %s: not used", folder / key, problem)
            digest = int.from_bytes(hashlib.sha256(index).digest()[:7])
            found = gather_integers([rows is not None, digest], self._world, what="states of the cache")
            if all(entry == [1, digest] for entry in found):
                if self._world.is_main:
                    logger.info("read the spectral initialization from %s", folder / key)
                return rows
        return None

    def write(self, key: str, rows: Tensor, partition: RowPartition) -> None:
        """Write an entry, of which every rank writes its rows. Collective.

        Args:
            rows: this rank's rows, [n, k].
        """
        for folder in self._folders:
            name = broadcast_text(f"{key}.{secrets.token_hex(4)}.partial", self._world, "name of a cache entry")
            partial = folder / name
            start, stop = partition.range(self._shards.rank)
            entry = [0] * _ENTRY_LENGTH
            try:
                partial.mkdir(parents=True, exist_ok=True)
                content = save_bytes({_TENSOR: rows.cpu().contiguous()})
                if self._shards.replica == 0:
                    (partial / _file_name(start, stop)).write_bytes(content)
                digest = hashlib.sha256(content).digest()
                words = [int.from_bytes(digest[i : i + 4]) for i in range(0, 32, 4)]
                entry = [1, len(content), *words]
            except OSError as error:
                logger.info("the spectral initialization cannot be kept in %s (%s)", folder, error)
            entries = gather_integers(entry, self._world, what="digests of a cache entry")
            if all(written for written, *_ in entries):
                if self._world.is_main:
                    _commit(partial, folder / key, _index(entries[: self._shards.size], partition, rows.shape[1]))
                barrier(self._world, "a cache entry")
                return
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)


def cache_key(settings: Mapping[str, Any]) -> str:
    """Digest of the settings that factors depend on."""
    content = json.dumps({"version": _VERSION, **settings}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _file_name(start: int, stop: int) -> str:
    return f"{start:010d}-{stop:010d}.safetensors"


def _index(entries: Sequence[Sequence[int]], partition: RowPartition, num_factors: int) -> dict[str, Any]:
    files = []
    for rank, (_, num_bytes, *words) in enumerate(entries):
        start, stop = partition.range(rank)
        digest = b"".join(word.to_bytes(4) for word in words).hex()
        if stop > start:
            files.append({"start": start, "stop": stop, "num_bytes": num_bytes, "sha256": digest})
    return {"num_rows": partition.num_rows, "num_factors": num_factors, "files": files}


def _commit(partial: Path, final: Path, index: Mapping[str, Any]) -> None:
    """Make a complete entry visible, in place of an invalid one."""
    try:
        (partial / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if final.exists():
            os.replace(final, partial.with_suffix(".invalid"))
            shutil.rmtree(partial.with_suffix(".invalid"), ignore_errors=True)
        os.replace(partial, final)
    except OSError as error:  # another run has written the same entry at the same time, or the disk is full
        logger.info("the spectral initialization is not kept in %s (%s)", final, error)
        shutil.rmtree(partial, ignore_errors=True)


def _read_rows(folder: Path, index: Mapping[str, Any], rows_range: tuple[int, int], num_factors: int) -> Tensor:
    """Read rows [start, stop) from the files that have some of them, whose digests are verified.

    Raises:
        ValueError: if a file is not as the index says, or rows are missing.
    """
    start, stop = rows_range
    rows = torch.full((stop - start, num_factors), torch.nan)
    for file in index["files"]:
        first, end = int(file["start"]), int(file["stop"])
        low, high = max(first, start), min(end, stop)
        if low >= high:
            continue
        content = (folder / _file_name(first, end)).read_bytes()
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise ValueError(f"the sha256 of {_file_name(first, end)} is another")
        part = load_bytes(content)[_TENSOR]
        if part.shape != (end - first, num_factors) or part.dtype != torch.float32:
            raise ValueError(f"{_file_name(first, end)} holds {part.dtype} {list(part.shape)}")
        rows[low - start : high - start] = part[low - first : high - first]
    if not rows.isfinite().all():
        raise ValueError("rows are missing")
    return rows
