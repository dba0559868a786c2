"""Memory that `cllm4rec plan` predicts, against the resident memory of the processes.

    python -m benchmarks.plan

Tests compare a plan with the tensors that are alive in a step. This benchmark compares it with the increase of each
rank's resident memory from before the model is built to its peak in two steps after a warm-up. That includes libraries,
heap fragmentation and threads, so the models are large; freed blocks are returned at once (MALLOC_MMAP_THRESHOLD_).
Untouched pages, such as most of ZeRO-3's gradient bucket, are not resident, so the bucket is as small as the adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import parser, show, show_table, write_json

ROOT = Path(__file__).parents[1]
FORMS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, checkpointed": {"activation_checkpointing": True},
    "whole backbone": {"adapter": {"kind": "full"}},
}


def main() -> None:
    options = parser("plan", __doc__)
    options.add_argument("--users", type=int, default=5_000)
    options.add_argument("--items", type=int, default=40_000)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--batch", type=int, default=32, help="users and texts of a step (%(default)s)")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        work(Path(chosen.worker[0]), FORMS[chosen.worker[1]], chosen.batch)
        return
    from benchmarks.catalogs import make_corpus

    forms = []
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), chosen.users, chosen.items, chosen.hidden, chosen.layers)
        settings = json.loads((ROOT / "ds_configs/zero3.json").read_text(encoding="utf-8"))
        settings["zero_optimization"]["reduce_bucket_size"] = 1_000_000
        (Path(folder) / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
        for form in FORMS:
            for ranks in chosen.ranks:
                forms.append({"form": form, "ranks": ranks, **run(folder, form, ranks, chosen.batch)})
    show_table(
        ["form", "ranks", "planned MB", "taken MB", "planned / taken"],
        [
            [f["form"], f["ranks"], f"{f['planned'] / 1e6:,.0f}", f"{f['taken'] / 1e6:,.0f}", f"{f['ratio']:.2f}"]
            for f in forms
        ],
    )
    shape = {name: getattr(chosen, name) for name in ("users", "items", "hidden", "layers", "batch")}
    write_json(chosen.json, {"shape": shape, "forms": forms})


def run(folder: str, form: str, ranks: int, batch: int) -> dict[str, Any]:
    """Run one form; return the results of the rank with most memory."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [*torchrun, "-m", "benchmarks.plan", "--batch", str(batch), "--worker", folder, form]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("rank-*.json")]
    for path in Path(folder).glob("rank-*.json"):
        path.unlink()
    fullest: dict[str, Any] = max(results, key=lambda f: f["taken"])
    show(f"{form} on {ranks}: {fullest['ratio']:.2f}")
    return fullest


def work(folder: Path, form: dict[str, Any], batch: int) -> None:
    """Train some steps as one of the ranks, and write their memory."""
    from cllm4rec_dist.config import RunConfig, validate
    from cllm4rec_dist.corpus.loader import BatchLoader
    from cllm4rec_dist.corpus.shards import Corpus
    from cllm4rec_dist.distributed.engine import start_world
    from cllm4rec_dist.model.linear_cross_entropy import max_logits_for
    from cllm4rec_dist.planning.meta_run import make_meta_run
    from cllm4rec_dist.planning.plan import dry_run_fullest, needed_memory, prompt_builder_of
    from cllm4rec_dist.planning.sampling import sample_step
    from cllm4rec_dist.step import train_step
    from cllm4rec_dist.system import assemble, init_embeddings

    config = validate(
        RunConfig,
        {
            "stage": "pretrain",
            "corpus": str(folder / "corpus"),
            "backbone": str(folder / "backbone"),
            "output": str(folder),
            "deepspeed": str(folder / "ds.json"),
            "embeddings": {"init": "prior"},
            "batch": {"users": batch, "texts": batch, "gradient_accumulation_steps": 2},
        }
        | form,
        "benchmark",
    )
    world = start_world()
    corpus = Corpus.open(config.corpus, verify=False)
    samples = [sample_step(corpus, prompt_builder_of(config, corpus), config, world.size, step) for step in (2, 3)]
    meta_run = make_meta_run(config, corpus.num_users, corpus.num_items, True, world.size, max_logits_for(world.device))
    traced, _ = dry_run_fullest(meta_run, samples)
    gathers = meta_run.zero.simulate(traced.events, config.batch.gradient_accumulation_steps)
    planned = needed_memory(meta_run, traced, gathers).total()

    with world.watch:
        before = resident("VmRSS")
        system = assemble(config, world)
        init_embeddings(system)
        source = BatchLoader(system.corpus, system.prompts, config, world)
        for step in range(4):
            if step == 2:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
            system.train(True)
            train_step(system, source.make(step).micro_batches, 1.0)
        taken = resident("VmHWM") - before
    figures = {"planned": planned, "taken": taken, "ratio": planned / taken}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def resident(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
