"""Uploading a folder to the Hugging Face hub, which is made to hold this folder and nothing else.

The repository is created, and its visibility checked, before anything is written, so that a token without write access
or a name that is taken costs no time. Files that an earlier export left there and this one does not have are deleted:
users that are no longer exported must not stay. (They stay in the repository's history.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from cllm4rec_dist.errors import CLLM4RecError, ConfigError

logger = logging.getLogger(__name__)


def create_repository(name: str, *, private: bool) -> None:
    """Create a model repository, or take the one that is there.

    Args:
        name: ORG/NAME.
        private: refuse one that is there and public. Otherwise a new one has the organisation's default.

    Raises:
        ConfigError: where the hub refuses, or cannot be reached.
    """
    api = HfApi()
    with _asking("--push", name, "Check the name, and that the token may write there (`hf auth whoami`)."):
        api.create_repo(name, repo_type="model", private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type="model").private:
            raise ConfigError(
                "--private", name, "is there already and public", "Choose another name, or hide it first."
            )


def upload(folder: Path, name: str) -> str:
    """Make a repository hold the files of `folder` and no others; the address of the commit.

    Raises:
        ConfigError: where the hub refuses, or cannot be reached.
    """
    with _asking("--push", name, f"{folder} is complete: try again with `hf upload {name} {folder} --delete '*'`."):
        commit = HfApi().upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=folder,
            commit_message="Export of cllm4rec_dist",
            delete_patterns="*",
        )
    logger.info("uploaded to %s", commit.commit_url)
    return str(commit.commit_url)


@contextmanager
def _asking(field: str, value: str, cure: str) -> Iterator[None]:
    try:
        yield
    except CLLM4RecError:
        raise
    except Exception as error:  # of the hub, of its client, of the network
        reason = " ".join(str(error).split())
        raise ConfigError(field, value, f"failed at the hub ({type(error).__name__}: {reason})", cure) from error
