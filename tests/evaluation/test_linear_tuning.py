"""Open settings of the linear memory: those that rank the validation items best, on any number of ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cllm4rec_dist.config import LinearConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.views import interaction_matrix, item_texts
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation import linear_tuning
from cllm4rec_dist.evaluation.linear_tuning import _Neighbors, _Sample, choose_settings, climb
from cllm4rec_dist.evaluation.metrics import user_metrics
from cllm4rec_dist.evaluation.trained_run import load_local
from cllm4rec_dist.model.linear_fit import LinearSettings, item_features, text_features
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import Made, make_config, newest, run

SETTINGS = LinearSettings(text_weight=3.0, regularization=50.0, history_power=0.25, dropout=0.5)


@pytest.fixture(scope="module")
def corpus(made: Made) -> Corpus:
    return Corpus.open(made[1], verify=False)


def inputs(corpus: Corpus) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    return interaction_matrix(corpus.split("train"), corpus.num_items), text_features(item_texts(corpus))


def test_each_setting_climbs_to_a_point_that_no_step_improves() -> None:
    tried = []

    def value_of(settings: LinearSettings) -> float:
        tried.append(settings)
        far = abs(np.log(settings.text_weight / 1.0)) + abs(np.log(settings.regularization / 1000.0))
        return -far - settings.history_power

    best = climb(LinearSettings(), ["text_weight", "regularization", "history_power"], value_of)
    assert best == LinearSettings(1.0, 1000.0, 0.0)
    assert len(tried) == len(set(tried)), "a fit was made twice"


def test_equally_good_settings_stay_as_they_are() -> None:
    assert climb(LinearSettings(), ["text_weight", "regularization"], lambda settings: 0.5) == LinearSettings()


def weights_of(world: World, corpus: Corpus, items: np.ndarray) -> sp.csr_matrix:
    train, texts = inputs(corpus)
    features = item_features(train, texts, SETTINGS.text_weight, SETTINGS.history_power)
    return _Neighbors.of(features, items, 4, world).fit(SETTINGS, world)


@pytest.mark.parametrize("num_items", [1000, 7])
@pytest.mark.parametrize("block_scores", [1, 1 << 20])
def test_the_value_is_ndcg_of_sampled_items_among_each_other(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, num_items: int, block_scores: int
) -> None:
    monkeypatch.setattr(linear_tuning, "_NUM_ITEMS", num_items)
    monkeypatch.setattr(linear_tuning, "_BLOCK_SCORES", block_scores)
    sample = _Sample.of(corpus)
    assert len(sample.items) == min(num_items, corpus.num_items)
    weights = weights_of(alone(), corpus, sample.items)
    scores = (sample.histories @ weights).toarray()
    scores[sample.histories[:, sample.items].nonzero()] = -np.inf
    ranked = np.argsort(-scores, axis=1, kind="stable")
    expected = user_metrics(ranked, sample.held_out, ["ndcg@100"], len(sample.items)).mean()
    assert sample.ndcg(weights, alone()) == pytest.approx(expected, abs=1e-9)


def test_the_value_is_the_same_however_ranks_share_the_users(corpus: Corpus) -> None:
    sample = _Sample.of(corpus)
    weights = weights_of(alone(), corpus, sample.items)
    users = np.arange(len(sample.held_out))
    whole = sample._ndcg_sum(users, weights)
    for num_parts in (2, 3, len(users)):
        assert sum(sample._ndcg_sum(part, weights) for part in np.array_split(users, num_parts)) == whole


def test_users_are_sampled_too(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    every = _Sample.of(corpus)
    monkeypatch.setattr(linear_tuning, "_NUM_USERS", 5)
    assert len(_Sample.of(corpus).held_out) == 5 < len(every.held_out)


def chosen_by(world: World, folder: str) -> dict[str, float]:
    corpus = Corpus.open(folder, verify=False)
    return asdict(choose_settings(*inputs(corpus), corpus, LinearConfig(neighbors=4), world))


@pytest.mark.slow
def test_ranks_choose_alike_and_no_single_step_is_better(made: Made, corpus: Corpus) -> None:
    alike = chosen_by(alone(), made[1])
    for size in (2, 3):
        assert run_ranks(size, chosen_by, made[1]) == [alike] * size
    chosen, sample = LinearSettings(**alike), _Sample.of(corpus)
    assert chosen != LinearSettings(), "this corpus shows nothing"
    train, texts = inputs(corpus)

    def value_of(settings: LinearSettings) -> float:
        features = item_features(train, texts, settings.text_weight, settings.history_power)
        return sample.ndcg(_Neighbors.of(features, sample.items, 4, alone()).fit(settings, alone()), alone())

    assert climb(chosen, [*linear_tuning._GRIDS], value_of) == chosen
    assert value_of(chosen) > value_of(LinearSettings())


def test_given_settings_stay_and_texts_without_words_are_not_weighed(corpus: Corpus) -> None:
    train, texts = inputs(corpus)
    given = LinearConfig(neighbors=4, text_weight=7.0, history_power=1.0)
    chosen = choose_settings(train, texts, corpus, given, alone())
    assert (chosen.text_weight, chosen.history_power) == (7.0, 1.0)
    chosen = choose_settings(train, texts[:, :0], corpus, LinearConfig(neighbors=4), alone())
    assert chosen.text_weight == LinearSettings().text_weight


def test_without_a_validation_the_defaults_are_used(tmp_path: Path) -> None:
    catalog = make_catalog()
    empty = [[] for _ in catalog.valid]
    without = make_catalog()
    object.__setattr__(without, "valid", type(catalog.valid).from_lists(empty))
    backbone = make_backbone(tmp_path / "backbone", without)
    corpus = Corpus.open(make_corpus(tmp_path / "corpus", without, backbone), verify=False)
    assert choose_settings(*inputs(corpus), corpus, LinearConfig(), alone()) == LinearSettings()


@pytest.mark.slow
def test_checkpoints_hold_what_was_chosen_and_older_ones_what_was_set(made: Made, tmp_path: Path) -> None:
    run_ranks(1, run, make_config(made, tmp_path, "finetune", epochs=1, linear={"neighbors": 4, "history_power": 0.5}))
    system, checkpoint = load_local(str(newest(tmp_path)), torch.device("cpu"))
    assert system.linear.settings == checkpoint.metadata.linear
    assert system.linear.settings.history_power == 0.5
    older = checkpoint.metadata.model_copy(update={"linear": None})
    assert LinearSettings.of(LinearConfig(**older.config["linear"])) == LinearSettings(history_power=0.5)
    assert json.loads((newest(tmp_path) / "state.json").read_text())["linear"]["history_power"] == 0.5
