"""The Markdown table and the report page of small made-up results."""

import json
import re
from html.parser import HTMLParser

import polars as pl
import pytest

from cllm4rec_dist.corpus.manifest import LeftOut
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.report import Background, write_report
from cllm4rec_dist.evaluation.results import (
    ExampleRecommendation,
    Provenance,
    RecommendedItem,
    ResultRow,
    Results,
    markdown_table,
)
from tests.evaluation.samples import make_items, make_values, results_of, write_values
from tests.manifests import make_manifest

HOSTILE = "<script>alert('x')</script> & \"$\\frac{1}$ {{ 7 * 7 }}"


@pytest.fixture
def results() -> Results:
    return Results(
        dataset="demo",
        rows=(
            ResultRow(name="CLLM4Rec", metrics={"recall@20": 0.2, "ndcg@100": 0.1}, stderr={"recall@20": 0.01}),
            ResultRow(name="EASE | x", metrics={"recall@20": 0.16}, chosen={"lambda": 200.0}, baseline=True),
        ),
        num_users=1234,
        seconds=5.0,
        config={"backbone": "tiny", "stage": "finetune", "seed": 4711},
        fingerprints={"checkpoint": "abc123"},
        skipped={"users with too few items": 7},
    )


@pytest.fixture
def log(tmp_path):
    lines = [{"step": step, "stage": "finetune", "loss": 9 / step, "loss/text": 1.0} for step in range(1, 50)]
    lines += [{"step": 20, "valid/recall@20": 0.1}, {"step": 40, "valid/recall@20": 0.2}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line | {"time": 100.0 + line["step"]}) + "\n" for line in lines))
    return path


def text_of(page: str) -> str:
    """Return the visible text of a page, one line for each element, without scripts and styles."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts, self.silent = [], 0

        def handle_starttag(self, tag, attrs):
            self.silent += tag in ("script", "style")

        def handle_endtag(self, tag):
            self.silent -= tag in ("script", "style")

        def handle_data(self, data):
            if not self.silent:
                self.texts.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.texts).split())


def test_markdown_table(results):
    assert markdown_table(results).splitlines() == [
        "| Model | Recall@20 | NDCG@100 |",
        "| --- | ---: | ---: |",
        "| CLLM4Rec | **0.2000** ± 0.0100 | **0.1000** |",
        "| EASE \\| x | 0.1600 | – |",
    ]


def test_rows_that_look_equal_are_equally_best(results):
    rows = tuple(ResultRow(name=name, metrics={"recall@20": value}) for name, value in (("a", 0.20001), ("b", 0.20002)))
    assert markdown_table(results.model_copy(update={"rows": rows})).count("**0.2000**") == 2


def test_report_writes_everything_self_contained(results, log, tmp_path):
    example = ExampleRecommendation("u1", ["old title"], [RecommendedItem("new title", hit=True)], 2)
    other = ExampleRecommendation("u2", ["old title"], [RecommendedItem("new title")], 1)
    background = Background(run="runs/a", examples=[example, other], share_with_hit=0.125, metrics_files=[log])
    page = write_report(tmp_path / "out", results, background)
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"results.json", "results.md", "metrics.png", "loss.png", "validation.png", "report.html"}
    html = page.read_text(encoding="utf-8")
    assert '<li class="hit">new title</li>' in html
    text = text_of(html)
    for part in ("old title", "abc123", "users with too few items", "seed: 4711", "1,234 users"):
        assert part in text
    for part in (
        "u1 1 of 2 held-out items in the list of 1",
        "u2 none of 1 held-out item in the list of 1",
        "1 user whose list contains a held-out item, and 1 whose list contains none.",
        "Of all users, 12.5% have such a list.",
    ):
        assert part in text
    assert "Training time 1 min 8 s" in text
    sources = re.findall(r'(?:src|srcset)="([^"]{0,22})', html)
    assert len(sources) == 6  # two terms of the loss and a validation metric, light and dark
    assert set(sources) == {"data:image/png;base64,"}
    assert set(re.findall(r'href="([^"]*)"', html)) == {"#glossary"}
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'" in html


def test_results_json_holds_the_results(results, tmp_path):
    path = write_report(tmp_path, results, Background()).with_name("results.json")
    assert Results.model_validate_json(path.read_text()) == results


def test_the_verdict_stands_in_words_with_its_test(tmp_path):
    users, baselines = make_values()
    write_values(tmp_path, users, baselines)
    page = write_report(tmp_path, results_of(users, baselines), Background(items=make_items()))
    text = text_of(page.read_text(encoding="utf-8"))
    assert "Ahead of EASE in every metric." in text
    assert "Paired t-test over 60 users." in text
    assert re.search(r"Difference \+0\.\d{4}, 95% interval \+0\.\d{4} to \+0\.\d{4}, p < 0\.001\.", text)
    assert "Against the most popular items for everyone" in text
    assert "10.0% 2 of 20" in text  # coverage
    assert "Title 1 40 lists 66.7%" in text
    assert "No verdict" not in text
    assert "Known users" not in text.partition("Glossary")[0]


def test_new_users_have_a_verdict_and_a_table_of_their_own(tmp_path):
    users, baselines = make_values(num_users=60, num_new=10)
    write_values(tmp_path, users, baselines)
    text = text_of(write_report(tmp_path, results_of(users, baselines), Background()).read_text(encoding="utf-8"))
    assert "Known users 50" in text
    assert "New users 10" in text
    assert "Too few users to tell from EASE in every metric." in text


def test_what_is_absent_is_said(tmp_path, results):
    text = text_of(write_report(tmp_path, results, Background()).read_text(encoding="utf-8"))
    assert "No verdict: a paired test needs values per user." in text
    assert "Left out: there are no values per user (users.parquet)." in text
    assert "Left out: there is no count of recommended items (recommended.parquet)." in text
    alone = results.model_copy(update={"rows": results.rows[:1]})
    text = text_of(write_report(tmp_path, alone, Background()).read_text(encoding="utf-8"))
    assert "No verdict: the evaluation was made without baselines" in text


def test_values_of_an_earlier_evaluation_are_not_used(tmp_path):
    users, baselines = make_values()
    write_values(tmp_path, users, baselines)
    other = results_of(users.head(40), baselines.filter(baselines["user"].is_in(users.head(40)["user"].to_list())))
    text = text_of(write_report(tmp_path, other, Background()).read_text(encoding="utf-8"))
    assert "users.parquet is of another evaluation" in text
    assert "Paired t-test over" not in text
    # Baselines that an earlier evaluation left behind, now that there are none in the table.
    alone = results_of(users, None)
    text = text_of(write_report(tmp_path, alone, Background()).read_text(encoding="utf-8"))
    assert "No verdict: the evaluation was made without baselines" in text


def test_warnings_come_first_and_no_claim_is_made_beside_them(tmp_path):
    users, baselines = make_values()
    write_values(tmp_path, users, baselines)
    note = "trained on 12 held-out interactions: the figures are not comparable"
    results = results_of(users, baselines).model_copy(update={"notes": (note,)})
    html = write_report(tmp_path, results, Background(split="valid")).read_text(encoding="utf-8")
    assert html.index(note) < html.index("See the warning above")
    assert "the results are too optimistic" in text_of(html)
    assert 'class="card verdict level"' in html


def test_the_header_says_what_was_evaluated(tmp_path, results):
    origin = Provenance(
        date="2026-11-26T03:20:11+00:00",
        checkpoint="best-00000010",
        step=10,
        stage="finetune",
        best_metric="recall@20",
        best_value=0.65,
        best_step=10,
        num_trained=40_000_000,
        num_frozen=7_200_000_000,
        device="NVIDIA H100",
        num_ranks=1,
        num_training_ranks=8,
    )
    shown = results.model_copy(update={"provenance": origin})
    text = text_of(write_report(tmp_path, shown, Background(run="runs/a")).read_text(encoding="utf-8"))
    for part in (
        "26 November 2026, 03:20 UTC",
        "best-00000010 finetune, step 10",
        "validation Recall@20 0.6500",
        "Parameters 7.24B 40M trained, 7.2B frozen",
        "NVIDIA H100 trained on 8 ranks, evaluated on 1 rank",
        "cllm4rec evaluate NEW_RUN --split test --metrics recall@20,ndcg@100",
    ):
        assert part in text


def test_hostile_text_is_escaped(tmp_path):
    row = ResultRow(name=HOSTILE, metrics={"recall@20": 0.5}, chosen={HOSTILE: HOSTILE})
    hostile = Results(
        dataset=HOSTILE,
        rows=(row, row.model_copy(update={"baseline": True})),
        num_users=1,
        seconds=0.0,
        config={HOSTILE: HOSTILE, "backbone": HOSTILE, "stage": HOSTILE},
        fingerprints={HOSTILE: HOSTILE},
        skipped={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    example = ExampleRecommendation(HOSTILE, [HOSTILE], [RecommendedItem(HOSTILE)], 1)
    items = make_items().with_columns(title=pl.lit(HOSTILE))
    users, _ = make_values()
    write_values(tmp_path, users, None)
    background = Background(run=HOSTILE, examples=[example], items=items)
    html = write_report(tmp_path, hostile, background).read_text(encoding="utf-8")
    assert html.count("<script") == 1
    assert html.count("&lt;script&gt;") > 10
    assert "{{ 7 * 7 }}" in html


def test_what_was_left_out_has_its_count_share_and_first_place(tmp_path, results):
    reason = "users with too few items"
    left = LeftOut(count=1200, share=0.032, file="orders.csv", line=7, value="<b>")
    manifest = make_manifest(num_items=20, num_interactions={"train": 300}, skipped={reason: left})
    shown = results.model_copy(update={"skipped": {reason: 1200}})
    text = text_of(write_report(tmp_path, shown, Background(manifest=manifest)).read_text(encoding="utf-8"))
    assert f"{reason} first: orders.csv line 7 '<b>' 1,200 3.2%" in text
    assert "Users 60 Items 20 Interactions, train 300" in text


def test_baselines_alone_make_a_report(tmp_path):
    rows = tuple(ResultRow(name=name, metrics={"recall@20": 0.0}, baseline=True) for name in ("a", "b"))
    assert write_report(tmp_path, Results(dataset="d", rows=rows, num_users=1, seconds=1.0), Background()).is_file()


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"step": null}'])
def test_a_damaged_log_is_named_and_nothing_is_written(tmp_path, results, line):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"run\.jsonl line 2"):
        write_report(tmp_path / "out", results, Background(metrics_files=[path]))
    assert not (tmp_path / "out").exists()


def test_a_single_user_makes_a_report_without_a_verdict(tmp_path):
    users, baselines = make_values(num_users=1)
    write_values(tmp_path, users, baselines)
    text = text_of(write_report(tmp_path, results_of(users, baselines), Background()).read_text(encoding="utf-8"))
    assert "Too few users to tell from EASE in every metric." in text
    assert re.search(r"Difference \+0\.\d{4}\. Paired t-test over 1 user\.", text)
    assert "1 item 1 user" in text
