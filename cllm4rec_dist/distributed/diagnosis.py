"""Diagnose why a run cannot continue, from the status of its ranks. `watchdog.py` collects the status and acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

HANG_SECONDS = 600.0
"""Default of the longest time that a collective may take."""

RUNS, BROKEN, FAILED, DONE, LOST = "runs", "broken", "failed", "done", "lost"
"""States of a rank. BROKEN raised an error that another rank may have caused (a closed connection), FAILED any other
error; DONE left in order; LOST ended without notice."""


class Position(NamedTuple):
    """Position of a rank's main thread.

    Attributes:
        moves: collectives entered plus collectives left. At equal `moves`, all ranks should be in the same operation.
        entered: collectives entered.
        name: name of the current or last operation.
        inside: True while the operation runs.
        collective: True if the operation is a collective, in which the rank may wait for others.
    """

    moves: int = 0
    entered: int = 0
    name: str = "the start"
    inside: bool = False
    collective: bool = False

    @property
    def waits(self) -> bool:
        return self.inside and self.collective

    def __str__(self) -> str:
        count = f" (collective {self.entered})" if self.collective else ""
        return f"{'in' if self.inside else 'after'} {self.name}{count}"


@dataclass(frozen=True)
class RankStatus:
    """Last reported status of a rank.

    Attributes:
        position: last reported position.
        state: one of the five states.
        message: error message, if it has an error.
        still: seconds since position or state last changed.
        silent: seconds since the last report.
    """

    position: Position
    state: str = RUNS
    message: str = ""
    still: float = 0.0
    silent: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """Reason why a run cannot continue.

    Attributes:
        message: names ranks and operations.
        cure: what to do.
        stacks: ranks that should print their Python stacks.
        raised: ranks whose error is the cause; they raise that error instead of this diagnosis.
    """

    message: str
    cure: str
    stacks: list[int] = field(default_factory=list)
    raised: list[int] = field(default_factory=list)


_RESUME = "The same command resumes from the newest checkpoint."


def diagnose(ranks: Mapping[int, RankStatus], collective_timeout_seconds: float, patience: float) -> Diagnosis | None:
    """Return why these ranks cannot continue, or None if they can.

    Args:
        ranks: status by rank.
        collective_timeout_seconds: the longest time that a collective may take, and that a rank may be silent.
        patience: seconds to wait for the report of a cause after that of its effect.
    """
    lost = _having(ranks, LOST)
    if lost:
        return Diagnosis(
            f"{_names(lost)} {_verb(lost, 'is', 'are')} lost: the process ended without an error (killed, out of "
            f"memory?), last seen {_at(ranks, lost)}{_stopping(ranks, lost)}",
            f"Look at the host of {_names(lost)} and its memory. {_RESUME}",
        )
    failed = _having(ranks, FAILED)
    if failed:
        return Diagnosis(_failure(ranks, failed), f"Fix the error of {_names(failed)}. {_RESUME}", raised=failed)
    waiting = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].position.waits]
    patient = [rank for rank in waiting if ranks[rank].still > patience]
    farthest = max((ranks[rank].position.moves for rank in patient), default=0)
    early = [rank for rank in _having(ranks, DONE) if ranks[rank].position.moves < farthest]
    if early:
        return Diagnosis(
            f"{_names(early)} {_verb(early, 'has', 'have')} ended in order, {_at(ranks, early)}, but "
            f"{_doing(ranks, patient, 'is', 'are')}: the ranks took different numbers of steps",
            "Every rank must see the same configuration and the same corpus.",
        )
    broken = [rank for rank in _having(ranks, BROKEN) if ranks[rank].still > patience]
    if broken:
        return _divergence(ranks, waiting) or Diagnosis(
            _failure(ranks, broken), f"Fix the error of {_names(broken)}. {_RESUME}", raised=broken
        )
    unheard = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].silent > collective_timeout_seconds]
    if unheard or any(ranks[rank].still > collective_timeout_seconds for rank in waiting):
        return _stall(ranks, waiting, unheard, patience)
    return None


def _stall(ranks: Mapping[int, RankStatus], waiting: list[int], unheard: list[int], patience: float) -> Diagnosis:
    """Diagnose a hang: the ranks that are silent or behind the others; else diverged ranks, or the operation itself."""
    silent = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].silent > patience]
    answering = [rank for rank in waiting if rank not in silent]
    farthest = max((ranks[rank].position.moves for rank in answering), default=0)
    foremost = [rank for rank in answering if ranks[rank].position.moves == farthest]
    since = max((ranks[rank].still for rank in foremost), default=0.0)
    behind = [rank for rank in _having(ranks, RUNS) if ranks[rank].position.moves < farthest]
    guilty = sorted({*behind, *unheard}) or silent
    if guilty:
        it = _verb(guilty, "it", "them")
        duration = f"waited for {it} for {since:.0f} s"
        waits = f"{_doing(ranks, foremost, f'has {duration}', f'have {duration}')}; "
        seen = [
            f"{_names(group)} {_verb(group, 'was', 'were')} last seen {_at(ranks, group)} (the process {answers})"
            for group, answers in (
                ([rank for rank in guilty if rank not in silent], "runs"),
                ([rank for rank in guilty if rank in silent], "does not answer"),
            )
            if group
        ]
        return Diagnosis(
            f"{_names(guilty)} {_verb(guilty, 'hangs', 'hang')}: {waits if foremost else ''}{', '.join(seen)}",
            f"Look at the host of {_names(guilty)} and at the stack that a running process printed; "
            f"if it was only slow, raise"
            f" faults.collective_timeout_seconds. {_RESUME}",
            stacks=guilty,
        )
    return _divergence(ranks, foremost) or Diagnosis(
        f"{_doing(ranks, foremost, 'has been', 'have been')} for {since:.0f} s, and no rank is behind: "
        "the operation does not end",
        f"Look at the network and at the stacks; if it was only slow, raise"
        f" faults.collective_timeout_seconds. {_RESUME}",
        stacks=foremost,
    )


def _divergence(ranks: Mapping[int, RankStatus], waiting: list[int]) -> Diagnosis | None:
    """Diagnose ranks that wait in different operations after equally many moves; the smallest group comes first."""
    for moves in sorted({ranks[rank].position.moves for rank in waiting}):
        groups: dict[str, list[int]] = {}
        for rank in waiting:
            if ranks[rank].position.moves == moves:
                groups.setdefault(ranks[rank].position.name, []).append(rank)
        if len(groups) > 1:
            fewest_first = sorted(groups.items(), key=lambda group: (len(group[1]), -group[1][0]))
            parts = [f"{_names(group)} {_verb(group, 'is', 'are')} in {name}" for name, group in fewest_first]
            count = ranks[fewest_first[0][1][0]].position.entered
            return Diagnosis(
                f"{', '.join(parts)}, {'both' if len(parts) == 2 else 'all'} as collective {count}: "
                "the ranks have diverged",
                "Every rank must run the same code on the same configuration and corpus.",
                stacks=waiting,
            )
    return None


def _failure(ranks: Mapping[int, RankStatus], failed: list[int]) -> str:
    by_message: dict[str, list[int]] = {}
    for rank in failed:
        by_message.setdefault(ranks[rank].message, []).append(rank)
    parts = [f"{_names(group)} failed {_at(ranks, group)}: {message}" for message, group in by_message.items()]
    return "; ".join(parts) + _stopping(ranks, failed)


def _stopping(ranks: Mapping[int, RankStatus], causes: list[int]) -> str:
    others = [rank for rank in sorted(ranks) if rank not in causes]
    return f"; {_doing(ranks, others, 'stops', 'stop')}" if others else ""


def _having(ranks: Mapping[int, RankStatus], *states: str) -> list[int]:
    return [rank for rank, status in sorted(ranks.items()) if status.state in states]


def _verb(ranks: list[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _names(ranks: list[int]) -> str:
    return f"{_verb(ranks, 'rank', 'ranks')} {', '.join(map(str, ranks))}"


def _by_position(statuses: Mapping[int, RankStatus], ranks: list[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(str(statuses[rank].position), []).append(rank)
    return groups


def _doing(statuses: Mapping[int, RankStatus], ranks: list[int], one: str, many: str) -> str:
    """Format as `ranks 0, 2 <wait> in all-to-all of rows (collective 7), rank 3 <waits> in ...`."""
    groups = _by_position(statuses, ranks)
    return ", ".join(f"{_names(group)} {_verb(group, one, many)} {position}" for position, group in groups.items())


def _at(statuses: Mapping[int, RankStatus], ranks: list[int]) -> str:
    """Format the common position of `ranks`, or the position of each group."""
    groups = _by_position(statuses, ranks)
    return next(iter(groups)) if len(groups) == 1 else ", ".join(f"{_names(g)} {p}" for p, g in groups.items())
