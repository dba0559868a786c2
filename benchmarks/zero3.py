"""Effect of ZeRO-3's settings on the time of a step and on communication.

    python -m benchmarks.zero3                         a LLaMA of 4 layers x 256 with adapters, 4 gloo ranks of one core

Each line changes one setting of `ds_configs/zero3.json`. A step has two micro-batches with forward and backward of the
backbone alone, over random embeddings. Losses must not differ. Bytes are those that rank 0 sends (see `measured.py`).
`cllm4rec plan` shows the memory.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import parser, show_table, write_json
from benchmarks.measured import SentBytes
from cllm4rec_dist.config import AdapterConfig, BackboneConfig, RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, resolve_settings, sharded_loading, start_world
from cllm4rec_dist.model.backbone import load_backbone
from cllm4rec_dist.model.build_backbone import build_backbone

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, dict[str, Any]] = {
    "as committed": {},
    "nothing kept between uses": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0},
    "no prefetch": {"stage3_prefetch_bucket_size": 0},
    "everything persistent": {"stage3_param_persistence_threshold": 10**9},
    "hpZ over 2 ranks": {"zero_hpz_partition_size": 2},
    "weights offloaded": {"offload_param": {"device": "cpu", "pin_memory": False}},
}
MICRO_BATCHES = 2


def run(rank: int, size: int, chosen: Namespace, name: str, folder: str) -> None:
    """Train some steps with one variant, and write the results."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": chosen.port}
    world = start_world()
    tree = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    tree["zero_optimization"] |= VARIANTS[name]
    path = Path(folder, f"{rank}.json")
    path.write_text(json.dumps(tree))
    settings = resolve_settings(
        validate(
            RunConfig,
            {
                "stage": "pretrain",
                "corpus": "-",
                "backbone": "-",
                "output": "-",
                "deepspeed": str(path),
                "batch": {"gradient_accumulation_steps": MICRO_BATCHES},
            },
            "benchmark",
        )
    )
    with sharded_loading(settings):
        dual = load_backbone(Path(folder, "backbone"), AdapterConfig(rank=8), torch.float32, 0)
    trained = [parameter for parameter in dual.parameters() if parameter.requires_grad]
    engine = Engine(dual, settings, torch.optim.AdamW(trained, lr=0.0), dual.layers)
    engine.train(True)

    def step(index: int) -> float:
        total = 0.0
        for part in range(MICRO_BATCHES):
            random = torch.Generator().manual_seed(index * 1000 + part * 100 + rank)
            embeddings = torch.randn(chosen.rows, chosen.length, chosen.hidden, generator=random).requires_grad_()
            loss = engine(embeddings, None, embeddings.shape[:2].numel() // 2)[..., 0].square().mean()
            engine.backward(loss)
            engine.step(1e-3)
            total += loss.item()
        return total

    losses = [step(index) for index in range(2)]
    with SentBytes(world) as traffic:
        losses.append(step(2))
    taken = []
    for index in range(chosen.repeats):
        dist.barrier()
        started = time.perf_counter()
        losses.append(step(3 + index))
        taken.append(time.perf_counter() - started)
    if rank == 0:
        results = {"seconds": taken, "sent": traffic.num_bytes, "losses": losses}
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    options = parser("zero3", __doc__)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--rows", type=int, default=4, help="of a micro-batch of a rank (%(default)s)")
    options.add_argument("--length", type=int, default=64, help="tokens of a row (%(default)s)")
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--port", default="29611")
    chosen = options.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = BackboneConfig(
            family="llama", hidden_size=chosen.hidden, num_layers=chosen.layers, num_heads=4, vocab_size=500
        )
        build_backbone(settings, ["a few words"], Path(folder, "backbone"))
        for name in VARIANTS:
            mp.start_processes(run, (chosen.ranks, chosen, name, folder), nprocs=chosen.ranks, start_method="fork")
            figures[name] = json.loads(Path(folder, "results.json").read_text())
    first = figures["as committed"]
    rows = []
    for name, result in figures.items():
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(first["losses"]), msg=name)
        low, high = min(result["seconds"]), max(result["seconds"])
        median = statistics.median(result["seconds"])
        rows.append(
            [
                name,
                f"{median * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})",
                f"{median / statistics.median(first['seconds']):.2f}",
                f"{result['sent'] / 1e6:.2f}",
            ]
        )
    show_table(["ZeRO-3 setting", "step (ms)", "of the first", "MB from a rank"], rows)
    write_json(chosen.json, figures)


if __name__ == "__main__":
    main()
