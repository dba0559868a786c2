"""A rank that hangs, dies or diverges ends all ranks, with a message that names it and the collective."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm4rec_dist.distributed import watchdog
from cllm4rec_dist.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum,
    all_to_all_rows,
    barrier,
    gather_counts,
    require_agreement,
)
from cllm4rec_dist.distributed.diagnosis import BROKEN, DONE, FAILED, LOST, Position, RankStatus, diagnose
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.distributed.watchdog import Watch
from cllm4rec_dist.errors import CLLM4RecError, CorpusError, FaultError
from cllm4rec_dist.launchers.launch import launch
from tests.harness import alone, free_port, run_ranks

HANG_SECONDS = 2.0
ROWS = Position(24, 12, "all-to-all of rows", True, True)
"""Position of the waiting ranks: in their twelfth collective."""


def at(name: str, moves: int, *, inside: bool = True, collective: bool = True) -> Position:
    return Position(moves, (moves + 1) // 2, name, inside, collective)


def message_of(ranks: dict[int, RankStatus]) -> str:
    diagnosis = diagnose(ranks, collective_timeout_seconds=60, patience=5)
    return "" if diagnosis is None else diagnosis.message


def test_a_healthy_run_has_no_diagnosis() -> None:
    behind = at("counting", 7, inside=False)
    assert (
        message_of({0: RankStatus(ROWS, still=59), 1: RankStatus(ROWS, still=59, silent=59), 2: RankStatus(behind)})
        == ""
    )
    outside = at("ZeRO-3 step", 24, inside=False)
    assert (
        message_of({0: RankStatus(outside, still=9999), 1: RankStatus(at("loading", 24, collective=False), still=9999)})
        == ""
    )
    # Rank 1 has just ended, and its last message may still be in flight to rank 0.
    assert message_of({0: RankStatus(ROWS, still=4), 1: RankStatus(ROWS, DONE, still=4)}) == ""
    assert message_of({0: RankStatus(ROWS, still=30), 1: RankStatus(ROWS, DONE, still=30)}) == ""
    assert message_of({0: RankStatus(ROWS, BROKEN, "closed", still=4), 1: RankStatus(ROWS)}) == ""


def test_the_rank_that_others_wait_for_is_named_with_its_position() -> None:
    reading = Position(22, 11, "reading a batch", True, False)
    waiting = RankStatus(ROWS, still=63)
    assert message_of({0: waiting, 1: RankStatus(reading, still=70), 2: waiting}) == (
        "rank 1 hangs: ranks 0, 2 have waited for it for 63 s in all-to-all of rows (collective 12); "
        "rank 1 was last seen in reading a batch (the process runs)"
    )
    assert "last seen in reading a batch (the process does not answer)" in message_of(
        {0: waiting, 1: RankStatus(reading, still=70, silent=61), 2: waiting}
    )
    # Silent for less time than the others have waited, as a rank that freezes while the others take another step.
    assert "(the process does not answer)" in message_of(
        {0: waiting, 1: RankStatus(reading, still=50, silent=50), 2: waiting}
    )
    # In the same collective as the others when it froze.
    assert message_of({0: waiting, 1: RankStatus(ROWS, still=63, silent=61)}).startswith(
        "rank 1 hangs: rank 0 has waited for it"
    )
    between = RankStatus(at("all-reduce of counts", 20, inside=False), still=70)
    assert message_of({0: between, 1: waiting, 2: between}) == (
        "ranks 0, 2 hang: rank 1 has waited for them for 63 s in all-to-all of rows (collective 12); "
        "ranks 0, 2 were last seen after all-reduce of counts (collective 10) (the process runs)"
    )
    assert message_of({0: waiting, 1: waiting}) == (
        "ranks 0, 1 have been in all-to-all of rows (collective 12) for 63 s, and no rank is behind: "
        "the operation does not end"
    )


def test_diverged_ranks_are_named_smallest_group_first() -> None:
    other = RankStatus(ROWS._replace(name="all-reduce of counts"), still=63)
    waiting = RankStatus(ROWS, still=63)
    assert message_of({0: waiting, 1: other, 2: waiting}) == (
        "rank 1 is in all-reduce of counts, ranks 0, 2 are in all-to-all of rows, both as collective 12: "
        "the ranks have diverged"
    )
    assert message_of({0: waiting, 1: other}).startswith("rank 1 is in all-reduce of counts, rank 0 is in all-to-all")
    broken = RankStatus(ROWS._replace(name="all-reduce of counts"), BROKEN, "RuntimeError: size", still=6)
    assert "the ranks have diverged" in message_of({0: RankStatus(ROWS, still=6), 1: broken})


def test_an_end_is_named_with_its_reason() -> None:
    waiting = RankStatus(ROWS)
    assert message_of({0: waiting, 1: RankStatus(ROWS, FAILED, "corpus: bad")}) == (
        "rank 1 failed in all-to-all of rows (collective 12): corpus: bad; "
        "rank 0 stops in all-to-all of rows (collective 12)"
    )
    # A connection that broke because another rank is gone is not the cause.
    closed = RankStatus(ROWS, BROKEN, "RuntimeError: connection closed", still=20)
    assert message_of({0: closed, 1: RankStatus(ROWS, LOST)}).startswith("rank 1 is lost")
    assert message_of({0: closed, 1: waiting}).startswith("rank 0 failed in all-to-all of rows")
    before = at("all-reduce of counts", 20, inside=False)
    assert message_of({0: RankStatus(ROWS, still=6), 1: RankStatus(before, DONE)}) == (
        "rank 1 has ended in order, after all-reduce of counts (collective 10), but "
        "rank 0 is in all-to-all of rows (collective 12): the ranks took different numbers of steps"
    )


def test_operations_may_be_nested_and_count_alike() -> None:
    watch = Watch()
    with watch.collective("ZeRO-3 backward"):
        with watch.collective("all-to-all of rows"):
            assert watch.position == Position(2, 2, "all-to-all of rows", True, True)
        assert watch.position == Position(3, 2, "ZeRO-3 backward", True, True)
    assert watch.position == Position(4, 2, "ZeRO-3 backward", False, True)
    with watch.doing("reading a batch"):
        assert watch.position == Position(4, 2, "reading a batch", True, False)
    with pytest.raises(ValueError, match="no"), watch.collective("all-reduce of counts"):
        raise ValueError("no")
    assert watch.position == Position(5, 3, "all-reduce of counts", True, True), "where the error came from"


def test_the_last_message_arrives_although_the_sender_has_not_read_all() -> None:
    # A plain close() would reset the connection, and the other side would not receive the last message.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        rank_1 = socket.create_connection(listener.getsockname())
        rank_0 = listener.accept()[0]
    rank_1.sendall(b"a heartbeat that rank 0 has not read\n")
    rank_0.sendall(b"decided\n")
    leaving = threading.Thread(target=lambda: (watchdog._drain([rank_0], 10.0), rank_0.close()))
    leaving.start()
    time.sleep(0.2)
    assert rank_1.recv(100) == b"decided\n"
    assert rank_1.recv(100) == b""
    rank_1.close()
    leaving.join(5)
    assert not leaving.is_alive(), "waited although the other side had closed"


@dataclass(frozen=True)
class Ended:
    """Exit status of a rank (None if it had to be killed) and its output."""

    status: int | None
    output: str


def _rank(rank: int, size: int, port: int, out: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    log = os.open(f"{out}/{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        launch(function, "auto", "1", collective_timeout_seconds=HANG_SECONDS, arguments=arguments)
    except CLLM4RecError as error:  # as in cli.main
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        raise SystemExit(error.exit_status) from None


def ended(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Ended]:
    """Run `function(world, report, arguments)` on `size` ranks until all have ended, except a frozen one."""
    with tempfile.TemporaryDirectory() as out:
        port = free_port()
        # From a server without threads: a child of this process could hang on a lock that a thread held at the fork.
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["deepspeed", "tests.distributed.test_watchdog"])
        ranks = [server.Process(target=_rank, args=(r, size, port, out, function, arguments)) for r in range(size)]
        for process in ranks:
            process.start()
        try:
            deadline = time.monotonic() + seconds
            while any(_runs(process) for process in ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            statuses = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()  # also ends a frozen one
                process.join()
        return [Ended(status, Path(f"{out}/{rank}").read_text()) for rank, status in enumerate(statuses)]


def _runs(process: Any) -> bool:
    if process.exitcode is not None:
        return False
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    except (FileNotFoundError, ProcessLookupError):  # gone, and its exit status is still to come
        return True


def step(world: World) -> None:
    counts = gather_counts(world.rank, world)
    rows = all_to_all_rows(torch.ones(2 * world.size, 3), [2] * world.size, [2] * world.size, world)
    assert all_gather_rows(rows[: world.rank], counts, world).shape == (sum(range(world.size)), 3)


def steps(world: World, report: object, arguments: tuple[int, Callable[[World], None]]) -> None:
    """Run five steps; `mishap` happens on the guilty rank before the fourth."""
    guilty, mishap = arguments
    for index in range(5):
        with world.watch.doing("reading a batch"):
            if index == 3 and world.rank == guilty:
                time.sleep(HANG_SECONDS / 4)  # a few heartbeats, so that rank 0 has this position
                mishap(world)
        step(world)


def sleeps(world: World) -> None:
    time.sleep(1000)


def holds_python(world: World) -> None:
    ctypes.PyDLL(None).sleep(1000)  # a call into C that does not release the interpreter


def freezes(world: World) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def dies(world: World) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reads_a_bad_shard(world: World) -> None:
    raise CorpusError("shard 7", "abc", "is not what the manifest says", "Build it again.")


def has_a_bug(world: World) -> None:
    raise RuntimeError("shapes do not fit")


def ends_early(world: World) -> None:
    raise SystemExit(0)


def goes_another_way(world: World) -> None:
    all_reduce_sum(torch.ones(5), world, "something else")
    step(world)


@pytest.fixture(scope="module")
def warm_server() -> None:
    """The first ranks import DeepSpeed and compile its probes, which takes longer than a hang may."""
    assert [end.status for end in ended(2, steps, -1, sleeps, seconds=180)] == [0, 0]


@pytest.fixture(params=[(2, 1), (3, 0), (3, 1)], ids=lambda p: f"rank {p[1]} of {p[0]}")
def who(request: pytest.FixtureRequest, warm_server: None) -> tuple[int, int]:
    return request.param


def others_say(ranks: list[Ended], guilty: int, message: str) -> None:
    """Check that all ranks except the guilty one end with a fault and print `message`."""
    for rank, end in enumerate(ranks):
        if rank != guilty:
            assert end.status == FaultError.exit_status, end.output[-3000:]
            assert message in end.output, end.output[-3000:]


# A diagnosis of a lost or frozen rank 0 names only the rank that makes it, so the tests compare parts of messages.
FIRST = "all-gather of counts (collective 11)"
"""Position of the other ranks, after the broadcast of the port and three collectives in each of three steps."""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_shows_its_stack(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, sleeps)
    others_say(ranks, guilty, f"rank {guilty} hangs: ")
    others_say(ranks, guilty, FIRST)
    others_say(ranks, guilty, f"rank {guilty} was last seen in reading a batch (the process runs)")
    assert ranks[guilty].status == FaultError.exit_status
    assert "in sleeps" in ranks[guilty].output, ranks[guilty].output


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [freezes, holds_python])
def test_a_process_that_does_not_answer_is_named(who: tuple[int, int], mishap: Callable[[World], None]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, mishap)
    others_say(ranks, guilty, f"rank {guilty} hangs: ")
    others_say(ranks, guilty, FIRST)
    others_say(ranks, guilty, f"rank {guilty} was last seen in reading a batch (the process does not answer)")
    # A frozen process has to be killed by its launcher; one in C is ended by faulthandler, with its stack.
    assert ranks[guilty].status == (None if mishap is freezes else 1), ranks[guilty].output
    assert mishap is freezes or "in holds_python" in ranks[guilty].output


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, dies)
    others_say(ranks, guilty, f"rank {guilty} is lost: ")
    others_say(ranks, guilty, "reading a batch")
    others_say(ranks, guilty, FIRST)


@pytest.mark.slow
def test_an_error_of_a_rank_is_reported_by_all(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, reads_a_bad_shard)
    error = "shard 7: 'abc' is not what the manifest says. Build it again."
    others_say(ranks, guilty, f"rank {guilty} failed in reading a batch: {error}")
    others_say(ranks, guilty, FIRST)
    assert ranks[guilty].status == CorpusError.exit_status
    assert f"error: CorpusError: {error}" in ranks[guilty].output


@pytest.mark.slow
def test_a_bug_on_one_rank_is_reported_by_all(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, has_a_bug)
    others_say(ranks, guilty, f"rank {guilty} failed in reading a batch: RuntimeError: shapes do not fit")
    assert "Traceback" in ranks[guilty].output
    assert "has_a_bug" in ranks[guilty].output


@pytest.mark.slow
def test_unequal_numbers_of_steps_are_named(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, ends_early)
    message = f"rank {guilty} has ended in order, in reading a batch, but "
    others_say(ranks, guilty, message)
    others_say(ranks, guilty, f"{FIRST}: the ranks took different numbers of steps")
    assert ranks[guilty].status == FaultError.exit_status
    assert message in ranks[guilty].output


@pytest.mark.slow
def test_a_rank_that_calls_another_collective_is_named(who: tuple[int, int]) -> None:
    size, guilty = who
    ranks = ended(size, steps, guilty, goes_another_way)
    for end in ranks:
        assert end.status == FaultError.exit_status, end.output
        assert f"rank {guilty} " in end.output, end.output


def many_steps(world: World, report: object, arguments: tuple[()]) -> None:
    for index in range(300):
        if index == 100:
            time.sleep(0.7 * HANG_SECONDS)  # all ranks
        if index == 200 and world.is_main:
            time.sleep(0.7 * HANG_SECONDS)  # one rank, while the others wait
        step(world)
    time.sleep(2 * HANG_SECONDS)  # outside of collectives there is no timeout
    barrier(world, "the end")
    sys.stderr.write(f"entered {world.watch.position.entered}\n")


@pytest.mark.slow
def test_a_healthy_run_is_never_ended() -> None:
    for end in ended(3, many_steps):
        assert end.status == 0, end.output
        # The broadcast of the port, three collectives per step, the barrier.
        assert end.output.endswith("entered 902\n"), end.output


def disagree(world: World, values: dict[int, dict[str, int]]) -> str:
    try:
        require_agreement(values[world.rank], world)
    except FaultError as error:
        return str(error)
    return ""


def disagreements(world: World) -> list[str]:
    large = -(2**62) - 3
    return [
        disagree(world, {rank: {"step": 7, "parameters": large} for rank in range(3)}),
        disagree(world, {0: {"step": 7, "rows": 5}, 1: {"step": 7, "rows": large}, 2: {"step": 7, "rows": 5}}),
        disagree(world, {0: {"step": 8, "rows": 5}, 1: {"step": 7, "rows": 6}, 2: {"step": 7, "rows": 5}}),
        disagree(world, {0: {"step": 1}, 1: {"step": 2}, 2: {"step": 3}}),
    ]


def test_ranks_that_disagree_are_named_on_every_rank() -> None:
    for messages in run_ranks(3, disagreements):
        same, odd, main, all_differ = messages
        assert same == ""
        assert odd.startswith("rows on rank 1: -4611686018427387907 differs from 5 on the other ranks.")
        assert main.startswith("step on rank 0: 8 differs from 7 on the other ranks.")
        assert all_differ.startswith("step on ranks 1, 2: [2, 3] differs from 1 on the other ranks.")


def test_a_run_of_one_rank_has_nobody_to_disagree_with() -> None:
    require_agreement({"step": 3}, alone())
    barrier(alone(), "nobody")


def listens_to_strangers(world: World) -> int:
    """Run steps while other processes send garbage to rank 0's port."""
    if world.is_main:
        sockets = [key.fileobj for key in [*world.watch._selector.get_map().values()]]
        (listener,) = [s for s in sockets if s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
        false = '{"token": "é", "rank": 1, "state": "failed", "message": "", "position": [], "decided": true}\n'
        for noise in (b"hello\n", b"[1]\n", b"{}\n", false.encode(), b"\xff\n", b"x" * (1 << 21)):
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(listener.getsockname()[:2], 5) as stranger,
            ):
                stranger.sendall(noise)
    for _ in range(3):
        step(world)
        time.sleep(0.1)
    return world.watch.position.entered


def test_messages_without_the_token_are_ignored() -> None:
    assert run_ranks(2, listens_to_strangers) == [10, 10]
