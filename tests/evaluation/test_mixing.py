"""The weight of the linear memory: chosen on validation, stored with the run, and used by who reads the run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation import mixing
from cllm4rec_dist.evaluation.inference import evaluate_run
from cllm4rec_dist.evaluation.mixing import choose_weight, score_ratio
from cllm4rec_dist.evaluation.sharded_topk import LINEAR_ALONE, LLM_ALONE
from cllm4rec_dist.evaluation.topk import evaluate
from cllm4rec_dist.evaluation.trained_run import load_local
from cllm4rec_dist.system import InferenceSystem
from tests.harness import run_ranks
from tests.training import Made, make_config, metrics, refused, run

METRICS = ["recall@5", "ndcg@10"]
NO_VALIDATION = {"every_epochs": 0}


@pytest.fixture(scope="module")
def system(runs: dict[str, Path]) -> InferenceSystem:
    return load_local(str(runs["cosine"]), torch.device("cpu"))[0]


def test_the_best_weight_of_the_grid_is_chosen_and_both_parts_are_reported(system: InferenceSystem) -> None:
    ratio = score_ratio(system, "valid", 5)
    assert ratio > 0
    exponents = [*mixing._EXPONENTS, *mixing._LARGER_EXPONENTS]
    grid = [0.0, *(ratio * 2.0**exponent for exponent in exponents)]
    values = [part.result().mean for part in evaluate(system, "valid", METRICS, 5, [*grid, LINEAR_ALONE])]
    chosen = choose_weight(system, "valid", METRICS, 5)
    best = int(np.argmax([value["recall@5"] for value in values[:-1]]))
    assert (chosen.weight, chosen.metrics) == (pytest.approx(grid[best]), values[best])
    assert (chosen.llm, chosen.linear) == (values[0], values[-1])
    assert chosen.parts.keys() == {"llm", "linear"}


def test_larger_weights_are_tried_where_the_largest_of_the_grid_is_the_best(
    system: InferenceSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a memory that is much better than the LLM is held back by the grid's edge, and so are the lists."""
    ratio = score_ratio(system, "valid", 5)
    weights = [0.0, *(ratio * 2.0**exponent for exponent in range(-6, 9))]
    values = [part.result().mean["recall@5"] for part in evaluate(system, "valid", METRICS, 5, weights)]
    best = weights[int(np.argmax(values))]
    assert best > 0.0, "the case needs a memory that helps"
    # A grid that ends below the best weight goes on to it; one that does not reach its end is not continued.
    exponent = round(np.log2(best / ratio))
    monkeypatch.setattr(mixing, "_EXPONENTS", range(exponent - 2, exponent))
    monkeypatch.setattr(mixing, "_LARGER_EXPONENTS", range(exponent, exponent + 4))
    ranked: list[list[float]] = []
    rank = mixing._rank
    monkeypatch.setattr(mixing, "_rank", lambda *arguments: (ranked.append(arguments[-1]), rank(*arguments))[1])
    assert choose_weight(system, "valid", METRICS, 5).weight == pytest.approx(best)
    assert [len(weights) for weights in ranked] == [4, 4]
    monkeypatch.setattr(mixing, "_EXPONENTS", range(exponent, exponent + 4))
    assert choose_weight(system, "valid", METRICS, 5).weight == pytest.approx(best)
    assert len(ranked) == 3


def test_a_weight_of_the_settings_is_measured_as_it_is(system: InferenceSystem) -> None:
    free = choose_weight(system, "valid", METRICS, 5)
    for weight, expected in ((free.weight, free.metrics), (LLM_ALONE, free.llm)):
        linear = system.config.linear.model_copy(update={"weight": weight})
        fixed = replace(system, config=system.config.model_copy(update={"linear": linear}))
        chosen = choose_weight(fixed, "valid", METRICS, 5)
        assert (chosen.weight, chosen.llm, chosen.linear) == (weight, free.llm, free.linear)
        assert chosen.metrics == expected
    assert free.metrics != free.llm


def test_a_validation_may_rank_a_sample_of_the_users(system: InferenceSystem) -> None:
    (every,) = evaluate(system, "valid", METRICS, 5, [LLM_ALONE])
    (sampled,) = evaluate(system, "valid", METRICS, 5, [LLM_ALONE], num_users=7)
    is_sampled = np.isin(every.users.rows, sampled.users.rows)
    assert is_sampled.sum() == len(sampled.users) == 7 < len(every.users)
    np.testing.assert_allclose(sampled.values, every.values[is_sampled])
    assert choose_weight(system, "valid", METRICS, 5, 7).llm == pytest.approx(sampled.result().mean)


def test_a_run_without_linear_memory_has_no_weight_and_no_parts(runs: dict[str, Path]) -> None:
    plain, _ = load_local(str(runs["paper"]), torch.device("cpu"))
    assert plain.linear.is_empty
    chosen = choose_weight(plain, "valid", METRICS, 5)
    (alone,) = evaluate(plain, "valid", METRICS, 5, [LLM_ALONE])
    assert (chosen.weight, chosen.metrics, chosen.parts) == (0.0, alone.result().mean, {})


def test_a_memory_without_any_weights_is_not_used(system: InferenceSystem) -> None:
    memory = replace(system).linear
    neighbors, weights = memory.rows()
    memory.fill(neighbors, torch.zeros_like(weights), memory.settings)
    try:
        assert score_ratio(system, "valid", 5) == 0.0
        assert choose_weight(system, "valid", METRICS, 5).weight == 0.0
    finally:
        memory.fill(neighbors, weights, memory.settings)


def evaluated(world: World, folder: str, output: str) -> None:
    evaluate_run(world, lambda metrics: None, folder, "valid", METRICS, 4, output)


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit_and_its_best_weight_is_used_in_evaluation(made: Made, tmp_path: Path) -> None:
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    run_ranks(1, run, make_config(made, plain, "finetune", epochs=2, linear={"neighbors": 0}))
    run_ranks(1, run, make_config(made, mixed, "finetune", epochs=2, linear={"neighbors": 5, "regularization": 2.0}))
    lines: list[dict[str, Any]] = metrics(mixed)
    validations = [line for line in lines if "linear_weight" in line]
    assert [line for line in lines if "loss" in line] == [line for line in metrics(plain) if "loss" in line]
    without = [line for line in metrics(plain) if "valid/recall@5" in line]
    assert len(without) == len(validations) == 2
    for line, other in zip(validations, without, strict=True):
        assert line["valid/recall@5"] >= line["valid_llm/recall@5"]
        assert [line[f"valid_llm/{name}"] for name in METRICS] == [other[f"valid/{name}"] for name in METRICS]

    best = max(validations, key=lambda line: line["valid/recall@5"])
    for size in (1, 2):
        output = tmp_path / str(size)
        run_ranks(size, evaluated, str(mixed), str(output))
        content = json.loads((output / "evaluation.json").read_text())
        assert content["linear_weight"] == best["linear_weight"]
        assert content["mean"] == pytest.approx({name: best[f"valid/{name}"] for name in METRICS})
        for name, part in (("CLLM4Rec (LLM alone)", "llm"), ("Linear memory alone", "linear")):
            expected = {metric: best[f"valid_{part}/{metric}"] for metric in METRICS}
            assert content["parts"][name]["mean"] == pytest.approx(expected), (size, name)

    # As a shop trains on everything, after it has validated a run.
    settings = {"neighbors": 5, "regularization": 2.0, "weight": best["linear_weight"]}
    silent = make_config(made, tmp_path / "silent", "finetune", epochs=2, linear=settings, validation=NO_VALIDATION)
    run_ranks(1, run, silent)
    used, _ = load_local(str(tmp_path / "silent"), torch.device("cpu"))
    assert used.linear.weight == best["linear_weight"]
    changed = silent.model_copy(update={"linear": silent.linear.model_copy(update={"weight": 0.5})})
    (refusal,) = run_ranks(1, refused, changed)
    assert re.search(r"linear.weight: 0.5 is .* and this run is finished.* Raise epochs", refusal), refusal
    run_ranks(1, run, changed.model_copy(update={"epochs": 3}))
    assert load_local(str(tmp_path / "silent"), torch.device("cpu"))[0].linear.weight == 0.5
