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
from cllm4rec_dist.config import RunConfig, validate
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
PAPER_HEAD = {"similarity": "dot", "item_bias": False, "pool_residual": False}


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
    """Four steps; losses, norms, whole gradients of the first step, and parameters as a checkpoint has them."""
    system = assemble(config, world)
    init_embeddings(system)
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
    for number in range(STEPS):
        system.train(True)
        batches = source.make(number).micro_batches
        results.append(train_step(system, batches, learning_rate_factor(number, STEPS, config.optimizer)))
    saver = AsyncSaver(Store(out), system, keep=1)
    saver.save(RunState(STEPS), STEP)
    saver.finish()
    return {
        "losses": [r.losses for r in results],
        "norms": [r.grad_norm for r in results],
        "gradients": gradients,
    }


def dense(config: RunConfig, rows_of: dict[str, Tensor]) -> tuple[DenseRun, list[dict[str, Any]]]:
    folder = Path(config.backbone)
    backbone = load_backbone(folder, config.adapter, torch.float32, config.seed)
    words = load_frozen_embeddings(folder, torch.float32, torch.device("cpu"))
    corpus = Corpus.open(config.corpus)
    space = TokenSpace(len(words.embedding), config.method.num_user_rows(corpus.num_users), corpus.num_items)
    prompts = PromptBuilder(WordTokenizer.load(folder), space, config.method, config.seed)
    run, source = DenseRun(config, backbone, words, space, rows_of), BatchLoader(corpus, prompts, config, alone())
    results = []
    for number in range(STEPS):
        users, texts = documents_of_step(source, number)
        results.append(run.step(users, texts, learning_rate_factor(number, STEPS, config.optimizer)))
    return run, results


def start_of(world: World, config: RunConfig) -> dict[str, Tensor]:
    system = assemble(config, world)
    init_embeddings(system)
    return {name: p.detach().clone() for name, p, _ in system.recommender.sharded_parameters() if "head" not in name}


CASES = {
    "pretrain-cosine": ("pretrain", {}),
    "finetune-cosine": ("finetune", {}),
    "pretrain-paper-whole": ("pretrain", {"head": PAPER_HEAD, "adapter": {"kind": "full"}}),
    "finetune-paper-rows-only": ("finetune", {"head": PAPER_HEAD, "adapter": {"kind": "none"}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_equal_dense_steps(made: tuple[str, str], tmp_path: Path, case: str, size: int) -> None:
    stage, changes = CASES[case]
    assert_same_run(make_config(made, stage, **changes), size, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stage"), [(1, "finetune"), (2, "finetune"), (3, "pretrain")])
def test_steps_with_a_shared_user_row_equal_dense_steps(tmp_path: Path, size: int, stage: str) -> None:
    catalog = make_catalog(num_users=24)  # 25 rows, which neither 2 nor 3 ranks share evenly
    backbone = make_backbone(tmp_path / "backbone", catalog)
    made = make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)
    config = make_config(made, stage, method={"max_history": 100, "shared_user_ratio": 0.4})
    first = assert_same_run(config, size, tmp_path / "run")
    for name in ("collaborative.users", "content.users"):
        assert first[name].shape[0] == 25
        assert first[name][24].abs().max() > 0, name


def assert_same_run(config: RunConfig, size: int, tmp_path: Path) -> dict[str, Tensor]:
    """Hold four steps on `size` ranks against the dense reference; the reference's gradients of the first step."""
    ranks = run_ranks(size, sharded, config, str(tmp_path))
    run, results = dense(config, run_ranks(1, start_of, config)[0])

    for got, wanted in zip(ranks[0]["losses"], results, strict=True):
        for term, value in wanted["losses"].items():
            assert got[term] == pytest.approx(value, rel=1e-6), term
    assert ranks[0]["norms"] == pytest.approx([r["norm"] for r in results], rel=1e-5)

    first = results[0]["gradients"]
    for name in run.outside():
        parts = [rank["gradients"][name] for rank in ranks]
        whole = parts[0] if name == "head.log_temperature" else torch.cat(parts)
        assert_same_gradient(name, whole, first[name])
    for name in run.adapters:
        whole = torch.cat([rank["gradients"][f"adapter:{name}"].flatten() for rank in ranks])[: first[name].numel()]
        assert_same_gradient(name, whole, first[name])

    saved = Checkpoint.open(Store(str(tmp_path)), f"step-{STEPS:08d}")
    parameters = run.rows | {ADAPTER + name: value.flatten() for name, value in run.adapters.items()}
    assert saved.metadata.shapes.keys() - {"anchor"} == run.adapters.keys() - {"anchor"}
    for name, value in parameters.items():
        torch.testing.assert_close(saved.rows(name, len(value), 0, len(value)), value.detach(), rtol=0, atol=2e-5)
    return first


@pytest.mark.slow
def test_a_sampled_softmax_changes_the_loss_and_draws_the_same_again(made: tuple[str, str], tmp_path: Path) -> None:
    losses = []
    for number, sampled in enumerate((0, 4, 4)):
        config = make_config(made, "pretrain", head={"similarity": "cosine", "num_negatives": sampled})
        losses.append(run_ranks(2, sharded, config, str(tmp_path / str(number)))[0]["losses"])
    exact, drawn, again = losses
    assert drawn == again
    assert drawn[0]["items"] != pytest.approx(exact[0]["items"], rel=1e-4)
    assert drawn[0]["items"] == pytest.approx(exact[0]["items"], rel=0.3)
    assert drawn[0]["text"] == pytest.approx(exact[0]["text"], rel=1e-6)


@pytest.mark.slow
def test_every_deepspeed_file_gives_the_same_run(made: tuple[str, str], tmp_path: Path) -> None:
    """Losses, norms, and what is saved after four steps on two ranks, which are two hosts of one rank for hpZ."""
    wanted, runs = None, {}
    for path in sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json")):
        tree = json.loads(path.read_text())
        if "zero_hpz_partition_size" in tree["zero_optimization"]:
            tree["zero_optimization"]["zero_hpz_partition_size"] = 2
        file = tmp_path / path.name
        file.write_text(json.dumps(tree))
        folder = tmp_path / path.stem
        (found, _) = run_ranks(2, sharded, make_config(made, "pretrain", deepspeed=str(file)), str(folder))
        saved = Checkpoint.open(Store(str(folder)), f"step-{STEPS:08d}")
        runs[path.name] = found["losses"], found["norms"], saved
    assert len(runs) >= 5
    wanted = runs.pop("zero3.json")
    for name, (losses, norms, saved) in runs.items():
        for got, exact in zip(losses, wanted[0], strict=True):
            assert got == pytest.approx(exact, rel=1e-6), name
        assert norms == pytest.approx(wanted[1], rel=1e-5), name
        for parameter, shape in wanted[2].metadata.shapes.items():
            key, count = ADAPTER + parameter, math.prod(shape)
            torch.testing.assert_close(
                saved.rows(key, count, 0, count), wanted[2].rows(key, count, 0, count), rtol=0, atol=1e-6
            )


def assert_same_gradient(name: str, got: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-6 of the largest entry: what is left is the rounding of fp32 sums in another order."""
    assert (got.view_as(wanted) - wanted).abs().max() <= 1e-6 * wanted.abs().max() + 1e-9, name


OPTIONS = {
    "plain": {},
    "host": {"optimizer": {"embeddings_state": "cpu"}},
    "packed": {"optimizer": {"embeddings_state": "int8"}},
    "wire": {"embeddings": {"comm_dtype": "bf16"}},
}


def losses_by_option(world: World, config: RunConfig) -> dict[str, list[dict[str, float]]]:
    """Of four steps from the same start under every option."""
    found = {}
    for name, changes in OPTIONS.items():
        tree = config.model_dump()
        for section, values in changes.items():
            tree[section] |= values
        changed = validate(RunConfig, tree, "test")
        system = assemble(changed, world)
        init_embeddings(system)
        source = BatchLoader(system.corpus, system.prompts, changed, world)
        system.train(True)
        found[name] = [train_step(system, source.make(n).micro_batches, 1.0).losses for n in range(STEPS)]
    return found


@pytest.mark.slow
def test_options_of_tables_change_a_run_as_little_as_they_say(tmp_path: Path) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog, hidden_size=64)
    config = make_config((make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)), "pretrain")
    (found, _) = run_ranks(2, losses_by_option, config)
    plain = found["plain"]
    assert found["host"] == plain
    # A rounding of 1 in 256 at the input, and 1 % of a moment from the second step on. Both grow from there, because
    # Adam's first steps go by the signs of gradients, those near zero included.
    assert found["packed"][0] == plain[0]
    for name in ("wire", "packed"):
        assert found[name] != plain, name
        for number, (step, wanted) in enumerate(zip(found[name], plain, strict=True)):
            for term in ("items", "text", "mutual"):
                assert step[term] == pytest.approx(wanted[term], rel=0.03 if number else 1 / 256), (name, number, term)
