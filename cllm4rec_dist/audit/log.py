"""The audit log: the examples that each rank read at each step.

    OUTPUT/audit/rank-00001-of-00002.jsonl     examples that this rank read: for each session (start of the command) a
                                               header line, then a line for each completed step

The lines record the examples in the actual batches, and the headers the number of all examples, so `check.py` needs
only the log.
"""

from __future__ import annotations

import os
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from cllm4rec_dist.config import RunConfig, StrictModel
from cllm4rec_dist.corpus.loader import BatchLoader, StepBatch
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import World

FOLDER = "audit"
FILE_NAME = re.compile(r"rank-(\d{5})-of-(\d{5})\.jsonl")


class Header(StrictModel):
    """First line of a session in each rank's file: sizes of corpus and batch, and the first step."""

    session: int
    """Start time of rank 0 in Unix nanoseconds; equal on all ranks."""
    world_size: int = Field(ge=1)
    first_step: int = Field(ge=0)
    num_users: int = Field(ge=1)
    batch_users: int = Field(ge=1)
    text_record_sizes: tuple[tuple[int, int], ...]
    """Texts of each record, run-length encoded: (texts, consecutive records of this size)."""
    batch_texts: int = Field(ge=0)


class StepLine(StrictModel):
    """Examples that a rank read at a completed step."""

    session: int
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    accepted: bool
    """False if the update was skipped because of a bad loss or gradient."""
    users: tuple[int, ...]
    texts: tuple[tuple[int, int, int], ...]
    """Pass (epoch of the texts), record and index of each text."""


class AuditLog:
    """This rank's part of the log; does nothing without `audit=true`.

    Lines are flushed to the operating system before the next step starts, so they survive a crash of the process; after
    `sync` they also survive a loss of power.

    Args:
        run: folder of the run, shared by all ranks.
        source: loader of the batches.
        first_step: first step of this session.

    Collective with `audit=true`: one all-gather shares rank 0's time.
    """

    def __init__(self, run: Path, world: World, config: RunConfig, source: BatchLoader, first_step: int) -> None:
        self._file = None
        if not config.audit:
            return
        self._session = gather_integers([time.time_ns()], world)[0][0]
        path = run / FOLDER / f"rank-{world.rank:05d}-of-{world.size:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = _is_torn(path)
        self._file = path.open("a", encoding="utf-8")
        header = Header(
            session=self._session,
            world_size=world.size,
            first_step=first_step,
            num_users=source.num_users,
            batch_users=config.batch.users,
            text_record_sizes=_run_lengths(source.text_record_sizes),
            batch_texts=config.batch.texts if source.has_texts else 0,
        )
        self._write(header, before="\n" if is_torn else "")

    def record(self, step: int, batch: StepBatch, *, accepted: bool) -> None:
        """Write that step `step` is complete and read `batch`."""
        if self._file is not None:
            self._write(
                StepLine(
                    session=self._session,
                    step=step,
                    epoch=batch.epoch,
                    accepted=accepted,
                    users=tuple(batch.users),
                    texts=tuple(batch.texts),
                )
            )

    def sync(self) -> None:
        """Flush to disk (fsync). Call it before saving a checkpoint, so that every saved step is in the log."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write(self, line: StrictModel, before: str = "") -> None:
        assert self._file is not None
        self._file.write(before + line.model_dump_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _is_torn(path: Path) -> bool:
    """True if the last line is incomplete."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _run_lengths(sizes: np.ndarray) -> tuple[tuple[int, int], ...]:
    ends = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    return tuple((int(sizes[start]), stop - start) for start, stop in pairwise(ends) if start < stop)
