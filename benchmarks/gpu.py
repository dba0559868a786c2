"""A 7B-shaped LLaMA with LoRA and a large catalog: tokens/s, fraction of the matmul peak, memory against `plan`.

    torchrun --standalone --nproc_per_node=8 -m benchmarks.gpu                 on 8 GPUs
    torchrun --standalone --nproc_per_node=1 -m benchmarks.gpu --items 100000  on one, too small for a million items
    ... -m benchmarks.gpu embeddings.dim=256 head.compute_dtype=bf16           with other settings: a million items
    python -m benchmarks.gpu --hidden 64 --layers 2 --heads 4 --items 1000 --users 500 --batch-users 16 --batch-texts 8

The last command checks on a CPU that the code runs. Weights are random, so nothing is downloaded. They are frozen in
bf16, with adapters on every linear layer and activation checkpointing. The peak is that of a large bf16 matrix product,
measured in the same run. FLOPs are those of `plan` for the measured steps, with recomputation; memory is
`torch.cuda.max_memory_allocated` of the fullest rank after the warm-up.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.catalogs import make_corpus
from benchmarks.common import parser, show, show_table, write_json
from cllm4rec_dist.config import RunConfig, load_config, path_override
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.distributed.collectives import barrier, gather_integers
from cllm4rec_dist.distributed.engine import start_world
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.planning.hardware import GPUS
from cllm4rec_dist.planning.meta_run import make_meta_run
from cllm4rec_dist.planning.plan import Cluster, dry_run_fullest, make_plan, step_flops
from cllm4rec_dist.planning.sampling import sample_step
from cllm4rec_dist.planning.table import format_plan
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import System, assemble, init_embeddings

ROOT = Path(__file__).parents[1]
_LARGEST_PRODUCT = {"cuda": 8192, "cpu": 512}


def main() -> None:
    options = parser("gpu", __doc__)
    options.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--words", type=int, default=32_000)
    options.add_argument("--items", type=int, default=1_000_000)
    options.add_argument("--users", type=int, default=100_000)
    options.add_argument("--batch-users", type=int, default=256, help="of a step, over all ranks (%(default)s)")
    options.add_argument("--batch-texts", type=int, default=64)
    options.add_argument("--gpu", default="h100", choices=GPUS, help="whose room the plan is held to (%(default)s)")
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--warmup", type=int, default=3)
    options.add_argument("--folder", type=Path, help="for corpus and weights, seen by all ranks; temporary if left out")
    chosen = options.parse_args()
    world = start_world()
    folder = chosen.folder or Path(tempfile.gettempdir()) / "cllm4rec-gpu"
    try:
        with world.watch:
            figures = measure(world, folder, chosen)
    finally:
        if world.is_main and chosen.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if world.is_main:
        show_figures(figures)
        write_json(chosen.json, figures)


def measure(world: World, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Plan the run, run it, and compare both. Collective."""
    if world.is_main:
        make_missing(folder, chosen, world.device)
    barrier(world, "the corpus and the weights")
    config = load_config(RunConfig, overrides=[*settings(folder, chosen), *chosen.settings])
    cluster = Cluster(GPUS[chosen.gpu], world.size, torch.cuda.device_count() or 1, 0.45)
    plan = make_plan(config, cluster)
    if world.is_main:
        show(format_plan(plan))
    system = assemble(config, world)
    init_embeddings(system)
    seconds, tokens, memory = run_steps(system, chosen)
    peak, flops = product_peak(world.device), measured_flops(system, chosen)
    reached = statistics.median(f / s for f, s in zip(flops, seconds, strict=True))
    speed = statistics.median(t / s for t, s in zip(tokens, seconds, strict=True))
    return {
        "ranks": world.size,
        "settings": chosen.settings,
        "tokens_per_second": speed,
        "step_seconds": statistics.median(seconds),
        "steps": [{"tokens": t, "seconds": s} for t, s in zip(tokens, seconds, strict=True)],
        "planned_step_seconds": plan.step_seconds,
        "product_peak": peak,
        "share_of_peak": reached / peak,
        "memory": memory,
        "planned_memory": plan.memory.total(),
        "planned_parts": dict(plan.memory),
    }


def make_missing(folder: Path, chosen: argparse.Namespace, device: torch.device) -> None:
    """Write `folder`/corpus, and `folder`/large: its tokenizer and random weights of the given shape."""
    if not (folder / "corpus").exists():
        make_corpus(folder, chosen.users, chosen.items, hidden=64)
    if (folder / "large").exists():
        return
    shutil.copytree(folder / "backbone", folder / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = LlamaConfig(
        hidden_size=chosen.hidden,
        intermediate_size=chosen.hidden * 43 // 16,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        num_key_value_heads=chosen.heads,
        vocab_size=chosen.words,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    with device:
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder / "large")


def settings(folder: Path, chosen: argparse.Namespace) -> list[str]:
    """Settings of a run with frozen bf16 weights, LoRA and activation checkpointing."""
    return [
        "stage=pretrain",
        path_override("corpus", folder / "corpus"),
        path_override("backbone", folder / "large"),
        path_override("output", folder),
        path_override("deepspeed", ROOT / "ds_configs/zero3.json"),
        "precision=bf16",
        "activation_checkpointing=true",
        "embeddings={init: prior, comm_dtype: bf16}",
        f"batch={{users: {chosen.batch_users}, texts: {chosen.batch_texts}}}",
    ]


def run_steps(system: System, chosen: argparse.Namespace) -> tuple[list[float], list[int], int]:
    """Measure seconds and tokens of each step after the warm-up, and the bytes of the fullest rank. Collective."""
    world = system.world
    source = BatchLoader(system.corpus, system.prompts, system.config, world)
    seconds, tokens = [], []
    for step in range(chosen.warmup + chosen.steps):
        batches = source.make(step).micro_batches
        system.train(True)
        if step == chosen.warmup and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(world.device)
        started = time.perf_counter()
        result = train_step(system, batches, 1.0)
        synchronize(world.device)
        seconds.append(time.perf_counter() - started)
        tokens.append(result.tokens)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    fullest = max(rank_peak for (rank_peak,) in gather_integers([peak], world))
    return seconds[chosen.warmup :], tokens[chosen.warmup :], fullest


def measured_flops(system: System, chosen: argparse.Namespace) -> list[int]:
    """FLOPs of the busiest rank in each of the timed steps."""
    config, corpus, num_ranks = system.config, system.corpus, system.world.size
    steps = range(chosen.warmup, chosen.warmup + chosen.steps)
    samples = [sample_step(corpus, system.prompts, config, num_ranks, step) for step in steps]
    meta_run = make_meta_run(config, corpus.num_users, corpus.num_items, True, num_ranks, 1 << 28)
    traced, unit = dry_run_fullest(meta_run, samples)
    return [step_flops(sample, traced, unit).total() for sample in samples]


def product_peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, the best of several."""
    size = _LARGEST_PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show_figures(figures: dict[str, Any]) -> None:
    """Print the results as a table."""
    show_table(
        ["", "measured", "planned"],
        [
            ["real tokens/s", f"{figures['tokens_per_second']:,.0f}", ""],
            ["seconds a step", f"{figures['step_seconds']:.3f}", f"{figures['planned_step_seconds']:.3f}"],
            ["share of the bf16 product's speed", f"{figures['share_of_peak']:.1%}", ""],
            [
                "GB of the fullest rank",
                f"{figures['memory'] / 1e9:.2f}" if figures["memory"] else "no GPU",
                f"{figures['planned_memory'] / 1e9:.2f}",
            ],
        ],
    )


if __name__ == "__main__":
    main()
