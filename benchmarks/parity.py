"""CPU and GPU compared: operators, and a few steps of each kind of run.

    python -m benchmarks.parity             everything; status 1 if anything differs
    python -m benchmarks.parity nf4 bf16    only steps whose name contains one of these words

Each run of steps is a process of its own, because DeepSpeed chooses its device when it is imported: one without GPUs,
and two with one, to see whether they repeat bit for bit. Without a GPU all of them compute on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, ROOT, parser, show, show_table, write_json
from cllm4rec_dist.config import HeadConfig, RunConfig, validate
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.evaluation.sharded_topk import sharded_topk
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer, Storage
from cllm4rec_dist.model.linear_cross_entropy import chunked_logsumexp_and_scores
from cllm4rec_dist.model.recommender import Recommender, keyed_dropout
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding, route_ids, start_lookup

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
STEPS = 3
KINDS = ("cpu", "gpu", "again")
"""Processes of a run."""
TIMEOUT = 180.0
"""Seconds for a process's steps."""
Differences = dict[str, float]
"""Largest difference, relative to the largest entry, of each result."""


def difference(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest entry of `exact`."""
    found, exact = found.detach().to(CPU, torch.float64), exact.detach().to(CPU, torch.float64)
    return float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def item_head(dtype: torch.dtype, width: int) -> Differences:
    """Log-sum-exps, scores and gradients of the item head, against fp64 on the same numbers."""
    queries, weight = (randn(n, width, seed=n).mul_(0.3).to(dtype) for n in (300, 5000))
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(300, (700,), generator=random), torch.randint(5000, (700,), generator=random)
    results = []
    for device, computed in ((CPU, torch.float64), (DEVICE, dtype)):
        leaf_queries, leaf_weight = (x.to(device, computed).requires_grad_() for x in (queries, weight))
        target_query, target_row = (t.to(device) for t in targets)
        lse, scores = chunked_logsumexp_and_scores(leaf_queries, leaf_weight, target_query, target_row, 300 * 777)
        (lse.sum() * 0.5 - scores.sum()).backward()
        assert leaf_queries.grad is not None
        assert leaf_weight.grad is not None
        results.append([lse, scores, leaf_queries.grad, leaf_weight.grad])
    names = ("log-sum-exp", "scores", "query gradient", "row gradient")
    return {name: difference(found, exact) for name, exact, found in zip(names, *results, strict=True)}


def sampled_softmax() -> Differences:
    """Losses with sampled negatives, whose draws must not depend on the device."""
    queries, weight = randn(50, 64) * 0.3, randn(2000, 64, seed=1) * 0.3
    targets = torch.randint(2000, (50,), generator=torch.Generator().manual_seed(2))
    losses = []
    for device in (CPU, DEVICE):
        world, partition = World(0, 1, 0, device), RowPartition(2000, 1)
        gathering = GatheringQueries(
            queries.to(device), torch.arange(50, device=device), targets.to(device), partition, world
        )
        key = torch.tensor(7, device=device)
        losses.append(sharded_cross_entropy(gathering, weight.to(device), 300, key))
    return {"loss": difference(losses[1], losses[0])}


def topk() -> Differences:
    """Scores and items of the best, without seen ones, against a dense ranking in fp64."""
    queries, weight = randn(600, 64), randn(30_000, 64, seed=1)
    random = torch.Generator().manual_seed(2)
    seen = torch.stack([torch.arange(600).repeat_interleave(5), torch.randint(30_000, (3000,), generator=random)], 1)
    world, partition = World(0, 1, 0, DEVICE), RowPartition(30_000, 1)
    scores, rows = sharded_topk(
        queries.to(DEVICE), weight.to(DEVICE), 100, seen.to(DEVICE), partition, world, 600 * 3000
    )
    exact = queries.double() @ weight.double().T
    exact[seen[:, 0], seen[:, 1]] = -math.inf
    best = exact.topk(100, dim=1)
    others = (rows.to(CPU).sort(dim=1).values != best.indices.sort(dim=1).values).double().mean()
    return {"scores": difference(scores, best.values), "share of other items": float(others)}


def table_adam(storage: Storage, *, sparse: bool) -> Differences:
    """Four updates of a table with its moments in each storage, against fp32 moments on the CPU."""
    gradients = [randn(5000, 128, seed=i) * 10.0 ** (i - 3) for i in range(4)]
    touched = torch.randperm(5000, generator=torch.Generator().manual_seed(9))[:300].sort().values

    def update(device: torch.device, storage: Storage) -> Tensor:
        model = Recommender(
            5000,
            1,
            FrozenEmbeddings(*torch.zeros(2, 1, 128, device=device)),
            HeadConfig(similarity="dot", item_bias=False),
            World(0, 1, 0, device),
            dropout=0.0,
            comm_dtype=torch.float32,
            sparse_gradients=sparse,
            content=False,
        )
        optimizer = EmbeddingOptimizer(model, (0.9, 0.999), storage)
        rows = dict(zip(optimizer.names, optimizer.parameters, strict=True))["collaborative.users"]
        for gradient in gradients:
            if sparse:
                values = gradient[touched].to(device)
                gradient = torch.sparse_coo_tensor(touched[None].to(device), values, gradient.shape).coalesce()
            rows.grad = gradient.to(device)
            optimizer.step(1e-2)
        return rows.detach()

    return {"rows": difference(update(DEVICE, storage), update(CPU, "fp32"))}


def dropout_masks() -> Differences:
    """Dropout drawn from keys, which must be the same on every device."""
    keys, positions = torch.arange(500) * 0x1234567890ABCDE, torch.arange(500)
    masks = [keyed_dropout(torch.ones(500, 96, device=d), keys.to(d), positions.to(d), 0.3) for d in (CPU, DEVICE)]
    return {"masks": difference(masks[1], masks[0])}


def lookup(*, sparse: bool) -> Differences:
    """Gradient of a table's rows from a lookup with repeated ids."""
    rows, ids = randn(100, 32), torch.randint(100, (400,), generator=torch.Generator().manual_seed(2))
    gradients = []
    for device in (CPU, DEVICE):
        world = World(0, 1, 0, device)
        table = RowShardedEmbedding(100, 32, world, sparse_gradients=sparse)
        table.local_rows.data.copy_(rows)
        (route,) = route_ids([{"table": ids}], {"table": table.partition}, world)
        (found,) = start_lookup({"table": table}, route, torch.float32).wait().values()
        (found * torch.arange(400, device=device)[:, None]).sum().backward()
        assert table.local_rows.grad is not None
        gradients.append(table.local_rows.grad.to_dense())
    return {"row gradient": difference(gradients[1], gradients[0])}


OPERATORS: dict[str, tuple[Callable[[], Differences], float]] = {
    "item head, fp32, width 129": (partial(item_head, torch.float32, 129), 1e-4),
    "item head, bf16, width 128": (partial(item_head, torch.bfloat16, 128), 2e-2),
    "item head, bf16, width 129": (partial(item_head, torch.bfloat16, 129), 2e-2),
    "sampled softmax": (sampled_softmax, 1e-4),
    "top-k": (topk, 1e-4),
    **{
        f"Adam of a table, {storage}, {'sparse' if sparse else 'dense'}": (
            partial(table_adam, storage, sparse=sparse),
            5e-2 if storage == "int8" else 1e-4,
        )
        for storage in ("fp32", "cpu", "int8")
        for sparse in (True, False)
    },
    "dropout masks": (dropout_masks, 0.0),
    "lookup, sparse gradient": (partial(lookup, sparse=True), 1e-5),
    "lookup, dense gradient": (partial(lookup, sparse=False), 1e-5),
}
"""What is compared, and the largest difference allowed."""

_LR = {"lr": 1e-3, "embeddings_lr": 1e-3, "warmup_steps": 1, "max_grad_norm": 0.5}
_BF16 = {"optimizer": _LR, "precision": "bf16"}
_SAVED = {"saves": True}
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "pretrain, fp32": ({"optimizer": _LR, **_SAVED}, 1e-3),
    "finetune, fp32": ({"stage": "finetune", "optimizer": _LR}, 1e-3),
    "finetune, fp32, projection": ({"stage": "finetune", "optimizer": _LR, "head": {"projection": True}}, 1e-3),
    "pretrain, fp32, item softmax in bf16": ({"optimizer": _LR, "head": {"compute_dtype": "bf16"}}, 5e-2),
    "pretrain, fp32, narrow rows": ({"optimizer": _LR, "embeddings": {"init": "prior", "dim": 24}}, 1e-3),
    "pretrain, fp32, deterministic": ({"optimizer": _LR, "deterministic": True}, 1e-3),
    "finetune, fp32, deterministic": ({"stage": "finetune", "optimizer": _LR, "deterministic": True}, 1e-3),
    "finetune, fp32, shared words, deterministic": (
        {"stage": "finetune", "optimizer": _LR | {"words_lr_ratio": 2.0}, "deterministic": True, **_SAVED},
        1e-3,
    ),
    "pretrain, fp32, moments on the host": ({"optimizer": _LR | {"embeddings_state": "cpu"}, **_SAVED}, 1e-3),
    "pretrain, fp32, 8-bit moments": ({"optimizer": _LR | {"embeddings_state": "int8"}}, 5e-2),
    "pretrain, bf16, checkpointed, bf16 on the wire": (
        {**_BF16, "activation_checkpointing": True, "embeddings": {"init": "prior", "comm_dtype": "bf16"}},
        5e-2,
    ),
    "pretrain, bf16, offload.json": ({**_BF16, "deepspeed": str(ROOT / "ds_configs/offload.json"), **_SAVED}, 5e-2),
    "pretrain, bf16, one-gpu.json": ({**_BF16, "deepspeed": str(ROOT / "ds_configs/one-gpu.json")}, 5e-2),
    "pretrain, bf16, nf4": ({**_BF16, "quantization": "nf4"}, 2e-1),
    "finetune, bf16, rows only, sampled": (
        {**_BF16, "stage": "finetune", "adapter": {"kind": "none"}, "head": {"num_negatives": 9}},
        5e-2,
    ),
}
"""Changes to a small run, and the largest difference of losses and of the first gradient norm that is allowed."""


def make_config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """Configuration of a small run on the corpus and the backbone in `folder`."""
    tree = {
        "stage": "pretrain",
        "corpus": str(folder / "corpus"),
        "backbone": str(folder / "backbone"),
        "output": str(folder / "run"),
        "batch": {"users": 9, "texts": 7, "gradient_accumulation_steps": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "embeddings": {"init": "prior", "lambda_l": 0.3, "lambda_c": 0.7},
        "method": {"max_history": 100},
        "shuffle_window": 3,
    }
    return validate(RunConfig, tree | changes, "benchmark")


def run_steps(folder: Path, changes: dict[str, Any], out: Path) -> None:
    """Take the steps of one run on this process's device and save losses, norms, metrics and weights.

    With `saves` in the changes the run is also saved and resumed, and must then have the same weights and moments; with
    `deterministic` torch's deterministic algorithms are used.
    """
    from cllm4rec_dist.corpus.loader import BatchLoader
    from cllm4rec_dist.distributed.engine import start_world
    from cllm4rec_dist.evaluation.mixing import LLM_ALONE
    from cllm4rec_dist.evaluation.topk import evaluate
    from cllm4rec_dist.step import train_step
    from cllm4rec_dist.system import assemble, init_embeddings

    saves = changes.pop("saves", False)
    torch.use_deterministic_algorithms(changes.pop("deterministic", False))
    config, world = make_config(folder, changes), start_world()
    with world.watch:
        system = assemble(config, world)
        init_embeddings(system)
        loader = BatchLoader(system.corpus, system.prompts, config, world)
        results = []
        for number in range(STEPS):
            torch.manual_seed(number)
            system.train(True)
            batches = loader.make(number).micro_batches
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if world.device.type == "cuda" and number == STEPS - 1:
                    torch.cuda.set_sync_debug_mode("warn")
                results.append(train_step(system, batches, 1.0))
                if world.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            syncs = Counter(_site(warning) for warning in caught if "synchroniz" in str(warning.message))
        if saves:
            _require_equal_after_resume(system, Path(f"{out}-checkpoint"))
        rows = {name: p.detach().cpu() for name, p, _ in system.recommender.sharded_parameters()}
        engine = {name: weight.cpu() for name, weight in system.engine.weights().items()}
        (metrics,) = evaluate(system, "valid", ["recall@5", "ndcg@10"], 8, [LLM_ALONE])
    figures = {
        "losses": [result.losses for result in results],
        "norms": [result.grad_norm for result in results],
        "metrics": {name: float(value) for name, value in metrics.result().mean.items()},
        "syncs": dict(syncs.most_common()),
        "weights": rows | {f"engine.{name}": weight for name, weight in engine.items()},
    }
    torch.save(figures, out)


def _site(warning: warnings.WarningMessage) -> str:
    """File and line that a warning is about, by package."""
    parts = Path(warning.filename).parts
    return f"{'/'.join(parts[-2:])}:{warning.lineno}"


def _require_equal_after_resume(system: Any, folder: Path) -> None:
    """Save, resume into a new system, and compare weights and moments bit for bit."""
    from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
    from cllm4rec_dist.checkpointing.checkpoint import resume
    from cllm4rec_dist.checkpointing.format import RunState
    from cllm4rec_dist.checkpointing.run_folder import STEP
    from cllm4rec_dist.checkpointing.store import Store
    from cllm4rec_dist.system import assemble

    store = Store(str(folder))
    saver = AsyncSaver(store, system, keep=1)
    saver.save(RunState(STEPS), STEP)
    saver.finish()
    again = assemble(system.config, system.world)
    assert resume(again, store, [f"{STEP}{STEPS:08d}"], lambda _: None) is not None
    for (name, saved, _), (_, loaded, _) in zip(
        system.recommender.sharded_parameters(), again.recommender.sharded_parameters(), strict=True
    ):
        assert torch.equal(saved, loaded), f"{name} differs after resuming"
    ours, theirs = system.engine.moments(), again.engine.moments()
    for name, moments in ours.items():
        for key, value in moments.items():
            assert torch.equal(value, theirs[name][key]), f"{key} of {name} differs after resuming"


def compare_operator(operator: Callable[[], Differences]) -> tuple[Differences, dict[str, Any]]:
    """Run an operator on both devices, as `compare_run`."""
    return operator(), {}


def compare_run(folder: Path, name: str, changes: dict[str, Any]) -> tuple[Differences, dict[str, Any]]:
    """Run the steps on the CPU and twice on the GPU.

    Returns:
        Differences between CPU and GPU, and what else was found.
    """
    processes = {}
    for kind in KINDS:
        base = folder / f"{kind}-{''.join(c if c.isalnum() else '-' for c in name)}"
        env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS needs it to be deterministic
        env |= {"OMP_NUM_THREADS": "1"}  # as many processes as there are cores run at once
        env |= {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {}
        command = [sys.executable, "-m", "benchmarks.parity", "--steps", str(base), json.dumps(changes)]
        command += ["--folder", str(folder)]
        log = base.with_suffix(".log").open("w")
        processes[kind] = base, subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
    try:
        for kind, (base, process) in processes.items():
            if process.wait(timeout=TIMEOUT):
                tail = base.with_suffix(".log").read_text().splitlines()[-15:]
                raise RuntimeError("\n    ".join([f"{kind}: status {process.returncode}", *tail]))
    finally:
        for _, process in processes.values():
            process.kill()
    cpu, gpu, again = (torch.load(base, weights_only=True) for base, _ in processes.values())
    found = {f"loss {i}": _largest(a, b) for i, (a, b) in enumerate(zip(cpu["losses"], gpu["losses"], strict=True))}
    found["norm"] = abs(cpu["norms"][0] - gpu["norms"][0]) / cpu["norms"][0]
    identical = all(torch.equal(weight, again["weights"][key]) for key, weight in gpu["weights"].items())
    rows = max(difference(gpu["weights"][key], weight) for key, weight in cpu["weights"].items())
    return found, {
        "weights": rows,
        "repeats bit for bit": identical,
        "host syncs a step": sum(gpu["syncs"].values()),
        "sites": gpu["syncs"],
    }


def _largest(exact: dict[str, float], found: dict[str, float]) -> float:
    return max(abs(exact[key] - found[key]) / max(abs(exact[key]), 1e-6) for key in exact)


def make_data(folder: Path) -> None:
    """Make a small corpus and a small LLaMA."""
    from tests.harness import make_backbone, make_catalog, make_corpus

    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog, family="llama", hidden_size=64, num_heads=2)
    make_corpus(folder / "corpus", catalog, backbone)


def main() -> None:
    options = parser("parity", __doc__)
    options.add_argument(
        "words", nargs="*", help="compare only steps whose name contains one of these; all if left out"
    )
    options.add_argument("--folder", type=Path, help="for corpus, backbone and logs; temporary if left out")
    options.add_argument("--steps", nargs=2, metavar=("OUT", "CHANGES"), help="take the steps of one run (internal)")
    chosen = options.parse_args()
    if chosen.steps:
        run_steps(chosen.folder, json.loads(chosen.steps[1]), Path(chosen.steps[0]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare_all(chosen.folder or Path(temporary), chosen.words)
    if DEVICE == CPU and chosen.json == RESULTS / "parity.json":
        show("Nothing is written, because both sides were the CPU: this machine has no GPU.")
    else:
        write_json(chosen.json, {"device": str(DEVICE), "results": figures})
    if any(not figure["fine"] for figure in figures.values()):
        raise SystemExit(1)


def compare_all(folder: Path, words: list[str]) -> dict[str, dict[str, Any]]:
    """Compare all operators and the chosen runs, and show each result."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus").exists():
        make_data(folder)
    figures: dict[str, dict[str, Any]] = {}

    def record(name: str, allowed: float, compare: Callable[[], tuple[Differences, dict[str, Any]]]) -> None:
        try:
            found, more = compare()
        except Exception as error:  # the others are still compared
            show(f"FAILED {name}: {traceback.format_exc(limit=-3)}")
            figures[name] = {"fine": False, "error": str(error)}
            return
        worst = max(found, key=lambda key: found[key])
        fine = found[worst] <= allowed
        figures[name] = {"fine": fine, "allowed": allowed, "differences": found, **more}
        more = {key: f"{value:.1e}" if isinstance(value, float) else value for key, value in more.items()}
        others = "".join(f"; {key} {value}" for key, value in more.items() if not isinstance(value, dict))
        show(f"{'equal  ' if fine else 'DIFFERS'} {name}: {worst} {found[worst]:.1e} (allowed {allowed:.0e}){others}")

    if not words:
        for name, (operator, allowed) in OPERATORS.items():
            record(name, allowed, partial(compare_operator, operator))
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // len(KINDS))) as pool:
        for name, (changes, allowed) in RUNS.items():
            if not words or any(word in name for word in words):
                pool.submit(record, name, allowed, partial(compare_run, folder, name, changes))
    equal = sum(figure["fine"] for figure in figures.values())
    show_table(["compared with", "compared", "equal"], [[DEVICE, len(figures), equal]])
    return figures


if __name__ == "__main__":
    main()
