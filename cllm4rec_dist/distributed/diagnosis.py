"""Why a run cannot go on: pure functions of what is known about its ranks. `watchdog.py` finds that out and acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

HANG_SECONDS = 600.0
"""How long a collective may take, where a run does not say."""

RUNS, BROKEN, FAILED, DONE, LOST = "runs", "broken", "failed", "done", "lost"
"""States of a rank. BROKEN raised an error that another rank may have caused (a closed connection); FAILED one of its
own; DONE left in order; LOST ended without a word."""


class Position(NamedTuple):
    """Where a rank's main thread is.

    Attributes:
        moves: collectives entered plus those left. At equal `moves`, all ranks should be in the same operation.
        entered: collectives entered.
        name: of the operation it is in, or left last.
        inside: whether it is still in it.
        collective: whether all ranks enter it, so that being in it may mean to wait for another rank.
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
        number = f" (collective {self.entered})" if self.collective else ""
        return f"{'in' if self.inside else 'after'} {self.name}{number}"


@dataclass(frozen=True)
class RankStatus:
    """What is known of a rank.

    Attributes:
        position: where it was when it was last heard of.
        state: one of the five states.
        message: of its error, if it has one.
        still: seconds since position or state last changed.
        silent: seconds since it was last heard of.
    """

    position: Position
    state: str = RUNS
    message: str = ""
    still: float = 0.0
    silent: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """Why a run cannot go on.

    Attributes:
        message: names ranks and operations.
        cure: what to do.
        stacks: ranks whose Python stacks tell more.
        raised: ranks whose own error is the cause, and tells more than this does.
    """

    message: str
    cure: str
    stacks: list[int] = field(default_factory=list)
    raised: list[int] = field(default_factory=list)


_RESUME = "The same command goes on from the newest checkpoint."


def diagnose(ranks: Mapping[int, RankStatus], collective_timeout_seconds: float, patience: float) -> Diagnosis | None:
    """Why these ranks cannot go on, or None while they may.

    Args:
        ranks: what is known, by rank.
        collective_timeout_seconds: the longest that a collective may take, and a rank may be silent.
        patience: seconds for which an effect waits for its cause to be heard of.
    """
    lost = _having(ranks, LOST)
    if lost:
        return Diagnosis(
            f"{_names(lost)} {_verb(lost, 'is', 'are')} lost: the process ended without a word (killed, out of "
            f"memory?), last seen {_at(ranks, lost)}{_stopping(ranks, lost)}",
            f"Look at the host of {_names(lost)} and its memory. {_RESUME}",
        )
    failed = _having(ranks, FAILED)
    if failed:
        return Diagnosis(_failure(ranks, failed), f"Cure what {_names(failed)} met. {_RESUME}", raised=failed)
    waiting = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].position.waits]
    patient = [rank for rank in waiting if ranks[rank].still > patience]
    farthest = max((ranks[rank].position.moves for rank in patient), default=0)
    early = [rank for rank in _having(ranks, DONE) if ranks[rank].position.moves < farthest]
    if early:
        return Diagnosis(
            f"{_names(early)} {_verb(early, 'has', 'have')} ended in order, {_at(ranks, early)}, but "
            f"{_doing(ranks, patient, 'is', 'are')}: the ranks did not make equally many steps",
            "Every rank must see the same configuration and the same corpus.",
        )
    broken = [rank for rank in _having(ranks, BROKEN) if ranks[rank].still > patience]
    if broken:
        return _divergence(ranks, waiting) or Diagnosis(
            _failure(ranks, broken), f"Cure what {_names(broken)} met. {_RESUME}", raised=broken
        )
    unheard = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].silent > collective_timeout_seconds]
    if unheard or any(ranks[rank].still > collective_timeout_seconds for rank in waiting):
        return _stall(ranks, waiting, unheard, patience)
    return None


def _stall(ranks: Mapping[int, RankStatus], waiting: list[int], unheard: list[int], patience: float) -> Diagnosis:
    """Who is waited for: ranks that are not heard of or behind the farthest; else who went elsewhere, or nobody."""
    silent = [rank for rank in _having(ranks, RUNS, BROKEN) if ranks[rank].silent > patience]
    answering = [rank for rank in waiting if rank not in silent]
    farthest = max((ranks[rank].position.moves for rank in answering), default=0)
    ahead = [rank for rank in answering if ranks[rank].position.moves == farthest]
    since = max((ranks[rank].still for rank in ahead), default=0.0)
    behind = [rank for rank in _having(ranks, RUNS) if ranks[rank].position.moves < farthest]
    guilty = sorted({*behind, *unheard}) or silent
    if guilty:
        it = _verb(guilty, "it", "them")
        waits = f"{_doing(ranks, ahead, f'waits for {it} since {since:.0f} s', f'wait for {it} since {since:.0f} s')}; "
        seen = [
            f"{_names(group)} {_verb(group, 'was', 'were')} last seen {_at(ranks, group)} (the process {answers})"
            for group, answers in (
                ([rank for rank in guilty if rank not in silent], "runs"),
                ([rank for rank in guilty if rank in silent], "does not answer"),
            )
            if group
        ]
        return Diagnosis(
            f"{_names(guilty)} {_verb(guilty, 'hangs', 'hang')}: {waits if ahead else ''}{', '.join(seen)}",
            f"Look at the host of {_names(guilty)} and at the stack that a running process printed; "
            f"if it was only slow, raise"
            f" faults.collective_timeout_seconds. {_RESUME}",
            stacks=guilty,
        )
    return _divergence(ranks, ahead) or Diagnosis(
        f"{_doing(ranks, ahead, 'is', 'are')} since {since:.0f} s, and no rank is behind: the operation does not end",
        f"Look at the network and at the stacks; if it was only slow, raise"
        f" faults.collective_timeout_seconds. {_RESUME}",
        stacks=ahead,
    )


def _divergence(ranks: Mapping[int, RankStatus], waiting: list[int]) -> Diagnosis | None:
    """Ranks that wait in different operations although they entered and left equally many; the fewest named first."""
    for moves in sorted({ranks[rank].position.moves for rank in waiting}):
        groups: dict[str, list[int]] = {}
        for rank in waiting:
            if ranks[rank].position.moves == moves:
                groups.setdefault(ranks[rank].position.name, []).append(rank)
        if len(groups) > 1:
            fewest_first = sorted(groups.items(), key=lambda group: (len(group[1]), -group[1][0]))
            parts = [f"{_names(group)} {_verb(group, 'is', 'are')} in {name}" for name, group in fewest_first]
            number = ranks[fewest_first[0][1][0]].position.entered
            return Diagnosis(
                f"{', '.join(parts)}, {'both' if len(parts) == 2 else 'all'} as collective {number}: "
                "the ranks have diverged",
                "Every rank must run the same code on the same configuration and corpus.",
                stacks=waiting,
            )
    return None


def _failure(ranks: Mapping[int, RankStatus], failed: list[int]) -> str:
    said: dict[str, list[int]] = {}
    for rank in failed:
        said.setdefault(ranks[rank].message, []).append(rank)
    parts = [f"{_names(same)} failed {_at(ranks, same)}: {message}" for message, same in said.items()]
    return "; ".join(parts) + _stopping(ranks, failed)


def _stopping(ranks: Mapping[int, RankStatus], causes: list[int]) -> str:
    others = [rank for rank in sorted(ranks) if rank not in causes]
    return f"; {_doing(ranks, others, 'stops', 'stop')}" if others else ""


def _having(ranks: Mapping[int, RankStatus], *states: str) -> list[int]:
    return [rank for rank, seen in sorted(ranks.items()) if seen.state in states]


def _verb(ranks: list[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _names(ranks: list[int]) -> str:
    return f"{_verb(ranks, 'rank', 'ranks')} {', '.join(map(str, ranks))}"


def _by_place(seen: Mapping[int, RankStatus], ranks: list[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(str(seen[rank].position), []).append(rank)
    return groups


def _doing(seen: Mapping[int, RankStatus], ranks: list[int], one: str, many: str) -> str:
    """`ranks 0, 2 <wait> in all-to-all of rows (collective 7), rank 3 <waits> in ...`."""
    groups = _by_place(seen, ranks)
    return ", ".join(f"{_names(group)} {_verb(group, one, many)} {place}" for place, group in groups.items())


def _at(seen: Mapping[int, RankStatus], ranks: list[int]) -> str:
    """The one place where `ranks` are, or each with its own."""
    groups = _by_place(seen, ranks)
    return next(iter(groups)) if len(groups) == 1 else ", ".join(f"{_names(g)} {p}" for p, g in groups.items())
