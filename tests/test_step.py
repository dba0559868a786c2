"""One sharded step = one dense step: losses, gradients, and parameters after four steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist import step as step_module
from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
from cllm4rec_dist.checkpointing.format import ADAPTER, Checkpoint, RunState
from cllm4rec_dist.checkpointing.run_folder import STEP
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import OptimizerConfig, RunConfig, validate
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.backbone import load_backbone, load_frozen_embeddings
from cllm4rec_dist.step import learning_rate_factor, train_step
from cllm4rec_dist.system import System, assemble, init_embeddings
from tests.documents import documents_of_step
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks
from tests.reference import DenseRun

STEPS = 4
REPLICATED = {"head.log_temperature", "head.projection", "input_projection"}
PAPER_HEAD = {"similarity": "dot", "item_bias": False, "pool_residual": False}


# Each value is computed by hand: the share of the peak learning rate at a step of a run of twelve steps.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "warm-up": ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}),
    "linear": (
        {"warmup_steps": 4, "schedule": "linear", "min_lr_ratio": 0.0},
        {3: 1.0, 4: 1.0, 5: 0.875, 6: 0.75, 8: 0.5, 11: 0.125},
    ),
    "cosine": (
        {"warmup_steps": 4, "schedule": "cosine", "min_lr_ratio": 0.0},
        {3: 1.0, 4: 1.0, 6: 0.8535533906, 8: 0.5, 10: 0.1464466094, 11: 0.0380602337},
    ),
    "constant": ({"warmup_steps": 2, "schedule": "constant", "min_lr_ratio": 0.5}, {0: 0.5, 1: 1.0, 2: 1.0, 11: 1.0}),
    "linear, to a tenth": (
        {"warmup_steps": 4, "schedule": "linear", "min_lr_ratio": 0.1},
        {4: 1.0, 6: 0.775, 8: 0.55, 11: 0.2125},
    ),
    "cosine, to a tenth": (
        {"warmup_steps": 4, "schedule": "cosine", "min_lr_ratio": 0.1},
        {4: 1.0, 6: 0.8681980515, 8: 0.55, 10: 0.2318019485},
    ),
    "no warm-up": (
        {"warmup_steps": 0, "schedule": "linear", "min_lr_ratio": 0.0},
        {0: 1.0, 3: 0.75, 6: 0.5, 9: 0.25},
    ),
    "a warm-up longer than the run": ({"warmup_steps": 24}, {0: 1 / 24, 5: 0.25, 11: 0.5}),
    "a warm-up as long as the run": ({"warmup_steps": 12, "schedule": "linear"}, {0: 1 / 12, 5: 0.5, 11: 1.0}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_the_schedule(name: str) -> None:
    settings, expected = SCHEDULES[name]
    factors = {step: learning_rate_factor(step, 12, OptimizerConfig(**settings)) for step in expected}
    assert factors == pytest.approx(expected, rel=1e-8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("step")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    return make_corpus(folder / "corpus", catalog, backbone), str(backbone)


def make_config(made: tuple[str, str], stage: str, **changes: Any) -> RunConfig:
    tree = {
        "stage": stage,
        "corpus": made[0],
        "backbone": made[1],
        "output": "unused",
        "batch": {"users": 9, "texts": 7, "gradient_accumulation_steps": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "embeddings": {"init": "prior", "lambda_l": 0.3, "lambda_c": 0.7},
        "head": {"similarity": "cosine"},
        "method": {"max_history": 100},
        "optimizer": {"lr": 1e-2, "embeddings_lr": 5e-3, "warmup_steps": 2, "max_grad_norm": 0.5},
        "shuffle_window": 3,
    } | changes
    return validate(RunConfig, tree, "test")


def sharded(world: World, config: RunConfig, out: str) -> dict[str, Any]:
    """Take four steps and save; return initial rows, losses, norms, and gradients of the first step."""
    system = assemble(config, world)
    init_embeddings(system)
    start = {name: p.detach().clone() for name, p, _ in system.recommender.sharded_parameters() if "head" not in name}
    replicated = system.recommender.replicated_parameters()
    projections = {name: p.detach().clone() for name, p in replicated if name.endswith("projection")}
    torch.manual_seed(3)
    source = BatchLoader(system.corpus, system.prompts, config, world)
    gradients: dict[str, Tensor] = {}
    complete = step_module._complete_gradients

    def spy(system: System) -> Tensor:
        square = complete(system)
        if not gradients:
            for name, parameter in zip(
                system.embedding_optimizer.names, system.embedding_optimizer.parameters, strict=True
            ):
                assert parameter.grad is not None
                gradients[name] = parameter.grad.to_dense().clone()
            gradients.update({f"adapter:{name}": g.clone() for name, g in system.engine.gradients().items()})
        return square

    step_module._complete_gradients = spy
    results = []
    for step in range(STEPS):
        system.train(True)
        batches = source.make(step).micro_batches
        results.append(train_step(system, batches, learning_rate_factor(step, STEPS, config.optimizer)))
    saver = AsyncSaver(Store(out), system, keep=1)
    saver.save(RunState(STEPS), STEP)
    saver.finish()
    return {
        "start": start,
        "projections": projections,
        "losses": [r.losses for r in results],
        "norms": [r.grad_norm for r in results],
        "gradients": gradients,
    }


def dense(
    config: RunConfig, rows_of: dict[str, Tensor], projections: dict[str, Tensor]
) -> tuple[DenseRun, list[dict[str, Any]]]:
    folder = Path(config.backbone)
    backbone = load_backbone(folder, config.adapter, torch.float32, config.seed)
    words = load_frozen_embeddings(folder, torch.float32, torch.device("cpu"))
    corpus = Corpus.open(config.corpus)
    space = TokenSpace(len(words.embedding), config.method.num_user_rows(corpus.num_users), corpus.num_items)
    prompts = PromptBuilder(WordTokenizer.load(folder), space, config.method, config.seed)
    run = DenseRun(config, backbone, words, space, rows_of, projections)
    source = BatchLoader(corpus, prompts, config, alone())
    results = []
    for step in range(STEPS):
        users, texts = documents_of_step(source, step)
        results.append(run.step(users, texts, learning_rate_factor(step, STEPS, config.optimizer)))
    return run, results


CASES = {
    "pretrain-cosine": ("pretrain", {}),
    "finetune-cosine": ("finetune", {}),
    "pretrain-paper-whole": ("pretrain", {"head": PAPER_HEAD, "adapter": {"kind": "full"}}),
    "finetune-paper-rows-only": ("finetune", {"head": PAPER_HEAD, "adapter": {"kind": "none"}}),
}
PROJECTING = {"head": {"similarity": "cosine", "projection": True}}
NARROW = {"init": "prior", "lambda_l": 0.3, "lambda_c": 0.7, "dim": 5}
SLOW_CASES = [(case, size) for size in (2, 3) for case in CASES if (case, size) != ("pretrain-cosine", 2)]


@pytest.mark.parametrize(
    ("case", "size"),
    [("pretrain-cosine", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_sharded_steps_equal_dense_steps(made: tuple[str, str], tmp_path: Path, case: str, size: int) -> None:
    stage, changes = CASES[case]
    assert_same_run(make_config(made, stage, **changes), size, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stage"), [(1, "finetune"), (2, "pretrain"), (3, "finetune")])
def test_steps_with_a_projecting_head_equal_dense_steps(
    made: tuple[str, str], tmp_path: Path, size: int, stage: str
) -> None:
    first = assert_same_run(make_config(made, stage, **PROJECTING), size, tmp_path)
    assert first["head.projection"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "stage", "changes"),
    [
        (1, "pretrain", {"embeddings": NARROW}),
        (2, "finetune", {"embeddings": NARROW, "adapter": {"kind": "full"}, "head": PAPER_HEAD}),
        (3, "finetune", {"embeddings": NARROW | {"init": "spectral"}}),
    ],
)
def test_steps_with_narrow_rows_equal_dense_steps(
    made: tuple[str, str], tmp_path: Path, size: int, stage: str, changes: dict[str, Any]
) -> None:
    first = assert_same_run(make_config(made, stage, **changes), size, tmp_path)
    assert first["collaborative.users"].shape[1] == 5
    for name in ("input_projection", "head.projection"):
        assert first[name].abs().max() > 0


GROUPED = {"init": "spectral", "lambda_l": 0.3, "lambda_c": 0.7}
GROUPS: list[tuple[int, int, str, dict[str, Any]]] = [
    (4, 2, "pretrain", {"embeddings": GROUPED}),
    (4, 2, "finetune", {"embeddings": GROUPED | {"dim": 5}, "optimizer": {"sparse_embedding_updates": False}}),
    (3, 1, "pretrain", {"embeddings": GROUPED, "head": PAPER_HEAD, "adapter": {"kind": "full"}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_shards", "stage", "changes"), GROUPS)
def test_steps_with_copies_of_the_tables_equal_dense_steps(
    made: tuple[str, str], tmp_path: Path, size: int, num_shards: int, stage: str, changes: dict[str, Any]
) -> None:
    """Groups of ranks hold copies of the tables, which have the same bits after four steps (`AsyncSaver.save`)."""
    embeddings = changes["embeddings"] | {"shard_group": num_shards}
    assert_same_run(make_config(made, stage, **changes | {"embeddings": embeddings}), size, tmp_path)


@pytest.mark.slow
def test_rows_that_are_as_wide_as_the_backbone_change_no_bit(made: tuple[str, str], tmp_path: Path) -> None:
    """Losses, norms, gradients and start are equal if the width is set to the backbone's."""
    embeddings = {"init": "spectral", "dropout": 0.3, "lambda_l": 0.3, "lambda_c": 0.7}
    plain, wide = (
        run_ranks(2, sharded, make_config(made, "pretrain", embeddings=embeddings | dim), str(tmp_path / name))
        for name, dim in (("plain", {}), ("wide", {"dim": 16}))
    )
    for one, other in zip(plain, wide, strict=True):
        assert one["projections"] == other["projections"] == {}
        assert (one["losses"], one["norms"]) == (other["losses"], other["norms"])
        for kind in ("start", "gradients"):
            assert one[kind].keys() == other[kind].keys()
            assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stage"), [(1, "finetune"), (2, "finetune"), (3, "pretrain")])
def test_steps_with_a_shared_user_row_equal_dense_steps(tmp_path: Path, size: int, stage: str) -> None:
    catalog = make_catalog(num_users=24)  # 25 rows, not divisible by 2 or 3 ranks
    backbone = make_backbone(tmp_path / "backbone", catalog)
    made = make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)
    config = make_config(made, stage, method={"max_history": 100, "shared_user_ratio": 0.4})
    first = assert_same_run(config, size, tmp_path / "run")
    for name in ("collaborative.users", "content.users"):
        assert first[name].shape[0] == 25
        assert first[name][24].abs().max() > 0, name


def assert_same_run(config: RunConfig, size: int, tmp_path: Path) -> dict[str, Tensor]:
    """Compare four steps on `size` ranks with the dense reference; return the reference's first gradients."""
    ranks = run_ranks(size, sharded, config, str(tmp_path))
    shards = ranks[: config.embeddings.shard_group]  # the first copy of the tables
    for index, rank in enumerate(ranks):
        for kind in ("start", "gradients"):
            copied = shards[index % len(shards)][kind]
            assert all(torch.equal(value, copied[name]) for name, value in rank[kind].items() if ":" not in name)
    start = {name: torch.cat([rank["start"][name] for rank in shards]) for name in ranks[0]["start"]}
    run, results = dense(config, start, ranks[0]["projections"])

    for got, expected in zip(ranks[0]["losses"], results, strict=True):
        for term, value in expected["losses"].items():
            assert got[term] == pytest.approx(value, rel=1e-6), term
    assert ranks[0]["norms"] == pytest.approx([r["norm"] for r in results], rel=1e-5)

    # No parameter is left out of the norm, however small its part: in fp64 each of them is seen.
    parts = [
        g for rank in shards for name, g in rank["gradients"].items() if name not in REPLICATED or rank is ranks[0]
    ]
    parts += [g for rank in ranks[len(shards) :] for name, g in rank["gradients"].items() if ":" in name]
    assert ranks[0]["norms"][0] ** 2 == pytest.approx(sum(g.double().square().sum().item() for g in parts), rel=1e-12)

    first = results[0]["gradients"]
    for name in run.outside():
        parts = [rank["gradients"][name] for rank in shards]
        whole = parts[0] if name in REPLICATED else torch.cat(parts)
        assert_same_gradient(name, whole, first[name])
    for name in run.adapters:
        whole = torch.cat([rank["gradients"][f"adapter:{name}"].flatten() for rank in ranks])[: first[name].numel()]
        assert_same_gradient(name, whole, first[name])

    saved = Checkpoint.open(Store(str(tmp_path)), f"step-{STEPS:08d}")
    parameters = run.rows | {ADAPTER + name: value.flatten() for name, value in run.adapters.items()}
    assert saved.metadata.shapes.keys() - {"anchor"} == run.adapters.keys() - {"anchor"}
    for name, value in parameters.items():
        torch.testing.assert_close(saved.rows(name, len(value), 0, len(value)), value.detach(), rtol=0, atol=2e-5)
    for name, value in saved.replicated().items():
        if name in REPLICATED:
            torch.testing.assert_close(value, run.outside()[name].detach(), rtol=0, atol=2e-5)
    return first


@pytest.mark.slow
def test_a_sampled_softmax_changes_the_loss_and_draws_the_same_again(made: tuple[str, str], tmp_path: Path) -> None:
    losses = []
    popular = {"num_negatives": 4, "negative_sampling": "popularity"}
    for index, sampled in enumerate(({}, {"num_negatives": 4}, {"num_negatives": 4}, popular)):
        config = make_config(made, "pretrain", head={"similarity": "cosine"} | sampled)
        losses.append(run_ranks(2, sharded, config, str(tmp_path / str(index)))[0]["losses"])
    exact, drawn, again, others = losses
    assert drawn == again
    for sample in (drawn, others):
        assert sample[0]["items"] != pytest.approx(exact[0]["items"], rel=1e-4)
        assert sample[0]["items"] == pytest.approx(exact[0]["items"], rel=0.3)
        assert sample[0]["text"] == pytest.approx(exact[0]["text"], rel=1e-6)
    assert others[0]["items"] != drawn[0]["items"]


@pytest.mark.slow
def test_every_deepspeed_file_gives_the_same_run(made: tuple[str, str], tmp_path: Path) -> None:
    """Losses, norms and checkpoint of four steps on two ranks, which hpZ treats as one host each."""
    expected, runs = None, {}
    for path in sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json")):
        tree = json.loads(path.read_text())
        if "zero_hpz_partition_size" in tree["zero_optimization"]:
            tree["zero_optimization"]["zero_hpz_partition_size"] = 2
        file = tmp_path / path.name
        file.write_text(json.dumps(tree))
        folder = tmp_path / path.stem
        (results, _) = run_ranks(2, sharded, make_config(made, "pretrain", deepspeed=str(file)), str(folder))
        saved = Checkpoint.open(Store(str(folder)), f"step-{STEPS:08d}")
        runs[path.name] = results["losses"], results["norms"], saved
    assert len(runs) >= 5
    expected = runs.pop("zero3.json")
    for name, (losses, norms, saved) in runs.items():
        for got, exact in zip(losses, expected[0], strict=True):
            assert got == pytest.approx(exact, rel=1e-6), name
        assert norms == pytest.approx(expected[1], rel=1e-5), name
        for parameter, shape in expected[2].metadata.shapes.items():
            key, count = ADAPTER + parameter, math.prod(shape)
            torch.testing.assert_close(
                saved.rows(key, count, 0, count), expected[2].rows(key, count, 0, count), rtol=0, atol=1e-6
            )


def assert_same_gradient(name: str, got: Tensor, expected: Tensor) -> None:
    """Compare to 1e-6 of the largest entry, because fp32 sums are rounded in another order; a scalar's terms cancel."""
    allowed = 1e-5 if expected.dim() == 0 else 1e-6
    assert (got.view_as(expected) - expected).abs().max() <= allowed * expected.abs().max() + 1e-9, name


OPTIONS = {
    "plain": {},
    "host": {"optimizer": {"embeddings_state": "cpu"}},
    "packed": {"optimizer": {"embeddings_state": "int8"}},
    "bf16": {"embeddings": {"comm_dtype": "bf16"}},
    "bf16 softmax": {"head": {"compute_dtype": "bf16"}},
}


def losses_by_option(world: World, config: RunConfig) -> dict[str, list[dict[str, float]]]:
    """Losses of four steps from equal weights, by option."""
    results = {}
    for name, changes in OPTIONS.items():
        tree = config.model_dump()
        for section, values in changes.items():
            tree[section] |= values
        changed = validate(RunConfig, tree, "test")
        system = assemble(changed, world)
        init_embeddings(system)
        source = BatchLoader(system.corpus, system.prompts, changed, world)
        system.train(True)
        results[name] = [train_step(system, source.make(n).micro_batches, 1.0).losses for n in range(STEPS)]
    return results


@pytest.mark.slow
def test_options_of_tables_hardly_change_a_run(tmp_path: Path) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog, hidden_size=64)
    config = make_config((make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)), "pretrain")
    (results, _) = run_ranks(2, losses_by_option, config)
    plain = results["plain"]
    assert results["host"] == plain
    # Inputs are rounded by 1 in 256, and moments by 1 % from the second step on. Both errors grow, because Adam's first
    # steps depend on the signs of gradients, also of those near zero.
    assert results["packed"][0] == plain[0]
    # A softmax in bf16 rounds all gradients of the head, so that its steps differ sooner.
    for name, allowed in (("bf16", 0.03), ("packed", 0.03), ("bf16 softmax", 0.05)):
        assert results[name] != plain, name
        for step, (losses, expected) in enumerate(zip(results[name], plain, strict=True)):
            for term in ("items", "text", "mutual"):
                assert losses[term] == pytest.approx(expected[term], rel=allowed if step else 1 / 256), (
                    name,
                    step,
                    term,
                )
