"""Ray Train on machines that die: workers and drivers killed, and input that no retry mends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.ray_cluster import TOKEN, kill_tree, ray_head, ray_node
from tests.integration.runs import (
    BIN,
    NOISE,
    ROOT,
    clean_environment,
    finish,
    foreign_lines,
    losses_of,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.integration

EPOCHS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(tmp_path_factory.mktemp("ray"))
    # Slow enough to be stable: at 1e-3 the rounding of another number of ranks grows to 3 % within 180 steps, at 2e-4
    # losses stay within 2e-7.
    text = path.read_text().replace("lr: 1.0e-2, embeddings_lr: 5.0e-3", "lr: 2.0e-4, embeddings_lr: 2.0e-4")
    path.write_text(text + "audit: true\ncheckpoint: {every_steps: 10}\n")
    return path


def start(config: Path, output: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/pretrain.py", "--config", str(config), f"output={output}", f"epochs={EPOCHS}"]
    return subprocess.Popen(
        [*command, "--launcher", "ray", *more],
        cwd=ROOT,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def wanted(config: Path) -> list[float]:
    output = config.parent / "whole"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*torchrun, "launch/pretrain.py", "--config", str(config), f"output={output}", f"epochs={EPOCHS}"],
        cwd=ROOT,
        env=clean_environment(),
        check=True,
        capture_output=True,
    )
    return losses_of(output)


def ranks_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes that train: those that hold a port of the process group have RANK in their environment."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_worker_is_started_again_by_itself(config: Path, wanted: list[float]) -> None:
    output = config.parent / "worker"
    started = start(config, output, "--workers", "2")
    wait_for_step(output, 25, started)
    victims = ranks_of(started)
    assert len(victims) == 2
    victims[1].kill()
    told = finish(started)
    assert started.returncode == 0, told[-3000:]
    assert "resumed" in told
    assert losses_of(output) == wanted


def test_after_a_killed_driver_the_same_command_goes_on(config: Path, wanted: list[float]) -> None:
    output = config.parent / "driver"
    started = start(config, output, "--workers", "2")
    wait_for_step(output, 25, started)
    workers = ranks_of(started)
    started.kill()
    finish(started)
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2
    assert not alive
    again = start(config, output, "--workers", "1:2")
    told = finish(again)
    assert again.returncode == 0, told[-3000:]
    assert losses_of(output) == wanted


def test_bad_input_is_one_message_and_no_retry(config: Path) -> None:
    """What only a rank finds out: the driver does not read DeepSpeed files."""
    (config.parent / "stage-2.json").write_text('{"zero_optimization": {"stage": 2}}')
    started = start(config, config.parent / "bad", "--workers", "2", f"deepspeed={config.parent}/stage-2.json")
    told = finish(started)
    assert started.returncode == 2, told[-3000:]
    assert told.count("zero_optimization.stage: 2 must be 3") == 1
    assert foreign_lines(told) == []
    assert "Traceback" not in told
    assert os.linesep.join(told.splitlines()[-6:]).count("error: ") == 1


def test_sigint_ends_a_run_and_rays_records_are_not_among_its_results(config: Path) -> None:
    output = config.parent / "interrupted"
    # A leftover RANK must not mute the driver.
    started = start(config, output, "--workers", "2", "epochs=100000", RANK="1", WORLD_SIZE="2")
    wait_for_step(output, 25, started)
    started.send_signal(signal.SIGINT)
    told = finish(started, 60)
    assert started.returncode == 1, told[-3000:]
    assert told.count("error: signal: 'SIGINT' ended the run") == 1
    assert "Traceback" not in told
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock",
        "audit",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "status.json",
        "tensorboard",
    ]


def test_more_workers_than_the_host_has_cpus_are_refused_with_the_numbers(config: Path) -> None:
    started = start(config, config.parent / "many", "--workers", "5000")
    told = finish(started, 120)
    assert started.returncode == 2, told[-3000:]
    assert "--workers: '5000' takes 5000 CPUs, but the cluster has" in told
    assert "--workers 1:5000" in told
    assert "Traceback" not in told


def test_a_run_shrinks_where_a_node_is_lost(config: Path, wanted: list[float]) -> None:
    """Two nodes with room for one rank each; one dies, and the run goes on with the rank that is left."""
    output = config.parent / "shrinks"
    with ray_head(num_cpus=1) as (address, _), ray_node(address) as node:
        # Ray Train waits so long for the second worker, for which there is no room, before it starts with one.
        patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
        started = start(config, output, "--workers", "1:2", **TOKEN, **patience, RAY_ADDRESS=address)
        wait_for_step(output, 25, started)
        kill_tree(node)
        told = finish(started)
    assert started.returncode == 0, told[-3000:]
    assert [len(list((output / "audit").glob(f"*-of-0000{size}.jsonl"))) for size in (1, 2)] == [1, 2]
    assert losses_of(output) == pytest.approx(wanted, rel=NOISE)
    audited = subprocess.run([str(BIN / "cllm4rec"), "audit", str(output)], capture_output=True, text=True, check=False)
    assert audited.returncode == 0, audited.stdout + audited.stderr
