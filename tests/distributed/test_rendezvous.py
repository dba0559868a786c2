"""Ranks that wait log for whom, and invalid launcher variables are refused at once."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from cllm4rec_dist.distributed import rendezvous
from cllm4rec_dist.errors import ConfigError, RankError
from tests.harness import free_port

WRONG = [
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK", "must be below WORLD_SIZE, which is 1"),
    ({"RANK": "2"}, "RANK", "must be below WORLD_SIZE"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK", "is not a whole number"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK", "is not a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK", "must be below WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE", "is not a whole number"),
    ({"RANK": "0", "LOCAL_RANK": "1.0"}, "LOCAL_RANK", "is not a whole number"),
    ({"RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT", "is no port"),
]


@pytest.mark.parametrize(("environ", "field", "message"), WRONG)
def test_invalid_variables_are_refused(environ: dict[str, str], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rendezvous.read_ranks(environ)
    assert caught.value.field == field


def test_ranks_are_read() -> None:
    assert rendezvous.read_ranks({}) == (0, 1)
    assert rendezvous.read_ranks({"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "29500"}) == (3, 8)


def test_a_host_that_does_not_resolve_is_named() -> None:
    rendezvous.require_host("127.0.0.1")
    for host in ("nosuchhost.invalid", "a" * 80):
        with pytest.raises(ConfigError, match=f"MASTER_ADDR: '{host}' does not resolve"):
            rendezvous.require_host(host)


def test_variables_of_another_launcher_are_removed() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "HOME": "/"}
    assert rendezvous.forget_launcher(environ) == ["RANK", "WORLD_SIZE", "MASTER_ADDR"]
    assert environ == {"HOME": "/"}
    assert rendezvous.forget_launcher(environ) == []


def register(ranks: dict[int, float], size: int, timeout: float = 20) -> list[BaseException]:
    """Register each rank in a thread, after its delay; return the errors. Rank 0's store is kept until the end."""
    port, raised, stores = free_port(), [], []

    def arrive(rank: int, delay: float) -> None:
        time.sleep(delay)
        try:
            stores.append(rendezvous.register(rank, size, "127.0.0.1", port, timeout))
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=arrive, args=item) for item in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_waiting_ranks_log_the_missing_ones(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(rendezvous, "_REMINDER_SECONDS", 0.3)
    assert register({0: 0.6, 1: 0.0, 4: 1.8, 2: 0.0, 3: 1.8}, 5) == []
    logged = " | ".join(record.getMessage() for record in caplog.records)
    assert "rank 1 of 5: waiting for rank 0 at 127.0.0.1:" in logged
    assert "rank 0: waiting for ranks 3 to 4 of 5 at 127.0.0.1:" in logged
    assert "rank 1: waiting for 2 of 5 ranks at 127.0.0.1:" in logged
    assert "(RANK, WORLD_SIZE are set)" in logged


@pytest.mark.parametrize(("rank", "missing"), [(0, "ranks 1 of 2 did not come"), (1, "waiting for rank 0 at")])
def test_a_rank_that_never_comes_ends_the_wait(rank: int, missing: str) -> None:
    (error,) = register({rank: 0.0}, 2, timeout=0.5)
    assert isinstance(error, RankError)
    assert missing in str(error)


def test_a_port_in_use_is_one_message() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(ConfigError, match="is in use on this host") as caught:
            rendezvous.register(0, 2, "127.0.0.1", other.getsockname()[1], 5)
    assert "--master_port" in caught.value.cure
    assert "MASTER_PORT" in caught.value.field


def test_an_agents_store_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 connects to the store of torchrun's agent, which holds the port."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    arguments: Any = (0, 1, "127.0.0.1", agent.port, 5)
    assert rendezvous.register(*arguments) is not None
