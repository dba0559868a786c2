"""Kills ranks of a run, again and again, and shows that nothing is lost.

    python -m tests.integration.chaos --seed 0 --kills 10            kill -9 of a random rank at random steps
    python -m tests.integration.chaos --worlds 2,3,1,4               stop and go on at other numbers of ranks
    python -m tests.integration.chaos --kills 5 --full-every 3       with checkpoints of changed rows
    python -m tests.integration.chaos --kills 2 --worlds 2,1         both, one after the other

Each compares with an uninterrupted run of 2 ranks that saves whole checkpoints: at the same number of ranks weights,
moments and metrics must be the same bit for bit, at others the losses within fp32 noise; and the audit log must show
that every example was read exactly once an epoch.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.store import Store
from tests.harness import make_backbone, make_catalog, make_corpus
from tests.integration.runs import CONFIG, NOISE, ROOT, clean_environment, losses_of
from tests.training import contents


def make_config(folder: Path, epochs: int) -> Path:
    catalog = make_catalog()
    make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog))
    # Slow enough to be stable: a run at the edge turns the rounding of another number of ranks into another run.
    text = CONFIG.format(folder=folder, root=ROOT).replace("epochs: 2", f"epochs: {epochs}")
    text = text.replace("lr: 1.0e-2, embeddings_lr: 5.0e-3", "lr: 1.0e-3, embeddings_lr: 1.0e-3")
    path = folder / "run.yaml"
    path.write_text(text + "audit: true\ncheckpoint: {every_steps: 7, keep: 2}\n")
    return path


def start(config: Path, output: Path, ranks: int, *more: str) -> subprocess.Popen[bytes]:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, "launch/pretrain.py", "--config", str(config), f"output={output}", *more]
    log = (output.parent / f"{output.name}.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=log, stderr=log)


def complete(config: Path, output: Path, ranks: int, *more: str) -> None:
    status = start(config, output, ranks, *more).wait()
    if status:
        raise SystemExit(f"a run of {ranks} ranks ended with {status}; see {output}.log")


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher's processes that are ranks, in no order."""
    return [p for p in psutil.Process(launcher.pid).children() if "launch/pretrain.py" in " ".join(p.cmdline())]


def last_step(output: Path) -> int:
    return len(losses_of(output)) if (output / "metrics.jsonl").exists() else 0


def kill_and_go_on(config: Path, output: Path, kills: int, total: int, seed: int, *more: str) -> list[dict[str, Any]]:
    """Run to the end under `kills` kills at random steps; what was killed when."""
    draw = random.Random(seed)
    # Steps of the kills rise, so that each start has something to lose and the run comes to its end.
    targets = sorted(draw.sample(range(3, total - 2), kills))
    told = []
    for number, target in enumerate(tqdm(targets, desc="kills", unit="kill", leave=False)):
        running = start(config, output, 2, *more)
        while running.poll() is None and last_step(output) < target:
            time.sleep(0.005)
        if running.poll() is not None:
            raise SystemExit(f"the run ended with {running.returncode} before kill {number}; see {output}.log")
        ranks = ranks_of(running)
        victim = draw.randrange(len(ranks))
        ranks[victim].kill()
        running.wait()
        saved = sorted(path.name for path in (output / "checkpoints").glob("step-*/COMMIT.json"))
        told.append({"kill": number, "rank": victim, "step": last_step(output), "checkpoints": len(saved)})
    complete(config, output, 2, *more)
    return told


def change_world(config: Path, output: Path, worlds: str, total: int, seed: int, *more: str) -> list[int]:
    """Run to the end, from random steps on at the next number of ranks; those steps."""
    sizes = [int(size) for size in worlds.split(",")]
    cuts = sorted(random.Random(seed).sample(range(2, total - 2), len(sizes) - 1))
    for size, until in zip(sizes, [*cuts, total], strict=True):
        complete(config, output, size, f"max_steps={until}", *more)
    return cuts


def newest(output: Path) -> Path:
    return max((output / "checkpoints").glob("step-*/COMMIT.json")).parent


def require_equal(one: Path, other: Path) -> None:
    """Weights, moments and metrics are the same bit for bit."""
    first, second = (
        contents(Checkpoint.open(Store(str(newest(run).parent)), newest(run).name)) for run in (one, other)
    )
    different = sorted(k for k in first.keys() | second.keys() if not torch.equal(first[k], second[k]))
    if different:
        raise SystemExit(f"{newest(one)} and {newest(other)} differ in {different}")
    if metrics_of(one) != metrics_of(other):
        raise SystemExit("metrics.jsonl differs")


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def require_audited(output: Path) -> None:
    """Every example was read exactly once an epoch."""
    subprocess.run([sys.executable, "-m", "cllm4rec_dist", "audit", str(output)], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the steps and ranks to kill")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--worlds", help="numbers of ranks, as 2,3,1,4: another number at each start")
    parser.add_argument("--epochs", type=int, help="of 3 steps each; 60, or 12 without kills, if left out")
    parser.add_argument("--full-every", type=int, default=1, help="checkpoint.full_every of the run that is stopped")
    options = parser.parse_args()
    if not options.kills and not options.worlds:
        parser.error("give --kills, --worlds or both")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = make_config(folder, options.epochs or (60 if options.kills else 12))
        whole, killed, changed = folder / "whole", folder / "killed", folder / "changed"
        saving = f"checkpoint.full_every={options.full_every}"
        complete(config, whole, 2)
        wanted = losses_of(whole)
        if options.kills:
            for row in kill_and_go_on(config, killed, options.kills, len(wanted), options.seed, saving):
                print("kill {kill}: rank {rank}, after step {step}".format(**row))  # noqa: T201
            require_equal(whole, killed)
            print(f"{len(wanted)} steps, {options.kills} kills: weights, moments and metrics equal bit for bit")  # noqa: T201
            require_audited(killed)
        if options.worlds:
            cuts = change_world(config, changed, options.worlds, len(wanted), options.seed, saving)
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses_of(changed), wanted, strict=True))
            print(f"{len(wanted)} steps, ranks {options.worlds}, changed after steps {cuts}")  # noqa: T201
            print(f"losses apart by at most {apart:.1e} of themselves (allowed: {NOISE:.0e})")  # noqa: T201
            if apart > NOISE:
                raise SystemExit("the runs differ by more than fp32 noise")
            require_audited(changed)


if __name__ == "__main__":
    main()
