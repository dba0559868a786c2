"""Proof that a run read every example exactly once, through deaths and changes of the number of ranks.

    OUTPUT/audit/rank-00001-of-00002.jsonl     what this rank read: a header line for each session (a start of the
                                               command) and then a line for each completed step

`AuditLog` writes it and `check` reads it. The lines tell what the batches were made of, not what they should have been
made of, and the headers tell how many there are of everything, so that the check needs nothing but the log. It shares
one rule with training, which positions of the stream a step reads; which examples those are it only compares: with
each other, and with the number there is.

Legend: R records, N examples of a stream, n examples of a step, W ranks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError

from cllm4rec_dist.config import RunConfig, StrictModel
from cllm4rec_dist.config.loading import ModelT
from cllm4rec_dist.corpus.loader import BatchLoader, StepBatch
from cllm4rec_dist.corpus.stream import batch_range, steps_per_epoch
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError

FOLDER = "audit"
_FILE = re.compile(r"rank-(\d{5})-of-(\d{5})\.jsonl")


class AuditError(CLLM4RecError):
    """An audit log that is missing, or that shows an example lost, repeated or foreign."""


class Header(StrictModel):
    """First line of a session in each rank's file: what there is to read, and from which step on."""

    session: int
    """Start of rank 0, in nanoseconds of Unix time; the same on all ranks."""
    world_size: int = Field(ge=1)
    first_step: int = Field(ge=0)
    num_users: int = Field(ge=1)
    batch_users: int = Field(ge=1)
    text_record_sizes: tuple[tuple[int, int], ...]
    """Texts of each record, run-length encoded: (texts, records of that size in a row)."""
    batch_texts: int = Field(ge=0)


class StepLine(StrictModel):
    """What a rank read at one completed step."""

    session: int
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    accepted: bool
    """False where the step was left out, because its loss was bad: read, but not learned from."""
    users: tuple[int, ...]
    texts: tuple[tuple[int, int, int], ...]
    """Pass over the texts, record and index of each."""


class AuditLog:
    """This rank's part of the log; writes nothing where the configuration asks for none.

    A line is with the operating system before the next step starts, so it survives the death of the process; `sync`
    has it survive the loss of power too.

    Args:
        run: folder of the run, one for all ranks.
        source: what will be read.
        first_step: where this session starts.

    Making one is collective where the configuration asks for a log: one all-gather tells rank 0's time.
    """

    def __init__(self, run: Path, world: World, config: RunConfig, source: BatchLoader, first_step: int) -> None:
        self._file = None
        if not config.audit:
            return
        self._session = gather_integers([time.time_ns()], world)[0][0]
        path = run / FOLDER / f"rank-{world.rank:05d}-of-{world.size:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _is_torn(path)
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
        self._write(header, before="\n" if torn else "")

    def record(self, step: int, batch: StepBatch, *, accepted: bool) -> None:
        """Write down that step `step` is completed and read `batch`."""
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
        """Have the file system keep what was written. Called before a checkpoint, which must not outlive its proof."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write(self, line: StrictModel, before: str = "") -> None:
        assert self._file is not None
        self._file.write(before + line.model_dump_json() + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether the last line was left unfinished."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _run_lengths(sizes: np.ndarray) -> tuple[tuple[int, int], ...]:
    ends = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    return tuple((int(sizes[start]), stop - start) for start, stop in pairwise(ends) if start < stop)


@dataclass(frozen=True)
class Audit:
    """What a log proves.

    Attributes:
        first_step: where the log starts; above 0 if the run went on from another one.
        steps: completed steps, those before `first_step` included.
        steps_per_epoch: steps in which every user comes once.
        users, texts: examples read, without replays.
        num_users, num_texts: examples there are.
        sessions: starts of the command.
        world_sizes: number of ranks of each session.
        replayed_steps: steps that more than one session read.
        left_out_steps: steps that were read but not learned from.
        torn_lines: lines that a dying process left unfinished.
    """

    first_step: int
    steps: int
    steps_per_epoch: int
    users: int
    texts: int
    num_users: int
    num_texts: int
    sessions: int
    world_sizes: tuple[int, ...]
    replayed_steps: int
    left_out_steps: int
    torn_lines: int

    def table(self) -> str:
        """For people, a line for each."""
        epochs, more = divmod(self.steps, self.steps_per_epoch)
        worlds = [
            size for size, before in zip(self.world_sizes, (None, *self.world_sizes), strict=False) if size != before
        ]
        rows = {
            "epochs": f"{epochs:,}" + (f" and {more:,} of {self.steps_per_epoch:,} steps" if more else ""),
            "steps": f"{self.steps - self.first_step:,}" + (f" from {self.first_step:,}" if self.first_step else ""),
            "users read": f"{self.users:,} ({self.num_users:,} an epoch)",
            "texts read": f"{self.texts:,} ({self.num_texts:,} a pass)",
            "sessions": f"{self.sessions:,}",
            "ranks": ", ".join(map(str, worlds)),
            "replayed steps": f"{self.replayed_steps:,}",
            "left-out steps": f"{self.left_out_steps:,}",
            "torn lines": f"{self.torn_lines:,}",
        }
        return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def check(run: Path, saved_step: int = 0) -> Audit:
    """Prove from its log that a run read every example exactly once.

    What counts for a step is the session whose weights the run goes on with: the last one that completed it before
    the place where its successor resumed. For those, no step may be missing; the ranks' examples must together be as
    many as the global batch; each epoch has every user once and each pass over the texts every text once (a partial
    one: at most once). What other sessions read at the same steps must be the same examples. Memory: 16 bytes an
    example read.

    Args:
        saved_step: completed steps of the newest checkpoint, which the log must reach.

    Raises:
        AuditError: names step, epoch and example of what is wrong.
    """
    log = _read(run / FOLDER)
    chain = _chain(log, saved_step)
    header = log.sessions[0].header
    users = _Stream("user", np.array([header.num_users]), header.batch_users, whole_epochs=True)
    sizes = np.repeat(*np.array(header.text_record_sizes, np.int64).reshape(-1, 2).T)
    texts = _Stream("text", sizes, header.batch_texts, whole_epochs=False)
    per_epoch = steps_per_epoch(header.num_users, header.batch_users)
    for step, session in chain.items():
        for rank, part in session.steps[step].items():
            if part.epoch != step // per_epoch:
                raise AuditError(
                    f"step {step}, epoch {step // per_epoch}",
                    part.epoch,
                    f"is the epoch that rank {rank} recorded",
                    _CURE,
                )
    num_users, num_texts = (_check_stream(stream, chain, per_epoch) for stream in (users, texts))
    replayed = set()
    for session in log.sessions:
        for step in session.steps:
            if step in chain and chain[step] is not session:
                replayed.add(step)
                for stream in (users, texts):
                    _compare(stream, step, session, chain[step])
    left_out = sum(not next(iter(session.steps[step].values())).accepted for step, session in chain.items())
    return Audit(
        first_step=min(chain, default=log.sessions[0].header.first_step),
        steps=max(chain, default=log.sessions[0].header.first_step - 1) + 1,
        steps_per_epoch=per_epoch,
        users=num_users,
        texts=num_texts,
        num_users=users.num_examples,
        num_texts=texts.num_examples,
        sessions=len(log.sessions),
        world_sizes=tuple(session.header.world_size for session in log.sessions),
        replayed_steps=len(replayed),
        left_out_steps=left_out,
        torn_lines=log.torn_lines,
    )


_CURE = "The run did not read its corpus as it should: report it with the log, and do not trust the run's results."


@dataclass(frozen=True)
class _Part:
    """What one rank read at a step: pass, record and index [n, 3] of its users (record 0, index the row) and texts."""

    epoch: int
    accepted: bool
    places: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Session:
    header: Header
    steps: dict[int, dict[int, _Part]] = field(default_factory=dict)
    """By step and rank."""

    def is_complete(self, step: int) -> bool:
        return len(self.steps.get(step, ())) == self.header.world_size

    @property
    def end(self) -> int:
        """Where it stopped: all ranks have completed the steps before. A rank records a step before it takes part in
        the next one, so only of the last step may some ranks' lines be missing."""
        if not self.steps:
            return self.header.first_step
        last = max(self.steps)
        return last + 1 if self.is_complete(last) else last

    def places(self, step: int, stream: str) -> np.ndarray:
        """[n, 3] what all ranks read, in rank order."""
        parts = self.steps[step]
        return np.concatenate([parts[rank].places[stream] for rank in sorted(parts)])


@dataclass(frozen=True)
class _Log:
    sessions: list[_Session]
    torn_lines: int


def _read(folder: Path) -> _Log:
    """All ranks' files; sessions in the order of their start."""
    headers: dict[int, Header] = {}
    steps: dict[int, dict[int, dict[int, _Part]]] = {}
    torn = 0
    for path in sorted(folder.glob("rank-*.jsonl")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            continue
        rank, size = map(int, match.groups())
        for number, tree in enumerate(_trees(path), start=1):
            where = f"{path} line {number}"
            if tree is None:
                torn += 1
            elif "world_size" in tree:
                header = _parse(Header, tree, where)
                known = headers.setdefault(header.session, header)
                if header != known or header.world_size != size:
                    raise AuditError(where, header, f"is not what other ranks' files say, {known}", _MIXED)
            else:
                line = _parse(StepLine, tree, where)
                parts = steps.setdefault(line.session, {}).setdefault(line.step, {})
                if rank in parts:
                    raise AuditError(
                        where, f"step {line.step}, epoch {line.epoch}", "stands twice in one session", _MIXED
                    )
                parts[rank] = _part(line)
    if not headers:
        raise AuditError("audit log", str(folder), "is not there or has no session", "Train with audit=true.")
    unknown = sorted(steps.keys() - headers.keys())
    if unknown:
        raise AuditError("session", unknown[0], f"has no header in {folder}", _MIXED)
    sessions = [_Session(headers[session], steps.get(session, {})) for session in sorted(headers)]
    for session in sessions:
        same = {"first_step": 0, "session": 0, "world_size": 1}
        one, other = (s.header.model_copy(update=same) for s in (session, sessions[0]))
        if one != other:
            raise AuditError(
                "session", session.header, f"has another corpus or batch than {sessions[0].header}", _MIXED
            )
    return _Log(sessions, torn)


_MIXED = "The folder holds the logs of several runs, or somebody wrote to them."


def _trees(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Each line as JSON; None for one that a dying process left unfinished."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                tree = json.loads(line)
            except ValueError:
                tree = None
            yield tree if isinstance(tree, dict) else None


def _parse(model: type[ModelT], tree: Mapping[str, Any], where: str) -> ModelT:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise AuditError(where, dict(tree), f"is no {model.__name__} ({error.errors()[0]['msg']})", _MIXED) from None


def _part(line: StepLine) -> _Part:
    users = np.zeros((len(line.users), 3), np.int64)
    users[:, 0], users[:, 2] = line.epoch, line.users
    texts = np.array(line.texts, np.int64).reshape(-1, 3)
    return _Part(line.epoch, line.accepted, {"user": users, "text": texts})


def _chain(log: _Log, saved_step: int) -> dict[int, _Session]:
    """Which session counts for each step, in the order of the steps.

    Raises:
        AuditError: for a step that no session completed.
    """
    last, first = log.sessions[-1], min(session.header.first_step for session in log.sessions)
    stop = last.end
    if stop < saved_step:
        raise AuditError(
            f"steps {stop} to {saved_step - 1}",
            "missing",
            "are in a checkpoint of the run but not in its log",
            "Train with audit=true from the start, in an output that all ranks write to.",
        )
    spans: list[tuple[int, int, _Session]] = []
    for session in reversed(log.sessions):
        if session.header.first_step < stop <= session.end:
            spans.append((session.header.first_step, stop, session))
            stop = session.header.first_step
    chain = {step: session for start, end, session in reversed(spans) for step in range(start, end)}
    if stop > first:
        raise AuditError(*_missing(log.sessions, stop - 1))
    for step, session in chain.items():
        if not session.is_complete(step):
            raise AuditError(*_missing([session], step))
    return chain


def _missing(sessions: Sequence[_Session], step: int) -> tuple[str, str, str, str]:
    """What to say of a step that none of `sessions` completed."""
    header = sessions[-1].header
    epoch = step // steps_per_epoch(header.num_users, header.batch_users)
    ranks = {rank for session in sessions for rank in session.steps.get(step, {})}
    absent = sorted(set(range(header.world_size)) - ranks)
    return (
        f"step {step}, epoch {epoch}",
        f"no line of ranks {absent}" if ranks else "no line",
        "although the run went on after it",
        "A rank's file or a part of it is lost, or a session ran without audit.",
    )


@dataclass(frozen=True)
class _Stream:
    """Users or texts.

    Args:
        record_sizes: int64 [R].
        batch: examples of a step.
        whole_epochs: whether a batch ends where its pass ends (users), or goes on into the next one (texts).
    """

    name: str
    record_sizes: np.ndarray
    batch: int
    whole_epochs: bool

    @property
    def num_examples(self) -> int:
        return int(self.record_sizes.sum())

    def positions(self, step: int) -> tuple[int, int]:
        """What the global batch of a step covers; positions go on through the passes."""
        if self.whole_epochs:
            return batch_range(step, self.num_examples, self.batch)
        return step * self.batch, (step + 1) * self.batch

    def bounds(self, visit: int) -> tuple[int, int]:
        """Positions of a pass."""
        return visit * self.num_examples, (visit + 1) * self.num_examples

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """[n, 3] pass, record and index -> [n] number of the example, 0 to N - 1."""
        return (np.cumsum(self.record_sizes) - self.record_sizes)[places[:, 1]] + places[:, 2]

    def foreign(self, places: np.ndarray) -> np.ndarray:
        """The places that are not in the corpus."""
        known = (places >= 0).all(1) & (places[:, 1] < len(self.record_sizes))
        known[known] &= places[known, 2] < self.record_sizes[places[known, 1]]
        return places[~known]

    def called(self, number: int) -> str:
        """An example for people."""
        record = int(np.searchsorted(np.cumsum(self.record_sizes), number, side="right"))
        return self.called_at(record, number - int(self.record_sizes[:record].sum()))

    def called_at(self, record: int, index: int) -> str:
        return f"user {index}" if self.name == "user" else f"text {(int(record), int(index))}"


def _check_stream(stream: _Stream, chain: Mapping[int, _Session], per_epoch: int) -> int:
    """Check one stream and count its examples."""
    passes: dict[int, list[tuple[int, np.ndarray]]] = {}
    wrong_sizes = []
    total = 0
    for step, session in chain.items():
        places = session.places(step, stream.name)
        foreign = stream.foreign(places)
        if len(foreign):
            raise AuditError(_at(step, per_epoch), stream.called_at(*foreign[0, 1:]), "is not in the corpus", _CURE)
        start, stop = stream.positions(step)
        total += len(places)
        visits = range(start // stream.num_examples, -(-stop // stream.num_examples))
        for visit in sorted({*visits, *places[:, 0].tolist()}):
            piece = stream.numbers(places[places[:, 0] == visit])
            wanted = _overlap((start, stop), stream.bounds(visit))
            if len(piece) != wanted:
                wrong_sizes.append((step, visit, len(piece), wanted))
            passes.setdefault(visit, []).append((step, piece))
    for visit, pieces in passes.items():
        _check_pass(stream, visit, pieces, chain, per_epoch)
    for step, visit, found, wanted in wrong_sizes:
        told = f"were read of pass {visit} instead of {wanted}"
        raise AuditError(_at(step, per_epoch), f"{found} {stream.name}s", told, _CURE)
    return total


def _check_pass(
    stream: _Stream, visit: int, pieces: Sequence[tuple[int, np.ndarray]], chain: Mapping[int, _Session], per_epoch: int
) -> None:
    """Every example of a pass exactly once; at most once where the log has only a part of the pass."""
    counts = np.bincount(np.concatenate([piece for _, piece in pieces]), minlength=stream.num_examples)
    repeated = np.flatnonzero(counts > 1)
    if len(repeated):
        steps = [step for step, piece in pieces for found in piece.tolist() if found == repeated[0]]
        raise AuditError(
            _at(steps[-1], per_epoch), stream.called(repeated[0]), f"was read more than once: at steps {steps}", _CURE
        )
    begin, end = stream.bounds(visit)
    is_whole = stream.positions(min(chain))[0] <= begin and stream.positions(max(chain))[1] >= end
    unread = np.flatnonzero(counts == 0)
    if is_whole and len(unread):
        short = [step for step, piece in pieces if len(piece) < _overlap(stream.positions(step), (begin, end))]
        raise AuditError(
            _at(short[0] if short else pieces[-1][0], per_epoch),
            stream.called(unread[0]),
            f"was not read in pass {visit} over the {stream.name}s",
            _CURE,
        )


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _at(step: int, per_epoch: int) -> str:
    return f"step {step}, epoch {step // per_epoch}"


def _compare(stream: _Stream, step: int, session: _Session, counting: _Session) -> None:
    """Hold what `session` read at `step` against the session that counts; one that died may have read less."""
    found, wanted = ({*map(tuple, s.places(step, stream.name).tolist())} for s in (session, counting))
    other = found - wanted or (wanted - found if session.is_complete(step) else set())
    if other:
        per_epoch = steps_per_epoch(session.header.num_users, session.header.batch_users)
        raise AuditError(
            _at(step, per_epoch),
            stream.called_at(*min(other)[1:]),
            f"was read by only one of the sessions {session.header.session} and {counting.header.session}",
            _CURE,
        )
