"""Tables, curves and the page, from small hand-made results."""

import json
import re

import pytest

from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation.plots import read_curves
from cllm4rec_dist.evaluation.report import (
    ExampleRecommendation,
    RecommendedItem,
    ResultRow,
    Results,
    markdown_table,
    read_results,
    write_report,
)

HOSTILE = "<script>alert('x')</script> & \"$\\frac{1}$"


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
        config={"backbone": {"name": "tiny"}},
        fingerprints={"checkpoint": "abc123"},
        skipped={"users with too few items": 7},
    )


@pytest.fixture
def log(tmp_path):
    lines = [{"step": step, "stage": "finetune", "loss": 9 / step, "loss/content": 1.0} for step in range(1, 50)]
    lines += [{"step": 20, "valid/recall@20": 0.1}, {"step": 40, "valid/recall@20": 0.2}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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
    example = ExampleRecommendation("u1", ["old title"], [RecommendedItem("new title", hit=True)])
    page = write_report(tmp_path / "out", results, [log], [example])
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"results.json", "results.md", "metrics.png", "loss.png", "validation.png", "report.html"}
    text = page.read_text(encoding="utf-8")
    for part in ("+25.0%", "old title", 'class="hit">new title', "abc123", "users with too few items", "name: tiny"):
        assert part in text
    assert "1,234 users" in text
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,22})', text)
    assert len(sources) == 6  # three pictures, light and dark
    assert set(sources) == {"data:image/png;base64,"}
    assert "http" not in text


def test_results_json_comes_back_and_other_versions_are_refused(results, tmp_path):
    path = write_report(tmp_path, results, [], []).with_name("results.json")
    assert read_results(path) == results
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"schema_version": 2}))
    with pytest.raises(ConfigError, match="schema_version"):
        read_results(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "absent.json")


def test_hostile_text_is_escaped(tmp_path):
    row = ResultRow(name=HOSTILE, metrics={HOSTILE: 0.5}, chosen={HOSTILE: HOSTILE})
    hostile = Results(
        dataset=HOSTILE,
        rows=(row, row.model_copy(update={"baseline": True})),
        num_users=1,
        seconds=0.0,
        config={HOSTILE: HOSTILE},
        fingerprints={HOSTILE: HOSTILE},
        skipped={HOSTILE: HOSTILE},
    )
    example = ExampleRecommendation(HOSTILE, [HOSTILE], [RecommendedItem(HOSTILE)])
    text = write_report(tmp_path, hostile, [], [example]).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_baselines_alone_make_a_report(tmp_path):
    rows = tuple(ResultRow(name=name, metrics={"recall@20": 0.0}, baseline=True) for name in ("a", "b"))
    text = write_report(tmp_path, Results(dataset="d", rows=rows, num_users=1, seconds=1.0), [], []).read_text()
    assert "against" not in text


def test_curves_keep_the_later_value_of_a_step_and_drop_a_torn_line(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "stage": "pretrain", "loss": 2.0}\n{"step": 3, "loss": NaN}\n'
        '{"step": 2, "loss": 1.5}\n{"step": 1, "valid/ndcg@10": 0.5}\n{"step": 4, "lo'
    )
    assert read_curves([path]) == {
        "run": {"loss": ([1], [3.0])},
        "pretrain": {"loss": ([2], [1.5]), "valid/ndcg@10": ([1], [0.5])},
    }


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"step": null}'])
def test_a_damaged_log_is_named(tmp_path, results, line):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"run\.jsonl line 2"):
        write_report(tmp_path / "out", results, [path], [])
    assert not (tmp_path / "out").exists()


def test_an_absent_log_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_curves([tmp_path / "absent.jsonl"])
