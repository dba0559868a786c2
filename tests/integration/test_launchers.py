"""One process, torchrun and deepspeed give the same run; Ray is in `test_ray_launchers.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import free_port
from tests.integration.runs import (
    BIN,
    ROOT,
    clean_environment,
    finish,
    losses,
    losses_of,
    wait_for_step,
)

pytestmark = pytest.mark.integration


def test_one_plain_process(config: Path, wanted: list[float]) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert losses(config, sys.executable, environment=environment) == pytest.approx(wanted, rel=1e-4)


def test_a_process_in_any_folder_takes_nothing_that_another_launcher_left(
    config: Path, wanted: list[float], tmp_path: Path
) -> None:
    lines = [line for line in config.read_text().splitlines() if not line.startswith("deepspeed:")]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    leftovers = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nosuchhost.invalid", "SLURM_STEP_NUM_TASKS": "2"}
    command = [str(BIN / "cllm4rec"), "pretrain", "-c", "run.yaml", "output=run", "--launcher", "process"]
    found = subprocess.run(
        [*command, "--workers", "2"],
        cwd=tmp_path,
        env=clean_environment(**leftovers, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert losses_of(tmp_path / "run") == pytest.approx(wanted, rel=1e-4)
    assert "RANK, WORLD_SIZE, MASTER_ADDR in the environment are ignored" in found.stderr
    assert "--workers 2 is for Ray and is not used" in found.stderr


def test_a_used_port_of_deepspeed_is_one_message(config: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={port}", "--no_local_rank"]
        found = subprocess.run(
            [*command, "launch/pretrain.py", "--config", str(config), f"output={config.parent}/used-port"],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
    assert found.returncode != 0
    assert found.stdout.count(f"error: MASTER_PORT: {port} is in use on this host") == 1, found.stdout[-3000:]
    assert "--master_port" in found.stdout
    assert "Traceback" not in found.stdout


def test_torchrun_on_two_nodes_of_one_host(config: Path, wanted: list[float]) -> None:
    output = config.parent / "two-nodes"
    command = [
        str(BIN / "torchrun"),
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_id=test",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--local_addr=127.0.0.1",
        "launch/pretrain.py",
        "--config",
        str(config),
        f"output={output}",
    ]
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        told = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert [node.returncode for node in nodes] == [0, 0], told[0][-2000:] + told[1][-2000:]
    assert losses_of(output) == wanted


def test_deepspeed(config: Path, wanted: list[float]) -> None:
    command = (str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank")
    assert losses(config, *command) == wanted


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_signal_to_the_launcher_saves_and_stops(config: Path, launcher: str) -> None:
    """What Ctrl-C, a scheduler or a host that goes down sends to all processes: ranks save the step that they are at.

    The `deepspeed` command passes on no signal that it alone gets.
    """
    commands = {
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank"],
    }
    output = config.parent / f"signal-{launcher}"
    started = subprocess.Popen(
        [*commands[launcher], "launch/pretrain.py", "--config", str(config), f"output={output}", "epochs=100000"],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(output, 20, started)
    os.killpg(started.pid, signal.SIGTERM)
    told = finish(started, 120)
    assert started.returncode != 0
    steps = len(losses_of(output))
    assert f"saved at step {steps} of" in told, told[-3000:]
    assert (output / "checkpoints" / f"step-{steps:08d}" / "COMMIT.json").exists()
