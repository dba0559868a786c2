"""What cannot be exported is refused before anything is read, and what is missing is named with its cure."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from cllm4rec_dist.cli import main
from cllm4rec_dist.export.options import LICENSES, ExportOptions, option_problems, output_problems


def problems(**options: object) -> str:
    return "\n".join(map(str, option_problems(ExportOptions(**options))))  # type: ignore[arg-type]


def test_a_missing_faiss_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problems(faiss=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install faiss-cpu" in problems(faiss=True)
    assert not problems()


@pytest.mark.parametrize("option", [{"with_users": True}, {"license": "mit"}, {"base_model": "a/b"}])
def test_what_is_of_a_folder_to_publish_alone_is_refused_without_one(option: dict[str, object]) -> None:
    assert "is for a folder to publish" in problems(**option)
    assert not problems(hub=True, **option)


def test_a_private_folder_is_no_repository() -> None:
    assert "Add --push" in problems(hub=True, private=True)


def test_a_licence_is_one_that_the_hub_knows() -> None:
    assert not any(problems(hub=True, license=name) for name in LICENSES)
    assert {"apache-2.0", "mit", "cc-by-nc-sa-4.0", "openrail++", "other"} <= set(LICENSES)
    assert "Did you mean apache-2.0" in problems(hub=True, license="Apache2.0")
    assert "use other" in problems(hub=True, license="our own")


def test_an_upload_needs_a_token_and_a_hub_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in problems(push="shop/books")
    assert "ORG/NAME" in problems(push="books")
    assert "ORG/NAME" in problems(push="shop/books/2")
    assert "ORG/NAME" in problems(push="https://huggingface.co/shop/books")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert not problems(push="shop/books", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in problems(push="shop/books")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert "exists" in str(output_problems(tmp_path)[0])
    assert not output_problems(tmp_path / "new")
    (tmp_path / "file").touch()
    assert "cannot be a folder" in str(output_problems(tmp_path / "file" / "new")[0])


def test_the_command_line_tells_all_of_it_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "nowhere", str(tmp_path), "--license", "mti", "--private"])
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert all(name in stderr for name in ("output", "--license", "--private"))


def test_without_a_token_nothing_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["export", "nowhere", str(tmp_path / "new"), "--push", "shop/books"])
    assert ended.value.code == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_are_checked_without_torch() -> None:
    code = "import sys, cllm4rec_dist.export.options as o; o.option_problems(o.ExportOptions(push='a/b', license='x'))"
    check = "; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)
