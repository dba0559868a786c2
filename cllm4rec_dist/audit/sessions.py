"""Sessions of a run, read from the audit logs of all ranks, and the session that counts for each step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cllm4rec_dist.audit.log import FILE_NAME, Header, StepLine
from cllm4rec_dist.config.loading import ModelT
from cllm4rec_dist.corpus.stream import steps_per_epoch
from cllm4rec_dist.errors import CLLM4RecError

_MIXED = "The folder has the logs of several runs, or a log was changed."


class AuditError(CLLM4RecError):
    """An audit log that is missing, or proves that an example was lost, repeated or not from the corpus."""


@dataclass(frozen=True)
class Part:
    """Examples that one rank read at a step."""

    epoch: int
    accepted: bool
    examples: dict[str, np.ndarray]
    """By stream, int64 [n, 3] pass, record and index; for a user record 0 and its row."""


@dataclass(frozen=True)
class Session:
    """What all ranks read in one start of the command."""

    header: Header
    steps: dict[int, dict[int, Part]] = field(default_factory=dict)
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
class Log:
    """All sessions of a run, in the order of their start, and the number of incomplete lines of crashed processes."""

    sessions: list[Session]
    torn_lines: int


def read_log(folder: Path) -> Log:
    """Read the files of all ranks in a folder.

    Raises:
        AuditError: if there is no session, or the files do not belong to one run.
    """
    headers: dict[int, Header] = {}
    steps: dict[int, dict[int, dict[int, Part]]] = {}
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
    sessions = [Session(headers[session], steps.get(session, {})) for session in sorted(headers)]
    for session in sessions:
        ignored = {"first_step": 0, "session": 0, "world_size": 1}
        header, first_header = (s.header.model_copy(update=ignored) for s in (session, sessions[0]))
        if header != first_header:
            raise AuditError(
                "session", session.header, f"has another corpus or batch than {sessions[0].header}", _MIXED
            )
    return Log(sessions, torn)


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


def _part(line: StepLine) -> Part:
    users = np.zeros((len(line.users), 3), np.int64)
    users[:, 0], users[:, 2] = line.epoch, line.users
    texts = np.array(line.texts, np.int64).reshape(-1, 3)
    return Part(line.epoch, line.accepted, {"user": users, "text": texts})


def counting_sessions(log: Log, saved_step: int) -> dict[int, Session]:
    """Return the session that counts for each step, in the order of the steps.

    Args:
        saved_step: completed steps of the newest checkpoint, all of which must be in the log.

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
    spans: list[tuple[int, int, Session]] = []
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


def _missing(sessions: Sequence[Session], step: int) -> tuple[str, str, str, str]:
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
