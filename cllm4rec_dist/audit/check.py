"""Prove from the audit log that a run read every example exactly once.

Crashes and changes of the number of ranks are allowed. The check shares one rule with training: which positions of the
stream a step reads. It does not recompute which examples these are, but compares the recorded ones with each other and
with the number of all.

Legend: R records, N examples of a stream, n examples of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm4rec_dist.audit.log import FOLDER
from cllm4rec_dist.audit.sessions import AuditError, Session, counting_sessions, read_log
from cllm4rec_dist.corpus.stream import batch_range, steps_per_epoch


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
    log = read_log(run / FOLDER)
    chain = counting_sessions(log, saved_step)
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


def _check_stream(stream: _Stream, chain: Mapping[int, Session], per_epoch: int) -> int:
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
    chain: Mapping[int, Session],
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


def _compare(stream: _Stream, step: int, session: Session, counting: Session) -> None:
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
