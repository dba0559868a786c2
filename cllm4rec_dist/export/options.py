"""Options of an export, checked before torch is imported and before anything is read."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.preflight import folder_problems

LICENSES = tuple(Path(__file__).with_name("licenses.txt").read_text(encoding="utf-8").split())
"""Licence identifiers of the Hugging Face hub."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export, in addition to adapters, tables and embeddings.

    Attributes:
        faiss: write a FAISS index of the items.
        hub: write a folder to publish: with a model card and a local backbone, without users and local paths.
        with_users: include users' rows and ids in a folder to publish.
        license: licence identifier for the model card.
        base_model: hub id of the backbone, which is then referenced instead of included.
        push: ORG/NAME to upload to; implies `hub`.
        private: create the repository as private.
    """

    faiss: bool = False
    hub: bool = False
    with_users: bool = False
    license: str | None = None
    base_model: str | None = None
    push: str | None = None
    private: bool = False

    @property
    def is_public(self) -> bool:
        """True for a folder to publish."""
        return self.hub or self.push is not None

    @property
    def includes_users(self) -> bool:
        """True if users' rows and ids are written."""
        return self.with_users or not self.is_public


def output_problems(output: Path) -> list[CLLM4RecError]:
    """Return errors if `output` cannot be created."""
    if output.exists():
        return [ConfigError("output", str(output), "exists", "Choose another folder, or remove it.")]
    return folder_problems("output", str(output))


def option_problems(options: ExportOptions) -> list[CLLM4RecError]:
    """Return errors for invalid options and missing dependencies."""
    problems: list[CLLM4RecError] = []
    if options.faiss and importlib.util.find_spec("faiss") is None:
        problems.append(
            ConfigError("--faiss", "faiss", "is not installed", "pip install faiss-cpu (or cllm4rec_dist[faiss]).")
        )
    if not options.is_public:
        given = {"--with-users": options.with_users, "--license": options.license, "--base-model": options.base_model}
        cure = "Add --hub for a folder to publish, or leave it out."
        problems += [
            ConfigError(name, value, "is for a folder to publish", cure) for name, value in given.items() if value
        ]
    if options.private and options.push is None:
        problems.append(ConfigError("--private", True, "is for a repository", "Add --push ORG/NAME, or leave it out."))
    if options.license is not None and options.license not in LICENSES:
        problems.append(_unknown_license(options.license))
    if options.base_model is not None and not _is_repository(options.base_model):
        problems.append(ConfigError("--base-model", options.base_model, "is not a hub id", "Write it as ORG/NAME."))
    if options.push is not None:
        problems += _push_problems(options.push)
    return problems


def _unknown_license(name: str) -> ConfigError:
    close = difflib.get_close_matches(name.lower(), LICENSES, n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return ConfigError(
        "--license",
        name,
        "is not a licence identifier of the Hugging Face hub",
        f"{hint}For an unlisted licence use other, and add license_name and license_link to README.md.",
    )


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _push_problems(repository: str) -> list[CLLM4RecError]:
    from huggingface_hub import constants, get_token

    if not _is_repository(repository):
        return [
            ConfigError(
                "--push",
                repository,
                "is not a valid repository name",
                "Write it as ORG/NAME: letters, digits, - _ and . (96 at most).",
            )
        ]
    if constants.HF_HUB_OFFLINE:
        return [ConfigError("--push", repository, "needs the hub, but HF_HUB_OFFLINE is set", "Unset it.")]
    if get_token() is None:
        return [
            ConfigError(
                "--push",
                repository,
                "needs a hub token, but there is none",
                "Run `hf auth login`, or set HF_TOKEN to a token with write access"
                " (https://huggingface.co/settings/tokens). --hub alone writes the folder.",
            )
        ]
    return []
