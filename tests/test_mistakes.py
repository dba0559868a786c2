"""Mistakes are reported at once, with field, rule, cure and exit status 2, and without importing torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.manifests import make_manifest

RECIPE = """\
name: shop
source:
  format: table
  interactions: {path: orders.csv, user: customer, item: sku, timestamp: bought_at}
"""
RUN = "{corpus: corpus, backbone: backbones/demo, output: runs/new}\n"
ORDERS = "customer,sku,bought_at\n" + "".join(
    f"c{index % 7},s{index % 5},2025-01-{1 + index % 28:02d}\n" for index in range(60)
)
PROJECT = {"recipe.yaml": RECIPE, "pretrain.yaml": RUN, "finetune.yaml": RUN, "backbone.yaml": "{hidden_size: 32}\n"}

PRETRAIN = ["pretrain", "-c", "run.yaml"]
FINETUNE = ["finetune", "-c", "run.yaml"]
PREPARE = ["prepare", "recipe.yaml", "out", "--tokenizer", "backbones/demo"]
INIT = ["init", "new", "--orders"]

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # commands and options
    "command": (["evalute", "runs/done"], ["evalute", "Did you mean 'evaluate'"]),
    "old command": (["backbone", "recipe.yaml", "x"], ["'backbone'", "build-backbone"]),
    "option": (["evaluate", "runs/done", "--metric", "recall@5"], ["--metric", "--metrics"]),
    "missing option": (["pretrain"], ["--config"]),
    "launcher": ([*PRETRAIN, "--launcher", "proces"], ["--launcher", "Did you mean 'process'"]),
    "workers": ([*PRETRAIN, "--workers", "two"], ["--workers", "'two'", "8 or 4:8"]),
    "settings section": (["settings", "optimzer"], ["'optimzer'", "Did you mean 'optimizer'"]),
    "settings of a recipe": (["settings", "recipe.splt"], ["'splt'", "Did you mean 'split'"]),
    "gpu": (["plan", "-c", "run.yaml", "--gpus", "8", "--gpu", "h10"], ["--gpu", "Did you mean 'h100'"]),
    "planned width": (
        ["plan", "-c", "run.yaml", "--gpus", "8", "embeddings.dim=4096"],
        ["embeddings.dim: 4096 exceeds the backbone's hidden size, 64"],
    ),
    "planned width that int8 cannot pack": (
        ["plan", "-c", "run.yaml", "--gpus", "8", "embeddings.dim=20", "optimizer.embeddings_state=int8"],
        ["'int8' cannot pack rows of width 20"],
    ),
    # run files and their overrides
    "run file": (["pretrain", "-c", "rn.yaml"], ["'rn.yaml' does not exist", "Did you mean 'run.yaml'"]),
    "folder for a file": (["pretrain", "-c", "runs"], ["'runs' is a folder", "YAML file"]),
    "recipe for a run": (["pretrain", "-c", "recipe.yaml"], ["'a recipe' is not a run configuration"]),
    "run for a recipe": (["prepare", "run.yaml", "out", "--tokenizer", "backbones/demo"], ["is not a recipe"]),
    "yaml tab": (["pretrain", "-c", "tab.yaml"], ["tab.yaml", "line 2", "spaces, not tabs"]),
    "yaml bracket": (["pretrain", "-c", "bracket.yaml"], ["bracket.yaml", "is not readable YAML", "line"]),
    "section": ([*PRETRAIN, "optimzer.lr=1"], ["optimzer", "did you mean 'optimizer'"]),
    "key": ([*PRETRAIN, "optimizer.leraning_rate=1"], ["Keys of optimizer: lr, embeddings_lr"]),
    "key of the file": ([*PRETRAIN, "epoch=3"], ["epoch is not a key", "did you mean 'epochs'"]),
    "option of another command": (
        [*PRETRAIN, "--baselines", "popularity,ease"],
        ["'--baselines' is an option of `cllm4rec evaluate`, not of pretrain", "give it to evaluate"],
    ),
    "setting as an option": ([*PRETRAIN, "--epochs", "3"], ["--epochs: '3' is no option", "Write epochs=3."]),
    "setting of a section as an option": ([*FINETUNE, "--embeddings-lr=1"], ["Write optimizer.embeddings_lr=1."]),
    "setting of several sections": ([*PRETRAIN, "--dropout", "0"], ["adapter.dropout=0 or embeddings.dropout=0"]),
    "misspelt setting as an option": ([*PRETRAIN, "--epoch", "3"], ["Write epochs=3."]),
    "option of a project": (["run", "project", "--min-user-items=4"], ["Write recipe.min_user_items=4."]),
    "misspelt option": ([*PRETRAIN, "--wrokers", "3"], ["--workers"]),
    "old key": ([*PRETRAIN, "rows.dropout=0.5"], ["rows", "embeddings"]),
    "colon": ([*PRETRAIN, "optimizer.lr: 1e-3"], ["must look like", "Write optimizer.lr=1e-3"]),
    "no value": ([*PRETRAIN, "optimizer.lr"], ["'optimizer.lr' must look like section.key=value"]),
    "value": ([*PRETRAIN, "optimizer.lr=fast"], ["optimizer.lr", "'fast'"]),
    "decimal comma of a setting": ([*PRETRAIN, "optimizer.lr=0,001"], ["optimizer.lr", "Write 0.001"]),
    "decimal comma": ([*INIT, "orders.csv", "--rating-threshold", "3,5"], ["'--rating-threshold'", "Write 3.5: the"]),
    "decimal comma of a score": (["recommend", "runs/done", "--min-score", "-0,5"], ["'--min-score'", "Write -0.5"]),
    "no number": (
        [*INIT, "orders.csv", "--rating-threshold", "four"],
        ["'--rating-threshold'", "'four' is not a number"],
    ),
    "negative": ([*PRETRAIN, "optimizer.lr=-1"], ["optimizer.lr", "greater than 0"]),
    "boolean for a number": ([*PRETRAIN, "batch.texts=false"], ["batch.texts", "valid integer", "got 'false'"]),
    "boolean for a number or nothing": ([*PRETRAIN, "max_steps=yes"], ["max_steps", "valid integer", "got 'true'"]),
    "boolean in a list of numbers": ([*PRETRAIN, "optimizer.betas=[true, 0.9]"], ["optimizer.betas.0", "got 'true'"]),
    "list": ([*PRETRAIN, "validation.metrics=recall@20,ndcg@10"], ["must be a list", "[recall@20, ndcg@10]"]),
    "open list": ([*PRETRAIN, "optimizer.betas=[0.9"], ["optimizer.betas=[0.9", "is not YAML"]),
    "word": ([*PRETRAIN, "adapter.kind=lorra"], ["'lorra' is not one of lora, none, full", "did you mean 'lora'"]),
    "value for a section": ([*PRETRAIN, "optimizer=3"], ["optimizer must be a section"]),
    "below a value": ([*PRETRAIN, "seed.a=1"], ["seed"]),
    "metric": ([*FINETUNE, "validation.metrics=[recal@20]"], ["'recal@20'", "Did you mean 'recall@20'"]),
    # paths of a run
    "backbone": ([*PRETRAIN, "backbone=backbones/dmo"], ["'backbones/dmo'", "Did you mean 'backbones/demo'"]),
    "backbone is a corpus": ([*PRETRAIN, "backbone=corpus"], ["backbone", "is a corpus"]),
    "corpus": ([*PRETRAIN, "corpus=corpse"], ["corpus", "manifest.json", "Did you mean 'corpus'"]),
    "project for a corpus": ([*PRETRAIN, "corpus=whole"], ["manifest.json", "Did you mean", "whole/corpus'"]),
    "init_from": ([*FINETUNE, "init_from=runs/don"], ["init_from", "Did you mean"]),
    "output is a file": ([*PRETRAIN, "output=orders.csv"], ["output", "orders.csv is a file"]),
    "output below a file": ([*PRETRAIN, "output=orders.csv/x"], ["output", "orders.csv is a file"]),
    "variable": ([*PRETRAIN, "corpus=$NO_SUCH/x"], ["NO_SUCH is not set"]),
    # runs
    "run": (["evaluate", "runs/doen"], ["'runs/doen'", "does not exist", "Did you mean 'runs/done'"]),
    "corpus for a run": (["evaluate", "corpus"], ["it is a corpus", "a run that was trained on it"]),
    "backbone for a run": (["export", "backbones/demo", "x"], ["it is a backbone"]),
    "file for a run": (["evaluate", "orders.csv"], ["it is a file"]),
    "runs for a run": (["evaluate", "runs"], ["runs/done"]),
    "untrained run": (["evaluate", "runs/done"], ["first checkpoint"]),
    "untrained project": (["evaluate", "project"], ["cllm4rec run project"]),
    "run to audit": (["audit", "runs/doen"], ["Did you mean"]),
    "split train": (["evaluate", "runs/done", "--split", "train"], ["--split", "learnt"]),
    "split": (["evaluate", "runs/done", "--split", "tst"], ["Did you mean 'test'"]),
    "metrics": (["evaluate", "runs/done", "--metrics", "NDGC@10"], ["--metrics", "Did you mean 'ndcg@10'"]),
    "two metrics": (
        ["evaluate", "runs/done", "--metrics", "map,mrr"],
        ["evaluate: ['--metrics'] cannot", "'map'", "'mrr'", "Fix each"],
    ),
    "evaluation to a URL": (["evaluate", "runs/done", "--output", "s3://x/y"], ["--output", "is a URL"]),
    "id file": (
        ["recommend", "runs/done", "x", "--users-file", "user.txt"],
        ["user.txt", "No such file", "Did you mean 'users.txt'"],
    ),
    # recipes
    "recipe": (["prepare", "recip.yaml", "out", "--tokenizer", "backbones/demo"], ["Did you mean 'recipe.yaml'"]),
    "tokenizer": (
        ["prepare", "recipe.yaml", "out", "--tokenizer", "backbones/dem"],
        ["--tokenizer", "cllm4rec build-backbone recipe.yaml backbones/dem", "Did you mean 'backbones/demo'"],
    ),
    "tokenizer of nowhere": (
        ["prepare", "recipe.yaml", "out", "--tokenizer", "models/none"],
        ["--tokenizer", "does not exist", "cllm4rec build-backbone"],
    ),
    "raw file": ([*PREPARE, "source.interactions.path=order.csv"], ["source.interactions.path", "'orders.csv'"]),
    "column": ([*PREPARE, "source.interactions.user=custmer"], ["'custmer'", "Did you mean 'customer'"]),
    "format": ([*PREPARE, "source.format=tabel"], ["source.format", "did you mean 'table'"]),
    "nested key": (
        [*PREPARE, "source.interactions.usr=x"],
        ["source.interactions.usr is not a key", "Keys of source.interactions: path, kind", "did you mean 'user'"],
    ),
    "split of a recipe": ([*PREPARE, "split={kind: lst}"], ["split.kind", "did you mean 'last'"]),
    "key of a split": ([*PREPARE, "split={kind: last, num_vlid: 1}"], ["Keys of split: kind, num_valid, num_test"]),
    "output in use": (["prepare", "recipe.yaml", "orders.csv", "--tokenizer", "backbones/demo"], ["is a file"]),
    "key of a backbone": (["build-backbone", "recipe.yaml", "b", "hidden_sise=8"], ["did you mean 'hidden_size'"]),
    "backbone in use": (["build-backbone", "recipe.yaml", "backbones/demo"], ["already holds a backbone"]),
    # projects
    "orders": ([*INIT, "order.csv"], ["--orders", "Did you mean", "orders.csv"]),
    "no header": ([*INIT, "bare.csv"], ["--orders", "has no header", "--orders-names"]),
    "no rows": ([*INIT, "empty.csv"], ["--orders", "is empty"]),
    "header alone": ([*INIT, "header.csv"], ["--orders", "has no rows"]),
    "junk": ([*INIT, "junk.csv"], ["junk.csv"]),
    "no user": ([*INIT, "odd.csv"], ["--item-column: ['a', 'b'] leave it open", "Give --item-column"]),
    "column of init": ([*INIT, "orders.csv", "--user-column", "custmer"], ["--user-column", "Did you mean 'customer'"]),
    "dates": ([*INIT, "dates.csv"], ["--time-format: ['%d/%m/%Y', '%m/%d/%Y']", "03/04/2025"]),
    "project in use": (["init", "project", "--orders", "orders.csv"], ["is a project already", "cllm4rec run project"]),
    "folder in use": (["init", "runs", "--orders", "orders.csv"], ["is not empty", "another name"]),
    "no project": (["run", "projct"], ["does not exist", "Did you mean 'project'"]),
    "path of a project": (["run", "project", "corpus=x"], ["the project decides"]),
    "key of a project": (["run", "project", "finetune.epoch=3"], ["epoch is not a key"]),
}

PROGRAM = """
import contextlib, io, json, sys, time
from cllm4rec_dist.cli import main
answers = {}
for name, arguments in json.load(sys.stdin).items():
    output, status, started = io.StringIO(), 0, time.process_time()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            output.write(f"TRACEBACK {error!r}")
    modules = sorted({"torch", "ray", "transformers", "deepspeed"} & sys.modules.keys())
    answers[name] = [status, output.getvalue(), time.process_time() - started, modules]
json.dump(answers, sys.stdout)
"""


def write_files(folder: Path) -> None:
    contents: dict[str, str] = {
        "recipe.yaml": RECIPE,
        "run.yaml": RUN,
        "orders.csv": ORDERS,
        "users.txt": "a\n",
        "tab.yaml": "corpus: c\n\tbackbone: b\n",
        "bracket.yaml": "corpus: [a\nbackbone: b\n",
        "bare.csv": ORDERS.partition("\n")[2],
        "empty.csv": "",
        "header.csv": "customer,sku,bought_at\n",
        "odd.csv": "a,b\n" + "".join(f"{index % 9},{index % 7}\n" for index in range(60)),
        "dates.csv": "customer,sku,bought_at\n" + "c1,s1,03/04/2025\nc2,s2,05/06/2025\nc1,s2,07/08/2025\n" * 5,
        "corpus/manifest.json": make_manifest().to_bytes().decode(),
        "backbones/demo/config.json": '{"hidden_size": 64}',
        "backbones/demo/tokenizer.json": "{}",
        "runs/done/config.yaml": RUN,
    } | {f"project/{name}": text for name, text in PROJECT.items()}
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copytree(folder / "corpus", folder / "whole" / "corpus")
    (folder / "junk.csv").write_bytes(bytes(range(256)) * 40)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Status, text, seconds of CPU and modules for each mistake, all of them made in one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_files(folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    arguments = {name: given for name, (given, _) in MISTAKES.items()}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"},
    )
    assert process.returncode == 0, process.stderr
    answers: dict[str, Any] = json.loads(process.stdout)
    after = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert [str(path) for path in after if path not in before] == [], "something was written"
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_at_once_with_its_cure(name: str, answers: dict[str, Any]) -> None:
    status, output, seconds, modules = answers[name]
    assert "TRACEBACK" not in output, output
    assert "Traceback" not in output, output
    assert status == 2, output
    for words in MISTAKES[name][1]:
        assert words in output, output
    assert not modules, f"{modules} were imported, which takes seconds"
    assert seconds < 1, output
