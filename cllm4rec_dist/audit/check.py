"""Prove from the audit log that a run read every example exactly once.

Crashes and changes of the number of ranks are allowed. The check shares one rule with training: which positions of the
stream a step reads. It does not recompute which examples these are, but compares the recorded ones with each other and
with the number of all.

Legend: R records, N examples of a stream, n examples of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cllm4rec_dist.audit.log import FILE_NAME, FOLDER, Header, StepLine
from cllm4rec_dist.config.loading import ModelT
from cllm4rec_dist.corpus.stream import batch_range, steps_per_epoch
from cllm4rec_dist.errors import CLLM4RecError


class AuditError(CLLM4RecError):
    """An audit log that is missing, or proves that an example was lost, repeated or not from the corpus."""


@dataclass(frozen=True)
class Audit:
    """The result of a successful check.

    Attributes:
        first_step: first step of the log; above 0 if the run resumed from another one.
        steps: completed steps, including those before `first_step`.
        steps_per_epoch: steps of an epoch of users.
        users, texts: examples read, without replays.
        num_users, num_texts: examples of the corpus.
        sessions: starts of the command.
        world_sizes: number of ranks of each session.
        replayed_steps: steps that more than one session read.
        left_out_steps: steps whose update was skipped.
        torn_lines: incomplete lines of crashed processes.
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
        """Format as text, with a line for each figure."""
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

    For each step one session counts: the one whose weights the run continued with, that is the last one that completed
    the step before its successor resumed. No step may be missing; the examples of all ranks must be as many as the
    global batch; each complete epoch must have every user once, and each complete pass over the texts every text once
    (an incomplete one: at most once). Other sessions must have read the same examples at the same steps. Takes 16 bytes
    of memory per example read.

    Args:
        saved_step: completed steps of the newest checkpoint, all of which must be in the log.

    Raises:
        AuditError: if the proof fails; names step, epoch and example.
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


_CURE = "The run did not read its corpus correctly: report this with the log, and do not trust the run's results."


@dataclass(frozen=True)
class _Part:
    """Examples that one rank read at a step."""

    epoch: int
    accepted: bool
    examples: dict[str, np.ndarray]
    """By stream, int64 [n, 3] pass, record and index; for a user record 0 and its row."""


@dataclass(frozen=True)
class _Session:
    header: Header
    steps: dict[int, dict[int, _Part]] = field(default_factory=dict)
    """Parts by step and rank."""

    def is_complete(self, step: int) -> bool:
        return len(self.steps.get(step, ())) == self.header.world_size

    @property
    def end(self) -> int:
        """Steps of the run that all ranks have completed. A rank records a step before it starts the next one, so lines
        of some ranks can be missing only for the last step."""
        if not self.steps:
            return self.header.first_step
        last = max(self.steps)
        return last + 1 if self.is_complete(last) else last

    def examples(self, step: int, stream: str) -> np.ndarray:
        """Return the examples that all ranks read, int64 [n, 3], in rank order."""
        parts = self.steps[step]
        return np.concatenate([parts[rank].examples[stream] for rank in sorted(parts)])


@dataclass(frozen=True)
class _Log:
    sessions: list[_Session]
    torn_lines: int


def _read(folder: Path) -> _Log:
    """Read the files of all ranks; sessions are in the order of their start."""
    headers: dict[int, Header] = {}
    steps: dict[int, dict[int, dict[int, _Part]]] = {}
    torn = 0
    for path in sorted(folder.glob("rank-*.jsonl")):
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        rank, size = map(int, match.groups())
        for line_number, tree in enumerate(_trees(path), start=1):
            where = f"{path} line {line_number}"
            if tree is None:
                torn += 1
            elif "world_size" in tree:
                header = _parse(Header, tree, where)
                first = headers.setdefault(header.session, header)
                if header != first or header.world_size != size:
                    raise AuditError(where, header, f"differs from other ranks' files, {first}", _MIXED)
            else:
                line = _parse(StepLine, tree, where)
                parts = steps.setdefault(line.session, {}).setdefault(line.step, {})
                if rank in parts:
                    raise AuditError(
                        where, f"step {line.step}, epoch {line.epoch}", "is recorded twice in one session", _MIXED
                    )
                parts[rank] = _part(line)
    if not headers:
        raise AuditError("audit log", str(folder), "does not exist or has no session", "Train with audit=true.")
    headless = sorted(steps.keys() - headers.keys())
    if headless:
        raise AuditError("session", headless[0], f"has no header in {folder}", _MIXED)
    sessions = [_Session(headers[session], steps.get(session, {})) for session in sorted(headers)]
    for session in sessions:
        ignored = {"first_step": 0, "session": 0, "world_size": 1}
        header, first_header = (s.header.model_copy(update=ignored) for s in (session, sessions[0]))
        if header != first_header:
            raise AuditError(
                "session", session.header, f"has another corpus or batch than {sessions[0].header}", _MIXED
            )
    return _Log(sessions, torn)


_MIXED = "The folder has the logs of several runs, or a log was changed."


def _trees(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Parse each line as a JSON object; None for an incomplete line of a crashed process."""
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
    """Return the session that counts for each step, in the order of the steps.

    Raises:
        AuditError: if no session completed a step.
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
    """Return the arguments of an AuditError for a step that none of `sessions` completed."""
    header = sessions[-1].header
    epoch = step // steps_per_epoch(header.num_users, header.batch_users)
    ranks = {rank for session in sessions for rank in session.steps.get(step, {})}
    absent = sorted(set(range(header.world_size)) - ranks)
    return (
        f"step {step}, epoch {epoch}",
        f"no line of ranks {absent}" if ranks else "no line",
        "although the run continued after it",
        "A rank's file or part of it is lost, or a session ran without audit.",
    )


@dataclass(frozen=True)
class _Stream:
    """The stream of users or texts.

    Args:
        record_sizes: int64 [R] examples of each record.
        batch: examples of a step.
        whole_epochs: True if a batch ends at the end of its pass (users); else it may continue into the next (texts).
    """

    name: str
    record_sizes: np.ndarray
    batch: int
    whole_epochs: bool

    @property
    def num_examples(self) -> int:
        return int(self.record_sizes.sum())

    def positions(self, step: int) -> tuple[int, int]:
        """Return the positions [start, stop) of a step's global batch, numbered through all passes."""
        if self.whole_epochs:
            return batch_range(step, self.num_examples, self.batch)
        return step * self.batch, (step + 1) * self.batch

    def bounds(self, pass_index: int) -> tuple[int, int]:
        """Return the positions [start, stop) of a pass."""
        return pass_index * self.num_examples, (pass_index + 1) * self.num_examples

    def flat_index(self, examples: np.ndarray) -> np.ndarray:
        """Convert int64 [n, 3] examples to int64 [n] indexes from 0 to N - 1."""
        return (np.cumsum(self.record_sizes) - self.record_sizes)[examples[:, 1]] + examples[:, 2]

    def invalid(self, examples: np.ndarray) -> np.ndarray:
        """Return the examples that are not in the corpus."""
        valid = (examples >= 0).all(1) & (examples[:, 1] < len(self.record_sizes))
        valid[valid] &= examples[valid, 2] < self.record_sizes[examples[valid, 1]]
        return examples[~valid]

    def describe_flat(self, flat_index: int) -> str:
        """Describe an example for an error, by its flat index."""
        record = int(np.searchsorted(np.cumsum(self.record_sizes), flat_index, side="right"))
        return self.describe(record, flat_index - int(self.record_sizes[:record].sum()))

    def describe(self, record: int, index: int) -> str:
        """Describe an example for an error."""
        return f"user {index}" if self.name == "user" else f"text {(int(record), int(index))}"


def _check_stream(stream: _Stream, chain: Mapping[int, _Session], per_epoch: int) -> int:
    """Check one stream and return the number of its examples."""
    passes: dict[int, list[tuple[int, np.ndarray]]] = {}
    wrong_sizes = []
    total = 0
    for step, session in chain.items():
        examples = session.examples(step, stream.name)
        invalid = stream.invalid(examples)
        if len(invalid):
            raise AuditError(_at(step, per_epoch), stream.describe(*invalid[0, 1:]), "is not in the corpus", _CURE)
        start, stop = stream.positions(step)
        total += len(examples)
        expected_passes = range(start // stream.num_examples, -(-stop // stream.num_examples))
        for pass_index in sorted({*expected_passes, *examples[:, 0].tolist()}):
            piece = stream.flat_index(examples[examples[:, 0] == pass_index])
            expected = _overlap((start, stop), stream.bounds(pass_index))
            if len(piece) != expected:
                wrong_sizes.append((step, pass_index, len(piece), expected))
            passes.setdefault(pass_index, []).append((step, piece))
    for pass_index, pieces in passes.items():
        _check_pass(stream, pass_index, pieces, chain, per_epoch)
    for step, pass_index, size, expected in wrong_sizes:
        constraint = f"were read of pass {pass_index} instead of {expected}"
        raise AuditError(_at(step, per_epoch), f"{size} {stream.name}s", constraint, _CURE)
    return total


def _check_pass(
    stream: _Stream,
    pass_index: int,
    pieces: Sequence[tuple[int, np.ndarray]],
    chain: Mapping[int, _Session],
    per_epoch: int,
) -> None:
    """Require every example of a pass exactly once; at most once if the log has only a part of the pass."""
    counts = np.bincount(np.concatenate([piece for _, piece in pieces]), minlength=stream.num_examples)
    repeated = np.flatnonzero(counts > 1)
    if len(repeated):
        steps = [step for step, piece in pieces for index in piece.tolist() if index == repeated[0]]
        raise AuditError(
            _at(steps[-1], per_epoch),
            stream.describe_flat(repeated[0]),
            f"was read more than once: at steps {steps}",
            _CURE,
        )
    begin, end = stream.bounds(pass_index)
    is_complete = stream.positions(min(chain))[0] <= begin and stream.positions(max(chain))[1] >= end
    unread = np.flatnonzero(counts == 0)
    if is_complete and len(unread):
        short = [step for step, piece in pieces if len(piece) < _overlap(stream.positions(step), (begin, end))]
        raise AuditError(
            _at(short[0] if short else pieces[-1][0], per_epoch),
            stream.describe_flat(unread[0]),
            f"was not read in pass {pass_index} over the {stream.name}s",
            _CURE,
        )


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _at(step: int, per_epoch: int) -> str:
    return f"step {step}, epoch {step // per_epoch}"


def _compare(stream: _Stream, step: int, session: _Session, counting: _Session) -> None:
    """Compare the examples of a session with those of the session that counts; a crashed one may have fewer."""
    read, expected = ({*map(tuple, s.examples(step, stream.name).tolist())} for s in (session, counting))
    different = read - expected or (expected - read if session.is_complete(step) else set())
    if different:
        per_epoch = steps_per_epoch(session.header.num_users, session.header.batch_users)
        raise AuditError(
            _at(step, per_epoch),
            stream.describe(*min(different)[1:]),
            f"was read by only one of the sessions {session.header.session} and {counting.header.session}",
            _CURE,
        )
