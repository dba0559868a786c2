"""The model card says what the run is, tells no secrets, and its lines of Python compute the run's scores."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import evaluate_run, load
from cllm4rec_dist.evaluation.topk import rank_users
from cllm4rec_dist.export import hub
from cllm4rec_dist.export.card import _have_same_settings, _matches, escape_markdown, score_lines
from cllm4rec_dist.export.folder import export
from cllm4rec_dist.export.options import ExportOptions
from cllm4rec_dist.serving.recommender import Recommender
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import make_config, run

HEAD = {"similarity": "cosine", "item_bias": True, "pool_residual": True}
DOT = {"similarity": "dot", "item_bias": False, "pool_residual": False}
LORA = {"kind": "lora", "rank": 4}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter": LORA,
        "head": HEAD | {"projection": True},
        "embeddings": {"dim": 6},
        "method": {"shared_user_ratio": 0.5},
    },
    "lora in bf16": {
        "adapter": LORA,
        "head": DOT | {"pool_residual": True},
        "precision": "bf16",
        "embeddings": {"comm_dtype": "bf16"},
        "batch": {"users": 9, "texts": 0},
    },
    "lora in nf4": {"adapter": LORA, "head": HEAD | {"pool_residual": False}, "quantization": "nf4"},
    "no adapter": {
        "embeddings": {"comm_dtype": "bf16"},
        "adapter": {"kind": "none"},
        "head": DOT | {"item_bias": True},
        "method": {"max_history": 3, "shared_user_ratio": 0.3},
    },
    "whole backbone": {"adapter": {"kind": "full"}, "head": HEAD | {"item_bias": False}, "stage": "finetune"},
    "whole backbone in bf16": {"adapter": {"kind": "full"}, "head": DOT, "precision": "bf16"},
}
"""Between them: every adapter, similarity, bias, pooling, precision, and both dtypes of rows."""
NAME = "Books | <b>"
EVALUATED = "whole backbone"
METRICS = ["recall@5", "ndcg@10"]
BASELINES = ("popularity", "ease", "title_ease", "ials")
HISTORIES = [[0], [3, 1, 4, 5, 9], []]
USER = 7
VECTORS = "item_embeddings.parquet"


@dataclass
class Case:
    """A run, what was exported of it, and its own scores [histories, items] without and with a user's row."""

    run: Path
    output: Path
    with_users: Path
    anyone: Tensor
    known: Tensor


def evaluated(world: World, folder: str) -> None:
    output = f"{folder}/evaluation"
    evaluate_run(world, lambda metrics: None, folder, "test", METRICS, 5, output, baselines=True)


def scores(world: World, folder: str) -> tuple[Tensor, Tensor]:
    system, _ = load(folder, world)
    num_items, histories = system.corpus.num_items, Ragged.from_lists([np.array(h, np.int32) for h in HISTORIES])

    def ranked(user: int) -> Tensor:
        actual = torch.zeros(len(HISTORIES), num_items)
        for block in rank_users(system, np.full(len(HISTORIES), user), histories, num_items, 5):
            rows, items = torch.from_numpy(block.index), torch.from_numpy(block.items)
            actual[rows[:, None], items] = torch.from_numpy(block.scores)
        return actual

    return ranked(-1), ranked(USER)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder, catalog = tmp_path_factory.mktemp("cards"), make_catalog()
    actual = {}
    for index, (name, changes) in enumerate(RUNS.items()):
        backbone = folder / f"backbone-{index % 2}"
        if not backbone.exists():
            make_backbone(backbone, catalog, family=("gpt2", "llama")[index % 2])
        corpus = folder / "corpus"
        if not corpus.exists():
            make_corpus(corpus, catalog, backbone, name=NAME)
        made, output = (folder, str(corpus), str(backbone)), folder / str(index)
        run_ranks(1, run, make_config(made, output / "run", **({"max_steps": 2} | changes)))
        if name == EVALUATED:
            run_ranks(1, evaluated, str(output / "run"))
            compare(output / "run" / "evaluation", METRICS, baselines=BASELINES, seconds=1.0)
        export(str(output / "run"), output / "hub", ExportOptions(hub=True, license="mit"))
        export(str(output / "run"), output / "users", ExportOptions(hub=True, with_users=True))
        ((anyone, known),) = run_ranks(1, scores, str(output / "run"))
        actual[name] = Case(output / "run", output / "hub", output / "users", anyone, known)
    return actual


def code_of(folder: Path) -> str:
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert match is not None
    return match[1]


DRIVER = """
import json, os, sys
sys.modules["cllm4rec_dist"] = None
for job in json.load(open(sys.argv[1])):
    os.chdir(job["folder"])
    scope = {}
    exec(job["code"], scope)
    job["scores"] = scope["scores"].tolist()
    with open(job["answer"], "w") as file:
        json.dump(job["scores"], file)
"""


@pytest.fixture(scope="module")
def computed(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tensor]:
    """By the lines of the cards, in a process without cllm4rec_dist: [histories, items] of each case and folder."""
    folder = tmp_path_factory.mktemp("answers")
    jobs, answers = [], {}
    for name, case in cases.items():
        for kind, output in (("anyone", case.output), ("known", case.with_users)):
            code = code_of(output).replace('.users"][[0]]', f'.users"][[{USER}]]')
            assert "[0, 1]" in code
            for history in HISTORIES:
                repeated = str([*history, *history[:1]])  # which counts once, where it came first
                answer = str(folder / f"{len(jobs)}.json")
                jobs.append({"folder": str(output), "code": code.replace("[0, 1]", repeated), "answer": answer})
                answers.setdefault((name, kind), []).append(answer)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, folder / "jobs.json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {key: torch.tensor([json.loads(Path(path).read_text()) for path in paths]) for key, paths in answers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_lines_of_a_card_compute_the_scores_of_the_run(
    cases: dict[str, Case], computed: dict[tuple[str, str], Tensor], name: str
) -> None:
    case = cases[name]
    tolerance = (1e-2 if "bf16" in name else 1e-5) * float(case.anyone.std())
    assert (case.anyone - case.known).abs().max() > 2 * tolerance
    torch.testing.assert_close(computed[name, "anyone"], case.anyone, rtol=0, atol=tolerance)
    torch.testing.assert_close(computed[name, "known"], case.known, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_the_python_api_gives_the_scores_and_embeddings_of_an_export(
    cases: dict[str, Case], computed: dict[tuple[str, str], Tensor]
) -> None:
    recommender, table = Recommender.load(cases["lora"].run), pq.read_table(cases["lora"].with_users / VECTORS)
    ids, history = table["item"].to_pylist(), HISTORIES[1]
    scores = recommender.score([ids[row] for row in history], ids)
    torch.testing.assert_close(torch.tensor(scores.to_numpy()), computed["lora", "anyone"][1], rtol=0, atol=1e-4)
    embeddings = recommender.item_embeddings()
    assert np.array_equal(np.stack(table["vector"].to_numpy()), embeddings.to_numpy())
    assert embeddings.index.tolist() == ids


@pytest.mark.slow
def test_ten_lines_are_enough(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        lines = [line for line in code_of(case.output).splitlines() if line and "import" not in line]
        longest = 10 + RUNS[name].get("head", {}).get("projection", False) + 2 * (name == EVALUATED)
        assert len(lines) <= (14 if "nf4" in name else longest), name


def card_of(case: Case) -> ModelCard:
    return ModelCard.load(case.output / "README.md")


@pytest.mark.slow
def test_the_front_matter_is_what_the_hub_reads(cases: dict[str, Case]) -> None:
    data = card_of(cases[EVALUATED]).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "other")
    assert "recommendation" in data.tags
    results = json.loads((cases[EVALUATED].run / "evaluation" / "results.json").read_text())["rows"][0]["metrics"]
    actual = {result.metric_type: result.metric_value for result in data.eval_results}
    assert actual == {name: pytest.approx(value, abs=1e-4) for name, value in results.items()}
    assert {(r.dataset_name, r.dataset_type, r.dataset_split) for r in data.eval_results} == {(NAME, "Books-b", "test")}
    adapted = card_of(cases["lora"]).data
    assert (adapted.library_name, adapted.eval_results, adapted.base_model) == ("peft", None, None)


@pytest.mark.slow
def test_a_card_tells_of_data_results_and_training(cases: dict[str, Case]) -> None:
    text = card_of(cases[EVALUATED]).text
    for part in (
        "| users | 23 |",
        "| interactions, train | 106 |",
        "| EASE |",
        "| CLLM4Rec |",
        "random (valid 0.1",
        "mask_ratio",
        "2311.01343",
        "popular items",
    ):
        assert part in text, part
    assert "Books \\| \\<b\\>" in text
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "was not evaluated" in card_of(cases["lora"]).text
    assert "shared_user` is zero" in text
    assert "shared_user` was trained" in card_of(cases["lora"]).text


@pytest.mark.slow
def test_a_folder_to_publish_tells_nobody_who_and_where(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        private = [str(case.run.parent.parent).encode(), b"user-0", str(Path.home()).encode() + b"/"]
        for path in case.output.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not any(secret in content for secret in private), (name, path)
        assert not list(case.output.glob("user*"))
        assert not any("users" in key for key in load_file(case.output / "tables.safetensors"))
        assert "Users are left out" in card_of(case).text
        assert (case.with_users / "user_embeddings.parquet").is_file()
        assert "Users are in this folder" in (case.with_users / "README.md").read_text()


@pytest.mark.slow
def test_results_of_another_checkpoint_are_not_shown(
    cases: dict[str, Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(cases[EVALUATED].run, run_folder)
    _, names = find(str(run_folder))
    assert names[0].startswith("best-")
    file = run_folder / "evaluation" / "evaluation.json"
    file.write_text(file.read_text().replace(names[0], "best-00000099"))
    export(str(run_folder), tmp_path / "hub", ExportOptions(hub=True))
    assert "evaluates another checkpoint" in caplog.text
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results is None
    export(str(run_folder / "checkpoints" / names[0]), tmp_path / "other", ExportOptions(hub=True))
    assert ModelCard.load(tmp_path / "other" / "README.md").data.eval_results is None


@pytest.mark.slow
def test_notes_name_no_run(cases: dict[str, Case], tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(cases[EVALUATED].run, run_folder)
    file = run_folder / "evaluation" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"notes": ["started from /home/me/secret-run"]}))
    export(str(run_folder), tmp_path / "hub", ExportOptions(hub=True))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "secret-run" not in card
    assert "| CLLM4Rec |" in card


@pytest.mark.slow
def test_a_backbone_of_the_hub_is_named_and_not_copied(cases: dict[str, Case], tmp_path: Path) -> None:
    output = tmp_path / "hub"
    written = export(str(cases["lora"].run), output, ExportOptions(hub=True, base_model="shop/decoder"))
    assert "backbone" not in written
    assert json.loads((output / "scoring.json").read_text())["backbone"] == "shop/decoder"
    adapter = json.loads((output / "collaborative" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "shop/decoder"
    assert ModelCard.load(output / "README.md").data.base_model == "shop/decoder"
    assert 'from_pretrained("shop/decoder"' in code_of(output)
    copied = json.loads((cases["lora"].output / "collaborative" / "adapter_config.json").read_text())
    assert copied["base_model_name_or_path"] == "backbone"


@pytest.mark.slow
def test_the_index_gives_the_best_of_the_lines(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "no adapter"):
        output = tmp_path / name
        assert "items.faiss" in export(str(cases[name].run), output, ExportOptions(hub=True, faiss=True))
        monkeypatch.chdir(output)
        scope: dict[str, Any] = {}
        for code in re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL):
            exec(code, scope)  # noqa: S102 - our own card
        best = scope["scores"].topk(10)
        assert scope["best_rows"][0].tolist() == best.indices.tolist()
        assert np.allclose(scope["best_scores"][0], best.values, atol=1e-5)


@pytest.mark.slow
def test_a_repository_is_asked_for_first_and_filled_last(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, *, private: bool) -> None:
        raise CLLM4RecError("--push", name, "is taken", "Choose another name.")

    output, seen = tmp_path / "hub", []
    monkeypatch.setattr(hub, "create_repository", refuse)
    with pytest.raises(CLLM4RecError, match="is taken"):
        export(str(cases["lora"].run), output, ExportOptions(push="shop/books"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(hub, "create_repository", lambda name, private: seen.append((name, private, output.exists())))
    monkeypatch.setattr(hub, "upload", lambda folder, name: seen.append((name, (folder / "README.md").is_file())))
    export(str(cases["lora"].run), output, ExportOptions(push="shop/books", private=True))
    assert seen == [("shop/books", True, False), ("shop/books", True)]
    assert "hf download shop/books" in (output / "README.md").read_text()


@pytest.mark.slow
def test_a_card_needs_the_corpus_and_titles_are_left_out_without_it(
    cases: dict[str, Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder, corpus = cases["lora"].run, cases["lora"].run.parent.parent / "corpus"
    moved = corpus.rename(corpus.with_name("moved"))
    try:
        with pytest.raises(CLLM4RecError, match="corpus"):
            export(str(run_folder), tmp_path / "hub", ExportOptions(hub=True))
        export(str(run_folder), tmp_path / "plain")
        assert "no titles" in caplog.text
        assert pq.read_table(tmp_path / "plain" / VECTORS)["title"].null_count == 17
        export(str(run_folder), tmp_path / "hub", ExportOptions(hub=True), corpus=str(moved))
        assert pq.read_table(tmp_path / "hub" / VECTORS)["title"].null_count == 0
    finally:
        moved.rename(corpus)


def test_the_documentation_shows_the_lines_of_a_card() -> None:
    head = {"similarity": "cosine", "item_bias": True, "pool_residual": True, "projection": False}
    scoring = {
        "precision": "fp32",
        "quantization": "none",
        "rows_dtype": "fp32",
        "input_projection": False,
        "adapter": {"kind": "lora"},
        "head": head,
        "linear": {"weight": 2.0},
        "history": {"longest": 256},
        "backbone": "BACKBONE",
    }
    page = Path(__file__).parents[2] / "docs" / "export.md"
    assert f"```python\n{score_lines(scoring, ExportOptions(hub=True))}```" in page.read_text(encoding="utf-8")


def test_markup_in_names_is_shown_as_it_is() -> None:
    assert escape_markdown("a | <b> *c*\n# d") == r"a \| \<b\> \*c\* \# d"


def test_an_evaluation_has_the_settings_that_the_run_has_chosen_itself() -> None:
    """The run file leaves the offset of new items open, and the export has the one that validation chose."""
    head = {"similarity": "cosine", "new_item_offset": None}
    measured = {"config": {"head": head | {"new_item_offset": -3.75}}, "fingerprints": {}, "checkpoint": "x/best-1"}
    metadata = SimpleNamespace(fingerprints={}, config={"head": head})
    for offset in (-3.75, -2.0, None):
        config = SimpleNamespace(model_dump=lambda offset=offset, **_: {"head": head | {"new_item_offset": offset}})
        source: Any = SimpleNamespace(opened=SimpleNamespace(name="best-1", metadata=metadata), config=config)
        assert _matches(measured, source) == (offset == -3.75)


def test_an_evaluation_may_name_the_width() -> None:
    exported = {"stage": "finetune", "embeddings": {"dim": None, "init": "spectral"}, "linear": {"neighbors": 3}}
    measured = exported | {"embeddings": {"dim": 16, "init": "spectral"}, "linear": {"neighbors": 3, "dropout": None}}
    assert _have_same_settings(measured, exported)
    for change in ({"stage": "pretrain"}, {"linear": {"neighbors": 4}}, {"embeddings": {"dim": 16, "init": "normal"}}):
        assert not _have_same_settings(measured | change, exported)
