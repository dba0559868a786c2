"""Paired tests and bins compared with values computed by hand and with scipy."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from cllm4rec_dist.evaluation.statistics import Mean, PairedTest, length_bins, mean_of, paired_test


def test_a_paired_test_equals_a_case_worked_out_by_hand():
    first = np.array([0.5, 0.5, 1.0, 0.0])
    second = np.array([0.25, 0.25, 0.25, 0.25])
    # Differences 0.25, 0.25, 0.75, -0.25: mean 0.25, sample variance 0.5 / 3, standard error sqrt(0.5 / 12).
    result = paired_test(first, second)
    half = 3.182446305284263 * np.sqrt(0.5 / 12)  # 97.5 % point of t with three degrees of freedom
    assert result.difference == 0.25
    assert (result.low, result.high) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    closed_form = 1 - 2 / np.pi * (np.sqrt(2) / 3 + np.arctan(np.sqrt(0.5)))  # of t = sqrt(1.5)
    assert result.p_value == pytest.approx(closed_form)
    assert (result.num_users, result.verdict) == (4, "too few users")


@pytest.mark.parametrize(("shift", "verdict"), [(0.2, "ahead"), (0.0, "level"), (-0.2, "behind")])
def test_the_verdict_follows_the_interval(shift, verdict):
    rng = np.random.default_rng(0)
    second = rng.random(200)
    first = second + shift + rng.normal(0, 0.3, 200)
    result = paired_test(first, second)
    expected = stats.ttest_1samp(first - second, 0.0)
    assert result.verdict == verdict
    assert result.p_value == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (result.p_value < 0.05) == (verdict != "level")


def test_pairing_finds_a_small_difference_that_means_alone_do_not_show():
    hard = np.random.default_rng(1).random(500)
    result = paired_test(hard + np.tile([0.02, 0.0], 250), hard)
    assert result.verdict == "ahead"
    assert stats.ttest_ind(hard + np.tile([0.02, 0.0], 250), hard).pvalue > 0.5


def test_too_few_users_have_no_verdict():
    nothing = np.array([])
    assert paired_test(nothing, nothing) == PairedTest(0, None, None, None, None, "too few users")
    assert paired_test(np.array([1.0]), np.array([0.5])) == PairedTest(1, 0.5, None, None, None, "too few users")
    assert paired_test(np.ones(19), np.zeros(19)).verdict == "too few users"
    assert paired_test(np.ones(20), np.zeros(20)).verdict == "ahead"


def test_equal_models_are_level():
    values = np.linspace(0, 1, 30)
    assert paired_test(values, values) == PairedTest(30, 0.0, 0.0, 0.0, 1.0, "level")


def test_pairs_with_a_missing_value_are_left_out():
    first = np.array([np.nan, 0.5, 1.0, 0.0])
    second = np.array([0.5, np.nan, 0.0, 0.5])
    assert paired_test(first, second).num_users == 2
    assert paired_test(first, second).difference == 0.25


def test_means():
    assert mean_of(np.array([0.0, 1.0, np.nan, 1.0, 0.0])) == Mean(4, 0.5, 0.25)
    assert mean_of(np.array([0.3])) == Mean(1, 0.3, 0.0)
    assert mean_of(np.array([np.nan])) is None


def test_length_bins_cover_every_length_once_with_like_numbers_of_users():
    assert length_bins(np.arange(1, 11), 5) == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    assert length_bins(np.array([3, 3, 3, 3, 9]), 5) == [(3, 3), (9, 9)]
    assert length_bins(np.array([1, 1, 1, 50, 60]), 2) == [(1, 1), (50, 60)]
    assert length_bins(np.array([7]), 5) == [(7, 7)]
    assert length_bins(np.array([0, 0, 0]), 5) == [(0, 0)]
    assert length_bins(np.array([], dtype=int), 5) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_user_is_in_exactly_one_bin(seed):
    lengths = np.random.default_rng(seed).geometric(0.1, 300)
    bins = length_bins(lengths)
    assert sum(((first <= lengths) & (lengths <= last)).sum() for first, last in bins) == 300
    assert all(a[1] < b[0] for a, b in pairwise(bins))
