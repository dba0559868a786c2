"""Uploads through huggingface_hub: every call is one that its real functions take; there is no network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.export.hub import create_repository, upload

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of the hub, bound to the real signatures; each is answered as for a public repository."""
    seen: Calls = []

    def answer(name: str, result: object) -> Callable[..., object]:
        signature = inspect.signature(getattr(HfApi, name))

        def call(*arguments: Any, **options: Any) -> object:
            seen.append((name, dict(signature.bind(*arguments, **options).arguments)))
            return result

        return call

    monkeypatch.setattr(HfApi, "create_repo", answer("create_repo", None))
    monkeypatch.setattr(HfApi, "repo_info", answer("repo_info", SimpleNamespace(private=False)))
    monkeypatch.setattr(HfApi, "upload_folder", answer("upload_folder", SimpleNamespace(commit_url="https://hub/c/1")))
    return seen


def test_a_repository_is_created_or_taken(calls: Calls) -> None:
    create_repository("shop/books", private=False)
    ((name, options),) = calls
    assert (name, options["repo_id"], options["exist_ok"], options["private"]) == (
        "create_repo",
        "shop/books",
        True,
        None,
    )


def test_a_public_repository_is_not_taken_for_a_private_one(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="exists already and is public"):
        create_repository("shop/books", private=True)
    assert calls[0][1]["private"] is True
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(private=True))
    create_repository("shop/books", private=True)


def test_a_repository_holds_the_folder_and_nothing_that_was_there_before(calls: Calls, tmp_path: Path) -> None:
    assert upload(tmp_path, "shop/books") == "https://hub/c/1"
    ((name, options),) = calls
    assert (name, options["repo_id"], options["folder_path"]) == ("upload_folder", "shop/books", tmp_path)
    assert options["delete_patterns"] == "*"


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), ConnectionError("no route"), OSError("disk")])
def test_what_the_hub_refuses_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(ConfigError, match="hf auth whoami"):
        create_repository("shop/books", private=False)
    with pytest.raises(ConfigError, match="hf upload shop/books"):
        upload(tmp_path, "shop/books")
