"""The same run under every launcher: one process, torchrun, deepspeed, Ray Train, and a submitted Ray job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import free_port
from tests.integration.ray_cluster import TOKEN, ray_head
from tests.integration.runs import BIN, ROOT, clean_environment, losses, losses_of, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def wanted(config: Path) -> list[float]:
    found = losses(config, str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2")
    assert len(found) == 6
    return found


@pytest.mark.integration
def test_one_plain_process(config: Path, wanted: list[float]) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert losses(config, sys.executable, environment=environment) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.integration
def test_torchrun_on_two_nodes_of_one_host(config: Path, wanted: list[float]) -> None:
    output = config.parent / "two-nodes"
    command = [
        str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1",
        "launch/pretrain.py", "--config", str(config), f"output={output}",
    ]  # fmt: skip
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


@pytest.mark.integration
def test_deepspeed(config: Path, wanted: list[float]) -> None:
    command = (str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank")
    assert losses(config, *command) == wanted


@pytest.mark.integration
def test_ray_train_starts_a_local_ray_by_itself(config: Path, wanted: list[float]) -> None:
    assert losses(config, sys.executable, "--workers", "2") == wanted


@pytest.mark.integration
def test_ray_job_submit(config: Path, wanted: list[float]) -> None:
    with ray_head(num_cpus=3) as (_, address):
        command = (str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable)
        assert losses(config, *command, "--workers", "2", environment=TOKEN) == wanted
