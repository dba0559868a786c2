"""Commands to run after a stage, and the first log line, before any slow import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cllm4rec_dist.monitoring.next_steps import next_commands, resume_command
from tests.manifests import make_manifest

CONFIG = "corpus: c\nbackbone: b\noutput: o\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my shop" / "runs" / "pretrain"
    folder.mkdir(parents=True)
    return folder


def test_after_pretraining_comes_the_configuration_beside_its_own(run: Path) -> None:
    config = Path("launch/shop-pretrain.yaml")
    config.parent.mkdir()
    finetune = config.with_name("shop-finetune.yaml")
    finetune.write_text(CONFIG + "init_from: my shop/runs/pretrain\n")
    assert next_commands("pretrain", run, config) == ["cllm4rec finetune -c launch/shop-finetune.yaml"]


def test_from_another_run_than_the_configuration_names_another_output_is_trained(run: Path) -> None:
    """Else the command would resume, without a word but a warning, what the configuration's output has."""
    config = Path("launch/shop-pretrain.yaml")
    config.parent.mkdir()
    config.with_name("shop-finetune.yaml").write_text(CONFIG + "init_from: another\n")
    command = "cllm4rec finetune -c launch/shop-finetune.yaml init_from='my shop/runs/pretrain' output="
    assert next_commands("pretrain", run, config) == [f"{command}'my shop/runs/finetune'"]
    run.with_name("finetune").mkdir()
    assert next_commands("pretrain", run, config) == [f"{command}'my shop/runs/finetune-2'"]
    warm = run.parent / "warm"
    warm.mkdir()
    assert next_commands("pretrain", warm, config)[0].endswith("output='my shop/runs/warm-finetune'")


def test_the_second_stage_has_the_corpus_of_the_first_and_its_permission_for_a_leak(run: Path) -> None:
    """As when a grown catalog is trained from settings on the command line (docs/running.md)."""
    (run.parents[1] / "finetune.yaml").write_text(CONFIG + f"init_from: {run}\n")
    (run / "config.yaml").write_text(f"corpus: {Path('grown').absolute()}\nbackbone: owner/name\nallow_leak: true\n")
    more = "corpus=grown backbone=owner/name --allow-leak"
    assert next_commands("pretrain", run) == [f"cllm4rec finetune -c 'my shop/finetune.yaml' {more}"]


def test_after_pretraining_in_a_project_comes_its_finetuning(run: Path) -> None:
    (run.parents[1] / "finetune.yaml").write_text(CONFIG + f"init_from: {run}\n")
    assert next_commands("pretrain", run) == ["cllm4rec finetune -c 'my shop/finetune.yaml'"]


def test_without_another_configuration_the_same_one_finetunes(run: Path) -> None:
    more = "init_from='my shop/runs/pretrain' output='my shop/runs/pretrain-finetune'"
    assert next_commands("pretrain", run, Path("run.yaml")) == [f"cllm4rec finetune -c run.yaml {more}"]
    assert next_commands("pretrain", run) == [f"cllm4rec finetune -c 'my shop/runs/pretrain/config.yaml' {more}"]


def test_after_finetuning_the_run_is_used(run: Path) -> None:
    tuned = run.with_name("finetune")
    assert next_commands("finetune", tuned) == [
        "cllm4rec evaluate 'my shop/runs/finetune'",
        "cllm4rec serve 'my shop/runs/finetune'",
    ]


@pytest.mark.parametrize(("num_test", "commands"), [(1, ["evaluate", "serve"]), (0, ["serve"])])
def test_a_run_whose_corpus_holds_nothing_out_is_not_evaluated(run: Path, num_test: int, commands: list[str]) -> None:
    tuned, corpus = run.with_name("finetune"), run / "corpus"
    for folder in (tuned, corpus):
        folder.mkdir()
    (tuned / "config.yaml").write_text(f"corpus: {corpus}\n")
    manifest = make_manifest(num_interactions={"train": 400, "valid": 0, "test": num_test})
    (corpus / "manifest.json").write_bytes(manifest.to_bytes())
    assert next_commands("finetune", tuned) == [f"cllm4rec {name} 'my shop/runs/finetune'" for name in commands]


def test_a_run_goes_on_from_its_own_configuration(run: Path) -> None:
    command = "cllm4rec pretrain -c 'my shop/runs/pretrain/config.yaml' --workers 4"
    assert resume_command("pretrain", run, 4) == command
    (run / "config.yaml").write_text(f"output: {run}\n")
    assert resume_command("pretrain", run, 4) == command
    (run / "config.yaml").write_text(f"output: {run.with_name('original')}\n")
    assert resume_command("pretrain", run, 4) == f"{command} output='my shop/runs/pretrain'", "of a copy"


def test_the_first_line_comes_before_torch_is_imported(run: Path) -> None:
    Path("run.yaml").write_text(CONFIG)
    code = """
import sys
from cllm4rec_dist.cli import main, train
train.preflight.require_ready = lambda *arguments, **options: None
train.launch = lambda *arguments, **options: print("torch" in sys.modules)
main(["pretrain", "-c", "run.yaml", "--workers", "2"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d\d:\d\d:\d\d pretrain: reading run.yaml\n", result.stderr)
    assert result.stdout.splitlines()[:2] == ["False", f"pretrain done: {Path('o').absolute()}"]
