"""Choice of the launcher, and errors before any rank starts. (Whole runs: tests/integration.)"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm4rec_dist.errors import ConfigError, FaultError
from cllm4rec_dist.launchers import ray_launcher
from cllm4rec_dist.launchers.launch import is_main, joins, ranks_are_elsewhere, require_launchable
from tests.harness import free_port

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2"}
SLURM_1 = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("environ", [RANK_1, SLURM_1])
def test_only_auto_joins_the_ranks_of_a_launcher(environ: dict[str, str]) -> None:
    assert joins("auto", environ)
    assert not joins("auto", {})
    assert not joins("ray", environ)
    assert not joins("process", environ)


@pytest.mark.parametrize("environ", [RANK_1, SLURM_1])
def test_a_leftover_rank_mutes_nobody(environ: dict[str, str]) -> None:
    assert [is_main(launcher, environ) for launcher in ("auto", "ray", "process")] == [False, True, True]
    assert is_main("auto", {})
    assert is_main("auto", {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1"})


def test_ranks_are_elsewhere_on_a_cluster_alone() -> None:
    cluster = {"RAY_ADDRESS": "head:6379"}
    assert ranks_are_elsewhere("ray", cluster)
    assert ranks_are_elsewhere("auto", cluster)
    assert not ranks_are_elsewhere("process", cluster)
    assert not ranks_are_elsewhere("auto", cluster | RANK_1)
    for local in ({}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "local"}):
        assert not ranks_are_elsewhere("ray", local)


WRONG = [
    ("auto", "1", {"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),
    ("auto", "1", {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nosuchhost.invalid"}, "MASTER_ADDR"),
    ("auto", "1", {"SLURM_STEP_NUM_TASKS": "2"}, "MASTER_ADDR"),
    ("process", "1", {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}, "--launcher"),
    ("slurm", "1", {}, "--launcher"),
    ("auto", "4:2", {}, "--workers"),
    ("ray", "1", {"RAY_ADDRESS": "http://127.0.0.1:8265"}, "RAY_ADDRESS"),
]


@pytest.mark.parametrize(("launcher", "workers", "environ", "field"), WRONG)
def test_what_could_start_no_rank_is_refused(launcher: str, workers: str, environ: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_launchable(launcher, workers, environ)
    assert caught.value.field == field


def test_process_takes_nothing_from_the_environment() -> None:
    leftovers = {"RANK": "5", "WORLD_SIZE": "x", "MASTER_ADDR": "nosuchhost.invalid", "SLURM_STEP_NUM_TASKS": "2"}
    assert require_launchable("process", "2", leftovers | SLURM_1 | {"RAY_ADDRESS": "127.0.0.1:1"}) == 2


def test_a_ray_address_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"127.0.0.1:{free_port()}"
    for address in (dead, f"ray://{dead}"):
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS: '{address}' does not answer"):
            require_launchable("auto", "1", {"RAY_ADDRESS": address})
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert require_launchable("auto", "1", {"RAY_ADDRESS": "auto"}) == 1
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(dead)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: 'auto' is {dead}, which does not answer"):
        require_launchable("auto", "1", {"RAY_ADDRESS": "auto"})
    with socket.create_server(("127.0.0.1", 0)) as alive:
        assert require_launchable("auto", "1", {"RAY_ADDRESS": f"127.0.0.1:{alive.getsockname()[1]}"}) == 1


def test_more_workers_than_there_is_room_for_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    for workers, requested, cure in ((4, "'4' takes 4 GPUs", "1:4"), ((3, 8), "'3:8' takes 3 GPUs", "1:8")):
        with pytest.raises(ConfigError) as caught:
            ray_launcher._require_room(workers, "GPU", 2.0, 2.0)
        assert f"--workers: {requested}, but the cluster has 2." in str(caught.value)
        assert f"--workers {cure} " in caught.value.cure
    ray_launcher._require_room((1, 8), "CPU", 2.0, 1.0)
    assert not caplog.records


def test_a_cluster_that_is_busy_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray_launcher._require_room(2, "CPU", 2.0, 1.0)
    assert "waiting for the cluster: 2 workers take as many CPUs, 1 are free" in caplog.text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_ray(monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    ended = threading.Event()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=ended.set))  # type: ignore[arg-type]
    threading.Timer(0.3, os.kill, (os.getpid(), signum)).start()
    started = time.monotonic()
    with pytest.raises(FaultError, match=signum.name):
        ray_launcher._wait_for(lambda: ended.wait(30))
    assert ended.is_set()
    assert signal.getsignal(signum) is before
    assert time.monotonic() - started < 10


def test_what_ray_raises_is_raised_here() -> None:
    def fails() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        ray_launcher._wait_for(fails)


def test_a_refusal_is_the_same_error_again() -> None:
    error = ray_launcher._as_error("CorpusError", "corpus", "x", "is not there", "Build it.")
    assert (type(error).__name__, str(error)) == ("CorpusError", "corpus: 'x' is not there. Build it.")
    assert ray_launcher._as_error("__doc__", "a", 1, "b", "c").exit_status == 2
    refusals = ray_launcher._Refusals()
    assert refusals.first() is None
    refusals.add(["first"])
    refusals.add(["second"])
    assert refusals.first() == ["first"]
