"""Baselines compared with dense formulas; tuning and ranking."""

import logging
import re

import numpy as np
import pytest
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares

from cllm4rec_dist.config import validate
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation import baselines, ease
from cllm4rec_dist.evaluation.baseline_models import BaselineConfig, SplitData, make_grids, select_baselines
from cllm4rec_dist.evaluation.baselines import run_baselines
from cllm4rec_dist.evaluation.metrics import mean_metrics, top_items, user_metrics
from cllm4rec_dist.model.linear_fit import text_features

METRICS = ["recall@5", "ndcg@10"]
FAST = {"ials_factors": (4,), "ials_regularizations": (1.0,), "ials_alphas": (5.0,), "num_threads": 1}


def csr(dense: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(dense.astype(np.float32))


@pytest.fixture(scope="module")
def data() -> SplitData:
    """Two groups of users and items; texts name the group of the item."""
    rng = np.random.default_rng(0)
    num_users, num_items = 80, 30
    same_group = (np.arange(num_users)[:, None] % 2) == (np.arange(num_items)[None, :] % 2)
    interactions = rng.random((num_users, num_items)) < np.where(same_group, 0.5, 0.05)
    part = rng.choice(3, p=[0.7, 0.15, 0.15], size=interactions.shape)
    texts = [f"{'even' if item % 2 == 0 else 'odd'} thing {item}" for item in range(num_items)]
    return SplitData(*(csr(interactions & (part == index)) for index in range(3)), texts)


def slow_ranking(scores: np.ndarray, num_ranked: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :num_ranked]


@pytest.mark.parametrize("num_ranked", [1, 7, 50])
def test_top_items_breaks_ties_by_the_lower_row(num_ranked):
    scores = np.random.default_rng(0).integers(0, 4, size=(20, 50)).astype(np.float32)
    scores[3] = -np.inf
    scores[4, 5:] = -np.inf
    np.testing.assert_array_equal(top_items(scores, num_ranked), slow_ranking(scores, num_ranked))


def expected_metrics(data: SplitData, scores: np.ndarray) -> dict[str, float]:
    scores = np.where(data.train.toarray() > 0, -np.inf, scores)
    return mean_metrics(user_metrics(slow_ranking(scores, 10), data.test, METRICS), METRICS).mean


def dense_ease(gram: np.ndarray, l2: float) -> np.ndarray:
    inverse = np.linalg.inv(gram.astype(np.float64) + l2 * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


@pytest.mark.parametrize("block_rows", [7, 1024])
def test_ease_weights_equal_the_closed_form(data, monkeypatch, block_rows):
    monkeypatch.setattr(ease, "_BLOCK_ROWS", block_rows)
    gram = ease.gram_matrix(data.train)
    dense = data.train.toarray()
    np.testing.assert_array_equal(gram, dense.T @ dense)
    np.testing.assert_allclose(ease.ease_weights(gram.copy(), 3.0), dense_ease(gram, 3.0), rtol=2e-4, atol=1e-5)


def test_results_equal_dense_formulas(data, monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK_SCORES", 30 * 7)  # seven users a block: 80 do not divide evenly
    config = BaselineConfig(
        names=("popularity", "ease", "title_ease"),
        ease_lambdas=(5.0,),
        title_ease_lambdas=(5.0,),
        title_ease_alphas=(2.0,),
    )
    popularity, linear, titles = run_baselines(data, METRICS, config)
    train = data.train.toarray()
    features = text_features(data.item_texts).toarray()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-6)
    counts = np.tile(train.sum(axis=0), (80, 1))
    assert popularity.metrics == pytest.approx(expected_metrics(data, counts))
    gram = train.T @ train
    assert linear.metrics == pytest.approx(expected_metrics(data, train @ dense_ease(gram, 5.0)))
    stacked = dense_ease(gram + 2.0 * features @ features.T, 5.0)
    assert titles.metrics == pytest.approx(expected_metrics(data, train @ stacked))
    assert titles.chosen == {"alpha": 2.0, "lambda": 5.0}
    assert titles.num_users == int((data.test.getnnz(axis=1) > 0).sum())


@pytest.fixture(scope="module")
def with_new(data: SplitData) -> SplitData:
    """Make a split of 60 trained users and 20 new ones, of whom half are for validation and half for test."""
    known, new = np.arange(60), np.arange(60, 80)
    valid, test = data.valid + data.test, data.valid + data.test
    is_valid = sp.diags(np.where(np.arange(80) < 60, 1.0, np.arange(80) < 70)).astype(np.float32)
    is_test = sp.diags(np.where(np.arange(80) < 60, 1.0, np.arange(80) >= 70)).astype(np.float32)
    valid = sp.vstack([data.valid[known], (is_valid @ valid)[new]], format="csr")
    test = sp.vstack([data.test[known], (is_test @ test)[new]], format="csr")
    return SplitData(data.train[known], valid, test, data.item_texts, data.train[new])


def test_new_users_are_ranked_from_their_histories_and_nothing_is_fitted_on_them(with_new: SplitData) -> None:
    l2, alpha, regularization = 5.0, 8.0, 3.0
    config = BaselineConfig(
        names=("popularity", "ease", "ials"),
        ease_lambdas=(l2,),
        ials_factors=(8,),
        ials_regularizations=(regularization,),
        ials_alphas=(alpha,),
        num_threads=1,
    )
    popularity, linear, ials = run_baselines(with_new, METRICS, config)
    train, histories = with_new.train.toarray(), with_new.histories.toarray()
    assert histories.shape == (80, 30)
    model = AlternatingLeastSquares(
        factors=8, regularization=regularization, alpha=alpha, iterations=15, num_threads=1, random_state=0
    )
    model.fit(with_new.train, show_progress=False)
    items = model.item_factors.astype(np.float64)
    folded = []
    for history in histories[60:]:  # the closed form of Hu et al.: (Y'CY + rI)^-1 Y'Cp
        confidence = 1 + (alpha - 1) * history
        normal = items.T @ (confidence[:, None] * items) + regularization * np.eye(8)
        folded.append(np.linalg.solve(normal, items.T @ (confidence * history)))
    users = np.concatenate([model.user_factors, folded])
    scores = {
        "popularity": np.tile(train.sum(axis=0), (80, 1)),
        "ease": histories @ dense_ease(train.T @ train, l2),
        "ials": users @ items.T,
    }
    tested = np.flatnonzero(with_new.test.getnnz(axis=1))
    assert (tested >= 60).sum() > 5
    for result in (popularity, linear, ials):
        unseen = np.where(histories > 0, -np.inf, scores[result.name])
        expected = user_metrics(slow_ranking(unseen, 10), with_new.test, METRICS)[tested]
        np.testing.assert_allclose(result.values, expected, atol=1e-6)
        assert result.num_users == len(tested)
        assert result.metrics == pytest.approx(dict(zip(METRICS, expected.mean(axis=0), strict=True)))


def test_new_users_take_part_in_the_choice_of_settings(with_new: SplitData) -> None:
    grid = (1.0, 20.0, 1e4)
    config = BaselineConfig(names=("ease",), ease_lambdas=grid)
    (tuned,) = run_baselines(with_new, METRICS, config)
    train, histories = with_new.train.toarray(), with_new.histories.toarray()
    values = []
    for l2 in grid:
        unseen = np.where(histories > 0, -np.inf, histories @ dense_ease(train.T @ train, l2))
        metrics = user_metrics(slow_ranking(unseen, 30), with_new.valid, ["ndcg@100"])
        assert np.isfinite(metrics[60:70]).any()
        values.append(mean_metrics(metrics, ["ndcg@100"]).mean["ndcg@100"])
    assert tuned.chosen == {"lambda": grid[int(np.argmax(values))]}


def test_all_run_and_beat_popularity_deterministically(data):
    config = BaselineConfig(**FAST)
    results = run_baselines(data, METRICS, config)
    assert [result.name for result in results] == ["popularity", "ease", "title_ease", "ials"]
    assert [result.label for result in results] == ["Popularity", "EASE", "EASE + titles", "iALS"]
    for result in results[1:]:
        assert result.metrics["ndcg@10"] > results[0].metrics["ndcg@10"]
        assert set(result.stderr) == set(METRICS)
    again = run_baselines(data, METRICS, config)
    assert [result.metrics for result in again] == [result.metrics for result in results]


def test_lists_of_the_chosen_setting_are_counted(data):
    (result,) = run_baselines(data, METRICS, BaselineConfig(names=("popularity",)))
    popularity = np.asarray(data.train.sum(axis=0)).ravel()
    scores = np.where(data.train.toarray() > 0, -np.inf, popularity)
    expected = np.zeros(30, dtype=int)
    for user in np.flatnonzero(np.diff(data.test.indptr)):
        listed = slow_ranking(scores, 20)[user]
        expected[listed[np.isfinite(scores[user, listed])]] += 1
    assert result.listed.tolist() == expected.tolist()
    assert result.num_users < len(scores)  # users without test items are not counted


def test_validation_chooses_the_lambda(data):
    grid = (1.0, 20.0, 1e4)
    values = []
    for l2 in grid:
        swapped = SplitData(data.train, data.test, data.valid, data.item_texts)
        (result,) = run_baselines(swapped, ["ndcg@100"], BaselineConfig(names=("ease",), ease_lambdas=(l2,)))
        values.append(result.metrics["ndcg@100"])  # the "test" of the swapped split is the validation part
    (tuned,) = run_baselines(data, METRICS, BaselineConfig(names=("ease",), ease_lambdas=grid))
    assert tuned.chosen == {"lambda": grid[int(np.argmax(values))]}


def test_each_baseline_is_one_line_with_its_settings_and_seconds(data, caplog):
    config = BaselineConfig(names=("popularity", "ease"), ease_lambdas=(1.0, 20.0, 1e4))
    with caplog.at_level(logging.INFO):
        _, linear = run_baselines(data, METRICS, config)
    first, second = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"baseline Popularity: validation ndcg@100 0\.\d{4}; settings tried: 1, in \d+\.\d s", first)
    assert second.startswith(f"baseline EASE (lambda {linear.chosen['lambda']:g}): validation ndcg@100 0.")
    assert "; settings tried: 3, in " in second


def test_items_without_words_leave_the_title_baseline_out(data, caplog):
    wordless = SplitData(data.train, data.valid, data.test, ["", " ", "-"] * 10)
    with caplog.at_level(logging.WARNING):
        results = run_baselines(wordless, METRICS, BaselineConfig(names=("popularity", "title_ease")))
    assert [result.name for result in results] == ["popularity"]
    assert "no item has a text" in caplog.text


def test_in_a_large_catalog_the_sparse_ease_takes_the_place_of_the_dense_ones(data, caplog):
    config = BaselineConfig(**FAST, max_dense_gib=1e-6, sparse_ease_neighbors=29)
    names, reasons = select_baselines(data, config)
    assert names == ["popularity", "sparse_ease", "ials"]
    assert reasons.keys() == {"ease", "title_ease"}
    assert "30 x 30 need 0.0 GiB, more than max_dense_gib, 1e-06" in reasons["ease"]
    with caplog.at_level(logging.WARNING):
        results = run_baselines(data, METRICS, config)
    assert [result.name for result in results] == names
    assert "baseline EASE is left out: the dense matrices" in caplog.text
    dense = BaselineConfig(
        names=("title_ease",), title_ease_alphas=(10.0,), title_ease_lambdas=config.sparse_ease_lambdas
    )
    (expected,) = run_baselines(data, METRICS, dense)  # with all neighbors both are the same model
    assert results[1].chosen == expected.chosen
    np.testing.assert_allclose(results[1].values, expected.values, atol=1e-6)


def test_the_middle_setting_is_fitted_where_a_whole_grid_would_take_too_long(data, caplog):
    axes = {"ials_factors": (4, 8), "ials_regularizations": (1.0, 2.0, 3.0), "ials_alphas": (5.0,)}
    sizes = {"max_grid_interactions": 6 * data.train.nnz, "max_grid_items": 3 * 30}
    config = BaselineConfig(names=("ials", "sparse_ease"), **axes, **sizes)
    assert {name: len(grid) for name, grid in make_grids(data, config).items()} == {"ials": 6, "sparse_ease": 3}
    smaller = config.model_copy(update={name: size - 1 for name, size in sizes.items()})
    grids = make_grids(data, smaller)
    assert [candidate.settings for candidate in grids["ials"]] == [{"factors": 4, "regularization": 2.0, "alpha": 5.0}]
    assert [candidate.settings for candidate in grids["sparse_ease"]] == [{"alpha": 10.0, "lambda": 200.0}]
    assert "baseline iALS is not tuned, because 6 fits would take too long" in caplog.text
    names, reasons = select_baselines(data, config.model_copy(update={"max_grid_items": 29}))
    assert names == ["ials"]
    assert reasons["sparse_ease"].startswith("30 regressions take too long (max_grid_items is 29)")


def test_the_sparse_ease_is_fitted_in_parts_of_the_catalog(data, monkeypatch):
    config = BaselineConfig(names=("sparse_ease",), sparse_ease_neighbors=5, num_threads=2)
    (whole,) = run_baselines(data, METRICS, config)
    monkeypatch.setattr("cllm4rec_dist.evaluation.baseline_models._FIT_ITEMS", 7)
    (parts,) = run_baselines(data, METRICS, config)
    assert parts.metrics == whole.metrics
    assert parts.label == "Sparse EASE + titles"


def test_a_split_that_leaks_or_does_not_fit_is_refused(data):
    with pytest.raises(DataError, match=r"test: .* must not be in train"):
        SplitData(data.train, data.valid, data.train, data.item_texts)
    with pytest.raises(DataError, match=r"valid: .* must have the shape of train"):
        SplitData(data.train, data.valid[:5], data.test, data.item_texts)
    with pytest.raises(DataError, match=r"valid: .* must hold out at least one item"):
        SplitData(data.train, csr(np.zeros(data.train.shape)), data.test, data.item_texts)
    with pytest.raises(DataError, match="item_texts: '29 texts'"):
        SplitData(data.train, data.valid, data.test, data.item_texts[1:])


@pytest.mark.parametrize(
    "tree", [{"ease_lambdas": []}, {"ease_lambdas": [0.0]}, {"names": ["knn"]}, {"lambdas": [1.0]}]
)
def test_bad_configurations_are_refused(tree):
    with pytest.raises(ConfigError):
        validate(BaselineConfig, tree, source="baselines")


def test_unknown_metrics_are_refused(data):
    with pytest.raises(ConfigError, match="recall@K or ndcg@K"):
        BaselineConfig(select_by="auc")
    with pytest.raises(ConfigError, match="recall@K or ndcg@K"):
        run_baselines(data, ["hits@5"], BaselineConfig(names=("popularity",)))
