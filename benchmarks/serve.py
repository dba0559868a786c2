"""Overhead of the service over a direct model call, and errors during a new checkpoint and a killed replica.

    python -m benchmarks.serve                        both; about 15 minutes; needs `pip install -e '.[serve,dev]'`
    python -m benchmarks.serve --items 12000 --rounds 1 --seconds 3 --requests 1000         a quick look

Speed: clients request the top 10 of the whole catalog for histories of 3 to 30 items, each client as soon as it has the
last response. Compared, in turns in the same run, are direct calls of the model with as many histories as there are
clients, and `implicit`'s `recommend` with fold-in over factors of the same width. 0 replicas are one process without
Ray. A request of the service is compared with a call of the others by their medians.

Loss: clients send requests to two replicas while a new checkpoint of the run is committed and then one replica is
killed (SIGKILL). Responses other than 200 are counted, separately for requests in flight at the kill.

The model is a decoder of two layers with random weights, which costs as much as a trained one. All forms have equally
many threads (`--threads`, 1 by default: on two cores the clients and a second replica need the others).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from benchmarks.catalogs import make_corpus
from benchmarks.common import parser, show, show_table, write_json
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender

ROOT = Path(__file__).parents[1]
TOP = 10
CONFIG = """
corpus: {folder}/corpus
backbone: {folder}/backbone
output: {folder}/run
adapter: {{kind: none}}
embeddings: {{init: prior}}
batch: {{users: 128, texts: 0}}
head: {{num_negatives: 1000}}
optimizer: {{warmup_steps: 0}}
validation: {{every_epochs: 0}}
checkpoint: {{every_steps: 1, keep: 2}}
epochs: 1
"""


def main() -> None:
    options = parser("serve", __doc__)
    options.add_argument("--items", type=int, nargs="+", default=[12_000, 1_000_000], help="(%(default)s)")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(%(default)s)")
    options.add_argument("--replicas", type=int, nargs="+", default=[0, 2], help="0: without Ray (%(default)s)")
    options.add_argument("--hidden", type=int, default=64, help="width of the decoder and its rows (%(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="turns of every form (%(default)s)")
    options.add_argument("--seconds", type=float, default=10.0, help="of a form in a turn (%(default)s)")
    options.add_argument("--requests", type=int, default=10_000, help="of the test of losses (%(default)s)")
    options.add_argument("--threads", type=int, default=1, help="of each form and replica (%(default)s)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    threadpool_limits(chosen.threads)
    speed, loss = [], None
    for num_items in chosen.items:
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(Path(folder), num_items, chosen.hidden)
            bodies = make_bodies(num_items)
            for replicas in chosen.replicas:
                speed += measure_speed(run, bodies, num_items, replicas, chosen)
            if num_items == min(chosen.items) and chosen.requests:
                loss = measure_loss(run, bodies, chosen.requests)
    show_speed(speed)
    if loss is not None:
        show(json.dumps(loss))
    write_json(chosen.json, {"hidden": chosen.hidden, "speed": speed, "loss": loss})


def make_run(folder: Path, num_items: int, hidden: int) -> Path:
    """Make a run with a checkpoint of step 1, and one of step 2 next to it."""
    make_corpus(folder, num_users=256, num_items=num_items, hidden=hidden)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "launch/pretrain.py", "--config", str(folder / "run.yaml"), "--launcher", "process"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (folder / "run/checkpoints/step-00000002").rename(folder / "step-00000002")
    return folder / "run"


def make_bodies(num_items: int, count: int = 512) -> list[dict[str, Any]]:
    """Make requests with histories of 3 to 30 items."""
    random = np.random.default_rng(1)
    return [
        {"history": [f"i{item:09d}" for item in random.choice(num_items, random.integers(3, 31))], "top": TOP}
        for _ in range(count)
    ]


def measure_speed(
    run: Path, bodies: list[dict[str, Any]], num_items: int, replicas: int, chosen: Any
) -> list[dict[str, Any]]:
    """Measure the service, and in turns what it is compared with; one row per number of clients."""
    recommender = Recommender.load(run)
    queries = [Query(history=tuple(body["history"]), top=TOP) for body in bodies]
    als, baskets = make_als(num_items, chosen.hidden, bodies)

    def call_model(first: int, count: int) -> object:
        return recommender.answer(queries[first : first + count])

    def call_implicit(first: int, count: int) -> object:
        return als.recommend(np.arange(count), baskets[first : first + count], N=TOP, recalculate_user=True)

    rows = []
    with served(run, replicas, "--threads", str(chosen.threads)) as (port, _):
        for clients in chosen.clients:
            times: dict[str, list[float]] = {"service": [], "model": [], "implicit": []}
            rates = []
            answered(load(port, bodies, clients, seconds=1.0))  # warms up
            for _ in range(chosen.rounds):
                took = answered(load(port, bodies, clients, seconds=chosen.seconds))
                times["service"] += took
                rates.append(len(took) / chosen.seconds)
                times["model"] += timed(call_model, clients, chosen.seconds / 2)
                times["implicit"] += timed(call_implicit, clients, chosen.seconds / 2)
            rows.append(describe(num_items, replicas, clients, times, rates))
            show(json.dumps(rows[-1]))
    return rows


def describe(
    num_items: int, replicas: int, clients: int, times: dict[str, list[float]], rates: Sequence[float]
) -> dict[str, Any]:
    """Summarize a row."""
    half = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "items": num_items,
        "replicas": replicas,
        "clients": clients,
        "requests_per_second": statistics.median(rates),
        "p50_ms": 1e3 * half["service"],
        "p99_ms": 1e3 * float(np.quantile(times["service"], 0.99)),
        "model_p50_ms": 1e3 * half["model"],
        "model_p99_ms": 1e3 * float(np.quantile(times["model"], 0.99)),
        "implicit_p50_ms": 1e3 * half["implicit"],
        "p50_of_model": half["service"] / half["model"],
        "p50_of_implicit": half["service"] / half["implicit"],
        "rate_of_model": statistics.median(rates) / (clients / half["model"]),
    }


def show_speed(rows: Sequence[dict[str, Any]]) -> None:
    show_table(
        ["items, replicas, clients", "requests/s", "p50 ms", "p99 ms", "bare call ms", "p50 of it", "p50 of implicit"],
        [
            [
                f"{row['items']:,}, {row['replicas'] or 'one process'}, {row['clients']}",
                f"{row['requests_per_second']:,.0f}",
                f"{row['p50_ms']:.1f}",
                f"{row['p99_ms']:.1f}",
                f"{row['model_p50_ms']:.1f}",
                f"{row['p50_of_model']:.2f}",
                f"{row['p50_of_implicit']:.2f}",
            ]
            for row in rows
        ],
    )


def timed(call: Callable[[int, int], object], count: int, seconds: float) -> list[float]:
    """Times of calls with `count` histories, other ones in each call; the first call is not counted."""
    taken = []
    call(0, count)
    end, first = time.perf_counter() + seconds, 0
    while (started := time.perf_counter()) < end:
        call(first, count)
        taken.append(time.perf_counter() - started)
        first = (first + 7) % 400
    return taken


def make_als(
    num_items: int, width: int, bodies: Sequence[dict[str, Any]]
) -> tuple[AlternatingLeastSquares, csr_matrix]:
    """A model of `implicit` with random factors, and the histories as its matrix."""
    random = np.random.default_rng(2)
    als = AlternatingLeastSquares(factors=width, num_threads=torch.get_num_threads())
    als.item_factors = random.normal(size=(num_items, width)).astype(np.float32)
    als.user_factors = random.normal(size=(len(bodies), width)).astype(np.float32)
    items = [[int(item[1:]) for item in body["history"]] for body in bodies]
    rows = np.repeat(np.arange(len(items)), [len(history) for history in items])
    matrix = csr_matrix((np.ones(len(rows), np.float32), (rows, np.concatenate(items))), (len(items), num_items))
    return als, matrix


def measure_loss(run: Path, bodies: list[dict[str, Any]], requests: int) -> dict[str, Any]:
    """Count responses while the checkpoint changes after a third and a replica is killed after two thirds."""
    newer = run.parent / "step-00000002"
    with served(run, 2, "--check", "0.5") as (port, process):
        sending = start_load(port, bodies, clients=16, requests=requests)
        assert sending.stdout is not None
        lines = []
        killed_at = float("inf")
        for line in sending.stdout:
            lines.append(json.loads(line))
            if len(lines) == requests // 3:
                commit(newer, run / "checkpoints" / newer.name)
            if len(lines) == 2 * requests // 3:
                victim = replicas_of(process)[0]
                killed_at = time.monotonic()
                os.kill(victim, signal.SIGKILL)
    bad = [(begun, ended, status) for begun, ended, status, _ in lines if status != 200]
    late = sorted(begun - killed_at for begun, _, _ in bad if begun > killed_at)
    return {
        "requests": len(lines),
        "answered": len(lines) - len(bad),
        "in_flight_at_the_kill": sum(begun <= killed_at <= ended for begun, ended, _, _ in lines),
        "lost_of_these": sum(begun <= killed_at <= ended for begun, ended, _ in bad),
        "lost_before_the_kill": sum(ended < killed_at for _, ended, _ in bad),
        "lost_that_began_after_it": len(late),
        "last_of_these_began_ms_after_it": 1e3 * late[-1] if late else None,
        "lost_statuses": sorted({status for _, _, status in bad}),
        "by_checkpoint": {name: sum(line[3] == name for line in lines) for name in sorted({line[3] for line in lines})},
        "longest_ms": 1e3 * max(ended - begun for begun, ended, _, _ in lines),
    }


def commit(source: Path, target: Path) -> None:
    """Copy a checkpoint like a run: with its marker last."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("COMMIT.json"))
    shutil.copy(source / "COMMIT.json", target)


def replicas_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of a service's replicas."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in below if "ServeReplica" in " ".join(child.cmdline())]


@contextmanager
def served(run: Path, replicas: int, *more: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Start a service, and yield port and process; 0 replicas are one process without Ray."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cllm4rec_dist", "serve", str(run), "--port", str(port), *more]
    if replicas:
        command += ["--replicas", str(replicas)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/healthz", process, log)
            yield port, process
        finally:
            process.terminate()
            process.wait(120)


def wait_for(url: str, process: subprocess.Popen[str], log: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError(f"the service did not start: {log.read()[-2000:]}") from None
            time.sleep(0.2)


def start_load(port: int, bodies: list[dict[str, Any]], clients: int, **limits: float) -> subprocess.Popen[str]:
    """Start clients in a separate process."""
    limit = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.load", f"127.0.0.1:{port}", "--clients", str(clients), *limit]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write("\n".join(map(json.dumps, bodies)))
    process.stdin.close()
    return process


def load(port: int, bodies: list[dict[str, Any]], clients: int, **limits: float) -> list[list[Any]]:
    """Start, end, status and checkpoint of each request."""
    process = start_load(port, bodies, clients, **limits)
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout]
    assert process.wait() == 0
    return lines


def answered(lines: Sequence[Sequence[Any]]) -> list[float]:
    """Seconds of requests, all of which must have succeeded."""
    statuses = {status for _, _, status, _ in lines}
    assert statuses == {200}, statuses
    return [ended - begun for begun, ended, _, _ in lines]


if __name__ == "__main__":
    main()
