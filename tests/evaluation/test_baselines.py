"""Baselines compared with dense formulas; tuning and ranking."""

import logging
import re

import numpy as np
import pytest
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares

from cllm4rec_dist.config import validate
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation import baselines, ease, ials, split_data
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_models import make_grids, select_baselines
from cllm4rec_dist.evaluation.baselines import run_baselines
from cllm4rec_dist.evaluation.metrics import mean_metrics, top_items, user_metrics
from cllm4rec_dist.evaluation.split_data import SplitData
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


def test_a_setting_that_cannot_be_fitted_is_left_out_and_only_such_settings_are_an_error(data, caplog):
    never = sp.diags([0.0, *[1.0] * 29])  # no one has the first item in training
    singular = SplitData((data.train @ never).tocsr().astype(np.float32), data.valid, data.test, data.item_texts)
    config = BaselineConfig(names=("ease",), ease_lambdas=(1e-50, 5.0))
    (result,) = run_baselines(singular, METRICS, config)
    assert result.chosen == {"lambda": 5.0}
    assert "baseline EASE: a setting is left out: EASE lambda: 1e-50 is too small for this catalog" in caplog.text
    with pytest.raises(ConfigError, match="EASE lambda: 1e-50 is too small"):
        run_baselines(singular, METRICS, BaselineConfig(names=("ease",), ease_lambdas=(1e-50,)))


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


IALS_AXES = {"ials_factors": (4, 8), "ials_regularizations": (10.0, 0.1), "ials_alphas": (5.0,)}


def test_a_grid_that_takes_too_long_is_compared_on_a_sample(data):
    limits = {"max_grid_interactions": 4 * data.train.nnz, "max_grid_items": 3 * 30}
    config = BaselineConfig(names=("ials", "sparse_ease"), **IALS_AXES, **limits)
    grids = make_grids(data, config)
    assert {name: (len(grid.candidates), grid.draw) for name, grid in grids.items()} == {
        "ials": (4, None),
        "sparse_ease": (3, None),
    }
    # Two regularizations are compared with 4 factors, and then 8 factors with the better one.
    fewer = {"max_grid_interactions": 3 * data.train.nnz - 1, "max_grid_items": 3 * 30 - 1}
    smaller = make_grids(data, config.model_copy(update=fewer))
    assert [(len(grid.candidates), grid.num_compared) for grid in smaller.values()] == [(4, 3), (3, 3)]
    users, items = (smaller[name].draw() for name in ("ials", "sparse_ease"))
    assert users.description == "79 of 80 users"
    assert [candidate.settings for candidate in users.candidates] == [
        candidate.settings for candidate in smaller["ials"].candidates
    ]
    assert items.description == "29 of 30 items"
    names, reasons = select_baselines(data, config.model_copy(update={"max_grid_items": 29}))
    assert names == ["ials"]
    assert reasons["sparse_ease"].startswith("30 regressions take too long (max_grid_items is 29)")


def interactions_below(limit):
    return lambda num_interactions, num_rows: num_interactions <= limit


@pytest.mark.parametrize("split", ["data", "with_new"])
def test_a_sample_has_whole_users_with_their_items_and_those_with_validation_items_first(split, request):
    whole = request.getfixturevalue(split)
    num_users = whole.train.shape[0]
    has_valid = whole.valid.getnnz(axis=1) > 0
    drawn = split_data.sample_users(whole, interactions_below(200), 4)
    assert 180 < drawn.train.nnz <= 200
    dense = whole.train.toarray()
    items = [item for item in range(30) if any((dense[:, item] > 0) & is_in_sample(whole, drawn))]
    users = np.flatnonzero(is_in_sample(whole, drawn))
    np.testing.assert_array_equal(drawn.train.toarray(), dense[users][:, items])
    new = np.flatnonzero(has_valid[num_users:]) + num_users
    np.testing.assert_array_equal(drawn.valid.toarray(), whole.valid.toarray()[np.concatenate([users, new])][:, items])
    np.testing.assert_array_equal(drawn.histories.toarray()[len(users) :], whole.histories.toarray()[new][:, items])
    assert drawn.item_texts == [whole.item_texts[item] for item in items]
    assert has_valid[users].all() or set(np.flatnonzero(has_valid[:num_users])) <= set(users)
    larger = split_data.sample_users(whole, interactions_below(300), 4)
    assert set(users) < set(np.flatnonzero(is_in_sample(whole, larger)))


def test_the_size_of_a_sample_is_told_by_interactions_and_by_users_and_items_with_any(data):
    told = []

    def is_small(num_interactions, num_rows):
        told.append((num_interactions, num_rows))
        return num_interactions <= 200

    drawn = split_data.sample_users(data, is_small, 4)
    ((interactions, rows),) = told
    last = drawn.train.shape[0] - 1
    assert (interactions[last], rows[last]) == (drawn.train.nnz, sum(drawn.train.shape))
    assert (interactions[-1], rows[-1]) == (data.train.nnz, 80 + 30)


def is_in_sample(whole, drawn):
    """Find sampled users by their histories, which all differ."""
    rows = {tuple(np.array(whole.item_texts)[row.indices]): user for user, row in enumerate(whole.train)}
    assert len(rows) == whole.train.shape[0]
    texts = np.array(drawn.item_texts)
    found = np.zeros(whole.train.shape[0], bool)
    found[[rows[tuple(texts[row.indices])] for row in drawn.train]] = True
    return found


def test_few_users_of_a_sample_are_ranked_if_items_and_candidates_are_many(data, monkeypatch):
    monkeypatch.setattr(split_data, "_SAMPLE_SCORES", 4 * 30 * 11)
    _, drawn = split_data.sample_items(data, 30, 4)
    assert np.count_nonzero(drawn.valid.getnnz(axis=1)) == 11
    assert drawn.train.nnz == data.train.nnz, "others are still trained on"


@pytest.mark.parametrize("name", ["ials", "sparse_ease"])
def test_the_best_of_a_sample_is_fitted_on_everything(name, data, caplog):
    limits = {"max_grid_interactions": 3 * 200, "max_grid_items": 3 * 20}
    config = BaselineConfig(names=(name,), **IALS_AXES, **limits, num_threads=1, sparse_ease_lambdas=(1.0, 50.0, 1e4))
    sample = make_grids(data, config)[name].draw()

    def value(candidate):
        scores = candidate.fit(int)(np.arange(sample.data.valid.shape[0]))
        scores[sample.data.histories.nonzero()] = -np.inf
        metrics = user_metrics(slow_ranking(scores, scores.shape[1]), sample.data.valid, ["ndcg@100"])
        return mean_metrics(metrics, ["ndcg@100"]).mean["ndcg@100"]

    compared = [candidate for candidate in sample.candidates if candidate.settings.get("factors") in (None, 4)]
    best = max(compared, key=value)
    last = [
        candidate
        for candidate in sample.candidates
        if candidate not in compared and candidate.settings == best.settings | {"factors": 8}
    ]
    assert (len(compared), len(last)) == ((2, 1) if name == "ials" else (3, 0))
    values = [value(candidate) for candidate in [*compared, *last]]
    assert len(set(values)) == len(values) == 3
    chosen = [*compared, *last][int(np.argmax(values))].settings
    assert chosen != sample.candidates[0].settings
    with caplog.at_level(logging.INFO):
        (result,) = run_baselines(data, METRICS, config)
    assert result.chosen == chosen
    assert result.chosen_on == sample.description
    (line,) = (record.getMessage() for record in caplog.records if "settings tried" in record.getMessage())
    assert f"; settings tried: {len(values)} on {sample.description}, in " in line
    keys = {
        "ials": {"factors": "ials_factors", "regularization": "ials_regularizations", "alpha": "ials_alphas"},
        "sparse_ease": {"lambda": "sparse_ease_lambdas", "alpha": "sparse_ease_alphas"},
    }
    only = {keys[name][setting]: (value,) for setting, value in chosen.items()}
    whole = validate(BaselineConfig, {"names": (name,), "num_threads": 1} | only, source="the chosen point")
    (expected,) = run_baselines(data, METRICS, whole)
    np.testing.assert_array_equal(result.values, expected.values)
    assert expected.chosen_on == ""


def test_the_middle_setting_is_fitted_if_a_sample_has_no_validation_items(data, caplog):
    limits = {"max_grid_interactions": 1, "max_grid_items": 30}
    axes = IALS_AXES | {"ials_regularizations": (1.0, 2.0, 3.0)}
    config = BaselineConfig(names=("ials", "sparse_ease"), **axes, **limits)
    grids = make_grids(data, config)
    assert grids["ials"].candidates[grids["ials"].middle].settings == {
        "factors": 4,
        "regularization": 2.0,
        "alpha": 5.0,
    }
    middle = grids["sparse_ease"].candidates[grids["sparse_ease"].middle]
    assert middle.settings == {"alpha": 10.0, "lambda": 200.0}
    with caplog.at_level(logging.WARNING):
        results = run_baselines(data, METRICS, config.model_copy(update={"names": ("ials",)}))
    assert results[0].chosen == {"factors": 4, "regularization": 2.0, "alpha": 5.0}
    assert results[0].chosen_on == ""
    assert "baseline iALS is not tuned: 6 fits would take too long, and a sample has no validation items" in caplog.text


def test_every_sweep_and_every_ranking_is_a_step_of_the_bar(data, monkeypatch):
    steps = []

    class Bar:
        def __init__(self, world, total, description, unit):
            self.total, self.done = total, 0
            steps.append(self)

        def update(self, count=1):
            self.done += count

        def set_description(self, text):
            pass

        def close(self):
            pass

    monkeypatch.setattr(baselines, "progress_bar", Bar)
    config = BaselineConfig(names=("popularity", "ials"), **IALS_AXES, ials_iterations=3)
    for limit in (10**9, 4 * 200):
        run_baselines(data, METRICS, config.model_copy(update={"max_grid_interactions": limit}))
    assert [(bar.total, bar.done) for bar in steps] == [(1 + 4 * 4,) * 2, (1 + (3 + 1) * 4,) * 2]


def test_factors_whose_fit_takes_too_long_are_left_out_or_halved(data, caplog):
    nnz, rows = (
        data.train.nnz,
        np.count_nonzero(data.train.getnnz(axis=1)) + np.count_nonzero(data.train.getnnz(axis=0)),
    )
    minutes = {factors: 15 * float(ials.sweep_seconds(nnz, rows, factors)) / 60 for factors in (16, 32, 64, 256)}
    assert minutes[16] < minutes[32] < minutes[64] < minutes[256] < 1
    assert ials.sweep_seconds(10**7, 10**6, 64) == pytest.approx(1.8 + 0.86016 + 5.12)

    def factors(limit, **others):
        config = BaselineConfig(names=("ials",), max_grid_interactions=1, max_fit_minutes=limit, **others)
        assert (ials.too_large(data, config) is None) == bool(ials.fitting_factors(data, config))
        return ials.fitting_factors(data, config)

    assert factors(1) == (64, 256)
    assert factors(0.99 * minutes[256]) == (64,)
    assert factors(0.99 * minutes[64]) == (32,)
    assert factors(0.99 * minutes[32]) == (16,)
    assert factors(0.99 * minutes[16]) == ()
    assert factors(0.99 * minutes[16], ials_factors=(8, 64)) == (8,)
    large = BaselineConfig(names=("ials", "popularity"), max_grid_interactions=1, max_fit_minutes=0.99 * minutes[64])
    with caplog.at_level(logging.WARNING):
        make_grids(data, large)
    assert "baseline iALS: 32 instead of 64 and 256 factors, with which a fit would take more than" in caplog.text
    too_large = large.model_copy(update={"max_fit_minutes": 0.99 * minutes[16]})
    names, reasons = select_baselines(data, too_large)
    assert names == ["popularity"]
    assert reasons["ials"].startswith(f"{nnz} interactions take about 0 CPU minutes even with 16 factors, more than")
    whole = too_large.model_copy(update={"max_grid_interactions": 24 * nnz})
    assert select_baselines(data, whole)[0] == ["ials", "popularity"], "a small split is fitted as it is"


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
    with pytest.raises(ConfigError, match="select_by: must be recall@K or ndcg@K"):
        validate(BaselineConfig, {"select_by": "auc"}, source="baselines")
    with pytest.raises(ConfigError, match="recall@K or ndcg@K"):
        run_baselines(data, ["hits@5"], BaselineConfig(names=("popularity",)))
