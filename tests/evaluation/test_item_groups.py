"""Rows of items without training interactions, and the table of warm and cold items."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from typer.testing import CliRunner

from cllm4rec_dist import train as train_module
from cllm4rec_dist.checkpointing.format import RunState
from cllm4rec_dist.cli import app
from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.views import item_texts
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.evaluation import new_item_offset, trained_run, validation
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baselines import run_baselines
from cllm4rec_dist.evaluation.cold_items import cold_rows_filled
from cllm4rec_dist.evaluation.comparison import _model_rows, _Splits, compare
from cllm4rec_dist.evaluation.group_baselines import TEXT_NEIGHBORS, _add_rows, group_rows
from cllm4rec_dist.evaluation.inference import evaluate_run
from cllm4rec_dist.evaluation.item_groups import evaluate_groups, item_groups, restrict
from cllm4rec_dist.evaluation.metrics import mean_metrics, user_metrics
from cllm4rec_dist.evaluation.mixing import MixedMetrics
from cllm4rec_dist.evaluation.new_item_offset import choose_offset
from cllm4rec_dist.evaluation.results import ItemGroupResults, ResultRow, Results, markdown_table
from cllm4rec_dist.evaluation.split_data import Candidate
from cllm4rec_dist.evaluation.text_items import TextItems
from cllm4rec_dist.evaluation.topk import rank_users
from cllm4rec_dist.export.source import open_source
from cllm4rec_dist.serving.app import open_run
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.system import InferenceSystem, System
from tests.corpus.samples import recipe, source
from tests.harness import alone, make_backbone, make_corpus, make_run, run_ranks

METRICS = ["recall@5", "ndcg@10"]
SPLIT = {"kind": "cold_items", "valid_items": 0.2, "test_items": 0.3}
WARM, WARM_ONLY, COLD_ALL, COLD = (
    "Warm items, ranked among all items",
    "Warm items, ranked among warm items",
    "Cold items, ranked among all items",
    "Cold items, ranked among cold items",
)


@dataclass(frozen=True)
class Made:
    run: str
    corpus: Corpus
    trained: torch.Tensor
    """Item rows of the checkpoint."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("cold")
    raw = read_source(source(format="synthetic", num_users=60, num_items=40, num_clusters=4, mean_interactions=9))
    catalog = build_catalog(raw, recipe(split=SPLIT))
    backbone = make_backbone(folder / "backbone", catalog)
    corpus = make_corpus(folder / "corpus", catalog, backbone, split=SPLIT)
    head, narrow = {"similarity": "cosine", "item_bias": True}, {"dim": 6}
    run = str(make_run(folder / "run", corpus, backbone, head=head, embeddings=narrow))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_run, "fill_cold_rows", lambda system: None)
        system, _ = trained_run.load_local(run, torch.device("cpu"))
    return Made(run, Corpus.open(corpus), system.recommender.collaborative.items.local_rows.detach())


@pytest.fixture(scope="module")
def system(made: Made) -> InferenceSystem:
    return trained_run.load_local(made.run, torch.device("cpu"))[0]


def test_rows_of_cold_items_come_from_their_texts_when_a_run_is_loaded(made: Made, system: InferenceSystem) -> None:
    is_cold = torch.from_numpy(made.corpus.training_counts() == 0)
    assert 8 <= int(is_cold.sum()) <= 30
    rows, bias = system.recommender.collaborative.items.local_rows.detach(), system.recommender.head.local_bias
    assert bias is not None
    assert torch.equal(rows[~is_cold], made.trained[~is_cold]), "warm rows stay"
    assert (rows[is_cold] != made.trained[is_cold]).any(dim=1).all()
    norm = made.trained[~is_cold].norm(dim=1).mean()
    torch.testing.assert_close(rows[is_cold].norm(dim=1), norm.expand(int(is_cold.sum())))
    torch.testing.assert_close(bias[is_cold], (bias[~is_cold].mean() - 1.5).expand(int(is_cold.sum()), 1))


@pytest.mark.parametrize(
    ("fixed", "chosen", "used"), [(0.25, None, 0.25), (None, -4.5, -4.5), (0.25, -4.5, 0.25)], ids=str
)
def test_lists_new_texts_and_exports_take_the_offset_of_the_run_or_of_its_validation(
    made: Made, tmp_path: Path, fixed: float | None, chosen: float | None, used: float
) -> None:
    config = open_source(made.run, None, None).config
    settings = config.model_dump(include={"embeddings"}) | {"head": {"new_item_offset": fixed}}
    run = str(make_run(tmp_path / "run", config.corpus, config.backbone, new_item_offset=chosen, **settings))
    system, _ = trained_run.load_local(run, torch.device("cpu"))
    bias, is_cold = system.recommender.head.local_bias, torch.from_numpy(made.corpus.training_counts() == 0)
    assert bias is not None
    expected = bias[~is_cold].mean().item() + used
    assert bias[is_cold].flatten().tolist() == pytest.approx([expected] * int(is_cold.sum()))
    new = TextItems.fit(system).add(system, {"new": item_texts(made.corpus)[0]}).new_items
    assert new is not None
    assert float(new.output_weight[0, -1]) == pytest.approx(expected)
    exported = open_source(run, None, None).tables["head.bias"]
    torch.testing.assert_close(exported, bias.detach().flatten())


def share_of_new(lists: pd.DataFrame, made: Made) -> float:
    new = np.array(made.corpus.items()["item"])[made.corpus.training_counts() == 0]
    return float(lists["item"].isin(new).mean())


def test_whoever_reads_a_run_may_choose_another_offset(made: Made, tmp_path: Path) -> None:
    def called(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    known = str(made.corpus.items()["item"][int(made.corpus.training_counts().argmax())])
    for offset, expected in (("-1000", 0.0), ("1000", 1.0)):
        output = tmp_path / offset
        said = called("recommend", made.run, output / "lists", "--top", 3, "--new-item-offset", offset)
        lists = pd.read_parquet(output / "lists")
        assert (f"{len(lists)} rows with new items" in said) == (expected == 1)
        assert share_of_new(lists, made) == expected
        chosen = Recommender.load(made.run, new_item_offset=float(offset))
        pd.testing.assert_series_equal(chosen.recommend(users=[lists["user"][0]], top=3)["item"], lists["item"][:3])
        served = open_run(ServiceOptions(run=made.run, new_item_offset=float(offset)))
        assert share_of_new(served.current.recommender.recommend(histories=[[known]], top=3), made) == expected
        called("evaluate", made.run, "--output", output / "evaluation", "--new-item-offset", offset, "--no-baselines")
        text = (output / "evaluation/evaluation.json").read_text(encoding="utf-8")
        assert json.loads(text)["config"]["head"]["new_item_offset"] == float(offset)
        # With few known items new ones are at the end of each list of twenty in any case.
        assert (json.loads(text)["share_of_new_items"] > 0.4) == (offset == "1000")
        called("export", made.run, output / "export", "--new-item-offset", offset)
        bias = load_file(output / "export/tables.safetensors")["head.bias"]
        gap = bias[made.corpus.training_counts() == 0].mean() - bias[made.corpus.training_counts() > 0].mean()
        assert gap.item() == pytest.approx(float(offset), rel=1e-4)


def test_an_offset_needs_item_biases_and_is_finite(made: Made, tmp_path: Path) -> None:
    config = open_source(made.run, None, None).config
    run = str(make_run(tmp_path / "run", config.corpus, config.backbone, head={"item_bias": False}))
    with pytest.raises(ConfigError, match="which this run does not have"):
        Recommender.load(run, new_item_offset=-1.0)
    result = CliRunner().invoke(app, ["recommend", made.run, str(tmp_path / "lists"), "--new-item-offset", "nan"])
    assert result.exit_code == 2
    assert "is not a finite number" in result.output


def test_other_corpora_keep_the_rows_of_the_checkpoint(made: Made, system: InferenceSystem) -> None:
    manifest = system.corpus.manifest.model_copy(update={"preparation": recipe().preparation()})
    assert not manifest.has_cold_items
    rows = system.recommender.collaborative.items.local_rows
    kept = rows.detach().clone()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        rows.copy_(made.trained)
        patch.setattr(system.corpus, "manifest", manifest)
        trained_run.fill_cold_rows(system)
        assert torch.equal(rows, made.trained)
        rows.copy_(kept)


def test_a_validation_sees_rows_from_texts_and_training_its_rows(
    made: Made, system: InferenceSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_run, "fill_cold_rows", lambda system: None)
        training, _ = trained_run.load_local(made.run, torch.device("cpu"))
    models = training.recommender, system.recommender
    rows, filled = (model.collaborative.items.local_rows for model in models)
    bias, filled_bias = (model.head.local_bias for model in models)
    assert bias is not None
    trained_bias = bias.detach().clone()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    states: list[RunState] = []

    def look() -> None:
        seen.append((rows.detach().clone(), bias.detach().clone()))

    results = [MixedMetrics(0.25, {"recall@20": value}, {}, {}) for value in (0.5, 0.25)]

    def choose_weight(*_: Any) -> MixedMetrics:
        look()
        return results.pop(0)

    def choose_offset(
        system: InferenceSystem, is_filled: np.ndarray, filled_with: float, max_loss: float, *_: Any
    ) -> float:
        look()
        assert is_filled.tolist() == (made.corpus.training_counts() == 0).tolist()
        assert (system.linear.weight, filled_with, max_loss) == (0.25, -1.5, 0.03)
        return -4.0

    def save(state: RunState, *_: Any) -> None:
        look()
        states.append(state)

    for function in (choose_weight, choose_offset):
        monkeypatch.setattr(validation, function.__name__, function)
    stubs: Any = SimpleNamespace(save=save), SimpleNamespace(validation=lambda *_: None)
    state = train_module._validate(cast(System, training), RunState(step=1), *stubs)
    measured, chosen, saved = seen
    for ranked in (measured, chosen):
        assert torch.equal(ranked[0], filled)
        assert torch.equal(ranked[1], filled_bias)
    assert torch.equal(saved[0], made.trained)
    assert torch.equal(saved[1], trained_bias)
    assert [(state.best, state.new_item_offset) for state in states] == [(0.5, -4.0)]
    worse = train_module._validate(cast(System, training), state, *stubs)
    assert len(seen) == 4, "an offset is chosen for the best checkpoint alone"
    assert (worse.best, worse.new_item_offset) == (0.5, -4.0)


@pytest.mark.parametrize("head", [{"new_item_offset": 0.0}, {"item_bias": False}], ids=str)
def test_no_offset_is_chosen_where_it_is_fixed_or_has_no_effect(system: InferenceSystem, head: dict[str, Any]) -> None:
    fixed = system.config.head.model_copy(update=head)
    config = system.config.model_copy(update={"head": fixed})
    assert validation.choose_new_item_offset(replace(system, config=config)) is None


def chosen_offsets(world: World, run: str, losses: list[float]) -> list[float | None]:
    system, _ = trained_run.load(run, world)
    is_new = system.corpus.training_counts() == 0
    return [choose_offset(system, is_new, -1.5, loss, "valid", METRICS, 64) for loss in losses]


def known_metrics(system: InferenceSystem, candidates: np.ndarray) -> np.ndarray:
    """Means of the known items of validation in lists of the candidates."""
    users, known = HeldOutUsers.of(system.corpus, "valid"), system.corpus.training_counts() > 0
    held_out = restrict(users.held_out, known)
    chosen = np.flatnonzero(held_out.lengths)
    histories = users.histories.take(chosen)
    ranked = rank_users(system, users.rows[chosen], histories, 10, 64, seen=histories, candidates=candidates)
    items = np.concatenate([ranking.items for ranking in ranked])
    return user_metrics(items, held_out.take(chosen), METRICS, 40).mean(axis=0)


@pytest.mark.slow
def test_the_highest_offset_that_costs_known_items_little_is_chosen(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, offsets, largest_loss = [0.0, 0.05, 0.2, 0.5, 1.0], np.arange(-12.0, 1.0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_run, "fill_cold_rows", lambda system: None)
        training, _ = trained_run.load_local(made.run, torch.device("cpu"))
    without = known_metrics(training, made.corpus.training_counts() > 0)
    for offset in offsets.tolist():
        head = training.config.head.model_copy(update={"new_item_offset": offset})
        with cold_rows_filled(replace(training, config=training.config.model_copy(update={"head": head}))):
            among_all = known_metrics(training, np.ones(made.corpus.num_items, bool))
        largest_loss.append(1 - (among_all / without).min())
    assert np.all(np.diff(largest_loss) > -1e-9), "known items lose more with every higher offset"
    monkeypatch.setattr(new_item_offset, "_STEPS_PER_LOGIT", 1)
    expected = [max(offsets[np.array(largest_loss) <= loss + 1e-9]) for loss in losses]
    assert len(set(expected)) >= 4
    assert expected[-1] == 0
    assert chosen_offsets(alone(), made.run, losses) == pytest.approx(expected)
    for chosen in run_ranks(2, chosen_offsets, made.run, losses[1:2]):
        assert chosen == pytest.approx(expected[1:2])


@pytest.mark.slow
def test_an_offset_moves_no_item_without_a_row_from_its_text(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = trained_run.load_local(made.run, torch.device("cpu"))
    is_new = made.corpus.training_counts() == 0
    is_filled = is_new & (np.cumsum(is_new) % 2 == 0)
    bias, everything = system.recommender.head.local_bias, np.ones_like(is_new)
    assert bias is not None
    without, trained, expected = known_metrics(system, ~is_filled), bias.detach().clone(), None
    for offset in range(0, -13, -1):
        with torch.no_grad():
            bias.copy_(torch.where(torch.from_numpy(is_filled)[:, None], trained + offset + 1.5, trained))
        if (known_metrics(system, everything) >= 0.9 * without).all():
            expected = offset
            break
    with torch.no_grad():
        bias.copy_(trained)
    monkeypatch.setattr(new_item_offset, "_STEPS_PER_LOGIT", 1)
    assert choose_offset(system, is_filled, -1.5, 0.1, "valid", METRICS, 64) == expected
    assert expected != choose_offset(system, is_new, -1.5, 0.1, "valid", METRICS, 64)
    assert choose_offset(system, np.zeros_like(is_new), -1.5, 0.1, "valid", METRICS, 64) is None


def on_ranks(world: World, run: str) -> dict[str, dict[str, float]]:
    system, _ = trained_run.load(run, world)
    users = HeldOutUsers.of(system.corpus, "test")
    groups = evaluate_groups(system, "test", users, METRICS, 4, [0.0])
    return {name: result.mean for name, (result,) in groups.items()}


@pytest.mark.slow
def test_groups_are_a_plain_loop_over_users_on_any_number_of_ranks(made: Made, system: InferenceSystem) -> None:
    users, cold = HeldOutUsers.of(made.corpus, "test"), made.corpus.training_counts() == 0
    everything = np.ones_like(cold)
    expected, ranked = {}, []
    for index in range(len(users)):
        history = users.histories.take([index])
        (ranking,) = rank_users(system, users.rows[[index]], history, made.corpus.num_items, 1, seen=history)
        ranked.append(ranking.items[0].tolist())
    for name, counted, candidates in (
        (WARM, ~cold, everything),
        (WARM_ONLY, ~cold, ~cold),
        (COLD_ALL, cold, everything),
        (COLD, cold, cold),
    ):
        values = []
        for index in range(len(users)):
            held_out = [item for item in users.held_out[index].tolist() if counted[item]]
            if held_out:
                listed, lists = [item for item in ranked[index] if candidates[item]], Ragged.from_lists([held_out])
                values.append(user_metrics(np.array([listed]), lists, METRICS, len(listed))[0])
        expected[name] = mean_metrics(np.stack(values), METRICS).mean
    for result in [on_ranks(alone(), made.run), *run_ranks(2, on_ranks, made.run)]:
        assert result.keys() == expected.keys()
        for name, means in expected.items():
            assert result[name] == pytest.approx(means, abs=1e-6), name


def test_text_neighbours_rank_by_the_cosine_with_the_texts_of_the_history(made: Made) -> None:
    data = _Splits.of(made.corpus, "test", None).data(item_texts(made.corpus))
    groups = item_groups(made.corpus, "test")
    config = BaselineConfig(names=("popularity",))
    rows = group_rows(data, groups, run_baselines(data, METRICS, config), METRICS, config)
    by_group = {group.name: {row.name: row for row in of_group} for group, of_group in zip(groups, rows, strict=True)}
    shown = by_group[COLD][TEXT_NEIGHBORS]
    longest = int(float(shown.chosen["words"]))
    cold = np.flatnonzero(made.corpus.training_counts() == 0)
    texts = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, longest)).fit_transform(data.item_texts).toarray()
    recalls = []
    for history, held_out in zip(data.histories, data.test, strict=True):
        wanted = set(held_out.indices) & set(cold.tolist())
        if wanted:
            scores = texts[history.indices].sum(axis=0) @ texts[cold].T
            best = cold[np.argsort(-scores, kind="stable")[:5]]
            recalls.append(len(wanted & set(best.tolist())) / min(5, len(wanted)))
    assert shown.metrics["recall@5"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert (by_group[COLD]["Popularity"].cannot_rank, by_group[COLD]["Popularity"].metrics) == (True, {})
    assert not by_group[WARM]["Popularity"].cannot_rank


def of_ties(made: Made, highest: float) -> dict[str, list[ResultRow]]:
    """Rows of one group by a baseline whose cold items all have one score, but for rounding below `highest`."""
    data = _Splits.of(made.corpus, "test", None).data(item_texts(made.corpus))
    groups = item_groups(made.corpus, "test")
    noise = np.linspace(0, highest, data.train.shape[1], dtype=np.float32)
    scores = np.where(made.corpus.training_counts() == 0, 1 + noise, np.arange(data.train.shape[1])).astype(np.float32)
    rows: list[list[ResultRow]] = [[] for _ in groups]
    candidate = Candidate({}, lambda swept: lambda users: np.tile(scores, (len(users), 1)))
    _add_rows(rows, "tied", candidate, candidate.fit(lambda: None), data, groups, METRICS)
    return {group.name: of_group for group, of_group in zip(groups, rows, strict=True)}


@pytest.mark.parametrize(("highest", "is_tied"), [(0.0, True), (1e-7, True), (0.5, False)])
def test_a_baseline_whose_candidates_are_tied_has_no_figures_that_the_order_of_rows_made(
    made: Made, highest: float, is_tied: bool
) -> None:
    rows = of_ties(made, highest)
    assert [rows[name][0].cannot_rank for name in (WARM, WARM_ONLY, COLD_ALL, COLD)] == [False, False, False, is_tied]
    assert (rows[COLD][0].metrics == {}) == is_tied


def test_a_table_says_who_cannot_rank_and_never_marks_it_as_best() -> None:
    tied = ResultRow(name="Popularity", metrics={"recall@5": 0.9}, stderr={"recall@5": 0.1}).without_metrics()
    rows = (ResultRow(name="CLLM4Rec", metrics={"recall@5": 0.5}), tied)
    group = ItemGroupResults(group=COLD, num_users=3, rows=rows)
    results = Results(dataset="d", rows=rows[:1], item_groups=(group,), num_users=3, seconds=0)
    table = markdown_table(results).split(COLD)[1]
    assert "| CLLM4Rec | **0.5000** |\n| Popularity | – |\n\nPopularity: cannot rank these items" in table
    assert "cannot rank" not in markdown_table(results).split(COLD)[0]
    assert "| Popularity | – |" in markdown_table(
        results.model_copy(update={"item_groups": (ItemGroupResults(group=COLD, num_users=3, rows=(tied,)),)})
    )
    assert Results.model_validate_json(results.model_dump_json()).item_groups[0].rows[1].cannot_rank


def test_the_model_itself_has_no_figures_where_it_cannot_rank(
    made: Made, system: InferenceSystem, tmp_path: Path
) -> None:
    is_cold = torch.from_numpy(made.corpus.training_counts() == 0)
    rows, bias = system.recommender.collaborative.items.local_rows, system.recommender.head.local_bias
    assert bias is not None
    kept, kept_bias = rows.detach().clone(), bias.detach().clone()
    users = HeldOutUsers.of(made.corpus, "test")
    assert [part[0].num_tied for part in evaluate_groups(system, "test", users, METRICS, 64, [0.0]).values()] == [0] * 4
    with torch.no_grad():
        rows[is_cold], bias[is_cold] = rows[is_cold][:1].clone(), 0.0
        (of_cold,) = evaluate_groups(system, "test", users, METRICS, 64, [0.0])[COLD]
        rows.copy_(kept)
        bias.copy_(kept_bias)
    assert of_cold.num_tied == of_cold.num_users
    (row,) = _model_rows(vars(of_cold))
    assert (row.cannot_rank, row.metrics) == (True, {})


@pytest.mark.slow
def test_the_table_shows_warm_cold_and_all(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cllm4rec_dist.evaluation.comparison.BaselineConfig",
        partial(BaselineConfig, title_ease_lambdas=(10.0,), title_ease_alphas=(3.0,)),
    )
    evaluate_run(alone(), lambda metrics: None, made.run, "test", METRICS, 4, str(tmp_path), baselines=True)
    table = compare(tmp_path, METRICS, baselines=("popularity", "title_ease"), seconds=1.0)
    headings = [line.rsplit(" (", 1)[0].strip("*") for line in table.splitlines() if line.startswith("**")]
    assert headings == ["All users", WARM, WARM_ONLY, COLD_ALL, COLD]
    of_cold = table.split(f"**{COLD}**")[1]
    names = [line.split(" | ")[0].strip("| ") for line in of_cold.splitlines() if line.startswith("| ")]
    assert names == ["Model", "---", "CLLM4Rec", "Popularity", "EASE + titles", TEXT_NEIGHBORS]
    assert COLD in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Popularity: cannot rank these items" in of_cold
    assert "Popularity: cannot rank these items" in (tmp_path / "report.html").read_text(encoding="utf-8")
