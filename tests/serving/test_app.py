"""The service over a real run: the answers of the Python API, new and damaged checkpoints, the command, Ray Serve."""

from __future__ import annotations

import gc
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import yaml
from fastapi.testclient import TestClient

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.serving.app import create_app, open_run
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.serving.slow_clients import HEADER_SECONDS
from tests.damage import flip_bit

BASKET = ["item-003", "item-011", "item-000"]


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a trained run, to be changed."""
    shutil.copytree(runs["paper"], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    return tmp_path / "run"


def add_checkpoint(run: Path, *, damaged: bool = False) -> str:
    """Commit a checkpoint of a later step with the weights of the best one; its name."""
    store, (best, *_) = find(str(run))
    step = int(best.rpartition("-")[2]) + 100
    folder = Path(store.url)
    target = folder / f"best-{step:08d}"
    state = json.loads((folder / best / "state.json").read_text())
    state["run"]["step"] = step
    marker = json.loads((folder / best / "COMMIT.json").read_text())
    files = {}
    for name in marker["files"]:
        content = json.dumps(state).encode() if name == "state.json" else (folder / best / name).read_bytes()
        files[name] = store.write(target.name, name, lambda path, content=content: path.write_bytes(content))
    if damaged:
        flip_bit(target / "replicated.safetensors", random.Random(0))
    store.commit(target.name, files)
    return target.name


def wait_until(client: TestClient, checkpoint: str) -> None:
    deadline = time.monotonic() + 60
    while client.get("/healthz").json()["checkpoint"] != checkpoint:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_answers_are_those_of_the_python_api(runs: dict[str, Path], recommender: Recommender) -> None:
    options = ServiceOptions(run=str(runs["paper"]))
    with TestClient(create_app(open_run(options), options)) as client:
        for request, expected in (
            ({"history": BASKET}, recommender.recommend(histories=[BASKET], top=5)),
            ({"user": "user-008"}, recommender.recommend(users=["user-008"], top=5)),
            (
                {"history": BASKET, "exclude": ["item-001"]},
                recommender.recommend(histories=[BASKET], exclude=["item-001"], top=5),
            ),
        ):
            answer = client.post("/recommend", json=request | {"top": 5}).json()
            assert [item["item"] for item in answer["items"]] == expected["item"].tolist()
            assert [item["score"] for item in answer["items"]] == pytest.approx(expected["score"].tolist(), abs=1e-5)
        answer = client.post("/recommend", json={"history": BASKET, "explain": True, "top": 2}).json()
        for item in answer["items"]:
            expected = recommender.explain(BASKET, item["item"])
            assert [reason["item"] for reason in item["because"]] == expected["item"].tolist()
            assert [reason["contribution"] for reason in item["because"]] == pytest.approx(
                expected["contribution"].tolist(), abs=1e-5
            )
        assert client.post("/recommend", json={}).json()["fallback"] is True
        expected = recommender.similar("item-003", top=4)
        answer = client.post("/similar", json={"item": "item-003", "top": 4}).json()
        assert [item["item"] for item in answer["items"]] == expected["item"].tolist()
        assert client.get("/items", params={"query": "item-005"}).json()["items"][0]["item"] == "item-005"
        assert client.get("/run").json()["num_items"] == len(recommender.items.ids)
        refused = client.post("/recommend", json={"user": "user-999"})
        assert refused.status_code == 422
        assert "user-0" not in refused.text  # no other customer's id


def test_a_new_checkpoint_is_taken_up_and_a_damaged_one_is_not(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ServiceOptions(run=str(run), check_seconds=0.05)
    live = open_run(options)
    with TestClient(create_app(live, options)) as client:
        before = client.post("/recommend", json={"history": BASKET}).json()
        assert client.get("/run").json()["best_value"] == 0.25
        old = weakref.ref(live.current.recommender)
        newer = add_checkpoint(run)
        wait_until(client, newer)
        shown = client.get("/run").json()
        assert (shown["best_metric"], shown["best_value"]) == ("recall@5", None), "it is not of the best step"
        gc.collect()
        assert old() is None  # its memory is given back
        after = client.post("/recommend", json={"history": BASKET}).json()
        assert after["checkpoint"] == newer
        assert after["items"] == before["items"]
        assert client.get("/run").json()["run"] == "run"

        spoilt = add_checkpoint(run, damaged=True)
        deadline = time.monotonic() + 60
        while 'cllm4rec_checkpoint_reloads_total{outcome="failed",replica="alone"}' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post("/recommend", json={"history": BASKET}).json() == after
    (message,) = [message for message in caplog.messages if message.startswith("NEW CHECKPOINT NOT USED")]
    assert f"{spoilt}' is damaged. Use another checkpoint." in message
    assert f"{spoilt} cannot be used (ranks [0])" in caplog.messages[-2]  # and nothing of one that is tried instead


@contextmanager
def command(log: IO[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`cllm4rec serve` in a separate process."""
    started = [sys.executable, "-m", "cllm4rec_dist", "serve", *arguments]
    process = subprocess.Popen(started, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def post(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def wait_for(process: subprocess.Popen[str], log: Path, text: str) -> str:
    """The log, when it says `text`."""
    deadline = time.monotonic() + 240
    while text not in (said := log.read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    return said


@pytest.mark.integration
def test_the_command_serves_until_it_is_told_to_end(runs: dict[str, Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file, command(file, str(runs["paper"]), "--port", "0") as process:
        said = wait_for(process, log, "page: http://127.0.0.1:")
        port = int(said.partition("page: http://127.0.0.1:")[2].split()[0])
        assert len(post(port, "/recommend", {"history": BASKET, "top": 3})["items"]) == 3
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere"),
        ([".", "--host", "203.0.113.1"], "--port"),
        ([".", "--gpus", "1"], "--gpus"),
    ],
)
def test_mistakes_of_the_command_line_are_one_message(arguments: list[str], says: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cllm4rec_dist.cli import app
    from cllm4rec_dist.errors import CLLM4RecError

    result = CliRunner().invoke(app, ["serve", *arguments, *([] if "--port" in arguments else ["--port", "0"])])
    assert isinstance(result.exception, CLLM4RecError)
    assert says in str(result.exception)


@pytest.mark.integration
@pytest.mark.slow
def test_a_killed_replica_costs_no_answer(runs: dict[str, Path], tmp_path: Path) -> None:
    """Eight clients at once, while a replica is killed; and one that never ends its header.

    Whether a request is in that replica at that moment is chance; `test_gateway.py` tests that it is sent again.
    """
    log = tmp_path / "log"
    arguments = [str(runs["paper"]), "--port", "0", "--replicas", "2"]
    with log.open("w") as file, command(file, *arguments) as process, ThreadPoolExecutor(9) as clients:
        port = int(wait_for(process, log, "page: http://127.0.0.1:").partition("127.0.0.1:")[2].split()[0])
        slow = clients.submit(seconds_to_be_cut_off, port)
        expected = listed(port)
        replicas = two_replicas(process.pid)
        answers = [clients.submit(listed, port) for _ in range(400)]
        answers[100].result()
        replicas[0].kill()
        assert [answer.result() for answer in answers] == [expected] * 400
        assert slow.result() < 2 * HEADER_SECONDS
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


def two_replicas(pid: int) -> list[psutil.Process]:
    """The replicas below a process. Ray names a process some time after it has started it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        below = psutil.Process(pid).children(recursive=True)
        replicas = [child for child in below if "ServeReplica" in " ".join(child.cmdline())]
        if len(replicas) == 2:
            return replicas
        time.sleep(0.1)
    raise AssertionError(f"there are {len(replicas)} replicas")


def listed(port: int) -> list[str]:
    """The items of an answer; their scores may differ by the rounding of another batch."""
    return [item["item"] for item in post(port, "/recommend", {"history": BASKET, "top": 3})["items"]]


def seconds_to_be_cut_off(port: int) -> float:
    """How long a connection is kept that sends a header without an end, a byte a second."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
        client.sendall(b"GET /run HTTP/1.1\r\nX: ")
        while time.monotonic() - started < 60:
            try:
                client.sendall(b"x")
                if not client.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    return time.monotonic() - started


def test_ray_builds_the_application_from_arguments_and_a_file_from_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner
    from ray.serve.scripts import build as serve_build

    from cllm4rec_dist.errors import ConfigError
    from cllm4rec_dist.serving.app import build

    assert build({"run": str(tmp_path), "replicas": "2", "gpus": "0.5"}) is not None
    with pytest.raises(ConfigError, match="replica"):
        build({"run": str(tmp_path), "replica": "2"})

    monkeypatch.setenv("CLLM4REC_RUN", str(tmp_path))
    monkeypatch.setenv("CLLM4REC_REPLICAS", "3")
    path = "cllm4rec_dist.serving.application:application"
    result = CliRunner().invoke(serve_build, [path, "-o", str(tmp_path / "service.yaml")])
    assert result.exit_code == 0, result.output
    (built,) = yaml.safe_load((tmp_path / "service.yaml").read_text())["applications"]
    assert built["import_path"] == path
    assert [(d["name"], d["num_replicas"]) for d in built["deployments"]] == [("cllm4rec", 3)]
