"""Ray clusters of a test's own, of one or more nodes on this host."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.harness import free_port
from tests.integration.runs import BIN, ROOT

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""A cluster runs whatever it is sent: these take jobs of whoever knows the token, and from this host only."""


@contextmanager
def ray_head(num_cpus: int) -> Iterator[tuple[str, str]]:
    """A cluster of one node; the addresses for drivers and nodes, and for jobs."""
    port, dashboard = free_port(), free_port()
    head = _start(
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--num-cpus={num_cpus}",
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address)
        yield f"127.0.0.1:{port}", address
    finally:
        kill_tree(head)


@contextmanager
def ray_node(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more node, with one CPU."""
    node = _start(f"--address={address}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=1")
    try:
        yield node
    finally:
        kill_tree(node)


def _start(*options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *options],
        cwd=ROOT,
        env=os.environ | TOKEN,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_tree(node: subprocess.Popen[bytes]) -> None:
    """Kill a node with all that runs on it, as a power failure would."""
    try:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)
    node.wait(30)


def _wait_for(address: str) -> None:
    """Until the cluster takes jobs, which is some seconds after it answers."""
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--", "true"]
    for _ in range(20):
        if subprocess.run(command, env=os.environ | TOKEN, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(2)
    raise TimeoutError(f"no Ray at {address} that takes jobs")
