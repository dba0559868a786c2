"""A real Slurm of one host: the same losses under each of its launchers, and a job that is told to stop goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.runs import BIN, ROOT, clean_environment, losses, losses_of

SCRIPT = ROOT / "tests" / "integration" / "slurm.sh"
EPOCHS = 20
GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which commands talk to a Slurm of this module's own."""
    if shutil.which("slurmctld") is None and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        pytest.skip("Slurm is not installed, and only root on Debian can install it here")
    # A short path, for that of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=300, check=False)
        if started.returncode == 3:
            pytest.skip(f"Slurm cannot be installed: {started.stderr[-500:]}")
        try:
            assert started.returncode == 0, started.stdout + started.stderr
            yield clean_environment(SLURM_CONF=f"{folder}/slurm.conf", RANKS_PER_NODE="2")
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=False)


def submit(slurm: dict[str, str], script: str, output: Path, tasks: int, *arguments: str) -> str:
    """The number of a job of `tasks` tasks on one node."""
    command = [
        "sbatch",
        "--parsable",
        "--nodes=1",
        f"--ntasks-per-node={tasks}",
        "--cpus-per-task=1",
        f"--output={output}.log",
        f"launch/slurm/{script}",
        *arguments,
        f"output={output}",
    ]
    found = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def until(holds: Callable[[], bool], seconds: float, slurm: dict[str, str], log: Path) -> None:
    """Waits; fails with what the job wrote and what Slurm knows of it."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            told = log.read_text()[-3000:] if log.exists() else "the job has not started"
            for asked in ("job", "node"):
                told += subprocess.run(["scontrol", "show", asked], env=slurm, capture_output=True, text=True).stdout
            pytest.fail(told + (Path(slurm["SLURM_CONF"]).parent / "slurmctld.log").read_text()[-3000:])
        time.sleep(0.1)


def field(slurm: dict[str, str], job: str, name: str) -> str:
    told = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, check=True)
    return dict(word.split("=", 1) for word in told.stdout.split() if "=" in word)[name]


def state(slurm: dict[str, str], job: str) -> str:
    return field(slurm, job, "JobState")


@pytest.mark.integration
@pytest.mark.parametrize(("script", "tasks"), [("srun.sbatch", 2), ("deepspeed.sbatch", 2), ("torchrun.sbatch", 1)])
def test_a_batch_job_gives_the_same_losses(
    slurm: dict[str, str], config: Path, wanted: list[float], tmp_path: Path, script: str, tasks: int
) -> None:
    output = tmp_path / "run"
    job = submit(slurm, script, output, tasks, "launch/pretrain.py", "--config", str(config))
    until(lambda: state(slurm, job) not in GOING, 480, slurm, tmp_path / "run.log")
    assert state(slurm, job) == "COMPLETED", (tmp_path / "run.log").read_text()[-3000:]
    assert losses_of(output) == wanted


@pytest.mark.integration
def test_a_job_whose_time_is_up_saves_and_goes_on_by_itself(
    slurm: dict[str, str], config: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "run.yaml"
    longer.write_text(config.read_text().replace("epochs: 2", f"epochs: {EPOCHS}"))
    whole = losses(longer, str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2")
    output, log = tmp_path / "run", tmp_path / "run.log"
    job = submit(slurm, "srun.sbatch", output, 2, "launch/pretrain.py", "--config", str(longer))
    metrics = output / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, 480, slurm, log)
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)  # as `--signal=USR1@120` does
    until(lambda: field(slurm, job, "Restarts") == "1", 240, slurm, log)
    stopped = len(losses_of(output))
    assert 2 < stopped < len(whole)
    assert losses_of(output) == whole[:stopped]
    # A requeued job waits for two minutes, in which its host is tidied up; here there is nothing to tidy. But the host
    # refuses a job in the second in which it ended ("Job credential revoked").
    time.sleep(2)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, check=True)
    until(lambda: state(slurm, job) not in GOING, 480, slurm, log)
    assert state(slurm, job) == "COMPLETED", log.read_text()[-3000:]
    assert losses_of(output) == whole
    assert "saved at step" in log.read_text()
