"""The sentences of the report page, and what they are worked out from."""

import polars as pl
import pytest

from cllm4rec_dist.evaluation.page import (
    headline,
    is_of_evaluation,
    join_words,
    lead,
    make_catalog,
    make_groups,
    reproduce_commands,
)
from cllm4rec_dist.evaluation.per_user import Rival
from cllm4rec_dist.evaluation.statistics import PairedTest
from tests.evaluation.samples import METRICS, make_items, make_values, results_of


def rival(metric: str, verdict: str, name: str = "EASE") -> Rival:
    return Rival(metric, name, 0.25, 0.2, PairedTest(100, 0.05, 0.01, 0.09, 0.02, verdict))


@pytest.mark.parametrize(
    ("rivals", "sentence", "tone"),
    [
        ([rival("recall@20", "ahead")], "Ahead of EASE in Recall@20.", "ahead"),
        ([rival("recall@20", "behind"), rival("ndcg@5", "behind")], "Behind EASE in every metric.", "behind"),
        (
            [rival("recall@20", "level"), rival("recall@40", "ahead"), rival("ndcg@5", "ahead")],
            "Ahead of EASE in Recall@40 and NDCG@5, level in Recall@20.",
            "ahead",
        ),
        (
            [rival("recall@20", "ahead"), rival("ndcg@5", "behind", "iALS")],
            "Ahead of the best baseline in Recall@20, behind in NDCG@5.",
            "level",
        ),
        (
            [rival("recall@20", "level"), rival("ndcg@5", "behind")],
            "Level with EASE in Recall@20, behind in NDCG@5.",
            "behind",
        ),
        ([rival("recall@20", "too few users")], "Too few users to tell from EASE in Recall@20.", "level"),
    ],
)
def test_headlines(rivals, sentence, tone):
    assert headline(rivals) == (sentence, tone)


def test_a_warning_takes_the_colour_and_the_claim_away():
    sentence, tone = headline([rival("recall@20", "ahead")], comparable=False)
    assert sentence == "See the warning above; by the metrics alone ahead of EASE in Recall@20."
    assert tone == "level"


def test_leads():
    popular = Rival("recall@20", "Popularity", 0.25, 0.1, PairedTest(1, None, None, None, None, "too few users"))
    assert lead(rival("recall@20", "level"), popular, "the items that a user took last") == (
        "Of the items that a user took last, the model's list of 20 held 25.0% on average; the list of EASE, "
        "the best baseline, held 20.0%, and the 20 most popular items 10.0%."
    )
    assert lead(rival("ndcg@5", "level"), None, "-") == "NDCG@5 is 0.250 for the model, 0.200 for EASE."


def test_words_are_joined():
    assert [join_words("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_known_and_new_users_are_judged_apart():
    users, baselines = make_values(num_users=60, num_new=24)
    known, new = make_groups(users, baselines, results_of(users, baselines), "x")
    assert (known.title, known.num_users, new.title, new.num_users) == ("Known users", 36, "New users", 24)
    assert new.verdict.headline == "Ahead of EASE in every metric."
    assert {rival.test.num_users for rival in (*new.verdict.rivals, *new.verdict.popularity)} == {24}
    of_new = users.filter(pl.col("group") == "new")["recall@20"].mean()
    assert new.rows[0].metrics["recall@20"] == pytest.approx(of_new)
    assert [row.name for row in new.rows] == ["CLLM4Rec", "Popularity", "EASE"]
    assert sum(bin.model.num_users for bin in new.bins) == 24


def test_a_single_kind_of_users_needs_no_title_and_no_baselines_no_verdict():
    users, _ = make_values()
    (group,) = make_groups(users, None, results_of(users, None), "x")
    assert (group.title, group.verdict, group.baseline) == ("", None, None)
    assert group.bins


def test_popularity_alone_is_the_best_baseline():
    users, baselines = make_values(offsets={"CLLM4Rec": 0.0, "Popularity": -0.3})
    (group,) = make_groups(users, baselines, results_of(users, baselines), "the items")
    assert group.verdict.headline == "Ahead of Popularity in every metric."
    assert "most popular" not in group.verdict.lead


def test_values_of_another_evaluation_are_told_apart():
    users, baselines = make_values(num_new=20)
    row = results_of(users, baselines).rows[0]
    assert is_of_evaluation(users, row)
    assert is_of_evaluation(users, results_of(users.filter(pl.col("group") == "known"), None).rows[0])
    assert not is_of_evaluation(users.with_columns(pl.col("recall@20") * 0.999), row)
    assert not is_of_evaluation(users.drop("ndcg@100"), row)
    assert not is_of_evaluation(users.head(0), row)


def test_the_catalog_by_hand():
    lists = pl.DataFrame({"item": ["i1", "i3", "i19"], "count": [40, 40, 20]})
    section = make_catalog({"CLLM4Rec": lists}, make_items(), 50)
    use = section.uses["CLLM4Rec"]
    assert (use.num_recommended, use.coverage, use.popular_share) == (3, 0.15, 0.4)  # i0 and i1 are the popular tenth
    assert section.training_share == (20 + 19) / 210
    assert [(item.title, item.count, item.share) for item in section.most_recommended] == [
        ("Title 1", 40, 0.8),
        ("Title 3", 40, 0.8),
        ("Title 19", 20, 0.4),
    ]


def test_commands_are_quoted():
    assert reproduce_commands("/my runs/a", "finetune", "test", METRICS) == [
        "cllm4rec finetune --config '/my runs/a/config.yaml' output=NEW_RUN",
        "cllm4rec evaluate NEW_RUN --split test --metrics recall@20,ndcg@100",
    ]
